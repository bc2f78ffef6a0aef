"""The choice of a backend: the rule, its explanation, measurements and their cache."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import condconv
from condconv import CondConv2d, CondLinear
from condconv.ops import autotune as measuring
from condconv.ops.autotune import Measurement
from condconv.ops.choice import choose, forget, recording, rule
from condconv.ops.registry import BACKENDS
from condconv.ops.spec import ConvSpec, Problem, is_channels_last


@pytest.fixture(autouse=True)
def no_measurements() -> Iterator[None]:
    forget()
    yield
    forget()


def problem(size: int = 7, batch: int = 16, kernel: int = 1, groups: int = 1, **changes: object) -> Problem:
    spec = ConvSpec((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    base = Problem(
        batch, 12, (size, size), 12, (kernel, kernel), 4, spec, torch.float32, torch.float32, "cpu", True, True
    )
    return replace(base, **changes)


def net() -> nn.Module:
    return nn.Sequential(
        CondConv2d(3, 6, 3, num_experts=2), nn.BatchNorm2d(6), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        CondLinear(6, 4, num_experts=2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (problem(1), "mixture"),
        (problem(1, kernel=5), "mixture"),  # one live tap: a pointwise layer
        (problem(2, batch=64), "mixture"),
        (problem(2, batch=4), "gemm"),
        (problem(7), "gemm"),
        (problem(13, kernel=3), "gemm"),
        (problem(14, kernel=3), "grouped"),
        (problem(14), "gemm"),
        (problem(14, kernel=3, dtype=torch.bfloat16), "gemm"),
        (problem(14, kernel=3, device="cuda"), "gemm"),
        (problem(28, kernel=3, spec=ConvSpec((2, 2), (1, 1))), "gemm"),
        (problem(16, kernel=3, spec=ConvSpec((1, 1), (2, 2), (2, 2))), "gemm"),
        (problem(7, kernel=3, groups=12), "depthwise"),
        (problem(1, kernel=3, groups=12), "depthwise"),
        (problem(7, kernel=3, groups=3), "grouped"),
    ],
)
def test_rule(case: Problem, backend: str) -> None:
    assert rule(case).backend == backend
    assert BACKENDS[backend].supports(case) is None
    assert choose(case) == rule(case)
    assert rule(case).reason


@pytest.mark.parametrize("size", [1, 2, 7, 14, 56])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_a_gpu_gets_no_triton_kernel_by_rule(size: int, groups: int) -> None:
    choice = rule(problem(size, batch=256, kernel=3, groups=groups, device="cuda", dtype=torch.bfloat16))
    assert not choice.backend.startswith("triton")


def test_explain_lists_each_layer_and_leaves_the_network_alone() -> None:
    model, x = net().train(), torch.randn(5, 3, 9, 9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    explanation = condconv.explain(model, x)
    assert [choice.layer for choice in explanation.layers] == ["0", "5"]
    assert explanation.layers[0].problem.batch == 5 and explanation.layers[0].problem.training
    assert explanation.layers[1].backend == "mixture"
    assert "7x7" not in str(explanation) and "9x9" in str(explanation) and "3 -> 6" in str(explanation)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not condconv.explain(model.eval(), x).layers[0].problem.training


def test_a_forward_pass_that_fails_leaves_the_buffers_alone() -> None:
    model = net()
    model[5] = nn.Linear(7, 4)  # of another size than its input
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        condconv.explain(model, torch.randn(2, 3, 9, 9))
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


def test_explain_needs_a_layer_with_backend_auto() -> None:
    with pytest.raises(ValueError, match="no CondConv layer"):
        condconv.explain(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match='backend="auto"'):
        condconv.explain(CondConv2d(3, 4, 1, backend="gemm"), torch.randn(1, 3, 4, 4))


def test_autotune_measures_remembers_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model, x = tmp_path / "deep" / "autotune.json", net(), torch.randn(3, 3, 9, 9)
    explanation = condconv.autotune(model, x, cache=cache, repeats=1)
    for choice in explanation.layers:
        assert set(choice.time_ms) == {backend.name for backend in measuring.candidates(choice.problem)}
        assert choice.backend == min(choice.time_ms, key=choice.time_ms.__getitem__)
        assert choose(choice.problem).backend == choice.backend
        assert choose(choice.problem).reason == "measured by autotune"
    assert " ms" in str(explanation)
    entries = json.loads(cache.read_text())[measuring.environment("cpu")]
    assert len(entries) == 2

    def fail(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "measure", fail)
    forget()
    again = condconv.autotune(model, x, cache=cache)
    assert [c.time_ms for c in again.layers] == [c.time_ms for c in explanation.layers]
    with pytest.raises(AssertionError, match="measured again"):
        condconv.autotune(model, x[:2], cache=cache)


def test_measurements_hold_for_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "autotune.json"
    condconv.autotune(net(), torch.randn(2, 3, 5, 5), cache=cache, repeats=1)
    monkeypatch.setattr(measuring, "environment", lambda device: "another machine")
    assert measuring.load_cache(cache, "cpu") == {}


def test_other_algorithms_are_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    names = {measuring.environment("cuda"), measuring.environment("cpu")}
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.8.0"))
    names.add(measuring.environment("cuda"))
    monkeypatch.setattr(condconv, "__version__", "0.0.0")
    names |= {measuring.environment("cuda"), measuring.environment("cpu")}
    assert len(names) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"%s": [1]}'])
def test_a_broken_cache_is_measured_anew_with_a_warning(tmp_path: Path, text: str) -> None:
    cache = tmp_path / "autotune.json"
    cache.write_text(text.replace("%s", measuring.environment("cpu")))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert condconv.autotune(net(), torch.randn(2, 3, 5, 5), cache=cache, repeats=1).layers
    assert measuring.load_cache(cache, "cpu")


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert condconv.autotune(net(), torch.randn(2, 3, 5, 5), cache=tmp_path / "file" / "x.json", repeats=1).layers


def test_the_gpu_of_the_input_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not the current one; here with a stand-in for the GPUs."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    def environment(device: str) -> str:
        assert current == [x]
        return "a GPU"

    def measure(problem: Problem, repeats: int) -> Measurement:
        assert current == [x]
        return Measurement(problem, {"gemm": 1.0})

    x = torch.randn(2, 3, 5, 5)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(measuring, "environment", environment)
    monkeypatch.setattr(measuring, "measure", measure)
    assert condconv.autotune(net(), x, cache=tmp_path / "autotune.json").layers
    assert not current


def test_two_processes_keep_each_others_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes between the first one's reading and its writing; locks are between open files."""
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    cache, replace_file, others = tmp_path / "autotune.json", os.replace, []

    def replace_after_another_came(*names: Path) -> None:
        if not others:
            second = Measurement(problem(9), {"gemm": 2.0})
            others.append(threading.Thread(target=measuring.save_cache, args=(cache, "cpu", [second])))
            others[0].start()
            others[0].join(0.5)
        replace_file(*names)

    monkeypatch.setattr(os, "replace", replace_after_another_came)
    measuring.save_cache(cache, "cpu", [Measurement(problem(7), {"gemm": 1.0})])
    others[0].join()
    assert measuring.load_cache(cache, "cpu") == {str(problem(7)): {"gemm": 1.0}, str(problem(9)): {"gemm": 2.0}}


