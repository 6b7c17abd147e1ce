"""Small pictures for the report, each an SVG in a data URI: narrow enough to be read on a phone, side by side on a wide screen."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.evaluation.plots import FAINT, INK, colours, draw_line, frame, lines_of, ppo_panels, series

_SIZE = (4.0, 2.8)  # inches; 384 x 269 pixels of a page
_BEFORE, _AFTER = "#bdbdbd", "#0072B2"


@dataclass(frozen=True)
class Picture:
    """`uri` for an img element, and in words what it shows."""

    uri: str
    alt: str


def _curves(attributes: Attributes):
    """As plots.ppo_panels; those lines that a run has are drawn."""
    return (
        *ppo_panels(attributes),
        ("Loss", "loss", (("train/loss", "training objective", FAINT), ("validation/loss", "held-out loss", INK))),
        ("Accuracy", "share of pairs", (("train/accuracy", "training", FAINT), ("validation/accuracy", "held-out rows", INK))),
        (
            "True over fake control",
            "logprob gap, nats a token",
            (("train/gap", "training", FAINT), ("validation/gap", "held-out rows", INK)),
        ),
        ("Control during training, MP", "correlation", lines_of(attributes, "evaluation/{}/MP")),
        ("Control during training, Err", "mean error", lines_of(attributes, "evaluation/{}/Err")),
    )


def training_curves(rows: Sequence[Mapping], name: str, attributes: Attributes = PAPER) -> list[Picture]:
    """The curves that the metrics rows of a run have: of PPO, of fine-tuning, and of evaluation during training."""
    pictures = []
    for title, unit, lines in _curves(attributes):
        drawn = [line for line in lines if series(rows, line[0])[0].size]
        if not drawn:
            continue
        figure, axes = _sheet()
        for key, label, colour in drawn:
            draw_line(axes, *series(rows, key), label, colour)
        frame(axes, title, "step", unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, loc="best", labelcolor=INK)
        pictures.append(_picture(figure, f"{name}: {title.lower()} over the steps of training"))
    return pictures


def calibration(by_judge: Mapping[str, Mapping], name: str, attributes: Attributes = PAPER) -> Picture:
    """Requested level against mean achieved score, by attribute; the first set of reward models solid, the second dashed.

    by_judge: set of reward models -> attribute -> points with "requested" and "mean".
    """
    figure, axes = _sheet()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (1, 3)))
    for number, (judge, curves) in enumerate(by_judge.items()):
        for attribute in attributes:
            points = curves[attribute.name]
            x, y = [point["requested"] for point in points], [point["mean"] for point in points]
            label = f"{attribute.noun}, {judge.replace('_', '-')}"
            style = (0, (4, 2)) if number else "-"
            hue = colours(attributes)[attribute.name]
            axes.plot(x, y, color=hue, linestyle=style, marker="o", markersize=3.5, linewidth=1.6, label=label)
    _unit_square(axes)
    frame(axes, name, "requested", "mean score")
    figure.legend(frameon=False, fontsize=7.5, loc="outside lower center", ncols=2, labelcolor=INK)
    return _picture(figure, f"{name}: mean score at each requested level")


def distributions(
    by_judge: Mapping[str, Mapping[str, Sequence[Mapping]]], name: str, attributes: Attributes = PAPER
) -> list[Picture]:
    """For each attribute the distribution of its score under each requested level of it ([SH] Fig. 4-6), as shares of the answers.

    by_judge: set of reward models -> attribute -> for each requested level "requested" and "counts" over equal bins of [0, 1]. The
    held-out set is dashed, the other filled.
    """
    pictures = []
    for attribute in attributes:
        figure, axes = _sheet()
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("levels", [FAINT, colours(attributes)[attribute.name]])
        for judge, by_attribute in by_judge.items():
            for number, level in enumerate(levels := by_attribute[attribute.name]):
                counts = np.array(level["counts"], np.float64)
                shares, edges = counts / max(counts.sum(), 1), np.linspace(0, 1, len(counts) + 1)
                colour = shades(number / (len(levels) - 1) if len(levels) > 1 else 1.0)
                label = f"requested {level['requested']:g}" if judge == next(iter(by_judge)) else None
                if judge == "held_out":
                    axes.stairs(shares, edges, color=colour, linewidth=1.0, linestyle=(0, (3, 2)), label=label)
                else:
                    axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
                    axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
        frame(axes, f"{name}: {attribute.noun}", "score", "share of answers")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(frameon=False, fontsize=8, loc="upper center", labelcolor=INK)
        pictures.append(_picture(figure, f"{name}: distribution of the {attribute.noun} score by requested level"))
    return pictures


def class_balance(classes: Mapping[str, Mapping[str, int]], name: str, attributes: Attributes = PAPER) -> Picture:
    """Share of each of the classes before and after a distillation. classes: "before" and "after" -> control's name -> rows."""
    named = list(classes["before"])
    figure, axes = _sheet(max(1.0, len(named) * len(attributes) / 8))
    places = np.arange(len(named))[::-1]
    for when, colour, offset in (("before", _BEFORE, 0.19), ("after", _AFTER, -0.19)):
        counts = np.array([classes[when][one] for one in named], np.float64)
        shares = counts / max(counts.sum(), 1)
        axes.barh(places + offset, shares, 0.36, color=colour, label=when)
        for place, share, count in zip(places + offset, shares, counts, strict=True):
            axes.text(share + 0.01, place, f"{share:.1%} ({count:,.0f})", va="center", fontsize=7, color=INK)
    frame(axes, name, "share of rows", "")
    axes.set_yticks(places, [in_words(one, attributes, "\n") for one in named], fontsize=8)
    axes.set_xlim(0, 1.18)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2, labelcolor=INK)
    return _picture(figure, f"{name}: share of the {'four' if len(named) == 4 else len(named)} classes before and after distillation")


def in_words(name: str, attributes: Attributes, between: str = ", ") -> str:
    """A Control.name for people: `helpful 1, safe 0.2`."""
    levels = dict(part.split("=") for part in name.split(","))
    return between.join(f"{a.synonyms[0]} {levels[a.name]}" for a in attributes)


def _sheet(height: float = 1.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], _SIZE[1] * height), layout="constrained")
    return figure, figure.add_subplot()


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))


def _picture(figure: Figure, alt: str) -> Picture:
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ctrlrl"}):  # else the same picture has other bytes each time
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return Picture("data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode(), alt)
