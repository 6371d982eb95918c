"""CCNet on a ResNet-18 with the basic stem and a narrow head, for small machines and images."""

from .ccnet import model

model.backbone.depth = 18
model.backbone.stem = "basic"
model.backbone.ceil_mode = False
model.backbone.norm = "BN"
model.sem_seg_head.channels = 128
model.sem_seg_head.aux_channels = 64
model.sem_seg_head.activation = "relu"
model.sem_seg_head.align_corners = False
