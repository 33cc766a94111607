"""Losses of a batch against a memory of past embeddings."""

from __future__ import annotations

from selfsup_xbn.losses.functional import info_nce, nt_xent, sup_con
from selfsup_xbn.losses.pairs import PairMargin

__all__ = ["PairMargin", "info_nce", "nt_xent", "sup_con"]
