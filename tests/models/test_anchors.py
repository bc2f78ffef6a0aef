"""Anchors against a direct transcription of the TensorFlow Object Detection API's rule."""

from __future__ import annotations

import math

import pytest
import torch

from models.anchors import anchor_specs, make_anchors


def test_the_specifications_of_the_api() -> None:
    specs = anchor_specs(6)
    assert [len(spec) for spec in specs] == [3, 6, 6, 6, 6, 6]
    assert specs[0] == ((0.1, 1.0), (0.2, 2.0), (0.2, 0.5))
    scales = [0.35, 0.5, 0.65, 0.8, 0.95]
    for spec, scale, following in zip(specs[1:], scales, [*scales[1:], 1.0], strict=True):
        assert [ratio for _, ratio in spec] == pytest.approx([1, 2, 1 / 2, 3, 1 / 3, 1])
        assert [s for s, _ in spec[:5]] == pytest.approx([scale] * 5)
        assert spec[5][0] == pytest.approx(math.sqrt(scale * following))


def test_anchors_of_a_300_pixel_image() -> None:
    sizes = [(n, n) for n in (19, 10, 5, 3, 2, 1)]
    anchors = make_anchors(anchor_specs(6), sizes, 300)
    assert anchors.shape == (19 * 19 * 3 + (100 + 25 + 9 + 4 + 1) * 6, 4) == (1917, 4)
    # The second position of the first row: centre (1.5 / 19, 0.5 / 19); its second box is twice as wide as high.
    width, height = 300 * 0.2 * math.sqrt(2), 300 * 0.2 / math.sqrt(2)
    x, y = 300 * 1.5 / 19, 300 * 0.5 / 19
    expected = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(anchors[4], expected)
    # The last box is the square of sqrt(0.95) in the middle.
    side = 300 * math.sqrt(0.95)
    torch.testing.assert_close(anchors[-1], torch.tensor([150 - side / 2] * 2 + [150 + side / 2] * 2))
    areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    assert areas[0] == pytest.approx(30**2, rel=1e-4) and areas[1] == pytest.approx(60**2, rel=1e-4)


def test_anchors_of_maps_that_are_not_square() -> None:
    anchors = make_anchors([((0.5, 1.0),), ((1.0, 1.0),)], [(1, 2), (1, 1)], 100)
    assert anchors.tolist() == [[0, 25, 50, 75], [50, 25, 100, 75], [0, 0, 100, 100]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_maps": 1}, "at least 2"),
        ({"min_scale": 0.0}, "0 < min < max"),
        ({"max_scale": 0.1}, "0 < min < max"),
        ({"aspect_ratios": (1.0, -2.0)}, "positive"),
        ({"aspect_ratios": ()}, "positive"),
    ],
)
def test_impossible_anchors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anchor_specs(**options)  # type: ignore[arg-type]


def test_as_many_specifications_as_maps() -> None:
    with pytest.raises(ValueError, match="2 anchor specifications for 1"):
        make_anchors(anchor_specs(2), [(1, 1)], 100)
