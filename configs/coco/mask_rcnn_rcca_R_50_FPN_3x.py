"""Mask R-CNN R-50-FPN + RCCA, 3x."""

from detectron2 import model_zoo

from .mask_rcnn_rcca_R_50_FPN_1x import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
