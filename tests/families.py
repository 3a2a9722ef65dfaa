"""Tiny random models of many causal-LM families, and what kascade does with each.

`python -m tests.families` writes docs/families.md from the table below; tests/test_families.py checks every line.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LAYERS = 4

# What every family gets of, where its config knows it.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "moe_intermediate_size": 16, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512,
    # Sharp attention: the usual 0.02 gives rows so even that a wrong one looks right.
    "initializer_range": 0.3,
    "num_local_experts": 2, "num_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1,
    "moe_k": 1, "attention_types": [[["global", "local"], 2]],
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "top_k_experts": 1, "shared_expert_intermediate_size": 16,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64,
    "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "n_mamba_heads": 4, "mamba_ngroups": 1, "use_mamba_kernels": False, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attn_layer_period": 2,
    "attn_layer_offset": 1, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "num_layers": LAYERS, "attention_heads": 4,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
FULL = {"layer_types": ["full_attention"] * LAYERS}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip


NO_INTERFACE = "no attention layer found that goes through transformers' attention interface"
SINKS = "attention sinks (layer 0) are not supported"
CAPPED = "attention logit soft-capping is not supported; choose a model without it"
NOTHING = "; there is no full attention to sparsify"
SLIDING = "every attention layer uses a sliding window" + NOTHING
INDEXED = "every attention layer chooses its keys with an indexer of its own (sparse attention already)" + NOTHING
HYBRID = "every layer mixes attention with a state-space block (layer type 'hybrid'), which is not supported" + NOTHING
TWICE = (
    "two attention modules are both layer {} (cross attention, or layers that share weights), which is not supported"
)


@dataclass(frozen=True)
class Family:
    """`kind`: transformers' model type. `refused`: the reason, after the model's name, where kascade does not run it.

    `fails`: of `padded batch`, `generation` and `padded generation`, those that are refused once the model runs, with
    (a part of) the reason.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    fails: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[type, type]:
        """Config and model."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self.kind], getattr(transformers, self.class_name)

    @property
    def class_name(self) -> str:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.kind]

    def build(self) -> torch.nn.Module:
        """A random model in float64 and evaluation mode, with SDPA attention where it has it."""
        config_class, model_class = self.classes
        known = set(getattr(config_class, "__dataclass_fields__", {}))
        known |= set(inspect.signature(config_class.__init__).parameters)
        shared = {name: value for name, value in SIZES.items() if name in known}
        options = {name: value for name, value in self.options.items() if name in known}
        config = config_class(**shared | TOKENS | options)
        config._experts_implementation = "eager"  # the others have no float64
        torch.manual_seed(0)
        try:
            model = model_class._from_config(config, attn_implementation="sdpa")
        except ValueError:
            model = model_class._from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and parameter.ndim > 1 and parameter.std() < 0.1:
                    parameter.mul_(10)
        model.generation_config.eos_token_id = None
        return model.double().eval()


TABLE = [
    Family("afmoe", MIXED),
    Family("apertus"),
    Family("arcee"),
    Family("aria_text"),
    Family("axk1", MLA),
    Family("beam", MIXED),
    Family("bamba", {"attn_layer_indices": [1, 3]}),
    Family("biogpt"),
    Family("bitnet"),
    Family("cohere"),
    Family("cohere2", MIXED),
    Family("cohere2_moe", MIXED),
    Family("cwm", MIXED),
    Family("deepseek_v2", MLA),
    Family("deepseek_v3", MLA),
    Family("dots1", FULL),
    Family("ernie4_5"),
    Family("ernie4_5_moe"),
    Family("exaone4", MIXED),
    Family("exaone_moe", MIXED),
    Family("flex_olmo"),
    Family("gemma"),
    Family("gemma3_text", MIXED | {"query_pre_attn_scalar": 8}),
    Family("gemma4_text", MIXED),
    Family("glm"),
    Family("glm4"),
    Family("glm4_moe"),
    Family("glm4_moe_lite", MLA),
    Family("gpt2"),
    Family("gpt_bigcode"),
    Family("gpt_neox"),
    Family("granite"),
    Family("granitemoe"),
    Family("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2}),
    Family("granitemoeshared"),
    Family("helium"),
    Family("hunyuan_v1_dense"),
    Family("hunyuan_v1_moe"),
    Family("hy_v3"),
    Family("hyperclovax"),
    Family("internlm3"),
    Family("iquestcoder"),
    Family("jais2"),
    Family("jamba"),
    Family("jetmoe"),
    Family("laguna", MIXED),
    Family("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    Family("lfm3", MIXED),
    Family("llama"),
    Family("llama4_text"),
    Family("mellum", MIXED),
    Family("minicpm3", MLA),
    Family("minimax", LINEAR, fails={"padded generation": "padded rows cannot be told apart with this model's cache"}),
    Family("minimax_m2"),
    Family("minimax_m3_vl_text"),
    Family("ministral3"),
    Family("mistral", {"sliding_window": None}),
    Family("mistral", {"sliding_window": 16}, refused=SLIDING),
    Family("mixtral"),
    Family("modernbert-decoder", MIXED),
    Family("moshi", {"sliding_window": 16}, refused=SLIDING),
    Family("nanochat"),
    Family("nemotron"),
    Family("nemotron_h", {"layers_block_type": ["mamba", "attention"] * 2}),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3", MIXED),
    Family("olmo_hybrid", LINEAR),
    Family("olmoe"),
    Family("opt"),
    Family("persimmon"),
    Family("phi"),
    Family("phi3"),
    Family("phimoe"),
    Family("qwen2"),
    Family("qwen2_moe"),
    Family("qwen3"),
    Family("qwen3_5_moe_text", LINEAR),
    Family("qwen3_5_text", LINEAR),
    Family("qwen3_moe"),
    Family("qwen3_next", LINEAR),
    Family("seed_oss"),
    Family("smollm3"),
    Family("solar_open"),
    Family("stablelm", {"partial_rotary_factor": 0.5}),
    Family("starcoder2"),
    Family("youtu", MLA),
    Family("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2}, refused="Zamba2ForCausalLM: " + TWICE.format(-1)),
    Family("bloom", refused=NO_INTERFACE),
    Family("codegen", refused=NO_INTERFACE),
    Family("deepseek_v32", MLA, refused=INDEXED),
    Family("deepseek_v4", refused=SINKS),
    Family("diffllama", refused="differential attention, two softmaxes a layer, (layer 0) is not supported"),
    Family("doge", refused="a mask made of the keys' content (layer 0) is not supported"),
    Family("falcon", refused=NO_INTERFACE),
    Family("falcon_h1", refused=HYBRID),
    Family("flint", refused=SINKS),
    Family("gemma2", refused=CAPPED),
    Family("glm_moe_dsa", MLA, refused=INDEXED),
    Family("gpt_neo", refused=NO_INTERFACE),
    Family("gpt_oss", refused=SINKS),
    Family("gptj", refused=NO_INTERFACE),
    Family("granite_swa", MIXED, refused=SINKS),
    Family("hrm_text", refused="HrmTextForCausalLM: " + TWICE.format(0)),
    Family("mamba", refused=NO_INTERFACE),
    Family("ministral", refused=SLIDING),
    Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4}, refused=NO_INTERFACE),
    Family("recurrent_gemma", refused=SLIDING),
    Family("vaultgemma", refused=CAPPED),
    Family("xglm", refused="XGLMForCausalLM does not support transformers' attention interface"),
    Family("zaya", refused=HYBRID),
]


_HEAD = """# Model families

