"""Importance against a float64 recomputation of what each family really adds to its residual stream."""

import math

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from kascade_cli.capture.probe import Probe
from kascade_cli.capture.residual import Residual
from kascade_cli.capture.tiles import sample_tiles
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, decoder_layers, describe
from tests.capture.conftest import COMMON, make_model, random_tokens

MLA = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 3}

# Family -> (options, (x, normed x, attention's output, layer) -> (stream without the attention, stream with it)).
FAMILIES = {
    "Llama": ({}, lambda x, n, a, layer: (x, x + a)),
    "Granite": ({"residual_multiplier": 0.22}, lambda x, n, a, layer: (x, x + 0.22 * a)),
    "MiniCPM3": (
        MLA | {"scale_depth": 1.4, "num_hidden_layers": 3},
        lambda x, n, a, layer: (x, x + 1.4 / math.sqrt(3) * a),
    ),
    "MiniMax": (
        MOE | {"full_attn_alpha_factor": 3.5, "full_attn_beta_factor": 0.7},
        lambda x, n, a, layer: (3.5 * n, 3.5 * n + 0.7 * a),
    ),
    "Olmo2": ({}, lambda x, n, a, layer: (x, x + layer.post_attention_layernorm(a))),
    "Cohere": ({}, lambda x, n, a, layer: (x, x + a)),
    "GPTNeoX": ({"use_parallel_residual": True}, lambda x, n, a, layer: (x, x + a)),
    "Phi": ({}, lambda x, n, a, layer: (x, x + a)),
    "StableLm": ({"use_parallel_residual": True, "partial_rotary_factor": 0.5}, lambda x, n, a, layer: (x, x + a)),
    "GPT2": ({}, lambda x, n, a, layer: (x, x + a)),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 48}, lambda x, n, a, layer: (x, x + a)),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    options, _ = FAMILIES[family]
    config = getattr(tf, f"{family}Config")(**COMMON | {"initializer_range": 0.1} | options)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"  # the others have no float64
    model = getattr(tf, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():  # norms that turn what they normalise
        for module in model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.mul_(torch.rand_like(module.weight) + 0.5)
    return model.to(dtype)


def truth(family, model, tokens):
    """[L] in float64: 1 - mean cos, from the tensors that the layers see."""
    model = model.double()
    attention, layers = attention_modules(model), decoder_layers(model)
    seen = {index: {} for index in attention}
    handles = []
    for index, module in attention.items():

        def inside(_, args, kwargs, output, store=seen[index]):
            given = args[0] if args else kwargs["hidden_states"]
            store["normed"], store["added"] = given[0], (output[0] if isinstance(output, tuple) else output)[0]

        def enter(_, args, kwargs, store=seen[index]):
            store["x"] = (args[0] if args else kwargs["hidden_states"])[0]

        handles.append(module.register_forward_hook(inside, with_kwargs=True))
        handles.append(layers[index].register_forward_pre_hook(enter, with_kwargs=True))
    with torch.no_grad():
        model(torch.tensor([tokens]))
        for handle in handles:
            handle.remove()
        result = []
        for index, store in seen.items():
            without, together = FAMILIES[family][1](store["x"], store["normed"], store["added"], layers[index])
            cosine = (without * together).sum(-1) / without.norm(dim=-1) / together.norm(dim=-1)
            result.append(1 - cosine.mean().item())
    return result


def importance(model, tokens):
    tiles = sample_tiles(len(tokens), 4, tile=32, seed=0, prompt=0)
    with Probe(model, describe(model, "m")) as probe:
        return probe.run(tokens, tiles, lambda *_: None).importance


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_what_the_attention_really_adds(family):
    model, tokens = build(family), random_tokens(70)
    measured = importance(model, tokens)
    expected = truth(family, model, tokens)
    assert min(expected) > 1e-4, "nothing is turned, so nothing is tested"
    np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("family", ["Granite", "MiniMax", "GPTNeoX", "Phi"])
def test_importance_in_half_precision(family):
    tokens = random_tokens(70)
    rounded = build(family, torch.bfloat16)
    np.testing.assert_allclose(importance(rounded, tokens), truth(family, rounded, tokens), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 300])
def test_importance_of_prompts_of_any_length(length):
    model, tokens = build("Granite"), random_tokens(length)
    np.testing.assert_allclose(importance(model, tokens), truth("Granite", model, tokens), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_huge_tokens_do_not_hide_what_is_added(dtype, rtol):
    """Real models have tokens a thousand times larger than others; their rounding exceeds what is added to them."""
    model, tokens = build("Granite", dtype), random_tokens(70)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[0]] *= 10_000
        model.model.embed_tokens.weight[tokens[30]] *= 3_000
    np.testing.assert_allclose(importance(model, tokens), truth("Granite", model, tokens), rtol=rtol, atol=2e-6)


class Strange(nn.Module):
    """A layer whose residual stream cannot be taken apart: the attention's output is squashed, then added."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, layer.input_layernorm

    def forward(self, hidden_states, **kwargs):
        added, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
        return self.mlp(hidden_states + torch.tanh(5 * added))


def test_a_layer_that_cannot_be_understood_is_refused():
    model = make_model("Llama")
    model.model.layers[1] = Strange(model.model.layers[1])
    with pytest.raises(KascadeError, match="layer 1 adds its attention to the residual stream in a way that is not"):
        importance(model, random_tokens(70))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_that_adds_nothing_turns_nothing():
    model = make_model("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert importance(model, random_tokens(70))[1] == pytest.approx(0, abs=1e-6)


def test_nothing_is_kept_between_passes():
    """A 128k prompt's tensors would stay in memory until the next one."""
    model = make_model("Llama")
    with Probe(model, describe(model, "m")) as probe:
        probe.run(random_tokens(70), sample_tiles(70, 4, tile=32, seed=0, prompt=0), lambda *_: None)
        assert all(isinstance(residual, Residual) for residual in probe._residuals)
        assert not any(r._before or r._added is not None or r._other is not None for r in probe._residuals)
