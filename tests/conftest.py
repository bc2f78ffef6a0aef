"""What holds for every test: one thread per process, no network, fixed seeds, honest skips."""

from __future__ import annotations

import gc
import os
import random

# Before torch, wandb or a hub client is imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that cannot or should not run here are skipped with the reason in the report, never deselected.

    Tests marked `forks` come first: after torch.compile autograd refuses to run in a fork of the process.
    """
    items.sort(key=lambda item: "forks" not in item.keywords)
    skip_slow = pytest.mark.skip(reason="slow: runs with --slow (make test-slow)")
    skip_gpu = pytest.mark.skip(reason="gpu: no CUDA device on this machine")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


def pytest_collection_finish() -> None:
    """What all the imports left stays for good, so no collection needs to walk through it: half a second each.

    Every training makes at least one, and in forked processes collections would copy the pages they visit.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_state() -> None:
    """Same seeds and one thread for every test, whatever ran before it in the same process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
