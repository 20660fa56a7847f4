"""mmdetection, LVIS v0.5, stage 1: the released *.lvis.multiscale.rfs.cos_norm.1x.

As mmdet_lvis_v1.py, which see, with repeat-factor sampling.
"""

_base_ = "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-2x_lvis-v0.5.py"
custom_imports = dict(imports=["disalign_ops.integrations.mmdet"], allow_failed_imports=False)

network = _base_.model
network.data_preprocessor.update(
    mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False
)
network.backbone.update(
    style="caffe", norm_cfg=dict(type="BN", requires_grad=False),
    init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"),
)  # fmt: skip
network.roi_head.bbox_head.cls_predictor_cfg = dict(type="DisAlignCosineLinear", scale_init=20.0)
model = dict(_delete_=True, type="DisAlignStage1", model=network)

train_dataloader = dict(sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True))
train_cfg = dict(
    _delete_=True, type="IterBasedTrainLoop", max_iters=90_000, val_interval=90_000
)  # fmt: skip
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1001, by_epoch=False),
    dict(type="MultiStepLR", milestones=[60_000, 80_000], gamma=0.1, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
