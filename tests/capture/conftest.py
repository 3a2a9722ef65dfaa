"""Tiny random models of the architectures that a capture must handle."""

import pytest
import torch
import transformers

from kascade_cli.models import ModelInfo, describe

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharp attention: with the default 0.02 every row is almost uniform, and a wrong row would look right.
    "initializer_range": 0.3,
}
EXTRA = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.4},
    "Gemma3Text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}
MODEL_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model in evaluation mode with SDPA attention."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**COMMON | EXTRA[family] | changes)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, MODEL_CLASSES.get(family, f"{family}ForCausalLM"))(config)
    return model.to(dtype).eval()


@pytest.fixture(params=sorted(EXTRA))
def family(request) -> str:
    return request.param


@pytest.fixture
def llama():
    return make_model("Llama")


@pytest.fixture
def llama_info(llama) -> ModelInfo:
    return describe(llama, "tiny-llama")


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count,), generator=generator).tolist()
