#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of under eight minutes: compiles and checks the Triton kernels on all CPU
# cores, then times networks against static and timm, kernels against their bounds, and layers against the other backends.
# Each step has its own time limit, a failed step does not stop the next, and the exit code says whether all passed. What is
# timed has the GPU to itself. Needs torch, timm, triton, pytorch-lightning, matplotlib, rich and pytest; no installation.
# pytest-xdist is used if there.
#
#   bash benchmarks/gpu.sh                results in benchmarks/results/ (and in $OUT, if set)
#   PYTHON=.venv/bin/python bash benchmarks/gpu.sh
#   STEPS="tests networks" bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-tests networks autotuned kernels layers}
export PYTHONUNBUFFERED=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
RESULTS=benchmarks/results
LOGS=${OUT:-outputs}/gpu_log
mkdir -p "$RESULTS" "$LOGS"
FAILED=$(mktemp)

step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$LOGS/$name.txt" 2>&1
    local code=$?
    printf '%-10s exit %-3s %4s s  %s\n' "$name" "$code" "$((SECONDS - start))" "$*"
    [ "$code" -eq 0 ] || { echo "$name" >>"$FAILED"; tail -n 15 "$LOGS/$name.txt"; }
}
wanted() { [[ " $STEPS " == *" $1 "* ]]; }

L2_MIB=$($PYTHON - <<'PY'
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"gpu.sh needs torch and triton in {sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu.sh needs a CUDA device; torch sees none, so nothing was run.")
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, {device.multi_processor_count} multiprocessors, {device.L2_cache_size >> 20} MiB L2, "
      f"torch {torch.__version__}, triton {triton.__version__}", file=sys.stderr)
print(device.L2_cache_size >> 20)
PY
) || exit 2

# Compiling takes minutes on one core, and candidates are timed on the GPU: first all cores compile, then one process measures.
WORKERS=$($PYTHON -c 'import xdist, os; print("-n", max(1, os.cpu_count() // 2))' 2>/dev/null)
NETWORKS=(efficientnet_b0 mobilenet_v1 mobilenet_v2 resnet50)
wanted tests && OMP_NUM_THREADS=1 step tests 120 $PYTHON -m pytest -q -p no:cacheprovider $WORKERS \
    tests/condconv/ops/triton/test_gpu.py &
OMP_NUM_THREADS=1 step compile 100 $PYTHON -m benchmarks.precompile --l2-mib "$L2_MIB" --backbones "${NETWORKS[@]}" &
wait
wanted networks && step networks 100 $PYTHON -m benchmarks.networks --preset targets --device cuda
wanted autotuned && step autotuned 110 $PYTHON -m benchmarks.networks --preset targets --device cuda --autotune
wanted kernels && step kernels 70 $PYTHON -m benchmarks.kernels --seconds 50
wanted layers && step layers 70 $PYTHON -m benchmarks.layers --device cuda --backbones efficientnet_b0 --batch-sizes 256
if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -x -p no:cacheprovider \
        tests/condconv/ops/triton/test_gpu.py -k "reproducible and 100"
fi

[ -z "${OUT:-}" ] || cp "$RESULTS"/*.md "$RESULTS"/*.json "$OUT"/ 2>/dev/null
for table in networks-autotuned networks kernels; do
    find "$RESULTS" -name "$table*.md" ! -name "*-cpu.md" -exec cat {} +
done
if [ -s "$FAILED" ]; then
    echo "FAILED: $(tr '\n' ' ' <"$FAILED")(logs in $LOGS)"
    exit 1
fi
echo "all steps passed in $SECONDS s"
