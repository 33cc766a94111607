"""The moments that a queue is moved to: XBM (not moved), XBN (those of the batch), AXBN (a Kalman filter's estimate).

Equations are those of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127). An adaptation sees
moments and returns moments; it knows neither the queue nor a loss. A further adaptation is a subclass of
``Adaptation`` and a line in ``config.registry``. State is in buffers that are changed in place, and every decision is
taken on the device.

Axis legend: B batch, D dimensions.
"""

from __future__ import annotations

import copy
import math
from numbers import Real

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from selfsup_xbn.config.registry import ADAPTATIONS
from selfsup_xbn.errors import UserError
from selfsup_xbn.memory.moments import Moments
from selfsup_xbn.utils.checks import whole_numbers


class Adaptation(nn.Module):
    """Base class: a module that maps the moments of a batch to the moments that the queue is moved to.

    Attributes:
        moves_queue: whether the queue is moved at all; known before any data.
        follows_batch: whether the target is the moments of the batch, so that rows have a gradient by the batch.
    """

    moves_queue = True
    follows_batch = False

    def allocate(self, dim: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> None:
        """Create the state for ``dim`` dimensions. The queue calls it once, when it is built."""

    def reset(self) -> None:
        """Return to the state before the first observation, in place."""

    def forward(self, observed: Moments, batch_size: int, finite: Bool[Tensor, ""]) -> Moments:
        """Return the target moments.

        Args:
            observed: moments of the batch.
            batch_size: B, at least 2.
            finite: whether the moments are finite; where it is False, no state may change.
        """
        return observed


class XBM(Adaptation):
    """No adaptation: rows stay as they were enqueued (Wang et al., arXiv 1912.06798)."""

    moves_queue = False


class XBN(Adaptation):
    """The target is the mean and standard deviation of the current batch (Eq. 6)."""

    follows_batch = True


class AXBN(Adaptation):
    """The target is a Kalman-filtered estimate of the moments (Eqs. 18-23).

    With u the estimate, v the observation and P the variance of the estimate::

        P- = P + Q;   K = P- / (P- + R);   u <- u + K (v - u);   P <- (1 - K) P-        Q = q, R = r / B, P_0 = p0

    The first observation is the first estimate. K and P are renewed every ``gain_interval`` observations. With the
    paper's constants K settles at 0.99984 for B = 64: the filter follows the batch to four digits, and AXBN equals XBN
    to that precision. A larger ``r`` smooths.

    Args:
        q: variance of the process, that is of the movement of the moments in a step.
        r: variance of an observation from a single sample; a batch of B observes with r / B.
        p0: variance of the first estimate.
        gain_interval: observations between two renewals of the gain (paper: 100 for SOP and In-Shop, 10 for
            DeepFashion2).
        literal: take Eq. 22 as printed, P <- (1 - K) P with the previous P, in place of the standard filter's P-.

    Raises:
        UserError: the constants define no filter.

    Example:
        >>> from selfsup_xbn.memory import FeatureQueue
        >>> queue = FeatureQueue(4096, 128, AXBN(r=1.0, gain_interval=10))
        >>> queue.adapt(torch.randn(64, 128))
        >>> queue.adaptation.mean.shape
        torch.Size([128])
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
        variances = all(isinstance(value, Real) and 0 <= value < math.inf for value in (q, r, p0))
        if not variances or q + r <= 0 or q + p0 <= 0:
            raise UserError(
                f"expected finite variances q, r, p0 >= 0, q with r or p0 not both 0, got q={q!r}, r={r!r}, p0={p0!r}"
            )
        (gain_interval,) = whole_numbers(gain_interval=gain_interval)
        if gain_interval < 1:
            raise UserError(f"expected gain_interval of at least 1 step, got {gain_interval}")
        self.q, self.r, self.p0, self.gain_interval, self.literal = q, r, p0, gain_interval, literal

    def allocate(self, dim: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> None:
        """Create the estimates (mean, std) [D], their variance P, the gain K and the number of observations."""
        for name, shape in (("mean", (dim,)), ("std", (dim,)), ("variance", ()), ("gain", ())):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("step", torch.empty((), dtype=torch.int64, device=device))
        self.reset()

    def reset(self) -> None:
        """Return to the state before the first observation, in place."""
        for buffer in (self.mean, self.std, self.step):
            buffer.zero_()
        self.variance.fill_(self.p0)
        self.gain.fill_(1)

    def forward(self, observed: Moments, batch_size: int, finite: Bool[Tensor, ""]) -> Moments:
        """Update the filter and return its estimate (mu_hat, sigma_hat) of Eq. 23."""
        first = self.step == 0
        renew = finite & ~first & ((self.step - 1) % self.gain_interval == 0)
        predicted = self.variance + self.q  # Eq. 18
        self.gain.copy_(torch.where(renew, predicted / (predicted + self.r / batch_size), self.gain))  # Eqs. 19, 20
        updated = (1 - self.gain) * (self.variance if self.literal else predicted)  # Eq. 22
        self.variance.copy_(torch.where(renew, updated, self.variance))

        gain = torch.where(first, 1.0, self.gain)
        for estimate, observation in ((self.mean, observed.mean), (self.std, observed.std)):
            filtered = estimate + gain * (observation - estimate)  # Eq. 21
            estimate.copy_(torch.where(finite, filtered, estimate))
        self.step.add_(finite)
        return Moments(self.mean, self.std)


def make_adaptation(adaptation: str | Adaptation) -> Adaptation:
    """Return the adaptation of a name in ``ADAPTATIONS``, or a copy of the given instance.

    Raises:
        UserError: no adaptation has that name, or the value is neither a name nor an instance.
    """
    if isinstance(adaptation, Adaptation):
        return copy.deepcopy(adaptation)
    if not isinstance(adaptation, str):
        raise UserError(
            f"expected an adaptation: {', '.join(ADAPTATIONS)}, or an instance such as AXBN(r=1.0), got {adaptation!r}"
        )
    kind: type[Adaptation] = ADAPTATIONS.find(adaptation)
    return kind()
