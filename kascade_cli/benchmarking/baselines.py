"""Dense attention to compare with: what PyTorch has, what is installed beside it, and our own."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kascade_cli.errors import UsageError
from kascade_cli.kernels import Backend

# (q [B, H, T, D], k, v [B, G, S, D], scale) -> output, in whatever layout the library has
Attend = Callable[[Tensor, Tensor, Tensor, float], Any]


@dataclass(frozen=True)
class Baseline:
    """One implementation of dense causal attention.

    missing(device, phase) says why it cannot run, or gives None. prepare(q, k, v, scale) does what a user would do
    once (plans, page tables) and returns the call to time. attend is the plain call, for those that need no plan.
    """

    name: str
    label: str
    missing: Callable[[torch.device, str], str | None]
    prepare: Callable[[Tensor, Tensor, Tensor, float], Callable[[], Any]]
    attend: Attend | None = None


def _inline(name: str, label: str, missing: Callable[[torch.device, str], str | None], attend: Attend) -> Baseline:
    return Baseline(name, label, missing, lambda q, k, v, scale: lambda: attend(q, k, v, scale), attend)


def _sdpa(kind: str | None) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        options = {"is_causal": q.shape[2] > 1, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if kind is None:
            return functional.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    return attend


def _needs_cuda(device: torch.device, phase: str) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _needs_module(module: str, *, phases: tuple[str, ...] = ("decode", "prefill")) -> Callable[..., str | None]:
    def missing(device: torch.device, phase: str) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA GPU"
        if phase not in phases:
            return f"has no {phase}"
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken CUDA extension fails in many ways, and none concerns us
            if importlib.util.find_spec(module.split(".")[0]) is None:
                return "not installed"
            return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return None

    return missing


def _flash4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=q.shape[1] > 1)


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    import flash_attn_interface

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if q.shape[1] == 1:  # this entry point splits the keys, the other one does not
        return flash_attn_interface.flash_attn_with_kvcache(q, k, v, softmax_scale=scale, causal=True)
    return flash_attn_interface.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Any]:
    import flashinfer

    batch, heads, queries, size = q.shape
    groups, slots = k.shape[1], k.shape[2]
    if queries > 1:
        rows = q.transpose(1, 2).contiguous()
        return lambda: [
            flashinfer.single_prefill_with_kv_cache(rows[b], k[b], v[b], causal=True, kv_layout="HND", sm_scale=scale)
            for b in range(batch)
        ]
    page = 16
    if slots % page:
        raise UsageError(f"FlashInfer's paged decode is measured with pages of 16, which {slots} keys do not fill")
    pages = [
        tensor.unflatten(2, (slots // page, page)).permute(0, 2, 1, 3, 4).reshape(-1, groups, page, size).contiguous()
        for tensor in (k, v)
    ]
    workspace = torch.empty(256 * 1024**2, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    per_row = slots // page
    wrapper.plan(
        torch.arange(0, batch + 1, dtype=torch.int32, device=q.device) * per_row,
        torch.arange(batch * per_row, dtype=torch.int32, device=q.device),
        torch.full((batch,), page, dtype=torch.int32, device=q.device),
        heads,
        groups,
        size,
        page,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
        sm_scale=scale,
    )
    row = q[:, :, 0].contiguous()
    return lambda: wrapper.run(row, (pages[0], pages[1]))


BASELINES: dict[str, Baseline] = {
    entry.name: entry
    for entry in (
        _inline("cudnn", "cuDNN (SDPA)", _needs_cuda, _sdpa("CUDNN_ATTENTION")),
        _inline("flash2", "FlashAttention-2 (SDPA)", _needs_cuda, _sdpa("FLASH_ATTENTION")),
        _inline("sdpa", "SDPA, default choice", lambda device, phase: None, _sdpa(None)),
        _inline("fa4", "flash-attn-4 (CuTe)", _needs_module("flash_attn.cute.interface"), _flash4),
        _inline("fa3", "FlashAttention-3", _needs_module("flash_attn_interface"), _flash3),
        Baseline("flashinfer", "FlashInfer", _needs_module("flashinfer"), _flashinfer),
    )
}
OWN = "own"


def own_dense(backend: Backend) -> Baseline:
    """Our dense kernel of `backend`, as a baseline called `own`."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Any]:
        end = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
        start = torch.zeros_like(end)
        if q.shape[2] == 1:
            row = q[:, :, 0]
            return lambda: backend.decode_dense(row, k, v, start, end, scale=scale)[0]
        first = end - q.shape[2]
        return lambda: backend.prefill_dense(q, k, v, first, start, end, scale=scale)[0]

    return Baseline(OWN, f"our dense ({backend.name})", lambda device, phase: None, prepare)


def choose(names: str, backend: Backend) -> list[Baseline]:
    """`all`, or names separated by commas. Raises UsageError for an unknown one."""
    every = {**BASELINES, OWN: own_dense(backend)}
    if names == "all":
        return list(every.values())
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in every]:
        raise UsageError(f"baseline '{unknown[0]}' is not known: use all or some of {', '.join(every)}")
    return [every[name] for name in wanted]


@functools.cache
def why_missing(name: str, device: torch.device, phase: str) -> str | None:
    """Why baseline `name` cannot run here, or None; imports the library once."""
    return None if name == OWN else BASELINES[name].missing(device, phase)
