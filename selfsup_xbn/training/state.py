"""State of a run in its checkpoints."""

from __future__ import annotations

from operator import index
from typing import Any

import torch

from selfsup_xbn.config.saved import differences, from_resolved
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.errors import UserError
from selfsup_xbn.training.optimization import load_optimizer_state
from selfsup_xbn.training.run import Run


def state_of(run: Run) -> dict[str, Any]:
    """Return the state of a run for a checkpoint. All processes must call it, as each has a part of a sharded queue."""
    return {
        "config": resolved(run.config),
        "network": {"channels": run.data.channels, "image_size": run.data.image_size},
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "meter": run.meter.state_dict(),
        "rows": run.renewal.rows.state_dict() if run.renewal else None,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Restore the state of a run from a checkpoint.

    Raises:
        UserError: The checkpoint has another configuration or does not fit the run.
    """
    if changes := differences(from_resolved(state["config"]), run.config):
        raise UserError(f"the checkpoint has another configuration ({changes[0]}): remove the option")
    try:
        _restore(run, state)
    except Exception as error:  # invalid states make torch raise exceptions of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"the checkpoint does not fit this run (damaged or of another version): {reason}") from None


def _restore(run: Run, state: dict[str, Any]) -> None:
    run.epoch, run.step, run.best = index(state["epoch"]), index(state["step"]), float(state["best"])
    if not (0 <= run.epoch <= run.epochs and 0 <= run.step <= run.steps):
        raise ValueError(f"got epoch {run.epoch} of {run.epochs}, step {run.step} of {run.steps}")
    run.method.load_state_dict(state["method"])
    run.start_stage()
    load_optimizer_state(run.optimizer, state["optimizer"])
    run.meter.load_state_dict(state["meter"])
    if run.renewal is not None:
        run.renewal.rows.load_state_dict(state["rows"])
    torch.set_rng_state(state["random"])
    if run.device.type == "cuda" and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"], run.device)
