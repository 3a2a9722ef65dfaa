"""The profile: which layers are anchors, which heads reuse which, and with what budget. YAML, checked on load.

schema: kascade/v1
algorithm: kascade
model: {name: ..., fingerprint: sha256:..., layers: 16, query_heads: 8, kv_heads: 2, head_dim: 64}
budget: {ratio: 0.1, min_keys: 128, tile: 32}
layers:
  - {role: dense}
  - {role: reuse, anchor: 0, heads: {decode: [0, 1], prefill: [1, 1]}}
  - {role: anchor}
selection: {...}
provenance: {...}
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kascade_cli import strict_yaml
from kascade_cli.errors import KascadeError, plain
from kascade_cli.files import atomic_write, check_output, read_bounded

PHASES = ("decode", "prefill")
Phase = Literal["decode", "prefill"]

MAX_BYTES = 2 << 20  # of a file; the largest profile that we can think of has a third of it
_MOST_HEADS, _MOST_LAYERS = 4096, 4096  # one error for a list without end, not one for each entry
_LARGEST = 2**31 - 1  # counts and indices become int32 on a device
Index = Annotated[int, Field(ge=0, le=_LARGEST, strict=True)]
Count = Annotated[int, Field(ge=1, le=_LARGEST, strict=True)]
HeadEntry = Index | tuple[Index, Index]  # anchor head, or (anchor layer, anchor head) under free assignment


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelCard(_Strict):
    """What a profile was made for. `fingerprint` identifies architecture and weights (models.fingerprint)."""

    name: str = Field(max_length=4096)
    fingerprint: str = Field(pattern=r"^(v2-)?sha256:[0-9a-f]{64}$")
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Budget(_Strict):
    """How many keys a query may read: k(N) = min(N, max(min_keys, ceil(ratio * N))).

    The ratio and the floor are the paper's (section 3), which leaves the rounding open; its public code rounds down.
    """

    ratio: float = Field(0.10, gt=0, le=1, strict=True)
    min_keys: Count = 128
    tile: Count = 32

    def count(self, visible: int) -> int:
        """Keys chosen among `visible` ones."""
        return min(visible, max(self.min_keys, math.ceil(self.ratio * visible - 1e-6)))


class Heads(_Strict):
    """For each KV head of a reuse layer, the anchor head whose keys it reads, per phase."""

    decode: list[HeadEntry] = Field(max_length=_MOST_HEADS)
    prefill: list[HeadEntry] = Field(max_length=_MOST_HEADS)


class Layer(_Strict):
    """One decoder layer's role. `anchor` and `heads` belong to reuse layers only."""

    role: Literal["dense", "anchor", "reuse", "passthrough"]
    anchor: Index | None = None
    heads: Heads | Annotated[list[HeadEntry], Field(max_length=_MOST_HEADS)] | None = None

    @model_validator(mode="after")
    def _fields_fit_role(self):
        if self.role == "reuse" and (self.anchor is None or self.heads is None):
            raise ValueError("a reuse layer needs `anchor` and `heads`")
        if self.role != "reuse" and (self.anchor is not None or self.heads is not None):
            raise ValueError(f"`anchor` and `heads` belong to reuse layers, not to role {self.role}")
        return self

    def entries(self, phase: Phase) -> list[tuple[int, int]]:
        """Per KV head, (anchor layer, anchor head). Only for reuse layers."""
        heads = getattr(self.heads, phase) if isinstance(self.heads, Heads) else self.heads
        return [entry if isinstance(entry, tuple) else (self.anchor, entry) for entry in heads]


