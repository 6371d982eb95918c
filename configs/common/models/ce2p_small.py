"""CE2P with RCCA on a ResNet-18 with the basic stem and a narrow head, for small machines and images."""

from .ce2p import model

model.backbone.depth = 18
model.backbone.stem = "basic"
model.backbone.norm = "BN"
model.sem_seg_head.channels = 64
model.sem_seg_head.decoder_channels = 64
model.sem_seg_head.fine_channels = 24
model.sem_seg_head.edge_channels = 32
model.sem_seg_head.activation = "relu"
model.sem_seg_head.align_corners = False
