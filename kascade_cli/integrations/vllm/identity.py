"""Whether the profile was made for the model that is served: its weights by the checkpoint's files, or its geometry.

vLLM renames and fuses weights, so the fingerprint is taken from the files, under transformers' names.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.attach import check_profile
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.models import ModelInfo, fingerprint, fingerprint_problem
from kascade_cli.sparse import Setting

log = logging.getLogger("kascade")
_known: dict[str, str | None] = {}  # folder -> fingerprint; a server makes its configuration more than once


def check_identity(info: ModelInfo, setting: Setting, vllm_config: Any) -> None:
    """Raises KascadeError for a profile of another geometry, Refusal for one of other weights.

    Weights that cannot be looked at (random ones, formats other than safetensors) are taken on trust, with a warning.
    """
    profile = setting.profile
    if profile is None:
        return
    check_profile(info, profile, allow_other_weights=True)
    if profile.model.fingerprint is None or setting.allow_other_weights:
        return
    found = _served_fingerprint(vllm_config)
    if isinstance(found, Exception):
        log.warning("the weights cannot be compared with the profile's (%s): its geometry fits", found)
        return
    known = ModelInfo(**{**vars(info), "fingerprint": found})
    if problem := fingerprint_problem(profile.model.fingerprint, known, name=profile.model.name):
        raise Refusal(
            f"{problem}: profile this model, or set allow_other_weights to true in KASCADE_VLLM to use it all the same"
        )


def _served_fingerprint(vllm_config: Any) -> str | Exception:
    """The fingerprint, or why there is none."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        return KascadeError("load format dummy")
    if getattr(model, "hf_overrides", None):
        return KascadeError("hf_overrides change the configuration")
    try:
        folder = _folder(model.model, model.revision, load.download_dir)
        if str(folder) not in _known:
            _known[str(folder)] = folder_fingerprint(folder, trust_remote_code=model.trust_remote_code)
        return _known[str(folder)]
    except Exception as error:  # of the hub, of files in another format, of configurations that make no model
        return KascadeError(" ".join(str(error).split())[:200] or type(error).__name__)


def _folder(name: str, revision: str | None, cache: str | None) -> Path:
    """The checkpoint's folder; one of the hub is downloaded, as vLLM would do it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=patterns))


def folder_fingerprint(folder: Path, *, trust_remote_code: bool = False) -> str:
    """`models.fingerprint` of a saved model without loading it: a model without weights tells the names.

    Raises KascadeError for weights that the files do not have under those names.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    # `fingerprint` reads weights that are elsewhere through the hook that accelerate puts on a model.
    model._hf_hook = _Files(folder, getattr(model, "all_tied_weights_keys", None) or {})
    return fingerprint(model)


class _Files:
    """Tensors of a folder of safetensors by name. tied: name -> the name of the tensor that stands in for it."""

    def __init__(self, folder: Path, tied: Mapping[str, str]) -> None:
        self.folder, self.tied = folder, tied
        self.where = _index(folder)
        self.weights_map = self

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        held = name if name in self.where else self.tied.get(name, name)
        with safe_open(self.folder / self.where[held], framework="pt") as file:  # KeyError: not in the files
            return file.get_tensor(held)


def _index(folder: Path) -> dict[str, str]:
    """Name of a tensor -> the file that holds it. Raises KascadeError where there are no safetensors."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise KascadeError(f"{folder} has no safetensors files")
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    return found
