#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of under eight minutes: checks the Triton kernels, then times them against
# their bounds, then layers and networks against static, timm and the per-example loop. Each step has its own time limit, a
# failed step does not stop the next, and the exit code says whether all passed. Needs torch, triton and pytest; no installation.
#
#   bash benchmarks/gpu.sh                results in benchmarks/results/ (and in $OUT, if set)
#   PYTHON=.venv/bin/python bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=.
unset TRITON_INTERPRET
RESULTS=benchmarks/results
LOGS=${OUT:-outputs}/gpu_log
mkdir -p "$RESULTS" "$LOGS"
failed=()

step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$LOGS/$name.txt" 2>&1
    local code=$?
    printf '%-10s exit %-3s %4s s  %s\n' "$name" "$code" "$((SECONDS - start))" "$*"
    [ "$code" -eq 0 ] || { failed+=("$name"); tail -n 15 "$LOGS/$name.txt"; }
}

$PYTHON - <<'PY' || exit 2
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"gpu.sh needs torch and triton in {sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu.sh needs a CUDA device; torch sees none, so nothing was run.")
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, {device.multi_processor_count} multiprocessors, {device.L2_cache_size >> 20} MiB L2, "
      f"torch {torch.__version__}, triton {triton.__version__}")
PY

step tests 120 $PYTHON -m pytest -q -x -p no:cacheprovider tests/condconv/ops/triton/test_gpu.py
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 45 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -x -p no:cacheprovider \
        tests/condconv/ops/triton/test_gpu.py -k "reproducible and 65"
fi
step kernels 140 $PYTHON -m benchmarks.kernels --seconds 110
for module in layers networks; do
    if [ -f "benchmarks/$module.py" ]; then
        step "$module" 80 $PYTHON -m "benchmarks.$module"
    fi
done

[ -z "${OUT:-}" ] || cp "$RESULTS"/*.md "$RESULTS"/*.json "$OUT"/ 2>/dev/null
[ ! -f "$RESULTS/kernels.md" ] || cat "$RESULTS/kernels.md"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]} (logs in $LOGS)"
    exit 1
fi
echo "all steps passed in $SECONDS s"
