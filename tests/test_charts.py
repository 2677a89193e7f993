"""Charts of counts: what is drawn has the size of what was counted."""

import matplotlib.pyplot as plt
import pytest

from safescale_lib import charts


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("horizontal", [False, True])
def test_stacked_parts_add_up(horizontal):
    figure = charts.stacked({"a": [1, 2], "b": [3, 4]}, ["x", "y"], label="n", horizontal=horizontal)
    patches = figure.axes[0].patches
    ends = [(p.get_x() + p.get_width()) if horizontal else (p.get_y() + p.get_height()) for p in patches]
    assert ends == [1, 2, 4, 6]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_stacked_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="for each of 2 ticks"):
        charts.stacked({"a": [1]}, ["x", "y"], label="n")
    with pytest.raises(ValueError, match=">= 0"):
        charts.stacked({"a": [-1]}, ["x"], label="n")
    with pytest.raises(ValueError, match="1 to 6"):
        charts.stacked({str(i): [1] for i in range(7)}, ["x"], label="n")


def test_pairs_stand_where_they_should():
    axis = charts.pairs({"a": (0.1, 0.4), "b": (0.3, 0.2)}, ("one", "two"), xlabel="share").axes[0]
    _, first, second = axis.collections
    assert first.get_offsets().tolist() == [[0.1, 0], [0.3, 1]]
    assert second.get_offsets().tolist() == [[0.4, 0], [0.2, 1]]
    with pytest.raises(ValueError, match="not be empty"):
        charts.pairs({}, ("one", "two"), xlabel="share")


def test_flow_keeps_every_item():
    """On both sides the groups' heights are their counts, and the ribbons fill them without a gap or an overlap."""
    from matplotlib.patches import PathPatch, Rectangle

    counts = {("a", "x"): 3, ("a", "y"): 1, ("b", "y"): 4}
    axis = charts.flow(counts, left=["a", "b"], right=["x", "y"]).axes[0]
    groups = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    heights = [group.get_height() for group in groups]
    assert heights[0] == pytest.approx(heights[1])  # a and b hold four each
    assert heights[3] / heights[2] == pytest.approx(5 / 3)  # y and x
    bands = [patch.get_path().vertices for patch in axis.patches if isinstance(patch, PathPatch)]
    left = [band[0, 1] - band[7, 1] for band in bands]
    right = [band[3, 1] - band[4, 1] for band in bands]
    assert left[0] + left[1] == pytest.approx(heights[0])
    assert right[1] + right[2] == pytest.approx(heights[3])
    assert bands[0][7, 1] == pytest.approx(bands[1][0, 1])  # one below the other
    assert bands[1][4, 1] == pytest.approx(bands[2][3, 1])


def test_flow_refuses_strangers_and_nothing():
    with pytest.raises(ValueError, match="not listed: z"):
        charts.flow({("a", "z"): 1}, left=["a"], right=["x"])
    with pytest.raises(ValueError, match="> 0"):
        charts.flow({("a", "x"): 0}, left=["a"], right=["x"])
    with pytest.raises(ValueError, match="at most 6"):
        charts.flow({("a", "x"): 1}, left=list("abcdefg"), right=["x"])


def test_a_matrix_writes_every_number_on_a_colour_that_shows_it():
    from matplotlib.colors import to_rgb

    values = [[0.0, 0.25, 1.0], [0.5, 0.6, 0.126]]
    axis = charts.matrix(values, ["a", "b"], ["x", "y", "z"], label="share", apart=1, marked=[(1, 2)]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0", "25", "100", "50", "60", "13"]

    def light(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    cells = [patch for patch in axis.patches if hasattr(patch, "get_height")]
    for cell, text in zip(cells, axis.texts, strict=True):
        low, high = sorted((light(cell.get_facecolor()), light(text.get_color())))
        assert (high + 0.05) / (low + 0.05) >= 4.5, "WCAG AA"
        assert cell.get_x() < text.get_position()[0] < cell.get_x() + cell.get_width()
        assert cell.get_y() < text.get_position()[1] < cell.get_y() + cell.get_height()
    lights = [light(axis.patches[i].get_facecolor()) for i in (0, 1, 3, 4, 2)]
    assert lights == sorted(lights, reverse=True), "the higher the rate, the darker: it survives grey print"
    assert cells[5].get_linewidth() > cells[4].get_linewidth()


def test_a_matrix_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="2 rows of 1"):
        charts.matrix([[0.1]], ["a", "b"], ["x"], label="share")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        charts.matrix([[1.1]], ["a"], ["x"], label="share")
    with pytest.raises(ValueError, match="apart"):
        charts.matrix([[0.1]], ["a"], ["x"], label="share", apart=1)
