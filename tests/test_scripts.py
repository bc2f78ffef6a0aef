"""The scripts for one node: with stand-ins for `srun` and `scontrol` a job is requeued and goes on; and torchrun's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from survival import EPOCHS, TINY, free_port

from configs.messages import EXIT_REQUEUE
from configs.results import read_result

pytestmark = pytest.mark.forks

ROOT = Path(__file__).resolve().parents[1]
SRUN = r"""#!/usr/bin/env bash
# What srun does, on one machine: N processes with their numbers; signals go to all; the largest exit code counts.
[[ "$1" == --kill* ]] && shift
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM
trap 'kill -USR1 "${pids[@]}" 2> /dev/null' USR1
worst=0
for pid in "${pids[@]}"; do
    while true; do
        wait "$pid"; code=$?
        kill -0 "$pid" 2> /dev/null || break
    done
    ((code > worst)) && worst=$code
done
exit $worst
"""


def submit(tmp_path: Path, *overrides: str) -> tuple[subprocess.Popen[bytes], Path]:
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    run = tmp_path / "outputs" / "slurm-7"
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RUN": str(run),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "condconv",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    log = (tmp_path / "log").open("ab")
    script = str(ROOT / "scripts" / "slurm_one_node.sbatch")
    process = subprocess.Popen(
        ["bash", script, *overrides], env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
    )
    return process, run


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sbatch")), ids=lambda path: path.stem)
def test_a_job_writes_its_log_where_a_fresh_clone_has_a_folder(script: Path) -> None:
    """SLURM makes no folder for it: a job whose log cannot be opened dies without a word."""
    (log,) = re.findall(r"^#SBATCH --output=(\S+)$", script.read_text(), re.MULTILINE)
    assert "/" not in log
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert any(fnmatch(log.replace("%j", "7"), pattern) for pattern in ignored)


@pytest.mark.parametrize("script", ["torchrun_one_node.sh", "torchrun_several_nodes.sh"])
def test_torchrun_on_a_cpu_computes_in_32_bits(script: str, tmp_path: Path) -> None:
    """trainer=ddp alone is for GPUs, whose 16 bits a CPU would only emulate."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $@\n")
    python.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(python), "PROCESSES": "2", "NODES": "2", "MASTER": "localhost:29500"}
    for accelerator, precision in (("cpu", ["trainer.precision=32-true"]), ("gpu", [])):
        run = ["bash", str(ROOT / "scripts" / script), "seed=2"]
        environment = {**variables, "ACCELERATOR": accelerator}
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        _, _, words = done.stdout.partition("train.py ")
        nodes = ["trainer.num_nodes=2"] if "several" in script else []
        expected = ["trainer=ddp", f"trainer.accelerator={accelerator}", "trainer.devices=2", *nodes, *precision]
        assert words.split() == [*expected, "seed=2"]


@pytest.mark.slow
def test_a_slurm_job_is_stopped_requeued_and_finished(tmp_path: Path) -> None:
    overrides = [*TINY, "data.batch_size_per_device=8", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    process, run = submit(tmp_path, *overrides, "trainer.max_epochs=200")
    try:
        until = time.monotonic() + 300
        while not (run / "checkpoints" / "last.ckpt").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        for task in tasks_of(process.pid):  # as SLURM does before the time limit
            os.kill(task, signal.SIGUSR1)
        assert process.wait(120) == EXIT_REQUEUE, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert read_result(run)["status"] == "interrupted" and read_result(run)["devices"] == 2
    assert [path.name for path in run.parent.iterdir()] == ["slurm-7"]  # one folder for both processes
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    # SLURM starts the same job again, under the same number. (Length and all else come from the run's own config.)
    process, _ = submit(tmp_path, *overrides)
    until = time.monotonic() + 300
    try:
        while process.poll() is None and time.monotonic() < until:
            rows = (run / "metrics.csv").read_text().splitlines()
            if len(rows) > 1 and rows[-1].split(",")[0] not in ("", "step") and int(rows[-1].split(",")[0]) > step + 2:
                break
            time.sleep(0.2)
        for task in tasks_of(process.pid):
            os.kill(task, signal.SIGTERM)
        assert process.wait(120) == EXIT_REQUEUE, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > step + 2


@pytest.mark.slow
def test_torchrun_on_one_node_trains_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    variables = {**os.environ, "PYTHON": sys.executable, "ACCELERATOR": "cpu", "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "scripts" / "torchrun_one_node.sh")
    overrides = [*TINY, "data.batch_size_per_device=8", f"paths.run={run}"]
    for words, epochs in ((overrides, EPOCHS), ((f"resume={run}", f"trainer.max_epochs={EPOCHS + 1}"), EPOCHS + 1)):
        done = subprocess.run(["bash", script, *words], env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        result = read_result(run)
        assert (result["status"], result["devices"], result["epochs"]) == ("finished", 2, epochs)


def tasks_of(group: int) -> list[int]:
    """The Python processes of a session."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "-s", str(group)], capture_output=True, text=True, check=True)
    pairs = (line.split(maxsplit=1) for line in listed.stdout.splitlines())
    return [int(pid) for pid, arguments in pairs if "train.py" in arguments and not arguments.startswith("bash")]
