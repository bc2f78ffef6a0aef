"""BatchNorm as the recipes want it: statistics over groups of a given number of examples.

The authors use TensorFlow's momentum 0.99, which is 0.01 in torch's convention (the weight of the *new* value), epsilon
1e-3, and statistics over groups of 128 examples, gathered from several TPU cores [seen]. One difference remains: their
running variance is the biased one, torch's has n / (n - 1).

Lightning's `sync_batchnorm=True` must not be used with timm networks: it replaces timm's BatchNormAct2d, which holds
the activation, by a layer without one.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import SyncBatchNormAct
from torch import Tensor, nn


def group_batchnorm(net: nn.Module, examples: int | Literal["all"], batch_size_per_device: int) -> None:
    """Make every BatchNorm2d of `net` compute its training statistics over groups of `examples` images, in place.

    Parameters, buffers and their names stay the same objects. Groups smaller than the batch of one device are parts of
    it; larger ones span consecutive ranks, so the default process group must exist, and all ranks must call this.
    `"all"` is one group of all processes. A network with groups across ranks cannot be deep-copied.

    Raises:
        ValueError: if devices and groups do not fit.
        RuntimeError: if the groups need several processes and there is only one.
    """
    if examples == "all":
        examples = batch_size_per_device * (dist.get_world_size() if dist.is_initialized() else 1)
    if examples < 1 or batch_size_per_device < 1:
        raise ValueError(f"BatchNorm groups need at least one example, got {examples} of {batch_size_per_device}.")
    if examples <= batch_size_per_device:
        if batch_size_per_device % examples:
            raise ValueError(
                f"BatchNorm groups of {examples} examples do not divide the {batch_size_per_device} of one device."
            )
        if examples < batch_size_per_device:
            for module in _batchnorms(net):
                module.__class__ = GhostBatchNorm2d
                module.group_size = examples
        return
    if examples % batch_size_per_device:
        raise ValueError(
            f"BatchNorm groups of {examples} examples are not a whole number of devices "
            f"with {batch_size_per_device} examples each."
        )
    group = _process_group(examples // batch_size_per_device)
    # timm's subclass of torch's SyncBatchNorm: it keeps the activation of a BatchNormAct2d.
    synced = SyncBatchNormAct if dist.get_backend(group) == "nccl" else SyncedBatchNorm2d
    for module in _batchnorms(net):
        module.__class__ = synced
        module.process_group = group


def _batchnorms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def _process_group(num_processes: int) -> dist.ProcessGroup:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size < num_processes:
        raise RuntimeError(
            f"These BatchNorm groups span {num_processes} processes, but the training has {world_size}: "
            "start more processes, or set a larger batch size per device or a smaller group."
        )
    if world_size % num_processes:
        raise ValueError(f"BatchNorm groups of {num_processes} processes do not divide {world_size} processes.")
    return dist.new_subgroups(num_processes)[0]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with statistics over parts of the batch; made by `group_batchnorm`, never constructed.

    The running statistics take one step per batch, with the mean over the parts. A last, smaller batch is split as
    evenly as possible into parts of at least `group_size` examples.
    """

    group_size: int

    def forward(self, x: Tensor) -> Tensor:
        num_parts = len(x) // self.group_size
        if not self.training or num_parts < 2:
            return _activate(self, super().forward(x))
        self.num_batches_tracked.add_(1)
        outputs, means, variances = [], [], []
        for part in x.tensor_split(num_parts):
            # Copies: every part must start from the same running statistics.
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            outputs.append(
                nn.functional.batch_norm(
                    part, mean, variance, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps
                )
            )
            means.append(mean)
            variances.append(variance)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return _activate(self, torch.cat(outputs))


class _GroupSum(torch.autograd.Function):
    """Sum over the processes of a group; the gradient of each process's part is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with statistics over a group of processes, on any device and backend; made by `group_batchnorm`.

    Slower than torch's SyncBatchNorm, which runs on GPUs only and is used there. Mean and variance take one exchange
    each: the authors' `E[x^2] - E[x]^2` needs one, but cancels in fp32.
    """

    process_group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _activate(self, super().forward(x))
        wide = x if x.dtype == torch.float64 else x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device, dtype=wide.dtype)
        total = _GroupSum.apply(torch.cat([wide.sum((0, 2, 3)), count]), self.process_group)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean[:, None, None]
        variance = _GroupSum.apply(centred.square().sum((0, 2, 3)), self.process_group) / count
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = centred * scale[:, None, None] + self.bias[:, None, None]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return _activate(self, y.to(x.dtype))


def _activate(module: nn.Module, y: Tensor) -> Tensor:
    """What timm's BatchNormAct2d does after normalising; nothing for a plain BatchNorm2d."""
    if hasattr(module, "act"):
        return module.act(module.drop(y))
    return y
