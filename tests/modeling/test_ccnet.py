"""The CCNet meta-architecture: Detectron2's input and output format, losses, padding, yacs and LazyConfig."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor, build_model
from torch.multiprocessing.reductions import StorageWeakRef

from ccnet_d2.errors import UserError
from ccnet_d2.layers import RCCA
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling import CCNet, CCNetHead, PlainConvNet, add_ccnet_config

SHAPE = {"conv": ShapeSpec(channels=16, stride=2)}


def small_model(**head_options):
    torch.manual_seed(0)
    options = {"num_classes": 5, "in_feature": "conv", "channels": 16, "norm": "BN", "aux_feature": None}
    return CCNet(
        backbone=PlainConvNet(channels=(8, 16), strides=(1, 2)),
        sem_seg_head=CCNetHead(SHAPE, **{**options, **head_options}),
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    )


@pytest.mark.parametrize("name", ["pixel_mean", "pixel_std"])
def test_statistics_of_the_wrong_number_of_channels(name):
    options = dict(backbone=None, sem_seg_head=None, pixel_mean=[127.5] * 3, pixel_std=[64.0])
    CCNet(**options)
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=f"^{name} has {count} values, but images have 3 channels"):
            CCNet(**{**options, name: [1.0] * count})


def sample(height=24, width=32, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        "sem_seg": torch.randint(0, classes, (height, width), generator=generator),
        "height": height,
        "width": width,
    }


def test_inference_gives_logits_of_the_wanted_size():
    model = small_model().eval()
    outputs = model([{**sample(24, 32), "height": 48, "width": 60}, sample(21, 30)])
    assert [tuple(o["sem_seg"].shape) for o in outputs] == [(5, 48, 60), (5, 21, 30)]


@pytest.mark.parametrize("align_corners", [False, True])
def test_another_size_is_reached_as_the_head_reaches_the_image_s(align_corners):
    model = small_model(align_corners=align_corners).eval()
    own, other = (
        model([{**sample(24, 32), **size}])[0]["sem_seg"] for size in ({}, {"height": 47, "width": 60})
    )
    wanted = F.interpolate(own[None], (47, 60), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(other, wanted[0])


def test_answers_are_fp32_inside_autocast():
    model = small_model().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model([sample()])[0]["sem_seg"].dtype == torch.float32


def test_without_height_and_width_the_image_s_own_size_is_used():
    out = small_model().eval()([{"image": sample(21, 30)["image"]}])
    assert out[0]["sem_seg"].shape == (5, 21, 30)


def test_head_is_the_published_composition():
    """conva, context, convb, concatenation with the input, fusion, classifier; written out here."""
    model = small_model(dropout=0.0).eval()
    head = model.sem_seg_head
    torch.nn.init.constant_(head.context.gamma, 0.5)
    x = torch.randn(1, 16, 12, 16)
    a = head.conva(x)
    expected = head.classifier(head.fuse(torch.cat([x, head.convb(head.context(a))], 1)))
    torch.testing.assert_close(head.predict(x), expected)
    logits, losses = head({"conv": x}, image_size=(23, 31))
    wanted = F.interpolate(expected, (23, 31), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, wanted)
    assert losses == {}


def test_dropout_of_whole_channels_comes_before_both_classifiers():
    head = small_model(dropout=0.5, aux_feature="conv", aux_channels=16).sem_seg_head
    seen = []
    for classifier in (head.classifier, head.auxiliary[-1]):
        classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = {"conv": torch.randn(2, 16, 12, 16)}
    head.train()(x, torch.zeros(2, 24, 32, dtype=torch.long))
    assert len(seen) == 2
    for values in seen:
        dropped = (values == 0).flatten(2).all(dim=2)
        assert 0.2 < dropped.float().mean() < 0.8
    head.eval()(x)
    assert not (seen[-1] == 0).flatten(2).all(dim=2).any()


@pytest.mark.parametrize(("align_corners", "ignored"), [(False, 255), (True, 3)])
def test_losses_equal_plain_cross_entropy(align_corners, ignored):
    options = {"dropout": 0.0, "align_corners": align_corners, "ignore_value": ignored, "loss_weight": 0.7}
    model = small_model(aux_feature="conv", aux_channels=8, aux_loss_weight=0.4, **options)
    batch = [sample(seed=0), sample(seed=1)]
    batch[0]["sem_seg"][:4] = ignored
    losses = model(batch)
    assert set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}
    # The norm layers' batch statistics are those of the same batch, so a second pass gives the same features.
    images = torch.stack([(x["image"] - 127.5) / 64 for x in batch])
    targets = torch.stack([x["sem_seg"] for x in batch])
    features = model.backbone(images)["conv"]
    head = model.sem_seg_head
    for name, logits, weight in (
        ("loss_sem_seg", head.predict(features), 0.7),
        ("loss_sem_seg_aux", head.auxiliary(features), 0.7 * 0.4),
    ):
        enlarged = F.interpolate(logits, (24, 32), mode="bilinear", align_corners=align_corners)
        expected = weight * F.cross_entropy(enlarged, targets, ignore_index=ignored)
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_is_the_mean_and_carries_no_loss():
    model = small_model(dropout=0.0)
    small, large = sample(16, 20), sample(24, 32)
    images, sizes = model._batch_images([small, large])
    assert images.shape == (2, 3, 24, 32) and sizes == [(16, 20), (24, 32)]
    assert (images[0, :, 16:] == 0).all() and (images[0, :, :, 20:] == 0).all()
    targets = model._batch_targets([small, large], (24, 32))
    assert (targets[0, 16:] == 255).all() and torch.equal(targets[0, :16, :20], small["sem_seg"])


@pytest.mark.parametrize(("height", "width"), [(16, 24), (40, 32), (24, 20)])
def test_labels_of_another_size_than_the_image_are_refused(height, width):
    """As a mapper gives them that transforms the image alone."""
    batch = [
        sample(24, 32),
        {**sample(24, 32), "sem_seg": sample(height, width)["sem_seg"], "file_name": "a.png"},
    ]
    with pytest.raises(
        ValueError, match=f"'sem_seg' of 'a.png' is {width}x{height}, but its 'image' is 32x24"
    ):
        small_model()(batch)


def test_training_without_labels_is_refused_and_leaves_the_model_as_it_was():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unlabelled = {"image": sample()["image"], "file_name": "a.png"}
    with pytest.raises(ValueError, match=r"input of 'a.png' has no 'sem_seg', .* call model.eval\(\)"):
        model([sample(), unlabelled])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_of_one_size_and_of_several_are_normalised_alike():
    """Those of one size go together."""
    model = small_model()
    one, two, other = sample(16, 20), sample(16, 20, seed=1), sample(24, 32)
    together = model._batch_images([one, two])[0]
    apart = model._batch_images([one, two, other])[0]
    assert torch.equal(together, apart[:2, :, :16, :20])
    wanted = (one["image"] - model.pixel_mean) / model.pixel_std
    assert torch.equal(together[0], wanted)
    model.size_divisibility = 32
    padded = model._batch_images([one, two])[0]
    assert padded.shape == (2, 3, 32, 32) and torch.equal(padded[:, :, :16, :20], together)
    assert (padded[:, :, 16:] == 0).all() and (padded[..., 20:] == 0).all()


def test_images_are_padded_to_what_the_backbone_needs():
    class Backbone(PlainConvNet):
        size_divisibility = 16

    model = CCNet(
        backbone=Backbone(), sem_seg_head=torch.nn.Identity(), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
    )
    assert model._batch_images([sample(17, 32)])[0].shape == (1, 3, 32, 32)


def test_checkpoints_hold_no_normalisation():
    """Published weights have none, which would then be missing, and a run's own counts."""
    assert not [name for name in small_model().state_dict() if name.startswith("pixel")]


