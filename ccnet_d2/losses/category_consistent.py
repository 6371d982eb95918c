"""Category consistent loss: features of one class close together, means of different classes far apart.

Shapes: B batch, D feature channels, h w the features' size, P labelled positions, C classes present.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ccnet_d2.choices import check_choice
from ccnet_d2.layers.precision import at_least_float32, autocast_disabled

from .resize import sample_labels
from .segmentation_loss import check_map_and_labels

FORMS = ("piecewise", "quadratic")


class CategoryConsistentTerms(NamedTuple):
    """The three unweighted scalars of Eq. 3, 4 and 5."""

    variance: Tensor
    distance: Tensor
    regularization: Tensor


class CategoryConsistentLoss(nn.Module):
    """alpha l_var + beta l_dis + gamma l_reg over features of the context module's output.

    l_var (Eq. 3): mean over classes of the mean over the class's positions of phi_var(|h_i - mu_c|).
    l_dis (Eq. 4): mean over ordered pairs of classes of (2 delta_dis - |mu_a - mu_b|)^2 where that is
    positive; 0 for a single class.
    l_reg (Eq. 5): mean over classes of |mu_c|, not squared.

    Classes are those present in the mini-batch, and mu_c and N_c are over the mini-batch (the images on this
    device), as the paper defines them. Norms are Euclidean. The "piecewise" phi_var (Eq. 6) is 0 up to
    delta_var, quadratic up to delta_dis and linear beyond; "quadratic" stays quadratic, the form that Tab. 3
    compares it with.

    The features are the output of a 1x1 convolution to 16 channels, which belongs to the head; labels are
    brought to their size by nearest. Computed in fp32, inside autocast too. Positions with the ignored label
    take no part; a batch without any other gives zero with a graph. On a GPU, sums over positions depend on
    the order of atomic additions unless `torch.use_deterministic_algorithms(True)` is set.

    :paper:`CCNet` (TPAMI), Sec. 3.4, Eq. 3-8.
    """

    def __init__(
        self,
        *,
        form: str = "piecewise",
        delta_var: float = 0.5,
        delta_dis: float = 1.5,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.001,
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            form: "piecewise" or "quadratic".
            delta_var: distance to the mean that costs nothing.
            delta_dis: distance to the mean at which the piece-wise form turns linear; half the distance
                between means that costs nothing.
            alpha: weight of l_var.
            beta: weight of l_dis.
            gamma: weight of l_reg.
            ignore_index: label of the positions left out.
            align_corners: whether the features' corners lie on those of the labels, see `sample_labels`.

        Raises:
            ValueError: the form is unknown, or not 0 <= delta_var <= delta_dis.
        """
        super().__init__()
        check_choice("form", form, FORMS)
        if not 0 <= delta_var <= delta_dis:
            raise ValueError(
                f"the margins must be 0 <= delta_var <= delta_dis, got {delta_var} and {delta_dis}."
            )
        self.form = form
        self.delta_var = delta_var
        self.delta_dis = delta_dis
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.align_corners = align_corners

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The weighted sum of `terms`, same arguments."""
        variance, distance, regularization = self.terms(features, target)
        return self.alpha * variance + self.beta * distance + self.gamma * regularization

    def terms(self, features: Tensor, target: Tensor) -> CategoryConsistentTerms:
        """The three terms, for instance to log them.

        Args:
            features: (B, D, h, w).
            target: (B, H, W) integers: any classes, and ignore_index.

        Returns:
            Scalars, fp32 (fp64 for fp64 features).

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        check_map_and_labels(features, target, "features")
        with autocast_disabled(features.device):
            labels = sample_labels(target, (features.shape[-2], features.shape[-1]), self.align_corners)
            valid = labels != self.ignore_index
            h = at_least_float32(features).permute(0, 2, 3, 1)[valid]  # (P, D)
            present, index, count = torch.unique(labels[valid], return_inverse=True, return_counts=True)
            classes = len(present)
            size = count.to(h.dtype)
            mean = h.new_zeros(classes, h.shape[1]).index_add(0, index, h) / size[:, None]
            spread = self.phi_var((h - mean[index]).norm(dim=1))
            # Mean over classes of means over positions, as one weighted sum over positions.
            variance = (spread / size[index]).sum() / max(classes, 1)
            first, second = torch.triu_indices(classes, classes, offset=1, device=h.device)
            gap = (mean[first] - mean[second]).norm(dim=1)
            pairs = max(classes * (classes - 1) // 2, 1)
            distance = (2 * self.delta_dis - gap).clamp(min=0).square().sum() / pairs
            regularization = mean.norm(dim=1).sum() / max(classes, 1)
        return CategoryConsistentTerms(variance, distance, regularization)

    def phi_var(self, distance: Tensor) -> Tensor:
        """Eq. 6 of distances |h_i - mu_c|; elementwise.

        Both branches are (delta_dis - delta_var)^2 at delta_dis, where the slope drops from 2 (delta_dis -
        delta_var) to 1.
        """
        quadratic = (distance - self.delta_var).clamp(min=0).square()
        if self.form == "quadratic":
            return quadratic
        linear = distance - self.delta_dis + (self.delta_dis - self.delta_var) ** 2
        return torch.where(distance > self.delta_dis, linear, quadratic)

    def extra_repr(self) -> str:
        return (
            f"form={self.form!r}, delta_var={self.delta_var}, delta_dis={self.delta_dis}, "
            f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, "
            f"ignore_index={self.ignore_index}, align_corners={self.align_corners}"
        )
