"""The positive control: experts pay where the kernel should depend on the image, and by their routing."""

from __future__ import annotations

import pytest

from examples.when_routing_pays import CONTENDERS, accuracy, main


def test_routing_pays() -> None:
    """After a quarter of the epochs; measured with seed 1: static 22.6 %, frozen 36.4 %, experts 43.1 %."""
    static, frozen, experts = (accuracy(name, 1, 10) for name in ("static", "frozen", "experts"))
    assert experts > static + 10
    assert experts > frozen + 2


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--seeds", "1", "--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CONTENDERS)
    for name, line in zip(CONTENDERS, lines[1:], strict=True):
        assert line.startswith(name)
        assert line.endswith(f"mean {found[name][0]:.1f}")
