"""Configs of the vector-quantised family (spec_vqvae §2–§4)."""

import math
from pathlib import PurePath
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...bricks.quantiser import QuantiserConfig
from ...core.errors import UserError
from ..config import ConditionalConfig, ModelConfig
from .network import Shape
from .pixelsnail import MapShape, PixelSNAILConfig


class VQVAEConfig(ModelConfig):
    """Stage 1: encoder, codebooks and decoder; codes count as uniform."""

    takes_squared_error: ClassVar[bool] = True

    family: Literal["vqvae"] = "vqvae"
    """Which family of models."""
    factors: tuple[int, ...] = (4,)
    """How many times smaller each level's map of codes is than what lies below it, the finest level first: `[4]` is a
    VQ-VAE, `[4, 2]` a VQ-VAE-2 of two levels. Powers of 2."""
    channels: int = Field(128, ge=2, le=65_536)
    """Channels between residual blocks, c."""
    residual_channels: int = Field(64, ge=1, le=65_536)
    """Channels inside them, r."""
    blocks: int = Field(2, ge=0, le=1000)
    """Residual blocks of each encoder and each decoder."""
    relu_before_blocks: bool = False
    """Whether encoders have one more ReLU before their blocks, as Sonnet's have."""
    quantiser: QuantiserConfig = QuantiserConfig()
    commitment: float = Field(0.25, ge=0)
    """Weight of the commitment loss, the mean squared distance of vectors from their codes, β."""
    variance: float = Field(1.0, gt=0)
    """Of the training images' pixels on the [−1, 1] scale: the squared error is divided by it."""

    @model_validator(mode="after")
    def _possible(self) -> "VQVAEConfig":
        if not self.factors:
            raise ValueError("factors: at least one level")
        for factor in self.factors:
            if factor < 2 or factor & (factor - 1):
                raise ValueError(f"factors: {factor} is not a power of 2 from 2 on")
        if self.image_size % math.prod(self.factors):
            raise ValueError(f"factors: {list(self.factors)} do not divide the {self.image_size} pixels of image_size")
        if self.classes:
            raise ValueError("classes: codes know no classes, their prior (family vqvae_prior) may; leave it at 0")
        if self.likelihood.kind != "squared_error" and self.variance != 1:
            raise ValueError(f"variance: is {self.variance}, but only a squared error is divided by it")
        return self

    @property
    def shape(self) -> Shape:
        """Of each level's network."""
        return Shape(self.channels, self.residual_channels, self.blocks, self.relu_before_blocks)

    @property
    def maps(self) -> list[MapShape]:
        """The maps of codes, top-down."""
        sides = [self.image_size // math.prod(self.factors[: number + 1]) for number in range(len(self.factors))]
        return [MapShape(self.quantiser.codes, side, side) for side in reversed(sides)]


class VQVAEPriorConfig(ConditionalConfig):
    """Stage 2: learned priors of the codes of a trained stage 1, which is frozen and becomes part of the model."""

    takes_squared_error: ClassVar[bool] = True

    family: Literal["vqvae_prior"] = "vqvae_prior"
    """Which family of models."""
    codes: str
    """A checkpoint or run folder of stage 1, or of stage 2 to keep the priors of its other levels, read when a run
    begins; what it holds is then part of the run's own checkpoints."""
    first_stage: VQVAEConfig | None = None
    """Its config, kept here when a run begins."""
    levels: tuple[PixelSNAILConfig | None, ...] = (PixelSNAILConfig(),)
    """The priors, top-down, or one for all levels; none: uniform."""
    level: int | None = Field(None, ge=0)
    """The only level whose prior is trained, 0 the top; the others are as `codes` has them. None: all."""
    guidance: float = Field(0.0, ge=0)
    """How far samples of a class go away from those of none, w: logits are (1 + w) times the class's less w times
    none's."""
    posterior_temperature: float = Field(0.0, ge=0)
    """0: an image has one code, and one draw its whole bound. τ above: codes are drawn with probability
    ∝ exp(−‖v − e‖² / (τ · mean smallest distance)), in training too, and importance samples tighten the bound."""
    train_decoder: bool = False
    """Whether the decoder of the image trains on beside the priors, the codes staying as they are."""

    @model_validator(mode="after")
    def _guided_from_classes(self) -> "VQVAEPriorConfig":
        if self.guidance and not self.classes:
            raise ValueError(f"guidance: is {self.guidance:g}; only samples of a class are guided, and classes is 0")
        return self

    @property
    def foundation(self) -> str | None:
        return None if self.first_stage is not None else self.codes

    def built_on(self, source: ModelConfig) -> "VQVAEPriorConfig":
        """With the first stage of a model of either stage, and one prior a level. Raises UserError where they disagree.

        With `level` the other levels' priors are the source's, uniform where it has none.
        """
        if isinstance(source, VQVAEConfig):
            first, priors = source, None
        elif isinstance(source, VQVAEPriorConfig) and source.first_stage is not None:
            first, priors = source.first_stage, source.levels
        else:
            raise UserError(f"model.codes: a model of family '{source.family}', not of 'vqvae' or 'vqvae_prior'")
        first = first.with_likelihood(edge=self.likelihood.edge)
        for field in ("image_size", "image_channels", "likelihood"):
            found, own = getattr(first, field), getattr(self, field)
            if found != own:
                raise UserError(f"model.{field}: is {own}, but the first stage of model.codes has {found}")
        return self.model_copy(update={"first_stage": first, "levels": self._levels_of(len(first.factors), priors)})

    def without_places(self) -> "VQVAEPriorConfig":
        """With the name alone of what it was built on, which is a part of it."""
        return self.model_copy(update={"codes": PurePath(self.codes).name})

    def to_train_again(self) -> tuple[str, ...]:
        """On top of a first stage, which is trained before."""
        return ("model.codes=FIRST_STAGE", "model.first_stage=null")

    def with_likelihood(self, **fields: Any) -> "VQVAEPriorConfig":
        """The first stage's likelihood changes along."""
        first = None if self.first_stage is None else self.first_stage.with_likelihood(**fields)
        return super().with_likelihood(**fields).model_copy(update={"first_stage": first})

    def _levels_of(
        self, count: int, kept: tuple[PixelSNAILConfig | None, ...] | None
    ) -> tuple[PixelSNAILConfig | None, ...]:
        if len(self.levels) not in (1, count):
            raise UserError(f"model.levels: {len(self.levels)} priors for {count} levels; give one, or one per level")
        own = self.levels * count if len(self.levels) == 1 else self.levels
        if self.level is None:
            return own
        if self.level >= count:
            raise UserError(f"model.level: is {self.level}, of {count} levels the last is {count - 1}")
        others = kept or (None,) * count
        return (*others[: self.level], own[self.level], *others[self.level + 1 :])

    def continuing(self, saved: ModelConfig) -> "VQVAEPriorConfig":
        """The config of a run that goes on: with its own first stage."""
        return self.built_on(saved) if self.first_stage is None and isinstance(saved, VQVAEPriorConfig) else self
