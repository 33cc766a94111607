"""lightly's NTXentLoss and MemoryBankModule on the adapted queue: change the import, and nothing else.

The interface is that of lightly 1.6, and so is the order of a step: the bank is adapted to the batch's keys, the loss
is taken against it, then the keys enter, so that they are no negatives of one another. ``adaptation="xbm"`` adapts
nothing and gives lightly's numbers, up to the first batch that passes the bank's end: lightly drops the rows past it.

**Random rows at the start.** As in lightly, a new bank is full of random unit rows, drawn in the same way from the same
generator. Adapted, they are noise with the keys' own mean and standard deviation: nearer to the queries than lightly's
noise, so that the loss starts higher, and gone when as many keys have come as the bank has rows. A bank that starts
empty gave the same accuracy, but has no negatives at the first step and no fixed shape.

**Checkpoints.** The bank is in the ``state_dict()``. Where a ``state_dict`` has no bank at all, as lightly's never
does, it loads without complaint and the bank stays as it is; one with a part of it, or of another size, is refused.
lightly's class needs ``strict=False`` to load ours.

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
    """Takes the place of ``lightly.models.modules.memory_bank.MemoryBankModule``, as it is or as a base class.

    A batch that passes the end of the bank goes on at its start, and of a batch larger than the bank the last rows are
    kept. A batch with a non-finite value is left out. No step waits for the device.

    Args:
        size: (N, D), or 0 for no bank.
        gather_distributed: the bank takes the keys of all processes, in the order of their ranks. All then hold the
            same bank if they start with the same one: seed alike, or wrap the module in DistributedDataParallel.
        feature_dim_first: negatives are given as [D, N], otherwise as [N, D].
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``.
        dtype: storage of the bank, which ``.double()``, ``.half()`` and autocast leave as it is.

    Raises:
        UserError: a size that is neither 0 nor (N, D), or an adaptation that does not exist.
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
        self.size = _checked(size)
        self.gather_distributed, self.feature_dim_first = gather_distributed, feature_dim_first
        self.queue: FeatureQueue | None = None
        if self.size[0] > 0:
            self.queue = FeatureQueue(self.size[0], self.size[1], adaptation, dtype=dtype)
            self.queue.enqueue(F.normalize(torch.randn(self.size).float(), dim=-1))

    def forward(
        self, output: Float[Tensor, "B D"], labels: Tensor | None = None, update: bool = False
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "_ _"] | None]:
        """The output and the bank's rows, adapted to the output if ``update`` says so, which then enqueues it as well.

        Adapted rows of a bank of unit vectors are not of unit length: normalise them where cosines are meant.

        Args:
            output: embeddings; their gradient is left alone, and none reaches the bank.
            labels: ignored, as in lightly.
            update: adapt the bank and enqueue; otherwise it is read as the last update left it.

        Returns:
            The output itself, and the negatives [D, N] or [N, D]; None where there is no bank.
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
        """All rows as last adapted, in the order of their slots."""
        if self.queue is None:
            return torch.empty(self.size)
        affine_map = self.queue.affine_map()
        return torch.cat([affine_map(block.rows) for block in self.queue.blocks(self.queue.size)])

    def gathered(self, output: Float[Tensor, "B D"]) -> Float[Tensor, "_ D"]:
        """The batch's rows without gradient: this process's, or with ``gather_distributed`` those of all."""
        return gather(output.detach(), len(output) * world()) if self.gather_distributed else output.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Torch's hook for older checkpoints: one without any part of a bank leaves this bank as it is."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class NTXentLoss(lightly.loss.NTXentLoss):
    """Takes the place of ``lightly.loss.NTXentLoss``. Without a bank (SimCLR) it is that class.

    With one it is InfoNCE of queries and keys against the bank (MoCo), read block by block: neither the bank nor the
    similarities to it are ever copied as a whole. Products are at least float32, under autocast too.

    Args:
        temperature: T > 0; lightly's other values are taken without a bank only.
        memory_bank_size: (N, D), or 0 for no bank.
        gather_distributed: with a bank, it takes the keys of all processes; without, negatives are those of all.
        adaptation, dtype: of the bank, see ``MemoryBankModule``.

    Raises:
        UserError: see ``MemoryBankModule``.
        ValueError: lightly's own, for a temperature near 0 and for torch without distributed support.
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
        """The loss of queries and keys of any length. The bank takes the keys if ``out0`` requires a gradient."""
        if self.memory_bank.queue is None:
            return super().forward(out0, out1)
        return self.symmetric((out0, out1))

    def symmetric(self, *pairs: tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]) -> Float[Tensor, ""]:
        """Mean loss of several (queries, keys) of the same images: ``criterion.symmetric((q0, k1), (q1, k0))``.

        All meet the bank as it was before any of their keys entered. Of two calls of ``criterion`` the second would
        meet the first one's keys, and so each image a view of itself as a negative.
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
    """Rows of length 1, in float32 at least: the bank's precision does not depend on autocast."""
    return F.normalize(output.to(torch.promote_types(output.dtype, torch.float32)), dim=1)


def _checked(size: int | Sequence[int]) -> tuple[int, ...]:
    """(0,) for no bank, otherwise (N, D)."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    if shape == (0,) or (len(shape) == 2 and min(shape) >= 0):
        return shape
    raise UserError(f"expected a memory bank size (num_features, dim), or 0 for no bank, got {size}")
