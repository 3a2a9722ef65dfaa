"""Switch the attention implementation of a model's text decoder, and of nothing else."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from kascade_cli.errors import KascadeError
from kascade_cli.models.tree import attention_modules, text_config, unwrap


def _decoder_configs(model: nn.Module) -> list[Any]:
    """Every config object that decides what the decoder's attention and its masks are, each once.

    The text config makes the masks; an attention module reads its own, which may be a copy.
    """
    configs = [text_config(model)]
    configs += [module.config for module in attention_modules(model).values() if hasattr(module, "config")]
    # A text model asks its own config for the mask too, where that is not the object above.
    for module in unwrap(model).modules():
        held = getattr(module, "config", None)
        if held is not None and getattr(held, "model_type", None) == configs[0].model_type:
            configs.append(held)
    return list({id(config): config for config in configs}.values())


@contextlib.contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Runs the text decoder's attention through `name` of transformers' attention interface.

    A vision or audio tower keeps its own. Leaving restores what each config held, whatever happened. `name` must be
    registered with both AttentionInterface and AttentionMaskInterface. Raises KascadeError if the model does not
    let its implementation be chosen.
    """
    inner = unwrap(model)
    if not (getattr(inner, "_supports_attention_backend", False) or inner._can_set_attn_implementation()):
        raise KascadeError(f"{type(inner).__name__} does not support transformers' attention interface")
    with contextlib.ExitStack() as stack:
        for config in _decoder_configs(model):
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            # Not `_attn_implementation`, whose setter reaches into the configs below it.
            config._attn_implementation_internal = name
        yield
