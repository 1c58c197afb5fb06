"""What the model section of every family's config has."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..bricks.likelihoods import LikelihoodConfig
from ..core.config import Config


class ModelConfig(Config):
    takes_squared_error: ClassVar[bool] = False
    """Whether the family makes sense without a likelihood."""

    family: str
    """Which family of models: `nvae`, or `package.module:Class` for one of your own."""
    image_size: int = Field(32, ge=1, le=65_536)
    """Height and width of the model's input in pixels, padding included."""
    image_channels: Literal[1, 3] = 3
    """1 for grey or binary images, 3 for RGB."""
    classes: int = Field(0, ge=0, le=2**20)
    """Classes that an image may be said to be of, numbered from 0. 0: the model takes no labels."""
    likelihood: LikelihoodConfig = LikelihoodConfig()

    @model_validator(mode="after")
    def _likelihood_fits(self) -> Self:
        if self.likelihood.kind == "bernoulli" and self.image_channels != 1:
            raise ValueError("likelihood.kind: bernoulli is for one-channel images, image_channels is 3")
        if self.likelihood.kind == "normal" and self.image_channels != 3:
            raise ValueError("likelihood.kind: normal is for RGB images, image_channels is 1")
        if self.likelihood.kind == "squared_error" and not self.takes_squared_error:
            raise ValueError(f"likelihood.kind: squared_error is no likelihood, which family {self.family} needs")
        if 2 * self.likelihood.border >= self.image_size:
            raise ValueError(f"likelihood.border: {self.likelihood.border} leaves nothing of {self.image_size} pixels")
        return self

    @property
    def visible_size(self) -> int:
        """Height and width of what counts of an image in pixels, without the border."""
        return self.image_size - 2 * self.likelihood.border

    def with_likelihood(self, **fields: Any) -> Self:
        """The same model with some fields of its likelihood changed."""
        return self.model_copy(update={"likelihood": self.likelihood.model_copy(update=fields)})

    @property
    def knows_unlabelled(self) -> bool:
        """Whether the model has learned images that it was told no class of."""
        return True

    def continuing(self, saved: "ModelConfig") -> Self:
        """The config of a run that goes on from weights whose config is `saved`: what is left open now is as it was."""
        return self

    @property
    def foundation(self) -> str | None:
        """A run or checkpoint whose model becomes a part of this one when a run begins; None where there is none."""
        return None

    def built_on(self, source: "ModelConfig") -> Self:
        """The config once that model's is known, to be kept. Raises UserError where they don't fit."""
        return self

    def without_places(self) -> Self:
        """The same model, nothing of whose config names a place on one machine."""
        return self

    def to_train_again(self) -> tuple[str, ...]:
        """Overrides with which the config of a trained model is that of a model to be trained; places in capitals."""
        return ()


class ConditionalConfig(ModelConfig):
    """Of a family that takes labels."""

    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of training an image without its class, so that the model is unconditional too."""

    @property
    def knows_unlabelled(self) -> bool:
        return self.classes == 0 or self.label_dropout > 0

    def idle(self) -> dict[str, str]:
        return {} if self.classes else {"label_dropout": "the model takes no classes"}
