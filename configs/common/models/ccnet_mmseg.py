"""CCNet as in mmsegmentation: the stem of ResNetV1c, contracted dilation, ReLU, a narrower auxiliary head."""

from .ccnet import model

model.backbone.stem_channels = [32, 32, 64]
model.backbone.ceil_mode = False
model.backbone.contract_dilation = True
model.sem_seg_head.activation = "relu"
model.sem_seg_head.aux_channels = 256
model.sem_seg_head.align_corners = False
