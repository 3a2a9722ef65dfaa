"""The page in a real browser: what is on its screenshot, whether anything overlaps, and a narrow window."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from kascade_cli.report.colours import viridis
from kascade_cli.report.style import _COLOURS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not looked at in a browser")

WIDTH = 1100
# Where every part is, which words of a picture touch each other, and whether the page is wider than its window.
LOOK = """<script>addEventListener('load',()=>{
const box=e=>{const r=e.getBoundingClientRect();
 return [r.left,r.top+scrollY,r.right,r.bottom+scrollY].map(Math.round)};
const touching=[];
for(const svg of document.querySelectorAll('svg.plot')){
 const words=[...svg.querySelectorAll('text')].map(t=>[t.textContent,t.getBoundingClientRect()]);
 const edge=svg.getBoundingClientRect();
 words.forEach(([a,p],i)=>{
  if(p.left<edge.left-1||p.right>edge.right+1||p.bottom>edge.bottom+1||p.top<edge.top-1)touching.push([a,'the edge']);
  words.slice(i+1).forEach(([b,q])=>{
   if(p.left<q.right-1&&q.left<p.right-1&&p.top<q.bottom-2&&q.top<p.bottom-2)touching.push([a,b])})})}
const places={};for(const s of document.querySelectorAll('section'))places[s.id]=box(s);
document.body.innerHTML='<pre>'+JSON.stringify({places,touching,wide:document.documentElement.scrollWidth,
 seen:innerWidth,height:document.documentElement.scrollHeight})+'</pre>'})</script>"""


def run(page, folder, *options, width=WIDTH, height=900):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        f"--user-data-dir={folder / 'browser'}", f"--window-size={width},{height}", *options, f"file://{page}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def looked_at(text, folder, width=WIDTH):
    """What LOOK says of a copy of the page that lets it run."""
    page = folder / "look.html"
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text) + LOOK)
    return json.loads(re.search(r"<pre>(.*?)</pre>", run(page, folder, "--dump-dom", width=width))[1])


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """(the page's text, what LOOK says, the screenshot as uint8 [height, width, 3])."""
    matplotlib = pytest.importorskip("matplotlib.image")
    from kascade_cli.report.page import load_all, measure_captures, page
    from tests.report import conftest

    folder = tmp_path_factory.mktemp("browser")
    files = conftest.files.__wrapped__(folder, conftest.make_prompts())
    sources = load_all(list(files.values()))
    text = page(sources, measure_captures(sources, top_k=8))
    (folder / "page.html").write_text(text)
    found = looked_at(text, folder)
    run(folder / "page.html", folder, f"--screenshot={folder / 'page.png'}", height=found["height"])
    image = (matplotlib.imread(folder / "page.png")[:, :, :3] * 255).round().astype("uint8")
    return text, found, image


def rgb(colour):
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def light(name):
    return rgb(_COLOURS[name][0])


def counts(image, place):
    """Colour -> how many pixels of the place have it."""
    left, top, right, bottom = place
    part = image[top:bottom, left:right].astype("uint32")
    packed, number = np.unique(part[..., 0] << 16 | part[..., 1] << 8 | part[..., 2], return_counts=True)
    return {(int(p) >> 16, int(p) >> 8 & 255, int(p) & 255): int(n) for p, n in zip(packed, number, strict=True)}


# What must be seen of each part, in pixels; text alone has none of these colours.
COLOURS = {
    "strategies": {"dense": 60, "s1": 100, "s5": 60},
    "profile": {"role-dense": 800, "role-anchor": 800, "role-reuse": 2400, "moved": 1200, "same": 1200},
    "candidates": {"s1": 50, "s2": 30},
    "oracle": {"s4": 300},
    "importance": {"s1": 2000, "dense": 2000},
    "pooling": {"s1": 300, "s2": 300},
    "remap": {"s1": 300, "s2": 300, "s3": 300},
    "latency": {"s1": 8000, "dense": 6000},
}


@pytest.mark.parametrize("name", COLOURS)
def test_each_figure_is_on_the_screenshot_in_its_colours(screen, name):
    _, found, image = screen
    seen = counts(image, found["places"][name])
    for colour, least in COLOURS[name].items():
        assert seen.get(light(colour), 0) >= least, colour


@pytest.mark.parametrize("name", ["top-mass", "similarity"])
def test_heat_maps_have_the_colour_of_every_cell(screen, name):
    text, found, image = screen
    part = text[text.index(f'<section id="{name}"') :].split("</section>")[0]
    size = r'width="([\d.]+)" height="([\d.]+)"'
    cells = re.findall(rf'class="cell" x="[\d.]+" y="[\d.]+" {size} fill="(#\w+)"><title>', part)
    assert len(cells) >= 20
    areas = {}
    for width, height, fill in cells:
        areas[fill] = areas.get(fill, 0) + float(width) * float(height)
    assert len(areas) > 10
    seen = counts(image, found["places"][name])
    for fill, area in areas.items():
        assert seen.get(rgb(fill), 0) > 0.6 * area, fill
    assert viridis(0) != viridis(1)


def test_bars_are_as_high_as_the_speed_ups(screen):
    """4.0 and 2.0 here against 3.97 and 1.91 of the paper, on axes of their own: areas of both colours."""
    _, found, image = screen
    seen = counts(image, found["places"]["latency"])
    here, paper = seen[light("s1")], seen[light("dense")]
    assert here / paper == pytest.approx(((4.0 / 4.0) + (2.0 / 2.0)) / (3.97 / 4.0 + 1.91 / 2.0), rel=0.08)


def test_no_words_touch_each_other_or_are_cut_off(screen):
    _, found, _ = screen
    assert found["touching"] == []
    assert found["wide"] <= found["seen"] == WIDTH


def test_words_that_touch_would_be_found(screen, tmp_path):
    text, _, _ = screen
    one = '<svg class="plot" viewBox="0 0 200 50" style="width:200px"><text x="5" y="20">one</text>'
    two = '<text x="15" y="22">two</text><text x="190" y="45">three</text></svg>'
    found = looked_at(text.split("<body>")[0] + f"<body>{one}{two}</body></html>", tmp_path)
    assert found["touching"] == [["one", "two"], ["three", "the edge"]]


def test_a_narrow_window_shows_all_of_it(screen, tmp_path):
    text, _, _ = screen
    found = looked_at(text, tmp_path, 500)
    assert found["seen"] == 500
    assert found["wide"] <= 500
    assert all(left >= 0 and right <= 500 for left, _, right, _ in found["places"].values())


def test_a_dark_window_is_dark(screen, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    text, _, image = screen
    assert tuple(image[2, 2]) == light("bg")
    page, png = tmp_path / "page.html", tmp_path / "dark.png"
    page.write_text(text)
    run(page, tmp_path, "--blink-settings=preferredColorScheme=0", f"--screenshot={png}")
    shown = (matplotlib.imread(png)[:, :, :3] * 255).round().astype("uint8")
    assert tuple(shown[2, 2]) == rgb(_COLOURS["bg"][1])
    assert (shown == rgb(_COLOURS["ink"][1])).all(-1).sum() > 200
