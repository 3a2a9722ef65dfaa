"""Seeded damage to captures and profiles: what a disk, a transfer, an editor or a stranger might do to a file.

Every mutation takes a NumPy generator and changes the file in place. `CRAFTED` ones come with valid checksums and
seals, so that what they say is a capture of its own and may be read, if it can be one.
"""

import contextlib
import os
from pathlib import Path

import h5py
import numpy as np
import yaml

from kascade_cli.capture.format import capture_key, compression, prompt_seal, put_text, root_seal
from kascade_cli.capture.parts import MARKER
from kascade_cli.capture.store import CaptureStore

LAYERS, HEADS, QUERY_HEADS, KEYS = [0, 1, 3, 4], 2, 4, 140
TILES = np.array([[32, 32], [96, 32], [70, 1], [139, 1]], np.int32)
SETS = ("tiles", "importance", "top_mass", "mass")


def make_capture(path: Path, *, joined: bool, prompts: int = 3) -> None:
    """A small capture as the store writes it: one file, or an index and parts."""
    meta = {
        "schema_version": 2, "tool_version": "fuzz", "model_name": "toy", "model_fingerprint": "sha256:" + "0" * 64,
        "layers": 5, "query_heads": QUERY_HEADS, "kv_heads": HEADS, "head_dim": 16, "tile": 32, "seed": 3,
        "dtype": "float32", "device": "cpu", "dev_set_name": "toy", "dev_set_sha256": "1" * 64,
        "num_prompts": prompts, "max_length": KEYS, "options": {"seed": 3, "dtype": "float32"},
        "versions": {"numpy": np.__version__}, "top_mass_keys": ["64", "256", "5%", "10%", "20%"],
    }  # fmt: skip
    store = CaptureStore(path, meta, LAYERS)
    store.parts.mkdir()
    (store.parts / "lock").write_bytes(MARKER)
    for index in range(prompts):
        rng = np.random.default_rng(index)
        writer = store.begin(index, rng.integers(0, 99, KEYS).tolist(), TILES, KEYS)
        for layer in range(len(LAYERS)):
            mass = rng.random((len(TILES), HEADS, KEYS)) ** 8
            for tile, end in enumerate(TILES.sum(axis=1)):
                mass[tile, :, end:] = 0
            writer.write_mass(layer, 0, (mass / mass.sum(axis=-1, keepdims=True)).astype(np.float16))
        writer.finish(rng.random(len(LAYERS)), np.sort(rng.random((len(LAYERS), QUERY_HEADS, 5)), axis=-1))
    if joined:
        store.join()


def reseal(path: Path) -> None:
    """Seals the file anew, as one who knows how would; where the content allows it."""
    with contextlib.suppress(Exception), h5py.File(path, "r+") as file:
        meta = open_capture_meta(file)
        layers = file["profiled_layers"][()].tolist()
        put_text(file.attrs, "seal", root_seal(meta, layers))
        key = capture_key(meta, layers)
        for name, group in file["prompts"].items():
            arrays = [group[leaf][()] for leaf in SETS[:3]]
            tokens = group.attrs["token_ids_sha256"].decode()
            counts = int(group.attrs["n_tokens"]), int(group.attrs["n_prompt_tokens"])
            put_text(group.attrs, "seal", prompt_seal(key, name, tokens, *counts, *arrays))


def open_capture_meta(file: h5py.File) -> dict:
    import json

    from kascade_cli.capture.format import ATTRIBUTES, JSON_ATTRIBUTES

    meta = {n: file.attrs[n].decode() if k is str else int(file.attrs[n]) for n, k in ATTRIBUTES.items()}
    return meta | {n: json.loads(file.attrs[n]) for n in JSON_ATTRIBUTES}


# --- bytes, of any file ---


def _files(path: Path) -> list[Path]:
    return [path, *sorted(path.with_name(path.name + ".parts").glob("*.h5"))]


