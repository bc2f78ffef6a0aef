"""Small networks with the structure of the real ones, for tests of conversion."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 2, 1)
        self.expand = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection; no normalisation, so that it is exact."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 2 * in_channels
        self.conv_pw = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.se = SqueezeExcite(hidden)
        self.conv_pwl = nn.Conv2d(hidden, out_channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_pwl(self.se(self.conv_dw(self.conv_pw(x).relu()).relu()))


class SmallNet(nn.Module):
    """Stem, two stages of blocks, head, classifier; `reentrant` turns on gradient checkpointing of each stage."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.Sequential(
            nn.Sequential(InvertedResidual(6, 7), InvertedResidual(7, 7)),
            nn.Sequential(InvertedResidual(7, 9, 2), InvertedResidual(9, 9)),
        )
        self.conv_head = nn.Conv2d(9, 11, 1)
        self.classifier = nn.Linear(11, num_classes)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_stem(x)
        for stage in self.blocks:
            x = stage(x) if self.reentrant is None else checkpoint(stage, x, use_reentrant=self.reentrant)
        return self.classifier(self.conv_head(x).mean((2, 3)))
