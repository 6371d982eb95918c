"""The CE2P head: its wiring against one written down a second time, its losses, its context modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn

from ccnet_d2.engine import apply_overrides
from ccnet_d2.layers import PSP, RCCA
from ccnet_d2.losses import CategoryConsistentLoss
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling import CCNet, CE2PHead, add_ccnet_config

RUN = "lip/ce2p_R_101_D16_473x473_115k.py"
SHAPE = {
    "res2": ShapeSpec(channels=6, stride=4),
    "res3": ShapeSpec(channels=8, stride=8),
    "res4": ShapeSpec(channels=10, stride=16),
    "res5": ShapeSpec(channels=12, stride=16),
}
IGNORE = 255


def make_head(**options) -> CE2PHead:
    torch.manual_seed(0)
    defaults = {
        "num_classes": 5,
        "channels": 16,
        "decoder_channels": 14,
        "fine_channels": 7,
        "edge_channels": 9,
        "norm": "BN",
        "dropout": 0.0,
    }
    head = CE2PHead(SHAPE, **{**defaults, **options})
    for name, parameter in head.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)  # at 0 RCCA would be the identity
    return head


def features_and_labels(size: int = 33) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = {
        name: torch.randn(2, spec.channels, *(2 * [-(-size // spec.stride)]), generator=generator)
        for name, spec in SHAPE.items()
    }
    labels = (
        torch.randint(0, 5, (2, 5, 5), generator=generator).repeat_interleave(7, 1).repeat_interleave(7, 2)
    )
    labels = labels[:, :size, :size].clone()
    labels[0, :4] = IGNORE
    return features, labels


def paper_forward(head: CE2PHead, features: dict[str, torch.Tensor], align: bool) -> dict[str, torch.Tensor]:
    """CE2P with RCCA as the papers describe it, out of the head's weights."""

    def block(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Convolution, batch norm, leaky ReLU."""
        norm = conv.norm
        x = F.conv2d(x, conv.weight, None, padding=conv.weight.shape[-1] // 2)
        statistics = (None, None) if head.training else (norm.running_mean, norm.running_var)
        return F.leaky_relu(
            F.batch_norm(x, *statistics, norm.weight, norm.bias, training=head.training), 0.01
        )

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, features["res2"].shape[-2:], mode="bilinear", align_corners=align)

    def classify(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)

    res5, rcca = features["res5"], head.context
    context = rcca.context(block(rcca.conva, res5))
    out = block(rcca.fuse, torch.cat([res5, block(rcca.convb, context)], 1))
    decoder, edge = head.decoder, head.edge
    joined = torch.cat([enlarge(block(decoder.reduce, out)), block(decoder.fine, features["res2"])], 1)
    fine = block(decoder.fuse[1], block(decoder.fuse[0], joined))
    edge_maps = [block(conv, features[f"res{i + 2}"]) for i, conv in enumerate(edge.reduce)]
    edge_logits = torch.cat([enlarge(classify(edge.shared, x)) for x in edge_maps], 1)
    everything = torch.cat([fine, *(enlarge(x) for x in edge_maps)], 1)
    return {
        "context": context,
        "parsing_1": classify(decoder.classifier, fine),
        "parsing_2": classify(head.classifier, block(head.fuse, everything)),
        "edge": classify(edge.classifier, edge_logits),
    }


def edge_map(labels: np.ndarray, ignored: int) -> np.ndarray:
    """(H, W) -> 1 where two different labels meet within one pixel, diagonals included."""
    height, width = labels.shape
    core = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            for y2, x2 in ((y + 1, x), (y, x + 1)):
                if y2 < height and x2 < width and ignored not in (labels[y, x], labels[y2, x2]):
                    if labels[y, x] != labels[y2, x2]:
                        core[y, x] = core[y2, x2] = True
    padded = np.pad(core, 1)
    wide = np.any([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
    return np.where(labels == ignored, ignored, wide)


@pytest.mark.parametrize(("align", "ignored", "weight"), [(True, IGNORE, 1.0), (False, 4, 0.7)])
def test_losses_are_those_of_the_papers(align, ignored, weight):
    head = make_head(
        category_consistent="piecewise", align_corners=align, ignore_value=ignored, loss_weight=weight
    )
    nn.init.normal_(head.category_features.weight)
    features, labels = features_and_labels()
    labels[labels == IGNORE] = ignored
    _, losses = head(features, labels)
    maps = paper_forward(head, features, align)

    def enlarged(name: str) -> torch.Tensor:
        return F.interpolate(maps[name], labels.shape[-2:], mode="bilinear", align_corners=align)

    edges = torch.from_numpy(np.stack([edge_map(one, ignored) for one in labels.numpy()]))
    positive, negative = (edges == 1).sum(), (edges == 0).sum()
    shares = torch.stack([positive, negative]) / (positive + negative)
    expected = {
        "loss_parsing_1": F.cross_entropy(enlarged("parsing_1"), labels, ignore_index=ignored),
        "loss_parsing_2": F.cross_entropy(enlarged("parsing_2"), labels, ignore_index=ignored),
        "loss_edge": F.cross_entropy(enlarged("edge"), edges, shares, ignore_index=ignored),
        "loss_category_consistent": CategoryConsistentLoss(align_corners=align, ignore_index=ignored)(
            head.category_features(maps["context"]), labels
        ),
    }
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], weight * value, rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_the_answer_is_parsing_2_at_the_image_s_size():
    head = make_head()
    features, labels = features_and_labels()
    head(features, labels)  # running statistics other than those at the start
    head.eval()
    maps = paper_forward(head, features, True)
    logits, losses = head(features, None, (29, 31))
    expected = F.interpolate(maps["parsing_2"], (29, 31), mode="bilinear", align_corners=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert losses == {} and head(features)[0].shape == (2, 5, 36, 36)


def test_dropout_comes_before_the_last_classifier_only():
    head = make_head(dropout=0.5)
    features, labels = features_and_labels()
    torch.manual_seed(0)
    first = head(features, labels)[1]
    second = head(features, labels)[1]
    assert first["loss_parsing_2"] != second["loss_parsing_2"]
    assert first["loss_parsing_1"] == second["loss_parsing_1"] and first["loss_edge"] == second["loss_edge"]


def test_published_layout_and_size():
    """Every convolution of the full model, written down from the papers and CE2P's code."""
    with torch.device("meta"):
        model = instantiate(get_config(RUN).model)
    head, net = model.sem_seg_head, model.backbone
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.dim() == 4}
    assert shapes == {
        "context.conva.weight": (512, 2048, 3, 3),
        "context.context.qkv.weight": (64 + 64 + 512, 512, 1, 1),
        "context.convb.weight": (512, 512, 3, 3),
        "context.fuse.weight": (512, 2560, 3, 3),
        "decoder.reduce.weight": (256, 512, 1, 1),
        "decoder.fine.weight": (48, 256, 1, 1),
        "decoder.fuse.0.weight": (256, 304, 1, 1),
        "decoder.fuse.1.weight": (256, 256, 1, 1),
        "decoder.classifier.weight": (20, 256, 1, 1),
        "edge.reduce.0.weight": (256, 256, 1, 1),
        "edge.reduce.1.weight": (256, 512, 1, 1),
        "edge.reduce.2.weight": (256, 1024, 1, 1),
        "edge.shared.weight": (2, 256, 3, 3),
        "edge.classifier.weight": (2, 6, 1, 1),
        "fuse.weight": (256, 1024, 1, 1),
        "classifier.weight": (20, 256, 1, 1),
    }
    assert head.context.context.recurrence == 2
    assert isinstance(head.context.conva.norm, nn.SyncBatchNorm)
    assert isinstance(head.context.conva.activation, nn.LeakyReLU)
    # Output stride 16: strides in res3 and res4, dilation 2 in res5.
    assert [s[0].conv2.stride[0] for s in net.stages] == [1, 2, 2, 1]
    assert [{b.conv2.dilation[0] for b in s} for s in net.stages] == [{1}, {1}, {1}, {2}]
    assert [len(stage) for stage in net.stages] == [3, 4, 23, 3]


