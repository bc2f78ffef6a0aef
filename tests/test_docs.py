"""What README.md and docs/ say is true: the table is computed, the code runs, the commands compose, the links exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir

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
    targets = re.findall(r"\]\(([^)#]+?)\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to {missing}"


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
