"""Pictures are drawn from the numbers given, with what is absent left out."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ctrlrl.control import CORNERS
from ctrlrl.errors import DataError
from ctrlrl.evaluation import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to be asked for their lines and texts."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def lines(figure: Figure) -> dict:
    shown = (line for axes in figure.axes for line in axes.lines if not line.get_label().startswith("_"))
    return {line.get_label(): line.get_ydata().tolist() for line in shown}


def test_training_curve_shows_every_series_it_is_given(tmp_path, drawn):
    rows = [
        {"step": 3, "reward/mean": 0.5, "agreement/helpful": 0.6, "agreement/harmless": 0.7, "kl/k1": 0.0, "phase/seconds": 3},
        {"step": 4, "reward/mean": 0.75, "agreement/helpful": 0.65, "agreement/harmless": 0.8, "kl/k1": 1.5},
    ]
    path = plots.reward_curve(rows, tmp_path / "deep" / "curve.png")
    pixels = imread(path)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1500 and pixels[..., :3].std() > 0.02  # not a blank sheet
    assert lines(drawn[0]) == {"reward": [0.5, 0.75], "helpfulness": [0.6, 0.65], "safety": [0.7, 0.8], "k1 estimate": [0.0, 1.5]}
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [3, 4]
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Reward", "Agreement with the control", "KL to the reference"]


def test_training_curve_tolerates_absent_keys_and_refuses_empty_rows(tmp_path, drawn):
    plots.reward_curve([{"loss": 1}, {"reward/mean": 0.5}, {"reward/mean": float("nan")}, {"reward/mean": None}], tmp_path / "a.png")
    assert len(drawn[0].axes) == 1 and lines(drawn[0]) == {"reward": [0.5]}
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [1]  # without `step`, the row's number
    for rows in ([], [{"loss": 1.0}]):
        with pytest.raises(DataError, match="no training curve.*reward/mean"):
            plots.reward_curve(rows, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_long_curves_are_smoothed_without_delay(tmp_path, drawn):
    rows = [{"step": i, "reward/mean": float(i)} for i in range(40)]
    plots.reward_curve(rows, tmp_path / "a.png")
    raw, smooth = drawn[0].axes[0].lines
    assert raw.get_ydata().tolist() == list(range(40))
    # Window of 2 on either side: a straight line stays in place except at its ends.
    assert smooth.get_ydata()[2:-2] == pytest.approx(np.arange(2, 38)) and smooth.get_ydata()[0] == 1 and smooth.get_ydata()[-1] == 38


def test_score_distribution_marks_the_corners_with_their_shares(tmp_path, drawn):
    histogram = np.zeros((10, 10))
    histogram[0, 9], histogram[5, 5], histogram[9, 0] = 30, 60, 10
    extremes = dict(zip((c.name for c in CORNERS), (0, 30, 10, 0), strict=True))
    path = plots.score_distribution(histogram, tmp_path / "d.png", extremes=extremes)
    assert imread(path).shape[0] > 800
    axes = drawn[0].axes[0]
    labels = {text.get_text(): text.get_position() for text in axes.texts}
    assert labels["30.0%"] == (pytest.approx(0.1), pytest.approx(0.775)) and labels["10.0%"] == (pytest.approx(0.9), pytest.approx(0.225))
    assert {tuple(np.round(patch.get_xy(), 6)) for patch in axes.patches} == {(0, 0), (0, 0.8), (0.8, 0), (0.8, 0.8)}
    # Helpfulness runs to the right: the mesh is indexed [y, x].
    mesh = axes.collections[0].get_array().reshape(10, 10)
    assert mesh[9, 0] == 0.3 and mesh[0, 9] == 0.1 and np.ma.is_masked(mesh[0, 0])
    assert "n = 100" in drawn[0].get_suptitle()
    bar = drawn[0].axes[-1]  # of less than a decade: its labels are few, and apart
    assert [text.get_text() for text in bar.get_xticklabels()] == ["10 %", "18 %", "33 %", "60 %"] and not len(bar.get_xticks(minor=True))
    plots.score_distribution(np.eye(1), tmp_path / "one.png", extremes={})
    assert [text.get_text() for text in drawn[1].axes[-1].get_xticklabels()] == ["100 %"]
    with pytest.raises(DataError, match="at least one sample"):
        plots.score_distribution(np.zeros((4, 4)), tmp_path / "e.png", extremes={})
