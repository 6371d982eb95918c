"""RANet: output-stride-8 ResNet with deep stem and the region attention head."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import RANetHead

from .ccnet import model

model.sem_seg_head = L(RANetHead)(
    input_shape=model.sem_seg_head.input_shape,
    num_classes=19,
    channels=512,
    # "region", or one of the modules that Tab. 1 compares with: "none", "psp", "nl", ...
    context="region",
    # The paper's equations; "code" for the released code where it differs.
    variant="paper",
    representatives=8,
    # The two maps that make regions, and the two steps of their exchange (Tab. 1, Sec. 5.1).
    use_boundary=True,
    use_semantic=True,
    intra=True,
    inter=True,
    norm="${..backbone.norm}",
    activation="relu",
    dropout=0.1,
    coarse_loss_weight=0.4,
    boundary_loss_weight=0.2,
    boundary_radius=2.0,
    ignore_value=255,
    align_corners=True,
    # "coarse" evaluates the semantic score maps instead (Tab. 4).
    output="fine",
)
