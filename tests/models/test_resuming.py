"""What ExactResume does when a training starts; that resumed runs equal undisturbed ones is test_survival.py's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from models.callbacks import ExactResume


def trainer(rank: int) -> Any:
    return SimpleNamespace(global_rank=rank, world_size=3)


def test_every_process_draws_its_own_and_the_first_what_one_alone_draws() -> None:
    torch.manual_seed(7)
    alone = torch.rand(4)
    drawn = []
    for rank in (0, 1, 2, 1):
        torch.manual_seed(7)
        ExactResume().on_train_start(trainer(rank), None)  # type: ignore[arg-type]
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], alone)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn[1], drawn[3])  # a function of the seed and the rank
