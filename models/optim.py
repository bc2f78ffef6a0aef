"""Optimisers with parameter groups by role, so that each role can be decayed (or not) on its own.

Roles of a parameter, each parameter having exactly one:
    norm         scale and shift of a normalisation layer
    bias         every other bias, those of experts included, and any other vector or scalar
    router       weights of a `condconv.routing.Router`
    router_bias  biases of one: as `bias` in everything unless a setting names them
    expert       expert kernels of a CondConv layer, `[E, ...]`
    weight       all other weights
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.optim import SGDW, RMSpropTF
from torch import nn

from condconv.layers import CondConv2d, CondLinear
from condconv.routing import Router

ROLES = ("norm", "bias", "router", "router_bias", "expert", "weight")

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_roles(net: nn.Module) -> dict[str, str]:
    """Return the role of every parameter of `net`, frozen ones included, by its qualified name."""
    roles: dict[str, str] = {}
    for name, parameter, owner, in_router in _owned_parameters(net):
        if isinstance(owner, _NORMS):
            roles[name] = "norm"
        elif name.rpartition(".")[2] == "bias" or parameter.ndim < 2:
            roles[name] = "router_bias" if in_router else "bias"
        elif in_router:
            roles[name] = "router"
        elif isinstance(owner, (CondConv2d, CondLinear)):
            roles[name] = "expert"
        else:
            roles[name] = "weight"
    return roles


def _owned_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, bool]]:
    routers = [name for name, module in net.named_modules() if isinstance(module, Router)]
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        in_router = any(not router or name.startswith(router + ".") for router in routers)
        yield name, parameter, owner, in_router


def parameter_groups(
    net: nn.Module,
    decay: float,
    *,
    no_decay: Sequence[str] = ("norm", "bias"),
    decay_by_role: Mapping[str, float] | None = None,
    apart: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `net` into one named group per role.

    Args:
        decay: the decay coefficient of every role that is not named below.
        no_decay: roles with coefficient 0.
        decay_by_role: coefficients of single roles; they win over `decay` and `no_decay`.
        apart: roles that something else tells apart; `router_bias` has a group of its own if it is here or above.

    Returns:
        Groups `{"name": role, "params": [...], "weight_decay": coefficient}` in the order of `ROLES`, empty ones left
        out. Lightning's LearningRateMonitor logs groups by these names.

    Raises:
        ValueError: for an unknown role, a negative coefficient, or a network without trainable parameters.
    """
    overrides = dict(decay_by_role or {})
    unknown = sorted({*no_decay, *overrides} - set(ROLES))
    if unknown:
        raise ValueError(f"Unknown parameter role(s) {', '.join(unknown)}; roles are {', '.join(ROLES)}.")
    coefficients = {role: 0.0 if role in no_decay else decay for role in ROLES} | overrides
    named = {*no_decay, *overrides}
    if "router_bias" not in named:
        coefficients["router_bias"] = coefficients["bias"]
    negative = {role: value for role, value in coefficients.items() if value < 0}
    if negative:
        raise ValueError(f"Weight decay must be at least 0, got {negative}.")
    roles = parameter_roles(net)
    if "router_bias" not in named.union(apart):
        roles = {name: "bias" if role == "router_bias" else role for name, role in roles.items()}
    groups = []
    for role in ROLES:
        params = [p for name, p in net.named_parameters() if roles[name] == role and p.requires_grad]
        if params:
            groups.append({"name": role, "params": params, "weight_decay": coefficients[role]})
    if not groups:
        raise ValueError("The network has no trainable parameter: nothing to optimise.")
    return groups