def test_unknown_channel_order_is_refused():
    with pytest.raises(ValueError, match="input_format='rgb' is not one of 'RGB', 'BGR'"):
        CCNet(
            backbone=PlainConvNet(),
            sem_seg_head=torch.nn.Identity(),
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
            input_format="rgb",
        )


def test_batch_of_ignored_labels_trains():
    model = small_model()
    batch = [{**sample(), "sem_seg": torch.full((24, 32), 255)}]
    loss = sum(model(batch).values())
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("context", "recurrence", "recompute"),
    [
        ("rcca", 2, False),
        ("rcca_r1", 1, False),
        ("rcca_r3", 3, False),
        ("rcca_recompute", 2, True),
        ("rcca_r3_recompute", 3, True),
        ("rcca3d_recompute", 3, True),
    ],
)
def test_context_by_name(context, recurrence, recompute):
    module = small_model(context=context).sem_seg_head.context
    assert isinstance(module, RCCA)
    assert module.recurrence == recurrence and module.recompute is recompute


@pytest.mark.parametrize(
    "context",
    ["none", "nl", "nl_r2", "hv", "hv_vh", "gcn", "asymmetric_nl", "psp", "aspp", "danet", "psanet"],
)
def test_every_context_trains(context):
    # Two images: pooled branches of some modules need more than one value a channel to normalise.
    model = small_model(context=context)
    sum(model([sample(seed=0), sample(seed=1)]).values()).backward()
    assert model.sem_seg_head.classifier.weight.grad.abs().sum() > 0
    assert model.eval()([sample()])[0]["sem_seg"].shape == (5, 24, 32)


