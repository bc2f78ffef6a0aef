"""Jobs as processes: what becomes of those that finish, fail, crash and are stopped, with every launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from configs.messages import UserError
from configs.results import read_result, write_result
from sweeps.jobs import JobRun, progress, quoted, state_on_disk, training_length
from sweeps.launchers import InTurn, Joblib, Submitit, make_launcher
from sweeps.plan import Job

# A training without torch: takes what train.py takes, behaves as its first override says, leaves what train.py leaves.
SCRIPT = """
import ast, json, os, pathlib, signal, sys, time, zipfile
words = dict(word.split("=", 1) for word in sys.argv[1:])
resumed = "resume" in words
folder = pathlib.Path(ast.literal_eval(words.get("resume") or words["paths.run"]))
how = json.loads((folder / "how.json").read_text()) if resumed else words["how"]
if how == "refuses":
    print("error: how=refuses: choose another.", file=sys.stderr); sys.exit(1)
def write(status, **more):
    (folder / "result.json").write_text(json.dumps({"status": status, "pid": os.getpid(), **more}))
(folder / "config.yaml").write_text("trainer: {max_epochs: 4, max_steps: -1}")
(folder / "how.json").write_text(json.dumps(how))
write("running")
def leave(number, frame):
    (folder / "checkpoints").mkdir(exist_ok=True)
    zipfile.ZipFile(folder / "checkpoints" / "last.ckpt", "w").close()
    write("interrupted"); sys.exit(75)
signal.signal(signal.SIGTERM, leave)
if how == "crashes": os.kill(os.getpid(), signal.SIGSEGV)
if how == "raises": write("failed", error="the sky fell"); sys.exit(1)
if how == "waits" and not resumed:
    (folder / "ready").touch()
    for _ in range(600): time.sleep(0.1)
write("finished", resumed=resumed, seconds=1.0, environment=dict(os.environ), figures={"val/top1": 0.5})
print("done")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def job(script: Path, how: str, name: str | None = None) -> JobRun:
    name = name or how
    return JobRun(Job(name, (f"how={how}",)), script.parent / "a folder, with 'signs'" / name, [f"how={how}"], script)


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not come")


def test_every_end_has_its_state(script: Path) -> None:
    runs = [job(script, how) for how in ("works", "raises", "crashes", "refuses", "ends")]
    InTurn().launch(runs)
    assert [run.state for run in runs] == ["finished", "failed", "failed", "failed", "finished"]
    assert [run.error() for run in runs[1:4]] == [
        "the sky fell",
        "The process was ended by SIGSEGV.",
        "how=refuses: choose another.",
    ]
    # Also in the files, where reports and the next start look.
    assert [state_on_disk(run.folder) for run in runs] == ["finished", "failed", "failed", "failed", "finished"]
    assert "done" in runs[0].log_tail() and "signs" in str(runs[0].folder)
    refused = read_result(runs[3].folder)
    assert refused is not None and refused["name"] == "refuses" and refused["overrides"] == ["how=refuses"]


def test_an_unfinished_job_goes_on_or_begins_anew(script: Path) -> None:
    run = job(script, "works")
    run.folder.mkdir(parents=True)
    assert state_on_disk(run.folder) == "new"
    (run.folder / "config.yaml").write_text("")
    (run.folder / "metrics.csv").write_text("of an earlier start")
    assert state_on_disk(run.folder) == "unfinished"
    run.run(threading.Event(), threading.Event())
    result = read_result(run.folder)
    assert run.state == "finished" and result["resumed"] is False
    assert not (run.folder / "metrics.csv").exists(), "without a checkpoint nothing of the earlier start is kept"
    # A checkpoint that was cut off is none, but the one before it will do.
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "last.ckpt").touch()
    assert not run.command()[-1].startswith("resume=")
    zipfile.ZipFile(run.folder / "checkpoints" / "last-1.ckpt", "w").close()
    write_result(run.folder, {**result, "status": "running"})
    assert state_on_disk(run.folder) == "unfinished"
    run.run(threading.Event(), threading.Event())
    assert read_result(run.folder)["resumed"] is True


def unfinished(script: Path, how: str) -> JobRun:
    """A job that an earlier start has left with a checkpoint."""
    run = job(script, how)
    (run.folder / "checkpoints").mkdir(parents=True)
    zipfile.ZipFile(run.folder / "checkpoints" / "last.ckpt", "w").close()
    (run.folder / "config.yaml").write_text("")
    (run.folder / "how.json").write_text(f'"{how}"')
    return run


