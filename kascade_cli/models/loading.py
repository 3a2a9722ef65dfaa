"""Load a causal LM and its tokenizer: from the hub, a folder or a GGUF file."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models.checks import (
    UNREACHABLE,
    check_attention,
    check_causal,
    check_complete,
    check_finite,
    loading_problem,
)
from kascade_cli.models.gguf_config import check_fits
from kascade_cli.models.gguf_file import GgufHeader, find_gguf, read_header
from kascade_cli.models.gguf_loading import gguf_config, gguf_dtype, gguf_tokenizer, load_gguf, loaded_from
from kascade_cli.models.names import check_revision, resolve_name
from kascade_cli.models.placement import SPLIT, placement, resolve_dtype

_HUB_ATTEMPTS = (0, 1)  # seconds to wait before each


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
    raise KascadeError(UNREACHABLE.format(name))


def _header(name: str) -> GgufHeader | None:
    """The header of the GGUF file that `name` means; None if it means something else."""
    path = find_gguf(resolve_name(name), name)
    return None if path is None else read_header(path, name)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a hub id, a folder, a .gguf file or a built-in model: a decoder-only (causal) language model's.

    Raises KascadeError if it cannot be found or read, or is another kind of model's; UsageError for a revision of a
    local model.
    """
    from transformers import AutoConfig

    if not name.strip():
        raise UsageError("the model's name is empty: give a hub id, a folder, a .gguf file, demo or demo-small")
    check_revision(name, revision)
    header = _header(name)
    source = resolve_name(name)
    with _quiet_loading():
        if header is not None:
            config = gguf_config(header, name)
        else:
            _check_hub(source, revision)
            try:
                config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
            except (OSError, ValueError, RuntimeError) as error:
                raise KascadeError(loading_problem(name, source, error)) from error
    check_causal(config, name)
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

    `device_map="auto"` lets accelerate spread the layers over all GPUs, then main memory; "tp" splits the heads over
    the processes of a team (`device` must be auto in both).
    `notify` gets one line that says dtype, device and memory, and before it one for a GGUF file, whose weights are
    dequantised (with a bar on a terminal). `dtype="auto"` is what the weights were saved in; of quantised ones float32
    on a CPU, bfloat16 on a GPU. `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and the like are honoured by transformers.
    Raises KascadeError if the model cannot be found or read, is not a causal LM that kascade can run (before its
    weights are read), lacks a weight, or has weights that are not finite; UsageError for a device or dtype that is not
    there, or a revision of a local model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, target = placement(device, device_map)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    element = resolve_dtype(dtype)
    config = load_config(name, **options)
    placed = {"distributed_config" if device_map == SPLIT else "device_map": where}
    shared = {"attn_implementation": "sdpa", **placed}
    header = _header(name)
    if header is not None and device_map == SPLIT:
        raise KascadeError(f"{name}: a GGUF file cannot be split over processes; take another checkpoint of the model")
    with _quiet_loading():
        empty = check_attention(config, name, trust_remote_code)
        if header is not None:
            if empty is not None:
                check_fits(config, empty, header, name)
            element = resolve_dtype(gguf_dtype(header, where, target)) if element == "auto" else element
            if notify is not None and header.quantization:
                notify(_reading(header, name, element))
            show = notify is not None
            model, tokenizer, found = load_gguf(header, config, name, show=show, dtype=element, **shared)
        else:
            source = resolve_name(name)
            try:
                model, found = AutoModelForCausalLM.from_pretrained(
                    source, config=config, dtype=element, output_loading_info=True, **shared, **options
                )
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise KascadeError(loading_problem(name, source, error)) from error
    check_complete(found["missing_keys"], name)
    if target is not None:
        model = model.to(target)
    if model.device.type == "meta":  # nothing says where its input goes
        raise KascadeError(
            f"{name}: not even its embeddings fit into memory here; free some, or run where there is more"
        )
    check_finite(model, name)
    model.name_or_path_given = name
    if notify is not None:
        notify(_loaded(model, name) + (loaded_from(header) if header is not None else ""))
    return model.eval(), tokenizer


def is_gguf(name: str) -> bool:
    """Whether the name means a GGUF file. Raises KascadeError where it means one that is not there, or several."""
    return find_gguf(resolve_name(name), name) is not None


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone. Raises KascadeError if there is none that can be read."""
    from transformers import AutoTokenizer

    check_revision(name, revision)
    source = resolve_name(name)
    with _quiet_loading():
        if (header := _header(name)) is not None:
            return gguf_tokenizer(header, name)
        try:
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError) as error:
            raise KascadeError(loading_problem(name, source, error)) from error


def _reading(header: GgufHeader, name: str, element: torch.dtype) -> str:
    return f"{name}: dequantising {_bytes(header.bytes)} of {header.quantization} weights to {_type(element)}"


def _loaded(model: nn.Module, name: str) -> str:
    """`demo: bfloat16, weights: 12.3 MB on cpu`."""
    size: Counter[str] = Counter()
    for parameter in model.parameters():
        size[str(parameter.device).replace("meta", "offloaded")] += parameter.numel() * parameter.element_size()
    where = ", ".join(f"{_bytes(count)} on {device}" for device, count in size.items())
    return f"{name}: {_type(model.dtype)}, weights: {where}"


def _type(element: torch.dtype) -> str:
    return str(element).removeprefix("torch.")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
