"""Figures with a caption and an alt text, in colours that colour-blind readers and grey print can tell apart."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from safescale_lib.measure.intervals import Interval

FIGURE_MIME = "application/vnd.safescale.figure+json"

# Okabe and Ito's palette, ordered so that neighbours also differ in lightness; each with its own marker and dash.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#CC79A7", "#009E73", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

_STYLE: Any = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "image.cmap": "viridis",
}


@contextmanager
def style() -> Iterator[None]:
    """The book's look for what is drawn inside the block."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


class Shown:
    """A figure ready for a notebook: the picture, its caption for JupyterLab, and both texts for the site."""

    def __init__(self, png: bytes, name: str, caption: str, alt: str) -> None:
        self.png, self.name, self.caption, self.alt = png, name, caption, alt

    def _ipython_display_(self) -> None:
        from IPython.display import display

        texts = {"name": self.name, "caption": self.caption, "alt": self.alt}
        display({"image/png": b64encode(self.png).decode(), "text/plain": self.alt, FIGURE_MIME: texts}, raw=True)  # type: ignore[no-untyped-call]
        html = f'<div class="safescale-caption">{escape(self.caption)}</div>'
        display({"text/html": html, "text/plain": self.caption}, raw=True)  # type: ignore[no-untyped-call]


def show(figure: Figure, name: str, *, caption: str, alt: str) -> Shown:
    """Finish a figure: render it once, close it, and attach its texts.

    name: label for cross references, "fig-" and kebab-case. caption: what is seen and what to make of it.
    alt: what a reader who cannot see the picture needs. Raises ValueError if a text is missing.
    """
    import matplotlib.pyplot as plt

    if not name.startswith("fig-"):
        raise ValueError(f"name must start with 'fig-', got {name!r}")
    if not caption.strip() or not alt.strip():
        raise ValueError("caption and alt must not be empty")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})  # same bytes every run
    plt.close(figure)
    return Shown(buffer.getvalue(), name, caption, alt)


def image_grid(
    rows: Sequence[torch.Tensor],
    titles: Sequence[Sequence[str]] | None = None,
    *,
    row_labels: Sequence[str] = (),
    cell: float = 1.05,
) -> Figure:
    """Pictures in a grid. rows: each (N, 3, S, S) in [0, 1]; titles: per row and picture; cell: inches a picture."""
    import matplotlib.pyplot as plt

    columns = max(len(row) for row in rows)
    extra = 0.24 if titles else 0.0
    with style():
        figure, axes = plt.subplots(
            len(rows), columns, figsize=(columns * cell, len(rows) * (cell + extra)), squeeze=False, layout="constrained"
        )
        for r, row in enumerate(rows):
            for c in range(columns):
                axis = axes[r, c]
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if c < len(row):
                    axis.imshow(row[c].permute(1, 2, 0).numpy(), interpolation="nearest")
                    if titles:
                        axis.set_title(titles[r][c], fontsize=9, pad=2)
            if row_labels:
                axes[r, 0].set_ylabel(row_labels[r], fontsize=9)
    return figure


def masked(images: torch.Tensor, masks: torch.Tensor, points: torch.Tensor | None = None, *, zoom: int = 8) -> torch.Tensor:
    """Pictures for `image_grid` that show masks: inside the image as it is, outside dim and grey, a white line between.

    images: (N, 3, S, S) in [0, 1]. masks: (N, S, S) bool. points: (N, 2) x and y in pixels of the prompts, drawn as a white dot
    with a black rim. Returns (N, 3, S * zoom, S * zoom). Light alone tells inside from outside: it survives grey print.
    """
    import torch

    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]) or zoom < 3:
        raise ValueError(f"images (N, 3, S, S), masks (N, S, S), zoom >= 3: got {images.shape}, {masks.shape}, {zoom}")
    large, inside = (x.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1) for x in (images, masks[:, None]))
    dim = 0.12 + 0.3 * large.mean(1, keepdim=True).expand_as(large)
    shown = torch.where(inside, large, dim)
    line = max(1, zoom // 4)
    wide = torch.nn.functional.max_pool2d(inside.float(), 2 * line + 1, stride=1, padding=line) > 0
    shown = torch.where(wide & ~inside, torch.ones_like(shown), shown)
    if points is not None:
        places = (torch.arange(large.shape[-1]) + 0.5) / zoom - 0.5  # of every small pixel, in pixels of the image
        across = (places[None, None, :] - points[:, 0, None, None]) ** 2 + (
            places[None, :, None] - points[:, 1, None, None]
        ) ** 2
        shown = torch.where((across < 1.3**2)[:, None], torch.zeros_like(shown), shown)
        shown = torch.where((across < 0.8**2)[:, None], torch.ones_like(shown), shown)
    return shown


class Source:
    """A function's own text, as a notebook shows it: highlighted, with its place in the survey above it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        import inspect

        text = inspect.getsource(self.function).rstrip()
        where = f"{self.function.__module__}.{self.function.__qualname__}"
        return {"text/plain": text, "text/markdown": f"`{where}`\n\n```python\n{text}\n```"}


def source(function: Any) -> Source:
    """Show the code that is about to run: what a notebook prints is what the library executes."""
    return Source(function)


def curves(
    series: Mapping[str, Sequence[Interval]],
    ticks: Sequence[object],
    *,
    xlabel: str,
    ylabel: str,
    legend: Literal["lower left", "center right"] = "lower left",
) -> Figure:
    """Lines with their confidence bands. series: per name one interval for each tick; values are shares in [0, 1].

    legend: where it hides the least.
    """
    import matplotlib.pyplot as plt

    positions = range(len(ticks))
    with style():
        figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for (name, points), colour, marker, dash in zip(series.items(), COLOURS, MARKERS, DASHES, strict=False):
            axis.plot(positions, [p.value for p in points], color=colour, marker=marker, linestyle=dash, label=name)
            axis.fill_between(positions, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15)
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.03))
        axis.set_xticks(positions, [str(tick) for tick in ticks])
        axis.legend(loc=legend)
    return figure


def bars(values: Mapping[str, Interval], *, xlabel: str) -> Figure:
    """Horizontal bars with their confidence intervals; values are shares in [0, 1]."""
    import matplotlib.pyplot as plt

    points = list(values.values())
    errors = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
    with style():
        figure, axis = plt.subplots(figsize=(6, 0.9 + 0.4 * len(points)), layout="constrained")
        axis.barh(list(values), [p.value for p in points], xerr=errors, color=COLOURS[0], ecolor=COLOURS[2], capsize=3)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set(xlabel=xlabel, xlim=(0, 1.04))
    return figure
