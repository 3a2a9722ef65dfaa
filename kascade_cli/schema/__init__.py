"""The profile: which layers are anchors, which heads reuse which, and with what budget. YAML, checked on load.

schema: kascade/v2
algorithm: kascade
model: {name: ..., fingerprint: v2-sha256:..., layers: 16, query_heads: 8, kv_heads: 2, head_dim: 64}
budget: {ratio: 0.1, min_keys: 128, tile: 32}
layers:
- {role: dense}
- {role: reuse, anchor: 0, heads: {decode: [0, 1], prefill: [1, 1]}}
- {role: anchor}
selection: {...}
provenance: {...}
"""

from kascade_cli.schema.base import MOST_HEADS, MOST_LAYERS, PHASES, Phase
from kascade_cli.schema.budget import MOST_LENGTHS, Budget
from kascade_cli.schema.layers import HeadEntry, Heads, Layer, ModelCard
from kascade_cli.schema.profile import MAX_BYTES, V1, V2, Profile

__all__ = [
    "MAX_BYTES", "MOST_HEADS", "MOST_LAYERS", "MOST_LENGTHS", "PHASES", "V1", "V2", "Budget", "HeadEntry", "Heads",
    "Layer", "ModelCard", "Phase", "Profile",
]  # fmt: skip
