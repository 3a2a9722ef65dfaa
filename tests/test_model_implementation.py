"""Which attention implementation and which logits a model computes with, and that both are put back."""

import pytest
import torch
import transformers as tf
from torch import nn

from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_implementation, logits_at, text_config

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def multimodal():
    """A language model beside a vision tower, each with a config of its own."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**SIZES, **HEADS).to_dict(),
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8).to_dict(),
        attn_implementation={"vision_config": "eager", "text_config": "sdpa", "": "sdpa"},
    )
    return tf.LlavaForConditionalGeneration(config).eval()


def implementations(model):
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
    }


def test_only_the_text_decoder_is_switched_and_all_of_it_is_put_back():
    model = multimodal()
    before = implementations(model)
    assert {"eager", "sdpa"} == set(before.values())
    with attention_implementation(model, "kascade-capture"):
        assert text_config(model)._attn_implementation == "kascade-capture"
        inside = implementations(model)
        changed = {name for name in before if before[name] != inside[name]}
        assert changed == {name for name in before if "language_model" in name}
        assert model.config.vision_config._attn_implementation == "eager"
    assert implementations(model) == before


def test_what_was_there_is_put_back_after_an_error_and_where_configs_differ(make_tiny_model):
    model = make_tiny_model("llama")
    other = type(model.config).from_dict(model.config.to_dict())
    other._attn_implementation = "eager"
    model.model.layers[2].self_attn.config = other  # a module that keeps a copy of the config

    def fail():
        with attention_implementation(model, "sdpa"):
            assert set(implementations(model).values()) == {"sdpa"}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    found = implementations(model)
    assert found.pop("model.layers.2.self_attn") == "eager"
    assert set(found.values()) == {"sdpa"}


def test_compiled_models_are_switched_too(make_tiny_model):
    model = torch.compile(make_tiny_model("llama"), backend="eager")
    with attention_implementation(model, "eager"):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_chooses_for_itself_is_refused(make_tiny_model, monkeypatch):
    model = make_tiny_model("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with (
        pytest.raises(KascadeError, match="LlamaForCausalLM does not support transformers' attention"),
        attention_implementation(model, "eager"),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


class AllLogits(nn.Module):
    """A model whose forward knows no `logits_to_keep`."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, past_key_values=None, use_cache=None, attention_mask=None):
        return self.inner(
            input_ids, past_key_values=past_key_values, use_cache=use_cache, attention_mask=attention_mask
        )


@pytest.mark.parametrize("wrap", [lambda model: model, AllLogits, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("at", [1, 3, [4], [0, 2, 9], [9, 2, 5], [8, 9], list(range(10)), list(range(9, -1, -1))])
def test_logits_at_positions(make_tiny_model, wrap, at):
    model = make_tiny_model("llama")
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        logits, output = logits_at(wrap(model), ids, at, use_cache=True)
    expected = whole[:, -at:] if isinstance(at, int) else whole[:, at]
    torch.testing.assert_close(logits, expected)
    assert output.past_key_values.get_seq_length() == 10
    if wrap is not AllLogits:
        assert output.logits.shape[1] == expected.shape[1], "logits were computed that nobody asked for"


def test_logits_of_a_continued_sequence(make_tiny_model):
    model = make_tiny_model("qwen2")
    ids = torch.randint(3, 64, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        for each in (model, AllLogits(model)):
            _, first = logits_at(each, ids[:, :6], use_cache=True)
            logits, _ = logits_at(each, ids[:, 6:], [1, 3], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(logits, whole[:, [7, 9]])


@pytest.mark.parametrize("at", [0, 11, [], [10], [-1]])
def test_positions_that_are_none(make_tiny_model, at):
    with pytest.raises(ValueError, match="positions"):
        logits_at(make_tiny_model("llama"), torch.zeros(1, 10, dtype=torch.long), at)
