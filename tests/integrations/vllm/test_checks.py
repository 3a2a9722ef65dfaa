"""Each reason of a refusal by itself, without vLLM: what tells it, and what does not."""

from types import SimpleNamespace

import pytest

from kascade_cli import Profile
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm.checks import (
    block_problem,
    check_backend,
    cut_problems,
    engine_problems,
    parallel_problems,
    strategy_problems,
)
from kascade_cli.integrations.vllm.geometry import full_layers, model_info, stage_of
from kascade_cli.integrations.vllm.report import summary
from kascade_cli.integrations.vllm.selection import check_layer
from kascade_cli.integrations.vllm.served import other_tilelang
from kascade_cli.sparse import make_strategy

from .test_settings import DEMO

CUSTOM, FLASH = SimpleNamespace(name="CUSTOM"), SimpleNamespace(name="FLASH_ATTN")


def config(text=None, cache=None, parallel=None, drafts=None, transfer=None, per_kind=None):
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            **{"cache_dtype": "auto", "user_specified_block_size": False, "block_size": 16} | (cache or {})
        ),
        parallel_config=SimpleNamespace(
            **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
            | (parallel or {})
        ),
        speculative_config=drafts,
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text or {})),
        attention_config=SimpleNamespace(backend=CUSTOM, backend_per_kind=per_kind or {}),
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache": {"cache_dtype": "fp8_e4m3"}}, "dtype fp8_e4m3"),
        ({"cache": {"cache_dtype": "nvfp4"}}, "dtype nvfp4"),
        ({"cache": {"user_specified_block_size": True, "block_size": 48}}, "48 tokens, no multiple of the tile of 32"),
        ({"drafts": SimpleNamespace(method="eagle3")}, "with eagle3"),
        ({"transfer": object()}, "KV transfer"),
        ({"text": {"attn_logit_softcapping": 50.0}}, "soft-capping"),
        ({"text": {"layer_types": ["sliding_attention", "full_attention"]}}, "sliding-window layers"),
    ],
)
def test_engine(given, says):
    (problem,) = engine_problems(config(**given), 32)
    assert says in problem


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cache": {"cache_dtype": "bfloat16"}},
        {"cache": {"block_size": 16}},  # vLLM's own choice, which it changes for the backend
        {"cache": {"user_specified_block_size": True, "block_size": 96}},
        {"drafts": SimpleNamespace(method="ngram")},
        {"text": {"attn_logit_softcapping": None}},
        {
            "text": {"layer_types": ["sliding_attention", "full_attention"]},
            "per_kind": {"sliding_window": FLASH, "full_attention": CUSTOM},
        },
    ],
)
def test_engines_that_are_served(given):
    assert engine_problems(config(**given), 32) == []


def test_blocks_are_whole_tiles():
    for block in range(1, 200):
        for tile in (8, 16, 32, 48):
            assert (block_problem(block, tile) is None) == (block in range(tile, 200, tile))


def test_parallel():
    info = SimpleNamespace(kv_heads=8)
    assert parallel_problems(config(parallel={"tensor_parallel_size": 4}), info) == []
    assert "does not divide the 8" in parallel_problems(config(parallel={"tensor_parallel_size": 16}), info)[0]
    assert "does not divide" in parallel_problems(config(parallel={"tensor_parallel_size": 3}), info)[0]
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        assert "context parallelism" in parallel_problems(config(parallel={name: 2}), info)[0]


def test_pipelines():
    """Layers 4 to 15 of the demo read layer 3; an oracle's layers read nobody's keys."""
    layers = range(16)
    kascade = make_strategy("kascade", layers, Profile.load(DEMO))
    for cut in range(1, 16):
        problems = cut_problems(kascade, [range(cut), range(cut, 16)])
        assert bool(problems) == (cut > 3)
    assert (
        "cut at layer 8, and layer 8 reads the keys of layer 3" in cut_problems(kascade, [range(8), range(8, 16)])[0]
    )
    assert cut_problems(make_strategy("oracle", layers, None), [range(8), range(8, 16)]) == []
    assert stage_of([range(8), range(8, 16)], [9, 12]) == range(8, 16)
    with pytest.raises(KascadeError, match="no single pipeline stage"):
        stage_of([range(8), range(8, 16)], [7, 8])


def test_strategies_with_a_memory():
    for name, problems in (("kascade-refresh", 1), ("kascade", 0)):
        assert len(strategy_problems(make_strategy(name, range(16), Profile.load(DEMO)))) == problems


def test_backends():
    check_backend(CUSTOM)
    for other, says in ((None, "that vLLM chooses"), (FLASH, "FLASH_ATTN")):
        with pytest.raises(KascadeError, match=f"would run dense on the backend {says}"):
            check_backend(other)


def test_layers():
    names = (
        "has_sliding_window", "use_mla", "has_sink", "use_sparse", "use_mm_prefix", "use_non_causal",
        "use_per_head_quant_scales",
    )  # fmt: skip
    plain = dict.fromkeys(names, False) | {"attn_type": "decoder"}
    check_layer(SimpleNamespace(**plain))
    for name in names:
        with pytest.raises(KascadeError, match="does not support: "):
            check_layer(SimpleNamespace(**plain | {name: True}))
    with pytest.raises(KascadeError, match="encoder attention, multi-head latent attention, attention sinks"):
        check_layer(SimpleNamespace(**plain | {"attn_type": "encoder", "use_mla": True, "has_sink": True}))


def test_geometry():
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 2
    assert full_layers(SimpleNamespace(layer_types=kinds), 6) == [2, 5]
    assert full_layers(SimpleNamespace(), 3) == [0, 1, 2]
    assert full_layers(SimpleNamespace(sliding_window=4096), 3) == []
    assert full_layers(SimpleNamespace(sliding_window=4096, use_sliding_window=False), 3) == [0, 1, 2]
    text = SimpleNamespace(num_attention_heads=32, layer_types=None)
    info = model_info(
        SimpleNamespace(
            model="m", hf_text_config=text, max_model_len=99,
            get_total_num_hidden_layers=lambda: 4, get_total_num_kv_heads=lambda: 8, get_head_size=lambda: 128,
        )
    )  # fmt: skip
    assert (info.layers, info.query_heads, info.kv_heads, info.head_dim) == (4, 32, 8, 128)
    assert info.profiled_layers == [0, 1, 2, 3]


def test_vllms_tilelang():
    needs = ["torch>=2.11", "tilelang==0.1.15; sys_platform == 'linux' and extra == 'kernels'"]
    assert other_tilelang("0.1.15", needs) is None
    assert "tilelang 0.1.9 is installed, and the kernels are written for 0.1.15" in other_tilelang("0.1.9", needs)
    assert other_tilelang(None, needs) is None
    assert other_tilelang("0.1.9", []) is None


def test_the_line_of_the_report():
    report = {
        "strategy": "kascade", "backend": "tilelang", "fallbacks": {"prefill_dense": "float32"}, "keys_visible": 10.0,
        "phases": {"decode": {"density": 0.125}}, "roles": {"dense": [0], "reuse": [1, 2]},
        "steps": {"steps": 9, "mixed_steps": 2},
    }  # fmt: skip
    assert summary(report) == (
        "kascade on tilelang; decode read 12.50 % of the keys visible; 9 steps, 2 mixed, 0 chunks; "
        "roles dense 1, reuse 2; fallbacks prefill_dense: float32"
    )
    assert summary(report | {"keys_visible": 0}) == "kascade on tilelang: nothing ran"
