"""The loader benchmark: its tables, its gates, and a whole tiny run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loader
from benchmarks.loader import PLAIN, render
from benchmarks.photos import photo

ORIGIN = {"origin": 0, "data": "photos"}


def test_generated_photos_cost_what_photos_cost() -> None:
    data = photo(0)
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert 80_000 < len(data) < 140_000
    assert data == photo(0) != photo(1)


def test_the_tables() -> None:
    timing = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "rounds": 3}
    decoders = {"kind": "decoders", "times": {"slow 1": {**timing, "median_ms": 4.0}, "fast 2": timing}, **ORIGIN}
    decoders |= {"differences": {"slow 1": 0, "fast 2": 3}, "truncated": {"slow 1": "error", "fast 2": "half an image"}}
    alone = {"kind": "loaders", "workers": 0, "images_per_second": {PLAIN: 100.0, "folders, pillow": 140.0}, **ORIGIN}
    alone["cpu_ms"] = {PLAIN: 8.0, "folders, pillow": 4.0}
    two = {"kind": "loaders", "workers": 2, "images_per_second": {PLAIN: 150.0, "folders, pillow": 300.0}, **ORIGIN}
    text = render([decoders, alone, two])
    assert text.index("| fast 2 | 2.00 | 3 | half an image |") < text.index("| slow 1 | 4.00 | 0 | error |")
    assert "| folders, pillow | 140 | 1.40 | 4.00 | 2.00 |" in text
    assert "At least 1.5 times the plain loader per core: missed (1.40)." in text
    assert "| folders, pillow | 300 | 2.00 | 150 |" in text
    alone["images_per_second"]["folders, pillow"] = 150.0
    assert "met (1.50)" in render([alone])


def test_a_whole_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader.main(["--quick", "--output", str(tmp_path), "--workers", "0", "--seconds", "1"])
    assert "gates passed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "loader-cpu.json").read_text())["rows"]
    assert [row["id"] for row in rows] == ["decoders", "loaders-0"]
    assert all(row["data"].startswith("8 generated JPEGs") for row in rows)
    rates = rows[1]["images_per_second"]
    assert {PLAIN, "folders, pillow", "shards, pillow"} <= set(rates) and min(rates.values()) > 1
    assert "| pillow " in (tmp_path / "loader-cpu.md").read_text()


def test_a_wrong_crop_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = loader.create_transform
    monkeypatch.setattr(loader, "create_transform", lambda size, **given: theirs(size, **{**given, "crop_pct": 0.9}))
    with pytest.raises(RuntimeError, match=r"the evaluation crop decoded by .* is not timm's"):
        loader.main(["--quick", "--output", str(tmp_path), "--workers", "0"])


def test_too_few_photos_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(0))
    with pytest.raises(SystemExit, match="at least 8 JPEGs are needed, there are 1"):
        loader.main(["--quick", "--photos", str(tmp_path), "--output", str(tmp_path)])
