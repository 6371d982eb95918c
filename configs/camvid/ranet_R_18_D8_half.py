"""RANet with ResNet-18 from random weights on CamVid at 240x180, under the schedule of `ccnet_R_18_D8_half.py`."""

from ..common.models.ranet_small import model
from .ccnet_R_18_D8_half import dataloader, lr_multiplier, optimizer, test, train

model.sem_seg_head.num_classes = 11
# At this size boundaries two pixels to either side would fill most cells of a street's far end.
model.sem_seg_head.boundary_radius = 1.0
