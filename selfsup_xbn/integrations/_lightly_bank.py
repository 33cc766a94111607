"""The memory banks of lightly with adapted rows.

Axis legend: B batch, N rows of the bank, D dimensions.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selfsup_xbn.errors import UserError
from selfsup_xbn.integrations._state import assign_only, is_stored, refill, state_of
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
        adaptation: ``"xbm"``, ``"xbn"``, ``"axbn"`` or an instance such as ``AXBN(r=1.0)``. None stands for ``"xbn"``.
            Without a bank nothing is adapted, and an adaptation other than ``"xbm"`` leads to a warning.
        normalize: whether negatives are returned with unit norm.
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
        adaptation: str | Adaptation | None = None,
        *,
        normalize: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size, self.normalize = _bank_shape(size), normalize
        self.gather_distributed, self.feature_dim_first = gather_distributed, feature_dim_first
        self.queue: FeatureQueue | None = None
        rows, dim = self.size if self.size[0] > 0 else (1, 1)
        # Checks its arguments, also where there is no bank.
        queue = FeatureQueue(rows, dim, "xbn" if adaptation is None else adaptation, dtype=dtype)
        if self.size[0] > 0:
            self.queue = queue
            self.queue.enqueue(F.normalize(torch.randn(self.size).float(), dim=-1))
        elif adaptation is not None and queue.adaptation.moves_queue:
            warnings.warn(
                f"adaptation={adaptation!r} has no effect without a memory bank: give its size (num_features, dim)",
                stacklevel=2,
            )

    def forward(
        self, output: Float[Tensor, "B D"], labels: Tensor | None = None, update: bool = False
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "_ _"] | None]:
        """Return the output and the rows of the bank, before the output is enqueued.

        Adapted rows do not have unit norm. Normalize them before computing cosine similarities, or use
        ``normalize=True``.

        Args:
            output: embeddings. No gradient flows to the bank. An empty batch leaves the bank as it is.
            labels: ignored, as in lightly.
            update: whether to adapt the bank to the output and to enqueue the output.

        Returns:
            The output, and the negatives [D, N] or [N, D] in its dtype, or None without a bank.

        Raises:
            ValueError: the output has another shape than [B, D].
        """
        if self.queue is None:
            return output, None
        keys = self.gathered(output)
        update = update and len(keys) > 0
        if update:
            self.queue.adapt(keys)
        negatives = self._rows()
        if update:
            self.queue.enqueue(keys)
        negatives = (F.normalize(negatives, dim=1) if self.normalize else negatives).to(output.dtype)
        return output, negatives.T if self.feature_dim_first else negatives

    @property
    def bank(self) -> Float[Tensor, "N *D"]:
        """Adapted rows in the order of their slots. Without a bank the tensor is empty.

        The rows can be assigned. A change in place raises an error, except with ``adaptation="xbm"``.
        """
        if self.queue is None:
            return torch.empty(self.size)
        return self.queue.rows if is_stored(self.queue) else assign_only(self._rows())

    @bank.setter
    def bank(self, rows: Float[Tensor, "N D"]) -> None:
        if self.queue is None:
            raise ValueError("expected a bank to assign rows to, got memory_bank_size=0")
        refill(self.queue, rows, None, self.size[0] + int(self.queue.pointer))

    @property
    def bank_ptr(self) -> Int64[Tensor, "1"]:
        """Slot of the next key. It can be assigned; a change in place raises an error."""
        return assign_only(torch.zeros(1, dtype=torch.int64) if self.queue is None else self.queue.pointer[None])

    @bank_ptr.setter
    def bank_ptr(self, slot: Int64[Tensor, "*1"] | int) -> None:
        if self.queue is None or not 0 <= int(slot) < self.size[0]:
            raise ValueError(f"expected a slot of the {self.size[0]} rows of the bank, got {int(slot)}")
        self.queue.written.fill_(self.size[0] + int(slot))

    @torch.no_grad()
    def _rows(self) -> Float[Tensor, "N D"]:
        assert self.queue is not None
        return self.queue.affine_map()(self.queue.rows)

    def gathered(self, output: Float[Tensor, "B D"]) -> Float[Tensor, "_ D"]:
        """Return the output without gradient, with ``gather_distributed`` the outputs of all ranks.

        Args:
            output: embeddings of this rank. All ranks have the same number of rows B.
        """
        return gather(output.detach(), len(output) * world()) if self.gather_distributed else output.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the bank, also that of older versions of lightly. A state dict without a bank leaves it unchanged."""
        if self.queue is not None and prefix + "bank" in state_dict:
            rows, pointer = state_dict.pop(prefix + "bank"), state_dict.pop(prefix + "bank_ptr", 0)
            rows = rows.T if rows.shape == self.size[::-1] and rows.shape != self.size else rows  # [D, N] before 1.5
            state = state_of(self.queue, rows, None, len(rows) + int(pointer))
            state_dict.update({f"{prefix}queue.{name}": value for name, value in state.items()})
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class NNMemoryBankModule(MemoryBankModule):
    """Nearest adapted row of a bank (NNCLR), a replacement for ``lightly.models.modules.NNMemoryBankModule``.

    Example:
        >>> bank = NNMemoryBankModule((256, 16))
        >>> bank(torch.randn(8, 16), update=True).shape
        torch.Size([8, 16])
    """

    def forward(  # type: ignore[override]
        self, output: Float[Tensor, "B D"], update: bool = False
    ) -> Float[Tensor, "B D"]:
        """Return the row of largest cosine similarity with each output, before the output is enqueued.

        Args:
            output: embeddings. No gradient flows to the bank.
            update: whether to adapt the bank to the output and to enqueue the output.

        Raises:
            ValueError: there is no bank, or the output has another shape than [B, D].
        """
        if self.queue is None:
            raise ValueError("expected a bank of at least 1 row, got size 0")
        keys = self.gathered(output)
        if update:
            self.queue.adapt(keys)
        nearest = self.queue.nearest(output).to(output.dtype)
        if update:
            self.queue.enqueue(keys)
        return F.normalize(nearest, dim=1) if self.normalize else nearest


def _bank_shape(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return (0,) for no bank, otherwise (N, D)."""
    try:
        shape = tuple(map(operator.index, size if isinstance(size, Iterable) else [size]))
    except TypeError:
        shape = ()
    if shape == (0,) or (len(shape) == 2 and min(shape) >= 0):
        return shape
    raise UserError(f"expected memory_bank_size (num_features, dim) or 0, got {size!r}")
