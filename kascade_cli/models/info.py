"""What kascade needs to know of a model, and which models it refuses."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kascade_cli.errors import KascadeError
from kascade_cli.models.identity import fingerprint
from kascade_cli.models.tree import attention_modules, full_attention_layers, text_config, unwrap
from kascade_cli.schema import ModelCard

# Attributes of attention modules that compute something else than softmax(scale * q k) v.
_UNSUPPORTED = {
    "is_cross_attention": "cross attention",
    "lambda_init": "differential attention, two softmaxes a layer,",  # DiffLlama
    "prepare_dynamic_mask": "a mask made of the keys' content",  # Doge
}


@dataclass(frozen=True)
class ModelInfo:
    """What kascade needs to know of a model. `profiled_layers` are its full-attention layers (absolute indices).

    fingerprint: None where the weights have not been loaded (`outline`).
    """

    name: str
    fingerprint: str | None
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


def check_supported(model: nn.Module, name: str) -> None:
    """Raises KascadeError, with the reason, if the model's attention is not one that kascade can run.

    Weights are not looked at: a model on the meta device will do.
    """
    model = unwrap(model)
    modules = attention_modules(model)
    if not modules:
        raise KascadeError(f"{name}: no attention layer found that goes through transformers' attention interface")
    if getattr(text_config(model), "attn_logit_softcapping", None):
        raise KascadeError(f"{name}: attention logit soft-capping is not supported; choose a model without it")
    for index, module in modules.items():
        for attribute, what in _UNSUPPORTED.items():
            if getattr(module, attribute, None):
                raise KascadeError(f"{name}: {what} (layer {index}) is not supported")
        if getattr(module, "sinks", None) is not None:
            raise KascadeError(f"{name}: attention sinks (layer {index}) are not supported")
    if not (getattr(model, "_supports_attention_backend", False) or model._can_set_attn_implementation()):
        raise KascadeError(f"{name}: {type(model).__name__} does not support transformers' attention interface")
    if not full_attention_layers(model):
        raise KascadeError(f"{name}: {_why_none_is_full(model)}; there is no full attention to sparsify")


def _why_none_is_full(model: nn.Module) -> str:
    kinds = getattr(text_config(model), "layer_types", None)
    found = {"sliding_attention"} if kinds is None else {kinds[index] for index in attention_modules(model)}
    if all("sliding" in kind or "chunked" in kind for kind in found):
        return "every attention layer uses a sliding window"
    if found == {"indexed_attention"}:
        return "every attention layer chooses its keys with an indexer of its own (sparse attention already)"
    if found == {"hybrid"}:
        return "every layer mixes attention with a state-space block (layer type 'hybrid'), which is not supported"
    return f"its attention layers are of type {', '.join(sorted(found))}"


def describe(model: nn.Module, name: str | None = None) -> ModelInfo:
    """Geometry, full-attention layers and fingerprint of a causal LM.

    Raises KascadeError if the model uses attention that kascade cannot run (soft-capping, sinks, cross attention,
    only sliding windows, or an implementation outside transformers' attention interface).
    """
    name = name or getattr(model, "name_or_path_given", None) or model.config._name_or_path or type(model).__name__
    check_supported(model, name)
    return _info(model, name, fingerprint(model))


def outline(config: Any, name: str, *, trust_remote_code: bool = False) -> ModelInfo:
    """`describe` from the config alone: a model without weights is built, and the fingerprint is None.

    Raises KascadeError for what `describe` refuses, and where the config makes no model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise KascadeError(f"{name}: its config makes no model: {' '.join(str(error).split())[:300]}") from error
    check_supported(model, name)
    return _info(model, name, None)


def _info(model: nn.Module, name: str, found: str | None) -> ModelInfo:
    config = text_config(model)
    layers = full_attention_layers(model)
    module = attention_modules(model)[layers[0]]
    query_heads = config.num_attention_heads
    kv_heads = query_heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // query_heads
    return ModelInfo(
        name=name,
        fingerprint=found,
        layers=config.num_hidden_layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        profiled_layers=layers,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
