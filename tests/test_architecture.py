"""The rooms of docs/architecture.md, kept by the import statements themselves: parsed, never executed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("condconv", "models", "data", "configs", "reports", "sweeps", "hydra_plugins")
ENTRY_POINTS = ("train.py", "eval.py", "export.py", "predict.py", "report.py")

# What each room may import of this repository; whatever is missing here is forbidden.
ALLOWED_ROOMS = {
    "condconv": {"condconv"},
    "models": {"condconv", "models"},
    "data": {"data"},
    "configs": {"condconv", "configs"},
    "reports": {"condconv", "reports"},
    "sweeps": {"condconv", "models", "data", "configs", "sweeps"},
    "hydra_plugins": {"sweeps"},
    "train.py": {"condconv", "models", "data", "configs"},
    "eval.py": {"condconv", "models", "data", "configs", "reports", "train"},
    "export.py": {"condconv", "models", "data", "configs"},
    "predict.py": {"condconv", "models", "data", "configs", "export"},
    "report.py": {"reports"},
}
FIRST_PARTY = {*ROOMS, "train", "eval", "export", "predict", "report", "tests", "benchmarks", "docs"}
# Names that importing and distributing spell differently.
DISTRIBUTION = {
    "hydra": "hydra-core",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "markdown_it": "markdown-it-py",
    "triton": "torch",
}


class Import(NamedTuple):
    """One imported top-level name, with where it stands and whether importing the file executes it."""

    file: Path
    line: int
    name: str
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def python_files(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_below(node: ast.AST, file: Path, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        executed = at_module_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, a.name.split(".")[0], at_module_level) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            # A relative import stays in its own room: its top-level name is the room's.
            name = file.relative_to(ROOT).parts[0] if child.level else (child.module or "").split(".")[0]
            yield Import(file, child.lineno, name, at_module_level)
        yield from imports_below(child, file, executed and not is_type_checking(child))


def imports_of(room: str) -> list[Import]:
    files = python_files(room)
    return [i for file in files for i in imports_below(ast.parse(file.read_text(), str(file)), file, True)]


def table(*keys: str) -> list[str]:
    """A list in pyproject.toml, without a TOML parser: Python 3.10 has none."""
    text = (ROOT / "pyproject.toml").read_text()
    section, key = keys
    body = text.split(f"[{section}]\n", 1)[1].split("\n[", 1)[0]
    found = re.search(rf"^{re.escape(key)} = (\[.*?\])$", body, re.MULTILINE | re.DOTALL)
    assert found, f"pyproject.toml has no list {key!r} in [{section}]"
    return list(ast.literal_eval(found.group(1)))


@pytest.mark.parametrize("room", [*ROOMS, *ENTRY_POINTS])
def test_import_directions(room: str) -> None:
    forbidden = FIRST_PARTY - ALLOWED_ROOMS[room]
    found = [str(i) for i in imports_of(room) if i.name in forbidden]
    assert not found, f"{room} may import of this repository only {sorted(ALLOWED_ROOMS[room])}: {found}"


def test_the_library_imports_torch_and_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "condconv"}
    assert imports_of("condconv"), "condconv/ is empty or not where it is expected"
    found = [str(i) for i in imports_of("condconv") if i.name not in allowed]
    assert not found, f"condconv/ depends on torch alone: {found}"


def test_triton_is_imported_lazily() -> None:
    kernels = ROOT / "condconv" / "ops" / "triton"
    found = [str(i) for i in imports_of("condconv") if i.name == "triton" and i.at_module_level]
    outside = [text for text in found if not text.startswith(str(kernels.relative_to(ROOT)))]
    assert not outside, f"import triton inside a function, or in condconv/ops/triton/: {outside}"


def test_importing_the_library_loads_torch_alone() -> None:
    """The laziness above, observed: a fresh interpreter that imports condconv has none of these modules."""
    heavy = ("hydra", "omegaconf", "pytorch_lightning", "timm", "torchvision", "wandb", "triton.language", "sklearn")
    code = "import sys, torch; before = set(sys.modules); import condconv; new = set(sys.modules) - before; "
    code += f"print(sorted(m for m in new if m.startswith({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import condconv also loads {done.stdout}"


def test_every_import_is_declared() -> None:
    """`pip install .[train,export,fast]` brings all that models, data and the entry points import."""
    groups = [table("project", "dependencies")]
    groups += [table("project.optional-dependencies", extra) for extra in ("train", "export", "fast")]
    declared = {re.split(r"[<>=!~\[ ]", requirement)[0] for group in groups for requirement in group}
    known = set(sys.stdlib_module_names) | FIRST_PARTY
    missing = [
        str(i)
        for room in (*ROOMS[1:], *ENTRY_POINTS)
        for i in imports_of(room)
        if i.name not in known and DISTRIBUTION.get(i.name, i.name.replace("_", "-")) not in declared
    ]
    assert not missing, f"not among the dependencies in pyproject.toml: {missing}"


def test_dependencies_are_ranges() -> None:
    extras = [table("project.optional-dependencies", extra) for extra in ("train", "export", "fast", "dev")]
    requirements = [r for group in [table("project", "dependencies"), *extras] for r in group]
    assert [r for r in requirements if "==" in r or ">=" not in r] == []


def test_lower_bounds_have_what_is_used() -> None:
    """Read in the packages' sources: the first versions that take what stands behind them."""
    first = {
        "hatchling": (1, 26),  # license-files as a list
        "pytorch-lightning": (2, 6),  # Trainer.fit(weights_only=)
        "wandb-workspaces": (0, 3),  # LinePlot(metric_regex=)
    }
    given = [*table("build-system", "requires"), *table("project.optional-dependencies", "train")]
    bounds = {name: tuple(map(int, version.split("."))) for name, version in (each.split(">=") for each in given)}
    assert [name for name, version in first.items() if bounds[name] < version] == []


def test_the_wheel_holds_the_library_alone() -> None:
    assert table("tool.hatch.build.targets.wheel", "packages") == ["condconv"]
    assert (ROOT / "condconv" / "py.typed").is_file(), "without py.typed nobody's type checker sees our types"
    assert [r for r in table("project", "dependencies") if not r.startswith("torch")] == []


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_stay_short(name: str) -> None:
    lines = len((ROOT / name).read_text().splitlines())
    assert lines < 100, f"{name} has {lines} lines: its parts belong into models/ or data/"


def test_no_room_for_odds_and_ends() -> None:
    found = [
        str(path.relative_to(ROOT))
        for room in (*ROOMS, "tests", "benchmarks", "docs")
        for path in (ROOT / room).rglob("*")
        if path.stem in {"util", "utils", "helpers", "misc", "common"}
    ]
    assert not found, f"a helper lives with its owner: {found}"


def test_gitignore_does_not_swallow_packages() -> None:
    """A popular template ignores `data/` and `models/`, and silently loses the packages of that name."""
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert line.strip().strip("/*") not in {*ROOMS, "tests", "docs", "benchmarks"}, line


def test_the_reader_of_imports_sees_every_form() -> None:
    """The tests above are only as good as this reader: relative, nested, conditional and type-only imports."""
    source = """
import os.path as p
from . import sibling
if True:
    import triton
if TYPE_CHECKING:
    from timm import models
class A:
    import wandb
def f():
    from hydra.core import x
"""
    found = list(imports_below(ast.parse(source), ROOT / "condconv" / "x.py", True))
    assert [(i.name, i.at_module_level) for i in found] == [
        ("os", True),
        ("condconv", True),
        ("triton", True),
        ("timm", False),
        ("wandb", True),
        ("hydra", False),
    ]
