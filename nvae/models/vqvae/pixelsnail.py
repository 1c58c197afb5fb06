"""The learned prior of a map of codes: PixelSNAIL, conditional on the maps above and on a class (Chen et al. 2018;
Razavi et al. 2019 §3.2; spec_vqvae §4).

Shapes: B batch, K codes, h w space of the map, c channels, r_c those of the condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from ...bricks.causal import AttentionBlock, CodeContext, Conv2d, GatedBlock, Walk, places
from ...bricks.recomputation import Recomputable
from ...core.config import Config
from ...core.distributed import rank
from ...core.precision import in_float64

SLOW = 5.0
"""Seconds of drawing a map after which a progress bar appears."""


class PixelSNAILConfig(Config):
    channels: int = Field(256, ge=1, le=65_536)
    """Channels between blocks, c; divisible by 16 where there is attention."""
    inner_channels: int = Field(256, ge=1, le=65_536)
    """Channels inside gated blocks."""
    kernel: int = Field(5, ge=2, le=1000)
    """Side of the causal convolutions; an even one counts as one more."""
    blocks: int = Field(4, ge=1, le=1000)
    """Blocks, each of gated blocks and then, with `attention`, a look at all earlier positions."""
    depth: int = Field(4, ge=1, le=1000)
    """Gated causal blocks in a block."""
    attention: bool = True
    """Whether blocks attend: worth its memory on maps up to 32×32."""
    output_blocks: int = Field(0, ge=0, le=1000)
    """Gated 1×1 blocks before the logits."""
    condition_channels: int = Field(256, ge=1, le=65_536)
    """Channels of what the maps above and the class say, r_c."""
    condition_blocks: int = Field(3, ge=0, le=1000)
    """Gated 3×3 blocks over each map above."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability, inside gated blocks and on the weights of attention."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "PixelSNAILConfig":
        if self.attention and self.channels % 16:
            raise ValueError(f"channels: {self.channels} are not divisible by 16, as 8 heads of attention take them")
        return self

    @property
    def side(self) -> int:
        """k, odd."""
        return self.kernel // 2 * 2 + 1


@dataclass(frozen=True)
class MapShape:
    """Of a map of codes."""

    codes: int
    height: int
    width: int


