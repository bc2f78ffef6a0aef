"""Mixup and cutmix on a batch, with draws that are a pure function of where the training stands.

timm's `Mixup` draws from numpy's global generator, so a resumed run would have to restore that generator, and any other
user of it would change the draws. Here every call seeds it from `(seed, *position)`, where the position is for example
(epoch, batch index, rank), and puts the global state back afterwards: nothing needs saving, a resumed run draws the
same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

MODES = ("batch", "pair", "elem")


class BatchMixer:
    """Mixes every image of a batch with another one of the batch, by mixup or cutmix (timm's implementations).

    The partner of image `i` is image `N - 1 - i`. Of an odd batch the last image stays as it is, and the others are a
    batch of `N - 1`.

    Args:
        mixup_alpha: mixup with weights from Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: cutmix with areas from Beta(alpha, alpha); 0: no cutmix.
        prob: probability that a batch (or an image, see `mode`) is mixed at all.
        switch_prob: probability of cutmix where both are on.
        mode: one draw per "batch", per "pair" of images or per image ("elem").
        keep_larger: the image keeps the larger share, `max(w, 1 - w)`; "elem" mixup only. Together that is the authors'
            mixup (tensorflow/tpu, official/efficientnet/imagenet_input.py) [seen], which is off by default.
        seed: first number of every draw's seed.

    Raises:
        ValueError: for values out of their range, or when neither mixup nor cutmix is on.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        keep_larger: bool = False,
        seed: int = 0,
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or mixup_alpha + cutmix_alpha <= 0:
            raise ValueError(
                "Mixing needs mixup_alpha or cutmix_alpha above 0 (and neither below), "
                f"got {mixup_alpha} and {cutmix_alpha}; to train without it, leave the mixer out."
            )
        if not (0 <= prob <= 1 and 0 <= switch_prob <= 1):
            raise ValueError(f"prob and switch_prob must be in [0, 1], got {prob} and {switch_prob}.")
        if mode not in MODES:
            raise ValueError(f"Unknown mixing mode {mode!r}; choose one of {', '.join(MODES)}.")
        if keep_larger and (mode != "elem" or cutmix_alpha > 0):
            raise ValueError("keep_larger is the authors' mixup: it needs mode='elem' and cutmix_alpha=0.")
        self.seed = seed
        mixup = _ElementMixup if mode == "elem" and cutmix_alpha == 0 else Mixup
        self._mixup = mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=0.0,
        )
        if keep_larger:
            self._mixup.keep_larger = True

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, num_classes: int, position: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: `[N, C, H, W]`, floating point, on any device; not changed.
            labels: `[N]` int64, below `num_classes`.
            position: non-negative integers that name this batch among all of the training, on all processes.

        Returns:
            Mixed images, and class probabilities `[N, num_classes]` float32, not smoothed: cross entropy with
            `label_smoothing` does that, to the same effect as smoothing before mixing.
        """
        if not images.is_floating_point():
            raise ValueError(f"Mixing needs floating-point images, got {images.dtype}: normalise them first.")
        targets = mixup_target(labels, num_classes)
        even = len(images) - len(images) % 2
        if even == 0:
            return images, targets
        images = images.clone()  # timm mixes in place, but the batch may belong to a cache
        self._mixup.num_classes = num_classes
        with _numpy_seeded(self.seed, *position):
            _, targets[:even] = self._mixup(images[:even], labels[:even])
        return images, targets


class _ElementMixup(Mixup):
    """timm's mixup per image without its loop over images, and the authors' choice of the larger share."""

    keep_larger = False

    def _mix_elem(self, x: Tensor) -> Tensor:
        weight, _ = self._params_per_elem(len(x))
        if self.keep_larger:
            weight = np.maximum(weight, 1 - weight)
        weight_N = torch.as_tensor(weight, device=x.device, dtype=x.dtype)
        weight_N111 = weight_N[:, None, None, None]
        x.copy_(x * weight_N111 + x.flip(0) * (1 - weight_N111))
        return weight_N[:, None]


@contextmanager
def _numpy_seeded(*seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(list(seed))
    try:
        yield
    finally:
        np.random.set_state(state)
