"""train.py and eval.py as a user calls them, in this process: their real `main`, arguments, messages and exit codes."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

import eval as eval_module
import train as train_module
from configs.messages import run_as_command

# A network and a data set that train in seconds.
TINY = (
    "model=mobilenet_v1",
    "model.width=0.25",
    "condconv.experts=2",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.log_every_n_steps=1",
    "data.eval_batch_size_per_device=128",
    "logger=none",
)


class Outcome(NamedTuple):
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


class Commands:
    """Calls the commands; every run lands below `outputs`."""

    def __init__(self, outputs: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.outputs = outputs
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def train(self, *arguments: str) -> Outcome:
        # argparse takes overrides in one stretch, after the options; a test's own paths.outputs must come last to win.
        options = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        return self._call(train_module.main, "train", *options, f"paths.outputs={self.outputs}", *overrides)

    def eval(self, *arguments: str) -> Outcome:
        return self._call(eval_module.main, "eval", *arguments)

    def _call(self, main: object, name: str, *arguments: str) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        self.capsys.readouterr()
        code = 0
        try:
            run_as_command(main, name)
        except SystemExit as done:
            code = int(done.code or 0)
        return Outcome(code, *self.capsys.readouterr())
