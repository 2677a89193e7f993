"""Charts of counts: stacked bars, two numbers side by side, a matrix of rates, and the flow from one sorting to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safescale_lib.figures import COLOURS, MARKERS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCHES = ("", "///", "", "...", "xxx", "\\\\\\")
"""A hatch beside each colour, so that stacked parts survive grey print."""


def stacked(
    parts: Mapping[str, Sequence[float]], ticks: Sequence[object], *, label: str, horizontal: bool = False, width: float = 5.2
) -> Figure:
    """Bars made of parts. parts: per name one number >= 0 for each tick. label: of the axis that counts.

    horizontal: one row a tick, the first on top. Raises ValueError if a part does not hold one number for each tick, or
    for more parts than there are colours.
    """
    import matplotlib.pyplot as plt

    if not parts or len(parts) > len(COLOURS):
        raise ValueError(f"parts must be 1 to {len(COLOURS)}, got {len(parts)}")
    for name, numbers in parts.items():
        if len(numbers) != len(ticks) or min(numbers) < 0:
            raise ValueError(f"parts must hold one number >= 0 for each of {len(ticks)} ticks, {name!r} does not")
    texts, bottom = [str(tick) for tick in ticks], [0.0] * len(ticks)
    with style():
        size = (width, 1.1 + 0.34 * len(ticks)) if horizontal else (width, 3.5)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        for (name, numbers), colour, hatch in zip(parts.items(), COLOURS, HATCHES, strict=False):
            looks: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5, "label": name}
            if horizontal:
                axis.barh(texts, numbers, left=bottom, **looks)
            else:
                axis.bar(texts, numbers, bottom=bottom, **looks)
            bottom = [low + number for low, number in zip(bottom, numbers, strict=True)]
        if horizontal:
            axis.invert_yaxis()
            axis.set(xlabel=label, xlim=(0, 1.03 * max(bottom)))
        else:
            axis.set_ylabel(label)
        axis.grid(visible=False, axis="y" if horizontal else "x")
        axis.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=min(3, len(parts)), fontsize=10)
    return figure


def pairs(values: Mapping[str, tuple[float, float]], names: tuple[str, str], *, xlabel: str) -> Figure:
    """Two numbers for each row, joined by a line: what differs, and by how much. names: of the first and the second."""
    import matplotlib.pyplot as plt

    if not values:
        raise ValueError("values must not be empty")
    rows = range(len(values))
    with style():
        figure, axis = plt.subplots(figsize=(5.2, 1.1 + 0.32 * len(values)), layout="constrained")
        first, second = ([pair[which] for pair in values.values()] for which in (0, 1))
        axis.hlines(rows, first, second, color="#999999", linewidth=2, zorder=1)
        for numbers, name, colour, marker in zip((first, second), names, COLOURS, MARKERS, strict=False):
            axis.scatter(numbers, rows, color=colour, marker=marker, s=48, label=name, zorder=2)
        axis.set_yticks(rows, list(values))
        axis.invert_yaxis()
        axis.set_xlabel(xlabel)
        axis.set_xlim(left=0)
        figure.legend(loc="outside upper center", ncols=2, fontsize=10)
    return figure


def flow(counts: Mapping[tuple[str, str], float], *, left: Sequence[str], right: Sequence[str], gap: float = 0.022) -> Figure:
    """A flow (alluvial) chart: how many items of each left group fall into each right group, as ribbons of that width.

    counts: (left, right) -> number > 0. left, right: groups from top to bottom. gap: between two groups, as a share of
    the height. Raises ValueError if a count names a group that is not listed, or for more groups on the left than there
    are colours.
    """
    import matplotlib.pyplot as plt

    strangers = {a for a, _ in counts} - set(left) | {b for _, b in counts} - set(right)
    if strangers or not counts or min(counts.values()) <= 0:
        raise ValueError(f"counts must be > 0 between listed groups; not listed: {', '.join(sorted(strangers)) or 'none'}")
    if len(left) > len(COLOURS):
        raise ValueError(f"left must hold at most {len(COLOURS)} groups, got {len(left)}")
    sums_left = {a: sum(n for (x, _), n in counts.items() if x == a) for a in left}
    sums_right = {b: sum(n for (_, y), n in counts.items() if y == b) for b in right}
    tops, goals = _stack(sums_left, gap), _stack(sums_right, gap)
    with style():
        figure, axis = plt.subplots(figsize=(5.0, 6.6), layout="constrained")
        axis.set(xlim=(-0.36, 1.72), ylim=(-0.01, 1.01))
        axis.axis("off")
        scale_left, scale_right = (_scale(sums, gap) for sums in (sums_left, sums_right))
        for a, colour, hatch in zip(left, COLOURS, HATCHES, strict=False):
            _group(axis, -0.06, tops[a], sums_left[a] * scale_left, colour, hatch, f"{a}\n{sums_left[a]:g}", "right")
            start = tops[a]
            for b in right:
                if (a, b) in counts:
                    high, wide = counts[a, b] * scale_left, counts[a, b] * scale_right
                    _ribbon(axis, start, goals[b], high, wide, colour)
                    start, goals[b] = start - high, goals[b] - wide
        for b, top in _stack(sums_right, gap).items():
            _group(axis, 1.0, top, sums_right[b] * scale_right, "#444444", "", f"{b} {sums_right[b]:g}", "left")
    return figure


def _scale(sums: Mapping[str, float], gap: float) -> float:
    """Height of one item when all groups and the gaps between them fill a height of 1."""
    return (1 - gap * (len(sums) - 1)) / sum(sums.values())


def _stack(sums: Mapping[str, float], gap: float) -> dict[str, float]:
    """Upper edge of each group, from 1 downwards."""
    top, edges = 1.0, {}
    for name, total in sums.items():
        edges[name] = top
        top -= total * _scale(sums, gap) + gap
    return edges


def _group(axis: Axes, x: float, top: float, height: float, colour: str, hatch: str, text: str, side: str) -> None:
    """A group's bar and its label outside."""
    axis.bar(x + 0.03, height, width=0.06, bottom=top - height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
    where, align = (x - 0.02, "right") if side == "right" else (x + 0.08, "left")
    axis.text(where, top - height / 2, text, ha=align, va="center", fontsize=11, linespacing=1.0)


def _ribbon(axis: Axes, start: float, end: float, high: float, wide: float, colour: str) -> None:
    """A curved band from the left group's edge to the right group's; start, end: its upper edge on either side."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    upper = [(0, start), (0.5, start), (0.5, end), (1, end)]
    lower = [(1, end - wide), (0.5, end - wide), (0.5, start - high), (0, start - high)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    band = Path([*upper, *lower, (0, start)], codes)
    axis.add_patch(PathPatch(band, facecolor=colour, alpha=0.5, edgecolor="white", linewidth=0.4))


def matrix(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    apart: int = 0,
    marked: Sequence[tuple[int, int]] = (),
) -> Figure:
    """A heat map of rates in [0, 1] with the number in every cell, in percent. values: one sequence of numbers a row.

    label: of the colour scale. apart: so many of the last rows are set apart, such as a worst case over the rows above. marked:
    (row, column) of cells that get a frame. Raises ValueError for values of another shape or outside [0, 1].
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    if not rows or not columns or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"values must hold {len(rows)} rows of {len(columns)} numbers, at least one of each")
    if not all(0 <= number <= 1 for row in values for number in row):
        raise ValueError("values must lie in [0, 1]")
    if not 0 <= apart < len(rows):
        raise ValueError(f"apart must lie in 0..{len(rows) - 1}, got {apart}")
    with style():
        size = (1.9 + 0.47 * len(columns), 2.0 + 0.36 * len(rows))
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.3, -0.5))
        colours = plt.get_cmap("cividis_r")
        for r, row in enumerate(values):
            place = r + (0.2 if r >= len(rows) - apart else 0.0)
            for c, number in enumerate(row):
                framed = (r, c) in marked
                looks: dict[str, Any] = {"edgecolor": "#D55E00", "linewidth": 2.5, "zorder": 3} if framed else {}
                axis.add_patch(Rectangle((c - 0.47, place - 0.46), 0.94, 0.92, facecolor=colours(number), **looks))
                ink = "white" if number > 0.55 else "black"
                axis.text(c, place, f"{100 * number:.0f}", ha="center", va="center", color=ink, fontsize=11, zorder=4)
        places = [r + (0.2 if r >= len(rows) - apart else 0.0) for r in range(len(rows))]
        axis.set_yticks(places, list(rows))
        axis.set_xticks(range(len(columns)), list(columns), rotation=50, ha="left", rotation_mode="anchor")
        axis.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
        axis.grid(visible=False)
        scale = plt.cm.ScalarMappable(norm=Normalize(0, 100), cmap=colours)
        figure.colorbar(scale, ax=axis, orientation="horizontal", label=f"{label} in %", fraction=0.05, pad=0.02)
    return figure
