"""Where vLLM 0.26 to 0.32 differ, as far as the plugin touches it. Nothing else asks for a version.

0.26 asks a backend for the shape of its cache (`get_kv_cache_shape`) and a layout by name; later versions give every
backend [B, H, N, 2 D] and ask which orders in memory it takes. `Layouts` answers both with the same memory: a block's
bytes in one piece, of which the backend owns the inside (views.py).
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

from kascade_cli.integrations.vllm.errors import Refusal

OLDEST, NEWEST = (0, 26), (0, 32)


def supported(version: str) -> bool:
    """Whether `version`, such as 0.32.0 or 0.26.0+cu130, is one that the plugin is written for."""
    found = _numbers(version)
    return found is not None and OLDEST <= found <= NEWEST


def _numbers(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def check_version() -> None:
    """Raises Refusal for another version than those this was written for."""
    from vllm import __version__

    if not supported(__version__):
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise Refusal(
            f"vLLM {__version__} is not supported: install one of {oldest} to {newest}, or unset KASCADE_PROFILE"
        )


def register(path: str) -> None:
    """Makes the backend CUSTOM the class at `path`. Raises Refusal if another plugin has it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_ours(path)
    register_backend(AttentionBackendEnum.CUSTOM, path)


def check_ours(path: str) -> None:
    """Raises Refusal if the backend CUSTOM is registered, and not as the class at `path`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != path:
        raise Refusal(
            f"two plugins want the attention backend CUSTOM, the other one is {custom.get_path()}: choose with "
            "VLLM_PLUGINS which plugins are loaded"
        )


class Layouts:
    """Mixed into a backend: what the versions ask about its cache, [B, H, N, 2 D] with every block in one piece."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """0.26."""
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @classmethod
    def get_required_kv_cache_layout(cls) -> str:
        """0.26: heads before tokens."""
        return "HND"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """0.32: layers, blocks, heads, tokens, content."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC,)


_WRAPPED = "_kascade_resets"


def after_warm_up(reset: Callable[[], None]) -> None:
    """Calls `reset` once this process's GPU worker has warmed up, which takes steps like any other."""
    module = sys.modules.get("vllm.v1.worker.gpu_worker")
    if module is None:  # no GPU's
        return
    original = module.Worker.compile_or_warm_up_model
    if hasattr(original, _WRAPPED):
        getattr(original, _WRAPPED)[:] = [reset]
        return
    resets = [reset]

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for call in resets:
            call()
        return found

    setattr(compile_or_warm_up_model, _WRAPPED, resets)
    module.Worker.compile_or_warm_up_model = compile_or_warm_up_model


def estimates_graphs() -> bool:
    """Whether vLLM sets memory aside for the CUDA graphs that it will record: with its second runner not in 0.26."""
    from vllm import __version__

    return supported(__version__) and _numbers(__version__) >= NEWEST


def longest(common: Any) -> list[int]:
    """Of each row, how many keys it has, known to the host: exact in prefill, where drafts are accepted at most."""
    bound = common.seq_lens_cpu_upper_bound
    if bound is None:
        bound = getattr(common, "_seq_lens_cpu", None)
    known = [] if bound is None else bound[: common.num_reqs].tolist()
    return known + [common.max_seq_len] * (common.num_reqs - len(known))
