"""OmegaConf resolvers of the YAML files.

- ``${calc:"0.016 * ${batch_size} / 256"}`` is arithmetic on numbers: + - * / //, brackets and min(a, b), nothing else.
- ``${first:a,b}`` is the first value that is not null.
- ``${gpu_count:}`` is the number of visible GPUs, at least 1, so that a config of a GPU machine composes anywhere.
- ``${run_stem:}``, ``${slurm_nodes:}`` and ``${slurm_processes_per_node:}``: see configs/launch.py.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf

from configs import launch

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def calc(expression: str | float) -> float:
    """Value of an arithmetic expression; ValueError for anything but numbers, + - * / //, brackets and min(a, b)."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "min" and len(node.args) > 1 and not node.keywords:
            return min(value(each) for each in node.args)
        raise ValueError(f"calc takes numbers, + - * / //, brackets and min(a, b), not {expression!r}")

    try:
        return value(ast.parse(str(expression), mode="eval"))
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"calc cannot compute {expression!r}: {error}") from error


def gpu_count() -> int:
    """Number of visible GPUs, 1 where there is none."""
    return max(1, torch.cuda.device_count())


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    functions = {
        "calc": calc,
        "first": first,
        "gpu_count": gpu_count,
        "run_stem": launch.run_stem,
        "slurm_nodes": launch.slurm_nodes,
        "slurm_processes_per_node": launch.slurm_processes_per_node,
    }
    for name, function in functions.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
