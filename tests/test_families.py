"""Every family of the table: captured, attached at ratio 1 against dense, or refused for the reason that it names.

Left out by `-m "not families"`.
"""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kascade_cli import Profile, attach
from kascade_cli.capture.probe import Probe
from kascade_cli.capture.tiles import sample_tiles
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_implementation, describe
from kascade_cli.models.identity import _essence
from tests.families import PAGE, TABLE, Family, page

LENGTH = 70  # two whole tiles and a part of a third
NEW = 5


def _spy(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention by its definition, which keeps its probabilities."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    logits = query.double() @ key.double().transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
    module.spied = weights[0]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("families-spy", _spy)
AttentionMaskInterface.register("families-spy", eager_mask)


def prompt(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, count), generator=torch.Generator().manual_seed(seed))


def every_other_layer(info) -> Profile:
    """The first full-attention layer is dense, then reuse and anchor layers alternate; head maps turn around."""
    heads = list(range(info.kv_heads))[::-1]
    layers, anchor = [], None
    for index in range(info.layers):
        if index not in info.profiled_layers:
            layers.append({"role": "passthrough"})
        elif anchor is None or info.profiled_layers.index(index) % 2 == 0:
            layers.append({"role": "dense" if anchor is None else "anchor"})
            anchor = index
        else:
            layers.append({"role": "reuse", "anchor": anchor, "heads": {"decode": heads, "prefill": heads}})
    fixed = {"schema": "kascade/v1", "algorithm": "kascade", "selection": {}, "provenance": {}}
    return Profile.model_validate(fixed | {"model": info.card.model_dump(), "budget": {}, "layers": layers})


def check_capture(model, info) -> None:
    """The probe's mass against the definition."""
    ids = prompt(LENGTH, 0)
    tiles = sample_tiles(LENGTH, 6, tile=32, seed=0, prompt=0)
    seen = {}

    def keep(layer, first, mass):
        seen.update({(layer, first + offset): tile for offset, tile in enumerate(mass)})

    with Probe(model, info) as probe:
        measured = probe.run(ids[0].tolist(), tiles, keep, decode_tokens=1)
    assert np.isfinite(measured.importance).all()
    with torch.no_grad(), attention_implementation(model, "families-spy"):
        model(input_ids=ids, use_cache=False)
    spied = {m.layer_idx: m.spied for m in model.modules() if hasattr(m, "spied")}
    for position, layer in enumerate(info.profiled_layers):
        for index, (start, length) in enumerate(tiles.tolist()):
            rows = spied[layer][:, start : start + length].unflatten(0, (info.kv_heads, -1))
            np.testing.assert_allclose(seen[position, index], rows.mean((1, 2)).numpy(), rtol=6e-3, atol=1e-5)


def check_generation(model, info, ids, mask, sparse) -> None:
    """Greedy decoding with a cache: the logits of every step."""
    options = {
        "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
        "attention_mask": mask, "pad_token_id": 0,
    }  # fmt: skip
    with torch.no_grad():
        dense = model.generate(ids, **options)
        with sparse() as run:
            found = model.generate(ids, **options)
            report = run.report()
    assert found.sequences.shape == (len(ids), ids.shape[1] + NEW)
    assert torch.equal(found.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(dense.logits), rtol=1e-4, atol=1e-4)
    assert report["density"] == pytest.approx(1.0)
    assert report["forward_passes"] == NEW
    assert set(report["phases"]) == {"prefill", "decode"}
    chosen = [layer for role in ("dense", "anchor", "reuse") for layer in report["roles"].get(role, [])]
    assert sorted(chosen) == info.profiled_layers


def check_logits(model, ids, mask, sparse) -> None:
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        dense = model(**given).logits
        with sparse() as run:
            found = model(**given).logits
            assert run.report()["density"] == pytest.approx(1.0)
    assert torch.isfinite(dense).all()
    real = mask.bool()
    torch.testing.assert_close(found[real], dense[real], rtol=1e-4, atol=1e-4)


def left_padded(lengths) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        ids[row, -length:] = prompt(length, 2 + row)
        mask[row, -length:] = 1
    return ids, mask.long()


def run_family(family: Family, model) -> dict[str, str]:
    """{what: why it was refused}; empty if everything went well. Anything else raises."""
    try:
        info = describe(model, family.kind)
    except KascadeError as error:
        return {"model": str(error).removeprefix(f"{family.kind}: ")}
    profile = every_other_layer(info)

    def sparse():
        return attach(model, profile, ratio=1.0, backend="torch")

    check_capture(model, info)
    single = prompt(LENGTH, 1)
    whole = torch.ones_like(single)
    batch = left_padded([LENGTH, 41, 5])
    check_logits(model, single, whole, sparse)
    refused = {}
    for what, check in {
        "padded batch": lambda: check_logits(model, *batch, sparse),
        "generation": lambda: check_generation(model, info, single, whole, sparse),
        "padded generation": lambda: check_generation(model, info, *batch, sparse),
    }.items():
        try:
            check()
        except KascadeError as error:
            refused[what] = str(error)
    return refused


@pytest.mark.families
@pytest.mark.parametrize("family", TABLE, ids=[f"{index}-{family.kind}" for index, family in enumerate(TABLE)])
def test_family(family, tmp_path):
    model = family.build()
    model.config.save_pretrained(tmp_path)
    loaded = type(model.config).from_pretrained(tmp_path)
    if family.refused is None:
        assert _essence(loaded) == _essence(model.config), "a saved model would have another fingerprint"
    found = run_family(family, model)
    assert found.pop("model", None) == family.refused
    assert found.keys() == family.fails.keys()
    for what, reason in family.fails.items():
        assert reason in found[what]
        assert "\n" not in found[what]


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run `python -m tests.families`"


def test_the_table_is_broad_enough():
    assert len({family.kind for family in TABLE if family.refused is None}) >= 40
