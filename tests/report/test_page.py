"""The page against the numbers in its files: escaped, whole, and needing nothing from outside."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest

from kascade_cli.errors import KascadeError
from kascade_cli.report.colours import series, viridis
from kascade_cli.report.svg import Scale, label_of, linear_ticks, log_ticks
from kascade_cli.schema import Profile
from tests.report.conftest import LAYERS, NAME, make_profile

SECTIONS = [
    "strategies", "profile", "candidates", "top-mass", "oracle", "similarity", "importance", "pooling", "remap",
    "latency", "model",
]  # fmt: skip
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Tree(HTMLParser):
    """Elements by section; fails where tags do not close each other."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.tags, self.attributes, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def section(text, name):
    return text[text.index(f'<section id="{name}"') :].split("</section>")[0]


def pictures(text):
    """Every svg as an element; they must be well-formed XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S)]


def plots(text):
    return [svg for svg in pictures(text) if "plot" in svg.get("class")]


@pytest.fixture
def whole(build, files):
    return build(*files.values())


def test_everything_is_there_once_and_needs_nothing_from_outside(whole):
    tree = Tree(whole)
    assert re.findall(r'<section id="([\w-]+)"', whole) == SECTIONS
    assert len(set(tree.ids)) == len(tree.ids)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(tree.tags)
    for name, value in tree.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
            assert value[1:] in tree.ids
    assert not re.search("https?:", whole)
    assert "url(" not in whole
    assert "@import" not in whole
    for svg in plots(whole):
        first, second = list(svg)[:2]
        assert (first.tag, second.tag, svg.get("role")) == ("title", "desc", "img")
        assert first.text.strip()
        assert second.text.strip()
        assert svg.get("aria-labelledby").split() == [first.get("id"), second.get("id")]
        assert not re.search("nan|inf", ElementTree.tostring(svg, encoding="unicode"), flags=re.I)


def test_only_what_a_file_feeds(build, files):
    parts = {"profile": ["profile", "candidates"], "bench": ["latency"], "evaluation": ["strategies"]}
    parts["capture"] = ["top-mass", "similarity", "importance"]
    parts |= {name: [name] for name in ("oracle", "pooling", "remap")}
    for name, wanted in parts.items():
        assert re.findall(r'<section id="([\w-]+)"', build(files[name])) == [*wanted, "model"], name


def test_text_of_files_is_text(whole):
    """A model, a strategy, a reason and a dev set that are markup; and control characters."""
    assert "<script" not in whole
    assert "<i>reason" not in whole
    words = Tree(whole).words
    assert any(NAME in word for word in words)
    assert any("mine & <yours>" in word for word in words)
    assert any("a <i>reason</i>" in word for word in words)
    assert any("<b>set</b>" in word for word in words)
    assert whole.startswith("<!DOCTYPE html>")


def test_a_title_and_a_name_with_control_characters(build, files):
    found = json.loads(files["evaluation"].read_text())
    found["rows"][1]["strategy"] = 'a"\x1b[31mred\u202e\x00b'
    files["evaluation"].write_text(json.dumps(found))
    text = build(files["evaluation"], title='T"><script>')
    assert "<title>T&quot;&gt;&lt;script&gt;</title>" in text
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", text)
    assert "a&quot;redb" in text


def test_the_page_depends_on_its_files_alone(build, files):
    first, second = (re.sub(r"on 20\d\d-[^.]+\.", "", build(*files.values())) for _ in range(2))
    assert first == second


def test_every_caption_names_file_command_and_weights(whole):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", whole)
    assert len(captions) == 10
    for caption in captions:
        assert re.search(r"From <code>[\w.]+</code>; made by <code>", caption)
        assert "(sha256:aaaaaaaaaaaa)" in caption or "bench" in caption


def cells(svg, pattern):
    """(title's groups, fill) of every titled cell."""
    found = []
    for rect in svg.iter("rect"):
        title = rect.find("title")
        if title is not None and (match := re.fullmatch(pattern, title.text)):
            found.append((match.groups(), rect.get("fill")))
    return found


def test_figure_1_shows_the_means_of_the_capture(whole, files):
    with h5py.File(files["capture"]) as file:
        want = np.mean([group["top_mass"][()] for group in file["prompts"].values()], axis=0)[:, :, 1]
    (svg,) = plots(section(whole, "top-mass"))
    found = cells(svg, r"(\d+), (\d+): ([\d.]+)")
    assert len(found) == want.size
    low = min(0.9, int(want.min() * 10) / 10)
    for (head, layer, value), fill in found:
        assert float(value) == pytest.approx(want[int(layer), int(head)], abs=6e-4)
        assert fill == viridis((want[int(layer), int(head)] - low) / (1 - low))


def brute_similarity(path, k, decode):
    """S[a, b] of method, section 6, with the mean over tiles: loops over everything in float64."""
    with h5py.File(path) as file:
        groups = [(group["mass"][()].astype(float), group["tiles"][()]) for group in file["prompts"].values()]
    layers, heads = groups[0][0].shape[0], groups[0][0].shape[2]
    sims = []
    for mass, tiles in groups:
        mine = [t for t in range(len(tiles)) if (tiles[t, 1] == 1) == decode]
        sim = np.zeros((layers, layers, heads, heads))
        for t in mine:
            start, length = tiles[t]
            candidates = start + 1 if decode else start
            tops = {
                (a, g): sorted(range(candidates), key=lambda j: (-mass[a, t, g, j], j))[:k]
                for a in range(layers) for g in range(heads)
            }  # fmt: skip
            for a in range(layers):
                for b in range(a, layers):
                    for g in range(heads):
                        for h in range(heads):
                            own = 0 if decode else mass[b, t, h, start : start + length].sum()
                            top = mass[b, t, h, tops[a, g]].sum() + own
                            sim[a, b, g, h] += top / (mass[b, t, h, tops[b, h]].sum() + own) / len(mine)
        sims.append(sim)
    return np.mean(sims, axis=0).max(axis=2).mean(axis=2)


def test_figure_3_is_the_similarity_by_loops(whole, files):
    decode, prefill = plots(section(whole, "similarity"))
    for svg, is_decode in ((decode, True), (prefill, False)):
        want = brute_similarity(files["capture"], 8, is_decode)
        found = cells(svg, r"(\d+), (\d+): ([\d.]+)")
        assert len(found) == 15  # the upper triangle of five layers
        for (a, b, value), _ in found:
            assert float(value) == pytest.approx(want[int(a), int(b)], abs=6e-4)


def test_figure_4_has_bars_as_high_as_the_numbers(whole, files):
    with h5py.File(files["capture"]) as file:
        want = np.mean([group["importance"][()] for group in file["prompts"].values()], axis=0)
    (svg,) = plots(section(whole, "importance"))
    bars = [rect for rect in svg.iter("rect") if "bar" in rect.get("class")]
    heights = np.array([float(bar.get("height")) for bar in bars])
    # On a logarithmic axis heights are affine in the logarithm.
    slope, base = np.polyfit(np.log(want), heights, 1)
    assert slope > 0
    assert np.abs(heights - slope * np.log(want) - base).max() < 0.1
    assert [bar.get("class").split()[0] for bar in bars] == ["s1", "dense", "dense", "s1", "dense"]


def test_the_profile_has_a_row_a_layer_and_a_cell_a_head(whole):
    (svg,) = [svg for svg in plots(section(whole, "profile"))]
    roles = [rect.get("class") for rect in svg.iter("rect") if rect.get("class").startswith("role-")]
    assert roles == ["role-dense", "role-reuse", "role-reuse", "role-anchor", "role-reuse", "role-none"]
    looks = [rect.get("class") for rect in svg.iter("rect") if rect.get("class") in ("same", "moved")]
    assert looks == ["moved", "moved", "same", "same"] * 3  # decode [1, 0], prefill [0, 1]
    titles = [title.text for title in svg.iter("title")]
    assert "layer 4, head 0 reads head 1 of layer 3" in titles
    arcs = [path.get("d") for path in svg.iter("path") if path.get("class") == "arc"]
    assert [d.count("M") for d in arcs] == [3, 2]  # layers 1 and 2 read 0, layer 4 reads 3


def test_the_chosen_candidate_is_marked_and_the_best_are_joined(whole):
    text = section(whole, "candidates")
    kl, kept = plots(text)
    for svg in (kl, kept):
        (ring,) = [circle for circle in svg.iter("circle") if circle.get("class") == "ring"]
        named = [t.text for t in svg.iter("text") if t.text.startswith("chosen")]
        assert named == ["chosen (ring): 0 3"]
        (line,) = svg.iter("polyline")
        corners = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(corners) == 3
        assert corners[1] == pytest.approx((float(ring.get("cx")), float(ring.get("cy"))), abs=0.2)
    assert '<tr class="chosen"><th scope="row" class="name">2</th><td class="name">0 3</td>' in text


def test_points_of_the_plots_stand_where_the_numbers_are(whole):
    """Through two ticks of each axis, pixels are turned back into numbers."""
    svg = plots(section(whole, "strategies"))[1]
    ticks = {"x": [], "y": []}
    for element in svg.iter("text"):
        style = element.get("class")
        if style == "tick middle":
            ticks["x"].append((float(element.text), float(element.get("x"))))
        elif style == "tick end":
            ticks["y"].append((float(element.text), float(element.get("y"))))

    def value(axis, pixel, log):
        (a, pa), (b, pb) = ticks[axis][0], ticks[axis][-1]
        share = (pixel - pa) / (pb - pa)
        return float(np.exp(np.log(a) + share * np.log(b / a))) if log else a + share * (b - a)

    found = {}
    for group in svg.iter("g"):
        title, mark = group.find("title"), group.find("circle")
        if title is not None and mark is not None:
            x, y = value("x", float(mark.get("cx")), True), value("y", float(mark.get("cy")), False)
            found[title.text] = (x, y)
    assert len(found) == 4 + 1  # one of the five has another mark or shares the first four's colours
    for said, (x, y) in found.items():
        name, score, share = re.fullmatch(r"(.*): ([\d.]+) ±[\d.]+ at ([\d.]+) % of the keys", said).groups()
        assert y == pytest.approx(float(score), abs=0.3)
        assert x == pytest.approx(float(share), rel=0.02)


def test_the_latency_stands_beside_the_papers(whole):
    text = section(whole, "latency")
    assert "3.97" in text
    assert "1.91" in text
    decode, prefill = plots(text)
    for svg, here, paper in ((decode, 4.0, 3.97), (prefill, 2.0, 1.91)):
        heights = [float(rect.get("height")) for rect in svg.iter("rect") if "bar" in rect.get("class")]
        assert heights[0] / heights[1] == pytest.approx(here / paper, rel=0.01)
    assert '<tr class="paper"><th scope="row" class="name">decode</th>' in text


def test_other_shapes_are_not_compared_with_the_paper(build, files):
    found = json.loads(files["bench"].read_text())
    for row in found["rows"]:
        row["kv_heads"] = 4
    files["bench"].write_text(json.dumps(found))
    assert "3.97" not in build(files["bench"])


def test_differences_and_intervals_are_in_the_tables(whole):
    text = section(whole, "strategies")
    assert "<td>78.0 ±9.0</td>" in text
    assert "<td>−2.0 ±4.0</td>" in text
    for name, wanted in (("oracle", "0.167"), ("pooling", "0.03"), ("remap", "2.1")):
        assert f"<td>{wanted}</td>" in section(whole, name), name


def test_a_budget_by_length_and_head_maps_that_were_not_measured():
    from types import SimpleNamespace

    from kascade_cli.report.sections import roles

    budget = SimpleNamespace(ratio=0.3, min_keys=16, ratios={4096: 0.3, 16384: 0.1}, count=lambda n: n // 10)
    assert roles.ratio_rows(budget) == [["4,096", "30 %", "409"], ["16,384", "10 %", "1,638"]]
    assert roles.ratio_rows(make_profile().budget) == []
    profile = make_profile()
    bare = [layer.model_copy(update={"heads": None}) for layer in profile.layers]
    drawn = roles._draw(profile.model_copy(update={"layers": bare}))
    assert drawn.count("pooled: one set for all heads") == 6
    assert drawn.count('class="arc"') == 2


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "demo-small"])
def test_the_ready_profiles_have_a_page(build, name):
    from pathlib import Path

    text = build(Path(__file__).parents[2] / "profiles" / f"{name}.yaml")
    assert 'id="profile"' in text
    assert ("have not been measured" in text) == (name != "demo-small")
    assert ("none: for every model of this shape" in text) == (name != "demo-small")


