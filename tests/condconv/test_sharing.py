"""Routers shared by the layers of a block, and by blocks: what a converted network survives, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from numerics import assert_close
from small_networks import SmallNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from condconv.convert import convert
from condconv.layers import CondConv2d, CondLinear
from condconv.routing import ROUTINGS, Router

EXPERTS = 3
SIZE = 12


def network(routing: str = "fc", **options: object) -> SmallNet:
    net = SmallNet().double()
    convert(net, EXPERTS, blocks="blocks.*.*", exclude="se", classifier="classifier", routing=routing, **options)
    return net


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64)


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name)


def assert_nothing_left(net: nn.Module) -> None:
    left = [name for name, m in net.named_modules() if isinstance(m, CondConv2d | CondLinear) and m.routing is not None]
    units = [
        m.routing_unit.name for m in net.modules() if hasattr(m, "routing_unit") and m.routing_unit.incoming is not None
    ]
    assert not left and not units


@pytest.fixture(params=ROUTINGS)
def routed(request: pytest.FixtureRequest) -> SmallNet:
    return network(request.param)


def test_every_routing_function_trains_every_parameter(routed: SmallNet) -> None:
    hidden_unit_may_be_dead = any(hasattr(m, "hidden") for m in routed.modules())
    for name, gradient in gradients(routed, images(4)).items():
        assert gradient.abs().max() > 0 or (hidden_unit_may_be_dead and "router" in name), name
    assert_nothing_left(routed)


def test_an_example_does_not_depend_on_its_batch(routed: SmallNet) -> None:
    x = images(5)
    together = routed(x)
    assert_close(torch.cat([routed(image) for image in x.split(1)]), together, "one by one")


def test_a_deep_copy_is_independent(routed: SmallNet) -> None:
    x = images()
    before = routed(x)
    twin = copy.deepcopy(routed)
    assert_close(twin(x), before, "copy")
    with torch.no_grad():
        for parameter in routed.parameters():
            parameter.zero_()
    assert_close(twin(x), before, "copy after the original was cleared")
    assert routed(x).abs().max() == 0, "the original must not read the copy"
    modules = set(routed.modules())
    for module in twin.modules():
        unit = getattr(module, "routing_unit", None)
        assert unit is None or modules.isdisjoint(unit.chain)
    assert_nothing_left(twin)


def test_pickle_and_state_dict_round_trips(routed: SmallNet, tmp_path: Path) -> None:
    x = images()
    before = routed(x)
    assert_close(pickle.loads(pickle.dumps(routed))(x), before, "pickle")
    buffer = io.BytesIO()
    torch.save(routed.state_dict(), buffer)
    buffer.seek(0)
    fresh = copy.deepcopy(routed)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert_close(fresh(x), before, "state dict")


def test_hooks_of_others_replace_none_of_a_network_that_another_process_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch numbers hooks anew in every process."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    convert(net, EXPERTS, blocks="*", routing="single")
    x = images().float()
    expected = net(x)
    pickled = pickle.dumps(net)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    loaded = pickle.loads(pickled)
    for layer in loaded:
        handles = [layer.register_forward_pre_hook(lambda *_: None), layer.register_forward_hook(lambda *_: None)]
        assert torch.equal(loaded(x), expected)
        for handle in handles:
            handle.remove()
    assert torch.equal(loaded(x), expected)
    assert all(layer.routing is None for layer in loaded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("routing", ["fc", "softmax", "hidden_small"])
def test_gradient_checkpointing_gives_the_same_gradients(routing: str, reentrant: bool) -> None:
    net = network(routing)
    x = images().requires_grad_()
    expected = gradients(net, x)
    net.reentrant = reentrant
    assert_same_gradients(gradients(net, x), expected)
    assert_nothing_left(net)


@pytest.mark.parametrize("routing", ["single", "hierarchical"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_routing_across_checkpointed_segments_is_refused_not_wrong(routing: str, reentrant: bool) -> None:
    net = network(routing)
    net.reentrant = reentrant
    with pytest.raises(RuntimeError, match=r"routing weights (of the previous block did not|were computed without)"):
        net(images().requires_grad_()).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_routing_within_checkpointed_segments_is_right(reentrant: bool) -> None:
    net = network("partially_shared")  # a pair of blocks is a stage, which is a segment
    x = images().requires_grad_()
    expected = gradients(net, x)
    net.reentrant = reentrant
    assert_same_gradients(gradients(net, x), expected)


class CheckpointedInside(nn.Sequential):
    """What timm's stages do: they are one unit where patterns match stages, and checkpoint their blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


