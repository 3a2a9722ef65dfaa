"""A NaN or inf in a key or query stays visible, op by op: in the reference, and on a GPU in the Hopper kernels."""

import pytest
import torch

from kascade_cli.kernels import get_backend, reference
from kascade_cli.kernels.testing import broken, decode, prefill, ragged

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
CPU = torch.device("cpu")
SMALL = {"heads": 4, "kv_heads": 2, "dim": 64, "ratio": 0.1, "starts": (0, 21, 5)}
DECODE = (decode.DecodeCase((150, 170, 0), 200, **SMALL), decode.DecodeCase((33, 150, 4), 192, page=16, **SMALL))
PREFILL = (prefill.PrefillCase(torch.bfloat16, 2, 64, 70, 120, (0, 20), (0, 7), (70, 83), tile=16, floor=5),)


def test_the_check_holds_for_the_reference():
    rows = broken.check_decode(reference, CPU, DECODE) + broken.check_prefill(reference, CPU, PREFILL)
    assert len(rows) == 7 * (2 * 8 + 7)  # faults, ops of two cases and of one
    assert decode.summary(rows)


RAGGED = (ragged.RaggedCase(torch.bfloat16, 2, 64, 16, ((9, 40), (1, 33), (20, 20)), padding=3, tile=16, floor=5),)


def test_ragged_rows_do_not_reach_each_other():
    assert decode.summary(broken.check_ragged(reference, CPU, RAGGED))


def test_the_check_finds_an_op_that_looks_at_a_neighbour():
    class Reaching:
        def __getattr__(self, op: str):
            def call(*args, **kwargs):
                out = getattr(reference, op)(*args, **kwargs)
                if op == "prefill_sparse":
                    out[1:] += out[:-1] * 1e-3
                return out

            return call

    rows = broken.check_ragged(Reaching(), CPU, RAGGED)
    assert [row["note"] for row in rows if not row["ok"]] == ["prefill_sparse of row 1", "prefill_sparse of row 2"]


class Healthy:
    """The reference with one op whose NaN became 0."""

    def __init__(self, op: str):
        self.op = op

    def __getattr__(self, op: str):
        def call(*args, **kwargs):
            found = getattr(reference, op)(*args, **kwargs)
            if op != self.op:
                return found
            if torch.is_tensor(found):
                return found.nan_to_num(0.0)
            return tuple(x if x is None else x.nan_to_num(0.0) for x in found)

        return call


@pytest.mark.parametrize(
    ("op", "caught"),
    [
        ("decode_dense", {"dense", "scores", "plain"}),
        ("decode_score", {"pooled", "sparse", "known", "joined"}),
        ("decode_sparse", {"sparse", "known"}),
    ],
)
def test_the_check_finds_a_decode_op_that_loses_nan(op: str, caught: set[str]):
    rows = broken.check_decode(Healthy(op), CPU, DECODE[:1])
    assert {row["op"] for row in rows if not row["ok"]} == caught


@pytest.mark.parametrize(
    ("op", "caught"),
    [
        ("prefill_dense", {"dense", "log-sum-exp", "lse only"}),
        ("prefill_score", {"pooled", "sparse"}),
        ("prefill_sparse", {"sparse"}),
        ("prefill_sparse_lse", {"sparse_lse"}),
    ],
)
def test_the_check_finds_a_prefill_op_that_loses_nan(op: str, caught: set[str]):
    rows = broken.check_prefill(Healthy(op), CPU, PREFILL)
    assert {row["op"] for row in rows if not row["ok"]} >= caught


@needs_gpu
def test_decode_on_the_gpu():
    assert decode.summary(broken.check_decode(get_backend("tilelang", "cuda"), torch.device("cuda")))


@needs_gpu
def test_prefill_on_the_gpu():
    assert decode.summary(broken.check_prefill(get_backend("tilelang", "cuda"), torch.device("cuda")))
