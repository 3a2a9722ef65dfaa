"""What `kascade/v2` adds: a ratio by length, head maps that are not measured, a geometry for a fingerprint."""

import json

import pytest
import yaml

from kascade_cli.errors import KascadeError
from kascade_cli.schema import Budget, Profile
from tests.test_schema import CARD, MAPS, example  # noqa: F401

TABLE = {1024: 0.3, 4096: 0.15, 16384: 0.1}


def test_a_table_by_length_round_trips_with_numbers_as_keys(tmp_path):
    profile = example(budget=Budget(ratios=TABLE, min_keys=16))
    profile.save(tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    assert "budget: {ratio: 0.3, ratios: {1024: 0.3, 4096: 0.15, 16384: 0.1}, min_keys: 16, tile: 32}" in text
    again = Profile.load(tmp_path / "p.yaml")
    assert again == profile
    assert again.dumps() == text
    assert again.budget.ratios == TABLE
    assert list(again.budget.ratios) == sorted(TABLE)
    assert yaml.safe_load(text)["budget"]["ratios"] == TABLE
    for other in (text.replace("1024:", "'1024':"), text.replace("ratio: 0.3, ", "")):
        assert other != text
        assert Profile.loads(other) == profile
    document = json.loads(json.dumps(profile.model_dump(by_alias=True, exclude_none=True, mode="json")))
    assert Profile.model_validate(document) == profile
    assert hash(profile.budget) == hash(again.budget) != hash(Budget(ratio=0.3, min_keys=16))


def test_the_longest_table_fits_a_profile():
    table = {2**n: (n + 1) / 40 for n in range(31)}
    profile = example(budget=Budget(ratios=table))
    assert Profile.loads(profile.checked_dumps()).budget.ratios == table


def test_a_budget_without_a_table_is_written_as_before():
    assert "budget: {ratio: 0.1, min_keys: 128, tile: 32}\n" in example().dumps()
    assert Budget().model_dump() == {"ratio": 0.1, "min_keys": 128, "tile": 32}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{ratios: {1000: 0.3}}", "line 10: budget.ratios: 1000 is not a power of two"),
        ("{ratios: {4096: 0.1, 1024: 0.3}}", "line 10: budget.ratios: the lengths must rise"),
        ("{ratios: {1024: 0.3, 1024: 0.2}}", "key '1024' is given twice"),
        ("{ratios: {1024: 0.3, '1024': 0.2}}", "key '1024' is given twice"),
        ("{ratios: {0: 0.3}}", "line 10: not readable as YAML: key 0 is no text"),
        ("{ratios: {'0': 0.3}}", "line 10: budget.ratios.0"),
        ("{ratios: {01024: 0.3}}", "key 01024 is no text"),
        ("{ratios: {-2: 0.3}}", "key -2 is no text"),
        ("{ratios: {1.0: 0.3}}", "key 1.0 is no text"),
        ("{ratios: {1024: 0}}", "line 10: budget.ratios.1024: Input should be greater than 0"),
        ("{ratios: {1024: 1.5}}", "line 10: budget.ratios.1024: Input should be less than or equal to 1"),
        ("{ratios: {1024: '0.5'}}", "line 10: budget.ratios.1024"),
        ("{ratios: {abc: 0.5}}", "line 10: budget.ratios.abc"),
        ("{ratios: {8589934592: 0.5}}", "line 10: budget.ratios.8589934592"),
        ("{ratios: {}}", "line 10: budget.ratios"),
        ("{ratios: [0.1]}", "line 10: budget.ratios"),
        ("{ratio: 0.1, ratios: {1024: 0.3}}", "line 10: budget.ratio: 0.1 is not that of the smallest length"),
        ("{ratios: {" + ", ".join(f"{n}: 0.1" for n in range(1, 40)) + "}}", "line 10: budget.ratios"),
        ("{1: 2}", "key 1 is no text"),
    ],
)
def test_tables_that_make_no_sense(budget, message):
    text = example().dumps().replace("{ratio: 0.1, min_keys: 128, tile: 32}", budget)
    with pytest.raises(KascadeError) as error:
        Profile.loads(text, "p.yaml")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_v1_means_what_it_meant_and_is_written_as_v1():
    text = example().dumps().replace("kascade/v2", "kascade/v1")
    old = Profile.loads(text)
    assert old.dumps() == old.checked_dumps() == text
    assert old.model_copy(update={"schema_": "kascade/v2"}) == example()
    table = text.replace("{ratio: 0.1, min", "{ratios: {1024: 0.3}, min")
    with pytest.raises(KascadeError, match="line 10: budget.ratios: .* needs `schema: kascade/v2`"):
        Profile.loads(table)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(), "10%"),
        (Budget(ratio=0.125), "12.5%"),
        (Budget(ratios=TABLE), "30%, from 4096 keys 15%, from 16384 keys 10%"),
    ],
)
def test_a_budget_in_words(budget, text):
    assert budget.describe() == text


