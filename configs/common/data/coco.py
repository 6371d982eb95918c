"""COCO 2017 through Detectron2's own loaders, evaluated by pycocotools."""

from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader

# Detectron2's faster evaluation is part of its compiled extension, and "unofficial" by its own word.
dataloader.evaluator.use_fast_impl = False
