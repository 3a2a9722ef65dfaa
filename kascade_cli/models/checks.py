"""What is wrong with a model that does not load, or loads and cannot be right: one line each."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kascade_cli.errors import KascadeError
from kascade_cli.models.info import check_supported

UNREACHABLE = "cannot load {}: no such folder, and the hub cannot be reached to look there"


def check_attention(config: Any, name: str, trust_remote_code: bool) -> nn.Module | None:
    """Refuses, on a model without weights, what `describe` would refuse once gigabytes are read.

    Gives that model, None if none can be built.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception:  # what is wrong with it shows again, and is told, when the weights are loaded
        return None
    check_supported(model, name)
    return model


def loading_problem(name: str, source: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        return f"{name}: the folder has no config.json, so it is not a saved model"
    if path.is_file():
        return f"{name}: a file; name the folder of a saved model, or a .gguf file"
    if "backend tokenizer" in text:
        return f"{name}: no tokenizer that can be read; save it beside the model (tokenizer.json)"
    if "couldn't connect to" in text:
        return UNREACHABLE.format(name)
    if not path.exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        return f"{name}: no such folder"
    if "config.json" in text and "gguf" in name.lower():
        return f"{name}: a repository of GGUF files; download one (hf download {name} FILE.gguf) and name the file"
    if "trust_remote_code" in text:
        return f"{name}: the model brings code of its own; read it, and pass --trust-remote-code to run it"
    if "does not support an attention implementation through" in text:
        return f"{name}: {text.split()[0]} does not support SDPA attention, and kascade needs it"
    if "Unrecognized configuration class" in text or "Unrecognized model" in text:
        return f"{name}: not a causal language model that transformers knows"
    return f"cannot load {name}: {text[:300]}"


def check_causal(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise KascadeError(f"{name}: encoder-decoder model; kascade needs a decoder-only (causal) language model")
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    architectures = getattr(config, "architectures", None) or []
    generative = any(
        "CausalLM" in entry or "LMHead" in entry or "ConditionalGeneration" in entry for entry in architectures
    )
    remote = bool(getattr(config, "auto_map", None))
    # BERT-like encoders have a causal class too; what was saved tells them apart, or `is_decoder` where nothing was.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if (
        encoder
        or architectures
        and not generative
        and not remote
        or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and not remote
    ):
        kind = architectures[0] if architectures else config.model_type
        raise KascadeError(f"{name}: {kind} is not a causal language model; kascade needs a decoder-only one")


def check_complete(missing: Iterable[str], name: str) -> None:
    """Raises KascadeError for weights that the checkpoint lacks: transformers fills them with random numbers."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise KascadeError(f"{name}: the checkpoint lacks {', '.join(names[:3])}{more}; it is damaged or not complete")


def check_finite(model: nn.Module, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: read when it is needed
            continue
        # A sum is finite unless an element is not (or float32 overflows, which weights never do).
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            raise KascadeError(f"{name}: weight {parameter_name} holds NaN or infinity; the checkpoint is damaged")
