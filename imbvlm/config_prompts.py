"""Sentences around class names: given ones, and ones whose words are learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from imbvlm.schema import Section


class PromptsConfig(Section):
    """Sentences that turn a class name into text features; several are averaged."""

    templates: Literal["plain", "imagenet"] | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        "plain", description="plain: 'a photo of a {}.'; imagenet: open_clip's 80; or your own, each with one {}"
    )

    @field_validator("templates")
    @classmethod
    def _each_has_one_place(cls, templates: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if templates == ():
            raise ValueError("prompts.templates is an empty list; give at least one sentence with {}")
        wrong = [one for one in templates if one.count("{}") != 1] if isinstance(templates, tuple) else []
        if wrong:
            raise ValueError(f"template {wrong[0]!r} must have exactly one {{}} for the class name")
        return templates


class PromptTuningConfig(Section):
    """Learned context around the class names [CoOp]."""

    num_tokens: int | None = Field(
        None, ge=0, description="learned vectors; null: those of init_words, else 16 or a quarter of a shorter context"
    )
    position: Literal["end", "middle", "front"] = Field("end", description="where the class name stands among them")
    per_class: bool = Field(False, description="each class has context of its own")
    init_words: str | None = Field(None, description="words that the first vectors start from; null: at random")
    chunk_size: int = Field(256, ge=1, description="classes encoded at once; fewer need less memory")
