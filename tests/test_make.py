"""`make train` evaluates the checkpoint that the training named, and stops where something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from models.callbacks import print_results

ROOT = Path(__file__).resolve().parents[1]
# In the place of .venv's Python: says what the training says, and notes how it is called.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1" in train.py) cat "$SAID"; exit "$CODE" ;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make_train(tmp_path: Path, said: str, code: int = 0, *words: str) -> tuple[int, list[str], str]:
    """Exit code, the calls of Python, and stderr."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()  # newer than pyproject.toml
    (tmp_path / "said").write_text(said)
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}  # of `make test`
    environment |= {"CALLS": str(tmp_path / "calls"), "SAID": str(tmp_path / "said"), "CODE": str(code)}
    command = ["make", "train", f"VENV={tmp_path / 'venv'}", "ARGS=seed=2", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stderr


def test_the_checkpoint_that_was_named_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is; not what another training has just written into outputs/."""
    checkpoint = tmp_path / f"scratch {'long' * 30}" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    print_results("Results", {"test/top1": 0.5}, {"run": tmp_path, "last checkpoint": checkpoint, "metrics": tmp_path})
    code, calls, _ = make_train(tmp_path, capsys.readouterr().out)
    assert code == 0 and calls == ["train.py seed=2", f"eval.py ckpt='{checkpoint}'"]


# The second as make 3.81 runs recipes, which has no .SHELLFLAGS.
@pytest.mark.parametrize("words", [(), (".SHELLFLAGS=-c",)])
def test_nothing_is_evaluated_after_a_failure(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, calls, _ = make_train(tmp_path, f"  last checkpoint  {__file__}\n", 3, *words)
    assert code != 0 and calls == ["train.py seed=2"]


@pytest.mark.parametrize("said", ["", "  last checkpoint  /no/such/last.ckpt\n"])
def test_no_checkpoint_is_an_error(tmp_path: Path, said: str) -> None:
    code, calls, err = make_train(tmp_path, said)
    assert code != 0 and calls == ["train.py seed=2"] and "named no last checkpoint" in err


@pytest.mark.parametrize("arguments", ["-m seed=1,2", "--help", "model=resnet50 --cfg job"])
def test_help_and_sweeps_evaluate_nothing(tmp_path: Path, arguments: str) -> None:
    code, calls, err = make_train(tmp_path, "", 0, f"ARGS={arguments}")
    assert (code, err) == (0, "") and calls == [f"train.py {arguments}"]
    code, calls, _ = make_train(tmp_path / "failing", "", 3, f"ARGS={arguments}")
    assert code != 0 and calls == [f"train.py {arguments}"]
