"""Every decoder gives the same pixels; the tensor crops are torchvision's, within a grey level of Pillow's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data import decoding
from data.decoding import DECODERS, FACTORS, Picture, UnreadableImage, choose_decoder, read_image
from data.sampling import example_rng
from data.transforms import TrainTransform, eval_transform, random_box

INSTALLED = [name for name in DECODERS if decoding._is_installed(name)]
FAST = [name for name in INSTALLED if name != "pillow"]


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Fields of several sizes, as photos have them: noise of single pixels is unlike anything that is resized."""
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.randn(1, 3, n, n, generator=generator) for n in (3, 8, 40)]
    total = sum(torch.nn.functional.interpolate(field, (height, width), mode="bicubic") for field in fields)
    return TF.to_pil_image((total[0] * 40 + 128).clamp(0, 255).to(torch.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 92} | options)
    return file.getvalue()


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"progressive": True}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"format": "PNG"}),
        ("RGBA", {"format": "PNG"}),
        ("P", {"format": "PNG"}),
        ("RGB", {"format": "WEBP"}),
    ],
)
def test_decoders_give_pillows_pixels(decoder, factor, mode, options):
    data = encoded(smooth(101, 67).convert(mode), **options)
    ours, theirs = Picture(data, decoder), Picture(data, "pillow")
    assert ours.size == theirs.size == (101, 67)
    assert torch.equal(ours.pixels(factor), theirs.pixels(factor))
    scaled = factor if options.get("format", "JPEG") == "JPEG" else 1
    assert ours.pixels(factor).shape == (3, -(-67 // scaled), -(-101 // scaled))
    assert ours.image().tobytes() == theirs.image().tobytes() == TF.to_pil_image(theirs.pixels()).tobytes()


@pytest.mark.parametrize("decoder", INSTALLED)
def test_scaling_while_decoding_is_close_to_scaling_afterwards(decoder):
    image = smooth(160, 120)
    halved = Picture(encoded(image, quality=98), decoder).pixels(2)
    expected = TF.pil_to_tensor(image.resize((80, 60), Image.Resampling.BOX))
    assert (halved.int() - expected.int()).abs().float().mean() < 2


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("method", ["size", "pixels", "image"])
def test_broken_images_are_unreadable_with_the_reason(decoder, method):
    def use(data: bytes) -> object:
        found = getattr(Picture(data, decoder), method)
        return found() if callable(found) else found

    whole = encoded(smooth(101, 67))
    for data in (b"", b"\0" * 100, b"\xff\xd8\xff garbage"):
        with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
            use(data)
    if method != "size":  # the header is there
        with pytest.raises(UnreadableImage, match="truncated"):
            use(whole[: len(whole) // 2])
    assert use(whole + b"trailing bytes") is not None


@pytest.mark.parametrize("decoder", FAST)
def test_what_pillow_mends_is_readable_for_all(decoder):
    """Some files of ImageNet have bytes too many; libjpeg warns of them and goes on."""
    whole = encoded(smooth(101, 67))
    mended = whole[:900] + b"\xff\xd0" + whole[900:]
    assert torch.equal(Picture(mended, decoder).pixels(), Picture(mended, "pillow").pixels())


def test_a_decompression_bomb_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for decoder in INSTALLED:
        with pytest.raises(UnreadableImage, match="DecompressionBombError"):
            Picture(encoded(smooth(101, 67)), decoder).pixels()


def test_the_fastest_installed_decoder_is_chosen(monkeypatch):
    monkeypatch.setattr(decoding, "find_spec", lambda name: object())
    assert choose_decoder() == choose_decoder("auto") == "simplejpeg"
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    assert choose_decoder() == choose_decoder("pillow") == "pillow"
    with pytest.raises(ValueError, match="decoder simplejpeg is not installed: pip install simplejpeg, or"):
        choose_decoder("simplejpeg")
    with pytest.raises(ValueError, match="unknown decoder 'cv2'; choose one of auto, simplejpeg, pillow"):
        choose_decoder("cv2")


@pytest.mark.parametrize(("width", "height"), [(101, 67), (40, 200), (300, 32), (1, 1)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (1.9, 2.0))])
def test_boxes_are_those_of_torchvision(width, height, scale, ratio):
    theirs = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    for seed in range(20):
        with example_rng(seed):
            ours = random_box(width, height, scale, ratio)
            after = torch.rand(1)
        with example_rng(seed):
            drawn = theirs.make_params([torch.empty(3, height, width)])
            assert torch.equal(after, torch.rand(1))
        assert ours == (drawn["left"], drawn["top"], drawn["width"], drawn["height"])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crops_are_torchvisions_nearly_to_a_grey_level(interpolation):
    mode = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}[interpolation]
    theirs = v2.Compose(
        [v2.RandomResizedCrop(48, interpolation=mode), v2.RandomHorizontalFlip(), v2.PILToTensor()],
    )
    ours = TrainTransform(48, interpolation=interpolation, dct_scaling=False)
    image = smooth(130, 90)
    for seed in range(20):
        with example_rng(seed):
            expected = theirs(image)
        with example_rng(seed):
            found = ours(image)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= {"bicubic": 8, "bilinear": 1}[interpolation] and difference.float().mean() < 0.5


@pytest.mark.parametrize("augment", ["none", "autoaugment"])
def test_training_and_evaluation_do_not_depend_on_the_decoder(augment):
    data = encoded(smooth(300, 200))
    train = TrainTransform(48, augment=augment)
    for seed in range(5):
        results = []
        for decoder in INSTALLED:
            with example_rng(seed):
                results.append(train(Picture(data, decoder)))
        assert all(torch.equal(result, results[0]) for result in results)
    results = [eval_transform(48)(Picture(data, decoder)) for decoder in INSTALLED]
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_photos_are_scaled_while_they_are_decoded_if_the_crop_allows(monkeypatch):
    picture = Picture(encoded(smooth(400, 300)), "pillow")
    factors = []
    pixels = Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self, factor=1: (factors.append(factor), pixels(self, factor))[1])
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (4 / 3, 4 / 3), "horizontal_flip": 0.0}
    for size, factor in ((32, 4), (37, 4), (38, 2), (75, 2), (76, 1), (151, 1)):
        scaled = TrainTransform(size, **whole)(picture)
        assert factors.pop() == factor
        exact = TrainTransform(size, dct_scaling=False, **whole)(picture)
        assert factors.pop() == 1
        assert (scaled.int() - exact.int()).abs().float().mean() < 1.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_keep_their_range(kind, tmp_path):
    levels = np.arange(0, 65536, 655, dtype=np.uint16).reshape(1, -1).repeat(20, 0)
    path = tmp_path / "grey"
    Image.fromarray(levels).save(path, format=kind)
    for pixels in (Picture(path.read_bytes()).pixels(), TF.pil_to_tensor(read_image(str(path)))):
        assert torch.equal(pixels[1], torch.from_numpy((levels // 256).astype(np.uint8)))


@pytest.mark.parametrize(("dtype", "message"), [(np.float32, "floating point"), (np.int32, "32-bit")])
def test_grey_levels_of_unknown_range_are_unreadable(dtype, message, tmp_path):
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "grey.tiff")
    with pytest.raises(UnreadableImage, match=f"{message} grey levels"):
        Picture((tmp_path / "grey.tiff").read_bytes()).pixels()