def test_473_pixels_become_30():
    cfg = get_config(RUN)
    with torch.device("meta"):
        features = instantiate(cfg.model.backbone).eval()(torch.empty(1, 3, 473, 473))
    shapes = [tuple(features[f"res{i}"].shape[1:]) for i in (2, 3, 4, 5)]
    assert shapes == [(256, 119, 119), (512, 60, 60), (1024, 30, 30), (2048, 30, 30)]


def test_psp_is_one_override_and_ce2p_itself():
    cfg = apply_overrides(get_config(RUN), ["model.sem_seg_head.context=psp"])
    with torch.device("meta"):
        head = instantiate(cfg.model).sem_seg_head
    block = head.context
    assert isinstance(block.context, PSP) and block.standalone
    assert not hasattr(block, "conva") and not hasattr(block, "fuse")
    assert [tuple(level.conv.weight.shape) for level in block.context.levels] == [(512, 2048, 1, 1)] * 4
    assert tuple(block.context.fuse.conv.weight.shape) == (512, 4096, 3, 3)


@pytest.mark.parametrize("context", ["none", "rcca_r1", "rcca_r3", "nl", "hv", "psp", "aspp", "danet"])
def test_every_context_trains(context):
    head = make_head(context=context)
    features, labels = features_and_labels()
    sum(head(features, labels)[1].values()).backward()
    assert head.context.context.training and head.classifier.weight.grad.abs().sum() > 0
    if context.startswith("rcca"):
        assert isinstance(head.context.context, RCCA) and head.context.context.recurrence == int(context[-1])


