"""Shapes by name, by numbers, from profiles and from models."""

import pytest
import torch

from kascade_cli.benchmarking import shapes
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Budget, ModelCard, Profile


def test_numbers_and_names():
    shape = shapes.parse_shape("32, 8, 128")
    assert (shape.query_heads, shape.kv_heads, shape.head_dim, shape.layers, shape.anchors) == (32, 8, 128, 32, 5)
    assert shapes.parse_shape("qwen3-8b").layers == 36


@pytest.mark.parametrize("text", ["32,8", "a,b,c", "32,7,128", "0,1,64", "32,0,64", "llama"])
def test_what_is_no_shape(text):
    with pytest.raises(UsageError):
        shapes.parse_shape(text)


def test_published_anchors():
    assert shapes.SHAPES["llama-3.1-8b"].anchor_layers() == [0, 2, 8, 13, 14]
    assert shapes.SHAPES["qwen3-8b"].anchor_layers() == [0, 2, 7, 14, 23]


@pytest.mark.parametrize(("layers", "anchors"), [(32, 5), (16, 4), (7, 7), (9, 2), (1, 1), (31, 30)])
def test_spread_anchors_are_distinct_and_begin_at_the_first_layer(layers, anchors):
    chosen = shapes.Shape("x", 8, 2, 64, layers, anchors).anchor_layers()
    assert len(set(chosen)) == anchors
    assert chosen[0] == 0
    assert max(chosen) < layers


def test_other_layers_drop_the_published_anchors():
    shape = shapes.with_layers(shapes.SHAPES["llama-3.1-8b"], 16, None)
    assert (shape.layers, shape.anchors, shape.chosen) == (16, 5, ())
    assert shapes.with_layers(shapes.SHAPES["llama-3.1-8b"], None, None).anchor_layers() == [0, 2, 8, 13, 14]
    with pytest.raises(UsageError, match="6 anchors do not fit 4 layers"):
        shapes.with_layers(shape, 4, 6)


def test_the_demo_is_what_ships_with_the_package():
    demo, read = shapes.named_shape("demo"), shapes.shape_of_model("demo")
    for name in ("query_heads", "kv_heads", "head_dim", "layers", "max_positions"):
        assert getattr(demo, name) == getattr(read, name)


def test_shape_of_a_model_that_is_not_there(tmp_path):
    with pytest.raises(KascadeError, match=r"no config\.json"):
        shapes.shape_of_model(str(tmp_path))


@pytest.mark.parametrize("architectures", [None, ["BertForMaskedLM"], ["BertLMHeadModel"]])
def test_encoders_have_no_shape(tmp_path, architectures):
    import transformers as tf

    tf.BertConfig(architectures=architectures).save_pretrained(tmp_path)
    with pytest.raises(KascadeError, match="is not a causal language model") as error:
        shapes.shape_of_model(str(tmp_path))
    assert "\n" not in str(error.value)
    tf.BertConfig(architectures=["BertLMHeadModel"], is_decoder=True).save_pretrained(tmp_path)
    assert shapes.shape_of_model(str(tmp_path)).query_heads == 12


def test_models_without_attention_heads_have_no_shape(tmp_path):
    import transformers as tf

    tf.MambaConfig(architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(KascadeError, match="no attention heads"):
        shapes.shape_of_model(str(tmp_path))


def test_shape_of_a_profile_counts_full_attention_layers_only():
    card = ModelCard(name="m", fingerprint="sha256:" + "0" * 64, layers=6, query_heads=4, kv_heads=2, head_dim=8)
    maps = {3: {"decode": [0, 1], "prefill": [0, 1]}}
    profile = Profile.build(model=card, anchors=[1, 5], profiled_layers=[1, 3, 5], head_maps=maps, budget=Budget())
    shape = shapes.shape_of_profile(profile)
    assert (shape.layers, shape.anchors, shape.anchor_layers()) == (3, 2, [0, 2])


def test_random_model_has_the_shape():
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = shapes.Shape("tiny", 4, 2, 8, 3, 2, ("LlamaConfig", config))
    model = shapes.random_model(shape, dtype=torch.float32, device=torch.device("cpu"))
    assert model.config.num_hidden_layers == 3
    assert not model.training
    with pytest.raises(UsageError, match="says nothing"):
        shapes.random_model(shapes.parse_shape("4,2,8"), dtype=torch.float32, device="cpu")
