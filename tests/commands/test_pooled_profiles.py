"""What is said of profiles whose heads read one set, and what is refused."""

import re
from types import SimpleNamespace

import pytest

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.anchors import with_anchors
from kascade_cli.schema import Profile
from kascade_cli.schema.layers import Layer
from tests.test_schema import example


def test_what_is_no_head_map_is_said_in_one_line():
    text = example(head_maps="pooled").dumps()
    with pytest.raises(KascadeError, match=r"'pooled2' is neither a head map nor `pooled`$"):
        Profile.loads(text.replace("heads: pooled", "heads: pooled2", 1))
    with pytest.raises(KascadeError, match=f"'{'x' * 40}' is neither"):
        Profile.loads(text.replace("heads: pooled", "heads: " + "x" * 200, 1))
    with pytest.raises(ValueError, match="belong to reuse layers, not to role anchor"):
        Layer(role="anchor", heads="pooled")
    with pytest.raises(KascadeError, match=r"layers.4.heads: pooled, and not in layer 1: either all or none"):
        Profile.loads(text.replace("heads: pooled", "heads: [0, 1]", 1))
    with pytest.raises(KascadeError, match="^layer 4 of the profile for x has no head map$"):
        example(head_maps="pooled").head_map(4, "decode")


@pytest.mark.parametrize(("maps", "line"), [
    ("pooled", "head maps  none: all heads of a layer read one key set (pooled)"),
    (None, "head maps  not measured: pooled (kascade select-anchors measures them)"),
])  # fmt: skip
def test_show_says_how_heads_read(run_kascade, tmp_path, maps, line):
    example(head_maps=maps).save(tmp_path / "p.yaml")
    _, text, _ = run_kascade("show", tmp_path / "p.yaml")
    assert [row.strip() for row in text.splitlines() if row.startswith("head maps")] == [line]
    assert "heads: all read one key set per anchor" in text
    assert "(= its own number)" not in text
    assert [row.split() for row in text.splitlines() if " reuse " in row] == [
        ["1", "reuse", "0", "pooled", "pooled"], ["4", "reuse", "2", "pooled", "pooled"]]  # fmt: skip


def test_other_anchors_are_read_as_the_profile_is():
    info = SimpleNamespace(name="x", profiled_layers=[0, 1, 2, 4])
    none = SimpleNamespace(sims={})
    some = SimpleNamespace(sims={"decode": 0}, of=lambda *_: [1, 0])
    for maps in ("pooled", None):
        other = with_anchors(example(head_maps=maps), info, [0, 1], none)
        assert (other.pooled, other.heads_measured) == (maps == "pooled", False)
    assert not with_anchors(example(), info, [0, 1], none).pooled
    assert with_anchors(example(head_maps="pooled"), info, [0, 1], some).head_map(2, "decode") == [(1, 1), (1, 0)]


@pytest.mark.parametrize("heads", ["pooled", "maps"])
def test_the_report_marks_the_set_as_it_is_read(run_kascade, tmp_path, heads):
    entries = [{"anchors": [0, 2], "kl_mean": kl, "prompts": 4, "kl": {"decode": kl}} | more
               for kl, more in ((0.25, {}), (0.125, {"pooled": True}))]  # fmt: skip
    selection = {"anchors": [0, 2], "heads": heads, "verify": {"candidates": entries},
                 "budgets": [{"anchors": [0, 2], "recovered_mean": 0.9}]}  # fmt: skip
    more = {"head_maps": "pooled"} if heads == "pooled" else {}
    example(selection=selection, **more).save(tmp_path / "p.yaml")
    code, _, error = run_kascade("report", tmp_path / "p.yaml", "-o", tmp_path / "r.html")
    assert code == 0, error
    page = (tmp_path / "r.html").read_text()
    pooled = heads == "pooled"
    assert ("remapped head" in page) == (not pooled)
    found = page[page.index('<section id="candidates"') :].split("</section>")[0]
    rows = re.findall(r"<tr[^>]*>.*?</tr>", found, flags=re.S)
    marked = [row for row in rows if 'class="chosen"' in row]
    assert len(marked) == 1
    assert ("0 2, pooled" in marked[0]) == pooled
    assert f"chosen (ring): 0 2{', pooled' if pooled else ''}" in found
    role = page[page.index('<section id="profile"') :].split("</section>")[0]
    assert ('class="chosen"' in role) == (not pooled)  # its rows are of sets with head maps
    glance = page[: page.index("<section")]
    shown = re.findall(r"0\.12|0\.25", glance)
    assert shown == (["0.12"] if pooled else ["0.25"]), shown


def test_no_head_map_is_missed(run_kascade, tmp_path):
    from kascade_cli.models import describe, load_model
    from kascade_cli.schema import ModelCard

    info = describe(load_model("demo-small")[0])
    card = ModelCard(**{name: getattr(info, name) for name in ModelCard.model_fields})
    Profile.build(model=card, anchors=[0, 2], profiled_layers=info.profiled_layers, head_maps="pooled").save(
        tmp_path / "p.yaml"
    )
    asked = ["--profile", tmp_path / "p.yaml", "--max-length", "128", "--device", "cpu", "--dtype", "float32"]
    for more in (["evaluate", "demo-small", "--task", "pairs", "--num-prompts", "1", "--questions", "2",
                  "--strategies", "dense,kascade", "--anchors", "0,1"],
                 ["generate", "demo-small", "--task", "single-hop"]):  # fmt: skip
        code, _, error = run_kascade(*more, *asked)
        assert code == 0, error
        assert "not measured" not in error


def test_the_report_of_unmeasured_heads(run_kascade, tmp_path):
    example(head_maps=None).save(tmp_path / "p.yaml")
    assert run_kascade("report", tmp_path / "p.yaml", "-o", tmp_path / "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text()
    assert "remapped head" not in page
    assert "head maps have not been measured" in page