What kascade does with the causal language models of transformers: a tiny random model of each family, in float64. This
page is written by `python -m tests.families`; `tests/test_families.py` checks every row of it.

## Runs ({runs} families)
Captured, with the mass compared to the softmax by its definition. Attached at ratio 1 with a profile in which every
other layer reuses keys, and compared to dense: logits of one prompt and of a left-padded batch, greedy decoding of
both with a cache. kascade works on the full-attention layers; those with a sliding window, linear attention or a
state-space block stay as they are.

| model type | class | exceptions |
|---|---|---|"""
_REFUSED = """
## Refused ({refused} families)
In one line, before the weights are read where the model comes from a checkpoint.

| model type | class | reason |
|---|---|---|"""


def page() -> str:
    """docs/families.md."""
    runs = [family for family in TABLE if family.refused is None]
    refused = [family for family in TABLE if family.refused is not None]
    lines = [_HEAD.format(runs=len({family.kind for family in runs}))]
    for family in runs:
        exceptions = "; ".join(f"{what}: refused, {why}" for what, why in family.fails.items())
        lines.append(f"| `{family.kind}` | {family.class_name} | {exceptions} |")
    lines.append(_REFUSED.format(refused=len({family.kind for family in refused})))
    lines += [f"| `{family.kind}` | {family.class_name} | {family.refused} |" for family in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
