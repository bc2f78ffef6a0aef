"""What README.md and docs/ say is true: the table is computed, the code runs, the commands compose, the links exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from torch import Tensor

from condconv import convert
from condconv.ops.registry import BACKENDS
from condconv.ops.spec import Problem
from condconv.upcycle import Upcycle
from models.backbones import create_model
from reports.options import parse as parse_report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(language: str, page: Path = ROOT / "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(*programs: str) -> list[str]:
    """Every call of these programs in the blocks of all pages, once: "train.py seed=1", without what explains it."""
    text = "".join(block for page in PAGES for block in code_blocks("", page)).replace("\\\n", "")
    calls = re.findall(rf"^(?:python|torchrun .*?) ((?:{'|'.join(programs)})\.py .*)$", text, re.MULTILINE)
    return list(dict.fromkeys(re.split(r"\s+#", call)[0].strip() for call in calls))


def test_the_table_of_backbones_is_what_the_code_computes() -> None:
    backbone_table = load("docs/backbone_table.py")
    assert backbone_table.in_readme()[1] == backbone_table.table(), "README.md's table is out of date: run make docs"


def test_the_example_of_the_library_runs() -> None:
    blocks = code_blocks("python")
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 14, "it is called ten lines"
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})


def test_the_example_of_weights_calls_what_there_is() -> None:
    """It needs files, so it does not run: its names are those of the code, and its arguments are taken."""
    known = {"create_model": create_model, "convert": convert, "Upcycle": Upcycle}
    (block,) = code_blocks("python", ROOT / "docs" / "weights.md")
    compile(block, "weights.md", "exec")
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == set(known)
    for call in calls:
        arguments = {str(keyword.arg): keyword.value for keyword in call.keywords}
        inspect.signature(known[ast.unparse(call.func)]).bind(*call.args, **arguments)


def test_the_functions_of_a_new_backend_are_those_of_the_others() -> None:
    """As docs/adding-a-backend.md declares them, in names and order; the names of its annotations exist."""
    declared: dict[str, Any] = {"Problem": Problem, "Tensor": Tensor}
    (block,) = code_blocks("python", ROOT / "docs" / "adding-a-backend.md")
    exec(compile(block, "adding-a-backend.md", "exec"), declared)
    # Those of Triton stand behind functions that import them at the first call, and take whatever these take.
    eager = [backend for backend in BACKENDS.values() if not backend.name.startswith("triton")]
    assert len(eager) >= 5
    for name in ("supports", "forward", "backward"):
        assert get_type_hints(declared[name])
        for backend in eager:
            expected, actual = (inspect.signature(f).parameters for f in (getattr(backend, name), declared[name]))
            assert list(actual) == list(expected), (backend.name, name)


@pytest.mark.parametrize("command", commands("train", "eval", "predict", "export"))
def test_commands_compose(command: str) -> None:
    """Names of groups and keys exist; values that name this user's folders are taken as they are."""
    program, *overrides = (word for word in shlex.split(command) if word != "-m")
    singles = [re.sub(r"=([^=,]+),.*", r"=\1", word) for word in overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(program.removesuffix(".py"), overrides=singles, return_hydra_config=True)
    for word in singles:
        key, value = word.split("=", 1)
        if "." in key:
            node = cfg
            for part in key.split("."):
                node = node[part]
            assert str(node).lower() == value.lower()  # True of true


@pytest.mark.parametrize("command", commands("report"))
def test_report_commands_have_known_options(command: str) -> None:
    assert parse_report(shlex.split(command)[1:])


def test_pages_have_commands_to_check() -> None:
    found = commands("train", "eval", "predict", "export", "report")
    for program, least in (("train", 20), ("eval", 3), ("predict", 2), ("export", 1), ("report", 4)):
        assert sum(call.startswith(program) for call in found) >= least, program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings that anchors name; pages of other sites are not asked."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)", page.read_text()) if not t.startswith("http")]
    missing = [target for target in targets if not leads_somewhere(page, target)]
    assert not missing, f"{page.name} links to {missing}"


def leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    goal = page.parent / name if name else page
    return goal.exists() and (not anchor or anchor in anchors(goal))


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page: small letters, no punctuation, "-" for a space, "-1" for the second."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        times = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{times}" if times else slug)
    return found


def test_links_to_nowhere_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: [its](x.md) `name`\n\n## Weights & more\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n"
    )
    assert anchors(page) == ["a-page-its-name", "weights--more", "twice", "twice-1"]
    (tmp_path / "other.md").touch()
    for target, leads in (
        ("other.md", True), ("page.md#twice-1", True), ("#twice", True), ("#thrice", False), ("none.md", False),
        ("none.md#twice", False), ("other.md#twice", False),
    ):  # fmt: skip
        assert leads_somewhere(page, target) == leads, target


def test_make_targets_named_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for page in PAGES for target in re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code_parts(page)))}
    assert {"train", "test"} <= named
    assert [t for t in named if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def code_parts(page: Path) -> list[str]:
    text = page.read_text()
    return re.findall(r"^```.*?^```|`[^`\n]+`", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_picture_can_be_drawn(tmp_path: Path) -> None:
    load("docs/figures/make_idea.py").main(tmp_path / "idea.png")
    assert (tmp_path / "idea.png").stat().st_size > 20_000
