"""What kascade needs to know of the model that vLLM serves, from vLLM's configuration."""

from typing import Any

from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.models import ModelInfo


def model_info(model_config: Any) -> ModelInfo:
    """Geometry and full-attention layers, without a fingerprint."""
    text = model_config.hf_text_config
    return ModelInfo(
        name=model_config.model,
        fingerprint=None,
        layers=model_config.get_total_num_hidden_layers(),
        query_heads=text.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.get_head_size(),
        profiled_layers=full_layers(text, model_config.get_total_num_hidden_layers()),
        max_positions=model_config.max_model_len,
    )


def full_layers(text_config: Any, layers: int) -> list[int]:
    """Absolute indices of the full-attention layers: by `layer_types`, all or none where there are none."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        window = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
        return [] if window else list(range(layers))
    return [index for index, kind in enumerate(kinds[:layers]) if kind in ("full_attention", "attention")]


def stages(vllm_config: Any) -> list[range]:
    """The layers of each pipeline stage, in order."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    world = vllm_config.parallel_config.pipeline_parallel_size
    return [range(*get_pp_indices(layers, rank, world)) for rank in range(world)]


def stage_of(layers: list[range], here: list[int]) -> range:
    """The stage that holds the layers `here`. Raises Refusal if none does."""
    for stage in layers:
        if all(layer in stage for layer in here):
            return stage
    raise Refusal(f"layers {here} of one process lie in no single pipeline stage of {len(layers)}")
