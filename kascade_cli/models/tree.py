"""Where a causal LM keeps what kascade needs: its own config, its attention modules, its decoder layers."""

from typing import Any

from torch import nn

from kascade_cli.errors import KascadeError


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM inside of torch.compile's and PEFT's wrappers (adapters stay in its layers)."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def text_config(model: nn.Module) -> Any:
    """The language model's own config (multimodal models wrap it)."""
    return unwrap(model).config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Absolute layer index -> the self-attention module that calls transformers' attention interface."""
    found: dict[int, nn.Module] = {}
    for _, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "scaling") and type(module).__name__.endswith("Attention"):
            if index in found:
                raise KascadeError(
                    f"{type(unwrap(model)).__name__}: two attention modules are both layer {index} (cross attention, "
                    "or layers that share weights), which is not supported"
                )
            found[index] = module
    return dict(sorted(found.items()))


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Absolute layer index -> the decoder layer that holds its attention module."""
    attention = {id(module): index for index, module in attention_modules(model).items()}
    found = {}
    for module in model.modules():
        for child in module.children():
            if id(child) in attention:
                found[attention[id(child)]] = module
    return dict(sorted(found.items()))


def full_attention_layers(model: nn.Module) -> list[int]:
    """Absolute indices of the layers whose attention is full and causal."""
    config = text_config(model)
    modules = attention_modules(model)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [index for index in modules if kinds[index] == "full_attention"]
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return []
    return list(modules)
