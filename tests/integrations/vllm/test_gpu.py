"""What is reserved on a GPU, counted in tensors that do not exist."""

from types import SimpleNamespace

import pytest
import torch

from kascade_cli.integrations.vllm.gpu import compile_kernels, decode_bytes, room
from kascade_cli.integrations.vllm.served import Most
from kascade_cli.kernels import Backend
from kascade_cli.schema import Budget, ModelCard, Profile
from kascade_cli.sparse import make_strategy


def size(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta").nbytes


def pooled_profile():
    card = ModelCard(name="m", layers=4, query_heads=32, kv_heads=8, head_dim=128)
    return Profile.build(model=card, anchors=[0, 1], profiled_layers=range(4), head_maps="pooled")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("rows", "scores"), [(2, 1 << 40), (64, 1 << 40), (64, 1 << 30)])
def test_room(world, rows, scores):
    """Of a strategy that gathers keys, and of one that does not."""
    tokens, keys, heads, groups, dim = 8192, 65536, 32 // world, 8 // world, 128
    budget = Budget(ratio=0.1, min_keys=128)
    served = SimpleNamespace(
        info=SimpleNamespace(query_heads=32, kv_heads=8, head_dim=dim),
        heads=SimpleNamespace(world=world), budget=budget, most=Most(rows, tokens, keys, torch.bfloat16),
        strategy=make_strategy("oracle", range(4), None, pool="logits"),
    )  # fmt: skip
    tiles = tokens // 32 + 1
    prefill = min(scores, size((groups, tiles, keys), torch.float32))
    prefill += 2 * size((1, 8, tiles, budget.count(keys)), torch.int32)  # of all processes' heads
    prefill += 2 * size((1, groups, keys, dim), torch.bfloat16)
    decode = size((rows, groups, keys), torch.float32) + size((rows, keys, heads), torch.bfloat16)
    decode += 2 * size((rows, 8, budget.count(keys)), torch.int32)
    assert room(served, scores) == max(prefill, min(scores, decode))
    served.strategy = make_strategy("oracle", range(4), None)
    prefill -= 2 * size((1, groups, keys, dim), torch.bfloat16)
    assert room(served, scores) == max(prefill, min(scores, decode))
    served.strategy = make_strategy("kascade", range(4), pooled_profile())
    own = min(scores, size((groups, tiles, keys), torch.float32))
    more = 0 if world == 1 else 2 * world * own  # those of all processes, one by one and joined
    assert room(served, scores) == max(prefill + more, min(scores, decode))
    served.strategy = make_strategy("oracle", range(4), None)
    served.most = Most(rows, tokens, keys, torch.bfloat16, graphs=rows)  # as wide as a row may be, whatever it holds
    assert room(served, scores) == max(prefill, decode)


def test_nothing_is_compiled_for_pytorch():
    served = SimpleNamespace(
        info=SimpleNamespace(query_heads=32, kv_heads=8, head_dim=128), ops=Backend("torch"), budget=Budget(),
        most=Most(1, 1, 1, torch.bfloat16), strategy=make_strategy("dense", range(4), None),
    )  # fmt: skip
    compile_kernels(served, 32)


@pytest.mark.parametrize(
    ("group", "dtype"), [(4, torch.bfloat16), (5, torch.bfloat16), (6, torch.float16), (1, torch.bfloat16)]
)
def test_a_row_is_what_the_kernels_allocate(group, dtype):
    """Groups that are no power of two are stored as the next one, logits of float16 models in float32."""
    pool = pytest.importorskip("kascade_cli.kernels.tilelang.pool")
    keys, groups = 3 * pool.WIDTH, 2  # whole allocations
    logits, _ = pool.workspace(1, groups, group, keys, 1, str(dtype)[6:], torch.device("meta"), packed=True)
    info = SimpleNamespace(query_heads=groups * group, kv_heads=groups)
    budget = Budget(ratio=0.1)
    scores, indices = size((groups, keys), torch.float32), 2 * size((groups, budget.count(keys)), torch.int32)
    assert decode_bytes(info, 1, budget, keys, dtype) == logits.nbytes + scores + indices
