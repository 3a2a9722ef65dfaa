"""A NaN or inf in a key or query stays visible, op by op: the check holds for the reference, and for the Hopper kernels
on a GPU."""

import pytest
import torch

from kascade_cli.kernels import get_backend, reference
from kascade_cli.kernels.testing import broken, decode

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def test_the_check_holds_for_the_reference():
    rows = broken.check_decode(reference, torch.device("cpu")) + broken.check_prefill(reference, torch.device("cpu"))
    assert len(rows) == 7 * 7 * (len(broken.DECODE_CASES) + len(broken.PREFILL_CASES))
    assert decode.summary(rows)


class Healthy:
    """The reference with one op whose NaN became 0."""

    def __init__(self, op: str):
        self.op = op

    def __getattr__(self, op: str):
        def call(*args, **kwargs):
            found = getattr(reference, op)(*args, **kwargs)
            if op != self.op:
                return found
            clean = [
                x.nan_to_num(0.0) if x is not None else x for x in ((found,) if torch.is_tensor(found) else found)
            ]
            return clean[0] if torch.is_tensor(found) else tuple(clean)

        return call


@pytest.mark.parametrize(
    ("op", "caught"),
    [
        ("decode_dense", {"dense", "scores", "plain"}),
        ("decode_score", {"pooled", "sparse", "known"}),
        ("decode_sparse", {"sparse", "known"}),
    ],
)
def test_the_check_finds_a_decode_op_that_loses_nan(op: str, caught: set[str]):
    rows = broken.check_decode(Healthy(op), torch.device("cpu"), broken.DECODE_CASES[:1])
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
    rows = broken.check_prefill(Healthy(op), torch.device("cpu"), broken.PREFILL_CASES[1:])
    assert {row["op"] for row in rows if not row["ok"]} >= caught


@needs_gpu
def test_decode_on_the_gpu():
    assert decode.summary(broken.check_decode(get_backend("tilelang", "cuda"), torch.device("cuda")))


@needs_gpu
def test_prefill_on_the_gpu():
    assert decode.summary(broken.check_prefill(get_backend("tilelang", "cuda"), torch.device("cuda")))
