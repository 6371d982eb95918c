"""CCNet: output-stride-8 ResNet with deep stem and the RCCA head, as in the official code."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import CCNet, CCNetHead, build_resnet, resnet_output_shape

model = L(CCNet)(
    backbone=L(build_resnet)(
        depth=50,
        output_stride=8,
        stem="deep",
        ceil_mode=True,
        norm="SyncBN",
        out_features=["res4", "res5"],
    ),
    sem_seg_head=L(CCNetHead)(
        input_shape=L(resnet_output_shape)(
            depth="${...backbone.depth}",
            output_stride="${...backbone.output_stride}",
            out_features="${...backbone.out_features}",
        ),
        num_classes=19,
        channels=512,
        context="rcca",
        norm="${..backbone.norm}",
        activation="leaky_relu",
        dropout=0.1,
        aux_feature="res4",
        aux_channels=512,
        aux_loss_weight=0.4,
        loss="cross_entropy",
        ignore_value=255,
        align_corners=True,
    ),
    # ImageNet statistics, RGB.
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
