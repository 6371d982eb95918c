import math

import pytest
import torch

from ccnet_d2.losses import CategoryConsistentLoss

WEIGHTS = (1.0, 1.0, 0.001)


def by_loops(features, labels, form, delta_var=0.5, delta_dis=1.5):
    """Eq. 3 to 7 in Python, keeping the graph; features (B, D, h, w), labels (B, h, w)."""
    groups = {}
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1]):
            for j in range(labels.shape[2]):
                if labels[b, i, j] != 255:
                    groups.setdefault(int(labels[b, i, j]), []).append(features[b, :, i, j])
    means = {c: sum(members) / len(members) for c, members in groups.items()}

    def norm(vector):
        squared = (vector * vector).sum()
        return squared.sqrt() if squared > 0 else squared

    def phi(distance):
        if distance <= delta_var:
            return 0 * distance
        if distance <= delta_dis or form == "quadratic":
            return (distance - delta_var) ** 2
        return distance - delta_dis + (delta_dis - delta_var) ** 2

    variance = distance = regularization = 0.0
    for c, members in groups.items():
        variance = variance + sum(phi(norm(h - means[c])) for h in members) / len(members) / len(groups)
        regularization = regularization + norm(means[c]) / len(groups)
    for a in groups:
        for b in groups:
            if a != b:
                gap = norm(means[a] - means[b])
                if gap <= 2 * delta_dis:
                    distance = distance + (2 * delta_dis - gap) ** 2 / (len(groups) * (len(groups) - 1))
    return variance, distance, regularization


def sample(scale=1.0, channels=4, size=(5, 6), classes=4):
    torch.manual_seed(0)
    features = scale * torch.randn(2, channels, *size, dtype=torch.float64)
    labels = torch.randint(0, classes, (2, *size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return features.requires_grad_(), labels


@pytest.mark.parametrize("form", ["piecewise", "quadratic"])
@pytest.mark.parametrize("scale", [0.1, 0.6, 3.0])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_terms_and_gradient_against_loops(form, scale, classes):
    features, labels = sample(scale, classes=classes)
    loss = CategoryConsistentLoss(form=form)
    terms = loss.terms(features, labels)
    expected = by_loops(features, labels, form)
    for ours, theirs in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64))
    total = sum(weight * term for weight, term in zip(WEIGHTS, expected, strict=True))
    torch.testing.assert_close(loss(features, labels), total)
    (gradient,) = torch.autograd.grad(loss(features, labels), features)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, features)[0])


def test_each_term_has_its_weight_and_the_margins_are_those_given():
    features, labels = sample(2.0)
    expected = by_loops(features, labels, "piecewise", 0.3, 1.1)
    loss = CategoryConsistentLoss(delta_var=0.3, delta_dis=1.1, alpha=2.0, beta=3.0, gamma=5.0)
    assert all(term > 0 for term in expected)
    torch.testing.assert_close(
        loss(features, labels), sum(w * x for w, x in zip((2, 3, 5), expected, strict=True))
    )


@pytest.mark.parametrize("ignore_index", [-1, 7])
def test_another_label_than_255_may_be_void(ignore_index):
    features, labels = sample()
    other = labels.masked_fill(labels == 255, ignore_index)
    loss = CategoryConsistentLoss(ignore_index=ignore_index)
    assert loss(features, other) == CategoryConsistentLoss()(features, labels)


@pytest.mark.parametrize("scale", [0.6, 3.0])
def test_gradcheck(scale):
    features, labels = sample(scale, channels=2, size=(3, 3), classes=3)
    assert torch.autograd.gradcheck(lambda x: CategoryConsistentLoss(gamma=0.5)(x, labels), (features,))


def test_scales_reach_all_three_branches():
    features, labels = sample(1.0)
    distances = torch.cat(
        [
            (h - h.mean(1, keepdim=True)).norm(dim=0)
            for h in (features.transpose(0, 1)[:, labels == c] for c in range(4))
        ]
    )
    assert (distances > 1.5).any() and ((distances > 0.5) & (distances <= 1.5)).any()
    assert (sample(0.1)[0].norm(dim=1) < 0.5).any()


def test_phi_is_continuous_at_delta_dis_where_its_slope_drops_from_2_to_1():
    loss = CategoryConsistentLoss()
    at = torch.tensor([1.5 - 1e-9, 1.5, 1.5 + 1e-9], dtype=torch.float64, requires_grad=True)
    values = loss.phi_var(at)
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), atol=1e-8, rtol=0)
    (slope,) = torch.autograd.grad(values.sum(), at)
    torch.testing.assert_close(slope, torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("delta_var", "delta_dis"), [(0.5, 1.5), (0.0, 0.7), (0.3, 2.0), (0.4, 0.4)])
def test_phi_is_continuous_for_any_margins(delta_var, delta_dis):
    loss = CategoryConsistentLoss(delta_var=delta_var, delta_dis=delta_dis)
    distance = torch.linspace(0, 4, 400_001, dtype=torch.float64)
    steps = loss.phi_var(distance).diff()
    assert steps.min() >= 0 and steps.max() <= 1e-5 * max(1.0, 2 * (delta_dis - delta_var)) + 1e-12
    assert loss.phi_var(distance)[distance <= delta_var].abs().max() == 0


