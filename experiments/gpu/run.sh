#!/usr/bin/env bash
# Measure on a GPU machine, in order of value, within SECONDS: tests, images per second, losses, profile, then Fig. 2.
#   bash experiments/gpu/run.sh OUT [SECONDS] [CIFAR]
# OUT receives a file for each part. SECONDS is 540 by default. CIFAR is an image-folder tree of CIFAR-10; without it
# Fig. 2 is left out. Each part has its own time limit, and no part removes the results of another.
# Run it in the root of a checkout. See experiments/gpu/README.md.
set -u
out=$1 limit=${2:-540} cifar=${3:-}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
mkdir -p "$out"
started=$(date +%s)
left() { echo $((limit - $(date +%s) + started)); }
part() { # part NAME SECONDS COMMAND...: run the command with a time limit; print the end of its output
  local name=$1 seconds=$2
  shift 2
  [ "$(left)" -gt "$seconds" ] || { echo "== $name: skipped, $(left) s left"; return; }
  echo "== $name: at $(($(date +%s) - started)) s, at most $seconds s"
  timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
  echo "exit code $?" >>"$out/$name.txt"
  tail -n 20 "$out/$name.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/machine.txt"
part tests 100 python3 -m pytest -n 8 tests/test_cuda.py tests/{losses,memory,models}/test_kernels.py
part pretraining 140 python3 -m experiments.benchmarks.pretraining --device cuda --modes graph compile+graph eager
part losses 70 python3 -m experiments.gpu.losses "$out/losses.json"
part profile 40 python3 -m experiments.gpu.profile_step
if [ -n "$cifar" ]; then
  fig2=(python3 -m experiments.fig2_moco --scale paper --only "cifar10: XB" --seeds 3 --folder "${FIG2:-/tmp/fig2}" --data "cifar10=folder:$cifar")
  part fig2 $(($(left) - 40)) "${fig2[@]}" --jobs 6 --compile --save-every 1000
  part fig2-collect 30 "${fig2[@]}" --collect
fi
cp experiments/results/pretraining-*.json experiments/results/fig2-paper.* "$out"/ 2>/dev/null
echo "== done after $(($(date +%s) - started)) s"
