"""Whether vLLM runs what was asked for: asked of vLLM's own selection of a backend, which a plugin cannot see else.

Two functions of the platform are wrapped, once a process. When a configuration is complete, everything is checked that
needs no model, so that a server refuses before it loads anything. When a layer chooses its backend, one that would run
dense is refused; and the CPU platform, which knows one backend only, takes CUSTOM as the GPU platforms do.
"""

from typing import Any

from kascade_cli.integrations.vllm import compat
from kascade_cli.integrations.vllm.checks import WINDOWS, check_backend, check_config
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.settings import wanted

_MARK = "_kascade_guard"


def guard_selection(path: str) -> None:
    """Wraps `check_and_update_config` and `get_attn_backend_cls` of this process's platform; `path`: our backend."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not hasattr(platform.get_attn_backend_cls, _MARK):
        _wrap_config(platform, path)
        _wrap_selection(platform, path)


def _wrap_config(platform: type, path: str) -> None:
    original = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(vllm_config)
        if wanted():
            compat.check_ours(path)
            check_config(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_selection(platform: type, path: str) -> None:
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not wanted():
            return original(selected_backend, attn_selector_config, num_heads)
        if selected_backend is None or selected_backend.name != "CUSTOM":
            if attn_selector_config.attn_type == "decoder" and not attn_selector_config.has_sliding_window:
                check_backend(selected_backend)
            return original(selected_backend, attn_selector_config, num_heads)
        compat.check_ours(path)
        check_layer(attn_selector_config)
        if cls.device_name == "cpu":
            return path
        return original(selected_backend, attn_selector_config, num_heads)

    setattr(get_attn_backend_cls, _MARK, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def check_layer(config: Any) -> None:
    """Raises Refusal, with all reasons, for a layer that the backend CUSTOM cannot run."""
    reasons = []
    if config.attn_type != "decoder":
        reasons.append(f"{config.attn_type} attention")
    if config.has_sliding_window:
        reasons.append(WINDOWS)
    reasons += [what for what, given in (
        ("multi-head latent attention", config.use_mla),
        ("attention sinks", config.has_sink),
        ("attention that is sparse already", config.use_sparse),
        ("bidirectional prefixes", config.use_mm_prefix),
        ("attention that is not causal", config.use_non_causal),
        ("scales per head of a quantised cache", config.use_per_head_quant_scales),
    ) if given]  # fmt: skip
    if reasons:
        raise Refusal(f"the model has what sparse attention does not support: {', '.join(reasons)}")
