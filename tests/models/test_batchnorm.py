"""Grouped BatchNorm statistics against plain BatchNorm on the groups, within one process and over several."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from models.batchnorm import group_batchnorm
from models.callbacks.batchnorm import BatchNormGroups

CHANNELS = 3
PARTS = (3, 4)  # examples of the two processes: sizes that differ, on purpose


def batchnorm(act: bool) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU) if act else nn.BatchNorm2d(CHANNELS)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def examples(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, CHANNELS, 5, 3, generator=generator) * 2 + 100  # a large mean: no cancellation allowed


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).square().sum()


@pytest.mark.parametrize("act", [False, True])
def test_parts_of_a_batch_have_their_own_statistics(act: bool) -> None:
    plain, x = batchnorm(act), examples(8)
    grouped = nn.Sequential(copy.deepcopy(plain))
    weight = grouped[0].weight
    group_batchnorm(grouped, 4, 8)
    assert grouped[0].weight is weight
    twins = [copy.deepcopy(plain), copy.deepcopy(plain)]
    expected = torch.cat([twin(part) for twin, part in zip(twins, x.split(4), strict=True)])
    actual = grouped(x)
    assert torch.equal(actual, expected)
    loss(actual).backward()
    loss(expected).backward()
    torch.testing.assert_close(weight.grad, twins[0].weight.grad + twins[1].weight.grad)
    torch.testing.assert_close(grouped[0].running_mean, (twins[0].running_mean + twins[1].running_mean) / 2)
    torch.testing.assert_close(grouped[0].running_var, (twins[0].running_var + twins[1].running_var) / 2)
    assert grouped[0].num_batches_tracked == 1
    # Evaluation, and a last batch smaller than a group, are plain BatchNorm.
    plain.load_state_dict(grouped[0].state_dict())
    assert torch.equal(grouped(x[:3]), plain(x[:3]))
    assert torch.equal(grouped.eval()(x), plain.eval()(x))
    assert torch.equal(copy.deepcopy(grouped)(x), plain(x))


def test_a_smaller_last_batch_has_parts_of_at_least_a_group() -> None:
    """Seven examples in groups of three are four and three, not three, three and one."""
    plain, x = batchnorm(act=False), examples(7)
    grouped = nn.Sequential(copy.deepcopy(plain))
    group_batchnorm(grouped, 3, 9)
    twins = [copy.deepcopy(plain), copy.deepcopy(plain)]
    expected = torch.cat([twin(part) for twin, part in zip(twins, x.split((4, 3)), strict=True)])
    assert torch.equal(grouped(x), expected)
    for name in ("running_mean", "running_var"):
        mean = (getattr(twins[0], name) + getattr(twins[1], name)) / 2
        torch.testing.assert_close(getattr(grouped[0], name), mean)
    assert grouped[0].num_batches_tracked == 1
    # Five are less than two groups, so they are one.
    plain.load_state_dict(grouped[0].state_dict())
    assert torch.equal(grouped(x[:5]), plain(x[:5]))


def synced_worker(rank: int, act: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(PARTS))
    layer = nn.Sequential(batchnorm(act))
    group_batchnorm(layer, "all", 4)
    x = examples(sum(PARTS)).split(PARTS)[rank].clone().requires_grad_()
    y = layer(x)
    loss(y).backward()
    state = {"y": y.detach(), "x": x.grad, "weight": layer[0].weight.grad, "bias": layer[0].bias.grad}
    torch.save(state | layer[0].state_dict(prefix="state."), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.forks
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    # Forked: importing everything anew in two processes would take longer than all other tests of this file.
    mp.start_processes(synced_worker, (True, tmp_path), nprocs=len(PARTS), start_method="fork")
    layer, x = batchnorm(act=True), examples(sum(PARTS)).requires_grad_()
    y = layer(x)
    loss(y).backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(PARTS))]
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), y.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]), x.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ranks[0]["weight"] + ranks[1]["weight"], layer.weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ranks[0]["bias"] + ranks[1]["bias"], layer.bias.grad, atol=1e-3, rtol=1e-4)
    for rank in ranks:
        for name, value in layer.state_dict(prefix="state.").items():
            torch.testing.assert_close(rank[name], value, msg=lambda text, name=name: f"{name}: {text}")


def pairs_worker(rank: int, folder: Path) -> None:
    """Two examples in each of four processes, and statistics over four."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    layer = nn.Sequential(batchnorm(act=False))
    with pytest.raises(ValueError, match="groups of 3 processes do not divide 4 processes"):
        group_batchnorm(layer, 6, 2)
    assert type(layer[0]) is nn.BatchNorm2d
    group_batchnorm(layer, 4, 2)
    x = examples(8).split(2)[rank].clone().requires_grad_()
    y = layer(x)
    loss(y).backward()
    state = {"y": y.detach(), "x": x.grad, "weight": layer[0].weight.grad, "bias": layer[0].bias.grad}
    torch.save(state | layer[0].state_dict(prefix="state."), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.forks
def test_groups_of_two_of_four_processes_have_their_own_statistics(tmp_path: Path) -> None:
    mp.start_processes(pairs_worker, (tmp_path,), nprocs=4, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for pair, part in zip((ranks[:2], ranks[2:]), examples(8).split(4), strict=True):
        layer, x = batchnorm(act=False), part.clone().requires_grad_()
        y = layer(x)
        loss(y).backward()
        torch.testing.assert_close(torch.cat([rank["y"] for rank in pair]), y.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([rank["x"] for rank in pair]), x.grad, atol=1e-3, rtol=1e-4)
        for name in ("weight", "bias"):
            gradient = getattr(layer, name).grad
            torch.testing.assert_close(pair[0][name] + pair[1][name], gradient, atol=1e-3, rtol=1e-4)
        for rank in pair:
            for name, value in layer.state_dict(prefix="state.").items():
                torch.testing.assert_close(rank[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_groups_that_do_not_fit_are_named() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    group_batchnorm(net, 32, 32)
    group_batchnorm(net, "all", 32)
    assert type(net[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="do not divide the 32"):
        group_batchnorm(net, 12, 32)
    with pytest.raises(ValueError, match="not a whole number of devices"):
        group_batchnorm(net, 40, 32)
    with pytest.raises(ValueError, match="at least one example"):
        group_batchnorm(net, 0, 32)
    with pytest.raises(RuntimeError, match="span 4 processes, but the training has 1"):
        group_batchnorm(net, 128, 32)


def test_the_callback_converts_for_training_only() -> None:
    class Holder:
        net = nn.Sequential(nn.BatchNorm2d(3))

    BatchNormGroups(None, 8).setup(None, Holder, "fit")
    callback = BatchNormGroups(examples=4, batch_size_per_device=8)
    callback.setup(None, Holder, "validate")
    assert type(Holder.net[0]) is nn.BatchNorm2d
    callback.setup(None, Holder, "fit")
    assert Holder.net[0].group_size == 4