def test_a_cache_that_fails_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "autotune.json"

    def fail(*names: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="cannot be written.*no space"):
        measuring.save_cache(cache, "cpu", [Measurement(problem(), {"gemm": 1.0})])
    assert [file.name for file in tmp_path.iterdir()] == ["autotune.json.lock"]


def test_the_measured_backend_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer, x = CondConv2d(4, 4, 3, num_experts=2), torch.randn(2, 4, 6, 6)
    expected, ran = layer(x), []
    by_rule = condconv.explain(layer, x).layers[0].backend
    other = next(name for name in ("grouped", "mixture", "gemm") if name != by_rule)
    for name, backend in BACKENDS.items():
        spy = lambda *args, name=name, forward=backend.forward: (ran.append(name), forward(*args))[1]  # noqa: E731
        monkeypatch.setitem(BACKENDS, name, backend._replace(forward=spy))
    monkeypatch.setattr(measuring, "measure", lambda problem, repeats: Measurement(problem, {other: 1.0, by_rule: 2.0}))
    condconv.autotune(layer, x, cache=tmp_path / "cache.json", repeats=1)
    ran.clear()
    assert torch.allclose(layer(x), expected, atol=1e-6) and ran == [other]


def tuning_worker(rank: int, folder: Path) -> None:
    """Of two processes, each with a cache of its own; what the rule takes is the slowest, so that answers show."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def measure(problem: Problem, repeats: int) -> Measurement:
        assert rank == 0, "measured by another than the first process"
        names = [backend.name for backend in measuring.candidates(problem)]
        return Measurement(problem, {name: 9.0 if name == rule(problem).backend else 1.0 for name in names})

    measuring.measure = measure
    explanation = condconv.autotune(net(), torch.randn(3, 3, 9, 9), cache=folder / f"cache{rank}.json")
    assert all(choose(choice.problem).backend == choice.backend for choice in explanation.layers)
    (folder / f"{rank}.json").write_text(json.dumps([(c.layer, c.backend, c.time_ms) for c in explanation.layers]))
    dist.destroy_process_group()


@pytest.mark.forks
def test_the_first_process_measures_and_the_others_take_its_answers(tmp_path: Path) -> None:
    mp.start_processes(tuning_worker, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [layer for layer, *_ in first] == ["0", "5"] and second == first
    by_rule = condconv.explain(net(), torch.randn(3, 3, 9, 9)).layers
    assert all(choice.backend != backend for choice, (_, backend, _) in zip(by_rule, first, strict=True))
    assert (tmp_path / "cache0.json").is_file() and not (tmp_path / "cache1.json").exists()


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


def without_memory(monkeypatch: pytest.MonkeyPatch, *names: str, error: Exception = NO_MEMORY) -> None:
    def forward(*args: object) -> None:
        raise error

    for name in names:
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(forward=forward))


def test_a_backend_that_runs_out_of_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, layer, x = tmp_path / "cache.json", CondConv2d(4, 4, 3, num_experts=2), torch.randn(2, 4, 6, 6)
    with monkeypatch.context() as patched:
        without_memory(patched, "mixture")
        explanation = condconv.autotune(layer, x, cache=cache, repeats=1)
    (choice,) = explanation.layers
    assert choice.backend != "mixture" and "mixture out of memory" in str(explanation)
    assert measuring.load_cache(cache, "cpu") == {}, "there may be more memory the next time"
    without_memory(monkeypatch, *choice.time_ms)
    measurement = measuring.measure(choice.problem, repeats=1)  # raises nothing: other processes wait for the answer
    with pytest.raises(torch.OutOfMemoryError, match=r"Every backend ran out of memory: .*mixture.*smaller batch"):
        measurement.backend  # noqa: B018


def test_a_cpu_says_otherwise_that_it_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = CondConv2d(4, 4, 3, num_experts=2), torch.randn(2, 4, 6, 6)
    problem = condconv.explain(layer, x).layers[0].problem
    with monkeypatch.context() as patched:
        without_memory(patched, "mixture", error=ON_A_CPU)
        assert measuring.measure(problem, repeats=1).time_ms["mixture"] == math.inf
    without_memory(monkeypatch, "mixture", error=RuntimeError("another mistake"))
    with pytest.raises(RuntimeError, match="another mistake"):
        measuring.measure(problem, repeats=1)


def test_the_random_stream_does_not_know_of_measurements(tmp_path: Path) -> None:
    """Else a training would depend on whether the cache was warm."""
    layers, x = nn.Sequential(nn.Dropout(0.5), *net()), torch.randn(2, 3, 5, 5)
    state = torch.get_rng_state()
    condconv.explain(layers, x)
    condconv.autotune(layers, x, cache=tmp_path / "cache.json", repeats=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_measurements_run_without_autocast_as_the_operator_does() -> None:
    seen: list[bool] = []
    spied = BACKENDS["gemm"]._replace(forward=lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        measuring._workload(spied, problem(training=False))()
    assert seen == [False]


@pytest.mark.parametrize("channels_last", [True, False])
def test_one_pixel_is_measured_in_the_layout_of_the_problem(channels_last: bool) -> None:
    seen: list[bool] = []
    spied = BACKENDS["mixture"]._replace(
        forward=lambda x, *args: seen.append(is_channels_last(x)),
        backward=lambda grad_y, x, *args: seen.append(is_channels_last(grad_y)),
    )
    measuring._workload(spied, problem(1, channels_last=channels_last))()
    assert seen == [channels_last] * 2


def test_networks_that_are_compiled_already_are_explained() -> None:
    layers, x = net(), torch.randn(2, 3, 5, 5)
    expected = [choice.layer for choice in condconv.explain(layers, x).layers]
    layers.compile(backend="eager")
    layers(x)
    assert [choice.layer for choice in condconv.explain(layers, x).layers] == expected


def test_compressed_layers_are_not_explained() -> None:
    layers = net().eval()
    condconv.compress_experts(layers)
    with pytest.raises(ValueError, match="compressed"), torch.no_grad():
        condconv.explain(layers, torch.randn(2, 3, 5, 5))


def test_recordings_may_overlap() -> None:
    with recording() as outer:
        with recording():
            pass
        CondConv2d(4, 4, 3, num_experts=2)(torch.randn(2, 4, 6, 6))
    assert len(outer) == 1


def test_debug_mode_names_examples_with_routing_that_is_not_finite() -> None:
    x, weight = torch.randn(3, 2, 4, 4), torch.randn(2, 2, 2, 1, 1)
    routing = torch.tensor([[1.0, 1.0], [1.0, torch.nan], [torch.inf, 0.0]])
    assert condconv.condconv2d(x, routing, weight).shape == (3, 2, 4, 4)
    condconv.set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"examples \[1, 2\] are not finite"):
            condconv.condconv2d(x, routing, weight)
    finally:
        condconv.set_debug(False)