def test_what_an_earlier_start_said_is_not_why_this_one_ended(script: Path) -> None:
    run = unfinished(script, "crashes")
    (run.folder / "log.txt").write_text("error: /data: No space left on device.\n")
    run.run(threading.Event(), threading.Event())
    assert run.state == "failed" and run.error() == "The process was ended by SIGSEGV."
    assert "No space" in (run.folder / "log.txt").read_text() and "No space" not in run.log_tail()


@pytest.mark.parametrize("before", ["interrupted", "failed"])
def test_how_an_earlier_start_ended_is_not_how_this_one_ends(before: str, script: Path) -> None:
    """It breaks before its training begins, so it writes nothing itself."""
    run = unfinished(script, "refuses")
    write_result(run.folder, {"status": before, "error": "of the earlier start", "ended": "then", "steps": 7})
    assert run.prepare()[-1].startswith("resume=") and state_on_disk(run.folder) == "unfinished"
    run.run(threading.Event(), threading.Event())
    assert run.state == "failed" and run.error() == "how=refuses: choose another."
    assert read_result(run.folder)["steps"] == 7


@pytest.mark.parametrize("launcher", [InTurn, lambda: Joblib(2)], ids=["in_turn", "joblib"])
def test_a_stopped_launcher_lets_jobs_save_and_starts_no_more(launcher: object, script: Path) -> None:
    launcher = launcher()
    runs = [job(script, "waits", f"waits-{i}") for i in range(launcher.slots)] + [job(script, "works")]
    thread = threading.Thread(target=launcher.launch, args=(runs,))
    thread.start()
    for run in runs[:-1]:
        wait_for(run.folder / "ready")
    launcher.stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert [run.state for run in runs] == ["interrupted"] * launcher.slots + ["waiting"]
    assert [state_on_disk(run.folder) for run in runs] == ["unfinished"] * launcher.slots + ["new"]
    # The next start goes on.
    type(launcher)().launch(runs)
    assert [run.state for run in runs] == ["finished"] * len(runs)
    assert [read_result(run.folder)["resumed"] for run in runs] == [True] * launcher.slots + [False]


def test_the_second_stop_does_not_wait(script: Path) -> None:
    launcher, run = InTurn(), job(script, "waits")
    thread = threading.Thread(target=launcher.launch, args=([run],))
    thread.start()
    wait_for(run.folder / "ready")
    launcher.kill.set()
    launcher.stop.set()
    thread.join(20)
    assert run.code == -signal.SIGKILL and run.state == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone can send a signal when a parent ends")
def test_jobs_end_with_a_killed_sweep(script: Path) -> None:
    run = job(script, "waits")
    code = "import sys; from pathlib import Path; from threading import Event; from sweeps.jobs import JobRun\n"
    code += "from sweeps.plan import Job\n"
    code += f"run = JobRun(Job('waits', ()), Path({str(run.folder)!r}), ['how=waits'], Path({str(script)!r}))\n"
    code += "run.run(Event(), Event())"
    parent = os.fork()
    if parent == 0:  # no import of torch in a new interpreter: a copy of this one
        os.setsid()
        exec(code)
        os._exit(0)
    wait_for(run.folder / "ready")
    child = json.loads((run.folder / "result.json").read_text())["pid"]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or read_result(run.folder)["status"] == "interrupted":
            break
        time.sleep(0.05)
    assert read_result(run.folder)["status"] == "interrupted", "it was told, and could save its state"


def test_joblib_jobs_do_not_fight_over_cores(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    runs = [job(script, "works", f"works-{i}") for i in range(2)]
    Joblib(n_jobs=2).launch(runs)
    environments = [read_result(run.folder)["environment"] for run in runs]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"3"}
    assert not [name for name in environments[0] if name.startswith("CONDCONV_SWEEP")]


