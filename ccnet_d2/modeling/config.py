"""Keys that CCNet adds to a yacs config."""

from detectron2.config import CfgNode


def add_ccnet_config(cfg: CfgNode) -> None:
    """Add `MODEL.CCNET`, for use with META_ARCHITECTURE "CCNet", BACKBONE.NAME "build_ccnet_resnet_backbone" and
    SEM_SEG_HEAD.NAME "CCNetHead", and `MODEL.RCCA`, for use with BACKBONE.NAME "build_resnet_rcca_backbone" and
    "build_resnet_rcca_fpn_backbone" in Detectron2's detection models. Head width, norm, classes and ignored label
    are Detectron2's own MODEL.SEM_SEG_HEAD keys."""
    node = CfgNode()
    # Backbone
    node.OUTPUT_STRIDE = 8
    node.STEM = "deep"
    node.STEM_CHANNELS = (64, 64, 128)
    node.CEIL_MODE = False
    node.CONTRACT_DILATION = False
    # Head: names are those of ccnet_d2.layers.CONTEXT_MODULES (a suffix _r<R> sets the loops) and LOSSES in
    # ccnet_d2.modeling.ccnet_head
    node.CONTEXT = "rcca"
    node.LOSS = "cross_entropy"
    # Category consistent loss: "piecewise", "quadratic", or "" for none
    node.CATEGORY_CONSISTENT = ""
    node.ACTIVATION = "relu"
    node.DROPOUT = 0.1
    node.ALIGN_CORNERS = False
    # Auxiliary classifier; "" for none
    node.AUX_FEATURE = "res4"
    node.AUX_CHANNELS = 512
    node.AUX_LOSS_WEIGHT = 0.4
    # Images are padded to a multiple of this; 0 pads no further than the batch needs
    node.SIZE_DIVISIBILITY = 0
    cfg.MODEL.CCNET = node

    node = CfgNode()
    # "rcca", or "nl" for the non-local block, right before this block of this stage
    node.MODULE = "rcca"
    node.STAGE = "res4"
    node.BEFORE = -1
    # Loops; 0 for the module's own number: 2 for "rcca", 1 for "nl"
    node.RECURRENCE = 0
    cfg.MODEL.RCCA = node
