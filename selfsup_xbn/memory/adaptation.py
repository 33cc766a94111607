"""Where the moments that a queue is moved to come from: XBM (nowhere), XBN (the batch), AXBN (a Kalman filter).

Equations are those of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127). An adaptation sees
moments only; it knows neither the queue nor a loss. All state is in buffers and all decisions are taken on the device,
so a step never waits for it.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from selfsup_xbn.errors import UserError, near


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of each dimension, in float64."""

    mean: Float64[Tensor, "D"]
    std: Float64[Tensor, "D"]

    def constant(self) -> Bool[Tensor, "D"]:
        """Whether a dimension is no more than a constant with float32's rounding; not so for NaN."""
        return self.std <= self.mean.abs().mul_(1e-6).add_(1e-12)


def batch_moments(batch: Float[Tensor, "B D"]) -> Moments:
    """Moments of a batch of at least two rows, in float64 whatever the batch's own precision is."""
    rows = batch.detach().double()
    mean = rows.mean(0)
    rows = rows - mean  # in two passes, which is exact and, on a CPU, four times as fast as torch.var_mean
    return Moments(mean, rows.mul_(rows).sum(0).div_(len(rows) - 1).sqrt_())


class Adaptation(nn.Module):
    """Makes of a batch's moments the moments that the queue is moved to.

    ``moves_queue`` says, before any data, whether the queue is moved at all.
    """

    moves_queue = True

    def reset(self, dim: int) -> None:
        """Forgets all that was observed and makes room for ``dim`` dimensions."""

    def forward(self, observed: Moments, batch_size: int, finite: Bool[Tensor, ""]) -> Moments:
        """The target moments.

        Args:
            observed: moments of the batch.
            batch_size: B, at least 2.
            finite: whether the batch was finite; where it is false no state may change.
        """
        return observed


class XBM(Adaptation):
    """No adaptation: rows stay as they were enqueued (Wang et al., arXiv 1912.06798)."""

    moves_queue = False


class XBN(Adaptation):
    """The target is the current batch's own mean and standard deviation (Eq. 6)."""


class AXBN(Adaptation):
    """The target is a Kalman-filtered estimate of the moments (Eqs. 18-23).

    With u the estimate, v the observation and P the variance of the estimate::

        P- = P + Q;   K = P- / (P- + R);   u <- u + K (v - u);   P <- (1 - K) P-        Q = q, R = r / B, P_0 = p0

    The first observation is the first estimate. K and P are renewed every ``gain_interval`` observations. With the
    paper's constants K settles at 0.99984 for B = 64: the filter follows the batch to four digits, and AXBN is XBN
    for all practical purposes. A larger ``r`` makes it a filter that smooths.

    Args:
        q: variance of the process, that is of the moments' own movement in a step.
        r: variance of an observation from a single sample; a batch of B observes with r / B.
        p0: variance of the first estimate.
        gain_interval: observations between two renewals of the gain (paper: 100 for SOP and In-Shop, 10 for
            DeepFashion2).
        literal: take Eq. 22 as printed, P <- (1 - K) P with the previous P, in place of the standard filter's P-.
    """

    mean: Tensor
    std: Tensor
    variance: Tensor
    gain: Tensor
    step: Tensor

    def __init__(
        self, q: float = 1.0, r: float = 0.01, p0: float = 1.0, gain_interval: int = 100, *, literal: bool = False
    ) -> None:
        super().__init__()
        if min(q, r, p0) < 0 or q + r <= 0 or q + p0 <= 0:
            raise UserError(f"expected variances q, r, p0 >= 0, q with r or p0 not both 0, got q={q}, r={r}, p0={p0}")
        if gain_interval < 1:
            raise UserError(f"expected gain_interval of at least 1 step, got {gain_interval}")
        self.q, self.r, self.p0, self.gain_interval, self.literal = q, r, p0, gain_interval, literal
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("std", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(p0, dtype=torch.float64))
        self.register_buffer("gain", torch.ones((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset(self, dim: int) -> None:
        """Back to the state before the first observation, for ``dim`` dimensions."""
        self.mean, self.std = self.mean.new_zeros(dim), self.std.new_zeros(dim)
        self.variance.fill_(self.p0)
        self.gain.fill_(1)
        self.step.zero_()

    def forward(self, observed: Moments, batch_size: int, finite: Bool[Tensor, ""]) -> Moments:
        """One step of the filter: the moments (mu_hat, sigma_hat) of Eq. 23."""
        first = self.step == 0
        renew = finite & ~first & ((self.step - 1) % self.gain_interval == 0)
        predicted = self.variance + self.q
        self.gain.copy_(torch.where(renew, predicted / (predicted + self.r / batch_size), self.gain))
        updated = (1 - self.gain) * (self.variance if self.literal else predicted)
        self.variance.copy_(torch.where(renew, updated, self.variance))

        gain = torch.where(first, torch.ones_like(self.gain), self.gain)
        for estimate, observation in ((self.mean, observed.mean), (self.std, observed.std)):
            estimate.copy_(torch.where(finite, estimate + gain * (observation - estimate), estimate))
        self.step.add_(finite)
        return Moments(self.mean, self.std)


ADAPTATIONS: dict[str, type[Adaptation]] = {"xbm": XBM, "xbn": XBN, "axbn": AXBN}


def make_adaptation(adaptation: str | Adaptation) -> Adaptation:
    """The adaptation that ``"xbm"``, ``"xbn"`` or ``"axbn"`` names, or a copy of the instance given."""
    if not isinstance(adaptation, str):
        return copy.deepcopy(adaptation)
    if adaptation not in ADAPTATIONS:
        hint = near(adaptation.lower(), ADAPTATIONS)
        raise UserError(f"expected adaptation 'xbm', 'xbn' or 'axbn', got {adaptation!r}{hint}")
    return ADAPTATIONS[adaptation]()
