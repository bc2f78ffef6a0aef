"""Exponential moving average of a network's weights, with the authors' ramp, beside the raw weights.

The authors (tensorflow/tpu, official/efficientnet/main.py and utils.py) [seen] average every trainable variable and
every BatchNorm moving mean and variance after each optimiser step, starting from the initial values:

    decay_n = min(decay, (1 + n) / (10 + n))          n = optimiser steps taken so far, 1 at the first update
    average = average - (1 - decay_n) * (average - value)

and evaluate the average. (TensorFlow reads `n` after the step has incremented it [derived from the graph's control
dependencies].) Here both raw and averaged weights can be evaluated, and a checkpoint holds both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

CHECKPOINT_KEY = "weight_average"


class WeightAverage:
    """The moving average of the parameters and persistent buffers of one network.

    A pure function of the weights it is shown: under data-parallel training every process keeps the same average of the
    parameters. Running statistics of BatchNorm that are not synchronised differ, and so do their averages, until an
    evaluation shares the first process's (`WeightAverageCallback`).
    Floating-point tensors are averaged in their own dtype, others (BatchNorm's step counter) copied.

    Args:
        net: the network; its present weights are the starting values.
        decay: the final decay, in [0, 1).
        ramp: whether the decay starts low, `min(decay, (1 + n) / (10 + n))`.

    Attributes:
        is_applied: whether the network holds the averaged weights at the moment, see `applied`.
    """

    def __init__(self, net: nn.Module, decay: float = 0.9999, ramp: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of the weight average must be in [0, 1), got {decay}.")
        self.decay = decay
        self.ramp = ramp
        self.num_updates = 0
        self.is_applied = False
        self._average = {name: value.detach().clone() for name, value in _named_weights(net)}

    def current_decay(self) -> float:
        """The decay of the update number `num_updates`."""
        if not self.ramp:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take in the weights of `net` after one more optimiser step."""
        self.num_updates += 1
        averages, values = [], []
        for name, value in _named_weights(net):
            average = self._average[name]
            if average.device != value.device:
                average = self._average[name] = average.to(value.device)
            if value.is_floating_point():
                averages.append(average)
                values.append(value.detach())
            else:
                average.copy_(value)
        get_ema_multi_avg_fn(self.current_decay())(averages, values, self.num_updates)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Within the context `net` holds the averaged weights, afterwards its own again, also after an exception.

        Storage is exchanged, not copied, so it costs almost nothing. Do not train or save `net` inside.
        """
        weights = list(_named_weights(net))
        for name, value in weights:
            self._exchange(name, value)
        self.is_applied = True
        try:
            yield
        finally:
            self.is_applied = False
            for name, value in reversed(weights):  # reversed: a weight with two names is exchanged twice
                self._exchange(name, value)

    def _exchange(self, name: str, value: Tensor) -> None:
        average = self._average[name].to(value.device)
        self._average[name] = value.data
        value.data = average

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only; `"state_dict"` loads into the network with `load_state_dict`."""
        return {"num_updates": self.num_updates, "decay": self.decay, "state_dict": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`; the decay stays that of the constructor.

        Raises:
            ValueError: if the names or shapes are not those of the network.
        """
        weights = state["state_dict"]
        different = sorted(weights.keys() ^ self._average.keys())
        different += [name for name in weights.keys() & self._average.keys() if _shapes_differ(weights, self, name)]
        if different:
            raise ValueError(
                f"The averaged weights are of another network: {len(different)} names or shapes differ, "
                f"the first is {different[0]!r}."
            )
        for name, average in self._average.items():
            average.copy_(weights[name])
        self.num_updates = int(state["num_updates"])

    def buffers(self, net: nn.Module) -> list[Tensor]:
        """Averages of the buffers of `net`, in a fixed order."""
        names = {name for name, _ in net.named_buffers()}
        return [average for name, average in self._average.items() if name in names]


def _shapes_differ(weights: Mapping[str, Tensor], average: WeightAverage, name: str) -> bool:
    return weights[name].shape != average._average[name].shape


def _named_weights(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `net.state_dict()`, the objects themselves, under the same names."""
    persistent = net.state_dict().keys()
    yield from net.named_parameters(remove_duplicate=False)
    yield from ((name, value) for name, value in net.named_buffers(remove_duplicate=False) if name in persistent)


def averaged_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint, by the network's own names.

    Raises:
        ValueError: if the run kept no average.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            "This checkpoint holds no averaged weights: the run was trained without the weight average callback. "
            "Evaluate its raw weights instead."
        )
    return dict(checkpoint[CHECKPOINT_KEY]["state_dict"])


class WeightAverageCallback(Callback):
    """Keeps a `WeightAverage` of `pl_module.net` during training and saves it in every checkpoint.

    The average is put where the module finds it, in the plain attribute `pl_module.weight_average` (before that None,
    if the module declares it so). The module evaluates a batch twice:

        self.evaluate(batch, "val")
        if self.weight_average is not None:
            with self.weight_average.applied(self.net):
                self.evaluate(batch, "val_ema")

    Lightning's own `EMAWeightAveraging` has no ramp, evaluates and stores as `state_dict` the average only, and
    overwrites the raw weights at the end of the training.

    A checkpoint keeps the raw weights under `state_dict` as always and the average under `CHECKPOINT_KEY`.
    """

    def __init__(self, decay: float = 0.9999, ramp: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of the weight average must be in [0, 1), got {decay}.")
        self.decay = decay
        self.ramp = ramp
        self.average: WeightAverage | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The network is on its device and holds the checkpoint's weights by now.
        self.average = WeightAverage(pl_module.net, self.decay, self.ramp)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None
        pl_module.weight_average = self.average

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: there the step count of a resumed run is not yet restored.
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation most batches end without an optimiser step.
        if self.average is not None and trainer.global_step != self._last_step:
            self.average.update(pl_module.net)
            self._last_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_buffers(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_buffers(trainer, pl_module)  # the last epoch may have gone without a validation

    def _share_buffers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Unsynchronised BatchNorm statistics differ between processes; all evaluate those of the process that saves.
        if self.average is not None and trainer.world_size > 1:
            for average in self.average.buffers(pl_module.net):
                torch.distributed.broadcast(average, src=0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            checkpoint[CHECKPOINT_KEY] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(CHECKPOINT_KEY)
        if self._loaded is None:
            rank_zero_warn("The checkpoint holds no averaged weights: the average starts from its raw weights.")
