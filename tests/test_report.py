"""report.py as a user calls it: the page, its files, its messages; and the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console
from run_folders import write_run, write_sweep

import report as command
from reports.configs import command_text
from reports.runs import ReportError

NASTY = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>|`*_[x](javascript:1)"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files"


def make(*arguments: str) -> tuple[Path, str]:
    console = Console(file=io.StringIO(), width=200)
    page = command.report(list(arguments), console)
    return page, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root, experts=(0, 1, 8), seeds=(1, 2, 3))
    write_run(root, 4, 1, folder="nasty", name=NASTY, overrides={"model.timm_options": {NASTY: NASTY}})
    write_run(root, 8, 4, folder="bad", status="failed", error=NASTY)
    return root


class Elements(HTMLParser):
    """All tags with their attributes, and whether what was opened is closed."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_of_a_report(sweep: Path, tmp_path: Path) -> None:
    page, said = make(f"runs={sweep}", f"out={tmp_path}")
    assert "runs that count: 10, in 4 groups; left out: 1" in said
    assert page == tmp_path / "index.html"
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"index.html", "report.md", "runs.csv", "groups.csv", "figures/effects.svg", "figures/madds.svg"} <= written
    assert {"figures/curve-train-top1.svg", "figures/curve-val-top1.svg", "figures/seconds-per-epoch.svg"} <= written
    with (tmp_path / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["counts"] for line in lines].count("True") == 10
    assert {line["reason"] for line in lines if line["counts"] == "False"} == {f"failed: {NASTY}"}
    assert {line["seed"] for line in lines if line["group"] == "8 experts" or "8 experts" in line["group"]} == {
        "1",
        "2",
        "3",
    }


def test_the_page_holds_what_was_asked_for(sweep: Path, tmp_path: Path) -> None:
    page, _ = make(f"runs={sweep}", f"out={tmp_path}", "title=A <b>title</b>")
    text = page.read_text()
    assert "A &lt;b&gt;title&lt;/b&gt;" in text
    assert re.search(
        r"8 experts[^<]*: test/top1 [+−]\d\.\d\d points \(95 % interval [+−]\d\.\d\d to [+−]\d\.\d\d, n = 3\)", text
    )
    for word in ("not run", "recalled", "71.9", "0123456789ab", "hours of the runs that count", "train.py", "n − 1"):
        assert word in text, word


def test_nothing_is_loaded_and_nothing_is_injected(sweep: Path, tmp_path: Path) -> None:
    page, _ = make(f"runs={sweep}", f"out={tmp_path}")
    elements = Elements(page.read_text())
    assert [tag for tag, _ in elements.tags].count("script") == 1, "the page's own"
    assert not [tag for tag, _ in elements.tags if tag in ("img", "link", "iframe", "object")]
    attributes = [(key, value or "") for _, found in elements.tags for key, value in found.items()]
    assert [key for key, _ in attributes if key.startswith("on")] == []
    links = [value for key, value in attributes if key in ("href", "src")]
    assert links and all(link.startswith(("#", "./", "runs.csv")) for link in links)
    ids = {value for key, value in attributes if key == "id"}
    assert [link for link in links if link.startswith("#") and link[1:] not in ids] == []
    for svg in (tmp_path / "figures").glob("*.svg"):
        assert ElementTree.parse(svg).find("{http://www.w3.org/2000/svg}style") is not None, "it stands alone"
        assert "<script>" not in svg.read_text()
        assert "http" not in svg.read_text().replace("http://www.w3.org/2000/svg", "")


