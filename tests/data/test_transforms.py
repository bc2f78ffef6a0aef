import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_policy_v0

from data.sampling import example_rng
from data.transforms import AUGMENTS, Normalize, TrainTransform, eval_transform


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pixels_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # (0/255 - 0.485) / 0.229, (255/255 - 0.456) / 0.224, (51/255 - 0.406) / 0.225
        ("imagenet", (0, 255, 51), (-2.117904, 2.428571, -0.915556)),
        ("authors", (127, 255, 0), (0.0, 1.0, -0.9921875)),
        ("half", (0, 255, 51), (-1.0, 1.0, -0.6)),
    ],
)
def test_normalisation_equals_figures_computed_by_hand(name, values, expected):
    result = Normalize(name)(pixels_of(*values))
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_normalisation_keeps_the_memory_format_and_float_dtypes(dtype):
    images = torch.randint(256, (2, 3, 4, 6)).to(dtype)
    before = images.clone()
    contiguous = Normalize("imagenet")(images)
    channels_last = Normalize("imagenet")(images.to(memory_format=torch.channels_last))
    assert contiguous.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert contiguous.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, channels_last)
    assert torch.equal(images, before)


def test_normalize_holds_no_state_for_checkpoints():
    assert Normalize("half").state_dict() == {}


@pytest.mark.parametrize(("width", "height"), [(500, 375), (301, 640), (190, 211)])
def test_evaluation_crop_equals_timms_pixel_by_pixel(width, height):
    image = random_image(width, height)
    timm_transform = create_transform(
        224, is_training=False, interpolation="bicubic", crop_pct=0.875, normalize=False, use_prefetcher=False
    )
    expected = timm_transform(image)
    ours = eval_transform(224)(image)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 224, 224)
    assert torch.equal(ours, expected)


def test_evaluation_of_cifar_sized_images_can_keep_every_pixel():
    image = random_image(32, 32)
    result = eval_transform(32, crop_fraction=1.0)(image)
    assert result.permute(1, 2, 0).numpy().tobytes() == image.tobytes()


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("train_crop", ["random_resized", "pad"])
def test_training_transforms_depend_on_the_seed_alone(augment, train_crop):
    transform = TrainTransform(48, train_crop=train_crop, augment=augment, random_erasing=0.5, fill=(124, 116, 104))
    image = random_image(60, 50)
    results = []
    for seed in (1, 2, 1):
        torch.rand(seed)  # what was drawn before does not matter
        with example_rng(seed):
            results.append(transform(image))
    assert results[0].dtype == torch.uint8
    assert results[0].shape == (3, 48, 48)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_policy_v0_draws_from_torch_alone_and_leaves_other_generators_as_they_were():
    transform = TrainTransform(32, train_crop="pad", horizontal_flip=0, augment="autoaugment_v0")
    image = random_image(32, 32)
    seen = set()
    for seed in range(30):
        results = []
        for elsewhere, each in ((1, transform), (2, pickle.loads(pickle.dumps(transform)))):
            random.seed(elsewhere)
            np.random.seed(elsewhere)
            before = random.getstate(), np.random.get_state()[1].tolist()
            torch.manual_seed(seed)
            results.append(each(image))
            assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        assert results[0].dtype == torch.uint8 and results[0].shape == (3, 32, 32)
        assert torch.equal(*results)
        seen.add(results[0].numpy().tobytes())
    assert len(seen) >= 25  # 30 draws of crop and policy, equal only by chance


def test_policy_v0_restores_the_generator_after_an_error():
    policy = TrainTransform(32, augment="autoaugment_v0")._policy
    before = random.getstate()
    with pytest.raises(AttributeError):
        for _ in range(20):  # some sub-policies leave what they get as it is
            policy(None)
    assert random.getstate() == before


def test_policy_v0_is_the_table_of_the_authors_efficientnet_code():
    """In timm's version; the AutoAugment paper's has no SolarizeAdd and begins with Posterize."""
    policy = TrainTransform(32, augment="autoaugment_v0", interpolation="bilinear", fill=(123.7, 116.3, 103.5))._policy
    ours, theirs = policy.policy.policy, auto_augment_policy_v0({})
    table = [[(op.name, op.prob, op.magnitude) for op in operations] for operations in ours]
    assert table == [[(op.name, op.prob, op.magnitude) for op in operations] for operations in theirs]
    assert len(table) == 25 and table[0] == [("Equalize", 0.8, 1), ("ShearY", 0.8, 4)]
    assert {"SolarizeAdd", "TranslateYRel"} < {name for operations in table for name, _, _ in operations}
    options = {(op.kwargs["fillcolor"], op.kwargs["resample"]) for operations in ours for op in operations}
    assert options == {((124, 116, 104), Image.Resampling.BILINEAR)}


def test_padded_crop_shifts_by_at_most_an_eighth_and_flips():
    image = random_image(32, 32)
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    transform = TrainTransform(32, train_crop="pad")
    seen = set()
    for seed in range(40):
        with example_rng(seed):
            result = transform(image)
        for flipped in (False, True):
            centre = (result.flip(2) if flipped else result)[:, 12:20, 12:20]
            seen |= {
                (flipped, down, right)
                for down in range(-4, 5)
                for right in range(-4, 5)
                if torch.equal(centre, original[:, 12 + down : 20 + down, 12 + right : 20 + right])
            }
    assert {flipped for flipped, _, _ in seen} == {False, True}
    assert len(seen) >= 25  # 40 images, 162 possible results: about 36 different ones, never one that matches nothing


def test_random_erasing_fills_with_the_given_colour():
    transform = TrainTransform(32, train_crop="pad", random_erasing=1.0, fill=(123.7, 116.3, 103.5))
    with example_rng(0):
        result = transform(Image.new("RGB", (32, 32), (255, 255, 255)))
    erased = (result == torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)).all(0)
    assert 20 <= int(erased.sum()) <= 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalize("torch"), r"unknown normalisation 'torch'; choose one of imagenet, authors, half"),
        (lambda: eval_transform(32, crop_fraction=0), r"crop fraction 0: expected a number above 0 and at most 1"),
        (lambda: eval_transform(32, crop_fraction=1.1), r"crop fraction 1.1"),
        (lambda: eval_transform(32, interpolation="cubic"), r"unknown interpolation 'cubic'; .* bicubic, bilinear"),
        (lambda: TrainTransform(32, train_crop="centre"), r"unknown train_crop 'centre'; .* random_resized, pad"),
        (lambda: TrainTransform(32, crop_scale=(8, 100)), r"crop_scale \[8, 100\]: .* in order, above 0 and at most 1"),
        (
            lambda: TrainTransform(32, crop_scale=(1.0, 0.08)),
            r"crop_scale \[1.0, 0.08\]: expected two numbers in order",
        ),
        (lambda: TrainTransform(32, crop_ratio=(0, 1)), r"crop_ratio \[0, 1\]: expected two numbers in order, above 0"),
        (lambda: TrainTransform(32, horizontal_flip=5), r"horizontal_flip 5: expected a probability"),
        (lambda: TrainTransform(32, random_erasing=-1), r"random_erasing -1: expected a probability"),
        (lambda: TrainTransform(32, randaugment_magnitude=31), r"randaugment_magnitude 31: .* magnitude of 0 to 30"),
        (lambda: TrainTransform(32, augment="rand"), r"unknown augment 'rand'; .* none, autoaugment"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
