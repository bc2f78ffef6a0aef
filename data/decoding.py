"""Encoded images, and the libraries that decode them: the same pixels from each of them, at different speeds.

simplejpeg and Pillow both stand on libjpeg-turbo with its accurate settings, so their pixels are equal bit by bit
(tested). What simplejpeg does not read (other formats, CMYK, slightly broken files) is left to Pillow, so that which
images count as readable does not depend on the decoder either. `python -m benchmarks.loader` measures these and others:
torchvision's decoder is deprecated, imagecodecs fills up truncated files in silence, OpenCV turns images by their EXIF
tags, and Pillow-SIMD is compiled from source in Pillow's place.
"""

import io
import re
from functools import cached_property
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# What Pillow raises for broken files; SyntaxError comes from its PNG reader.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# Fastest first, as measured by `python -m benchmarks.loader`.
DECODERS = ("simplejpeg", "pillow")
FACTORS = (1, 2, 4, 8)
"""By which libjpeg-turbo scales an image down while it decodes, at a gain of speed."""


class UnreadableImage(Exception):
    """The bytes are not an image, or a broken one; the message is the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in RGB. Pillow cuts grey levels above 255 off, so 16 bits are divided by 256 here.

    Raises:
        ValueError: grey levels whose range nobody knows, 32-bit or floating point.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.int64) // 256
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating point"
        raise ValueError(f"{kind} grey levels, whose range the file does not say: convert it to 8 bits")
    return image.convert("RGB")


def choose_decoder(name: str = "auto") -> str:
    """The decoder of that name, or the fastest one that is installed.

    Raises:
        ValueError: there is no such decoder, or it is not installed.
    """
    if name == "auto":
        return next(decoder for decoder in DECODERS if _is_installed(decoder))
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; choose one of auto, {', '.join(DECODERS)} (data.decoder)")
    if not _is_installed(name):
        raise ValueError(f"decoder {name} is not installed: pip install {name}, or set data.decoder=auto")
    return name


def _is_installed(name: str) -> bool:
    return name != "simplejpeg" or find_spec("simplejpeg") is not None


class Picture:
    """One image, decoded when its pixels are asked for.

    Args:
        data: the file's bytes: JPEG, PNG, or whatever else Pillow reads.
        decoder: one of `DECODERS`; JPEG alone is decoded by others than Pillow.

    Raises:
        UnreadableImage: (from every property and method) the data is broken.
    """

    def __init__(self, data: bytes, decoder: str = "pillow") -> None:
        self.data = data
        self.decoder = decoder

    @staticmethod
    def of(image: "Image.Image | Picture") -> "Picture":
        """A picture from a decoded Pillow image; a picture is returned as it is."""
        return image if isinstance(image, Picture) else _DecodedPicture(image)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole image, from the header."""
        width, height, _ = self._header
        return width, height

    @cached_property
    def _header(self) -> tuple[int, int, bool]:
        """Width, height, and whether simplejpeg can be trusted with it."""
        if self.decoder == "simplejpeg" and self.data[:2] == b"\xff\xd8":
            import simplejpeg

            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(self.data)
            except ValueError:
                pass
            else:
                if width * height <= (Image.MAX_IMAGE_PIXELS or width * height):
                    return width, height, colours in ("YCbCr", "RGB", "Gray")
        try:
            with Image.open(io.BytesIO(self.data)) as image:
                return *image.size, False
        except UNREADABLE as error:
            raise _unreadable(error) from error

    def pixels(self, factor: int = 1) -> Tensor:
        """uint8 `[3, H, W]` in RGB (channels last in memory).

        Args:
            factor: of `FACTORS`: a JPEG has its sides divided by it, rounded up; other formats stay whole.
        """
        width, height, is_fast = self._header
        array = self._decode_fast(width, height, factor) if is_fast else None
        if array is None:
            array = np.array(self._decode_pillow(factor))
        return torch.from_numpy(array).permute(2, 0, 1)

    def image(self) -> Image.Image:
        """The whole image as Pillow's, in RGB."""
        if self._header[2]:
            return Image.fromarray(self.pixels().permute(1, 2, 0).numpy())
        return self._decode_pillow()

    def _decode_fast(self, width: int, height: int, factor: int) -> np.ndarray | None:
        import simplejpeg

        least = {"min_width": -(-width // factor), "min_height": -(-height // factor), "min_factor": factor}
        try:
            array: np.ndarray = simplejpeg.decode_jpeg(self.data, "RGB", **(least if factor > 1 else {}))
        except ValueError:  # Pillow reads some of what it refuses, or says what is wrong
            return None
        return array

    def _decode_pillow(self, factor: int = 1) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self.data)) as image:
                if factor > 1 and image.format == "JPEG":
                    # draft() takes the largest factor that leaves at least this size.
                    image.draft("RGB", (image.width // factor, image.height // factor))
                return to_rgb(image)
        except UNREADABLE as error:
            raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnreadableImage:
    # Pillow names the file, which is a buffer here.
    reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))
    return UnreadableImage(f"{type(error).__name__}: {reason}")


class _DecodedPicture(Picture):
    """Pillow's image in the form of a picture."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__(b"")
        self._image = image

    @property
    def size(self) -> tuple[int, int]:
        return self._image.size

    def pixels(self, factor: int = 1) -> Tensor:
        return torch.from_numpy(np.array(self._image)).permute(2, 0, 1)

    def image(self) -> Image.Image:
        return self._image


def read_image(path: str) -> Image.Image:
    """The image of a file in RGB, fully decoded by Pillow."""
    with Image.open(path) as image:
        return to_rgb(image)
