"""A whole set of scores, and a whole evaluation, may lack the share of scores that its recipe says, and no more."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from actors.reward import RewardConfig
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.generation import Draw, Layout, samples_table, score_facts, scores_table
from ctrlrl.data.shards import ShardStore
from ctrlrl.errors import DataError
from jobs.parts.asking import check_scores
from jobs.parts.road import Scores, unscored_line
from tests.models.listening import Listening


@pytest.fixture
def url():
    service = Listening(lambda body, _: (200, {}, {"scores": [0.5] * len(body["conversations"])}))
    yield service.url
    service.close()


def test_of_a_set_of_scores(url, tmp_path):
    """Two shards of five answers, of which one and two have no score."""
    layout, ids = Layout(tmp_path), ["0" * 16]
    samples, scores = layout.samples(), layout.scores("mine", "helpful")
    with samples, scores:
        samples.open_or_create({"made": 1}, shards=2)
        scores.open_or_create({"made": 1}, shards=2)
        for shard, lacking in enumerate(([1], [0, 4])):
            draws = [Draw(0, shard, i, 1) for i in range(5)]
            answers = samples_table(draws, ids, ["x"] * 5, [np.array([1], np.int32)] * 5, np.ones(5, bool), "p")
            samples.commit(shard, answers, {})
            table = scores_table(answers, np.where(np.isin(np.arange(5), lacking), np.nan, 0.5), Calibration("identity"))
            scores.commit(shard, table, score_facts(table))
    of = lambda share: Scores(layout, "mine", {"helpful": RewardConfig(http={"url": url, "unscored": share})}, {})  # noqa: E731
    assert of(0.3).unscored() == {"helpful": 3}
    assert unscored_line({"helpful": 3}) == ["  without a score, set aside  helpful 3"] and unscored_line({}) == []
    with pytest.raises(DataError, match="helpful has no score for 3 of 10 answers, and unscored = 0.29 .*run the same command again, or"):
        of(0.29).unscored()


def test_of_an_evaluation(tmp_path):
    strict = RewardConfig(model="m")
    table, store = pa.table({"optimisation.x": [0.5, None, 0.1, 0.2], "held_out.x": [0.5, 0.5, 0.1, 0.2]}), ShardStore(tmp_path)

    def check(share, held_out=table["held_out.x"]):
        lenient = RewardConfig(http={"url": "https://a.example/", "unscored": share})
        judges = SimpleNamespace(given={"optimisation": {"x": lenient}, "held_out": {"x": strict}})
        check_scores(SimpleNamespace(judges=judges), table.set_column(1, "held_out.x", held_out), store)

    check(0.25)
    with pytest.raises(DataError, match="judges.optimisation.x has no score for 1 of 4 answers, and unscored = 0.2 "):
        check(0.2)
    with pytest.raises(DataError, match="judges.held_out.x has no score for 1 of 4 answers, and unscored = 0 "):
        check(0.25, pa.chunked_array([[None, 0.5, 0.1, 0.2]]))