def damage(files, name, change):
    found = json.loads(files[name].read_text())
    change(found)
    files[name].write_text(json.dumps(found))


DAMAGE = {
    "evaluation without a mean": ("evaluation", lambda d: d["rows"][1].pop("mean")),
    "evaluation with text for a score": ("evaluation", lambda d: d["rows"][1]["mean"].update(score="x")),
    "evaluation with tasks that are none": ("evaluation", lambda d: d.update(tasks=3)),
    "sweep without settings": ("oracle", lambda d: d.pop("settings")),
    "sweep with a ratio that is text": ("oracle", lambda d: d["rows"][1].update(ratio="a")),
    "sweep with KL that is text": ("pooling", lambda d: d["rows"][1]["kl"].update(mean="much")),
    "sweep with anchors that are none": ("remap", lambda d: d["rows"][1].pop("anchors")),
    "bench without a speed-up": ("bench", lambda d: d["rows"][0].pop("speedup")),
    "bench beyond any number": ("bench", lambda d: d["rows"][0].update(speedup=1e999)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_rows_are_refused_in_one_line_that_names_the_file(name, build, files):
    kind, change = DAMAGE[name]
    damage(files, kind, change)
    with pytest.raises(KascadeError) as stop:
        build(files[kind])
    assert str(files[kind]) in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_profile_whose_selection_is_anything(build, tmp_path):
    """`selection` is free: none of it may break the page."""
    path = tmp_path / "p.yaml"
    for selection in (
        {}, {"verify": 3}, {"verify": {"candidates": 3}}, {"verify": {"candidates": [3, {"kl_mean": "x"}]}},
        {"stability": [1]}, {"budgets": {"a": 1}}, {"budgets": [{"anchors": [0]}]}, {"why": ["a"]},
    ):  # fmt: skip
        profile = make_profile().model_copy(update={"selection": selection})
        profile.save(path, overwrite=True)
        assert 'id="profile"' in build(path)
    loaded = Profile.load(path)
    assert len(loaded.layers) == LAYERS


def test_what_resampling_says_is_about_the_set_that_was_searched():
    from kascade_cli.report.sections import roles

    stable = {"resamples": 200, "searched": [0, 3], "searched_again": 0.81}
    for chosen, said in (([0, 3], "gives these anchors again from 81 %"), ([0, 2], "gives 0 3 again from 81 %")):
        profile = make_profile().model_copy(update={"selection": {"anchors": chosen, "stability": stable}})
        assert said in roles._stability(profile)
    unknown = make_profile().model_copy(update={"selection": {"stability": {"searched_again": 1}}})
    assert roles._stability(unknown) == ""


def test_the_best_sets_show_what_they_keep():
    import re
    from html import unescape

    from kascade_cli.report.sections import roles

    row = {"anchors": [0, 3], "similarity_mean": 0.123, "similarity_worst": 0.1, "recovered_mean": 0.876,
           "recovered_worst": 0.654, "speedup": {"decode": 3.25, "prefill": 1.5}}  # fmt: skip
    profile = make_profile().model_copy(update={"selection": {"anchors": [0, 3], "budgets": [row]}})
    text = str(roles._recovered(profile))
    columns, cells = (
        [unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in re.findall(rf"<{tag}[ >].*?</t[hd]>", part)]
        for tag, part in zip(("th", "t[hd]"), (text.split("</thead>")[0], text.split("</thead>")[1]), strict=True)
    )
    shown = dict(zip(columns, cells, strict=True))
    assert (shown["layers"], shown["attention kept, mean"], shown["worst layer"]) == ("0 3", "0.876", "0.654")
    assert 'class="chosen"' in text
    pooled = profile.model_copy(
        update={
            "layers": [
                one.model_copy(update={"heads": "pooled"} if one.role == "reuse" else {}) for one in profile.layers
            ]
        }
    )
    # Rows are of sets with head maps, which this one is not.
    assert pooled.pooled
    assert 'class="chosen"' not in str(roles._recovered(pooled))


def test_a_large_profile_is_drawn_without_cells(build, files, monkeypatch):
    assert build(files["profile"]).count('class="moved"') == 6
    monkeypatch.setattr("kascade_cli.report.sections.roles._MOST_CELLS", 11)  # it has 12
    assert 'class="moved"' not in build(files["profile"])


# -- scales --


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.62, 1, [0.7, 0.8, 0.9, 1.0]), (-3, 4, [-2, 0, 2, 4]), (0, 7e-4, 4)],
)
def test_linear_ticks(low, high, ticks):
    found = linear_ticks(low, high, 6)
    assert len(found) == ticks if isinstance(ticks, int) else found == ticks