def test_joblib_shares_out_the_gpus_that_it_may_use(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def visible(given: str | None, devices: int = 1) -> set[str | None]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        runs = [job(script, "waits", f"{given}-{devices}-{i}") for i in range(2)]
        for run in runs:
            run.devices = devices
        launcher = Joblib(n_jobs=2)
        thread = threading.Thread(target=launcher.launch, args=(runs,))
        thread.start()  # both wait at the same time, so each has a place of its own
        for run in runs:
            wait_for(run.folder / "ready")
        launcher.stop.set()
        thread.join(20)
        return {run.environment.get("CUDA_VISIBLE_DEVICES") for run in runs}

    assert visible(None) == {"0", "1"}
    assert visible("2,3") == {"2", "3"}
    assert visible("GPU-8f2a, MIG-41") == {"GPU-8f2a", "MIG-41"}
    assert visible("2,3", devices=2) == {None}, "a job of two devices keeps both"


def test_submitit_local(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("CONDCONV_DATA", "/somewhere")
    launcher = Submitit(cluster="local", max_at_once=2, timeout_min=1)
    launcher.poll_s = 0.1
    runs = [job(script, how) for how in ("works", "raises")]
    launcher.launch(runs)
    assert [run.state for run in runs] == ["finished", "failed"]
    assert runs[1].error() == "the sky fell" and "done" in runs[0].log_tail()
    environment = read_result(runs[0].folder)["environment"]
    assert environment["CONDCONV_DATA"] == "/somewhere" and environment["PATH"] == os.environ["PATH"]
    assert environment["SLURM_JOB_NAME"] == "bash", "what Lightning asks for"


def test_jobs_of_a_killed_sweep_are_waited_for(script: Path) -> None:
    """Submitit's jobs live on; none is started beside one in the same folder, whatever the launcher."""
    pytest.importorskip("submitit")
    first = job(script, "waits")
    parent = os.fork()
    if parent == 0:
        os.setsid()
        Submitit(cluster="local", timeout_min=1).launch([first])
        os._exit(0)
    wait_for(first.folder / "ready")
    child = json.loads((first.folder / "result.json").read_text())["pid"]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    again = [job(script, "waits"), job(script, "works")]
    launcher = Submitit(cluster="local", timeout_min=1)
    launcher.poll_s = 0.05
    thread = threading.Thread(target=launcher.launch, args=(again,))
    thread.start()
    wait_for(again[1].folder / "result.json")
    assert again[0].is_held() and again[0].state == "waiting" and (first.folder / "ready").exists()
    os.kill(child, signal.SIGTERM)
    thread.join(30)
    assert [run.state for run in again] == ["finished", "finished"]
    assert read_result(first.folder)["resumed"] is True and not again[0].is_held()
    # Another start, after the job has ended by itself, has nothing to run.
    last = job(script, "waits")
    InTurn().launch([last])
    assert last.state == "finished" and last.ticket == ""


def test_a_job_that_was_submitted_again_does_not_begin(script: Path) -> None:
    """It waited in the cluster's queue when the sweep was killed."""
    old, new = job(script, "works"), job(script, "works")
    command = old.prepare()
    new.prepare()
    environment = {**os.environ, **old.own_environment("any")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "has submitted this job anew" in done.stderr
    assert not (new.folder / "result.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "in_trun"}, "launcher=in_trun: choose one of in_turn, joblib, submitit, in_process"),
        ({"kind": "joblib", "n_jobs": 0}, "launcher.n_jobs=0: expected a number"),
        ({"kind": "submitit", "cluster": "lunar"}, "launcher.cluster=lunar: choose slurm, local or null"),
        ({"kind": "in_turn", "n_jobs": 3}, "launcher=in_turn: .*n_jobs"),
    ],
)
def test_launchers_say_what_is_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_launcher(**options)


def test_progress_is_read_from_half_written_files(tmp_path: Path) -> None:
    assert progress(tmp_path, "val/top1", training_length).share == 0.0
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 4, max_steps: -1}")
    (tmp_path / "metrics.csv").write_text("step,epoch,val/top1\n9,1,0.25\n12,2,\n13,2,0.")
    found = progress(tmp_path, "val/top1", training_length)
    assert found.share == 0.5 and found.figure == 0.0
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 4, max_steps: 28}")
    assert progress(tmp_path, "val/top1", training_length).share == 0.5
    (tmp_path / "config.yaml").write_text("{")
    assert progress(tmp_path, "val/top1", training_length).share == 0.0


def test_paths_with_signs_survive_the_command_line() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("/a b/c,d=e", "/it's", "/a\\b", "/{x}[y]"):
        assert OverridesParser.create().parse_override(f"paths.run={quoted(Path(text))}").value() == text
