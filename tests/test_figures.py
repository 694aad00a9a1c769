"""Figures show what the tables say: positions, intervals, texts and hatches of what is drawn."""

from __future__ import annotations

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from biasprune import figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def dots(axis) -> np.ndarray:
    """Every dot of an axis: x, y, and whether it is hollow."""
    parts = [c for c in axis.collections if len(c.get_offsets()) and len(c.get_facecolors())]
    hollow = [np.full(len(c.get_offsets()), c.get_facecolors()[0][:3].min() == 1) for c in parts]
    return np.column_stack([np.concatenate([c.get_offsets() for c in parts]), np.concatenate(hollow)])


def legend(figure) -> list[str]:
    return [t.get_text() for t in figure.legends[0].get_texts()]


def test_intervals_end_where_the_table_says():
    table = pd.DataFrame(
        {"way": ["a", "b", "c", "a"], "bias": [1.0, 2, np.nan, 5], "low": [0.5, 1, 1, 4], "high": [3.0, 2.5, 1, 7]}
    ).assign(context=["x", "x", "x", "y"], control=[False, True, False, False])
    figure = figures.intervals(table, "bias", "way", low="low", high="high", panel="context", hollow="control")
    left, right = figure.axes
    assert dots(left).tolist() == [[1, 0, 0], [2, 1, 1]] and dots(right).tolist() == [[5, 0, 0]]
    ends = [s.tolist() for s in left.collections[0].get_segments()]
    assert ends == [[[0.5, 0], [3, 0]], [[1, 1], [2.5, 1]]]
    assert [t.get_text() for t in left.get_yticklabels()] == ["a", "b"], "a row without a value isn't drawn"
    assert left.get_xlim() == right.get_xlim() and left.yaxis_inverted() and legend(figure) == ["control"]
    both = pd.concat([table.assign(model=m) for m in ("one", "two")])
    axis = figures.intervals(both[both["context"] == "x"], "bias", "way", low="low", high="high", hue="model").axes[0]
    assert sorted(y for _, y, _ in dots(axis)) == pytest.approx([-0.175, 0.175, 0.825, 1.175])
    shapes = {len(c.get_paths()[0].vertices) for c in axis.collections if len(c.get_facecolors())}
    assert len(shapes) == 2, "models have markers of their own"


def test_lines_have_bands_markers_and_plain_log_ticks():
    table = pd.DataFrame({"n": [100, 10, 100, 10], "r": [0.4, 0.2, 0.5, 0.3], "by": ["a", "a", "b", "b"]})
    table = table.assign(low=table["r"] - 0.1, high=table["r"] + 0.1)
    figure = figures.lines(table, "n", "r", "by", low="low", high="high", logx=True, logy=True, reference=0.1)
    axis = figure.axes[0]
    first, second, reference = axis.lines
    assert first.get_xydata().tolist() == [[10, 0.2], [100, 0.4]], "joined from left to right"
    assert first.get_marker() != second.get_marker() and first.get_linestyle() != second.get_linestyle()
    assert reference.get_ydata() == [0.1, 0.1] and legend(figure) == ["a", "b"]
    band = axis.collections[0].get_paths()[0].vertices
    assert band.min(0).tolist() == pytest.approx([10, 0.1]) and band.max(0).tolist() == pytest.approx([100, 0.5])
    assert axis.get_xscale() == "log" and axis.get_yscale() == "linear", "log only where numbers differ 3-fold"
    figure.canvas.draw()
    assert {"10", "100"} <= {t.get_text() for t in axis.get_xticklabels()}


def test_heat_map_cells_say_what_they_are():
    table = pd.DataFrame({"row": list("aabb"), "column": list("xyxy"), "v": [1.0, -0.95, np.nan, 0.0]})
    table = table.assign(said=["1\n(2)", "n", "no bias", "0"], sure=[True, False, False, False])
    figure = figures.heat_map(table, "row", "column", "v", text="said", bold="sure", limit=1, label="bias")
    axis, bar = figure.axes
    cells = {t.get_position(): t for t in axis.texts}
    places = [(0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5)]
    assert [cells[k].get_text() for k in places] == table["said"].tolist()
    assert cells[0.5, 0.5].get_weight() == "bold" and cells[1.5, 0.5].get_weight() == "normal"
    assert [cells[k].get_color() for k in ((0.5, 0.5), (1.5, 0.5), (1.5, 1.5))] == ["white", "white", "black"]
    mesh = axis.collections[0]
    assert mesh.get_array().mask.ravel().tolist() == [False, False, True, False] and axis.patch.get_hatch()
    assert mesh.get_clim() == (-1, 1) and bar.get_xlabel() == "bias"
    panels = figures.heat_map(table.assign(p=list("kkll")), "row", "column", "v", panel="p").axes
    assert [t.get_text() for t in panels[1].texts] == ["–", "0"] and panels[0].get_title("left") == "k"


@pytest.mark.parametrize(("rows", "columns", "panels"), [(3, 3, 2), (5, 4, 1), (2, 6, 1), (9, 2, 3)])
def test_heat_map_texts_fit_into_their_cells(rows, columns, panels):
    names = [f"stereoset: {w}" for w in ("gender", "profession", "race", "religion", "age", "all")]
    table = pd.DataFrame(list(product(range(rows), names[:columns], range(panels))), columns=["a", "b", "p"])
    table = table.assign(v=0.5, said="0.55\n(0.44)")
    figure = figures.heat_map(table, "a", "b", "v", text="said", panel="p", limit=1)
    figure.canvas.draw()
    for axis in figure.axes[:panels]:
        cell = axis.get_window_extent()
        for text in axis.texts:
            box = text.get_window_extent()
            assert box.height <= 1.05 * cell.height / rows and box.width <= 1.05 * cell.width / columns


def test_scatter_has_points_error_bars_and_identity():
    table = pd.DataFrame({"x": [-1.0, 1, 10], "y": [0.0, 3, 1], "e": 0.5, "k": list("aab")})
    left, right = figures.scatter(table, "x", "y", yerr="e", panel="k", identity=True).axes
    assert dots(left)[:, :2].tolist() == [[-1, 0], [1, 3]] and dots(right)[:, :2].tolist() == [[10, 1]]
    ends = [s[:, 1].tolist() for c in left.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert ends == [[-0.5, 0.5], [2.5, 3.5]] and left.lines[-1].get_slope() == 1


@pytest.mark.parametrize("table", [pd.DataFrame({"x": [], "v": []}), pd.DataFrame({"x": ["a"], "v": [np.nan]})])
def test_nothing_to_draw_is_an_error(table):
    with pytest.raises(ValueError, match="nothing to draw: no row of the table has a number in v"):
        figures.intervals(table, "v", "x", low="v", high="v")


def test_equal_data_give_equal_bytes(tmp_path):
    table = pd.DataFrame({"x": list("ab"), "v": [1, 2], "k": "k"})
    for folder in ("one", "two"):
        figures.save(figures.lines(table, "v", "v", "k"), tmp_path / folder, "name")
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / f / f"name.{suffix}").read_bytes() for f in ("one", "two"))
        assert one == two and len(one) > 1000
    width = int.from_bytes((tmp_path / "one" / "name.png").read_bytes()[16:20], "big")
    assert width == 832, "5.2 inches"