@pytest.mark.parametrize(("low", "high"), [(1e-6, 10), (0.004, 0.03), (3, 4), (1e-5, 1e-4), (2, 900)])
def test_log_ticks_are_few_and_inside(low, high):
    found = log_ticks(low, high, 6)
    assert len(found) <= 6
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in found)


def test_scales_and_labels():
    scale = Scale(1, 100, log=True)
    scale.pixels = (0, 200)
    assert scale(10) == pytest.approx(100)
    assert Scale(5, 5)(5) == pytest.approx(0.5)
    for low, high, log in ((0, 1, True), (float("nan"), 1, False), (0, float("inf"), False)):
        with pytest.raises(ValueError, match="is no axis"):
            Scale(low, high, log=log)
    assert [label_of(v) for v in (0.0005, 1e-4, 2e-5, 0.01, 2048, 0)] == ["5e-4", "1e-4", "2e-5", "0.01", "2,048", "0"]


def test_series_differ_and_known_ones_keep_their_colour():
    labels = [f"s{n}" for n in range(20)]
    looks = series(["dense", "kascade", *labels])
    assert looks["dense"] == ("dense", "circle")
    assert looks["kascade"] == ("s1", "circle")
    assert len(set(looks.values())) == 22


def test_the_tile_says_what_a_table_of_ratios_reads():
    from kascade_cli.report.glance import _keys_read
    from kascade_cli.schema import Budget

    assert _keys_read(Budget(ratio=0.15, min_keys=64)) == ("15 %", "at least 64")
    table = Budget(ratios={1024: 0.5, 4096: 0.1, 16384: 0.07}, min_keys=64)
    assert _keys_read(table) == ("50 to 7 %", "50%, from 4096 keys 10%, from 16384 keys 7%; at least 64")
    assert _keys_read(Budget(ratios={1024: 0.5, 4096: 0.5}))[0] == "50 %"
