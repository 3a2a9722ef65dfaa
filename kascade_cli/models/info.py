"""What kascade needs to know of a model, and which models it refuses."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kascade_cli.errors import KascadeError
from kascade_cli.models.identity import fingerprint
from kascade_cli.models.tree import attention_modules, full_attention_layers, text_config
from kascade_cli.schema import ModelCard


@dataclass(frozen=True)
class ModelInfo:
    """What kascade needs to know of a model. `profiled_layers` are its full-attention layers (absolute indices)."""

    name: str
    fingerprint: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    profiled_layers: list[int] = field(default_factory=list)
    max_positions: int | None = None

    @property
    def card(self) -> ModelCard:
        """The part that a profile carries."""
        return ModelCard(
            name=self.name,
            fingerprint=self.fingerprint,
            layers=self.layers,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )


def check_softcapping(config: Any, name: str) -> None:
    if getattr(config, "attn_logit_softcapping", None):
        raise KascadeError(f"{name}: attention logit soft-capping is not supported; choose a model without it")


def _check_supported(model: nn.Module, name: str) -> None:
    config = text_config(model)
    modules = attention_modules(model)
    if not modules:
        raise KascadeError(f"{name}: no attention layer found that goes through transformers' attention interface")
    if not (getattr(model, "_supports_attention_backend", False) or model._can_set_attn_implementation()):
        raise KascadeError(f"{name}: {type(model).__name__} does not support transformers' attention interface")
    check_softcapping(config, name)
    for index, module in modules.items():
        if getattr(module, "sinks", None) is not None:
            raise KascadeError(f"{name}: attention sinks (layer {index}) are not supported")
        if getattr(module, "is_cross_attention", False):
            raise KascadeError(f"{name}: cross attention (layer {index}) is not supported")
    if not full_attention_layers(model):
        raise KascadeError(
            f"{name}: every attention layer uses a sliding window; there is no full attention to sparsify"
        )


def describe(model: nn.Module, name: str | None = None) -> ModelInfo:
    """Geometry, full-attention layers and fingerprint of a causal LM.

    Raises KascadeError if the model uses attention that kascade cannot run (soft-capping, sinks, cross attention,
    only sliding windows, or an implementation outside transformers' attention interface).
    """
    name = name or getattr(model, "name_or_path_given", None) or model.config._name_or_path or type(model).__name__
    _check_supported(model, name)
    config = text_config(model)
    layers = full_attention_layers(model)
    module = attention_modules(model)[layers[0]]
    query_heads = config.num_attention_heads
    kv_heads = query_heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // query_heads
    return ModelInfo(
        name=name,
        fingerprint=fingerprint(model),
        layers=config.num_hidden_layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        profiled_layers=layers,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
