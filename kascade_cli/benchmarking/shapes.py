"""Attention shapes by name or numbers, and the random models that have them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Profile


@dataclass(frozen=True)
class Shape:
    """One model's attention: heads, head size, full-attention layers, and how many of those select keys.

    `anchors` counts the dense first layer. `config` names the transformers config class and its options, for shapes
    that can be built with random weights; `chosen` are published anchor layers; `max_positions` is how many positions
    the whole model has, where that is known.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    layers: int = 32
    anchors: int = 5
    config: tuple[str, dict[str, Any]] | None = None
    chosen: tuple[int, ...] = ()
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.head_dim) < 1 or self.query_heads % self.kv_heads:
            raise UsageError(
                f"shape {self.query_heads},{self.kv_heads},{self.head_dim}: the query heads must be a multiple of the "
                "KV heads, and all three above 0"
            )
        if not 1 <= self.anchors <= self.layers:
            raise UsageError(f"{self.anchors} anchors do not fit {self.layers} layers: use 1 to {self.layers}")

    def anchor_layers(self) -> list[int]:
        """Which layers select keys: the published ones, or `anchors` of them spread evenly from layer 0."""
        if len(self.chosen) == self.anchors:
            return list(self.chosen)
        return [i * self.layers // self.anchors for i in range(self.anchors)]


_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-5,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-6,
}
SHAPES: dict[str, Shape] = {
    "llama-3.1-8b": Shape("llama-3.1-8b", 32, 8, 128, 32, 5, ("LlamaConfig", _LLAMA), (0, 2, 8, 13, 14), 1 << 20),
    "qwen3-8b": Shape("qwen3-8b", 32, 8, 128, 36, 5, ("Qwen3Config", _QWEN), (0, 2, 7, 14, 23), 1 << 20),
}


def _demo() -> Shape:
    from kascade_cli.demo import DEMO_MODELS

    config = json.loads((DEMO_MODELS["demo"] / "config.json").read_text())
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads, layers, positions = (
        config[name] for name in ("num_key_value_heads", "num_hidden_layers", "max_position_embeddings")
    )
    return Shape("demo", heads, kv_heads, size, layers, 4, max_positions=positions)


def named_shape(name: str) -> Shape:
    """A shape by name (`llama-3.1-8b`, `qwen3-8b`, `demo`). Raises UsageError for an unknown one."""
    if name == "demo":
        return _demo()
    if name not in SHAPES:
        raise UsageError(f"shape '{name}' is not known: use H,G,D (such as 32,8,128), {', '.join(SHAPES)} or demo")
    return SHAPES[name]


def parse_shape(text: str) -> Shape:
    """`32,8,128` (query heads, KV heads, head size) or a name. Raises UsageError."""
    if "," not in text:
        return named_shape(text)
    try:
        query_heads, kv_heads, head_dim = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"shape '{text}' is not H,G,D: query heads, KV heads, head size, such as 32,8,128") from error
    return Shape(text.replace(" ", ""), query_heads, kv_heads, head_dim)


def shape_of_profile(profile: Profile) -> Shape:
    """The shape, layers and anchors that a profile was made for."""
    card = profile.model
    layers = profile.attention_layers
    chosen = tuple(layers.index(anchor) for anchor in profile.anchors)
    return Shape(card.name, card.query_heads, card.kv_heads, card.head_dim, len(layers), len(chosen), chosen=chosen)


def shape_of_model(name: str) -> Shape:
    """The shape of a hub id or folder, from its config alone.

    Raises KascadeError if the config cannot be read or is not a decoder-only model's.
    """
    from kascade_cli.models import load_config

    config = load_config(name).get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise KascadeError(f"{name}: its config names no attention heads")
    layers = sum(kind == "full_attention" for kind in kinds)
    if not layers:
        raise KascadeError(f"{name}: no layer has full attention")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = getattr(config, "max_position_embeddings", None)
    return Shape(name, heads, kv_heads, size, layers, min(5, layers), max_positions=positions)


def with_layers(shape: Shape, layers: int | None, anchors: int | None) -> Shape:
    """`shape` with another number of layers or anchors."""
    import dataclasses

    layers = shape.layers if layers is None else layers
    anchors = min(shape.anchors, layers) if anchors is None else anchors
    same = layers == shape.layers and anchors == shape.anchors
    return dataclasses.replace(shape, layers=layers, anchors=anchors, chosen=shape.chosen if same else ())


def random_model(shape: Shape, *, dtype: Any, device: Any, layers: int | None = None) -> Any:
    """A causal LM of a named shape with random weights, made on the device, in evaluation mode.

    dtype, device: torch's. layers: fewer decoder layers than the shape has. Raises UsageError for a shape without a
    whole model behind it.
    """
    import torch
    import transformers

    if shape.config is None:
        raise UsageError(f"shape {shape.name} says nothing of the rest of the model: use {', '.join(SHAPES)} or demo")
    kind, options = shape.config
    options = {**options, "num_hidden_layers": layers or shape.layers}
    config = getattr(transformers, kind)(**options)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def describe_sizes(batch: int, context: int) -> str:
    """`64 x 32k`."""
    return f"{batch} x {context // 1024}k" if context % 1024 == 0 else f"{batch} x {context}"


def cases(batches: Sequence[int], contexts: Sequence[int]) -> list[tuple[int, int]]:
    """Every (batch, context), longest batch first."""
    return [(batch, context) for context in contexts for batch in batches]