@pytest.mark.parametrize(("blocks", "layers"), [("0", "all"), ("0", "1"), ("0.*", "all")])
def test_checkpointing_inside_a_block_is_refused_not_wrong(blocks: str, layers: str) -> None:
    """A container's router lies in its first converted layer, which must not let it pool its own input."""
    net = nn.Sequential(CheckpointedInside(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    convert(net, 2, blocks=blocks, layers=layers)
    y = net(torch.randn(2, 4, 9, 9, requires_grad=True))
    if blocks == "0":
        with pytest.raises(RuntimeError, match=r"the block '0'.*Gradient checkpointing inside a block"):
            y.sum().backward()
    else:
        y.sum().backward()


@pytest.mark.parametrize(
    ("routing", "backend"),
    [("single", "eager"), ("hierarchical", "eager"), pytest.param("fc", "aot_eager", marks=pytest.mark.slow)],
)
def test_compiles_once_for_all_batch_sizes(routing: str, backend: str) -> None:
    net = SmallNet()
    convert(net, EXPERTS, blocks="blocks.1.*", exclude="se", classifier="classifier", routing=routing)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for count in (2, 3, 5):
        x = images(count).float()
        y = compiled(x)
        assert_close(y, net(x), f"batch {count}")
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"recompiled: {compilations}"
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert_nothing_left(net)


STRICT = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="strict export refuses attributes that are set and taken away before torch 2.10",
)


@pytest.mark.parametrize(
    ("routing", "strict"),
    [("fc", False), ("single", False), ("hierarchical", False), pytest.param("fc", True, marks=STRICT)],
)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # attributes set and taken away
def test_exports_with_a_dynamic_batch(routing: str, strict: bool) -> None:
    net = network(routing).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (images(2),), dynamic_shapes=({0: batch},), strict=strict).module()
    for count in (1, 2, 5):
        x = images(count)
        assert_close(exported(x), net(x), f"batch {count}")
    assert_nothing_left(net)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    net = network()
    x = images(4)
    expected = gradients(net, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        actual = gradients(wrapped, x)
    finally:
        torch.distributed.destroy_process_group()
    assert_same_gradients({name.removeprefix("module."): g for name, g in actual.items()}, expected)


class Broken(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def test_an_exception_leaves_no_routing_weights_behind(routed: SmallNet) -> None:
    block = routed.blocks[1][0]
    x = images()
    before = routed(x)
    se, block.se = block.se, Broken(ArithmeticError)
    with pytest.raises(ArithmeticError):
        routed(x)
    assert block.conv_pw.routing is None
    copy.deepcopy(routed), pickle.dumps(routed)  # routing weights left for the next block would not be copied
    block.se = se
    assert_close(routed(x), before, "after the exception")


def test_copies_are_made_after_an_interrupt(routed: SmallNet) -> None:
    """Torch runs no hook then, not even those that run after an exception."""
    block = routed.blocks[1][0]
    x = images()
    before = routed(x)
    se, block.se = block.se, Broken(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        routed(x)
    block.se = se
    assert_nothing_left(copy.deepcopy(routed))
    assert_close(pickle.loads(pickle.dumps(routed))(x), before, "a copy")
    assert_close(routed(x), before, "after the interrupt")
    assert_nothing_left(routed)


def test_a_thread_that_broke_off_inside_a_block_leaves_it_to_others() -> None:
    net = network().eval()
    block, x = net.blocks[1][0], images()
    expected = net(x)
    se, block.se = block.se, Broken(KeyboardInterrupt)
    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(net, x).exception(60), KeyboardInterrupt)
        block.se = se
        with pytest.raises(RuntimeError, match="or was interrupted there"):  # it lives, and may be inside
            net(x)
    assert_close(net(x), expected, "after its end")
    assert_nothing_left(net)


@pytest.mark.parametrize("routing", ["single", "hierarchical"])
def test_copies_of_many_units(routing: str) -> None:
    """A reference from each unit to the next would recurse through all of them."""
    net = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(400)))
    convert(net, 2, blocks="*", routing=routing)
    x = torch.randn(1, 2, 3, 3)
    expected = net(x)
    for name, twin in (("deepcopy", copy.deepcopy(net)), ("pickle", pickle.loads(pickle.dumps(net)))):
        del net[0].routing_unit  # whoever reads the original fails
        assert_close(twin(x), expected, name)
        net = twin


def test_a_second_thread_inside_a_block_is_refused_and_the_first_stays_right() -> None:
    net = network().eval()
    block, entered, left = net.blocks[1][0], threading.Event(), threading.Event()
    first, second = images(), images()
    expected = net(first)

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not entered.is_set():
            entered.set()
            assert left.wait(60)

    handle = block.conv_dw.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(net, first)
        assert entered.wait(60)
        try:
            with pytest.raises(RuntimeError, match=r"blocks\.1\.0: another thread is inside.*copy\.deepcopy"):
                net(second)
        finally:
            left.set()
        assert_close(running.result(60), expected, "the first thread")
    handle.remove()
    assert_close(net(first), expected, "afterwards, in another thread")
    assert_nothing_left(net)


