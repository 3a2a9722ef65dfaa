"""What is refused, and that it is before anything is loaded: one line with what to do."""

import json

import pytest

from kascade_cli import Profile
from kascade_cli.integrations.vllm.errors import Refusal

from .engine import MODEL, PROFILE, engine, kascade, options


def configure(**more):
    """vLLM's whole configuration, as every server makes it first: no weights are read."""
    from vllm import EngineArgs

    return EngineArgs(**options(**more)).create_engine_config()


@pytest.fixture
def changed(tmp_path):
    """A folder with the demo model's config, changed; there are no weights in it."""

    def make(**more):
        config = json.loads((MODEL / "config.json").read_text()) | more
        (tmp_path / "config.json").write_text(json.dumps(config))
        return {"model": str(tmp_path), "skip_tokenizer_init": True, "load_format": "dummy"}

    return make


REFUSED = {
    "fp8 cache": ({"kv_cache_dtype": "fp8"}, "KV cache of dtype fp8"),
    "blocks": ({"block_size": 16}, "16 tokens, no multiple of the tile of 32: use --block-size 32"),
    "context parallel": (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "context parallelism",
    ),
    "heads": ({"tensor_parallel_size": 4}, "tensor parallel 4 does not divide the 2 KV heads"),
    "pipeline": ({"pipeline_parallel_size": 2}, "cut at layer 8, and layer 8 reads the keys of layer 3"),
    "no backend": ({"attention_config": None}, "would run dense on the backend that vLLM chooses"),
    "other backend": ({"attention_config": {"backend": "CPU_ATTN"}}, "would run dense on the backend CPU_ATTN"),
    "transfer": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV transfer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_configurations(name):
    given, says = REFUSED[name]
    with kascade(), pytest.raises(Refusal) as error:
        configure(**given)
    assert says in str(error.value)
    assert str(error.value).startswith("kascade: ")
    assert "\n" not in str(error.value)


def test_every_reason_in_one_line():
    with kascade(), pytest.raises(Refusal) as error:
        configure(kv_cache_dtype="fp8", block_size=16, tensor_parallel_size=4)
    assert all(what in str(error.value) for what in ("fp8", "16 tokens", "tensor parallel 4"))


def test_variables():
    for profile, more, says in (
        ("no-such.yaml", {}, "no-such.yaml"),
        (None, {"strategy": "kascade"}, "needs a profile"),
        (PROFILE, {"strategie": 1}, "no key 'strategie'"),
        (PROFILE, {"strategy": "kascade-refresh"}, "carries keys from step to step"),
        (PROFILE, {"backend": "tilelang"}, None),  # told where a GPU is asked for, in the worker
    ):
        with kascade(profile, **more):
            if says is None:
                with pytest.raises(Refusal, match="TileLang kernels cannot run here"), engine():
                    pass
            else:
                with pytest.raises(Refusal, match=says):
                    configure()


def test_a_profile_of_another_model(tmp_path, changed):
    with (
        kascade(PROFILE.with_name("demo-small.yaml")),
        pytest.raises(Refusal, match="is for demo-small with 8 layers"),
    ):
        configure()
    profile = Profile.load(PROFILE)
    card = profile.model.model_copy(update={"fingerprint": "v2-sha256:" + "0" * 64})
    other = tmp_path / "other.yaml"
    other.write_text(profile.model_copy(update={"model": card}).dumps())
    with kascade(other), pytest.raises(Refusal, match="whose weights or configuration are not those of"):
        configure()
    with kascade(other, allow_other_weights=True):
        configure()


def test_models(changed):
    soft = changed(model_type="gemma2", architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0)
    with kascade(None, strategy="oracle"), pytest.raises(Refusal, match="soft-capping"):
        configure(**soft)
    windows = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    with kascade(None, strategy="oracle"), pytest.raises(Refusal, match="no full-attention layers"):
        configure(**changed(**windows, layer_types=None))
    kinds = {
        "layer_types": ["sliding_attention", "full_attention"] * 8,
        "sliding_window": 64,
        "use_sliding_window": True,
    }
    with kascade(None, strategy="oracle"), pytest.raises(Refusal, match="CUSTOM does not run sliding-window layers"):
        configure(**changed(**kinds))
    with kascade(None, strategy="oracle"):
        configure(**changed(**kinds), attention_config={"backend_per_kind": {"full_attention": "CUSTOM"}})


def test_layers_as_they_choose_a_backend():
    """What no configuration told before: `get_attn_backend` asks for each layer."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with kascade():
        config = configure()
        for more, says in (
            ({"has_sink": True}, "attention sinks"),
            ({"has_sliding_window": True, "has_sink": True}, "sliding-window layers .*, attention sinks"),
            ({"use_mm_prefix": True}, "bidirectional prefixes"),
        ):
            with set_current_vllm_config(config), pytest.raises(Refusal, match=says):
                get_attn_backend(64, torch.float32, "auto", **more)
        config.attention_config.backend = None
        with set_current_vllm_config(config), pytest.raises(Refusal, match="would run dense on the backend that"):
            get_attn_backend(64, torch.float32, "auto")


def test_attention_layers():
    """Whatever a model asks of one layer's attention."""
    from vllm.config import set_current_vllm_config

    from kascade_cli.integrations.vllm.backend import KascadeImpl

    with kascade():
        config = configure()
        for more, says in (
            ({"sinks": object()}, "attention sinks"),
            ({"logits_soft_cap": 30.0}, "logit soft-capping"),
            ({"sliding_window": 128}, "a sliding window"),
            ({"alibi_slopes": [1.0]}, "ALiBi"),
            ({"attn_type": "encoder_only"}, "encoder_only attention"),
            ({"kv_sharing_target_layer_name": "model.layers.1"}, "share a KV cache"),
            ({"chunk_lookback": 3}, "the option chunk_lookback"),
        ):
            with set_current_vllm_config(config), pytest.raises(Refusal, match=says):
                KascadeImpl(8, 64, 0.125, 2, **more)


def test_speculation_with_layers_of_its_own():
    with kascade(), pytest.raises(Refusal, match="drafts have attention of their own"):
        configure(speculative_config={"model": str(MODEL), "num_speculative_tokens": 2, "method": "draft_model"})


def test_two_plugins_want_the_backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kascade_cli.integrations.vllm import compat, start

    custom = AttentionBackendEnum.CUSTOM
    with kascade():
        configure()
        try:
            register_backend(custom, "amass.Backend")  # after ours
            with pytest.raises(Refusal, match="two plugins want .* CUSTOM, the other one is amass.Backend"):
                configure()
            with pytest.raises(Refusal, match="two plugins"):  # before ours
                start.start()
        finally:
            register_backend(custom, start.BACKEND)
        compat.check_ours(start.BACKEND)


def test_versions(monkeypatch):
    import vllm

    from kascade_cli.integrations.vllm.start import start

    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    with kascade(), pytest.raises(Refusal, match="vLLM 0.25.1 is not supported: install one of 0.26 to 0.32"):
        start()


def test_inert_without_the_variables():
    with kascade(None):
        config = configure(attention_config=None)
    assert config.attention_config.backend is None
