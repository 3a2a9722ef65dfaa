"""Load a causal LM, describe its attention, and identify it by a fingerprint."""

import contextlib
import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models.info import check_supported

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNREACHABLE = "cannot load {}: no such folder, and the hub cannot be reached to look there"
_HUB_ATTEMPTS = (0, 1)  # seconds to wait before each


def resolve_name(name: str) -> str:
    """`demo` and `demo-small` are the models shipped with the package; anything else is a path or a hub id."""
    from kascade_cli.demo import DEMO_MODELS

    return str(DEMO_MODELS.get(name, name))


def check_revision(name: str, revision: str | None) -> None:
    """Raises UsageError for a revision of a model that does not come from the hub."""
    from kascade_cli.demo import DEMO_MODELS

    if revision is None:
        return
    if name in DEMO_MODELS:
        raise UsageError(f"{name} is shipped with the package and has no revisions: leave --revision out")
    if Path(name).exists():
        raise UsageError(f"{name} is a local folder, and --revision chooses a version on the hub: leave it out")


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises UsageError."""
    if device.split(":")[0] == "meta":
        raise UsageError("device 'meta' holds no weights, so nothing can run there; use --device cpu or auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' is not available here; use --device cpu or auto") from error
    return resolved


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """`auto` is what the checkpoint was saved in. Raises UsageError."""
    if dtype == "auto":
        return dtype
    if dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not known; use auto, float32, bfloat16 or float16")
    return _DTYPES[dtype]


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars, and no log line for every attempt to reach the hub: one error line is enough."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    retries = logging.getLogger("huggingface_hub.utils._http")
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_hub(name: str, revision: str | None) -> None:
    """Raises KascadeError if the hub is needed for `name` and refuses connections, which loading would retry for 25 s.

    A hub that is slow, or answers with an error, is left to the loading itself.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE or Path(name).exists():
        return
    try:
        url = hf_hub_url(name, "config.json", revision=revision)
        if try_to_load_from_cache(name, "config.json", revision=revision) is not None:
            return
    except HFValidationError:  # no hub id at all; loading says so without the hub
        return
    for wait in _HUB_ATTEMPTS:
        time.sleep(wait)
        try:
            get_hf_file_metadata(url)
        except Exception as error:
            # The hub's client raises the types of an HTTP library that changes with its version.
            if type(error).__name__ in ("ConnectError", "ConnectionError"):
                continue
        return
    raise KascadeError(_UNREACHABLE.format(name))


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a hub id, a folder or a built-in model: a decoder-only (causal) language model's.

    Raises KascadeError if it cannot be found or read, or is another kind of model's; UsageError for a revision of a
    local model.
    """
    from transformers import AutoConfig

    if not name.strip():
        raise UsageError("the model's name is empty: give a hub id, a folder, demo or demo-small")
    check_revision(name, revision)
    source = resolve_name(name)
    with _quiet_loading():
        _check_hub(source, revision)
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError) as error:
            raise KascadeError(_loading_problem(name, source, error)) from error
    _check_causal(config, name)
    return config


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """Loads (model, tokenizer) in evaluation mode with SDPA attention, the weights straight to where they run.

    `device_map="auto"` lets accelerate spread the layers over all GPUs, then main memory (`device` must be auto).
    `notify` gets one line that says dtype, device and memory. `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and the like
    are honoured by transformers. Raises KascadeError if the model cannot be found or read, is not a causal LM that
    kascade can run (before its weights are read), lacks a weight, or has weights that are not finite; UsageError for
    a device or dtype that is not there, or a revision of a local model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    placement, target = _placement(device, device_map)
    source = resolve_name(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    element = resolve_dtype(dtype)
    config = load_config(name, **options)
    with _quiet_loading():
        _check_attention(config, name, trust_remote_code)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=element,
                attn_implementation="sdpa",
                device_map=placement,
                output_loading_info=True,
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise KascadeError(_loading_problem(name, source, error)) from error
    _check_complete(found["missing_keys"], name)
    if target is not None:
        model = model.to(target)
    _check_finite(model, name)
    model.name_or_path_given = name
    if notify is not None:
        notify(_loaded(model, name))
    return model.eval(), tokenizer


def _placement(device: str, device_map: str | None) -> tuple[Any, torch.device | None]:
    """(transformers' device_map, where to move the model once it is loaded).

    Without accelerate, which device maps need, weights are read to main memory first and then moved.
    """
    accelerate = find_spec("accelerate") is not None
    if device_map is None:
        target = torch.device("cpu") if device == "cpu" else resolve_device(device)
        return ({"": target}, None) if accelerate and target.type != "cpu" else (None, target)
    if device_map != "auto":
        raise UsageError(f"device map '{device_map}' is not known; use --device-map auto, or leave it out")
    if device != "auto":
        raise UsageError("--device-map auto chooses the devices itself: leave --device out")
    if not accelerate:
        raise KascadeError("--device-map needs accelerate: pip install 'kascade-cli[accelerate]'")
    return "auto", None


def _check_attention(config: Any, name: str, trust_remote_code: bool) -> None:
    """Refuses, on a model without weights, what `describe` would refuse once gigabytes are read."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception:  # what is wrong with it shows again, and is told, when the weights are loaded
        return
    check_supported(model, name)


def _loaded(model: nn.Module, name: str) -> str:
    """`demo: bfloat16, weights: 12.3 MB on cpu`."""
    size: Counter[str] = Counter()
    for parameter in model.parameters():
        size[str(parameter.device).replace("meta", "offloaded")] += parameter.numel() * parameter.element_size()
    where = ", ".join(f"{_bytes(count)} on {device}" for device, count in size.items())
    return f"{name}: {str(model.dtype).removeprefix('torch.')}, weights: {where}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _loading_problem(name: str, source: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        return f"{name}: the folder has no config.json, so it is not a saved model"
    if path.is_file():
        return f"{name}: a file; name the folder of a saved model"
    if "backend tokenizer" in text:
        return f"{name}: no tokenizer that can be read; save it beside the model (tokenizer.json)"
    if "couldn't connect to" in text:
        return _UNREACHABLE.format(name)
    if not path.exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        return f"{name}: no such folder"
    if "trust_remote_code" in text:
        return f"{name}: the model brings code of its own; read it, and pass --trust-remote-code to run it"
    if "does not support an attention implementation through" in text:
        return f"{name}: {text.split()[0]} does not support SDPA attention, and kascade needs it"
    if "Unrecognized configuration class" in text or "Unrecognized model" in text:
        return f"{name}: not a causal language model that transformers knows"
    return f"cannot load {name}: {text[:300]}"


def _check_causal(config: Any, name: str) -> None:
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


def _check_complete(missing: Iterable[str], name: str) -> None:
    """Raises KascadeError for weights that the checkpoint lacks: transformers fills them with random numbers."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise KascadeError(f"{name}: the checkpoint lacks {', '.join(names[:3])}{more}; it is damaged or not complete")


def _check_finite(model: nn.Module, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: read when it is needed
            continue
        # A sum is finite unless an element is not (or float32 overflows, which weights never do).
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            raise KascadeError(f"{name}: weight {parameter_name} holds NaN or infinity; the checkpoint is damaged")
