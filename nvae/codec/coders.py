"""How a model codes images: one on each of some stacks at a time.

Shapes: B images, C colours, H W pixels inside the border, h w space of a group, L latent channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bricks.likelihoods import Likelihood
from ..core.errors import UserError
from ..kernels.operations import using
from ..models.base import Family, TopDown
from .normals import FINEST, NUMBERS, Coded, Grid, bits_needed
from .pixels import exponentials, pixels_of, require_probabilities
from .rounding import Corrections, Rounding
from .stack import WORD_BITS, Stack, library

Labels = Tensor | None
"""(B,) int64 classes of the images, −1 where unknown."""


class Coder(ABC):
    """Puts images on stacks and takes them off again, by a model in float64, plain, on the CPU."""

    def __init__(self, model: Family[Any]) -> None:
        """Raises UserError for a model that gives no probabilities of pixels."""
        likelihood = model.config.likelihood
        require_probabilities(likelihood.kind, likelihood.bits)
        self.model = deepcopy(model).cpu().double().eval()
        self.border = likelihood.border
        self.size = model.config.visible_size
        self.colours = model.config.image_channels
        self.levels = likelihood.highest_level
        self.start_words = 0
        """Random words that a stack begins with."""
        self.bits_of_grids: list[list[int | None]] | None = None
        """b of each channel of each group (`codec/normals.py`), where there are grids."""

    @abstractmethod
    def push(
        self, stacks: Sequence[Stack], images: np.ndarray, numbers: Sequence[int], labels: Labels = None
    ) -> list[dict[int, bool]]:
        """Puts image b of (B, C, H, W) levels on stack b; what has to be noted of each.

        `numbers` tell images from each other, to both sides.
        """

    @abstractmethod
    def pop(
        self, stacks: Sequence[Stack], noted: Sequence[Corrections], numbers: Sequence[int], labels: Labels = None
    ) -> np.ndarray:
        """Takes the last image off each stack: (B, C, H, W) levels."""

    def seen(self, images: np.ndarray) -> Tensor:
        """Levels (B, C, H, W) as the model sees images: from 0 to 1, with their border."""
        return F.pad(torch.from_numpy(images).double() / self.levels, [self.border] * 4)

    def _push_pixels(self, stacks: Sequence[Stack], images: np.ndarray, said: Likelihood, rounding: Rounding) -> None:
        pixels = pixels_of(said, rounding, self._pixels_place)
        for b, stack in enumerate(stacks):
            pixels.push(stack, b, images[b].reshape(self.colours, -1))

    def _pop_pixels(self, stacks: Sequence[Stack], said: Likelihood, rounding: Rounding) -> np.ndarray:
        pixels = pixels_of(said, rounding, self._pixels_place)
        images = [pixels.pop(stack, b) for b, stack in enumerate(stacks)]
        return np.stack(images).reshape(-1, self.colours, self.size, self.size)

    @property
    @abstractmethod
    def _pixels_place(self) -> int:
        """Of the first number that decides pixels."""


@contextmanager
def exactly() -> Iterator[None]:
    """Within, everything is plain and without gradients."""
    with torch.no_grad(), using("plain"):
        yield


class BitsBack(Coder):
    """Latents are popped as the posterior has them, and pushed as the prior has them (Townsend et al. 2019).

    The posterior is top-down: all groups are popped before the pixels are pushed, and then pushed from the bottom up.
    """

    def __init__(
        self, model: Family[Any], bits: list[list[int | None]] | None = None, seen: np.ndarray | None = None
    ) -> None:
        """With the `bits` of a file, or those that fit the images `seen` (B, C, H, W).

        Raises UserError for a model whose posterior has flows: a z of theirs lies on no grid.
        """
        super().__init__(model)
        self.shapes = [torch.Size(shape[1:]) for shape in self.model.latent_shapes(1)]
        self.starts = [0, *np.cumsum([NUMBERS * shape.numel() for shape in self.shapes]).tolist()]
        if bits is None:
            assert seen is not None
            with exactly():
                bits = self._bits_for(seen)
        if [len(of_group) for of_group in bits] != [shape[0] for shape in self.shapes]:
            raise UserError("compression: the archive's index is not of this model: it has other latents")
        self.bits_of_grids = bits
        self.start_words = sum(shape.numel() for shape in self.shapes) * (FINEST + 6) // WORD_BITS + 64

    def _bits_for(self, seen: np.ndarray) -> list[list[int | None]]:
        """For posteriors like those of some images."""
        groups, found = self.model.top_down(self.model.encode(self.seen(seen))), []
        for _ in self.shapes:
            q, p = groups.posterior(), groups.prior()
            if groups.flowed(q.mean) is not q.mean:
                raise UserError(
                    "compression: the model's posterior has flows (model.flows); what they make of a latent on a grid "
                    "is on no grid, so that its bits cannot be had back exactly"
                )
            found.append(bits_needed(q, p))
            groups.enter(q.mean)
        return found

    def push(
        self, stacks: Sequence[Stack], images: np.ndarray, numbers: Sequence[int], labels: Labels = None
    ) -> list[dict[int, bool]]:
        """Pops latents, pushes pixels, pushes latents."""
        rounding, dice = Rounding(len(stacks)), self._dice(numbers)
        with exactly():
            groups = self.model.top_down(self.model.encode(self.seen(images), labels))
            grids, latents = [], []
            for g in range(len(self.shapes)):
                grid = self._grid(groups, g, rounding)
                q = grid.posterior(groups.posterior(), rounding)
                integers = self._drawn(grid, q, stacks, dice)
                groups.enter(grid.values(integers))
                grids.append(grid)
                latents.append(integers)
            self._push_pixels(stacks, images, groups.likelihood(), rounding)
        for grid, integers in zip(reversed(grids), reversed(latents), strict=True):
            for b, stack in enumerate(stacks):
                stack.push(integers[b, grid.tells], grid.model, *grid.prior.of(b, grid.tells))
        return rounding.noted

    def pop(
        self, stacks: Sequence[Stack], noted: Sequence[Corrections], numbers: Sequence[int], labels: Labels = None
    ) -> np.ndarray:
        """Pops latents, pops pixels, pushes latents: the opposite."""
        rounding, dice = Rounding(len(stacks), noted), self._dice(numbers)
        with exactly():
            groups = self.model.top_down(n=len(stacks), labels=labels)
            grids, latents = [], []
            for g in range(len(self.shapes)):
                grid = self._grid(groups, g, rounding)
                integers = self._drawn(grid, grid.prior, stacks, dice)
                groups.enter(grid.values(integers))
                grids.append(grid)
                latents.append(integers)
            images = self._pop_pixels(stacks, groups.likelihood(), rounding)
            groups = self.model.top_down(self.model.encode(self.seen(images), labels))
            posteriors = []
            for grid, integers in zip(grids, latents, strict=True):
                posteriors.append(grid.posterior(groups.posterior(), rounding))
                groups.enter(grid.values(integers))
        for grid, q, integers in zip(reversed(grids), reversed(posteriors), reversed(latents), strict=True):
            for b, stack in enumerate(stacks):
                stack.push(integers[b, grid.tells], grid.model, *q.of(b, grid.tells))
        return images

    def _grid(self, groups: TopDown, g: int, rounding: Rounding) -> Grid:
        """Of the next group, the g-th."""
        assert self.bits_of_grids is not None
        return Grid(groups.prior(), self.bits_of_grids[g], rounding, self.starts[g])

    def _drawn(self, grid: Grid, coded: Coded, stacks: Sequence[Stack], dice: Sequence[Stack]) -> np.ndarray:
        """Integers (B, N) of a group, popped from the stacks; those that say nothing are drawn by dice."""
        integers = np.empty((len(stacks), len(grid.tells)), dtype=np.int64)
        for b, (stack, die) in enumerate(zip(stacks, dice, strict=True)):
            integers[b, grid.tells] = stack.pop(grid.model, *coded.of(b, grid.tells))
            integers[b, ~grid.tells] = die.pop(grid.model, *grid.prior.of(b, ~grid.tells))
        return integers

    def _dice(self, numbers: Sequence[int]) -> list[Stack]:
        """What both sides draw by, for each image."""
        return [Stack.new(f"image {number}", self.start_words) for number in numbers]

    @property
    def _pixels_place(self) -> int:
        return int(self.starts[-1])


class Codes(Coder):
    """Discrete latents, which an image alone decides: pixels are pushed, then the codes as the prior has them."""

    LOGIT_STEPS = 256
    """What logits are rounded to."""

    def push(
        self, stacks: Sequence[Stack], images: np.ndarray, numbers: Sequence[int], labels: Labels = None
    ) -> list[dict[int, bool]]:
        """Pushes pixels, then codes, the last one first."""
        rounding = Rounding(len(stacks))
        with exactly():
            x = self.seen(images)
            codes = torch.cat([map_.flatten(1) for map_ in self.model.codes_of(x)], dim=1)  # (B, S)
            chosen = iter(codes.unbind(1))
            probabilities: list[np.ndarray] = []

            def known(logits: Tensor) -> Tensor:
                probabilities.append(self._probabilities(logits, rounding, len(probabilities)))
                return next(chosen)

            self._push_pixels(stacks, images, self.model.unfold(known, len(images), labels), rounding)
        for b, stack in enumerate(stacks):
            stack.push(codes[b].numpy(), self._model, np.stack([of_all[b] for of_all in probabilities]))
        return rounding.noted

    def pop(
        self, stacks: Sequence[Stack], noted: Sequence[Corrections], numbers: Sequence[int], labels: Labels = None
    ) -> np.ndarray:
        """Pops codes, then pixels."""
        rounding, place = Rounding(len(stacks), noted), iter(range(self._codes))

        def popped(logits: Tensor) -> Tensor:
            probabilities = self._probabilities(logits, rounding, next(place))
            codes = [int(stack.pop(self._model, probabilities[b : b + 1])[0]) for b, stack in enumerate(stacks)]
            return torch.tensor(codes)

        with exactly():
            return self._pop_pixels(stacks, self.model.unfold(popped, len(stacks), labels), rounding)

    def _probabilities(self, logits: Tensor, rounding: Rounding, number: int) -> np.ndarray:
        """(B, K), in proportion, of the logits (B, K) of a code."""
        steps = rounding(self.LOGIT_STEPS * (logits - logits.amax(1, keepdim=True)), number * self.model.codes)
        return exponentials(steps, self.LOGIT_STEPS).astype(np.float64)

    @property
    def _model(self) -> Any:
        return library().model.Categorical(perfect=False)

    @property
    def _codes(self) -> int:
        return sum(int(torch.Size(shape).numel()) for shape in self.model.latent_shapes(1))

    @property
    def _pixels_place(self) -> int:
        return int(self._codes * self.model.codes)


def coder_of(model: Family[Any], bits: list[list[int | None]] | None = None, seen: np.ndarray | None = None) -> Coder:
    """For models of either kind of latents; `bits` and `seen` as `BitsBack` takes them.

    Raises UserError for a model that cannot compress.
    """
    return Codes(model) if model.latent_kind == "discrete" else BitsBack(model, bits, seen)
