"""Training examples that are made of others: mixed images and labels, and stored features that vary more."""

from __future__ import annotations

from pydantic import Field

from imbvlm.schema import Section


class MixingConfig(Section):
    """Images of a batch mixed with others of it, and their labels likewise; with both, each batch draws one of them."""

    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), from which a batch draws its share of the own image; 0: off",
    )
    cutmix: float = Field(0.0, ge=0, description="the same for a rectangle of another image pasted in; 0: off")

    @property
    def is_on(self) -> bool:
        """Whether anything is mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


class FeatureAugmentationConfig(Section):
    """Stored features that vary from step to step."""

    mixup: float = Field(0.0, ge=0, description="alpha of mixup of the tower's outputs and their labels; 0: off")
    transfer: float = Field(
        0.0,
        ge=0,
        le=2,
        description="how much of the variation within many-shot classes is added to images of all others; 0: off",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is changed at all."""
        return self.mixup > 0 or self.transfer > 0
