"""Small captures written with h5py alone, from arrays that a test chooses."""

import hashlib
import json

import h5py
import numpy as np

META = {
    "schema_version": 1, "tool_version": "0.1.0", "model_name": "toy", "model_fingerprint": "sha256:" + "a" * 64,
    "query_heads": 4, "kv_heads": 2, "head_dim": 8, "tile": 32, "seed": 0, "dtype": "float32", "device": "cpu",
    "dev_set_name": "toy-set", "dev_set_sha256": "b" * 64, "max_length": 256,
}  # fmt: skip
TOP_MASS_KEYS = ["64", "256", "5%", "10%", "20%"]


def random_prompt(rng, *, layers, heads, n_tokens, tiles, query_heads=4, related=0.0):
    """One prompt's arrays. `tiles`: (start, length) pairs; mass is zero after the causal edge and sums to 1.

    `related` in [0, 1] mixes a pattern shared by all layers and heads into every row.
    """
    mass = np.zeros((layers, len(tiles), heads, n_tokens), np.float64)
    for t, (start, length) in enumerate(tiles):
        end = start + length
        shared = rng.random(end) ** 8
        own = rng.random((layers, heads, end)) ** 8
        mass[:, t, :, :end] = related * shared + (1 - related) * own
    mass /= mass.sum(axis=-1, keepdims=True)
    return {
        "tiles": np.array(tiles, np.int32),
        "mass": mass.astype(np.float16),
        "importance": rng.random(layers).astype(np.float32),
        "top_mass": np.sort(rng.random((layers, query_heads, len(TOP_MASS_KEYS))), axis=-1).astype(np.float32),
        "sha256": hashlib.sha256(rng.bytes(16)).hexdigest(),
    }


def write_capture(path, prompts, *, profiled_layers=None, layers=None, incomplete=(), **meta):
    """Writes the capture contract (docs/capture-format.md) with plain h5py and no compression."""
    count, _, heads, _ = prompts[0]["mass"].shape
    profiled_layers = list(range(count)) if profiled_layers is None else profiled_layers
    attributes = META | {
        "layers": layers or max(profiled_layers) + 1, "kv_heads": heads, "query_heads": 2 * heads,
        "num_prompts": len(prompts), "options": json.dumps({}), "versions": json.dumps({"numpy": np.__version__}),
        "top_mass_keys": json.dumps(TOP_MASS_KEYS),
    } | meta  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        file["profiled_layers"] = np.array(profiled_layers, np.int32)
        file.create_group("prompts")
        for index, prompt in enumerate(prompts):
            group = file.create_group(f"prompts/{index:06d}")
            shape = prompt["mass"].shape
            group.create_dataset("mass", data=prompt["mass"], chunks=(1, 1, *shape[2:]))
            for name in ("tiles", "importance", "top_mass"):
                group[name] = prompt[name]
            group.attrs["token_ids_sha256"] = prompt["sha256"]
            group.attrs["n_tokens"] = group.attrs["n_prompt_tokens"] = shape[3]
            if index not in incomplete:
                group.attrs["complete"] = True
    return path
