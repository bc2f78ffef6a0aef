"""Mixup and cutmix: the mixture itself, its targets, and draws that depend on the position alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.mixing import BatchMixer

CLASSES = 5


def one_image_per_value(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are constant at their own index, so that a mixture shows its shares."""
    return torch.arange(count).float()[:, None, None, None].expand(count, 3, 8, 8).clone(), torch.arange(
        count
    ) % CLASSES


@pytest.mark.parametrize(
    "options", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1}]
)
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [6, 7])
def test_targets_are_the_shares_of_the_images(options: dict[str, float], mode: str, count: int) -> None:
    mixer = BatchMixer(mode=mode, **options)
    images, labels = one_image_per_value(count)
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).float()
    changed = 0
    for position in range(12):
        mixed, targets = mixer(images, labels, CLASSES, (position,))
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        even = count - count % 2
        for i in range(even):
            j = even - 1 - i
            # The mean of the mixture says how much of image j is in it.
            share = (mixed[i].mean() - i) / (j - i)
            assert -1e-5 <= share <= 1 + 1e-5
            torch.testing.assert_close(targets[i], one_hot[i] * (1 - share) + one_hot[j] * share, atol=1e-5, rtol=0)
            changed += bool(share > 1e-3)
        if count % 2:
            assert torch.equal(mixed[-1], images[-1])
            torch.testing.assert_close(targets[-1], one_hot[-1])
    assert changed > 12
    assert torch.equal(images, one_image_per_value(count)[0])  # the batch itself is untouched


def test_draws_depend_on_seed_and_position_alone() -> None:
    images, labels = one_image_per_value(6)
    mixer = BatchMixer(mixup_alpha=0.4, cutmix_alpha=1.0, seed=3)
    first = mixer(images, labels, CLASSES, (2, 17, 0))[0]
    np.random.seed(11)
    before = np.random.get_state()[1].copy()
    for other in ((2, 17, 1), (2, 18, 0), (3, 17, 0)):
        assert not torch.equal(mixer(images, labels, CLASSES, other)[0], first), other
    assert not torch.equal(BatchMixer(mixup_alpha=0.4, seed=4)(images, labels, CLASSES, (2, 17, 0))[0], first)
    # A fresh object, as after a resume, at the same place in the training; numpy's global generator is left alone.
    again = BatchMixer(mixup_alpha=0.4, cutmix_alpha=1.0, seed=3)(images, labels, CLASSES, (2, 17, 0))[0]
    assert torch.equal(again, first)
    assert np.array_equal(np.random.get_state()[1], before)


def test_the_authors_mixup_keeps_the_larger_share() -> None:
    count, alpha = 64, 0.2
    images, labels = one_image_per_value(count)
    mixer = BatchMixer(mixup_alpha=alpha, mode="elem", keep_larger=True)
    mixed, targets = mixer(images, labels, CLASSES, (0,))
    np.random.seed([0, 0])
    weight = np.random.beta(alpha, alpha, size=count)
    weight = np.maximum(weight, 1 - weight)
    expected = images.numpy() * weight[:, None, None, None] + images.numpy()[::-1] * (1 - weight[:, None, None, None])
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-5, atol=1e-5)
    one_hot = np.eye(CLASSES)[labels.numpy()]
    np.testing.assert_allclose(
        targets.numpy(), one_hot * weight[:, None] + one_hot[::-1] * (1 - weight[:, None]), atol=1e-6
    )


def test_smoothing_in_the_loss_is_smoothing_before_mixing() -> None:
    """What TensorFlow and timm do: `(1 - s) * one_hot + s / num_classes` of both images, then the mixture."""
    images, labels = one_image_per_value(4)
    logits = torch.randn(4, CLASSES)
    _, targets = BatchMixer(mixup_alpha=1.0)(images, labels, CLASSES, (0,))
    np.random.seed([0, 0])
    np.random.rand()  # the draw whether to mix at all
    share = np.random.beta(1.0, 1.0)
    smooth = torch.nn.functional.one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES
    expected = -((smooth * share + smooth.flip(0) * (1 - share)) * logits.log_softmax(1)).sum(1).mean()
    actual = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(actual, expected.float())


def test_unmixed_batches_stay_as_they_are() -> None:
    images, labels = one_image_per_value(4)
    mixed, targets = BatchMixer(mixup_alpha=1.0, prob=0.0)(images, labels, CLASSES, (0,))
    assert torch.equal(mixed, images)
    assert torch.equal(targets.argmax(1), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "leave the mixer out"),
        ({"mixup_alpha": -1.0}, "leave the mixer out"),
        ({"mixup_alpha": 0.2, "prob": 2.0}, "prob and switch_prob"),
        ({"mixup_alpha": 0.2, "mode": "half"}, "Unknown mixing mode 'half'"),
        ({"mixup_alpha": 0.2, "keep_larger": True}, "needs mode='elem'"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchMixer(**options)


def test_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        BatchMixer(mixup_alpha=0.2)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), 5, (0,))
