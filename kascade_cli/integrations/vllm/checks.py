"""What is refused before a model is loaded: one line with every reason."""

from typing import Any

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.geometry import model_info, stages
from kascade_cli.integrations.vllm.identity import check_identity
from kascade_cli.integrations.vllm.settings import read_settings
from kascade_cli.models import ModelInfo
from kascade_cli.sparse import Strategy

# Proposers without attention layers of their own.
DRAFTS = ("ngram", "ngram_gpu", "suffix")
WINDOWS = (
    "sliding-window layers (leave those to another backend: --attention-config "
    '\'{"backend_per_kind": {"full_attention": "CUSTOM"}}\' instead of --attention-backend CUSTOM)'
)
PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


def check_config(vllm_config: Any) -> None:
    """Raises Refusal if this configuration cannot be served sparsely. Nothing is asked where there is no model."""
    if vllm_config.model_config is None or vllm_config.model_config.runner_type == "draft":
        return
    attention = vllm_config.attention_config
    check_backend(attention.backend_per_kind.get("full_attention", attention.backend))
    try:
        setting = read_settings().setting()
        info = model_info(vllm_config.model_config)
        if not info.profiled_layers:
            raise Refusal(f"{info.name} has no full-attention layers: there is nothing to sparsify")
        strategy = setting.make(info.profiled_layers)
        check_identity(info, setting, vllm_config)
    except Refusal:
        raise
    except KascadeError as error:
        raise Refusal(error) from None
    found = [
        *engine_problems(vllm_config, setting.budget().tile),
        *strategy_problems(strategy),
        *parallel_problems(vllm_config, info),
        *cut_problems(strategy, stages(vllm_config) if vllm_config.parallel_config.pipeline_parallel_size > 1 else []),
    ]
    if found:
        raise Refusal("; ".join(found))


def check_backend(selected: Any) -> None:
    """Raises Refusal where another backend than ours would run full attention, which is dense. selected: vLLM's enum,
    None for the one that it would choose itself."""
    if selected is None or selected.name != "CUSTOM":
        name = "that vLLM chooses" if selected is None else selected.name
        raise Refusal(
            f"KASCADE_PROFILE is set, but full attention would run dense on the backend {name}: add "
            "--attention-backend CUSTOM, or unset KASCADE_PROFILE and KASCADE_VLLM"
        )


def engine_problems(vllm_config: Any, tile: int) -> list[str]:
    """Of the cache, drafts and transfers. tile: queries of a tile."""
    cache, drafts = vllm_config.cache_config, vllm_config.speculative_config
    found = []
    if cache.cache_dtype not in PLAIN_CACHES:
        found.append(
            f"a KV cache of dtype {cache.cache_dtype} is not supported: leave --kv-cache-dtype out (16 bits a number)"
        )
    if cache.user_specified_block_size and (problem := block_problem(cache.block_size, tile)):
        found.append(problem)
    if drafts is not None and drafts.method not in DRAFTS:
        found.append(
            f"speculative decoding with {drafts.method} is not supported, as its drafts have attention of their own: "
            f"use one of {', '.join(DRAFTS)}, or none"
        )
    if vllm_config.kv_transfer_config is not None:
        found.append(
            "KV transfer (disaggregated prefill, offloading) is not supported: leave --kv-transfer-config out"
        )
    text, attention = vllm_config.model_config.hf_text_config, vllm_config.attention_config
    windows = attention.backend_per_kind.get("sliding_window", attention.backend)
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()) and getattr(windows, "name", "") == "CUSTOM":
        found.append(f"the backend CUSTOM does not run {WINDOWS}")
    if getattr(text, "attn_logit_softcapping", None):
        found.append("attention logit soft-capping is not supported; choose a model without it")
    return found


def block_problem(block_size: int, tile: int) -> str | None:
    """Why blocks of the KV cache may not have this size. A cached prefix would depend on who wrote it."""
    if block_size % tile == 0:
        return None
    return (
        f"a block of the KV cache has {block_size} tokens, no multiple of the tile of {tile}: use --block-size {tile}"
    )


def strategy_problems(strategy: Strategy) -> list[str]:
    if strategy.memory() is not None:
        return [
            f"strategy {strategy.name} carries keys from step to step, and the requests of a step change: use kascade"
        ]
    return []


def parallel_problems(vllm_config: Any, info: ModelInfo) -> list[str]:
    parallel = vllm_config.parallel_config
    found = []
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        found.append("context parallelism spreads the keys of a head and is not supported: use tensor parallelism")
    world = parallel.tensor_parallel_size
    if info.kv_heads % world:
        found.append(f"tensor parallel {world} does not divide the {info.kv_heads} KV heads: choose a size that does")
    return found


def cut_problems(strategy: Strategy, layers: list[range]) -> list[str]:
    """Layers that read the keys of another pipeline stage. layers: those of each stage."""
    found = {}
    for stage in layers:
        for layer in (layer for layer in strategy.layers if layer in stage):
            for phase in ("decode", "prefill"):
                for source in strategy.reads(layer, phase):
                    if source not in stage:
                        found.setdefault(stage.start, f"layer {layer} reads the keys of layer {source}")
    return [
        f"the pipeline is cut at layer {start}, and {what}: cut where an anchor begins (VLLM_PP_LAYER_PARTITION), or "
        "use tensor parallelism"
        for start, what in found.items()
    ]
