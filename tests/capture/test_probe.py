"""The probe against attention weights that transformers' eager attention returns."""

import numpy as np
import pytest
import torch

from kascade_cli.capture.mass import pooled_mass, round_mass, top_mass
from kascade_cli.capture.probe import TOP_MASS_KEYS, Probe
from kascade_cli.capture.residual import Residual
from kascade_cli.capture.tiles import sample_tiles
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe, full_attention_layers
from tests.capture.conftest import make_model, random_tokens

# float16 with 7 bits of mantissa, and the model's own float32 noise.
RELATIVE, ABSOLUTE = 2**-8 + 2**-11 + 1e-3, 1e-6


class Collected:
    """A sink that keeps everything: {(layer position, tile): f16 [G, n]}."""

    def __init__(self) -> None:
        self.mass: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, layer: int, first: int, mass: np.ndarray) -> None:
        assert mass.dtype == np.float16
        for offset, tile in enumerate(mass):
            assert (layer, first + offset) not in self.mass
            self.mass[layer, first + offset] = tile


def measure(model, tokens, tiles, **options):
    info, sink = describe(model, "tiny"), Collected()
    with Probe(model, info) as probe:
        measurement = probe.run(tokens, tiles, sink, **options)
    return info, sink.mass, measurement


def eager_truth(model, tokens):
    """(attention [L, H, n, n], residual input and attention block output of every layer) by eager attention."""
    from kascade_cli.models import decoder_layers

    inputs, outputs, handles = {}, {}, []
    for index, layer in decoder_layers(model).items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: inputs.update(
                    {index: (args[0] if args else kwargs["hidden_states"])[0]}
                ),
                with_kwargs=True,
            )
        )
    for index, module in attention_modules(model).items():
        handles.append(
            module.register_forward_hook(lambda _, __, out, index=index: outputs.update({index: out[0][0]}))
        )
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(torch.tensor([tokens]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    return torch.stack(weights)[:, 0].double().numpy(), inputs, outputs


def expected_mass(attention, tile, groups):
    start, length = int(tile[0]), int(tile[1])
    rows = attention[:, start : start + length]  # [H, length, n]
    return rows.reshape(groups, -1, rows.shape[-1]).mean(axis=1)


@pytest.mark.parametrize("length", [1, 31, 33, 129])
def test_mass_is_the_pooled_eager_attention(family, length):
    model, tokens = make_model(family), random_tokens(length)
    tiles = sample_tiles(length, 12, tile=32, seed=3, prompt=0)
    info, mass, _ = measure(model, tokens, tiles)
    attention, _, _ = eager_truth(model, tokens)
    assert len(mass) == len(info.profiled_layers) * len(tiles)
    for (position, index), row in mass.items():
        layer = info.profiled_layers[position]
        truth = expected_mass(attention[layer], tiles[index], info.kv_heads)
        np.testing.assert_allclose(row, truth, rtol=RELATIVE, atol=ABSOLUTE)
        np.testing.assert_allclose(row.astype(np.float64).sum(-1), 1, atol=5e-3)
        assert not row[:, tiles[index].sum() :].any(), "mass after the causal edge"


def test_the_truth_tells_rows_and_heads_apart():
    """A shifted tile, another layer or swapped KV heads would not pass the comparison above."""
    model, tokens = make_model("Llama"), random_tokens(129)
    attention, _, _ = eager_truth(model, tokens)
    right = expected_mass(attention[1], (64, 32), 2)
    for wrong in (
        expected_mass(attention[1], (63, 32), 2),
        expected_mass(attention[2], (64, 32), 2),
        right[::-1],
        expected_mass(attention[1], (64, 31), 2),
    ):
        assert not np.allclose(wrong, right, rtol=RELATIVE, atol=ABSOLUTE)


def test_sliding_layers_pass_through():
    model = make_model("Gemma3Text")
    info, mass, measurement = measure(model, random_tokens(60), sample_tiles(60, 4, tile=16, seed=0, prompt=0))
    assert info.profiled_layers == [1, 3] == full_attention_layers(model)
    assert {position for position, _ in mass} == {0, 1}
    assert measurement.importance.shape == (2,)


@pytest.mark.parametrize("length", [1, 33, 129])
def test_top_mass_is_the_sorted_eager_attention(length):
    model, tokens = make_model("Qwen3"), random_tokens(length)
    tiles = sample_tiles(length, 12, tile=32, seed=3, prompt=0)
    info, _, measurement = measure(model, tokens, tiles)
    attention, _, _ = eager_truth(model, tokens)
    rows = tiles[tiles[:, 1] == 1][:, 0]
    expected = np.zeros((3, 4, len(TOP_MASS_KEYS)))
    for layer in range(3):
        for column, text in enumerate(TOP_MASS_KEYS):
            for row in rows:
                visible = row + 1
                count = -(-visible * int(text[:-1]) // 100) if text.endswith("%") else min(int(text), visible)
                ordered = np.sort(attention[layer, :, row], axis=-1)[:, ::-1]
                expected[layer, :, column] += ordered[:, :count].sum(-1) / len(rows)
    assert measurement.top_mass.shape == expected.shape
    np.testing.assert_allclose(measurement.top_mass, expected, atol=1e-4)
    if length == 129:
        assert np.ptp(expected[..., 2]) > 0.05, "the rows do not tell heads apart"


def test_importance_is_the_turn_of_the_residual(family):
    model, tokens = make_model(family), random_tokens(70)
    info, _, measurement = measure(model, tokens, sample_tiles(70, 4, tile=32, seed=0, prompt=0))
    _, inputs, outputs = eager_truth(model, tokens)
    from kascade_cli.models import decoder_layers

    layers = decoder_layers(model)
    for position, index in enumerate(info.profiled_layers):
        added = outputs[index]
        if family in ("Gemma3Text", "Olmo2"):  # normed before it is added
            added = layers[index].post_attention_layernorm(added)
        if family == "Granite":
            added = added * 0.3
        x, y = inputs[index].double(), (inputs[index] + added).double()
        truth = 1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        assert measurement.importance[position] == pytest.approx(truth.mean().item(), abs=1e-5)


def test_output_is_that_of_sdpa_and_the_model_is_restored(family):
    model, tokens = make_model(family), random_tokens(65)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        before = model(ids).logits
    info = describe(model, "tiny")
    with Probe(model, info) as probe:
        with torch.no_grad():
            inside = model(ids).logits
        probe.run(tokens, sample_tiles(65, 4, tile=32, seed=0, prompt=0), Collected())
    assert torch.equal(before, inside)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "kascade_probe") for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(before, model(ids).logits)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_decoded_tokens_are_rows_of_the_whole_sequence(name):
    model, tokens = make_model(name, seed=1, eos_token_id=None), random_tokens(41)
    model.generation_config.eos_token_id = None
    tiles = sample_tiles(41, 4, tile=16, seed=0, prompt=0)
    info, mass, measurement = measure(model, tokens, tiles, decode_tokens=5)
    assert len(measurement.generated) == 5
    reply = model.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False)[0, 41:].tolist()
    assert measurement.generated == reply
    attention, _, _ = eager_truth(model, tokens + reply)
    for step in range(5):
        for position, layer in enumerate(info.profiled_layers):
            row = mass[position, len(tiles) + step]
            assert row.shape == (info.kv_heads, 41 + step + 1)
            truth = expected_mass(attention[layer], (41 + step, 1), info.kv_heads)[:, : 41 + step + 1]
            np.testing.assert_allclose(row, truth, rtol=RELATIVE, atol=1e-5)


def test_decoding_ends_at_end_of_sequence():
    model, tokens = make_model("Llama", seed=1), random_tokens(41)
    tiles = sample_tiles(41, 4, tile=16, seed=0, prompt=0)
    model.generation_config.eos_token_id = None
    _, _, free = measure(model, tokens, tiles, decode_tokens=5)
    stop = free.generated[2]
    model.generation_config.eos_token_id = [stop]
    _, mass, stopped = measure(model, tokens, tiles, decode_tokens=5)
    assert stopped.generated == free.generated[: free.generated.index(stop)]
    assert max(index for _, index in mass) == len(tiles) + len(stopped.generated) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32(dtype):
    """Rows sum to 1 and equal softmax in float64 of the same rounded queries and keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 65, 16, generator=generator).to(dtype)
    key = torch.randn(2, 65, 16, generator=generator).to(dtype)
    mass = pooled_mass(query, key, torch.tensor([0, 32]), 32, scale=0.5)
    logits = torch.einsum("grqd,gsd->grqs", query.double().view(2, 2, 65, 16), key.double()) * 0.5
    logits.masked_fill_(torch.ones(65, 65, dtype=torch.bool).triu(1), -torch.inf)
    truth = torch.stack([logits.softmax(-1)[:, :, s : s + 32].mean((1, 2)) for s in (0, 32)])
    torch.testing.assert_close(mass.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scratch", [1, 20_000, 60_000, 1 << 30])
@pytest.mark.parametrize("length", [1, 8])
def test_mass_does_not_depend_on_how_the_work_is_cut(scratch, length):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(6, 40, 8, generator=generator), torch.randn(3, 90, 8, generator=generator)
    starts = torch.tensor([50, 58, 66, 80])  # 50 keys come before the queries
    mask = torch.rand(40, 90, generator=generator) > 0.2
    mask[:, 0] = True
    seen = []
    got = pooled_mass(
        query,
        key,
        starts,
        length,
        scale=1.0,
        mask=mask,
        scratch=scratch,
        on_rows=(lambda p, at: seen.append((p, at))) if length == 1 else None,
    )
    logits = torch.einsum("grqd,gsd->grqs", query.view(3, 2, 40, 8), key)
    causal = torch.arange(90)[None] <= torch.arange(50, 90)[:, None]
    attention = logits.masked_fill(~(causal & mask), -torch.inf).softmax(-1)
    truth = torch.stack([attention[:, :, s - 50 : s - 50 + length].mean((1, 2)) for s in starts])
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-6)
    if length == 1:
        assert torch.cat([at for _, at in seen]).tolist() == starts.tolist()
        for probabilities, at in seen:
            for row, position in zip(probabilities, at, strict=True):
                whole = torch.zeros(6, 90)
                whole[:, : row.shape[-1]] = row
                torch.testing.assert_close(whole, attention.view(6, 40, 90)[:, position - 50], rtol=1e-4, atol=1e-6)


def test_additive_masks_count_too():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, 8, generator=generator), torch.randn(2, 16, 8, generator=generator)
    allowed = torch.ones(16, 16, dtype=torch.bool)
    allowed[:, 3:6] = False
    additive = torch.zeros(16, 16).masked_fill(~allowed, torch.finfo(torch.float32).min)
    options = {"scale": 1.0}
    expected = pooled_mass(query, key, torch.tensor([8]), 8, mask=allowed, **options)
    assert not expected[..., 3:6].any()
    torch.testing.assert_close(pooled_mass(query, key, torch.tensor([8]), 8, mask=additive, **options), expected)


def test_rounding_keeps_the_relative_precision():
    values = torch.logspace(-7, 0, 20_000)
    rounded = round_mass(values)
    assert rounded.dtype == torch.float16
    normal = values >= 2**-14
    error = (rounded.float() - values).abs()
    assert (error / values)[normal].max() <= 2**-8 + 2**-11
    assert error[~normal].max() <= 6e-8 / 2 + 1e-12
    assert rounded[-1] == 1
    # Three bits of ten are gone, and rounding does not drift.
    assert not (rounded[normal].view(torch.int16) & 7).any()
    assert abs((rounded.float() - values)[normal].sum() / values[normal].sum()) < 1e-4


def test_top_mass_counts_shares_of_what_is_visible():
    probabilities = torch.zeros(2, 1, 100)
    probabilities[0, 0, :10] = 0.1
    probabilities[1, 0, :100] = 0.01
    got = top_mass(probabilities, torch.tensor([9, 99]), ["2", "20%", "21%", "64"])
    torch.testing.assert_close(got[:, 0], torch.tensor([[0.2, 0.2, 0.3, 1.0], [0.02, 0.2, 0.21, 0.64]]))


@pytest.mark.parametrize("where", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_numbers_are_named(llama, where):
    dict(llama.named_parameters())[where].data.view(-1)[0] = float("nan")
    info = describe(llama, "tiny")
    with Probe(llama, info) as probe, pytest.raises(KascadeError, match=where.replace(".", r"\.")):
        probe.run(random_tokens(40), sample_tiles(40, 4, tile=16, seed=0, prompt=0), Collected())
    assert llama.config._attn_implementation == "sdpa"


def test_overflow_is_told_from_damaged_weights(llama):
    llama.model.layers[2].self_attn.q_proj.weight.data *= 1e30
    llama.model.layers[2].self_attn.k_proj.weight.data *= 1e30
    with Probe(llama, describe(llama, "tiny")) as probe, pytest.raises(KascadeError, match="layer 2.*finite.*--dtype"):
        probe.run(random_tokens(40), sample_tiles(40, 4, tile=16, seed=0, prompt=0), Collected())


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_probe_that_cannot_enter_leaves_nothing_behind(llama, llama_info, monkeypatch):
    """Whatever fails on the way in: half of the hooks, the implementation and the handles are undone."""
    follow = Residual.follow

    def failing(self, layer, attention):
        handles = follow(self, layer, attention)
        yield next(handles)
        if self.layer == 1:
            raise MemoryError("no more")
        yield from handles

    monkeypatch.setattr(Residual, "follow", failing)
    with pytest.raises(MemoryError), Probe(llama, llama_info):
        pass
    assert llama.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "kascade_probe") for module in llama.modules())
    assert hooks(llama) == 0
    monkeypatch.undo()
    with Probe(llama, llama_info) as probe:
        assert hooks(llama) > 0
        with pytest.raises(KascadeError, match="a probe measures this model already"), Probe(llama, llama_info):
            pass
        probe.run(random_tokens(40), sample_tiles(40, 4, tile=16, seed=0, prompt=0), Collected())
    assert hooks(llama) == 0


def test_a_mask_narrows_what_is_measured(llama, llama_info):
    """A model that hides keys from its attention: the probe must not see mass on them."""
    tokens, tiles = random_tokens(65), sample_tiles(65, 6, tile=32, seed=0, prompt=0)
    allowed = torch.ones(65, 65, dtype=torch.bool).tril()[None, None]
    allowed[..., 5:30] = False

    def narrow(_, args, kwargs):
        return args, kwargs | {"attention_mask": allowed}

    handles = [m.register_forward_pre_hook(narrow, with_kwargs=True) for m in attention_modules(llama).values()]
    collected = Collected()
    with Probe(llama, llama_info) as probe:
        measured = probe.run(tokens, tiles, collected)
    for handle in handles:
        handle.remove()
    assert len(collected.mass) == 3 * len(tiles)
    for row in collected.mass.values():
        assert not row[:, 5:30].any()
        np.testing.assert_allclose(row.astype(np.float64).sum(-1), 1, atol=5e-3)
    # No more than 40 keys are visible, so that 64 hold everything.
    np.testing.assert_allclose(measured.top_mass[..., 0], 1, atol=1e-5)


def test_a_compiled_model_is_measured_as_it_is(llama, llama_info):
    tokens, tiles = random_tokens(40), sample_tiles(40, 4, tile=16, seed=0, prompt=0)
    _, plain, expected = measure(llama, tokens, tiles, decode_tokens=2)
    _, compiled, found = measure(torch.compile(llama, backend="eager"), tokens, tiles, decode_tokens=2)
    assert plain.keys() == compiled.keys()
    assert all((plain[key] == compiled[key]).all() for key in plain)
    assert (found.importance == expected.importance).all()
