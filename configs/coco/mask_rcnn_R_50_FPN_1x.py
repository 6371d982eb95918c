"""Mask R-CNN R-50-FPN, 1x: Detectron2's baseline, and that of the paper's table (TPAMI, Tab. 8)."""

from detectron2 import model_zoo

from ..common.data.coco import dataloader
from ..common.train import train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x

model.backbone.bottom_up.freeze_at = 2
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 90000
# Batches come in some thousand sizes, and timing cuDNN's algorithms for each costs more than it gains: off, as it is
# in Detectron2.
train.cudnn_benchmark = False
# What the pictures show is semantic segmentation.
train.num_pictures = 0
