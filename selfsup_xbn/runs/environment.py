"""The machine and the versions that a result may depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "selfsup-xbn",
    "torch",
    "torchvision",
    "lightly",
    "pytorch-metric-learning",
    "timm",
    "scikit-learn",
    "faiss-cpu",
)


def environment() -> dict[str, str]:
    """Return versions, machine, number of processes and commit, on which a result may depend."""
    import torch  # here, as reading a run's folder needs no torch

    from selfsup_xbn.utils.distributed import world

    values = {
        "processes": str(world()),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        values["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            values[name] = version(name)
        except PackageNotFoundError:
            values[name] = "not installed"
    values["commit"] = git_commit()
    return values


def processor() -> str:
    """Return the name of the processor by Linux, or else by Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"


def git_commit() -> str:
    """Return the commit of the package's checkout, with ``+`` if files differ; ``"none"`` outside of a checkout."""
    here = Path(__file__).resolve().parents[1]
    try:
        if not (here.parent / ".git").exists():
            return "none"
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
