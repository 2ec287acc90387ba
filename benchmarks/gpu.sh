#!/usr/bin/env bash
# Fifteen minutes on one GPU (more with --seconds), in calls of under ten: `benchmarks/gpu.sh --dry-run` says what each does,
# how long it takes and what must be there. Downloads nothing, builds nothing, changes no setting of the card.
# benchmarks/gpu/calls.py is the whole of it; this sets what must hold before Python starts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET DEEPALIGN_BACKEND DEEPALIGN_TRITON_PLAN
exec "${PYTHON:-python3}" -m benchmarks gpu "$@"
