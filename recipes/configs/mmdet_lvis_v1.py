"""mmdetection, LVIS v1, Mask R-CNN R50-FPN, stage 1: the released *.lvisv1.multiscale.cos_norm.1x.

    tools/dist_train.sh .../recipes/configs/mmdet_lvis_v1.py 8

of mmdetection, and data/lvis_v1. Then mmdet_lvis_v1_stage2.py. For a linear head cls_predictor_cfg
below is dict(type="DisAlignLinear"), for repeat-factor sampling the dataset stays the base's. Not
trained by us: no data.
The model, the optimizer and the schedule were built once by hand with mmdetection 3.3.0 (mmengine
0.10.7, mmcv-lite 2.1.0, whose missing compiled operations were replaced by empty names):
tests/integrations/test_recipe_configs.py.

Numbers as recipes/lvis.py, where their sources stand; what is not here is that of the base.
"""

_base_ = "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py"
custom_imports = dict(imports=["disalign_ops.integrations.mmdet"], allow_failed_imports=False)

network = _base_.model
# MSRA's ResNet-50, as released: BGR, no division by the standard deviation, BatchNorm frozen.
network.data_preprocessor.update(
    mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False
)
network.backbone.update(
    style="caffe", norm_cfg=dict(type="BN", requires_grad=False),
    init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"),
)  # fmt: skip
network.roi_head.bbox_head.cls_predictor_cfg = dict(type="DisAlignCosineLinear", scale_init=20.0)
model = dict(_delete_=True, type="DisAlignStage1", model=network)

train_dataloader = dict(
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    dataset=dict(_delete_=True, **_base_.train_dataloader.dataset.dataset),
)
train_cfg = dict(
    _delete_=True, type="IterBasedTrainLoop", max_iters=180_000, val_interval=180_000
)  # fmt: skip
param_scheduler = [  # end=1001: a factor of 1 at iteration 1000, as cvpods
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1001, by_epoch=False),
    dict(type="MultiStepLR", milestones=[120_000, 160_000], gamma=0.1, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
