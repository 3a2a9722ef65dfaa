"""Small captures written with h5py alone, from arrays that a test chooses."""

import hashlib
import json

import h5py
import numpy as np

META = {
    "schema_version": 2, "tool_version": "0.1.0", "model_name": "toy", "model_fingerprint": "sha256:" + "a" * 64,
    "head_dim": 8, "tile": 32, "seed": 0, "dtype": "float32", "device": "cpu",
    "dev_set_name": "toy-set", "dev_set_sha256": "b" * 64, "max_length": 256,
}  # fmt: skip
TOP_MASS_KEYS = ["64", "256", "5%", "10%", "20%"]


def random_prompt(rng, *, layers, heads, n_tokens, tiles, query_heads=None, related=0.0):
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
    top_mass = rng.random((layers, query_heads or 2 * heads, len(TOP_MASS_KEYS)))
    return {
        "tiles": np.array(tiles, np.int32),
        "mass": mass.astype(np.float16),
        "importance": rng.random(layers).astype(np.float32),
        "top_mass": np.sort(top_mass, axis=-1).astype(np.float32),
        "sha256": hashlib.sha256(rng.bytes(16)).hexdigest(),
    }


def write_capture(path, prompts, *, profiled_layers=None, layers=None, incomplete=(), **meta):
    """Writes the capture contract (docs/capture-format.md) with plain h5py."""
    count, _, heads, _ = prompts[0]["mass"].shape
    profiled_layers = list(range(count)) if profiled_layers is None else profiled_layers
    attributes = META | {
        "layers": layers or max(profiled_layers) + 1, "kv_heads": heads,
        "query_heads": prompts[0]["top_mass"].shape[1],
        "num_prompts": len(prompts), "options": json.dumps({}), "versions": json.dumps({"numpy": np.__version__}),
        "top_mass_keys": json.dumps(TOP_MASS_KEYS),
    } | meta  # fmt: skip
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, value in attributes.items():
            set_attribute(file, name, value)
        set_array(file, "profiled_layers", np.array(profiled_layers, np.int32))
        file.create_group("prompts")
        for index, prompt in enumerate(prompts):
            group = file.create_group(f"prompts/{index:06d}")
            n_tokens = prompt["mass"].shape[-1]
            for name in ("mass", "tiles", "importance", "top_mass"):
                set_array(group, name, prompt[name])
            set_attribute(group, "token_ids_sha256", prompt["sha256"])
            group.attrs["n_tokens"] = group.attrs["n_prompt_tokens"] = n_tokens
            if index not in incomplete:
                group.attrs["complete"] = True
        reseal(file)
    return path


def set_attribute(owner, name, value):
    """Text has a fixed length, so that HDF5's checksum of the object covers it."""
    if isinstance(value, str):
        data = value.encode()
        owner.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))
    else:
        owner.attrs[name] = value


def set_array(group, name, values, **options):
    """Replaces or makes a dataset; mass has a chunk for every (layer, tile), the rest is one chunk."""
    if name in group:
        del group[name]
    chunks = (1, 1, *values.shape[2:]) if name == "mass" else values.shape
    group.create_dataset(
        name, data=values, **{"chunks": chunks, "compression": "gzip", "shuffle": True, "fletcher32": True} | options
    )


def reseal(file):
    """Seals as docs/capture-format.md says: what a change of the content by someone who knows them looks like."""

    def text(owner, name):
        value = owner.attrs[name]
        return value.decode() if isinstance(value, bytes) else str(value)

    def sha256(head, *arrays):
        data = json.dumps(head, sort_keys=True).encode()
        return hashlib.sha256(data + b"".join(array[()].tobytes() for array in arrays)).hexdigest()

    root = {name: json.loads(text(file, name)) for name in ("options", "versions", "top_mass_keys")}
    for name, value in META.items() | {("layers", 0), ("kv_heads", 0), ("query_heads", 0), ("num_prompts", 0)}:
        root[name] = text(file, name) if isinstance(value, str) else int(file.attrs[name])
    layers = file["profiled_layers"][()].tolist()
    set_attribute(file, "seal", sha256([root, layers]))
    key = sha256([root["model_fingerprint"], root["dev_set_sha256"], root["options"], layers])
    for name, group in file["prompts"].items():
        counts = [int(group.attrs[n]) for n in ("n_tokens", "n_prompt_tokens")]
        head = [key, name, text(group, "token_ids_sha256"), *counts]
        set_attribute(group, "seal", sha256(head, *(group[n] for n in ("tiles", "importance", "top_mass"))))


def toy(path, *, layers=6, prompts=5, order=None, total=None, **options):
    """A small capture at `path`: its prompts in `order`."""
    rng = np.random.default_rng(11)
    made = [
        random_prompt(
            rng,
            layers=layers,
            heads=2,
            n_tokens=120 + index,
            tiles=[(64, 32), (96, 24), (100, 1), (90, 1)],
            related=0.3,
        )
        for index in range(prompts)
    ]
    return write_capture(path, [made[i] for i in order or range(prompts)], layers=total, **options)
