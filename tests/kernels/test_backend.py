"""Which backend runs, and that a fallback is never silent."""

import logging
import sys
import types

import pytest
import torch

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import OPS, Unsupported, backend, get_backend, reference, register_backend


def test_without_a_gpu():
    assert get_backend("auto", "cpu").name == "torch"
    assert get_backend("torch", "cpu").decode_sparse is reference.decode_sparse
    with pytest.raises(KascadeError, match="need a CUDA GPU, and the model is on cpu"):
        get_backend("tilelang", "cpu")
    with pytest.raises(KascadeError, match="'magic' is not known"):
        get_backend("magic", "cpu")


@pytest.mark.parametrize(
    ("capability", "found", "message"),
    [((8, 0), True, "this GPU is sm_80"), ((9, 0), False, "tilelang is not installed"), ((9, 0), True, None)],
)
def test_why_not(monkeypatch, capability, found, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object() if found else None)
    reason = backend._why_not_tilelang(torch.device("cuda"))
    assert (reason is None) if message is None else (message in reason)


@pytest.fixture
def fussy(monkeypatch):
    """TileLang ops that take no float32."""
    for op in OPS:
        module = types.ModuleType(f"kascade_cli.kernels.tilelang.{op}")

        def fast(*args, _op=op, **kwargs):
            if args[0].dtype == torch.float32:
                raise Unsupported("float32 is not built")
            return f"fast {_op}"

        setattr(module, op, fast)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def arguments(dtype):
    q, k = torch.ones(1, 2, 4, dtype=dtype), torch.ones(1, 1, 3, 4, dtype=dtype)
    return q, k, torch.zeros(1, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)


def test_fallback_warns_once_per_op(fussy, caplog):
    ops = backend.Backend("tilelang")
    assert ops.decode_score(*arguments(torch.bfloat16), scale=1.0) == "fast decode_score"
    assert ops.fallbacks == {}
    with caplog.at_level(logging.WARNING, "kascade"):
        for _ in range(3):
            scores = ops.decode_score(*arguments(torch.float32), scale=1.0)
    torch.testing.assert_close(scores, torch.full((1, 1, 3), 2 / 3))
    assert [record.getMessage() for record in caplog.records] == ["decode_score runs on PyTorch: float32 is not built"]
    assert ops.fallbacks == {"decode_score": "float32 is not built"}


def test_an_explicit_wish_is_not_overruled(fussy):
    ops = backend.Backend("tilelang", strict=True)
    with pytest.raises(KascadeError, match="float32 is not built"):
        ops.decode_score(*arguments(torch.float32), scale=1.0)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(backend, "_registered", {})


def test_a_registered_backend_runs_its_own_ops(registry):
    seen = []

    def recorded(op):
        def call(*args, **kwargs):
            seen.append(op)
            return getattr(reference, op)(*args, **kwargs)

        return call

    register_backend("mirror", {op: recorded(op) for op in OPS})
    ops = get_backend("mirror", "cpu")
    assert (ops.name, ops.fused, ops.strict) == ("mirror", True, True)
    scores = ops.decode_score(*arguments(torch.float32), scale=1.0)
    torch.testing.assert_close(scores, torch.full((1, 1, 3), 2 / 3))
    assert seen == ["decode_score"]
    ops.compile_ahead(1, 4, torch.float32, 32)  # there is nothing to compile
    register_backend("module", reference)
    assert get_backend("module", "cpu").decode_score(*arguments(torch.float32), scale=1.0).equal(scores)
    assert backend.backend_names() == ("auto", "torch", "tilelang", "mirror", "module")


def test_what_a_registered_backend_refuses_is_not_taken_over(registry):
    def no(*args, **kwargs):
        raise Unsupported("not today")

    register_backend("no", dict.fromkeys(OPS, no), why_not=lambda device: "no such card" if device.index else None)
    with pytest.raises(Unsupported, match="not today"):
        get_backend("no", "cpu").decode_score(*arguments(torch.float32), scale=1.0)
    with pytest.raises(KascadeError, match="the no backend cannot run here: no such card"):
        get_backend("no", "cuda:1")


def test_what_cannot_be_registered(registry):
    with pytest.raises(UsageError, match="'torch' is built in"):
        register_backend("torch", reference)
    with pytest.raises(UsageError, match="'half' lacks decode_score, select_topk, .*prefill_sparse_lse"):
        register_backend("half", {"decode_dense": reference.decode_dense})
    with pytest.raises(UsageError, match="'half' is not known; use one of auto, torch, tilelang$"):
        get_backend("half", "cpu")


def test_only_the_reference_is_not_fused(fussy):
    assert not get_backend("torch", "cpu").fused
    assert backend.Backend("tilelang").fused
