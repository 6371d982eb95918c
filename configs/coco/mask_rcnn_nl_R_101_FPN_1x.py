"""Mask R-CNN R-101-FPN + NL, 1x: a non-local block right before the last block of res4.

The paper's "+NL" is one block; `model.backbone.bottom_up.recurrence=2` applies it twice.
"""

from ccnet_d2.modeling import rcca_resnet

from .mask_rcnn_R_101_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up._target_ = rcca_resnet
model.backbone.bottom_up.module = "nl"
model.backbone.bottom_up.recurrence = 1
