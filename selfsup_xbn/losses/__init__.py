"""Losses of a batch against a memory of past embeddings."""

from __future__ import annotations

from selfsup_xbn.losses.functional import (
    PairLoss,
    PairMargin,
    info_nce,
    nt_xent,
    nt_xent_pairs,
    sup_con,
    sup_con_pairs,
)

__all__ = ["PairLoss", "PairMargin", "info_nce", "nt_xent", "nt_xent_pairs", "sup_con", "sup_con_pairs"]
