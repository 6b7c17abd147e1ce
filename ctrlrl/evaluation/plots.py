"""Pictures: the training curve of PPO, and the joint distribution of the two scores ([SH] Figure 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.control import corners
from ctrlrl.data.atomic import write_atomically
from ctrlrl.data.selection import HIGH_START
from ctrlrl.errors import DataError

# Hues that stay apart for every common colour blindness (Okabe and Ito), one an attribute, and greys for the rest.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6D00", "#000000")
INK, FAINT, GRID = "#333333", "#8a8a8a", "#e6e6e6"
_DENSITY = LinearSegmentedColormap.from_list("density", ["#eef4fa", "#7fb0d6", "#0f5c97", "#082f52"])
_DPI = 150
_SMOOTHED_FROM = 20  # steps; shorter runs are drawn as they are


def colours(attributes: Attributes) -> dict[str, str]:
    """The hue of each attribute, by name."""
    return dict(zip(attributes.names, HUES, strict=False))


def lines_of(attributes: Attributes, key: str) -> tuple[tuple[str, str, str], ...]:
    """(key, label, colour) of a line for each attribute; in `key` a brace stands for its name."""
    return tuple((key.format(a.name), a.noun, colour) for a, colour in zip(attributes, HUES, strict=False))


def ppo_panels(attributes: Attributes = PAPER):
    """Panel title, what the axis shows, (key, label, colour) of its lines."""
    return (
        ("Reward", "mean over samples", (("reward/mean", "reward", INK),)),
        ("Agreement with the control", "1 − |requested − score|", lines_of(attributes, "agreement/{}")),
        ("KL to the reference", "nats per response", (("kl/k1", "k1 estimate", INK), ("kl/k3", "k3 estimate", FAINT))),
    )


def reward_curve(rows: Sequence[Mapping], path: str | Path, attributes: Attributes = PAPER) -> Path:
    """Draw reward, agreement per attribute and KL over the steps of metrics.jsonl `rows` into the PNG `path`.

    Keys: `step` (or the row's number), reward/mean, agreement/ATTRIBUTE, kl/k1, kl/k3. A line whose key is
    absent everywhere is left out, a panel without lines too; rows without any of the keys raise DataError.
    """
    given = [(title, unit, [line for line in lines if series(rows, line[0])[0].size]) for title, unit, lines in ppo_panels(attributes)]
    panels = [panel for panel in given if panel[2]]
    if not panels:
        known = ", ".join(line[0] for _, _, lines in ppo_panels(attributes) for line in lines)
        raise DataError(f"no training curve: none of the {len(rows)} rows has {known}")
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    for axes, (title, unit, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, label, colour in lines:
            draw_line(axes, *series(rows, key), label, colour)
        frame(axes, title, "step", unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(x=0.02)
        if title.startswith("Agreement"):
            axes.set_ylim(top=1)
        if title.startswith("KL"):
            axes.axhline(0, color=FAINT, linewidth=0.8)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=INK)
    return _save(figure, path)


def score_distribution(
    histogram: np.ndarray, path: str | Path, *, extremes: Mapping[str, int], title: str = "Scores of the samples", pair: Attributes = PAPER
) -> Path:
    """Draw the joint distribution of the scores of two attributes, `pair`, with both marginals into the PNG `path` ([SH] Figure 4).

    histogram: counts [bins, bins] over [0, 1] x [0, 1], the first attribute's first (of a distillation's report). extremes: exact number of
    extreme samples of each class, by Control.name, of these or of more attributes; the four corners are framed and labelled with
    their share.
    """
    histogram = np.asarray(histogram, np.float64)
    total = histogram.sum()
    if histogram.ndim != 2 or not total:
        raise DataError(f"a score distribution needs a 2-D histogram with at least one sample; got shape {histogram.shape} with {total:g}")
    figure = Figure(figsize=(5.6, 6.3), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    axes = figure.add_subplot(grid[1, 0])
    top, right = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    mesh = axes.pcolormesh(*_edges(histogram), np.ma.masked_equal(histogram.T / total, 0), cmap=_DENSITY, norm=LogNorm(), rasterized=True)
    _corners(axes, extremes, total, pair)
    _marginals(top, right, histogram / total)
    x, y = axis_words(pair)
    frame(axes, "", x, y)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6), axisbelow=True)
    figure.suptitle(f"{title} (n = {total:,.0f})", color=INK, fontsize=11)
    percent = FuncFormatter(lambda share, _: f"{float(f'{100 * share:.2g}'):g} %")
    shares = histogram[histogram > 0] / total
    ticks = np.unique(np.geomspace(shares.min(), shares.max(), 4))  # their own, since decades are too few or too many
    bar = figure.colorbar(mesh, ax=[axes, right], orientation="horizontal", shrink=0.6, aspect=40, format=percent, ticks=ticks)
    bar.minorticks_off()
    bar.set_label("share of samples per cell", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    return _save(figure, path)


def axis_words(pair: Attributes) -> tuple[str, str]:
    """What the two axes show."""
    if pair == PAPER:
        return "helpfulness score  $r_{hp}$", "harmlessness score  $r_{sf}$"
    return tuple(f"{attribute.noun} score" for attribute in pair)


def _corners(axes: Axes, extremes: Mapping[str, int], total: float, pair: Attributes) -> None:
    width = 1 - HIGH_START
    for number, corner in enumerate(corners(pair)):
        x, y = (HIGH_START * (number // 2), HIGH_START * (number % 2))
        axes.add_patch(Rectangle((x, y), width, width, fill=False, edgecolor=HUES[1], linewidth=1.6, clip_on=False, zorder=3))
        # The label stands towards the middle, so that it hides nothing of the corner.
        beside, side = (y + width + 0.025, "bottom") if y == 0 else (y - 0.025, "top")
        asked = set(corner.name.split(","))
        words = f"{sum(count for name, count in extremes.items() if asked <= set(name.split(','))) / total:.1%}"
        card = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
        axes.text(x + width / 2, beside, words, ha="center", va=side, color=HUES[1], fontsize=9, fontweight="bold", bbox=card)


def _marginals(top: Axes, right: Axes, share: np.ndarray) -> None:
    x, y = (np.linspace(0, 1, size + 1) for size in share.shape)
    top.stairs(share.sum(1), x, fill=True, color=HUES[0], alpha=0.75)
    right.stairs(share.sum(0), y, orientation="horizontal", fill=True, color=HUES[0], alpha=0.75)
    for axes in (top, right):
        axes.set_axis_off()


def _edges(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.linspace(0, 1, size + 1) for size in histogram.shape)


def series(rows: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`; both empty where no row has it."""
    found = [(row.get("step", number), row[key]) for number, row in enumerate(rows) if row.get(key) is not None and np.isfinite(row[key])]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return steps, values


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """The series; a long one as a faint line under its moving average."""
    window = max(len(values) // 20, 1) if len(values) >= _SMOOTHED_FROM else 1
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    marker = "o" if len(values) < _SMOOTHED_FROM else None
    axes.plot(steps, _moving_average(values, window), color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over up to `window` values on either side, shorter at the ends, so that it starts and ends on time."""
    if window <= 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def frame(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis labels and a quiet grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, FigureCanvasAgg(figure).print_png)  # an own canvas: no pyplot, no global state, no display
    return path
