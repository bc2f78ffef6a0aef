#!/usr/bin/env bash
# Several nodes without a scheduler: run the same line on every node, which all see the same folder of this repository.
#
#     NODES=2 MASTER=node1:29500 scripts/torchrun_several_nodes.sh experiment=imagenet/resnet50_condconv8 data.root=/imagenet
#
# MASTER is one of the nodes with a free port. PROCESSES (per node) and ACCELERATOR as in torchrun_one_node.sh.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
processes="${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case " $* " in
    *" resume="*) arguments=("$@") ;;
    *)
        arguments=(trainer=ddp "trainer.accelerator=${ACCELERATOR:-gpu}" "trainer.devices=$processes"
            "trainer.num_nodes=$NODES")
        # trainer=ddp computes in bf16-mixed, as GPUs should.
        if [ "${ACCELERATOR:-gpu}" = cpu ]; then arguments+=(trainer.precision=32-true); fi
        arguments+=("$@")
        ;;
esac
exec "$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${RUN_ID:-condconv}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 train.py "${arguments[@]}"
