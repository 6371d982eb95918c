"""Mask R-CNN R-101-FPN, 3x."""

from detectron2 import model_zoo

from .mask_rcnn_R_101_FPN_1x import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
