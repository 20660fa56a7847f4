"""mmsegmentation, ADE20K, FCN-R50-D8: the released stage 2, on mmsegmentation's checkpoint.

    tools/dist_train.sh .../recipes/configs/mmseg_ade20k_fcn_r50.py 8

of mmsegmentation, and data/ade/ADEChallengeData2016. Not trained by us: no data.
The model, the optimizer and the schedule were built once by hand with mmsegmentation 1.2.2
(mmengine 0.10.7, mmcv-lite 2.1.0): tests/integrations/test_recipe_configs.py.

Every number is the released disalign_fcn_r50-d8_512x512_160k_ade20k.py's; what is not here is that
of the base, which it changes too: batches of 4 on each GPU, SGD 0.01, momentum 0.9, weight decay
5e-4.
"""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py"
custom_imports = dict(imports=["disalign_ops.integrations.mmseg"], allow_failed_imports=False)
load_from = (
    "https://download.openmmlab.com/mmsegmentation/v0.5/fcn/fcn_r50-d8_512x512_160k_ade20k/"
    "fcn_r50-d8_512x512_160k_ade20k_20200615_100713-4edbc3b4.pth"
)

network = _base_.model
network.pretrained = None  # load_from has the backbone too
network.decode_head.type = "DisAlignFCNHead"
network.decode_head.loss_decode = dict(
    type="GRWCrossEntropyLoss",
    counts="data/ade/ADEChallengeData2016/objectInfo150.txt",  # column Ratio
    rho=0.2,  # exp_scale
    normalizer="count",
)
network.auxiliary_head.loss_decode.loss_weight = 0.0
model = dict(_delete_=True, type="DisAlignStage2", bn="train", model=network)

train_cfg = dict(max_iters=4000, val_interval=800)
param_scheduler = [  # end=4001: the base is 1 - iteration / 4000, as in mmcv 1; here end - 1
    dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=4001, by_epoch=False)
]
default_hooks = dict(checkpoint=dict(interval=800))
