"""NTXentLoss and MemoryBankModule of lightly with an adapted queue as the memory bank.

The interface and the order of a step are those of lightly 1.6: the bank is adapted to the keys of the batch, the loss
is computed against the bank, and the keys are enqueued. No key is a negative of another key of the batch. With
``adaptation="xbm"`` the values equal lightly's until a batch passes the end of the bank, where lightly drops rows.

**Initial rows.** As in lightly, a new bank contains random unit rows. Adaptation moves them to the mean and standard
deviation of the keys, where they are more similar to the queries than lightly's random rows. The loss therefore starts
higher. The random rows are replaced after N keys.

**Checkpoints.** The ``state_dict()`` contains the bank. A ``state_dict`` without a bank, as that of lightly's class,
loads and leaves the bank unchanged. One with an incomplete bank or a bank of another size raises an error. lightly's
class loads a ``state_dict`` of this class with ``strict=False``.

**torch.compile.** Compiled code does not refresh the queue. Call ``loss.memory_bank.queue.refresh()`` every N / B
steps.

Axis legend: B batch, N rows of the bank, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightly.loss
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import info_nce
from selfsup_xbn.memory.adaptation import Adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.utils.distributed import gather, world


class MemoryBankModule(nn.Module):
    """Memory bank of N adapted rows, a replacement for ``lightly.models.modules.memory_bank.MemoryBankModule``.

    Keys overwrite the oldest rows. A batch that passes the end of the bank continues at its start. Of a batch larger
    than the bank, the last N rows are enqueued. A batch with a non-finite value is not enqueued. The host does not wait
    for the device.

    Args:
        size: (N, D), or 0 for no bank.
        gather_distributed: whether the bank takes the keys of all ranks, in the order of the ranks. The banks of all
            ranks are equal if their initial rows are: use the same seed, or wrap the module in
            DistributedDataParallel.
        feature_dim_first: whether negatives are returned as [D, N] instead of [N, D].
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``.
        dtype: dtype of the rows. ``.double()``, ``.half()`` and autocast do not change it.

    Raises:
        UserError: the size is neither 0 nor (N, D), or the adaptation is unknown.

    Example:
        >>> bank = MemoryBankModule((256, 16))
        >>> keys, negatives = bank(torch.randn(8, 16), update=True)
        >>> negatives.shape
        torch.Size([16, 256])
    """

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        adaptation: str | Adaptation = "xbn",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size = _bank_shape(size)
        self.gather_distributed, self.feature_dim_first = gather_distributed, feature_dim_first
        self.queue: FeatureQueue | None = None
        if self.size[0] > 0:
            self.queue = FeatureQueue(self.size[0], self.size[1], adaptation, dtype=dtype)
            self.queue.enqueue(F.normalize(torch.randn(self.size).float(), dim=-1))

    def forward(
        self, output: Float[Tensor, "B D"], labels: Tensor | None = None, update: bool = False
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "_ _"] | None]:
        """Return the output and the rows of the bank, before the output is enqueued.

        Adapted rows do not have unit norm. Normalise them before computing cosine similarities.

        Args:
            output: embeddings. No gradient flows to the bank.
            labels: ignored, as in lightly.
            update: whether to adapt the bank to the output and to enqueue the output.

        Returns:
            The output, and the negatives [D, N] or [N, D], or None without a bank.

        Raises:
            ValueError: the output has another shape than [B, D].
        """
        if self.queue is None:
            return output, None
        if update:
            keys = self.gathered(output)
            self.queue.adapt(keys)
        negatives = self.bank
        if update:
            self.queue.enqueue(keys)
        return output, negatives.T if self.feature_dim_first else negatives

    @property
    @torch.no_grad()
    def bank(self) -> Float[Tensor, "N *D"]:
        """Adapted rows in the order of their slots. Without a bank the tensor is empty."""
        if self.queue is None:
            return torch.empty(self.size)
        return self.queue.affine_map()(self.queue.rows)

    def gathered(self, output: Float[Tensor, "B D"]) -> Float[Tensor, "_ D"]:
        """Return the output without gradient, with ``gather_distributed`` the outputs of all ranks.

        Args:
            output: embeddings of this rank. All ranks have the same number of rows B.
        """
        return gather(output.detach(), len(output) * world()) if self.gather_distributed else output.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the bank. A state dict without a bank leaves it unchanged."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class NTXentLoss(lightly.loss.NTXentLoss):
    """InfoNCE against an adapted memory bank, a replacement for ``lightly.loss.NTXentLoss``.

    With a bank the loss is that of MoCo, computed blockwise over the bank: no copy of the bank and no [B, N] matrix is
    created. Products are computed in float32 or float64, also under autocast. Without a bank (SimCLR) the loss is
    computed by lightly.

    Args:
        temperature: temperature T of the logits, above 0.
        memory_bank_size: (N, D), or 0 for no bank.
        gather_distributed: with a bank, whether it takes the keys of all ranks; without a bank, whether the outputs
            of all ranks are negatives.
        adaptation: adaptation of the bank, as in ``MemoryBankModule``.
        dtype: dtype of the rows of the bank, as in ``MemoryBankModule``.

    Raises:
        UserError: the size is neither 0 nor (N, D), or the adaptation is unknown.
        ValueError: raised by lightly for a temperature near 0, and for a torch build without distributed support.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        >>> queries, keys = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
        >>> loss = criterion(queries, keys)
        >>> loss.backward()
        >>> queries.grad.shape
        torch.Size([8, 128])
    """

    memory_bank: MemoryBankModule

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        adaptation: str | Adaptation = "xbn",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(temperature, 0, gather_distributed)
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, adaptation=adaptation, dtype=dtype)

    def forward(self, out0: Float[Tensor, "B D"], out1: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """Return the mean loss over the batch.

        Args:
            out0: queries, of any norm. Only if they require a gradient, the bank is adapted to the keys and takes them.
            out1: keys, of any norm.

        Raises:
            UserError: the temperature is negative and there is a bank.
            ValueError: the shape is not [B, D].
        """
        if self.memory_bank.queue is None:
            return super().forward(out0, out1)
        return self.symmetric((out0, out1))

    def symmetric(self, *pairs: tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]) -> Float[Tensor, ""]:
        """Return the mean loss of several pairs of queries and keys of the same images.

        All keys are enqueued after the loss. With two separate calls, the keys of the first call would be negatives of
        the same images in the second call.

        Args:
            pairs: queries and keys, for example ``criterion.symmetric((q0, k1), (q1, k0))``.
        """
        bank = self.memory_bank
        if bank.queue is None:
            return torch.stack([super(NTXentLoss, self).forward(*pair) for pair in pairs]).mean()
        update = any(out0.requires_grad for out0, _ in pairs)
        if update:
            keys = torch.cat([bank.gathered(_unit(out1)) for _, out1 in pairs])
            bank.queue.adapt(keys)
        loss = torch.stack([info_nce(out0, out1, bank.queue, self.temperature) for out0, out1 in pairs]).mean()
        if update:
            bank.queue.enqueue(keys)
        return loss


def _unit(output: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Return the rows divided by their norm, in float32 or float64."""
    return F.normalize(output.to(torch.promote_types(output.dtype, torch.float32)), dim=1)


def _bank_shape(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return (0,) for no bank, otherwise (N, D)."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    if shape == (0,) or (len(shape) == 2 and min(shape) >= 0):
        return shape
    raise UserError(f"expected memory_bank_size (num_features, dim) or 0, got {size}")