def test_a_context_module_of_ones_own():
    head = make_head(context=nn.Identity(), category_consistent=CategoryConsistentLoss(form="quadratic"))
    features, labels = features_and_labels()
    assert head(features, labels)[1]["loss_category_consistent"].isfinite()


def test_labels_ignored_throughout_train_to_nothing():
    head = make_head(category_consistent="piecewise")
    features, labels = features_and_labels()
    losses = head(features, torch.full_like(labels, IGNORE))[1]
    sum(losses.values()).backward()
    assert {loss.item() for loss in losses.values()} == {0.0}


def test_images_of_several_sizes_and_padding():
    """What a batch pads carries neither parsing nor edge loss; answers come in each image's own size."""
    cfg = get_config("quick_schedules/ce2p_ccl_R_18_lip_fixture.py")
    model = instantiate(cfg.model)
    batch = []
    for height, width in ((48, 40), (64, 33)):
        labels = torch.randint(0, 20, (height, width))
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "sem_seg": labels, "height": 2 * height, "width": width + 3})
    losses = model(batch)
    assert set(losses) == {"loss_parsing_1", "loss_parsing_2", "loss_edge", "loss_category_consistent"}
    model.eval()
    with torch.no_grad():
        answers = model(batch)
    assert [tuple(one["sem_seg"].shape) for one in answers] == [(20, 96, 43), (20, 128, 36)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "magic"}, "magic"),
        ({"in_features": ["res2", "res9"]}, "'res9' is not among"),
        ({"in_features": ["res5"]}, r"two of the backbone's features or more, got \['res5'\]"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"category_consistent": "cubic"}, "category_consistent='cubic' is not one of"),
        ({"context": "psp", "category_consistent": "piecewise"}, "PSP as a whole head of its own"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(**options)


def test_yacs_config_builds_and_trains():
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "CCNet"
    cfg.MODEL.BACKBONE.NAME = "build_ccnet_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.CCNET.OUTPUT_STRIDE = 16
    cfg.MODEL.CCNET.CATEGORY_CONSISTENT = "piecewise"
    cfg.MODEL.CCNET.CONTEXT = "rcca_r1"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "CE2PHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    assert isinstance(model, CCNet) and isinstance(model.sem_seg_head, CE2PHead)
    decoder, edge = (
        model.sem_seg_head.decoder,
        model.sem_seg_head.edge,
    )  # of widths that no key sets: the paper's
    widths = [conv.out_channels for conv in (decoder.reduce, decoder.fine, edge.reduce[0])]
    assert widths == [256, 48, 256] and model.sem_seg_head.fuse.out_channels == 256
    assert model.sem_seg_head.context.context.recurrence == 1
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    losses = model.train()([{"image": image, "sem_seg": torch.randint(0, 7, (48, 48))} for _ in range(2)])
    assert len(losses) == 4
    sum(losses.values()).backward()
