import pytest
import torch

from data.in_memory import RandomAffine, RandomCropFlip, TensorImages


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_batch_is_repeated_to_three_channels_and_resized():
    images, labels = noise(5, 1, 8, 8), torch.arange(5)
    dataset = TensorImages(images, labels, image_size=32)
    batch, targets = dataset.__getitems__([4, (9, 0)])
    assert batch.shape == (2, 3, 32, 32)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert targets.tolist() == [4, 0]
    single, label = dataset[4]
    assert torch.equal(single, batch[0])
    assert label == 4


def test_images_of_the_right_size_stay_as_they_are():
    images = noise(3, 3, 32, 32)
    batch, _ = TensorImages(images, torch.arange(3), image_size=32).__getitems__([2, 1])
    assert torch.equal(batch, images[[2, 1]])


@pytest.mark.parametrize("augment", [RandomAffine(), RandomCropFlip()])
def test_augmentation_depends_on_seed_epoch_and_example_not_on_the_batch(augment):
    images, labels = noise(6, 3, 32, 32), torch.arange(6)
    dataset = TensorImages(images, labels, 32, augment, seed=3)
    together, _ = dataset.__getitems__([(1, index) for index in range(6)])
    other_epoch, _ = dataset.__getitems__([(2, index) for index in range(6)])
    again = TensorImages(images, labels, 32, augment, seed=3)
    alone = torch.stack([again[(1, index)][0] for index in reversed(range(6))]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together, other_epoch)
    other_seed, _ = TensorImages(images, labels, 32, augment, seed=4).__getitems__([(1, index) for index in range(6)])
    assert not torch.equal(together, other_seed)


def test_affine_with_middle_draws_is_the_identity():
    images = noise(3, 1, 32, 32)
    assert torch.equal(RandomAffine()(images, torch.full((3, 5), 0.5)), images)


def test_affine_moves_by_its_span_and_fills_with_zeros():
    images = torch.full((1, 1, 32, 32), 200, dtype=torch.uint8)
    draws = torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.5]])
    # A quarter of 32 pixels: the image moves left by 8.
    moved = RandomAffine(shift=0.25)(images, draws)[0, 0]
    assert (moved[:, :24] == 200).all()
    assert (moved[:, 24:] == 0).all()


def test_affine_rotates_about_the_centre_by_its_angle():
    images = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    images[..., 16, 26] = 255  # 10 pixels to the right of the centre
    turned = RandomAffine(degrees=90.0)(images, torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]]))[0, 0]
    assert torch.nonzero(turned > 200).tolist() == [[6, 16]]


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_affine_scales_by_its_share(draw):
    images = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    images[..., 22:42, 22:42] = 255
    area = (RandomAffine(scale=0.2)(images, torch.tensor([[0.5, 0.5, draw, 0.5, 0.5]])).float() / 255).sum()
    assert float(area) == pytest.approx(400 * (1.2 if draw else 0.8) ** 2, rel=0.02)


def test_crop_flip_against_a_loop():
    images = noise(50, 3, 32, 32)
    draws = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    result = RandomCropFlip()(images, draws)
    assert result.shape == images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    flips = 0
    for n, (down, right, flip) in enumerate(draws.tolist()):
        top, left = int(9 * down), int(9 * right)
        expected = padded[n, :, top : top + 32, left : left + 32]
        if flip < 0.5:
            flips += 1
            expected = expected.flip(2)
        assert torch.equal(result[n], expected)
    assert 10 < flips < 40
