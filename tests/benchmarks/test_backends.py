"""The benchmark of the backends times what is right, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks import backends
from condconv.ops.registry import BACKENDS

SMALL = ["--batch", "3", "--experts", "2", "--repeats", "1"]


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LAYERS", (backends.Layer("small 3x3", 6, 4, 3, 1, 8),))
    monkeypatch.setattr("sys.argv", ["backends", *SMALL])


def test_a_table_with_a_time_for_every_backend_that_can(one_layer: None, capsys: pytest.CaptureFixture[str]) -> None:
    backends.main()
    header, _, line = capsys.readouterr().out.strip().splitlines()[-3:]
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert float(cells[" mixture "]) > 0
    assert cells[" depthwise "].strip() == "refused"


def test_a_wrong_backend_is_not_timed(
    one_layer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = BACKENDS["mixture"]
    wrong = right._replace(forward=lambda *args: 1.01 * right.forward(*args))
    monkeypatch.setitem(BACKENDS, "mixture", wrong)
    with pytest.raises(SystemExit, match="mixture is wrong on small 3x3"):
        backends.main()
    assert "small 3x3" not in capsys.readouterr().out