@pytest.mark.parametrize("routing", ["single", "hierarchical"])
def test_routing_weights_of_another_threads_block_are_refused(routing: str) -> None:
    """Both threads are between two blocks: the second one has replaced what the first one's next block waits for."""
    net = network(routing).eval()
    between, replaced = threading.Event(), threading.Event()

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if between.is_set():
            replaced.set()
            wait([running], 60)
        else:
            between.set()
            assert replaced.wait(60)

    net.blocks[0][1].register_forward_pre_hook(hold, prepend=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(net, images())
        assert between.wait(60)
        with pytest.raises(RuntimeError, match=r"did not arrive.*in one thread"):
            net(images())
    assert "previous block are those of another thread" in str(running.exception())
    assert_nothing_left(net)


def replica_of(net: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them for its threads, though on the same device."""
    replicas = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in replicas.items():
        replica._parameters = module._parameters
        replica._modules = {name: replicas[child] for name, child in module._modules.items()}
    return replicas[net]


def test_replicas_of_data_parallel_run_at_the_same_time() -> None:
    net = network().eval()
    both = threading.Barrier(2)
    batches = [images(), images()]
    expected = [net(x) for x in batches]

    def meet(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        both.wait(60)

    net.blocks[1][0].conv_dw.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(replica_of(net), x) for x in batches]
        for replica, y in zip(running, expected, strict=True):
            assert_close(replica.result(), y, "a replica")
    assert_nothing_left(net)


def test_layers_called_without_their_block_say_so() -> None:
    net = network()
    with pytest.raises(RuntimeError, match=r"of the block 'blocks\.0\.0'.*was not running"):
        net.blocks[0][0].conv_pw(torch.randn(1, 6, 4, 4, dtype=torch.float64))


def captured(net: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """Order of router calls, and the routing weights that every layer sees."""
    calls: list[str] = []
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
        if isinstance(module, CondConv2d | CondLinear):
            module.register_forward_pre_hook(lambda m, _, name=name: seen.__setitem__(name, m.routing))
    return calls, seen


UNITS = ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "classifier"]
LAYERS = {unit: f"{unit}.conv_dw" if unit != "classifier" else unit for unit in UNITS}


def test_single_shares_the_first_router_with_all() -> None:
    net = network("single")
    calls, seen = captured(net)
    net(images())
    assert calls == ["blocks.0.0.router"]
    assert all(torch.equal(seen[LAYERS[unit]], seen[LAYERS[UNITS[0]]]) for unit in UNITS)
    assert len([m for m in net.modules() if isinstance(m, Router)]) == 1


def test_partially_shared_has_a_router_for_every_other_block() -> None:
    net = network("partially_shared")
    calls, seen = captured(net)
    net(images())
    assert calls == ["blocks.0.0.router", "blocks.1.0.router", "classifier.router"]
    routing = [seen[LAYERS[unit]] for unit in UNITS]
    assert torch.equal(routing[0], routing[1]) and torch.equal(routing[2], routing[3])
    assert not torch.equal(routing[1], routing[2]) and not torch.equal(routing[3], routing[4])


def test_hierarchical_routers_read_the_previous_routing() -> None:
    net = network("hierarchical")
    calls, seen = captured(net)
    inputs = {}
    for unit in UNITS:
        module = net.get_submodule(unit)
        module.register_forward_pre_hook(lambda m, args, unit=unit: inputs.__setitem__(unit, args[0]))
    net(images())
    assert calls == [f"{unit}.router" for unit in UNITS]
    previous = None
    for unit in UNITS:
        x = inputs[unit].mean((2, 3)) if inputs[unit].ndim == 4 else inputs[unit]
        x = x if previous is None else torch.cat([x, previous], 1)
        router = net.get_submodule(unit).router
        previous = torch.sigmoid(x @ router.fc.weight.T + router.fc.bias)
        assert_close(seen[LAYERS[unit]], previous, unit)


def test_blocks_that_run_out_of_order_say_so() -> None:
    net = network("single")
    net.blocks[0], net.blocks[1] = nn.Identity(), net.blocks[0]
    net.conv_head = nn.Conv2d(7, 11, 1).double()
    with pytest.raises(RuntimeError, match="classifier: the routing weights of the previous block did not arrive"):
        net(images())


def test_dropouts_and_temperature_reach_the_routers() -> None:
    net = network("softmax", dropout=0.1, expert_dropout=0.2, temperature=3.0)
    routers = [m for m in net.modules() if isinstance(m, Router)]
    assert len(routers) == len(UNITS)
    for router in routers:
        assert (router.dropout, router.expert_dropout, float(router.temperature)) == (0.1, 0.2, 3.0)


def test_timms_checkpointing_of_a_whole_network() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("mobilenetv3_small_050", num_classes=4).double()
    convert(net, 2, blocks="blocks.[345].*", exclude="se", classifier="classifier")
    net.eval()  # BatchNorm would update its averages twice
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gradients(net, x)
    net.set_grad_checkpointing()
    assert_same_gradients(gradients(net, x), expected)
