import builtins
from dataclasses import replace

import numpy as np
import pytest

from kascade_cli.analysis import cost, plots, selection
from kascade_cli.analysis.candidates import Candidate
from kascade_cli.analysis.problem import make_problem
from kascade_cli.analysis.rows import make_row
from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import KascadeError


@pytest.fixture
def parts(capture):
    measured = measure(capture, top_k=9)
    problem = make_problem(measured, "both")
    sets = selection.search_sets(problem, "importance", 3, "nearest")
    rows = [make_row(problem, found, "nearest", cost.published(), 131072) for found in sets]
    rows = [replace(row, recovered=row.similarity) for row in rows]
    return measured, problem, rows


def read(path):
    from matplotlib.image import imread

    return imread(path)


def test_four_figures_with_something_in_them(parts, tmp_path):
    measured, problem, rows = parts
    candidates = [Candidate(row.anchors, {}, {"decode": 0.1 / row.size}, 2) for row in rows]
    paths = plots.draw_all(tmp_path / "new" / "folder", measured, rows, rows[1], candidates)
    assert sorted(path.name for path in paths) == ["importance.png", "pareto.png", "similarity.png", "sparsity.png"]
    for path in paths:
        image = read(path)
        assert image.shape[0] > 300
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    plain = plots.pareto(rows, rows[1])
    assert len(plain.axes) == 1
    assert len(plots.pareto(rows, rows[1], candidates).axes) == 2


def test_the_figures_show_the_numbers(parts):
    measured, _, rows = parts
    axes = plots.similarity(measured, rows[1].anchors).axes
    for axis, phase in zip(axes, measured.sim, strict=False):
        shown = axis.images[0].get_array()
        upper = np.triu_indices(5)
        wanted = measured.mean(phase).max(axis=2).mean(axis=2)
        np.testing.assert_allclose(np.asarray(shown)[upper], wanted[upper])
    bars = plots.importance(measured).axes[0].patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], measured.importance)
    heat = plots.sparsity(measured).axes[0].images[0].get_array()
    np.testing.assert_allclose(heat, measured.top_mass[:, :, 1].T)


def test_a_set_that_is_read_pooled_is_told_from_head_maps(parts):
    _, _, rows = parts
    chosen = replace(rows[1], pooled=True)
    candidates = [Candidate(row.anchors, {}, {"decode": 0.1 / row.size}, 2) for row in rows]
    candidates.append(Candidate(chosen.anchors, {}, {"decode": 0.01}, 2, pooled=True))
    budgets, measured = plots.pareto(rows, chosen, candidates).axes
    assert "one set for all heads (lines: head maps)" in budgets.get_title()
    shown = {group.get_label(): np.asarray(group.get_offsets()).tolist() for group in measured.collections}
    np.testing.assert_allclose(shown["candidate"], [[row.size, 0.1 / row.size] for row in rows])
    np.testing.assert_allclose(shown["candidate, pooled"], [[chosen.size, 0.01]])
    (star,) = [line for line in measured.lines if line.get_label() == "chosen"]
    np.testing.assert_allclose(star.get_xydata(), [[chosen.size, 0.01]])
    plain = plots.pareto(rows, rows[1], candidates[:-1])
    assert "head maps" not in plain.axes[0].get_title()
    assert [group.get_label() for group in plain.axes[1].collections] == ["candidate"]


def test_labels_from_the_capture_are_no_mathematics(parts, tmp_path):
    measured, _, rows = parts
    measured.top_mass_keys = ["$x^2", "256", r"$\frac{$", "\x1b[1m5%", "y" * 500]
    plots.draw_all(tmp_path, measured, rows, rows[0], [])  # matplotlib raises for what it cannot parse
    labels = [text.get_text() for text in plots.sparsity(measured).axes[1].get_legend().get_texts()]
    assert labels[0] == r"top \$x^2"
    assert labels[3] == "top 5%"
    assert len(labels[4]) < 80


def test_folder_that_cannot_be_made(parts, tmp_path):
    (tmp_path / "file").write_text("")
    measured, problem, rows = parts
    with pytest.raises(KascadeError, match="cannot write plots"):
        plots.draw_all(tmp_path / "file" / "plots", measured, rows, rows[0], [])


def test_missing_matplotlib_is_one_line(parts, tmp_path, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        "importlib.import_module", lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "matplotlib"
        else real(name, *rest)
    )  # fmt: skip
    measured, problem, rows = parts
    with pytest.raises(KascadeError, match=r"kascade-cli\[plot\]"):
        plots.draw_all(tmp_path, measured, rows, rows[0], [])
    assert not list(tmp_path.glob("*.png"))
