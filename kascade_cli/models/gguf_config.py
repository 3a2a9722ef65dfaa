"""The config of a GGUF file: what transformers makes of its metadata, and what transformers leaves out."""

import math
from typing import Any

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.models.gguf_file import GgufHeader

# llama.cpp needs these; without them transformers would take the family's defaults, another model's numbers.
_REQUIRED = ("block_count", "embedding_length", "attention.head_count")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_DEFAULT_THETA = 10000.0  # llama.cpp's where the file has none
_ROPE_FACTORS = "rope_freqs.weight"
# What `llama3` scaling is made of, in every model that has it.
_LOW, _HIGH, _LLAMA3_LENGTHS = 1.0, 4.0, (8192, 4096, 16384, 32768, 2048)


def complete_config(config: Any, header: GgufHeader, name: str) -> Any:
    """`config`, which transformers made from the header, with what it left out: the heads' size, rope scaling.

    Numbers that GGUF holds as float32 get the decimal that they were made from (1e-05, not 9.999999747378752e-06), so
    that a checkpoint and its unquantised GGUF are one model to the fingerprint. Raises KascadeError for a file that
    says too little, or scales its rope in a way that cannot be restored: the model would be another one.
    """
    for key in _REQUIRED:
        if header.get(key) is None:
            raise KascadeError(f"{name}: the GGUF lacks {header.architecture}.{key}; it is damaged or not complete")
    if header.architecture == "llama" and header.get("expert_count"):
        raise KascadeError(f"{name}: a mixture of experts as a 'llama' GGUF, which transformers cannot read")
    if not config.vocab_size:
        config.vocab_size = header.metadata.get("tokenizer.ggml.tokens", 0)
    if (head_dim := header.get("attention.key_length")) and getattr(config, "head_dim", None):
        config.head_dim = head_dim  # which transformers does not read for every family
    for key in _EPSILONS:
        if isinstance(value := getattr(config, key, None), float):
            setattr(config, key, _decimal(value))
    if rope := getattr(config, "rope_parameters", None):
        _complete_rope(config, rope.get("full_attention", rope), header, name)
    return config


def _decimal(value: float) -> float:
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


def _complete_rope(config: Any, rope: dict[str, Any], header: GgufHeader, name: str) -> None:
    """Writes into `rope`, the part of rope_parameters that full attention uses."""
    if "rope_theta" in rope:
        rope["rope_theta"] = _decimal(header.get("rope.freq_base", _DEFAULT_THETA))
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 1.0))
    factors = next((tensor for tensor in header.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        divisors = np.fromfile(header.path, "<f4", math.prod(factors.shape), offset=factors.start)
        rope.update(_llama3(divisors, rope["rope_theta"], name))
    elif kind == "yarn":
        original = header.get("rope.scaling.original_context_length")
        if original is None:
            raise KascadeError(f"{name}: the GGUF's yarn scaling lacks its original length; it is not complete")
        rope.update(rope_type="yarn", factor=_decimal(factor), original_max_position_embeddings=original)
    elif kind == "linear" or kind == "none" and factor not in (0.0, 1.0):
        rope.update(rope_type="linear", factor=_decimal(factor))
    elif kind != "none" or any(tensor.name.startswith("rope_factors") for tensor in header.tensors):
        raise KascadeError(
            f"{name}: its rope is scaled ({kind}) in a way that transformers does not read from a GGUF; "
            "use the model's safetensors checkpoint"
        )


def _llama3(factors: np.ndarray, theta: float, name: str) -> dict[str, Any]:
    """The `llama3` scaling that divides frequencies by `factors` (float32 [head_dim / 2]), all that a GGUF holds."""
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    wavelengths = 2 * math.pi / frequencies
    largest = float(factors.max())
    for length in _LLAMA3_LENGTHS:
        smooth = np.clip((length / wavelengths - _LOW) / (_HIGH - _LOW), 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": length,
            }
    raise KascadeError(
        f"{name}: its rope has factors of its own that no scaling of transformers gives; "
        "use the model's safetensors checkpoint"
    )


def check_fits(config: Any, model: Any, header: GgufHeader, name: str) -> None:
    """Raises KascadeError if the file's weights are not as many as those of `model`, which may be on the meta device.

    transformers passes over weights that it has no place for (attention biases, say) without a word.
    """
    layers = config.get_text_config(decoder=True).num_hidden_layers
    held = 0
    for tensor in header.tensors:
        part = tensor.name.split(".")
        beyond = part[0] == "blk" and part[1:2] and part[1].isdigit() and int(part[1]) >= layers  # predicts ahead
        if not beyond and not tensor.name.startswith("rope_"):
            held += math.prod(tensor.shape)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if held != needed:
        raise KascadeError(
            f"{name}: the file holds {held:,} weights, but a {type(model).__name__} has {needed:,}: "
            "transformers would leave some out; use the model's safetensors checkpoint"
        )
