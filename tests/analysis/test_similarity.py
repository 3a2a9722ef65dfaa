import subprocess
import sys

import h5py
import numpy as np
import pytest

from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import KascadeError
from tests.toy_captures import random_prompt, write_capture


def naive(prompt, top_k, reduce):
    """The formula of the method, in float64 loops: {phase: [a, b, g', g]}."""
    mass = prompt["mass"].astype(np.float64)
    layers, _, heads, _ = mass.shape
    values = {"decode": [], "prefill": []}
    for t, (start, length) in enumerate(prompt["tiles"]):
        last = start + 1 if length == 1 else start
        top = [[np.argsort(-mass[a, t, g, :last], kind="stable")[:top_k] for g in range(heads)] for a in range(layers)]
        sim = np.zeros((layers, layers, heads, heads))
        for a in range(layers):
            for b in range(a, layers):
                for other in range(heads):
                    for g in range(heads):
                        diagonal = 0.0 if length == 1 else mass[b, t, g, start : start + length].sum()
                        kept = mass[b, t, g, top[a][other]].sum() + diagonal
                        own = mass[b, t, g, top[b][g]].sum() + diagonal
                        sim[a, b, other, g] = kept / own if own else 1.0
        values["decode" if length == 1 else "prefill"].append(sim)
    return {phase: getattr(np, reduce)(stack, axis=0) for phase, stack in values.items() if stack}


def make_prompts(seed=0, sizes=(131, 97, 255)):
    rng = np.random.default_rng(seed)
    return [
        random_prompt(
            rng,
            layers=4,
            heads=3,
            n_tokens=n,
            tiles=[(0, 32), (32, 32), (64, 31), (n - 1, 1), (70, 1), (n - 5, 5)],
        )
        for n in sizes
    ]


@pytest.mark.parametrize("reduce", ["min", "mean"])
@pytest.mark.parametrize("top_k", [5, 64])
def test_equals_the_formula(tmp_path, reduce, top_k):
    prompts = make_prompts()
    measured = measure(write_capture(tmp_path / "c.h5", prompts), top_k=top_k, reduce=reduce)
    for phase in ("decode", "prefill"):
        wanted = np.mean([naive(prompt, top_k, reduce)[phase] for prompt in prompts], axis=0)
        np.testing.assert_allclose(measured.mean(phase), wanted, atol=2e-7)
        # 5 of ~100 keys is a real choice: unrelated heads lose something.
        assert top_k == 64 or wanted[0, 1].max() < 0.9
    np.testing.assert_allclose(measured.importance, np.mean([p["importance"] for p in prompts], axis=0), rtol=1e-6)
    assert measured.tiles == {"decode": 6, "prefill": 12}


def test_blocks_of_tiles_and_workers_change_nothing(tmp_path, monkeypatch):
    path = write_capture(tmp_path / "c.h5", make_prompts())
    whole = measure(path, top_k=5)
    parallel = measure(path, top_k=5, workers=2)
    monkeypatch.setattr("kascade_cli.analysis.similarity._BLOCK_BYTES", 1)
    blocked = measure(path, top_k=5, workers=1)
    for phase in whole.sim:
        np.testing.assert_array_equal(whole.sim[phase], parallel.sim[phase])
        np.testing.assert_array_equal(whole.sim[phase], blocked.sim[phase])


def test_permuting_prompts_changes_no_bit(tmp_path):
    prompts = make_prompts(sizes=(131, 97, 255, 140, 111, 200, 180))
    one = measure(write_capture(tmp_path / "a.h5", prompts), top_k=5)
    order = np.random.default_rng(3).permutation(len(prompts))
    two = measure(write_capture(tmp_path / "b.h5", [prompts[i] for i in order]), top_k=5)
    for phase in one.sim:
        np.testing.assert_array_equal(one.sim[phase], two.sim[phase])
    np.testing.assert_array_equal(one.importance, two.importance)
    np.testing.assert_array_equal(one.top_mass, two.top_mass)


def test_incomplete_prompts_are_left_out(tmp_path):
    prompts = make_prompts()
    part = measure(write_capture(tmp_path / "a.h5", prompts, incomplete=[1], num_prompts=9), top_k=5)
    wanted = np.mean([naive(prompts[i], 5, "min")["decode"] for i in (0, 2)], axis=0)
    assert part.prompts == 2
    np.testing.assert_allclose(part.mean("decode"), wanted, atol=2e-7)


def test_no_complete_prompt(tmp_path):
    path = write_capture(tmp_path / "a.h5", make_prompts(), incomplete=[0, 1, 2])
    with pytest.raises(KascadeError, match="no complete prompt"):
        measure(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_nan_names_prompt_and_layer(tmp_path, workers):
    prompts = make_prompts()
    prompts[1]["mass"][2, 4, 1, 3] = np.nan
    with pytest.raises(KascadeError, match="prompt 000001, layer 2, tile 4: NaN"):
        measure(write_capture(tmp_path / "a.h5", prompts), workers=workers)


def test_nan_importance(tmp_path):
    prompts = make_prompts()
    prompts[0]["importance"][1] = np.nan
    with pytest.raises(KascadeError, match="importance"):
        measure(write_capture(tmp_path / "a.h5", prompts))


def test_damaged_data_is_one_line(tmp_path):
    path = write_capture(tmp_path / "a.h5", make_prompts(sizes=(255,)))
    with h5py.File(path) as file:
        offset = file["prompts/000000/mass"].id.get_chunk_info(5).byte_offset
    with path.open("r+b") as raw:
        raw.seek(offset + 10)
        raw.write(b"\xff\x00\xff")
    with pytest.raises(KascadeError, match="prompt 000000, layer 0, tile 5: unreadable, the file is damaged"):
        measure(path)


def test_analysis_imports_no_torch():
    code = (
        "import sys, pkgutil, importlib, kascade_cli.analysis as a\n"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(a.__path__, 'kascade_cli.analysis.')]\n"
        "assert 'kascade_cli.analysis.similarity' in sys.modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
