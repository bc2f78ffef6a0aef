# Sourced by the sbatch files beside it, with train.py's overrides as arguments: starts or goes on, and requeues.
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-.venv/bin/python}"
# Since 22.05 srun does not take over --cpus-per-task from sbatch, and a process would load images on a single core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# The job's number names the folder, whatever the run is called: a requeued job finds it again.
run="${RUN:-outputs/slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
if [ -f "$run/config.yaml" ]; then
    arguments=("resume=$run")
else
    arguments=("paths.run=$run" trainer=slurm "$@")
fi

# Not killed when the first of them has exited: others may still be writing to W&B.
# In the background, so that this shell hears signals while it waits; srun hands SIGUSR1 and SIGTERM to its processes.
srun --kill-on-bad-exit=0 "$python" train.py "${arguments[@]}" &
step=$!
trap 'kill -TERM $step 2> /dev/null' TERM
code=0
while true; do
    wait $step
    code=$?
    kill -0 $step 2> /dev/null || break
done

if [ "$code" -eq 75 ]; then
    echo "Stopped and saved: back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