def test_head_maps_that_are_not_measured(tmp_path):
    profile = example(head_maps=None)
    assert not profile.heads_measured
    assert "- {role: reuse, anchor: 2}\n" in profile.dumps()
    profile.save(tmp_path / "p.yaml")
    assert Profile.load(tmp_path / "p.yaml") == profile
    assert profile.anchors == [0, 2]
    with pytest.raises(KascadeError, match="^layer 4 of the profile for x has no head map$"):
        profile.head_map(4, "decode")
    assert example().heads_measured


def test_key_sets_that_all_heads_share(tmp_path):
    profile = example(head_maps="pooled")
    assert (profile.pooled, profile.heads_measured) == (True, False)
    assert "- {role: reuse, anchor: 2, heads: pooled}\n" in profile.dumps()
    profile.save(tmp_path / "p.yaml")
    assert Profile.load(tmp_path / "p.yaml") == profile
    assert not profile.stays_within(2)
    assert not example().pooled
    assert not example(head_maps=None).pooled
    text = profile.dumps()
    with pytest.raises(KascadeError, match=r"layers.\d.heads: pooled key sets need `schema: kascade/v2`"):
        Profile.loads(text.replace("kascade/v2", "kascade/v1"))
    with pytest.raises(KascadeError, match=r"layers.\d.heads: pooled, and not in layer \d: either all or none"):
        Profile.loads(text.replace("heads: pooled", "heads: [0, 1]", 1))
    with pytest.raises(KascadeError, match=r"layers.\d: no `heads`, and layer \d has them"):
        Profile.loads(text.replace(", heads: pooled", "", 1))
    with pytest.raises(KascadeError, match=r"layers.\d.heads: 'pool' is neither a head map nor `pooled`$"):
        Profile.loads(text.replace("heads: pooled", "heads: pool", 1))


def test_a_profile_without_a_fingerprint_is_for_a_geometry(tmp_path):
    free = example(model=CARD.model_copy(update={"fingerprint": None}))
    free.save(tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    assert "fingerprint" not in text
    assert Profile.load(tmp_path / "p.yaml") == free
    assert Profile.loads(text.replace("  name: x\n", "  name: x\n  fingerprint: null\n")).dumps() == text


HEADS = ", heads: {decode: [0, 1], prefill: [1, 1]}"


@pytest.mark.parametrize(
    ("schema", "old", "new", "message"),
    [
        ("v2", HEADS, "", "line 13: layers.1: no `heads`, and layer 4 has them: either all reuse layers or none"),
        ("v2", "anchor: 0, ", "", "line 13: layers.1: a reuse layer needs `anchor`"),
        ("v2", HEADS, ", heads: {decode: [0, 1]}", "line 13: layers.1.heads.prefill: Field required"),
        ("v1", HEADS, "", "line 13: layers.1: a reuse layer needs `anchor` and `heads` (or `schema: kascade/v2`)"),
        ("v1", "  fingerprint: sha256:" + "a" * 64 + "\n", "", "line 3: model: a profile without `fingerprint`"),
        ("v2", "sha256:a", "sha256:x", "line 5: model.fingerprint"),
        ("v2", "fingerprint: sha256:" + "a" * 64, "fingerprint: ''", "line 5: model.fingerprint"),
    ],
)
def test_half_of_what_v2_may_leave_out(schema, old, new, message):
    text = example().dumps().replace("kascade/v2", f"kascade/{schema}")
    assert old in text
    with pytest.raises(KascadeError) as error:
        Profile.loads(text.replace(old, new, 1), "p.yaml")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_ratio_takes_the_place_of_a_table():
    table = Budget(ratios=TABLE, min_keys=16)
    assert table.override(ratio=0.2) == Budget(ratio=0.2, min_keys=16)
    assert table.override(min_keys=8, ratio=None) == Budget(ratios=TABLE, min_keys=8)
    assert table.override(tile=16).ratio_at(5000) == 0.15
    assert table.override() == table
    assert Budget(ratio=0.2, min_keys=16).override(ratios=TABLE) == table
    example(budget=Budget().override(ratios={2: 0.5})).checked_dumps()
