"""The network of VQ-VAE and VQ-VAE-2: levels of maps of codes, the coarsest on top (van den Oord et al. 2017; Razavi et
al. 2019; spec_vqvae §3).

Shapes: B batch, C image channels, H W its space, c channels of a level, D dimension of a code, h w space of a map, L
levels. Codes are listed top-down, the smallest map first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bricks.quantiser import Quantised, Quantiser, QuantiserConfig, build_quantiser
from ...bricks.recomputation import Recomputable


@dataclass(frozen=True)
class Shape:
    """Of the network of a level."""

    channels: int
    """c."""
    residual: int
    """Channels inside a residual block, r."""
    blocks: int
    """Residual blocks on either way."""
    relu_before_blocks: bool = False
    """Whether the encoder has one more ReLU, between its last convolution and its first block (Sonnet)."""


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(relu(x))))."""

    def __init__(self, channels: int, residual: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, residual, 3, padding=1)
        self.back = nn.Conv2d(residual, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.back(F.relu(self.widen(F.relu(x)))))


class Down(Recomputable):
    """Halves its input log2(factor) times, and looks at what is left with residual blocks."""

    def __init__(self, in_channels: int, shape: Shape, factor: int) -> None:
        super().__init__()
        count, half = factor.bit_length() - 1, shape.channels // 2
        widths = [in_channels, half, *[shape.channels] * (count - 1)]
        halving = (nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths))
        self.halvings = nn.ModuleList(halving)
        self.last = nn.Conv2d(widths[-1], shape.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(shape.channels, shape.residual) for _ in range(shape.blocks)))
        self.relu_before_blocks = shape.relu_before_blocks

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', f·h, f·w) -> (B, c, h, w)."""
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        for halve in self.halvings:
            x = F.relu(halve(x))
        x = self.last(x)
        return F.relu(self.blocks(F.relu(x) if self.relu_before_blocks else x))


class Up(Recomputable):
    """The way back: residual blocks, then doubled log2(factor) times."""

    def __init__(self, in_channels: int, out_channels: int, shape: Shape, factor: int) -> None:
        super().__init__()
        count, half = factor.bit_length() - 1, shape.channels // 2
        widths = [shape.channels, *[half] * (count - 1), out_channels]
        self.first = nn.Conv2d(in_channels, shape.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(shape.channels, shape.residual) for _ in range(shape.blocks)))
        self.doublings = nn.ModuleList(doubling(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', h, w) -> (B, C'', f·h, f·w)."""
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x))
        for double in self.doublings:
            x = double(F.relu(x))
        return x


def doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """The transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


class Level(nn.Module):
    """A level of codes: its part of the way up, its codebook, and its part of the way down."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: Shape,
        quantiser: QuantiserConfig,
        factor: int,
        above: int,
        is_finest: bool,
    ) -> None:
        """`factor`: how many times smaller its map is than the one below, or the image. `above`: levels above it."""
        super().__init__()
        dim = quantiser.dim
        self.encoder = Down(in_channels, shape, factor)
        self.project = nn.Conv2d(shape.channels + (dim if above else 0), dim, 1)
        self.quantiser = build_quantiser(quantiser)
        self.decoder = Up((above + 1) * dim, out_channels, shape, factor)
        steps = 0 if is_finest else factor.bit_length() - 1
        enlargers = (nn.Sequential(*(doubling(dim, dim) for _ in range(steps))) for _ in range(above + 1))
        self.enlarge = nn.ModuleList(() if is_finest else enlargers)

    def vectors(self, h: Tensor, message: Tensor | None) -> Tensor:
        """What is to be quantised (B, D, h, w).

        `h` (B, c, h, w): the encoder's output; `message` (B, D, h, w): what the level above says.
        """
        seen = h if message is None else torch.cat([message, h], dim=1)
        return cast(Tensor, self.project(seen))

    def enlarged(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The codes (B, D, h, w) of the levels above, top first, and of this one, as the level below sees them."""
        return [enlarge(code) for enlarge, code in zip(self.enlarge, codes, strict=True)]

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """What those codes say to the level below, a message, or of the image."""
        return cast(Tensor, self.decoder(torch.cat(list(codes), dim=1)))


Choice = Callable[[int, Quantiser, Tensor], Quantised]
"""Of a level's number, top-down, its quantiser, and its vectors (B, D, h, w)."""


def chosen_nearest(number: int, quantiser: Quantiser, vectors: Tensor) -> Quantised:
    """The nearest codes."""
    return cast(Quantised, quantiser(vectors))


class Network(nn.Module):
    """Levels of codes between an image and its parameters.

    `factors`: how many times smaller each level's map is than what lies below it, the finest level first; powers of 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, shape: Shape, quantiser: QuantiserConfig, factors: Sequence[int]
    ) -> None:
        super().__init__()
        finest_first = [
            Level(
                shape.channels if number else in_channels,
                quantiser.dim if number else out_channels,
                shape,
                quantiser,
                factor,
                above=len(factors) - 1 - number,
                is_finest=number == 0,
            )
            for number, factor in enumerate(factors)
        ]
        self.levels = nn.ModuleList(reversed(finest_first))

    def top_down(self) -> list[Level]:
        """The levels, smallest map first."""
        return cast("list[Level]", list(self.levels))

    def quantisers(self) -> list[Quantiser]:
        """Theirs, top-down."""
        return [level.quantiser for level in self.top_down()]

    def encode(self, x: Tensor) -> list[Tensor]:
        """What each level's encoder says of an image (B, C, H, W), top-down: (B, c, h, w)."""
        outputs: list[Tensor] = []
        for level in reversed(self.top_down()):
            x = level.encoder(x)
            outputs.append(x)
        return outputs[::-1]

    def quantise(self, encoded: Sequence[Tensor], choose: Choice = chosen_nearest) -> list[Quantised]:
        """The codes of what `encode` says, top-down; `choose` takes each level's."""
        found: list[Quantised] = []
        codes: list[Tensor] = []
        message: Tensor | None = None
        for number, (level, h) in enumerate(zip(self.top_down(), encoded, strict=True)):
            found.append(choose(number, level.quantiser, level.vectors(h, message)))
            codes.append(found[-1].output)
            if len(found) < len(encoded):
                message, codes = level.decode(codes), level.enlarged(codes)
        return found

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Parameters of the image (B, C', H, W) from codes (B, D, h, w), top-down."""
        *coarse, finest = self.top_down()
        seen: list[Tensor] = []
        for level, code in zip(coarse, codes, strict=False):
            seen = level.enlarged([*seen, code])
        return finest.decode([*seen, codes[-1]])

    def decoding(self) -> list[nn.Module]:
        """What turns codes into the image, and does not decide codes."""
        *coarse, finest = self.top_down()
        return [finest.decoder, *(level.enlarge for level in coarse[-1:])]

    def deciding(self) -> dict[str, Tensor]:
        """The parameters and codebooks that decide the codes of an image, by name."""
        aside = {id(tensor) for part in self.decoding() for tensor in part.parameters()}
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        averages = ("size", "total", "updates")
        return {n: t for n, t in named.items() if id(t) not in aside and not n.endswith(averages)}

    def values(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """The codes (B, D, h, w) of indices (B, h, w), top-down."""
        return [quantiser.values(map_) for quantiser, map_ in zip(self.quantisers(), indices, strict=True)]
