"""A small Mask R-CNN + RCCA that learns the drawn COCO-format fixture by heart, in minutes on a CPU.

`python projects/CCNet/tools/make_coco_fixture.py` draws the images.
"""

from detectron2 import model_zoo
from detectron2.layers import ShapeSpec

from ccnet_d2.modeling import rcca_resnet

from ..common.data.coco_fixture import dataloader
from ..common.optim import SGD as optimizer
from ..common.schedule import poly as lr_multiplier
from ..common.train import train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

resnet = model.backbone.bottom_up
resnet._target_ = rcca_resnet
resnet.freeze_at = 0
resnet.stem.norm = "BN"
resnet.stages = dict(_target_=resnet.stages._target_, depth=18, norm="BN")
model.backbone.out_channels = 64
model.backbone.norm = "BN"
model.pixel_std = [64.0, 64.0, 64.0]

rpn, roi = model.proposal_generator, model.roi_heads
rpn.head.in_channels = 64
rpn.anchor_generator.sizes = [[16], [24], [32], [48], [64]]
rpn.batch_size_per_image = 64
rpn.pre_nms_topk = (200, 100)
rpn.post_nms_topk = (100, 50)
roi.num_classes = 3
roi.batch_size_per_image = 32
roi.box_head.input_shape = ShapeSpec(channels=64, height=7, width=7)
roi.box_head.fc_dims = [128]
roi.box_predictor.input_shape = ShapeSpec(channels=128)
roi.mask_head.input_shape = ShapeSpec(channels=64, height=14, width=14)
roi.mask_head.conv_dims = [64, 64, 64]

del resnet, rpn, roi

optimizer.lr = 0.02
train.max_iter = 400
train.seed = 1
train.eval_period = 0
train.checkpointer.period = 200
train.num_pictures = 0
train.clip_grad_norm = 5.0
