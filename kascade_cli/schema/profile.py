"""The profile as a whole: checks across its layers, and reading and writing it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from kascade_cli import strict_yaml
from kascade_cli.errors import KascadeError
from kascade_cli.files import atomic_write, check_output, read_bounded
from kascade_cli.schema.base import MOST_LAYERS, PHASES, Phase, Strict
from kascade_cli.schema.budget import Budget
from kascade_cli.schema.layers import Heads, Layer, ModelCard
from kascade_cli.schema.text import first_problem, to_yaml

MAX_BYTES = 2 << 20  # of a file; the largest profile that we can think of has a third of it
V1, V2 = "kascade/v1", "kascade/v2"
_NUMBER_KEYS = ("budget", "ratios")


class Profile(Strict):
    """A complete decision for one model. Layer indices are absolute.

    Files of `kascade/v1` mean what they meant, and are written as v1 again; what is built is v2.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["kascade/v1", "kascade/v2"] = Field(alias="schema")
    algorithm: Literal["kascade"]
    model: ModelCard
    budget: Budget
    layers: list[Layer] = Field(max_length=MOST_LAYERS)
    selection: dict[str, Any]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _v1_holds_what_it_held(self):
        if self.schema_ == V1 and self.budget.ratios is not None:
            raise ValueError(f"budget.ratios: a table by context length needs `schema: {V2}`")
        if self.schema_ == V1 and self.model.fingerprint is None:
            raise ValueError(
                f"model: a profile without `fingerprint`, for every model of a geometry, needs `schema: {V2}`"
            )
        return self

    @model_validator(mode="after")
    def _all_head_maps_or_none(self):
        reuse = {index: layer for index, layer in enumerate(self.layers) if layer.role == "reuse"}
        missing = [index for index, layer in reuse.items() if layer.heads is None]
        if missing and self.schema_ == V1:
            raise ValueError(f"layers.{missing[0]}: a reuse layer needs `anchor` and `heads` (or `schema: {V2}`)")
        if missing and len(missing) < len(reuse):
            other = min(set(reuse) - set(missing))
            raise ValueError(
                f"layers.{missing[0]}: no `heads`, and layer {other} has them: either all reuse layers or none"
            )
        pooled = [index for index, layer in reuse.items() if layer.heads == "pooled"]
        if pooled and self.schema_ == V1:
            raise ValueError(f"layers.{pooled[0]}.heads: pooled key sets need `schema: {V2}`")
        if pooled and len(pooled) < len(reuse):
            other = min(set(reuse) - set(pooled))
            raise ValueError(f"layers.{pooled[0]}.heads: pooled, and not in layer {other}: either all or none")
        return self

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
                if layer.mapped:
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

    @property
    def heads_measured(self) -> bool:
        """Whether reuse layers have head maps; without, all heads of an anchor share one key set (pooled)."""
        return all(layer.mapped for layer in self.layers if layer.role == "reuse")

    @property
    def pooled(self) -> bool:
        """Whether all heads of an anchor share one key set because the profile says so, not for lack of head maps."""
        return any(layer.heads == "pooled" for layer in self.layers)

    def head_map(self, layer: int, phase: Phase) -> list[tuple[int, int]]:
        """Per KV head of reuse layer `layer`: (anchor layer, anchor head). Raises KascadeError if it has none."""
        if not self.layers[layer].mapped:
            raise KascadeError(f"layer {layer} of the profile for {self.model.name} has no head map")
        return self.layers[layer].entries(phase)

    def stays_within(self, ranks: int) -> bool:
        """Whether no head reads keys of another rank's heads, the KV heads split evenly and in order over `ranks`.

        Never without head maps: all heads of an anchor share one key set then.
        """
        if ranks < 1 or self.model.kv_heads % ranks or not self.heads_measured:
            return False
        size = self.model.kv_heads // ranks
        maps = (
            self.head_map(index, phase)
            for index, layer in enumerate(self.layers)
            if layer.role == "reuse"
            for phase in PHASES
        )
        return all(head // size == other // size for row in maps for head, (_, other) in enumerate(row))

    def dumps(self) -> str:
        """The YAML text; `loads(text).dumps() == text` for any text that dumps() wrote."""
        document = self.model_dump(by_alias=True, exclude_none=True, mode="json")
        if self.budget.ratios is not None:
            document["budget"]["ratios"] = dict(self.budget.ratios)  # numbers again, which JSON has no keys of
        return to_yaml(document)

    @classmethod
    def loads(cls, text: str, source: str = "profile") -> "Profile":
        """Parses and checks YAML text. Raises KascadeError that names `source` and the place in it."""
        if len(text) > MAX_BYTES:
            raise KascadeError(f"{source}: {len(text)} characters are no profile: the most is {MAX_BYTES}")
        try:
            document = strict_yaml.load(text, number_keys=_NUMBER_KEYS)
        except strict_yaml.YamlProblem as error:
            place = f"line {error.line}: " if error.line else ""
            raise KascadeError(f"{source}: {place}not readable as YAML: {error}") from error
        # Other files of ours have a schema too, such as a benchmark's result.
        schema = document.get("schema") if isinstance(document, dict) else None
        if not (isinstance(schema, str) and schema.startswith("kascade/")):
            raise KascadeError(f"{source}: not a kascade profile (expected a YAML mapping with `schema: {V2}`)")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise KascadeError(f"{source}: {first_problem(error, text)}") from error

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
        head_maps: Mapping[int, Mapping[str, Sequence[Any]] | Sequence[Any]] | Literal["pooled"] | None,
        budget: Budget | None = None,
        selection: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Profile":
        """Lays out every layer from the chosen anchors.

        `head_maps[layer][phase]` gives, for each KV head of a reuse layer, an anchor head (of the nearest anchor
        before it) or a pair (anchor layer, anchor head); `head_maps[layer]` may be one such list for both phases.
        "pooled": all heads of an anchor share one key set; None: they do, as none have been measured. Layers outside
        `profiled_layers` pass through. Raises KascadeError where that is no profile.
        """
        try:
            return cls._build(model, anchors, profiled_layers, head_maps, budget, selection, provenance)
        except ValidationError as error:
            raise KascadeError(f"no profile can be made: {first_problem(error)}") from error

    @classmethod
    def _build(
        cls,
        model: ModelCard,
        anchors: Sequence[int],
        profiled_layers: Sequence[int],
        head_maps: Mapping[int, Mapping[str, Sequence[Any]] | Sequence[Any]] | Literal["pooled"] | None,
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
                heads = head_maps if head_maps in (None, "pooled") else _heads(head_maps[index])
                layers.append(Layer(role="reuse", anchor=nearest, heads=heads))
        return cls(
            schema=V2,
            algorithm="kascade",
            model=model,
            budget=budget or Budget(),
            layers=layers,
            selection=dict(selection or {}),
            provenance=dict(provenance or {}),
        )


def _heads(given: Mapping[str, Sequence[Any]] | Sequence[Any]) -> Heads | list[Any]:
    return Heads(**{phase: list(given[phase]) for phase in PHASES}) if isinstance(given, Mapping) else list(given)