def _pick(rng, path):
    files = _files(path)
    return files[rng.integers(len(files))]


def flip_bits(rng, path):
    target = _pick(rng, path)
    data = bytearray(target.read_bytes())
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= 1 << int(rng.integers(8))
    target.write_bytes(data)


def overwrite_bytes(rng, path):
    target = _pick(rng, path)
    data = bytearray(target.read_bytes())
    length = int(rng.integers(1, 513))
    start = int(rng.integers(len(data)))
    fill = rng.bytes(length) if rng.random() < 0.5 else bytes([int(rng.choice([0, 255]))]) * length
    data[start : start + length] = fill[: len(data) - start]
    target.write_bytes(data)


def truncate(rng, path):
    target = _pick(rng, path)
    os.truncate(target, int(rng.integers(target.stat().st_size)))


def insert_or_cut(rng, path):
    target = _pick(rng, path)
    data = target.read_bytes()
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    cut = rng.random() < 0.5
    target.write_bytes(data[:start] + (b"" if cut else rng.bytes(length)) + data[start + (length if cut else 0) :])


# --- HDF5 objects ---


def _prompt(rng, file):
    return file["prompts"][f"{rng.integers(3):06d}"]


def damage_chunk(rng, path):
    """512 bytes at an offset inside stored mass: what killed a Blosc decoder."""
    target = _files(path)[-1]
    with h5py.File(target) as file:
        stored = next(iter(file["prompts"].values()))["mass"]
        info = stored.id.get_chunk_info(int(rng.integers(stored.id.get_num_chunks())))
    data = bytearray(target.read_bytes())
    start = info.byte_offset + int(rng.choice([0, 2, 12, rng.integers(info.size)]))
    length = int(rng.integers(1, 513))
    data[start : start + length] = rng.bytes(length)
    target.write_bytes(data)


def forge_chunk(rng, path):
    """Bytes that no compressor wrote, behind the library's back."""
    with h5py.File(path, "r+") as file:
        stored = _prompt(rng, file)[SETS[rng.integers(4)]]
        data = rng.bytes(int(rng.integers(0, 5000)))
        if rng.random() < 0.5:
            import zlib

            data = zlib.compress(bytes(int(rng.integers(1 << 22))), 9) + data[:4]
        stored.id.write_direct_chunk((0,) * stored.ndim, data, int(rng.choice([0, 0, 1, 2, 7])))


def _odd_value(rng):
    odd = [
        0, -1, 1, 2, 3, 2**62, -(2**63), 2**64 - 1, 10**6, 0.5, float("nan"), "", "x", "6", "a[/b]\x1b[0m",
        b"\xff\xfe",
        "m" * 40000, "{", "[" * 20000, "null", '{"a": {"b": 1}}', '["64"]', "[]", '["1e9%"]', "1" * 5000, True,
        np.arange(3), np.zeros((2, 2)), np.zeros(0), h5py.Empty("i8"), h5py.Empty("S1"), np.float16(1), ["a", "bc"],
    ]  # fmt: skip
    return odd[rng.integers(len(odd))]


def _set_attribute(rng, owner):
    names = list(owner.attrs)
    name = names[rng.integers(len(names))]
    value = _odd_value(rng)
    if isinstance(value, str) and rng.random() < 0.7:
        del owner.attrs[name]
        put_text(owner.attrs, name, value)
    else:
        owner.attrs[name] = value


def change_attribute(rng, path):
    with h5py.File(path, "r+") as file:
        _set_attribute(rng, file if rng.random() < 0.7 else _prompt(rng, file))


def nudge_number(rng, path):
    """A count in the root that is another plausible count."""
    with h5py.File(path, "r+") as file:
        names = [name for name in file.attrs if isinstance(file.attrs[name], np.integer)]
        name = names[rng.integers(len(names))]
        file.attrs[name] = max(0, int(file.attrs[name]) + int(rng.choice([-2, -1, 1, 2, 5])))


