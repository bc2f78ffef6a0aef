"""The three networks of a row: static, ours, timm's; the same weights where they have the same layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import BYTES_PER_MB, peak_bytes
from benchmarks.peers import Peer, PeerMissing, timm_peer
from benchmarks.presets import Case
from condconv.ops.workspace import workspace
from condconv.routing import Router
from models import create_model

STATIC, OURS, TIMM = "static", "ours", "timm"
LEARNING_RATE = 1e-4
"""Small enough that random labels do no harm within some dozens of steps."""
ROUTER_GAIN = 4.0
"""Fresh routers answer 0.5 for everybody; examples must differ for the gates to see whose kernel is whose."""


class Trio:
    """Static network, ours and timm's, on one device in channels last.

    Args:
        backbone: one of `models.list_backbones()`.
        experts: of every CondConv layer.
        device: "cpu" or "cuda".
        peer: timm's network too.
    """

    def __init__(self, backbone: str, experts: int, device: str, peer: bool = True) -> None:
        self.key = (backbone, experts, device)
        self.networks: dict[str, nn.Module] = {}
        for name, count in ((STATIC, 0), (OURS, experts)):
            torch.manual_seed(0)
            self.networks[name] = create_model(backbone, experts=count)
        with torch.no_grad():
            for router in (module for module in self.networks[OURS].modules() if isinstance(module, Router)):
                for parameter in router.parameters():
                    parameter.mul_(ROUTER_GAIN)
        self.titles = {STATIC: "static", OURS: "ours"}
        self.missing: dict[str, str] = {}
        self.peer: Peer | None = None
        try:
            if peer:
                self.peer = timm_peer(backbone, self.networks[OURS], experts)
                self.networks[TIMM], self.titles[TIMM] = self.peer.network, self.peer.title
        except PeerMissing as error:
            self.missing[TIMM] = str(error)
        for network in self.networks.values():
            network.to(device).to(memory_format=torch.channels_last)
        self.optimizers = {
            name: torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
            for name, network in self.networks.items()
        }

        self._state = copy.deepcopy(self.networks[OURS].state_dict())

    def restore(self) -> None:
        """Give our network its first weights again: training on noise may have led it anywhere."""
        self.networks[OURS].load_state_dict(self._state)
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.networks)

    def workload(self, name: str, case: Case, images: Tensor, labels: Tensor) -> Callable[[], object]:
        """A training step or an inference of one network."""
        network, optimizer = self.networks[name], self.optimizers[name]

        def train() -> None:
            network.train()
            with autocast(case):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def infer() -> None:
            network.eval()
            with torch.inference_mode(), autocast(case):
                network(images)

        return train if case.training else infer

    def peak_mb(self, name: str, case: Case, step: Callable[[], object]) -> float:
        """Peak memory of a training step beyond parameters, gradients and optimiser state, in MB (10^6 bytes)."""
        network, optimizer = self.networks[name], self.optimizers[name]
        gradients: list[Tensor] = []

        def kept() -> list[Tensor]:
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            return [*gradients, *states]

        def remember(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            # Kept alive beyond zero_grad, so that the meter finds them by their addresses.
            gradients.extend(p.grad for p in network.parameters() if p.grad is not None)

        workspace.buffers.clear()  # kept between calls: made again in this step, it counts
        handle = optimizer.register_step_pre_hook(remember)
        try:
            return peak_bytes(step, kept, case.device) / BYTES_PER_MB
        finally:
            handle.remove()


def autocast(case: Case) -> torch.autocast:
    """Mixed precision as in training: half precision is autocast over float32 weights."""
    return torch.autocast(case.device, getattr(torch, case.dtype), enabled=case.dtype != "float32")
