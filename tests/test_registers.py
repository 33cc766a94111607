"""What the kernels need on a GPU, compiled without one; in another process, because here Triton interprets them."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
CODE = """
import json
from experiments.gpu.registers import compiled, launches, needs
steps = [launches(128, 4096, 128, classes=classes) for classes in (False, True)]
names = [[launch.kernel.__name__ for launch in step] for step in steps]
print(json.dumps([names, [[launch.options, needs(compiled(launch, 90))] for launch in steps[1][:2]]]))
"""


@pytest.mark.slow
def test_the_kernels_of_a_step_compile_for_a_gpu():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True)
    names, queue = json.loads(run.stdout)
    assert names == [
        ["_adapt", "_enqueue", "scan", "finish_info_nce"],
        ["_adapt", "_enqueue", "compare", "combine", "weigh", "finish_sup_con", "average"],
    ]
    for options, (registers, _) in queue:
        assert options == {"num_warps": 32}
        assert 16 < registers <= 64  # 65,536 of a multiprocessor, for 1,024 threads