def delete_something(rng, path):
    with h5py.File(path, "r+") as file:
        owner = file if rng.random() < 0.4 else _prompt(rng, file)
        if rng.random() < 0.5:
            names = list(owner.attrs)
            del owner.attrs[names[rng.integers(len(names))]]
        else:
            names = list(owner)
            del owner[names[rng.integers(len(names))]]


def _replace(group, name, values, **options):
    del group[name]
    chunks = (1, 1, *values.shape[2:]) if values.ndim == 4 else values.shape
    plain = {"chunks": chunks if all(chunks) and chunks else None} | compression()
    group.create_dataset(name, data=values, **plain | options)


def _target(rng, file):
    if rng.random() < 0.15:
        return file, "profiled_layers"
    return _prompt(rng, file), SETS[rng.integers(4)]


def change_dtype(rng, path):
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file)
        kind = rng.choice(["<f2", ">f2", "<i2", "<f4", "<f8", "<i4", "<u4", "<i8", "S4", "<c8", "?", "u1"])
        with np.errstate(all="ignore"):
            _replace(group, name, group[name][()].astype(kind))


def change_shape(rng, path):
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file)
        values = group[name][()]
        axis = int(rng.integers(values.ndim))
        forms = (
            values[..., None], values.reshape(-1), np.take(values, [0], axis), np.concatenate([values, values], axis),
            np.moveaxis(values, 0, -1), np.delete(values, -1, axis), values[:1],
        )  # fmt: skip
        _replace(group, name, np.ascontiguousarray(forms[rng.integers(len(forms))]))


def gigantic_shape(rng, path):
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file)
        shape = list(group[name].shape)
        shape[rng.integers(len(shape))] = int(rng.choice([1 << 20, 1 << 27]))
        dtype = group[name].dtype
        del group[name]
        chunks = (1, 1, *shape[2:]) if len(shape) == 4 else tuple(shape)
        group.create_dataset(name, tuple(shape), dtype, chunks=chunks, **compression())
        if name == "mass":
            group.attrs["n_tokens"] = shape[-1]


def change_values(rng, path):
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file)
        values = group[name][()]
        with np.errstate(all="ignore"):
            odd = rng.choice([0, 1, -1, 2, 7, 1e38, -1e38, np.nan, np.inf, 1e-7]).astype(values.dtype)
            place = tuple(rng.integers(length) for length in values.shape)
            how = rng.integers(4)
            if how == 0:
                values[place] = odd
            elif how == 1:
                values[place[0]] = odd
            elif how == 2:
                values = (values * odd).astype(values.dtype)
            else:
                values[place[0]] = values[-1]
                if name == "mass":
                    values[place] = odd
        _replace(group, name, values)


def change_storage(rng, path):
    """Other filters, no chunks, external files, virtual datasets."""
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file)
        values = group[name][()]
        how = rng.integers(6)
        if how == 0:
            _replace(group, name, values, compression="lzf", compression_opts=None)
        elif how == 1:
            _replace(group, name, values, chunks=values.shape if values.ndim == 4 else None, shuffle=False)
        elif how == 2:
            _replace(group, name, values, fletcher32=False)
        elif how == 3:
            del group[name]
            group[name] = values
        elif how == 4:
            del group[name]
            group.create_dataset(name, values.shape, values.dtype, external=[("fifo", 0, h5py.h5f.UNLIMITED)])
        else:
            del group[name]
            unlimited = (None, *values.shape[1:])
            layout = h5py.VirtualLayout(values.shape, values.dtype, maxshape=unlimited)
            source = h5py.VirtualSource("fifo", "x", values.shape, values.dtype, maxshape=unlimited)
            layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
            group.create_virtual_dataset(name, layout)
    if how >= 4:
        _fifo(path)


def _fifo(path):
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path.parent / "fifo")


