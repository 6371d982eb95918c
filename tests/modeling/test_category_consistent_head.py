"""The category consistent loss in the head: what it is computed on, and when it may be asked for."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import nn

from ccnet_d2.losses import CategoryConsistentLoss
from ccnet_d2.modeling import CCNetHead, add_ccnet_config

SHAPE = {"conv": ShapeSpec(channels=12, stride=2)}


def make_head(**options) -> CCNetHead:
    torch.manual_seed(0)
    defaults = {"num_classes": 4, "in_feature": "conv", "channels": 16, "norm": "BN", "aux_feature": None}
    return CCNetHead(SHAPE, **{**defaults, **options})


def features_and_labels(seed: int = 0) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (2, 6, 8), generator=generator)
    labels[0, :2] = 255
    return {"conv": torch.randn(2, 12, 6, 8, generator=generator)}, labels


def brute_force(h: torch.Tensor, labels: torch.Tensor, linear: bool) -> torch.Tensor:
    """Eq. 3-8 with the paper's margins and weights, class by class and pixel by pixel; h (B, D, H, W)."""
    by_class = {
        c: [h[b, :, y, x] for b, y, x in (labels == c).nonzero().tolist()]
        for c in labels.unique().tolist()
        if c != 255
    }
    means = {c: torch.stack(pixels).mean(0) for c, pixels in by_class.items()}
    variance = 0.0
    for c, pixels in by_class.items():
        for pixel in pixels:
            d = (pixel - means[c]).norm()
            if linear and d > 1.5:
                variance = variance + (d - 1.5 + 1.0) / len(pixels)
            elif d > 0.5:
                variance = variance + (d - 0.5) ** 2 / len(pixels)
    distance = sum(
        (3.0 - (means[a] - means[b]).norm()).clamp(min=0) ** 2 for a in means for b in means if a != b
    )
    count = len(means)
    regularization = sum(mean.norm() for mean in means.values()) / count
    return variance / count + distance / (count * (count - 1)) + 0.001 * regularization


@pytest.mark.parametrize("form", ["piecewise", "quadratic"])
def test_loss_is_that_of_16_channels_before_convb(form):
    head = make_head(category_consistent=form, dropout=0.0)
    nn.init.constant_(head.context.gamma, 0.7)
    nn.init.normal_(head.category_features.weight, std=2.0)  # distances on both sides of the margins
    features, labels = features_and_labels()
    assert head.category_features.weight.shape == (16, 16, 1, 1)
    _, losses = head(features, labels)
    assert set(losses) == {"loss_sem_seg", "loss_category_consistent"}
    # Batch norm's statistics are those of the same batch, so a second pass gives the same features.
    embedding = head.category_features(head.context(head.conva(features["conv"])))
    expected = brute_force(embedding, labels, linear=form == "piecewise")
    torch.testing.assert_close(losses["loss_category_consistent"], expected, rtol=1e-4, atol=1e-5)

    losses["loss_category_consistent"].backward()
    assert head.conva.weight.grad.abs().sum() > 0 and head.context.gamma.grad.abs().sum() > 0
    assert head.convb.weight.grad is None and head.classifier.weight.grad is None


def test_its_labels_are_the_head_s_ignored_one_and_at_the_head_s_corners():
    head = make_head(category_consistent="piecewise", dropout=0.0, ignore_value=3, align_corners=True)
    nn.init.normal_(head.category_features.weight, std=2.0)
    features, _ = features_and_labels()
    labels = torch.randint(0, 4, (2, 12, 16), generator=torch.Generator().manual_seed(3))
    _, losses = head(features, labels)
    embedding = head.category_features(head.context(head.conva(features["conv"])))
    rows = [int(i * 11 / 5 + 0.5) for i in range(6)]
    columns = [int(j * 15 / 7 + 0.5) for j in range(8)]
    small = labels[:, rows][:, :, columns]
    expected = brute_force(embedding, small.masked_fill(small == 3, 255), linear=True)
    torch.testing.assert_close(losses["loss_category_consistent"], expected, rtol=1e-4, atol=1e-5)


def test_forms_differ_and_do_not_change_predictions():
    features, labels = features_and_labels()
    values, logits = [], []
    for form in ("piecewise", "quadratic"):
        head = make_head(category_consistent=form)
        nn.init.normal_(head.category_features.weight, std=3.0)
        values.append(head(features, labels)[1]["loss_category_consistent"].item())
        logits.append(head.eval()(features)[0])
    assert values[0] < values[1]  # linear beyond the margin
    torch.testing.assert_close(logits[0], logits[1])


def test_without_the_loss_there_is_no_convolution():
    head = make_head()
    assert not [name for name in head.state_dict() if name.startswith("category")]
    features, labels = features_and_labels()
    assert set(head(features, labels)[1]) == {"loss_sem_seg"}


def test_a_loss_of_ones_own_weights():
    loss = CategoryConsistentLoss(form="quadratic", alpha=0.0, beta=0.0, gamma=2.0)
    head = make_head(category_consistent=loss, context="none")
    features, labels = features_and_labels()
    value = head(features, labels)[1]["loss_category_consistent"]
    embedding = head.category_features(head.conva(features["conv"]))
    norms = [
        embedding.permute(0, 2, 3, 1)[labels == c].mean(0).norm() for c in labels.unique().tolist() if c < 255
    ]
    torch.testing.assert_close(value, 2 * torch.stack(norms).mean(), rtol=1e-4, atol=1e-5)


def test_wrong_requests_are_one_sentence():
    with pytest.raises(ValueError, match="PSP as a whole head of its own"):
        make_head(context="psp", category_consistent="piecewise")
    with pytest.raises(ValueError, match=r"category_consistent='cubic' is not one of 'piecewise', 'quad"):
        make_head(category_consistent="cubic")


def test_yacs_key():
    cfg = get_cfg()
    add_ccnet_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.merge_from_list(["IN_FEATURES", ["conv"], "NORM", "BN", "CONVS_DIM", 16])
    cfg.MODEL.CCNET.AUX_FEATURE = ""
    assert CCNetHead(cfg, SHAPE).category_features is None
    cfg.MODEL.CCNET.CATEGORY_CONSISTENT = "quadratic"
    assert CCNetHead(cfg, SHAPE).category_consistent_loss.form == "quadratic"
