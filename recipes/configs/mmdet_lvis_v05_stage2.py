"""mmdetection, LVIS v0.5, stage 2: the released *.lvis.multiscale.rfs.cos_norm.disalign.1x.

After mmdet_lvis_v05.py, which see; load_from is its checkpoint. Stage 2 does not repeat images.
"""

_base_ = "./mmdet_lvis_v05.py"
load_from = "work_dirs/mmdet_lvis_v05/iter_90000.pth"

network = _base_.model.model
network.roi_head.bbox_head.loss_cls = dict(
    type="GRWCrossEntropyLoss", counts="data/lvis_v0.5/annotations/lvis_v0.5_train.json",
    num_classes=1230, rho=0.8, normalizer="weights",
)  # fmt: skip
model = dict(_delete_=True, type="DisAlignStage2", model=network)

train_dataloader = dict(
    dataset=dict(_delete_=True, **_base_.train_dataloader.dataset.dataset),
)
train_cfg = dict(max_iters=4500, val_interval=1500)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1001, by_epoch=False),
    dict(type="MultiStepLR", milestones=[4000], gamma=0.1, by_epoch=False),
]
