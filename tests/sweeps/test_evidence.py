"""The command for all studies: its words, its plan, its runs in miniature."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import Commands
from PIL import Image

from condconv.files import LAST, save_sealed
from configs.messages import UserError
from configs.results import write_result
from sweeps.evidence import best_with_experts, is_kept, keep_runs, main, minutes, planned, run, with_static_network
from sweeps.evidence_options import PROTOCOLS, STUDIES, parse


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for label in range(10):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "0.png")
    return tmp_path / "images"


def test_commands_are_those_of_the_documentation(data: Path) -> None:
    evidence = parse([f"data.root={data}", "jobs=2", "trainer=gpu", "runs=r"])
    words = evidence.command("experts", ("1", "2"))
    assert words[2:] == [
        "-m", "experiment=cifar10/reduced", "sweep=cifar10/experts", f"data.root={data}", "sweep_dir=r/experts",
        "seed=1,2", "launcher=joblib", "hydra.sweeper.launcher.n_jobs=2", "trainer=gpu",
    ]  # fmt: skip
    words = parse([f"data.root={data}", "jobs=1", "runs=a b"]).command("upcycled", ("3",))
    assert "experiment=cifar10/upcycled" in words and "sweep_dir='a b/upcycled'" in words
    assert "pretrained='a b/experts/experts-0_seed-${seed}/checkpoints/last.ckpt'" in words
    assert not any("launcher" in word for word in words)


def test_the_order(data: Path) -> None:
    all_of_it = parse([f"data.root={data}"])
    assert [study for study, _ in all_of_it.steps()] == list(STUDIES) and all_of_it.seeds == ("1", "2", "3")
    chosen = parse([f"data.root={data}", "studies=upcycled,experts", "order=seeds", "seeds=1,2"])
    assert chosen.steps() == [(s, (n,)) for n in "12" for s in ("experts", "upcycled")], "upcycled needs the others"
    for order in ("seeds", "studies"):  # what tunes has a seed of its own, once
        tuned = parse([f"data.root={data}", "studies=tuning,experts", "seeds=1,2", f"order={order}"]).steps()
        assert [step for step in tuned if step[0] == "tuning"] == [("tuning", ("11",))]
        assert [seed for study, seeds in tuned for seed in seeds if study == "experts"] == ["1", "2"]
    full = parse([f"data.root={data}", "protocol=full"])
    assert full.studies == PROTOCOLS["full"][0] and full.seeds == ("1", "2", "3", "4", "5")
    assert "backbones" in full.studies and not {"tuned", "regimes"} & set(full.studies)
    assert "second_backbone" in full.studies, "the twins of ResNet-18 0.125 in other studies; `backbones` has width 1"
    assert "condconv.experts=0,8,16,4,2,1" in full.command("experts", ("1",))
    assert {"experiment=cifar10/full", "condconv.init=upcycle"} <= set(full.command("upcycled", ("1",)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Where is CIFAR-10\\? Give the folder"),
        (["data.root=/nowhere"], "there is no /nowhere/train"),
        (["studies=expert"], "studies=expert: there is no such choice. Did you mean 'experts'"),
        (["protocol=small"], "protocol=small: .* reduced, full"),
        (["jobs=0"], "jobs=0: expected a whole number"),
        (["sweep=experts"], "sweep= is the studies' own: use seeds="),
        (["experts"], "expected key=value"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, data: Path) -> None:
    given = words if any(word.startswith("data.root") for word in words) or not words else [f"data.root={data}", *words]
    with pytest.raises(UserError, match=message):
        parse(given)


def test_estimates_follow_what_was_measured(data: Path, tmp_path: Path) -> None:
    evidence = parse([f"data.root={data}", f"runs={tmp_path / 'runs'}"])
    first = minutes(evidence, "experts", "experts-8_seed-2")
    larger = minutes(evidence, "controls", "experts-0_width-0.709_seed-1")
    assert first is not None and larger is not None and larger > first
    result = {"status": "finished", "seconds": 6000.0, "cpu_seconds": 600.0}
    write_result(tmp_path / "runs" / "experts" / "experts-8_seed-1", result)
    assert minutes(evidence, "experts", "experts-8_seed-2") == 10.0
    assert minutes(evidence, "experts", "experts-0_seed-2") != 10.0


def test_collected_runs_count_as_done(data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    write_result(kept / "experts" / "experts-8_seed-1", {"status": "finished", "name": "kept"})
    write_result(tmp_path / "runs" / "experts" / "experts-0_seed-1", {"status": "running", "name": "own"})
    write_result(kept / "experts" / "experts-0_seed-1", {"status": "finished", "name": "kept"})
    evidence = parse([f"data.root={data}", f"runs={tmp_path / 'runs'}", f"keep={kept}"])
    told = [is_kept(evidence, "experts", f"experts-{n}_seed-1") for n in (8, 0, 4)]
    assert told == [True, False, False], "a plan knows what would be copied"
    assert keep_runs(evidence) == 1 and keep_runs(evidence) == 0
    own = json.loads((tmp_path / "runs" / "experts" / "experts-0_seed-1" / "result.json").read_text())
    assert own["name"] == "own", "what is there is left alone"
    with pytest.raises(UserError, match="there is no such folder"):
        keep_runs(parse([f"data.root={data}", "keep=/nowhere"]))


def test_a_dry_run_lists_the_jobs_and_starts_none(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, kept, plans = tmp_path / "runs", tmp_path / "kept", []
    write_result(runs / "experts" / "experts-0_seed-1", {"status": "finished", "seconds": 60.0})
    write_result(runs / "experts" / "experts-8_seed-1", {"status": "interrupted"})
    write_result(kept / "experts" / "experts-4_seed-1", {"status": "finished", "seconds": 60.0})
    before = sorted(tmp_path.rglob("*"))
    words = [f"data.root={data}", f"runs={runs}", f"keep={kept}", "studies=experts", "seeds=1", "jobs=2", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["evidence", *words])
    here = Commands(tmp_path / "outputs", monkeypatch, capsys)  # a process that imports everything takes ten seconds
    monkeypatch.setattr(
        "sweeps.evidence.subprocess.run",
        lambda command, **options: subprocess.CompletedProcess(command, *here.train(*command[2:])),
    )
    monkeypatch.setattr("sweeps.evidence.planned", lambda evidence: plans.append(planned(evidence)) or plans[0])
    main()
    states = {0: "finished", 8: "unfinished", 4: "finished", 16: "new", 1: "new"}
    assert plans == [[("experts", f"experts-{experts}_seed-1", state) for experts, state in states.items()]]
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(maxsplit=3) for line in lines[:5]]
    assert [tuple(words[:3]) for words in told] == plans[0]
    assert [words[3:] for words in told] == [
        [],
        ["about 36 CPU minutes"],
        [],
        *([f"about {n} CPU minutes"] for n in (45, 30)),
    ]
    assert lines[6] == "5 jobs, 3 to run: about 1.9 hours of one core, 0.9 with 2 at a time"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_that_cannot_be_made_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(returncode=1, stderr="error: There is no setting 'x'.\n", stdout="")
    monkeypatch.setattr("sweeps.evidence.subprocess.run", lambda command, **options: said)
    with pytest.raises(UserError, match=r"^experts: There is no setting 'x'\.$"):
        planned(parse([f"data.root={data}", "studies=experts", "seeds=1"]))


def test_upcycled_networks_need_the_static_ones(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = parse([f"data.root={data}", f"runs={tmp_path / 'runs'}", "studies=upcycled"])
    static = tmp_path / "runs" / "experts" / "experts-0_seed-2" / "checkpoints" / "last.ckpt"
    for seed, status in ((1, "interrupted"), (2, "finished")):  # the first has a checkpoint too, half trained
        write_result(tmp_path / "runs" / "experts" / f"experts-0_seed-{seed}", {"status": status})
    for path in (static, Path(str(static).replace("seed-2", "seed-1"))):
        path.parent.mkdir(parents=True)
        path.touch()
    for experts in (0, 8):
        write_result(tmp_path / "runs" / "upcycled" / f"experts-{experts}_seed-3", {"status": "finished"})
    assert with_static_network(evidence, ("1", "2", "3", "4")) == ("2", "3")
    said = capsys.readouterr().err
    assert "upcycled, seed 1: not finished:" in said and "upcycled, seed 4: there is no" in said
    assert "Run studies=experts for it first" in said


@pytest.mark.parametrize(
    ("ends", "code", "calls"),
    [((0, 0, 0), 0, 3), ((0, 75, 0), 75, 3), ((75, 1, 75), 1, 3), ((1, 75, 0), 1, 3), ((75, 130, 0), 130, 2)],
)
def test_only_a_stop_ends_the_studies(
    ends: tuple[int, ...], code: int, calls: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = parse([f"data.root={data}", f"runs={tmp_path / 'runs'}", "studies=experts,routing,causes"])
    codes = list(ends)
    monkeypatch.setattr("sweeps.evidence._call", lambda command: codes.pop(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(evidence) == code and len(codes) == 3 - calls


def test_the_best_network_with_experts_is_analysed(tmp_path: Path) -> None:
    assert best_with_experts(tmp_path) is None
    for name, top1, status in (
        ("experts/experts-8_seed-1", 0.5, "finished"),
        ("tuned/model-resnet18_experts-8_seed-1", 0.7, "finished"),
        ("tuned/model-resnet18_experts-8_seed-2", 0.8, "interrupted"),
        ("tuned/model-resnet18_experts-0_seed-1", 0.9, "finished"),
        ("causes/expert-0.5_experts-8_seed-1", 0.9, "finished"),
        ("experts/experts-8_seed-3", 0.9, "finished"),  # a run that keep= brought: no checkpoint
    ):
        write_result(tmp_path / name, {"status": status, "figures": {"test/top1": top1}})
        if name != "experts/experts-8_seed-3":
            save_sealed({}, tmp_path / name / LAST)
    assert best_with_experts(tmp_path) == tmp_path / "tuned/model-resnet18_experts-8_seed-1"


@pytest.mark.slow
def test_studies_in_miniature(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static networks, upcycled ones that go on from them, and the report; the same command again runs nothing."""
    tiny = ["model.width=0.1", "data.batch_size_per_device=4", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    tiny += ["trainer=cpu", "callbacks.routing=null", "callbacks.checkpoint=null", "data.eval_batch_size_per_device=10"]
    words = [f"data.root={data}", f"runs={tmp_path / 'runs'}", "studies=experts,upcycled", "seeds=1", "jobs=2", *tiny]
    times: list[int] = []
    for again in (False, True):
        monkeypatch.setattr("sys.argv", ["evidence", *words, "condconv.experts=0"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        text = (tmp_path / "runs-report.md").read_text()
        assert "upcycled/experts-8 (seeds 1, 2, 3) not run" in text
        results = sorted((tmp_path / "runs").glob("*/*/result.json"))
        assert [path.parent.parent.name for path in results] == ["experts", "upcycled"]
        before, times = times, [path.stat().st_mtime_ns for path in results]
        assert not again or times == before
