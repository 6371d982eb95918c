"""Mask R-CNN R-50-FPN + RCCA, 1x: RCCA (R=2) right before the last block of res4 (TPAMI, Sec. 4.6)."""

from ccnet_d2.modeling import rcca_resnet

from .mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up._target_ = rcca_resnet
model.backbone.bottom_up.module = "rcca"
model.backbone.bottom_up.recurrence = 2