def change_links(rng, path):
    with h5py.File(path, "r+") as file:
        if rng.random() < 0.5:
            group, name = file["prompts"], f"{rng.integers(3):06d}"
        else:
            group, name = _target(rng, file) if rng.random() < 0.7 else (file, "prompts")
        links = (
            h5py.ExternalLink("fifo", "/"), h5py.ExternalLink(path.name, "/prompts"), h5py.SoftLink("/nowhere"),
            h5py.SoftLink(f"{group.name.rstrip('/')}/{name}"), h5py.ExternalLink("/dev/zero", "/"),
            file, file["prompts"],
        )  # fmt: skip
        link = links[rng.integers(len(links))]
        if rng.random() < 0.8:
            del group[name]
            group[name] = link
        else:
            group[str(rng.choice(["000003", "x", "000001 ", "999999"]))] = link
    _fifo(path)


def swap_kinds(rng, path):
    with h5py.File(path, "r+") as file:
        group, name = _target(rng, file) if rng.random() < 0.7 else (file, "prompts")
        del group[name]
        if rng.random() < 0.5:
            group.create_group(name)
        else:
            group[name] = np.dtype("f4") if rng.random() < 0.5 else rng.random(3)


def swap_prompts(rng, path):
    with h5py.File(path, "r+") as file:
        prompts = file["prompts"]
        one, two = (f"{index:06d}" for index in rng.choice(3, 2, replace=False))
        how = rng.integers(3)
        if how == 0:
            del prompts[two]
            prompts.copy(one, two)
        elif how == 1:
            prompts.move(one, "spare")
            prompts.move(two, one)
            prompts.move("spare", two)
        else:
            prompts.move(one, str(rng.choice(["1", "000009", "abc", "-00001", "0000001"])))


def change_parts(rng, path):
    """Parts of an unfinished capture: gone, exchanged, replaced by links or pipes."""
    folder = path.with_name(path.name + ".parts")
    one, two = (folder / f"{index:06d}.h5" for index in rng.choice(3, 2, replace=False))
    how = rng.integers(5)
    if how == 0:
        one.unlink()
    elif how == 1:
        one.write_bytes(two.read_bytes())
    elif how == 2:
        one.unlink()
        one.symlink_to(two)
    elif how == 3:
        one.unlink()
        os.mkfifo(one)
    else:
        with h5py.File(path, "r+") as file:
            del file["prompts"][one.stem]
            file["prompts"][one.stem] = h5py.ExternalLink(f"{folder.name}/{two.name}", f"/prompts/{two.stem}")


ANY = (flip_bits, overwrite_bytes, truncate, insert_or_cut, damage_chunk)
JOINED = (
    forge_chunk, change_attribute, nudge_number, delete_something, change_dtype, change_shape, gigantic_shape,
    change_values, change_storage, change_links, swap_kinds, swap_prompts,
)  # fmt: skip
UNJOINED = (change_parts,)
RESEALED = (change_attribute, nudge_number, change_dtype, change_shape, gigantic_shape, change_values, swap_prompts)


def mutate_capture(rng: np.random.Generator, path: Path) -> tuple[str, bool]:
    """Damages a capture; (name of what was done, whether it was sealed anew)."""
    parts = path.with_name(path.name + ".parts").exists()
    choices = ANY + (UNJOINED * 3 if parts else JOINED)
    change = choices[rng.integers(len(choices))]
    change(rng, path)
    crafted = not parts and change in RESEALED and rng.random() < 0.5
    if crafted:
        reseal(path)
    return change.__name__, crafted or change is forge_chunk


# --- profiles ---


def v2_profile() -> str:
    """What v1 cannot hold: a table by context length, no fingerprint, no head maps."""
    from kascade_cli.schema import Budget, ModelCard, Profile

    card = ModelCard(name="toy", layers=7, query_heads=4, kv_heads=2, head_dim=16)
    budget = Budget(ratios={1024: 0.3, 4096: 0.15, 16384: 0.1})
    return Profile.build(
        model=card, anchors=[0, 2], profiled_layers=[0, 1, 2, 4, 6], head_maps=None, budget=budget,
        selection={"method": "published", "anchors": [0, 2], "why": "toy"}, provenance={"source": "toy"},
    ).dumps()  # fmt: skip


