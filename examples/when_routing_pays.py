"""A task made for routing: the tint of an image says what its digit means. 8 experts against static networks.

A positive control for experiments in which experts gain little: it tells "this data asks for no routing" from "routing
does not work". scikit-learn's handwritten digits, each drawn in one of 8 tints; the class is the digit moved on by a
number of places that belongs to the tint. Four networks of two convolutions and a classifier, minutes on a CPU:

    python -m examples.when_routing_pays [--seeds 1 2 3] [--epochs 40]
    python -m examples.when_routing_pays --tune       how `RATES` were chosen: on held-out training digits

    static    the twin; and a wider one with as many parameters as the network with experts, for 4.4 times its MADDs
    experts   8 in the second convolution and the classifier, one router for each
    frozen    the same experts under routers that are zero and stay zero: one mixture for all images

What came out: docs/experiments.md, "Does routing work where it is needed?".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from condconv import Router, complexity, convert

TINTS = torch.tensor([[(tint >> bit) & 1 for bit in range(3)] for tint in range(8)]).float() * 0.6 + 0.2
"""`[8, 3]`, the corners of a cube of colours."""
SHIFTS = torch.tensor([0, 3, 7, 1, 9, 4, 6, 2])
"""By how many places each tint moves the digit on."""
EXPERTS, WIDTH, WIDE = 8, 16, 45
RATES = {"static": 48e-3, "static, wide": 96e-3, "experts": 24e-3, "frozen": 24e-3}
"""Learning rates, the best of `CANDIDATES`: AdamW moves the mixture of 8 experts 4 times as fast as a static kernel."""
CANDIDATES = (3e-3, 6e-3, 12e-3, 24e-3, 48e-3, 96e-3)
TUNING_SEED = 11
CONTENDERS = tuple(RATES)


def digits(held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps `[N, 8, 8]` on 0..1 and digits to train on, and as much again to test on.

    Every fifth is a test digit. With `held_out` those are put aside, and every fourth of the others is held out.
    """
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    place = torch.arange(len(images)) % 5
    trained, tested = (place > 1, place == 1) if held_out else (place > 0, place == 0)
    return images[trained], labels[trained], images[tested], labels[tested]


def tinted(images_NHW: Tensor, labels_N: Tensor, tint_N: Tensor) -> tuple[Tensor, Tensor]:
    """Digits as a dark drawing on a ground of their tint, `[N, 3, H, W]`, and their classes."""
    ground = TINTS[tint_N][:, :, None, None]
    return ground * (1 - images_NHW[:, None]), (labels_N + SHIFTS[tint_N]) % 10


def network(contender: str) -> nn.Module:
    """One of `CONTENDERS`."""
    width = WIDE if contender == "static, wide" else WIDTH
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip
    if contender.startswith("static"):
        return net
    convert(net, num_experts=EXPERTS, blocks="4", classifier="9", router_gain=1.0)
    if contender == "frozen":
        for router in (module for module in net.modules() if isinstance(module, Router)):
            for parameter in router.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
    return net


def accuracy(contender: str, seed: int, epochs: int, rate: float | None = None, held_out: bool = False) -> float:
    """Accuracy in percent, over all test or held-out digits in all tints, after training from scratch."""
    torch.manual_seed(seed)
    rate = rate or RATES[contender]
    train_images, train_labels, test_images, test_labels = digits(held_out)
    net = network(contender).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate)
    steps = epochs * (len(train_images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train_images), (64,))
        x, y = tinted(train_images[chosen], train_labels[chosen], torch.randint(8, (64,)))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.eval()
    right = 0
    with torch.inference_mode():
        for tint in range(8):
            x, y = tinted(test_images, test_labels, torch.full((len(test_images),), tint))
            right += int((net(x).argmax(1) == y).sum())
    return 100 * right / (8 * len(test_images))


def tune(epochs: int) -> None:
    """Print the accuracies of all candidates on held-out digits."""
    print(
        f"{'rate':<14}" + "".join(f"{rate:>8g}" for rate in CANDIDATES) + f"   held-out accuracy, %, seed {TUNING_SEED}"
    )
    for contender in CONTENDERS:
        print(f"{contender:<14}", end="", flush=True)
        for rate in CANDIDATES:
            print(f"{accuracy(contender, TUNING_SEED, epochs, rate, held_out=True):8.1f}", end="", flush=True)
        print()


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Print a table of the contenders; returns their accuracies by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--tune", action="store_true", help="try learning rates on held-out training digits instead")
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: at least 1")
    if args.tune:
        tune(args.epochs)
        return {}
    print(f"{'network':<14}{'parameters':>12}{'MADDs':>10}   test accuracy, %, seeds {' '.join(map(str, args.seeds))}")
    found: dict[str, list[float]] = {}
    for contender in CONTENDERS:
        total = complexity(network(contender), (3, 8, 8))
        print(f"{contender:<14}{total.params:>12,}{total.madds:>10,}   ", end="", flush=True)
        found[contender] = []
        for seed in args.seeds:
            found[contender].append(accuracy(contender, seed, args.epochs))
            print(f"{found[contender][-1]:6.1f}", end="", flush=True)
        print(f"   mean {statistics.fmean(found[contender]):.1f}")
    return found


if __name__ == "__main__":
    main()
