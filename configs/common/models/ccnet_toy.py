"""CCNet on two plain convolutions: it sees a few pixels around each place, and farther only through attention."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import CCNet, CCNetHead, PlainConvNet

model = L(CCNet)(
    backbone=L(PlainConvNet)(channels=[64, 64], strides=[1, 2], norm="BN"),
    sem_seg_head=L(CCNetHead)(
        input_shape=dict(conv=dict(channels=64, stride=2)),
        in_feature="conv",
        num_classes=4,
        channels=64,
        context="rcca",
        norm="${..backbone.norm}",
        dropout=0.0,
        aux_feature=None,
    ),
    pixel_mean=[127.5, 127.5, 127.5],
    pixel_std=[64.0, 64.0, 64.0],
    input_format="RGB",
)