class ConditionStack(nn.Module):
    """What a map above says of each position: one-hot codes, convolutions that see all around, enlarged."""

    def __init__(self, above: MapShape, target: MapShape, config: PixelSNAILConfig) -> None:
        super().__init__()
        self.codes, self.factor = above.codes, target.height // above.height
        channels = config.condition_channels

        def around(before: int, after: int) -> Conv2d:
            return Conv2d(before, after, 3)

        self.first = around(above.codes, channels)
        blocks = (
            GatedBlock(channels, channels, around, dropout=config.dropout) for _ in range(config.condition_blocks)
        )
        self.blocks = nn.ModuleList(blocks)

    def gated(self) -> list[GatedBlock]:
        """Its gated blocks."""
        return cast("list[GatedBlock]", list(self.blocks))

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, r_c, f·h, f·w)."""
        x = self.first(F.one_hot(codes, self.codes).movedim(-1, 1).to(self.first.gain.dtype))
        for block in self.gated():
            x = block(x)
        return F.interpolate(x, scale_factor=self.factor, mode="nearest")


class PixelSNAIL(Recomputable):
    """p(map | maps above, class), one position after the other in raster order.

    With `recompute` the backward pass runs each block again.
    """

    places: Tensor
    draws = True

    def __init__(
        self, shape: MapShape, config: PixelSNAILConfig, above: Sequence[MapShape] = (), classes: int = 0
    ) -> None:
        """`above`: the maps it is conditional on, top-down."""
        super().__init__()
        self.shape = shape
        conditions = config.condition_channels if above or classes else 0
        self.conditions = nn.ModuleList(ConditionStack(map_, shape, config) for map_ in above)
        self.classes = nn.Embedding(classes, conditions) if classes else None
        self.context = CodeContext(shape.codes, config.channels, config.side)
        self.blocks = nn.ModuleList(
            AttentionBlock(
                config.channels,
                config.inner_channels,
                config.side,
                config.depth,
                attention=config.attention,
                condition=conditions,
                dropout=config.dropout,
            )
            for _ in range(config.blocks)
        )
        self.out = nn.ModuleList(
            GatedBlock(config.channels, config.inner_channels, Conv2d, dropout=config.dropout)
            for _ in range(config.output_blocks)
        )
        self.logits = Conv2d(config.channels, shape.codes)
        self.register_buffer("places", places(shape.height, shape.width), persistent=False)

    def condition_stacks(self) -> list[ConditionStack]:
        """One for each map above, top-down."""
        return cast("list[ConditionStack]", list(self.conditions))

    def attention_blocks(self) -> list[AttentionBlock]:
        """The blocks, in order."""
        return cast("list[AttentionBlock]", list(self.blocks))

    def last_blocks(self) -> list[GatedBlock]:
        """The gated 1×1 blocks before the logits."""
        return cast("list[GatedBlock]", list(self.out))

    # ------------------------------------------------------------------------------------------------- whole maps

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits (B, K, h, w) in at least float32 of a map (B, h, w), or of its first rows, under a `condition`."""
        rows = codes.shape[1]
        if condition is not None:
            condition = condition[:, :, :rows]
        x = self.context(codes)
        for block in self.attention_blocks():
            x = self.run(block, x, self.places[:, :, :rows], condition)
        for last in self.last_blocks():
            x = last(x)
        return cast(Tensor, self.logits(F.elu(x))).to(self.logits.gain.dtype)

    def condition(self, above: Sequence[Tensor], labels: Tensor | None = None) -> Tensor | None:
        """What the maps above (B, h', w'), top-down, and classes (B,), −1 for none, say: (B, r_c, h, w).

        (B, r_c, 1, 1) where there are only classes, None where there is nothing to be conditional on.
        """
        said: list[Tensor] = [stack(codes) for stack, codes in zip(self.conditions, above, strict=True)]
        if self.classes is not None and labels is not None:
            known = (labels >= 0)[:, None]
            said.append((self.classes(labels.clamp(min=0)) * known)[:, :, None, None])
        total: Tensor | None = None
        for features in said:
            total = features if total is None else total + features
        return total

    def nats(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """−log p of maps (B, h, w), (B,)."""
        return F.cross_entropy(self(codes, condition), codes, reduction="none").sum((1, 2))

    # ------------------------------------------------------------------------------------------- one after the other

    def step(self, codes: Tensor, walk: Walk, condition: Tensor | None = None) -> Tensor:
        """Logits (B, K) of the walk's position, from maps (B, h, w) that hold the codes of earlier ones."""
        x = self.context.step(codes, walk)
        for block in self.attention_blocks():
            x = block.step(x, self.places, walk, condition)
        for last in self.last_blocks():
            x = last.step(x, walk)
        return self.logits.step(F.elu(x), walk)

    @torch.no_grad()
    def draw(
        self,
        noise: Tensor,
        above: Sequence[Tensor] = (),
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        guidance: float = 0.0,
    ) -> Tensor:
        """Maps (B, h, w) from standard-normal noise (B, 1, h, w), which alone decides them; in eval mode.

        Logits are divided by the temperature; at 0 the likeliest code comes out. `guidance` w takes (1 + w) times the
        logits of the class less w times those of none (Ho & Salimans 2022).
        """
        condition = self.condition(above, labels)
        guided = guidance != 0 and self.classes is not None and labels is not None
        if guided and labels is not None:
            condition = _both(condition, self.condition(above, torch.full_like(labels, -1)))
        times = 2 if guided else 1
        uniform = iter(torch.special.ndtr(in_float64(noise.flatten(1))).unbind(1))

        def drawn(logits: Tensor) -> Tensor:
            if guided:
                known, unknown = logits.chunk(2)
                logits = (1 + guidance) * known - guidance * unknown
            return chosen(logits, temperature, next(uniform)).repeat(times)

        return self.unfold(drawn, times * len(noise), condition)[: len(noise)]

    @torch.no_grad()
    def unfold(self, choose: Callable[[Tensor], Tensor], n: int, condition: Tensor | None = None) -> Tensor:
        """n maps (n, h, w) of the codes (n,) that are chosen by the logits (n, K) of one position after the other."""
        codes = torch.zeros(n, self.shape.height, self.shape.width, dtype=torch.int64, device=self.places.device)
        walk, quiet = Walk(self.shape.height, self.shape.width), rank() != 0
        for row, column in tqdm(
            walk, "drawing codes", codes[0].numel(), delay=SLOW, mininterval=1, leave=False, disable=quiet
        ):
            codes[:, row, column] = choose(self.step(codes, walk, condition))
        return codes


def chosen(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The code (B,) at which the distribution function of (B, K) logits passes uniform numbers (B,); at 0 the mode."""
    if temperature == 0:
        return logits.argmax(1)
    cumulative = torch.softmax(in_float64(logits) / temperature, dim=1).cumsum(1)
    return (cumulative < uniform[:, None]).sum(1).clamp(max=logits.shape[1] - 1)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])
