#!/usr/bin/env bash
# Everything to measure on a GPU, in phases of under eight minutes that can be run one by one:
#
#   benchmarks/gpu.sh OUTDIR [env] [build] [tests] [logits] [linear] [memory] [gcg]
#
# No phase named: all of them, in this order. A phase that fails or runs out of time does not stop the next; short
# tables come last. OUTDIR gets log.txt and logits.json, linear.json, memory.json, gcg.json. Uses the python3 on PATH,
# whose torch must see the GPU (PYTHON=... for another), downloads nothing and changes no setting of the card.
# PHASE_SECONDS (default 450) bounds a phase; logits and linear begin no cell in its last 150 s, so that they
# still print and save what they have.
set -euo pipefail

readonly PHASES=(env build tests logits linear memory gcg)
usage() {
    echo "usage: $0 OUTDIR [phase ...]    phases: ${PHASES[*]}" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
PHASE_SECONDS=${PHASE_SECONDS:-450}
LIMIT=$((PHASE_SECONDS - 150))
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET DEEPALIGN_BACKEND

phase_env() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu --format=csv || true
    "$PYTHON" -c 'import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda or torch.version.hip)
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
p = torch.cuda.get_device_properties(0)
print(p.name, "sm_%d%d" % (p.major, p.minor), p.multi_processor_count, "SMs", p.total_memory >> 20, "MiB")'
}

# The architecture of the GPU at hand, as setup.py wants it: 90a for Hopper, else plain digits.
arch() {
    "$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major == 9 else ""))'
}

phase_build() {
    local archs
    archs=$(arch)
    echo "building for sm_$archs"
    DEEPALIGN_CUDA_ARCHS=${DEEPALIGN_CUDA_ARCHS:-$archs} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        "$PYTHON" setup.py --quiet build_ext --inplace
    "$PYTHON" -m deepalign_kernels
}

phase_tests() {
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    "$PYTHON" -m pytest -q -p no:cacheprovider -k "cuda or gpu" --durations=5 "${workers[@]}" tests
}

phase_logits() {
    "$PYTHON" -m benchmarks run --device cuda --limit "$LIMIT" --json "$OUT/logits.json"
    "$PYTHON" -m benchmarks readme "$OUT/logits.json"
}

phase_linear() {
    "$PYTHON" -m benchmarks linear --device cuda --limit "$LIMIT" --json "$OUT/linear.json"
    "$PYTHON" -m benchmarks readme "$OUT/linear.json"
}

phase_memory() {
    "$PYTHON" -m benchmarks memory --cap-gib "${CAP_GIB:-16}" --json "$OUT/memory.json"
}

phase_gcg() {
    "$PYTHON" -m benchmarks.gcg --json "$OUT/gcg.json"
}

# Each phase is this script again under `timeout`, so that a phase that hangs is ended with all it started.
if [[ ${DEEPALIGN_GPU_PHASE:-} ]]; then
    "phase_$DEEPALIGN_GPU_PHASE"
    exit
fi

chosen=("$@")
[[ $# -gt 0 ]] || chosen=("${PHASES[@]}")
for name in "${chosen[@]}"; do
    [[ " ${PHASES[*]} " == *" $name "* ]] || usage
done

summary=()
failed=0
for name in "${chosen[@]}"; do
    SECONDS=0
    echo "== $name ($(date -u +%H:%M:%S))" | tee -a "$OUT/log.txt"
    status=0
    DEEPALIGN_GPU_PHASE=$name timeout --kill-after=10 "$PHASE_SECONDS" \
        bash "benchmarks/$(basename "${BASH_SOURCE[0]}")" "$OUT" 2>&1 | tee -a "$OUT/log.txt" || status=$?
    case $status in
        0) state=ok ;;
        124 | 137) state="stopped after $PHASE_SECONDS s" failed=1 ;;
        *) state="failed ($status)" failed=1 ;;
    esac
    summary+=("$(printf '%-8s %5d s  %s' "$name" "$SECONDS" "$state")")
done

echo "== summary" | tee -a "$OUT/log.txt"
printf '%s\n' "${summary[@]}" | tee -a "$OUT/log.txt"
exit "$failed"
