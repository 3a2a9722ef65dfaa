"""The two training recipes, and a tiny one that the tests run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Architecture, data and schedule of one model.

    stages: (tokens, sequences) per optimiser step; the next one begins when the curriculum is satisfied.
    mixed: (tokens, sequences, probability) of the steps after the last stage.
    advance: running accuracy (share of answer tokens right) per kind that ends a stage. first_stage:
    the same for the first one. patience: after this fraction of the run only single-hop is asked for.
    decay: fraction of the run over which the learning rate falls linearly, down to `floor` times the peak.
    query_scale: factor on every q_proj after training (softens attention that training left almost one-hot).
    """

    architecture: str
    config: dict[str, Any]
    layout: str
    stages: tuple[tuple[int, int], ...]
    mixed: tuple[tuple[int, int, float], ...]
    advance: dict[str, float]
    first_stage: dict[str, float] = field(default_factory=dict)
    patience: float = 1.0
    minutes: float = 10.0
    warmup: int = 60
    decay: float = 0.5
    floor: float = 0.02
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    embedding_decay: float = 0.0
    query_scale: float = 1.0


_TOKENS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}

RECIPES: dict[str, Recipe] = {
    "16l": Recipe(
        architecture="qwen3",
        config={
            **_TOKENS,
            "hidden_size": 192,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 384,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        layout="hops",
        stages=tuple((length, 65536 // length) for length in (64, 128, 256, 512, 1024, 2048, 4096)),
        mixed=tuple(
            (length, 65536 // length, share)
            for length, share in (
                (256, 0.1),
                (512, 0.15),
                (1024, 0.2),
                (2048, 0.2),
                (4096, 0.2),
                (8192, 0.15),
            )
        ),
        advance={"single-hop": 0.93, "silent-two-hop": 0.7},
        first_stage={"single-hop": 0.93, "silent-two-hop": 0.8},
        patience=0.35,
        minutes=7.6,
    ),
    "8l": Recipe(
        architecture="llama",
        config={
            **_TOKENS,
            "hidden_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 256,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        layout="pairs",
        stages=((64, 32), (128, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)),
        mixed=((128, 32, 0.1), (256, 16, 0.25), (512, 8, 0.25), (1024, 4, 0.25), (2048, 2, 0.15)),
        advance={"single-hop": 0.9, "two-hop": 0.3},
        minutes=46.0,
        warmup=60,
        decay=0.25,
        floor=0.03,
        embedding_decay=0.05,
        query_scale=0.15,
    ),
    "tiny": Recipe(
        architecture="llama",
        config={
            **_TOKENS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        layout="hops",
        # Accuracies are above -1 from the start: every check advances, so that a short run sees all phases.
        stages=((32, 8), (64, 4)),
        mixed=((64, 4, 0.5), (96, 2, 0.5)),
        advance={"single-hop": -1.0},
        minutes=0.1,
        warmup=3,
        query_scale=0.5,
    ),
}
