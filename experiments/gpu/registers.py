"""Print what the Triton kernels of the queue and of the losses need: registers, local and shared memory.

The kernels are compiled, for a GPU that need not be there, with the arguments that the package launches them with. A
thread keeps in its local memory what does not fit its registers. That is slow if the local memory of all threads
exceeds the L1 cache of a multiprocessor: on an H200 256 kB less the shared memory.

    python -m experiments.gpu.registers
    python -m experiments.gpu.registers --capability 80
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from experiments.gpu.losses import at_precision
from selfsup_xbn import FeatureQueue
from selfsup_xbn.losses import PairMargin
from selfsup_xbn.losses import kernels as losses
from selfsup_xbn.losses.pairs import Pairs
from selfsup_xbn.memory import kernels as memory

MOCO = ((128, 4096, 128), (256, 65536, 128))
"""Batch, rows of the queue, dimensions."""
SUPERVISED = ((64, 4096, 128), (64, 29775, 512))
TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.bfloat16: "*bf16"
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel, its arguments by name, and its number of warps and stages."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(batch: int, rows: int, dim: int, *, classes: bool) -> list[Launch]:
    """Return what a step of adapt, enqueue and the loss launches: InfoNCE, or with classes SupCon with a miner."""
    seen: list[Launch] = []

    def record(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options: dict[str, int] = {name: named.pop(name) for name in [*named] if name.startswith("num_")}
        seen.append(Launch(kernel, dict(zip(kernel.arg_names, values, strict=False)) | named, options))

    queue, z = FeatureQueue(rows, dim, "xbn", labels=classes), torch.randn(batch, dim)
    labels = torch.zeros(batch, dtype=torch.int64) if classes else None
    queue.written.fill_(rows)
    with mock.patch.object(JITFunction, "run", record):
        memory.adapt(queue, z)
        memory.enqueue(queue, z, labels)
        slots = torch.arange(batch)
        if labels is None:
            losses.info_nce(z, z, Pairs(queue, 0.1, slots))
        else:
            losses.sup_con(z, Pairs(queue, 0.1, slots, labels, PairMargin()))
    return seen


def compiled(launch: Launch, capability: int) -> Any:
    """Return the kernel compiled for its arguments, specialized as at a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[index,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and signature[parameter.name] != "constexpr":
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def needs(kernel: Any) -> tuple[int, int]:
    """Return the registers and the bytes of local memory of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, local = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return int(registers), int(local)


def lines(capability: int) -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| kernel | batch, rows, D | precision | threads | registers | local memory, a program | shared memory |"
    yield "|---|---|---|---|---|---|---|"
    for (batch, rows, dim), classes in [*((sizes, False) for sizes in MOCO), *((sizes, True) for sizes in SUPERVISED)]:
        step = partial(launches, batch, rows, dim, classes=classes)
        for precision in ("highest", "high"):
            for launch in at_precision(precision, step)():
                if precision == "high" and "EXACT" not in launch.arguments:
                    continue  # the same as in "highest"
                kernel = compiled(launch, capability)
                registers, local = needs(kernel)
                threads = 32 * launch.options.get("num_warps", 4)
                local_memory, shared = f"{local * threads / 1e3:.0f} kB", f"{kernel.metadata.shared / 1e3:.0f} kB"
                name, sizes = launch.kernel.__name__, f"{batch}, {rows:,}, {dim}"
                yield f"| `{name}` | {sizes} | {precision} | {threads:,} | {registers} | {local_memory} | {shared} |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability: 80, 90 (default), ...")
    options = parser.parse_args(argv)
    print(f"Triton {triton.__version__}, compute capability {options.capability / 10}")
    for line in lines(options.capability):
        print(line, flush=True)


if __name__ == "__main__":
    main()
