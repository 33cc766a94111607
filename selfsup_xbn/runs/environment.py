"""Machine and package versions that the results of a run may depend on."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGES = (
    "selfsup-xbn",
    "torch",
    "torchvision",
    "lightly",
    "pytorch-metric-learning",
    "timm",
    "matplotlib",
    "pillow",
    "scikit-learn",
    "faiss-cpu",
)


def environment() -> dict[str, str]:
    """Return the versions, the machine, the number of processes and the commit by name."""
    import torch  # not needed to read a run folder

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
    """Return the name of the processor, from ``/proc/cpuinfo`` if available."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"


UNKNOWN = "not recorded"


def git_commit() -> str:
    """Return the Git commit of the package, with ``+`` if files were modified.

    For a copy that pip installed from a Git repository, this is the commit that pip recorded. For any other copy
    outside of a checkout the result is ``"not recorded"``, and the version of the package identifies it.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        if not (package.parent / ".git").exists():
            return _installed_commit()
        command = ["git", "-C", str(package), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _installed_commit() -> str:
    """Return the commit in the file ``direct_url.json`` (PEP 610), which pip writes for a Git repository."""
    try:
        source = json.loads(distribution(PACKAGES[0]).read_text("direct_url.json") or "{}")
        return str(source["vcs_info"]["commit_id"])[:12]
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return UNKNOWN
