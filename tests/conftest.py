"""Tiny random models of several architectures, in float64 so that equality means equality."""

import os

# The suite runs in parallel processes; each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", 'families: one model family each; leave them out with -m "not families"')


def tiny_model(kind: str, *, layers: int = 4, heads: int = 4, kv_heads: int = 2, vocab: int = 64, seed: int = 0):
    """A random causal LM with sharp enough attention; `gemma3` alternates sliding-window and full attention."""
    import transformers as tf

    options = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    special = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 12}),
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": None}),
        "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {}),
        "gemma3": (
            tf.Gemma3TextConfig,
            tf.Gemma3ForCausalLM,
            {
                "head_dim": 8,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
                "query_pre_attn_scalar": 8,
            },
        ),
    }
    config_class, model_class, extra = special[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**options, **extra))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                parameter.mul_(8)  # default initialisation gives nearly uniform attention
    return model.double().eval()


@pytest.fixture(scope="session")
def make_tiny_model():
    return tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE with few merges: every task word is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from kascade_cli.tasks.vocabulary import TASK_WORDS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(TASK_WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
