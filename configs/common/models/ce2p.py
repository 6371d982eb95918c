"""CE2P with RCCA: output-stride-16 ResNet-101 with deep stem; `sem_seg_head.context="psp"` is CE2P itself."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import CCNet, CE2PHead, build_resnet, resnet_output_shape

model = L(CCNet)(
    backbone=L(build_resnet)(
        depth=101,
        output_stride=16,
        stem="deep",
        ceil_mode=False,
        norm="SyncBN",
        out_features=["res2", "res3", "res4", "res5"],
    ),
    sem_seg_head=L(CE2PHead)(
        input_shape=L(resnet_output_shape)(
            depth="${...backbone.depth}",
            output_stride="${...backbone.output_stride}",
            out_features="${...backbone.out_features}",
        ),
        in_features="${..backbone.out_features}",
        num_classes=20,
        channels=512,
        context="rcca",
        decoder_channels=256,
        fine_channels=48,
        edge_channels=256,
        dropout=0.1,
        norm="${..backbone.norm}",
        activation="leaky_relu",
        category_consistent=None,
        ignore_value=255,
        align_corners=True,
    ),
    # ImageNet statistics, RGB.
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
