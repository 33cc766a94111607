"""NTXentLoss and MemoryBankModule of lightly with an adapted queue as the memory bank.

The interface and the order of a step are those of lightly 1.6: the bank is adapted to the keys of the batch, the loss
is computed against the bank, and the keys are enqueued. No key is a negative of another key of the batch. With
``adaptation="xbm"`` the values equal lightly's until a batch passes the end of the bank, where lightly drops rows.

**Initial rows.** As in lightly, a new bank contains random unit rows. Adaptation moves them to the mean and standard
deviation of the keys, where they are more similar to the queries than lightly's random rows. The loss therefore starts
higher. The random rows are replaced after N keys.

**Checkpoints.** The ``state_dict()`` contains the bank. A ``state_dict`` without a bank, as that of lightly's class,
loads and leaves the bank unchanged. One with ``bank`` and ``bank_ptr``, as of older versions of lightly, is taken over.
One with an incomplete bank or a bank of another size raises an error. lightly's class loads a ``state_dict`` of this
class with ``strict=False``.

**Other losses of lightly** that have a ``memory_bank`` compare its rows without normalizing them. Give them a bank of
unit rows: ``DirectCLRLoss(...).memory_bank = MemoryBankModule((N, D), normalize=True)``.

**torch.compile.** Compiled code does not refresh the queue. Call ``loss.memory_bank.queue.refresh()`` every N / B
steps.

Axis legend: B batch, N rows of the bank, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightly.loss.ntx_ent_loss import NTXentLoss as PeerLoss
from torch import Tensor, nn

from selfsup_xbn.integrations._lightly_bank import MemoryBankModule, NNMemoryBankModule
from selfsup_xbn.losses import info_nce
from selfsup_xbn.losses.functional import check_temperature
from selfsup_xbn.memory.adaptation import Adaptation

__all__ = ["MemoryBankModule", "NNMemoryBankModule", "NTXentLoss"]


class NTXentLoss(PeerLoss):
    """InfoNCE against an adapted memory bank, a replacement for ``lightly.loss.NTXentLoss``.

    With a bank the loss is that of MoCo, computed blockwise over the bank: no copy of the bank and no [B, N] matrix is
    created. Products are computed in float32 or float64, also under autocast. Without a bank (SimCLR) the loss is
    computed by lightly. With a ``memory_bank`` or a ``cross_entropy`` that a program replaces, it is computed from what
    they return, as lightly does.

    Args:
        temperature: temperature T of the logits, above 0; a parameter of one element is learned.
        memory_bank_size: (N, D), or 0 for no bank.
        gather_distributed: with a bank, whether it takes the keys of all ranks; without a bank, whether the outputs
            of all ranks are negatives.
        adaptation: adaptation of the bank, as in ``MemoryBankModule``.
        dtype: dtype of the rows of the bank, as in ``MemoryBankModule``.
        implementation: ``"auto"``, ``"blockwise"`` or ``"dense"``, as in ``selfsup_xbn.losses``. A second derivative
            needs ``"dense"``.

    Raises:
        UserError: the size is neither 0 nor (N, D), the adaptation is unknown, or the temperature is not above 0 and
            finite.
        ValueError: raised by lightly for a temperature near 0, and for a torch build without distributed support.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        >>> queries, keys = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
        >>> loss = criterion(queries, keys)
        >>> loss.backward()
        >>> queries.grad.shape
        torch.Size([8, 128])
    """

    memory_bank: Any

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        adaptation: str | Adaptation | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        implementation: str = "auto",
    ) -> None:
        super().__init__(temperature, 0, gather_distributed)
        check_temperature(temperature)
        self.implementation = implementation
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, adaptation=adaptation, dtype=dtype)

    def forward(self, out0: Float[Tensor, "B D"], out1: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """Return the mean loss over the batch.

        Args:
            out0: queries, of any norm. Only if they require a gradient, the bank is adapted to the keys and takes them.
            out1: keys, of any norm.

        Raises:
            UserError: there is a bank, and the temperature is not above 0 and finite.
            ValueError: the shapes are not [B, D], or differ.
        """
        return self.symmetric((out0, out1))

    def symmetric(self, *pairs: tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]) -> Float[Tensor, ""]:
        """Return the mean loss of several pairs of queries and keys of the same images.

        All keys are enqueued after the loss. With two separate calls, the keys of the first call would be negatives of
        the same images in the second call.

        Args:
            pairs: queries and keys, for example ``criterion.symmetric((q0, k1), (q1, k0))``.
        """
        for out0, out1 in pairs:
            if out0.ndim != 2 or out0.shape != out1.shape:
                raise ValueError(f"expected two outputs of shape [B, D], got {[*out0.shape]} and {[*out1.shape]}")
        if all(len(out0) == 0 for out0, _ in pairs):
            return torch.stack([0 * (out0.sum() + out1.sum()) for out0, out1 in pairs]).sum()
        if not self._is_unchanged():
            return torch.stack([self._with_bank(*pair) for pair in pairs]).mean()
        bank = self.memory_bank
        if bank.queue is None:
            return torch.stack([super(NTXentLoss, self).forward(*pair) for pair in pairs]).mean()
        update = any(out0.requires_grad for out0, _ in pairs)
        if update:
            keys = torch.cat([bank.gathered(_unit(out1)) for _, out1 in pairs])
            bank.queue.adapt(keys)
        options = {"temperature": self.temperature, "implementation": self.implementation}
        loss = torch.stack([info_nce(out0, out1, bank.queue, **options) for out0, out1 in pairs]).mean()
        if update:
            bank.queue.enqueue(keys)
        return loss

    def _is_unchanged(self) -> bool:
        """Return whether the bank and the cross entropy are as the constructor makes them, with the same methods."""
        bank, entropy = self.memory_bank, self.cross_entropy
        parts = [getattr(getattr(bank, name, None), "__func__", None) for name in ("forward", "gathered")]
        if parts != [MemoryBankModule.forward, MemoryBankModule.gathered]:
            return False
        plain = type(entropy) is nn.CrossEntropyLoss and "forward" not in vars(entropy) and not entropy._forward_hooks
        settings = (entropy.weight, entropy.label_smoothing, entropy.reduction) if plain else ()
        return type(bank).bank is MemoryBankModule.bank and settings == (None, 0.0, "mean")

    def _with_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss from what ``memory_bank`` and ``cross_entropy`` return, in lightly's order."""
        queries, keys = _unit(out0), _unit(out1)
        keys, negatives = self.memory_bank.forward(keys, update=out0.requires_grad)
        if negatives is None:
            return super().forward(out0, out1)
        with torch.autocast(out0.device.type, enabled=False):
            negatives = F.normalize(negatives.to(queries), dim=0)
            logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives], dim=1)
            return self.cross_entropy(logits / self.temperature, logits.new_zeros(len(logits), dtype=torch.int64))


def _unit(output: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Return the rows divided by their norm, in float32 or float64."""
    return F.normalize(output.to(torch.promote_types(output.dtype, torch.float32)), dim=1)
