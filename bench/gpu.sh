#!/usr/bin/env bash
# All that only a GPU can show, in one call of under nine minutes on one H100 or H200 with 16 CPU
# cores, without a network: tests, kernels, decoding, CUDA graph, the tiny run, a step of PPO,
# memory. Without a GPU the same at toy sizes on the CPU, where only the numbers mean nothing.
#
#   bash bench/gpu.sh [WHEELS [OUT [flags of bench/gpu.py]]]
#
#   WHEELS   a folder of wheels that this Python lacks (say DeepSpeed and what it needs); "": none
#   OUT      where results.json, table.md and log.txt go; default output/gpu
#
#   bash bench/gpu.sh "" output/gpu --parts decode kernels        # some parts; see bench/gpu.py
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-}
out=${2:-output/gpu}
shift $(($# < 2 ? $# : 2))

# The wheels go into a folder of their own, in front of what this Python has.
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$wheels"/*.whl ||
    { echo "bench/gpu.sh: error: $wheels/*.whl cannot be installed" >&2; exit 2; }
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  export PATH=$site/bin:$PATH  # DeepSpeed's launcher
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python3 bench/gpu.py "$out" "$@"
