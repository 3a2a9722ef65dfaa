"""Other models and other ways to run one: layers of two kinds, bfloat16, compiled."""

import pytest
import torch
import transformers

from kascade_cli import Profile, attach
from kascade_cli.models import describe
from kascade_cli.schema import Budget

from .engine import generate, prompts, replay, whole

ASKED = [130, 300, 512, 700]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A random Gemma 3 whose layers take turns, a sliding window and full attention, and a profile of it."""
    folder = tmp_path_factory.mktemp("hybrid")
    config = transformers.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=64, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 3, max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    info = describe(model)
    profile = Profile.build(
        model=info.card, anchors=[1, 3], profiled_layers=[1, 3, 5],
        head_maps={5: {"decode": [1, 0], "prefill": [0, 0]}}, budget=Budget(ratio=0.1, min_keys=16),
    )  # fmt: skip
    profile.save(folder / "profile.yaml")
    return folder, model, profile


@pytest.mark.parametrize("strategy", ["kascade", "oracle"])
def test_layers_of_two_kinds(hybrid, strategy):
    folder, model, profile = hybrid
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (70, 130, 333, 500)]
    run = generate(
        asked, strategy=strategy, profile=folder / "profile.yaml", model=str(folder), skip_tokenizer_init=True,
        attention_config={"backend_per_kind": {"full_attention": "CUSTOM"}}, max_num_seqs=3,
    )  # fmt: skip
    assert [layer for layers in run.report["roles"].values() for layer in layers] == [1, 3, 5]
    read = 0
    for prompt, got in zip(asked, run.tokens, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode(), attach(model, profile, strategy=strategy, backend="torch") as attached:
            wrote = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(got), do_sample=False, eos_token_id=None
            )
            read += attached.report()["keys_read"]
        assert got == wrote[0, len(prompt) :].tolist()
    assert run.report["keys_read"] == read


def test_bfloat16():
    """Rounded otherwise than transformers rounds: most answers are the same, none is nonsense."""
    asked = prompts(ASKED[1:], questions=2)
    run = generate(asked, dtype="bfloat16", max_num_seqs=3)
    same = [
        got[0] == replay(prompt, got, whole(prompt, 1), "kascade", dtype="bfloat16")[0][0]
        for prompt, got in zip(asked, run.tokens, strict=True)
    ]
    assert sum(same) >= len(same) - 2


def test_compiled(monkeypatch):
    """Under vLLM's torch.compile attention is one opaque op."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # dynamo without inductor
    asked = prompts(ASKED[:3])
    run = generate(asked, enforce_eager=False, max_num_seqs=3)
    for prompt, got in zip(asked, run.tokens, strict=True):
        assert got == replay(prompt, got, whole(prompt, len(got)), "kascade")[0]
