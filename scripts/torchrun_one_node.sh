#!/usr/bin/env bash
# One node, one process per GPU, started by torchrun:
#
#     scripts/torchrun_one_node.sh experiment=imagenet/efficientnet_b0_condconv8 data.root=/imagenet
#     scripts/torchrun_one_node.sh resume=outputs/2026-01-31/12-00-00-...
#
# PROCESSES=4 uses four GPUs; ACCELERATOR=cpu PROCESSES=2 tries it on a CPU. Signals reach the processes through torchrun,
# which gives them 30 s. The exit code is torchrun's: 0 finished, 1 anything else; result.json in the run's folder says
# "interrupted" for a run that was stopped and saved.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
processes="${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case " $* " in
    *" resume="*) arguments=("$@") ;;
    *)
        arguments=(trainer=ddp "trainer.accelerator=${ACCELERATOR:-gpu}" "trainer.devices=$processes")
        # trainer=ddp computes in bf16-mixed, as GPUs should.
        if [ "${ACCELERATOR:-gpu}" = cpu ]; then arguments+=(trainer.precision=32-true); fi
        arguments+=("$@")
        ;;
esac
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 train.py "${arguments[@]}"