def test_figures_alone_name_their_groups(sweep: Path, tmp_path: Path) -> None:
    make(f"runs={sweep}", f"out={tmp_path}")
    root = ElementTree.parse(tmp_path / "figures" / "curve-val-top1.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {text.split(",")[0] for text in texts if text and "expert" in text} == {"1 expert", "4 experts", "8 experts"}
    bottom = max(float(element.get("y", 0)) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert bottom < float(root.get("viewBox", "").split()[3])


def test_links_lead_to_the_configs(sweep: Path, tmp_path: Path) -> None:
    page, _ = make(f"runs={sweep}", f"out={tmp_path / 'a b'}")
    links = re.findall(r'href="(\./[^"]+config\.yaml)"', page.read_text())
    assert len(links) == 10
    assert all((page.parent / link).is_file() for link in links)


def test_a_page_to_pass_on_has_no_path_of_this_machine(sweep: Path, tmp_path: Path) -> None:
    page, _ = make(f"runs={sweep}", f"out={tmp_path}", "links=false")
    for path in tmp_path.rglob("*.*"):
        text = path.read_text()
        assert str(sweep) not in text and str(tmp_path) not in text and "/usr/bin" not in text, path
    assert "python train.py condconv.experts=8 seed=2" in page.read_text()
    words = ["/a/b/train.py", "data.root=/c/d", "name='x'", "paths.run='/e/f'", "seed=1"]
    assert command_text(words, paths=False) == "python train.py 'data.root=…/d' seed=1"
    assert command_text(words[:2], paths=True) == "python /a/b/train.py data.root=/c/d"


def test_markdown_escapes_names(sweep: Path, tmp_path: Path) -> None:
    page, _ = make(f"runs={sweep}", f"out={tmp_path}")
    text = page.with_name("report.md").read_text()
    assert "<script" not in text and "<img" not in text and not re.search(r"[^\\]\]\(javascript", text)
    tables = [block for block in re.split(r"\n\n+", text) if block.startswith("|")]
    assert len(tables) >= 4
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(cells) == 1, table[:200]


def test_notes_are_shown_without_html(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("## Found\n\n<script>x</script> | [bad](javascript:x) **really**\n")
    page, _ = make(f"runs={sweep}", f"out={tmp_path}", f"notes={tmp_path / 'notes.md'}")
    text = page.read_text()
    assert "<h2>Found</h2>" in text and "<strong>really</strong>" in text
    assert "<script>x" not in text and 'href="javascript' not in text


def test_pictures_of_the_notes_are_part_of_the_page(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"not really a picture")
    (tmp_path / "notes.md").write_text("![seen](a%20b.png)\n")
    page, _ = make(f"runs={sweep}", f"out={tmp_path}", f"notes={tmp_path / 'notes.md'}")
    assert '<img src="data:image/png;base64,bm90IHJlYWxseSBhIHBpY3R1cmU=" alt="seen"' in page.read_text()
    (tmp_path / "notes.md").write_text("![gone](gone.png)\n")
    with pytest.raises(ReportError, match=r"The notes show gone\.png"):
        make(f"runs={sweep}", f"out={tmp_path}", f"notes={tmp_path / 'notes.md'}")


def test_nothing_but_failures_still_makes_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", error="no")
    page, said = make(f"runs={tmp_path}")
    assert "runs that count: 0, in 0 groups; left out: 1" in said
    assert "No run counts" in page.read_text() and "failed: no" in page.read_text()
    Elements(page.read_text())


def test_one_run_alone(tmp_path: Path) -> None:
    write_run(tmp_path, 8, 1)
    page, _ = make(f"runs={tmp_path}")
    assert "No static run with the same settings and seeds" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which runs?"),
        (["run=x"], "Did you mean runs="),
        (["outputs"], "Did you mean runs=outputs"),
        (["runs="], "needs a value"),
        (["runs=.", "out=a", "out=b"], "given twice"),
        (["runs=nowhere"], "no such folder"),
        (["runs=EMPTY"], "There are no runs below"),
        (["runs=SWEEP", "metric=top1"], "there are test/loss, test/top1"),
        (["runs=SWEEP", "baseline=experts"], "give settings"),
        (["runs=SWEEP", "baseline=experts=3"], "fits 0 groups"),
        (["runs=SWEEP", "baseline=model.width=0.25"], "fits 4 groups"),
        (["runs=SWEEP", "links=no"], "true or false"),
    ],
)
def test_mistakes(arguments: list[str], message: str, sweep: Path, tmp_path: Path) -> None:
    filled = [word.replace("SWEEP", str(sweep)).replace("EMPTY", str(tmp_path)) for word in arguments]
    with pytest.raises(ReportError, match=re.escape(message)):
        make(*filled)


def test_errors_as_a_command_without_torch(tmp_path: Path) -> None:
    code = "import sys, runpy; sys.argv = ['report.py', 'runs=' + sys.argv[1]]\n"
    code += "try: runpy.run_path('report.py', run_name='__main__')\n"
    code += "except SystemExit as done: print('exit', done.code)\n"
    code += "print(sorted({'torch', 'matplotlib', 'pytorch_lightning', 'hydra', 'wandb'} & set(sys.modules)))"
    root = Path(command.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert "exit 1" in done.stdout and "[]" in done.stdout, done.stdout + done.stderr
    assert done.stderr.startswith("error: There are no runs below")


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}", "--enable-logging=stderr", *flags]
    return subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_in_a_browser(sweep: Path, tmp_path: Path) -> None:
    """The script runs, no name does, nothing is wider than a telephone, and both colour schemes are drawn."""
    if subprocess.run([str(CHROMIUM), "--version"], capture_output=True).returncode:
        pytest.skip(f"{CHROMIUM} does not start")
    page, _ = make(f"runs={sweep}", f"out={tmp_path / 'report'}")
    frame = tmp_path / "frame.html"
    script = "onload=()=>{const d=document.querySelector('iframe').contentDocument;"
    script += "document.body.dataset.wide=d.documentElement.scrollWidth;document.body.dataset.title=d.title;"
    script += "const b=[...d.querySelectorAll('#results button.sort')].find(b=>b.textContent=='test/top1 (%)');"
    script += "b.click();b.click();"
    script += "document.body.dataset.first=d.querySelector('#results tbody th').textContent;"
    script += "d.querySelector('#effects .dot').dispatchEvent(new PointerEvent('pointermove',{bubbles:true}));"
    script += "document.body.dataset.tip=d.getElementById('tip').textContent;"
    script += "document.body.dataset.lit=d.querySelectorAll('svg.dim .on').length;"
    script += "document.body.dataset.charts=d.querySelectorAll('svg.chart').length}"
    frame.write_text(f"<body><iframe src='report/index.html' style='width:375px'></iframe><script>{script}</script>")
    done = browse(frame, tmp_path / "profile", "--dump-dom")
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', done.stdout.split("<iframe")[0]))
    assert told.get("wide") == "375", done.stderr[-2000:]
    assert told["title"].startswith("Runs of "), "a name was run as a script"
    assert int(told["charts"]) >= 8
    assert "test/top1" not in told["tip"] and re.search(r"experts?.*: [+−]\d\.\d\d", told["tip"]), (
        "no value where it points"
    )
    assert int(told["lit"]) > int(told["charts"]), "the group stands out in every chart"
    with (tmp_path / "report" / "groups.csv").open(newline="") as file:
        groups = list(csv.DictReader(file))
    highest = max(groups, key=lambda line: float(line["test/top1 (%) mean"]))
    assert told["first"] == highest["group"], "sorted twice: the highest mean stands first"
    assert not re.search(r"Uncaught|SyntaxError|Content Security Policy", done.stderr), done.stderr[-2000:]
    for scheme, dark in (("0", True), ("1", False)):
        picture = tmp_path / f"{scheme}.png"
        browse(
            page,
            tmp_path / "profile",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,900",
            f"--screenshot={picture}",
        )
        image = Image.open(picture).convert("L")
        corner = image.getpixel((3, 3))
        assert isinstance(corner, int) and (corner < 60) is dark
        assert len(image.getcolors(256) or []) > 40, "the page is nearly empty"
