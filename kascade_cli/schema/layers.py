"""What a profile was made for, and what every layer does."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kascade_cli.schema.base import MOST_HEADS, Count, Index, Phase, Strict

HeadEntry = Index | tuple[Index, Index]  # anchor head, or (anchor layer, anchor head) under free assignment


class ModelCard(Strict):
    """What a profile was made for. `fingerprint` identifies architecture and weights (models.fingerprint).

    Without one the profile is for every model of this geometry.
    """

    name: str = Field(max_length=4096)
    fingerprint: str | None = Field(None, pattern=r"^(v2-)?sha256:[0-9a-f]{64}$")
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Heads(Strict):
    """For each KV head of a reuse layer, the anchor head whose keys it reads, per phase."""

    decode: list[HeadEntry] = Field(max_length=MOST_HEADS)
    prefill: list[HeadEntry] = Field(max_length=MOST_HEADS)


class Layer(Strict):
    """One decoder layer's role. `anchor` and `heads` belong to reuse layers only.

    `heads: pooled`: all heads read the one key set that the anchor's heads choose together. A reuse layer without
    `heads` runs so too, as its head map has not been measured (Profile.heads_measured).
    """

    role: Literal["dense", "anchor", "reuse", "passthrough"]
    anchor: Index | None = None
    heads: Heads | Annotated[list[HeadEntry], Field(max_length=MOST_HEADS)] | Literal["pooled"] | None = None

    @property
    def mapped(self) -> bool:
        """Whether it has a head map."""
        return self.heads is not None and self.heads != "pooled"

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_in_words(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "pooled":
            raise ValueError(f"'{value[:40]}' is neither a head map nor `pooled`")
        return value

    @model_validator(mode="after")
    def _fields_fit_role(self):
        if self.role == "reuse" and self.anchor is None:
            raise ValueError("a reuse layer needs `anchor`")
        if self.role != "reuse" and (self.anchor is not None or self.heads is not None):
            raise ValueError(f"`anchor` and `heads` belong to reuse layers, not to role {self.role}")
        return self

    def entries(self, phase: Phase) -> list[tuple[int, int]]:
        """Per KV head, (anchor layer, anchor head). Only for reuse layers that have a head map."""
        assert self.mapped
        heads = getattr(self.heads, phase) if isinstance(self.heads, Heads) else self.heads
        return [entry if isinstance(entry, tuple) else (self.anchor, entry) for entry in heads]
