"""Adapters to frameworks, a file each, imported only when asked for:

from disalign_ops.integrations import timm, torchvision, transformers, smp, lightning
from disalign_ops.integrations import mmseg, mmdet, detectron2
"""