@pytest.mark.parametrize("context", ["rcca", "rcca_recompute", "nl"])
@pytest.mark.parametrize("category_consistent", [None, "piecewise"])
def test_the_context_s_output_is_gone_when_its_backward_pass_begins(context, category_consistent):
    """As the figures of memory in a network have it: whatever read the output has done its own pass by then."""
    model = small_model(context=context, category_consistent=category_consistent)
    outputs, gone = [], []

    def watch(module, inputs, out):
        outputs.append(StorageWeakRef(out.untyped_storage()))
        out.register_hook(lambda grad: gone.append(outputs[0].expired()))

    model.sem_seg_head.context.register_forward_hook(watch)
    loss = sum(model([sample()]).values())
    assert not outputs[0].expired()
    loss.backward()
    assert gone == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "rcca_r0"}, "recurrence must be at least 1"),
        ({"context": "magic"}, "unknown context module 'magic': use one of none, rcca, .*rcca_r3_recompute"),
        ({"context": "rca_r1"}, "unknown context module 'rca_r1': use one of none, rcca, .*_r<R>"),
        ({"context": "rcca_R1"}, "unknown context module 'rcca_R1': use one of none, rcca, .*_r<R>"),
        ({"context": "psp_recompute"}, "'psp' has no option 'recompute'"),
        ({"in_feature": "res9"}, "'res9' is not among"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"loss": "l2"}, "loss='l2'"),
        ({"loss": None}, "loss=None is not one of"),
        ({"context": None}, "context=None is not the name of a context module: 'none'"),
        ({"aux_feature": "conv", "aux_channels": 0}, "aux_channels=0 are too few: aux_feature=null"),
        ({"channels": 20}, "channels=20 is not a positive multiple"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_head_works_in_detectron2_s_own_segmentor():
    ours = small_model(dropout=0.0, ignore_value=3)
    ours.ignore_value = 3
    parts = {"backbone": ours.backbone, "sem_seg_head": ours.sem_seg_head}
    theirs = SemanticSegmentor(**parts, pixel_mean=[127.5] * 3, pixel_std=[64.0] * 3)
    batch = [sample(), sample(height=16, width=20, seed=1)]  # of two sizes: padded with labels to ignore
    torch.testing.assert_close(theirs.train()(batch), ours.train()(batch))
    for one, other in zip(theirs.eval()(batch), ours.eval()(batch), strict=True):
        torch.testing.assert_close(one["sem_seg"], other["sem_seg"])


def test_yacs_config_builds_and_trains():
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "CCNet"
    cfg.MODEL.BACKBONE.NAME = "build_ccnet_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "CCNetHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    cfg.MODEL.CCNET.CONTEXT = "rcca_r1"
    cfg.MODEL.CCNET.AUX_CHANNELS = 16
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    assert isinstance(model, CCNet) and model.sem_seg_head.context.recurrence == 1
    losses = model.train()([sample(64, 64, 7), sample(64, 64, 7, seed=1)])
    sum(losses.values()).backward()


def test_yacs_configs_that_lack_something_say_what():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "CCNet"
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(UserError, match=r"call ccnet_d2.modeling.add_ccnet_config\(cfg\)"):
        build_model(cfg)
    add_ccnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"  # what Detectron2's default head reads
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    with pytest.raises(UserError, match="SemSegFPNHead is a head of Detectron2's SemanticSegmentor"):
        build_model(cfg)


def test_shapes_are_known_without_data():
    torch.manual_seed(0)
    model = instantiate(get_config("toy/ccnet_synthetic.py").model).eval().to("meta")
    answer = model([{"image": torch.empty(3, 37, 44, device="meta"), "height": 20, "width": 30}])[0][
        "sem_seg"
    ]
    assert answer.is_meta and tuple(answer.shape[1:]) == (20, 30)
