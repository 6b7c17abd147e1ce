"""Raw outputs become scores in [0, 1]; a stored calibration that was changed does not load."""
import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrlrl.control import ATTRIBUTES
from ctrlrl.data.calibration import Calibration, fit_quantile, load_calibration
from ctrlrl.errors import DataError
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.scorer import ScorerConfig


def test_sigmoid_and_identity():
    sigmoid = Calibration("sigmoid")
    assert sigmoid(np.array([0.0, math.log(3), -math.log(4)], np.float32)) == pytest.approx([0.5, 0.75, 0.2])
    assert sigmoid(np.array([[1e4, -1e4]])).tolist() == [[1.0, 0.0]] and sigmoid(np.zeros(0)).shape == (0,)
    assert Calibration("identity")(np.array([0.0, 0.3, 1.0])).tolist() == [0.0, 0.3, 1.0]
    with pytest.raises(DataError, match=r"identity .* got -0.5 to 0.3: use sigmoid"):
        Calibration("identity")(np.array([0.3, -0.5]))


def test_an_output_that_is_not_there_has_no_score_and_changes_no_other():
    raw, some = np.array([0.3, np.nan, 0.7, 1.0]), [0, 2, 3]
    for calibration in (Calibration("sigmoid"), Calibration("identity"), fit_quantile([0.1, 0.5, 0.9])):
        assert np.isnan(calibration(raw)).tolist() == [False, True, False, False]
        assert calibration(raw)[some].tolist() == calibration(raw[some]).tolist()
    with pytest.raises(DataError, match=r"identity .* got -0.5 to 0.3"):
        Calibration("identity")(np.array([0.3, np.nan, -0.5]))
    assert fit_quantile(raw) == fit_quantile(raw[some])


def test_quantile_is_the_share_below():
    fitted = fit_quantile([3.0, -1.0, 3.0, 7.0])
    # Mid-shares: -1 has 0 below and 1/4 at or below; 3 has 1/4 and 3/4; 7 has 3/4 and 1.
    assert fitted(np.array([-1.0, 3.0, 7.0])) == pytest.approx([0.125, 0.5, 0.875])
    assert fitted(np.array([1.0, 5.0, -99.0, 99.0])) == pytest.approx([0.3125, 0.6875, 0.125, 0.875])


def test_quantile_makes_the_scores_uniform_with_few_points():
    raw = np.random.default_rng(0).normal(3, 10, size=20_000)
    fitted = fit_quantile(raw, points=101)
    assert len(fitted.knots) == 101 and fitted.knots[0] == raw.min() and fitted.knots[-1] == raw.max()
    assert np.quantile(fitted(raw), [0.1, 0.2, 0.5, 0.8, 0.9]) == pytest.approx([0.1, 0.2, 0.5, 0.8, 0.9], abs=0.002)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2), st.lists(st.floats(-1e7, 1e7), min_size=1))
@example([0.0] * 5 + [1.0] * 3 + [-1.0], [0.0, -2.238468026110093e-140])
def test_every_calibration_keeps_the_order_and_stays_in_range(raw, asked):
    calibrations = [Calibration("sigmoid")] + ([fit_quantile(raw, points=7)] if len(set(raw)) > 1 else [])
    for calibration in calibrations:
        scores = calibration(np.sort(np.array(asked)))
        assert (np.diff(scores) >= 0).all() and scores.min() >= 0 and scores.max() <= 1


def test_a_changed_file_does_not_load(tmp_path):
    path, fitted = tmp_path / "calibration.json", fit_quantile([0.1, 0.7, 2.5])
    fitted.save(path)
    assert load_calibration(path) == fitted and fitted.content_hash != Calibration("sigmoid").content_hash
    Calibration("sigmoid").save(tmp_path / "s.json")
    assert load_calibration(tmp_path / "s.json") == Calibration("sigmoid")
    stored = json.loads(path.read_text())
    for name, value in (("knots", [0.1, 0.7000001, 2.5]), ("scores", [0.1, 0.5, 0.9]), ("content_hash", "0" * 64)):
        path.write_text(json.dumps(stored | {name: value}))
        with pytest.raises(DataError, match="was changed after it was saved"):
            load_calibration(path)
    for text in ("{", "{}", "[]", json.dumps(stored | {"knots": [1, 0, 2]}), json.dumps(stored | {"kind": "sigmoid"})):
        path.write_text(text)
        with pytest.raises(DataError, match="not a stored calibration"):
            load_calibration(path)
    with pytest.raises(DataError, match="not a stored calibration"):
        load_calibration(tmp_path / "absent.json")


def test_wrong_calibrations_are_refused():
    with pytest.raises(DataError, match="'tanh' is unknown: use one of sigmoid"):
        Calibration("tanh")
    with pytest.raises(DataError, match="quantile calibration was given 0 knots"):
        Calibration("quantile")
    for raw in ([1.0, 1.0], [], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(DataError, match="fitted on"):
            fit_quantile(raw)


def test_a_calibration_is_that_of_the_reward_model_it_was_fitted_on(models, tmp_path):
    raw = np.array([0.1, 0.5, 2.5])
    for model in (model_fingerprint(models["helpful"]), ""):  # a file of an earlier version does not say
        fitted = fit_quantile(raw, model=model)
        assert fitted.content_hash == fit_quantile(raw).content_hash  # where scores come from is no part of what they are
        fitted.save(tmp_path / "c.json")
        own, other = (
            ScorerConfig(model=models[name], calibration="quantile", calibration_file=str(tmp_path / "c.json")) for name in ATTRIBUTES
        )
        assert own.load_calibration() == fitted
        if model:
            with pytest.raises(DataError, match="c.json was fitted on the outputs of another reward model than .*: score answers"):
                other.load_calibration()
        else:
            other.load_calibration()
