"""SSD's training augmentation and the plain resize of evaluation, for an image with its boxes (torchvision v2)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from data.transforms import choice

AUGMENTS = ("ssd", "flip", "none")
# Boxes that cropping and resizing left with less than a pixel of the result have nothing to be learned from.
SMALLEST_BOX = 1.0

# (PIL RGB, boxes float32 [M, 4] in its pixels, labels [M]) -> (uint8 [3, S, S], boxes in pixels of the result, labels)
DetectionTransform = Callable[[Image.Image, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class BoxTransform:
    """Steps of `torchvision.transforms.v2` on an image and its boxes; boxes are clipped to the result.

    Args:
        steps: image (uint8 `[3, H, W]`), boxes and labels pass through them in order.
        smallest: boxes with a side below so many pixels of the result are dropped; 0 keeps all.
    """

    def __init__(self, steps: Sequence[nn.Module], smallest: float) -> None:
        self.steps = list(steps)
        self.smallest = smallest

    def __call__(self, image: Image.Image, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = (image.height, image.width)
        sample: Any = (
            tv_tensors.Image(v2.functional.pil_to_tensor(image)),
            tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size),
            labels,
        )
        for step in self.steps:
            sample = step(*sample)
        pixels, moved, labels = sample
        moved = v2.functional.clamp_bounding_boxes(moved).as_subclass(torch.Tensor)
        if self.smallest > 0:
            kept = ((moved[:, 2:] - moved[:, :2]) >= self.smallest).all(1)
            moved, labels = moved[kept], labels[kept]
        return pixels.as_subclass(torch.Tensor), moved, labels


class CropAroundBoxes(v2.RandomIoUCrop):
    """torchvision's IoU crop, which clips boxes and drops those whose centre is cut off; boxless images stay whole.

    Without boxes no crop can satisfy it, and it would draw hundreds of them in vain.
    """

    def forward(self, *inputs: Any) -> Any:
        image, boxes, labels = inputs
        if len(boxes) == 0:
            return inputs
        image, boxes, labels = super().forward(image, boxes, labels)
        boxes = v2.functional.clamp_bounding_boxes(boxes)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, tv_tensors.wrap(boxes[kept], like=boxes), labels[kept]


def detection_train_transform(
    image_size: int, augment: str = "ssd", fill: Sequence[float] = (0.0, 0.0, 0.0)
) -> DetectionTransform:
    """For training; all randomness is drawn from torch's default CPU generator.

    Args:
        image_size: side of the square result in pixels; the image is stretched to it, as SSD does.
        augment: "ssd" (the SSD paper's section 2.2: zoom-out to at most four times the side, a crop that overlaps some
            box by 0.1 ... 0.9, colours, flip), "flip", or "none".
        fill: colour on 0..255 around an image that was zoomed out of.
    """
    resize = v2.Resize([image_size, image_size], antialias=True)
    steps: list[nn.Module] = [resize]
    if choice("augment", augment, AUGMENTS) == "ssd":
        colour = {tv_tensors.Image: [round(value) for value in fill], "others": 0}
        zoom, crop = v2.RandomZoomOut(fill=colour, side_range=(1.0, 4.0), p=0.5), CropAroundBoxes()
        # Colours last: the same on a third of the pixels (12 instead of 21 ms for a COCO image), but for the colour
        # around a zoomed-out image, which changes with it.
        steps = [zoom, crop, resize, v2.RandomPhotometricDistort()]
    if augment != "none":
        steps.append(v2.RandomHorizontalFlip(0.5))
    return BoxTransform(steps, SMALLEST_BOX)


def detection_eval_transform(image_size: int) -> DetectionTransform:
    """The image stretched to the square; every box is kept."""
    return BoxTransform([v2.Resize([image_size, image_size], antialias=True)], 0)
