#!/usr/bin/env bash
# All tests that this machine can run, in the environment that run_all.sh makes:  bash tests/run.sh [pytest's flags]
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_all.sh setup
if [ -x .venv/bin/python ]; then exec .venv/bin/python -m pytest tests "$@"; fi
exec python3 -m pytest tests "$@"
