"""Reports: where rows come from, and that an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Report, Row

Cases = list[tuple[str, Callable[[], Row]]]


def render(rows: list[Row]) -> str:
    return "\n".join(row["id"] + report.origin_mark(rows, row) for row in rows)


def counting(calls: list[str], *names: str) -> Cases:
    def case(name: str) -> Callable[[], Row]:
        def measure() -> Row:
            calls.append(name)
            return {"value": len(calls)}

        return measure

    return [(name, case(name)) for name in names]


def run(folder: Path, cases: Cases, fresh: bool = False) -> Report:
    made = Report("tiny", "cpu", folder, render, fresh)
    made.run(cases, lambda row: row["id"])
    return made


def test_a_report_names_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tiny", "--quick"])
    run(tmp_path, counting([], "a"))
    text = (tmp_path / "tiny-cpu.md").read_text()
    facts = json.loads((tmp_path / "tiny-cpu.json").read_text())["origins"][0]
    assert "python -m benchmarks.tiny --quick" in text
    assert f"commit {facts['commit']}" in text
    assert all(word in text for word in ("torch ", "timm ", "threads"))
    assert str(report.ROOT) not in text + json.dumps(facts)


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    calls: list[str] = []

    def interrupted() -> Row:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [*counting(calls, "a"), ("b", interrupted), *counting(calls, "c")])
    finished = run(tmp_path, counting(calls, "a", "b", "c"))
    assert calls == ["a", "b", "c"], "what was there is not measured again"
    assert [row["id"] for row in finished.rows] == ["a", "b", "c"]
    assert finished.data["running"] == {}


def test_rows_of_other_facts_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    loads = iter([2.04, 5.0, 1.0])
    monkeypatch.setattr(report.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))

    def run_with(clock: str) -> None:
        made = Report("tiny", "cpu", tmp_path, render, facts={"clock": clock})
        made.run(counting(calls, "a", "b") if clock == "wall" else counting(calls, "a"), lambda row: row["id"])

    run_with("wall")
    run_with("wall")
    assert calls == ["a", "b"]
    text = (tmp_path / "tiny-cpu.md").read_text()
    assert "- clock: wall time" in text
    assert "- load of the machine, this run included: 2.0 to 5.0 processes" in text
    run_with("processor")
    assert calls == ["a", "b", "a"]


def test_fresh_measures_again(tmp_path: Path) -> None:
    calls: list[str] = []
    for fresh in (False, True):
        run(tmp_path, counting(calls, "a"), fresh=fresh)
    assert calls == ["a", "a"]


def test_rows_of_other_code_are_measured_again_or_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    run(tmp_path, counting(calls, "a", "b"))
    other = report.origin("cpu") | {"commit": "0123456789ab"}
    monkeypatch.setattr(report, "origin", lambda device: other)
    mixed = run(tmp_path, counting(calls, "a"))
    assert calls == ["a", "b", "a"]
    assert {row["id"]: row["origin"] for row in mixed.rows} == {"a": 1, "b": 0}
    text = mixed.markdown()
    assert all(word in text for word in ("a [1]", "b [0]", "0123456789ab"))
    assert len(run(tmp_path, counting(calls, "b")).data["origins"]) == 1, "an origin without rows is forgotten"


def test_a_row_that_killed_the_process_twice_is_given_up(tmp_path: Path) -> None:
    calls: list[str] = []
    killed = Report("tiny", "cpu", tmp_path, render)
    killed.data["running"] = {"b": report.MAX_DEATHS}
    killed.write()
    finished = run(tmp_path, counting(calls, "a", "b"))
    assert calls == ["a"]
    assert "died 2 times" in next(row for row in finished.rows if row["id"] == "b")["error"]
