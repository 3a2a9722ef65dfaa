"""Load a causal LM, describe its attention, and identify it by a fingerprint."""

from kascade_cli.models.identity import fingerprint, fingerprint_problem
from kascade_cli.models.implementation import attention_implementation
from kascade_cli.models.info import ModelInfo, describe
from kascade_cli.models.loading import is_gguf, load_config, load_model, load_tokenizer
from kascade_cli.models.logits import logits_at
from kascade_cli.models.names import check_revision, resolve_name
from kascade_cli.models.placement import gpu_name, resolve_device, resolve_dtype
from kascade_cli.models.tree import attention_modules, decoder_layers, full_attention_layers, text_config, unwrap

__all__ = [
    "ModelInfo",
    "attention_implementation",
    "attention_modules",
    "check_revision",
    "decoder_layers",
    "describe",
    "fingerprint",
    "fingerprint_problem",
    "full_attention_layers",
    "gpu_name",
    "is_gguf",
    "load_config",
    "load_model",
    "load_tokenizer",
    "logits_at",
    "resolve_device",
    "resolve_dtype",
    "resolve_name",
    "text_config",
    "unwrap",
]
