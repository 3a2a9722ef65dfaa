"""Attaching touches the text model alone, leaves nothing behind when it fails, and restores what it found."""

import sys

import pytest
import torch
import transformers as tf

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe
from kascade_cli.sparse import known_strategies

from .naive import some_profile
from .test_attach import ids_of, run

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = 63  # the token that stands for a part of an image


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        image_token_index=IMAGE, vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").double().eval()


def gemma3():
    text = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION), text_config=tf.Gemma3TextConfig(**TEXT | text),
        mm_tokens_per_image=4, image_token_id=IMAGE, image_token_index=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").double().eval()


def state(model):
    """Everything that attaching may touch."""
    configs, hooks = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "config"):
            configs[name] = module.config._attn_implementation
        hooks[name] = (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
    generation = dict(vars(model.generation_config)) if getattr(model, "generation_config", None) else None
    return configs, hooks, generation


def towers(model):
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if ("vision" in name or "tower" in name) and hasattr(module, "config")
    }


@pytest.mark.parametrize("build", [llava, gemma3])
def test_only_the_text_model_of_a_multimodal_one_is_switched(build):
    model = build()
    before, others = state(model), towers(model)
    assert set(others.values()) == {"sdpa"}
    profile = some_profile(describe(model), ratio=0.1, min_keys=2)
    ids = torch.tensor([ids_of(70, seed=1)])
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with attach(model, profile) as attachment:
            assert towers(model) == others
            assert {m.config._attn_implementation for m in attention_modules(model).values()} == {"kascade"}
            assert (model(input_ids=ids).logits - dense).abs().max() > 1e-4
            assert attachment.density < 0.9
        assert state(model) == before
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_images_of_a_causal_multimodal_model():
    model = llava()
    ids = torch.tensor([ids_of(20, seed=2) + [IMAGE] * 16 + ids_of(40, seed=3)])
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=pixels).logits
        with attach(model, strategy="oracle", ratio=1.0):
            torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, want)
        with attach(model, strategy="oracle", ratio=0.1, min_keys=2) as attachment:
            assert torch.isfinite(model(input_ids=ids, pixel_values=pixels).logits).all()
            assert attachment.density < 0.9


def test_images_that_see_each_other_are_refused():
    """Gemma 3's image tokens look ahead within their image: no causal mask."""
    model = gemma3()
    ids = torch.tensor([ids_of(20, seed=2) + [IMAGE] * 4 + ids_of(20, seed=3)])
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    before = state(model)
    with torch.no_grad():
        with attach(model, strategy="oracle"), pytest.raises(KascadeError, match="plain causal mask") as told:
            model(**options)
        assert "\n" not in str(told.value)
        assert torch.isfinite(model(**options).logits).all()
    assert state(model) == before


@pytest.mark.parametrize("build", [gemma3, None])
@pytest.mark.parametrize("broken", ["_plain_generation", "attention_implementation", "register_forward_hook"])
def test_an_attachment_that_fails_leaves_nothing(make_tiny_model, monkeypatch, broken, build):
    model = build() if build else make_tiny_model("llama")
    before = state(model)
    code = sys.modules["kascade_cli.integrations.transformers.attach"]
    with monkeypatch.context() as patch:
        if broken == "register_forward_hook":
            patch.setattr(type(model), broken, lambda *_, **__: 1 / 0)
        else:
            patch.setattr(code, broken, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attach(model, strategy="oracle")
    assert state(model) == before
    with attach(model, strategy="oracle", ratio=0.1, min_keys=2) as attachment:
        run(model, ids_of(70), [(0, 70)])
        assert attachment.density < 1
    assert state(model) == before


@pytest.mark.parametrize("strategy", known_strategies())
def test_leaving_restores_everything_whatever_happens(make_tiny_model, strategy):
    model = make_tiny_model("llama", layers=3)
    profile, before = some_profile(describe(model)), state(model)

    def work():
        with attach(model, profile, strategy=strategy):
            run(model, ids_of(40), [(0, 39), (39, 40)])
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()
    assert state(model) == before


@pytest.mark.parametrize("before", [True, False, None, "absent"])
def test_compiling_generation_is_as_it_was(make_tiny_model, before):
    model = make_tiny_model("llama")
    generation = model.generation_config
    if before == "absent":
        vars(generation).pop("disable_compile", None)
    else:
        generation.disable_compile = before
    kept = dict(vars(generation))
    with attach(model, strategy="oracle"):
        assert generation.disable_compile is True
    assert vars(generation) == kept
    assert ("disable_compile" in vars(generation)) == (before != "absent")


def test_leaving_tells_of_attention_that_did_not_go_through_kascade(make_tiny_model):
    """Also where nobody asks for a report; not in place of an error that is on its way."""
    model = make_tiny_model("llama")
    profile = some_profile(describe(model))

    def work(failure=None):
        with attach(model, profile):
            model.set_attn_implementation("sdpa")
            run(model, ids_of(40), [(0, 40)])
            if failure:
                raise failure

    with pytest.raises(KascadeError, match="none of its attention went through kascade"):
        work()
    with pytest.raises(RuntimeError, match="mine"):
        work(RuntimeError("mine"))
