"""mmdetection, LVIS v1, stage 2: the released *.lvisv1.multiscale.cos_norm.disalign.1x.

After mmdet_lvis_v1.py, which see; load_from is its checkpoint. Stage 2 does not repeat images.
"""

_base_ = "./mmdet_lvis_v1.py"
load_from = "work_dirs/mmdet_lvis_v1/iter_180000.pth"

network = _base_.model.model
network.roi_head.bbox_head.loss_cls = dict(
    type="GRWCrossEntropyLoss", counts="data/lvis_v1/annotations/lvis_v1_train.json",
    num_classes=1203, rho=0.8, normalizer="weights",
)  # fmt: skip
model = dict(_delete_=True, type="DisAlignStage2", model=network)

train_cfg = dict(max_iters=9000, val_interval=3000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1001, by_epoch=False),
    dict(type="MultiStepLR", milestones=[8000], gamma=0.1, by_epoch=False),
]