class Profile(_Strict):
    """A complete decision for one model. Layer indices are absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["kascade/v1"] = Field(alias="schema")
    algorithm: Literal["kascade"]
    model: ModelCard
    budget: Budget
    layers: list[Layer] = Field(max_length=_MOST_LAYERS)
    selection: dict[str, Any]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _layers_are_consistent(self):
        card = self.model
        if len(self.layers) != card.layers:
            raise ValueError(f"layers: {len(self.layers)} entries, but the model has {card.layers} layers")
        writers: set[int] = set()
        for index, layer in enumerate(self.layers):
            if layer.role == "dense":
                if writers:
                    raise ValueError(f"layers.{index}: only the first full-attention layer may be dense")
                writers.add(index)
            elif layer.role == "anchor":
                if not writers:
                    raise ValueError(f"layers.{index}: the first full-attention layer must have role dense")
                writers.add(index)
            elif layer.role == "reuse":
                if layer.anchor not in writers:
                    raise ValueError(
                        f"layers.{index}.anchor: layer {layer.anchor} is not an anchor before layer {index}"
                    )
                self._check_heads(index, layer, writers)
        if not writers:
            raise ValueError("layers: no layer is dense or an anchor")
        return self

    def _check_heads(self, index: int, layer: Layer, writers: set[int]) -> None:
        for phase in PHASES:
            place = f"layers.{index}.heads" + (f".{phase}" if isinstance(layer.heads, Heads) else "")
            entries = layer.entries(phase)
            if len(entries) != self.model.kv_heads:
                raise ValueError(f"{place}: {len(entries)} heads, but the model has {self.model.kv_heads} KV heads")
            for position, (anchor, head) in enumerate(entries):
                if anchor not in writers:
                    raise ValueError(f"{place}.{position}: layer {anchor} is not an anchor before layer {index}")
                if head >= self.model.kv_heads:
                    raise ValueError(f"{place}.{position}: head {head} is out of range 0..{self.model.kv_heads - 1}")

    @property
    def anchors(self) -> list[int]:
        """Layers that write indices, the dense first one included, in order."""
        return [index for index, layer in enumerate(self.layers) if layer.role in ("dense", "anchor")]

    @property
    def attention_layers(self) -> list[int]:
        """Full-attention layers: all but the passthrough ones."""
        return [index for index, layer in enumerate(self.layers) if layer.role != "passthrough"]

    def head_map(self, layer: int, phase: Phase) -> list[tuple[int, int]]:
        """Per KV head of reuse layer `layer`: (anchor layer, anchor head)."""
        return self.layers[layer].entries(phase)

    def dumps(self) -> str:
        """The YAML text; `loads(text).dumps() == text` for any text that dumps() wrote."""
        document = self.model_dump(by_alias=True, exclude_none=True, mode="json")
        return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)

    @classmethod
    def loads(cls, text: str, source: str = "profile") -> "Profile":
        """Parses and checks YAML text. Raises KascadeError that names `source` and the place in it."""
        if len(text) > MAX_BYTES:
            raise KascadeError(f"{source}: {len(text)} characters are no profile: the most is {MAX_BYTES}")
        try:
            document = strict_yaml.load(text)
        except strict_yaml.YamlProblem as error:
            place = f"line {error.line}: " if error.line else ""
            raise KascadeError(f"{source}: {place}not readable as YAML: {error}") from error
        # Other files of ours have a schema too, such as a benchmark's result.
        schema = document.get("schema") if isinstance(document, dict) else None
        if not (isinstance(schema, str) and schema.startswith("kascade/")):
            raise KascadeError(f"{source}: not a kascade profile (expected a YAML mapping with `schema: kascade/v1`)")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise KascadeError(f"{source}: {_first_problem(error, text)}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Reads a profile. Raises KascadeError if the file is missing, unreadable or wrong."""
        try:
            text = read_bounded(path, MAX_BYTES, "profile").decode("utf-8")
        except UnicodeDecodeError as error:
            raise KascadeError(f"cannot read profile {path}: not a text file") from error
        return cls.loads(text, str(path))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the file whole or not at all, and only what `load` takes.

        Raises UsageError if it exists and `overwrite` is not set, KascadeError if it cannot be written or read back.
        """
        check_output(path, overwrite)
        atomic_write(path, self.checked_dumps(), overwrite=overwrite)

    def checked_dumps(self) -> str:
        """`dumps()`, after a check that it reads back as this profile. Raises KascadeError."""
        try:
            text = self.dumps()
        except (yaml.YAMLError, ValueError) as error:
            raise KascadeError(f"the profile holds something that YAML has no word for: {error}") from error
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise KascadeError(f"the profile takes {len(text)} bytes, more than the {MAX_BYTES} of any that is read")
        if self.loads(text, "the profile that would be written").dumps() != text:
            raise KascadeError("the profile does not read back as it would be written")
        return text

    @classmethod
    def build(
        cls,
        *,
        model: ModelCard,
        anchors: Sequence[int],
        profiled_layers: Sequence[int],
        head_maps: Mapping[int, Mapping[str, Sequence[Any]]],
        budget: Budget | None = None,
        selection: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Profile":
        """Lays out every layer from the chosen anchors.

        `head_maps[layer][phase]` gives, for each KV head of a reuse layer, an anchor head (of the nearest anchor
        before it) or a pair (anchor layer, anchor head). Layers outside `profiled_layers` pass through. Raises
        KascadeError where that is no profile.
        """
        try:
            return cls._build(model, anchors, profiled_layers, head_maps, budget, selection, provenance)
        except ValidationError as error:
            raise KascadeError(f"no profile can be made: {_first_problem(error)}") from error

    @classmethod
    def _build(
        cls,
        model: ModelCard,
        anchors: Sequence[int],
        profiled_layers: Sequence[int],
        head_maps: Mapping[int, Mapping[str, Sequence[Any]]],
        budget: Budget | None,
        selection: Mapping[str, Any] | None,
        provenance: Mapping[str, Any] | None,
    ) -> "Profile":
        chosen = sorted(anchors)
        layers = []
        for index in range(model.layers):
            if index not in profiled_layers:
                layers.append(Layer(role="passthrough"))
            elif index == chosen[0]:
                layers.append(Layer(role="dense"))
            elif index in chosen:
                layers.append(Layer(role="anchor"))
            else:
                nearest = max((anchor for anchor in chosen if anchor < index), default=None)
                maps = {phase: list(head_maps[index][phase]) for phase in PHASES}
                layers.append(Layer(role="reuse", anchor=nearest, heads=Heads(**maps)))
        return cls(
            schema="kascade/v1",
            algorithm="kascade",
            model=model,
            budget=budget or Budget(),
            layers=layers,
            selection=dict(selection or {}),
            provenance=dict(provenance or {}),
        )


class _Dumper(yaml.SafeDumper):
    """Block style for the document, one line per layer and per short mapping."""

    def represent_sequence(self, tag, sequence, flow_style=None):
        scalar = all(not isinstance(item, dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=True if scalar else flow_style)

    def represent_mapping(self, tag, mapping, flow_style=None):
        leaf = (
            "role" in mapping or set(mapping) <= {"decode", "prefill"} or set(mapping) == {"ratio", "min_keys", "tile"}
        )
        return super().represent_mapping(tag, mapping, flow_style=True if leaf and mapping else flow_style)

    def ignore_aliases(self, data):
        return True


def _first_problem(error: ValidationError, text: str | None = None) -> str:
    """One line: line number where it can be found in the YAML `text`, place, reason."""
    # A misspelt key is also a missing one; the unknown key says where to look.
    problem = min(
        error.errors(include_url=False, include_input=False), key=lambda entry: entry["type"] != "extra_forbidden"
    )
    # Names of union members that pydantic adds to the place mean nothing to the reader of a YAML file.
    noise = {"Heads", "int", "constrained-int", "schema_"}
    location = [
        str(part)
        for part in problem["loc"]
        if str(part) not in noise and not str(part).startswith(("list[", "tuple["))
    ]
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        reason = "unknown key"
    if not location and (found := reason.split(":")[0]).startswith("layers."):
        location, reason = found.split("."), reason.split(":", 1)[1].strip()
    line = strict_yaml.line_of(text, location) if text is not None else None
    place = plain(".".join(location), 200)
    return (f"line {line}: " if line else "") + (f"{place}: " if place else "") + reason