def test_forms_agree_up_to_delta_dis_and_part_beyond():
    distance = torch.linspace(0, 3, 301, dtype=torch.float64)
    piecewise = CategoryConsistentLoss().phi_var(distance)
    quadratic = CategoryConsistentLoss(form="quadratic").phi_var(distance)
    near = distance <= 1.5
    assert torch.equal(piecewise[near], quadratic[near])
    assert (piecewise[~near] < quadratic[~near]).all()


def test_statistics_are_those_of_the_mini_batch():
    features, labels = sample()
    images = [CategoryConsistentLoss().terms(x[None], y[None]) for x, y in zip(features, labels, strict=True)]
    batch = CategoryConsistentLoss().terms(features, labels)
    mean_of_images = sum(terms.variance.item() for terms in images) / 2
    assert not math.isclose(batch.variance.item(), mean_of_images, rel_tol=1e-3)
    joined = torch.cat(list(features), dim=2)[None], torch.cat(list(labels), dim=1)[None]
    torch.testing.assert_close(tuple(CategoryConsistentLoss().terms(*joined)), tuple(batch))


def test_class_order_and_ids_do_not_matter():
    features, labels = sample()
    renamed = torch.tensor([170, 3, 90, 12])[labels.clamp(max=3)].masked_fill(labels == 255, 255)
    loss = CategoryConsistentLoss()
    torch.testing.assert_close(loss(features, renamed), loss(features, labels))


def test_ignored_positions_take_no_part():
    features, labels = sample()
    disturbed = torch.where((labels == 255)[:, None], features + 100, features)
    loss = CategoryConsistentLoss()
    assert loss(disturbed, labels) == loss(features, labels)
    gradient = torch.autograd.grad(loss(features, labels), features)[0]
    assert gradient.transpose(0, 1)[:, labels == 255].abs().max() == 0


def test_all_ignored_is_zero_with_a_graph():
    features, labels = sample()
    loss = CategoryConsistentLoss()(features, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0 and features.grad.abs().max() == 0


def test_one_class_has_no_distance_term():
    features, labels = sample()
    terms = CategoryConsistentLoss().terms(features, torch.zeros_like(labels))
    assert terms.distance == 0 and terms.variance > 0
    CategoryConsistentLoss()(features, torch.zeros_like(labels)).backward()
    assert torch.isfinite(features.grad).all()


def test_classes_of_a_single_position_have_no_variance():
    torch.manual_seed(0)
    features = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1], [2, 255]]])
    terms = CategoryConsistentLoss().terms(features, labels)
    assert terms.variance == 0
    CategoryConsistentLoss()(features, labels).backward()
    assert torch.isfinite(features.grad).all() and features.grad.abs().sum() > 0


def test_equal_features_have_a_finite_gradient():
    features = torch.zeros(1, 16, 4, 4, requires_grad=True)
    labels = torch.arange(16).reshape(1, 4, 4) % 3
    loss = CategoryConsistentLoss()(features, labels)
    assert loss.item() == pytest.approx(9.0)  # (2 delta_dis)^2
    loss.backward()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("align_corners", [False, True])
def test_labels_come_to_the_features_size(align_corners):
    torch.manual_seed(0)
    features, labels = torch.randn(1, 4, 4, 5), torch.randint(0, 3, (1, 25, 33))
    if align_corners:
        small = labels[:, ::8, ::8]
    else:
        rows = [int((i + 0.5) * 25 / 4) for i in range(4)]
        columns = [int((j + 0.5) * 33 / 5) for j in range(5)]
        small = labels[:, rows][:, :, columns]
    loss = CategoryConsistentLoss(align_corners=align_corners)
    assert loss(features, labels) == loss(features, small)
    assert (CategoryConsistentLoss()(features, labels) == loss(features, small)) == (not align_corners)


def test_fp32_inside_autocast():
    features, labels = sample(30.0)
    low = features.detach().half()
    loss = CategoryConsistentLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(low, labels)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(low.float(), labels))


def test_piecewise_gradient_is_bounded_where_the_quadratic_one_grows():
    """What Tab. 3 is about: far from the mean, the piece-wise slope stays 1."""
    features, labels = sample(100.0)
    steep = {}
    for form in ("piecewise", "quadratic"):
        variance = CategoryConsistentLoss(form=form).terms(features, labels).variance
        steep[form] = torch.autograd.grad(variance, features)[0].norm(dim=1).max().item()
    assert steep["quadratic"] > 100 * steep["piecewise"]


def test_descent_separates_the_classes():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(12).reshape(1, 6, 6)
    features = torch.randn(1, 16, 6, 6, requires_grad=True)
    optimizer = torch.optim.SGD([features], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = CategoryConsistentLoss()(features, labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_repeated_calls_are_equal():
    features, labels = sample()
    loss = CategoryConsistentLoss()
    gradients = [torch.autograd.grad(loss(features, labels), features)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def test_errors():
    with pytest.raises(ValueError, match="form='linear' is not one of 'piecewise', 'quadratic'"):
        CategoryConsistentLoss(form="linear")
    with pytest.raises(ValueError, match=r"0 <= delta_var <= delta_dis, got 2\.0 and 1\.5"):
        CategoryConsistentLoss(delta_var=2.0)
    with pytest.raises(ValueError, match=r"0 <= delta_var <= delta_dis, got -0\.1 and 1\.5"):
        CategoryConsistentLoss(delta_var=-0.1)
    with pytest.raises(ValueError, match=r"expected features \(B, K, h, w\)"):
        CategoryConsistentLoss()(torch.randn(2, 16, 4), torch.zeros(2, 4, 4, dtype=torch.long))
