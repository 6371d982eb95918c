"""RANet on two plain convolutions: it sees a few pixels around each place, and farther only through its regions."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import RANetHead

from .ccnet_toy import model

model.sem_seg_head = L(RANetHead)(
    input_shape=dict(conv=dict(channels=64, stride=2)),
    in_feature="conv",
    coarse_feature="conv",
    num_classes=4,
    channels=64,
    context="region",
    variant="paper",
    norm="${..backbone.norm}",
    dropout=0.0,
    # The squares are a few pixels wide.
    boundary_radius=1.0,
)