_SCALARS = (
    "-1", "0", "1e999", ".nan", "-.inf", "9" * 5000, "0x1F", "1_000", "12:30:45", "2001-12-14", "true", "~",
    "''", '"\\ud800"',
    "!!int x", "!!float abc",
    "!!python/object/apply:os.getcwd []", "!!binary x", "!!set {a}", "*a", "&a 1", "[0, 1]", "{a: 1}", "? [a]", "1.5",
    "4611686018427387904",
    "[[[[0]]]]", "\"a[/b]\\u001b[0m\"", "dense", "anchor", "reuse", "!!timestamp 2001-99-99", "- - -", "|", "<<", "=",
    "1e400000",
)  # fmt: skip


def _lines(rng, text):
    lines = text.splitlines()
    place = int(rng.integers(len(lines)))
    how = rng.integers(7)
    if how == 0:
        del lines[place]
    elif how == 1:
        lines.insert(place, lines[place])
    elif how == 2:
        other = int(rng.integers(len(lines)))
        lines[place], lines[other] = lines[other], lines[place]
    elif how == 3:
        lines[place] = " " * int(rng.integers(1, 9)) + lines[place]
    elif how == 4:
        lines[place] = lines[place].lstrip()
    elif how == 5:
        lines[place] = lines[place].replace(":", ": " + _SCALARS[rng.integers(len(_SCALARS))] + " #", 1)
    else:
        lines[place] = lines[place].replace(" ", "\t")
    return "\n".join(lines)


def _bombs(rng, text):
    depth = int(rng.choice([10, 1000, 20000]))
    aliases = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else '0'}]" for i in range(12))
    odd = (
        aliases + "\n" + text, "x: " + "[" * depth + "]" * depth + "\n" + text, "? [1, 2]\n: 3\n" + text, "&a [*a]",
        "- " * depth,
        text + "\nselection: " + "{a: " * depth + "1" + "}" * depth, "x: &x {<<: *x}\n" + text, "\ufeff" + text,
        "%YAML 9.9\n---\n" + text,
        text + "\n---\n" + text, "", "null", "[]", "0", "--- |\n" + text, text * 3,
        "\n".join(f"k{i}: {i}" for i in range(20000)),
    )  # fmt: skip
    return odd[rng.integers(len(odd))]


def _tree(rng, text):
    document = yaml.safe_load(text)
    node, parent, key = document, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.75):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[rng.integers(len(keys))]
        node = node[key]
    values = (
        None, True, -1, 0, 1, 2, 10**30, 10**9, 1e308, -0.5, 0.5, float("nan"), "", "x", [], {}, [node],
        {"a": node}, [[1, 2], 3], "9" * 300,
        "\x1b[0m",
        ["\u202e"] * 3, [0] * 100_000,
    )  # fmt: skip
    if rng.random() < 0.15:
        del parent[key]
    elif isinstance(parent, dict) and rng.random() < 0.15:
        parent[[0, "new", None, True, 1.5][rng.integers(5)]] = parent.pop(key)
    else:
        parent[key] = values[rng.integers(len(values))]
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=bool(rng.random() < 0.5))


def mutate_profile(rng: np.random.Generator, path: Path) -> tuple[str, bool]:
    """Damages a profile; (name of what was done, True: a valid result is a profile of its own)."""
    changes = (flip_bits, overwrite_bytes, truncate, insert_or_cut, _lines, _lines, _bombs, _tree, _tree, _tree)
    change = changes[rng.integers(len(changes))]
    if change in (_lines, _bombs, _tree):
        path.write_bytes(change(rng, path.read_text()).encode("utf-8", "surrogatepass"))
    else:
        change(rng, path)
    return change.__name__.strip("_"), True