def build_optimizer(
    net: nn.Module,
    *,
    name: str = "sgd",
    lr: float,
    weight_decay: float = 0.0,
    l2: float = 0.0,
    no_decay: Sequence[str] = ("norm", "bias"),
    decay_by_role: Mapping[str, float] | None = None,
    lr_factor_by_role: Mapping[str, float] | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    alpha: float = 0.9,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Build an optimiser over parameter groups by role (`parameter_groups`).

    Decay comes in two forms, of which one may be used at a time: `l2` adds `l2 * parameter` to the gradient, which is
    the gradient of `l2 / 2 * ||parameter||^2` in the loss (after any gradient clipping); `weight_decay` is decoupled
    and multiplies the parameter by `1 - lr * weight_decay`.

    Args:
        name: one of `OPTIMIZERS`.
            "sgd": torch SGD with `l2`, timm SGDW with `weight_decay`; uses `momentum`, `nesterov`.
            "adam": Adam with `l2`; "adamw": Adam with `weight_decay`. Use `betas` and `eps` (default 1e-8).
            "rmsprop_tf": timm's RMSpropTF, TensorFlow's form of RMSProp: epsilon inside the square root, squared
            average starting at 1, learning rate inside the momentum buffer. Uses `alpha` (TensorFlow's `decay`),
            `momentum`, `eps` (default 1e-3). The authors: alpha 0.9, momentum 0.9, epsilon 1e-3 [seen].
        lr: learning rate of every group, already scaled by the global batch (the configs do that, in writing).
        no_decay: roles that are not decayed. The authors' L2 spares only BatchNorm (`no_decay=["norm"]`): biases,
            experts and routers are in it [seen].
        decay_by_role: decay coefficients of single roles, in the form (`l2` or `weight_decay`) that is in use.
        lr_factor_by_role: factors on `lr` of single roles. A router adds up many positive features, so that one step of
            Adam at a rate that suits kernels can saturate it: {"router": 0.1} is our choice for small data. Its biases
            keep their rate; {"router": 0, "router_bias": 0} stops all of it.

    Raises:
        ValueError: for an unknown name, both forms of decay at once, or a form that the optimiser does not have.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Unknown optimiser {name!r}; choose one of {', '.join(OPTIMIZERS)}.")
    if l2 and weight_decay:
        raise ValueError(f"Set l2 (coupled) or weight_decay (decoupled), not both; got {l2} and {weight_decay}.")
    if name == "adam" and weight_decay:
        raise ValueError("Optimiser 'adam' takes l2 (coupled decay); for decoupled weight_decay use 'adamw'.")
    if name == "adamw" and l2:
        raise ValueError("Optimiser 'adamw' takes weight_decay (decoupled); for l2 (coupled decay) use 'adam'.")
    if lr < 0:
        raise ValueError(f"The learning rate must be at least 0, got {lr}.")
    factors = lr_factor_by_role or {}
    groups = parameter_groups(net, l2 or weight_decay, no_decay=no_decay, decay_by_role=decay_by_role, apart=factors)
    _scale_rates(groups, lr, factors)
    options = {
        "decoupled": bool(weight_decay),
        "momentum": momentum,
        "nesterov": nesterov,
        "betas": tuple(betas),
        "alpha": alpha,
        "eps": eps,
    }
    return _BUILDERS[name](groups, lr, options)


def keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser take over its state alone from a checkpoint: rates, decays and the like stay as it was built.

    torch restores both, and a resumed run would go on with the old values of what was changed in its config.
    """

    def with_own_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        if len(saved["param_groups"]) != len(optimizer.param_groups):
            return None  # of another network: torch says so
        # What a new optimiser does not have in its groups (a step count, in some) is state.
        groups = [
            {**before, **own, "params": before["params"]}
            for before, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
        ]
        return {**saved, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(with_own_settings)


Groups = list[dict[str, Any]]


def _scale_rates(groups: Groups, lr: float, factors: Mapping[str, float]) -> None:
    """Give the groups named in `factors` a learning rate of their own; schedules multiply each group's rate."""
    unknown = sorted(set(factors) - set(ROLES))
    if unknown or any(factor < 0 for factor in factors.values()):
        raise ValueError(f"lr_factor_by_role: at least 0, for roles among {', '.join(ROLES)}; got {dict(factors)}.")
    if "bias" in factors:
        factors = {"router_bias": factors["bias"], **factors}
    for group in groups:
        if group["name"] in factors:
            group["lr"] = lr * factors[group["name"]]


def _sgd(groups: Groups, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    cls = SGDW if options["decoupled"] else torch.optim.SGD
    return cls(groups, lr=lr, momentum=options["momentum"], nesterov=options["nesterov"])


def _adam(groups: Groups, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=lr, betas=options["betas"], eps=_default(options["eps"], 1e-8))


def _adamw(groups: Groups, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=options["betas"], eps=_default(options["eps"], 1e-8))


def _rmsprop_tf(groups: Groups, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    return RMSpropTF(
        groups,
        lr=lr,
        alpha=options["alpha"],
        eps=_default(options["eps"], 1e-3),
        momentum=options["momentum"],
        decoupled_decay=options["decoupled"],
        lr_in_momentum=True,
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


_BUILDERS: dict[str, Callable[[Groups, float, dict[str, Any]], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop_tf": _rmsprop_tf,
}

OPTIMIZERS = tuple(_BUILDERS)
