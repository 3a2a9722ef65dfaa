"""What identifies a model: its configuration and a sample of its weights."""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.models.tree import text_config, unwrap
from kascade_cli.partition import sharded

if TYPE_CHECKING:
    from kascade_cli.models.info import ModelInfo

VERSION = "v2-sha256"
_SAMPLE = 4096  # elements of each tensor; smaller ones enter whole
# Below float16's normal numbers: a bfloat16 checkpoint that is loaded in float16 loses digits there.
_SMALLEST = 2.0**-14

# Entries of a config that change no activation of inference: names, storage, training, generation.
_IMMATERIAL = {
    "architectures", "auto_map", "bad_words_ids", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
    "custom_pipelines", "dtype", "experts_implementation", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_factor", "initializer_range", "label2id", "layerdrop", "output_attentions", "output_hidden_states",
    "output_router_logits", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "router_z_loss_coef", "summary_type", "tie_word_embeddings", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip
_IMMATERIAL_ENDS = ("token_id", "token_ids", "token_index", "dropout", "_pdrop", "dropout_prob", "dropout_rate")
# Always in it, also where they are the family's defaults.
_ALWAYS = (
    "head_dim", "hidden_size", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rope_parameters",
)  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """`v2-sha256:...` over the text config and a sample of every weight; the same on every device.

    Of the config everything that shapes the residual stream counts: rope, norms, windows, multipliers, caps. What is
    a family's default is left out (but for the geometry), so that a release of transformers with a new option
    changes nothing. Of each parameter and persistent buffer 4096 elements spread over all of it count, rounded to
    bfloat16: a checkpoint saved in bfloat16 or float16 has one fingerprint in every dtype, one saved in float32 has
    one in float32 and bfloat16. Wrappers of torch.compile and PEFT, accelerate's offloading and tensor parallelism
    do not change it (all processes of a tensor parallel model call it together); adapters do once they are merged.
    Raises KascadeError for weights that are not there (the meta device).
    """
    digest = hashlib.sha256(_essence(text_config(model)))
    samples = {name: (tuple(tensor.shape), _sample(tensor)) for name, tensor in _weights(model)}
    for tied, source in (getattr(unwrap(model), "all_tied_weights_keys", None) or {}).items():
        if tied in samples and samples[tied] == samples.get(source):
            del samples[tied]  # two names of one tensor, which offloading takes apart
    for name, (shape, sample) in sorted(samples.items()):
        digest.update(f"{name} {shape}".encode() + sample)
    return f"{VERSION}:{digest.hexdigest()}"


def fingerprint_problem(found: str, info: "ModelInfo", *, name: str, what: str = "profile") -> str | None:
    """None if a profile or capture with fingerprint `found`, made for model `name`, is of `info`'s model, or why not.

    One line without advice, to be followed by what to do about it.
    """
    if found == info.fingerprint:
        return None
    if not found.startswith(f"{VERSION}:"):
        return (
            f"the {what} was made by an older version of kascade, whose fingerprint left out the configuration: "
            "profile the model again"
        )
    return f"the {what} was made for {name}, whose weights or configuration are not those of {info.name}"


def _essence(config: Any) -> bytes:
    """The entries that count, as JSON with sorted keys."""
    entries = config.to_dict()
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a config of remote code whose arguments have no defaults: everything counts
        defaults = {}
    chosen = {
        key: value
        for key, value in _material(entries).items()
        if key in _ALWAYS or key not in defaults or defaults[key] != entries[key]
    }
    return json.dumps(chosen, sort_keys=True, default=str).encode()


def _material(entries: dict[str, Any]) -> dict[str, Any]:
    """Without what changes no activation, in configs inside of it too."""
    return {
        key: _material(value) if isinstance(value, dict) else value
        for key, value in entries.items()
        if not (str(key).startswith("_") or key in _IMMATERIAL or str(key).endswith(_IMMATERIAL_ENDS))
    }


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the base model under its own names, adapters left out, whole and real."""
    model = unwrap(model)
    for path, module in model.named_modules():
        held = list(module.named_parameters(recurse=False))
        held += [
            (key, buffer)
            for key, buffer in module.named_buffers(recurse=False)
            if key not in module._non_persistent_buffers_set and not key.endswith("inv_freq")
        ]
        for key, tensor in held:
            name = _base_name(model, f"{path}.{key}" if path else key)
            if name is not None:
                yield name, _whole(model, path, key, tensor)


def _base_name(model: nn.Module, name: str) -> str | None:
    """The name that a tensor bears without compilation and adapters; None if it belongs to an adapter."""
    kept, module = [], model
    for part in name.split("."):
        # PEFT puts a layer of its own in place of the model's, which it keeps inside.
        inside = module._modules if hasattr(module, "adapter_layer_names") else {}
        original = next((inner for inner in ("base_layer", "original_module") if inner in inside), None)
        if original is not None and part != original:
            return None
        if original is None and part != "_orig_mod":
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def _whole(model: nn.Module, path: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor itself: gathered from all processes, or read from where it was offloaded to."""
    if sharded(tensor):
        return tensor.full_tensor()
    if not tensor.is_meta:
        return tensor
    names = [*path.split("."), key] if path else [key]
    for cut in range(len(names) - 1, -1, -1):  # the module itself, then those around it
        module = model.get_submodule(".".join(names[:cut]))
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            offloaded = getattr(each, "weights_map", None)
            if offloaded is not None:
                try:
                    return offloaded[".".join(names[cut:])]
                except KeyError:
                    continue
    raise KascadeError(
        f"weight {'.'.join(names)} is not loaded (it is on the meta device), so nothing can tell which model this is; "
        "load the model with its weights"
    )


def _sample(tensor: Tensor) -> bytes:
    """Elements spread evenly from the first to the last, as bfloat16; what is smaller than 2^-14 counts as 0."""
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), _SAMPLE)
    if count < len(flat):
        # Not a fixed step, which would fall on the same few columns of a matrix.
        flat = flat[(torch.arange(count) * (len(flat) - 1) // (count - 1)).to(flat.device)]
    rounded = flat.to("cpu", torch.float32).to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < _SMALLEST, 0.0, rounded).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().tobytes()
