"""Data made from other data counts only as long as that is what it was made from; and a flow of shards ends, whatever is left to do."""
import json
import types
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest

from ctrlrl.control import ATTRIBUTES
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.distill import distill
from ctrlrl.data.generation import OPTIMISATION, Draw, Layout, samples_table, scores_table
from ctrlrl.data.scored import ScoredSamples
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt, prompt_id
from ctrlrl.errors import DataError, RunError
from jobs.calibrate import CalibrateRecipe, calibrate
from jobs.examine import inspect_data
from jobs.parts.flow import all_of, flow
from jobs.parts.road import Road, Scores

SHARDS, SIGMOID = 6, Calibration("sigmoid")
PROMPTS = [Prompt(prompt_id(m), m, f"f:{i}") for i in range(SHARDS) for m in [({"role": "user", "content": f"q{i}"},)]]
IDS = [prompt.prompt_id for prompt in PROMPTS]


def answers(shard, tag):
    draws = [Draw(shard, 0, k, 1) for k in range(4)]
    texts = [f"{tag} {shard} {k}" for k in range(4)]
    return samples_table(draws, IDS, texts, [np.array([1, 2], np.int32)] * 4, np.ones(4, bool), "policy")


def judged(tag):
    """The raw output that the text of an answer earns: a score tells which answer it was given to."""
    return np.array([(-3.0, 3.0)[k % 2] + (tag == "new") for k in range(4)], np.float32)


@pytest.fixture
def scored(tmp_path):
    """A finished directory of old answers with their scores."""
    (tmp_path / "run").mkdir()
    layout = Layout(tmp_path / "run")
    layout.write_prompts(PROMPTS)
    with layout.samples().open_or_create({"x": 1}, shards=SHARDS) as store:
        for shard in range(SHARDS):
            store.commit(shard, answers(shard, "old"), {})
        store.finish({})
    for attribute in ATTRIBUTES:
        with layout.scores(OPTIMISATION, attribute).open_or_create({"x": 1}, shards=SHARDS) as store:
            for shard in range(SHARDS):
                store.commit(shard, scores_table(answers(shard, "old"), judged("old"), SIGMOID), {"mean": 0.5})
            store.finish({})
    layout.manifest.write_text("{}")
    return layout


def remake(layout, shard, tag="new"):
    layout.samples().path(shard).unlink(missing_ok=True)
    with layout.samples().open_or_create({"x": 1}, shards=SHARDS) as store:
        assert store.missing() == [shard]
        store.commit(shard, answers(shard, tag), {})
        return store.finish({})


def sources(layout):
    return ScoredSamples(layout.samples(), *(layout.scores(OPTIMISATION, a) for a in ATTRIBUTES), layout.prompts)


def test_scores_of_remade_samples_are_missing_everywhere(scored, tmp_path, capsys):
    assert scored.finished and scored.scores(OPTIMISATION, "helpful").missing() == []
    manifest = remake(scored, 2)
    assert manifest["shards"][2]["sha256"] == scored.samples().record(2).sha256  # the manifest follows
    store = scored.scores(OPTIMISATION, "helpful")
    assert store.missing() == [2] and store.outdated() == [2] and not store.finished and not scored.finished
    with pytest.raises(RunError, match="helpful/shards/000002.parquet was made from other shards than are in .*samples: run the command"):
        distill(sources(scored), tmp_path / "out", method="vanilla", seed=0)
    assert not (tmp_path / "out" / "train.parquet").exists()
    with pytest.raises(RunError, match="000002.parquet was made from other shards"):
        calibrate(CalibrateRecipe(data=str(scored.directory), out=str(tmp_path / "calibration")))
    assert not (tmp_path / "calibration").exists()
    assert inspect_data(str(scored.directory), 0) == 1
    assert "scores of other samples than those that are there: shards 2: run the command" in capsys.readouterr().out


def test_scores_of_samples_that_came_back_the_same_count_again(scored):
    scored.samples().path(4).unlink()
    assert [scored.scores(OPTIMISATION, a).missing() for a in ATTRIBUTES] == [[4], [4]]
    remake(scored, 4, "old")
    assert [scored.scores(OPTIMISATION, a).missing() for a in ATTRIBUTES] == [[], []] and scored.finished


def test_a_plain_store_of_other_samples_is_refused_by_distillation(scored, tmp_path):
    remake(scored, 1)
    plain = [ShardStore(scored.scores(OPTIMISATION, a).directory) for a in ATTRIBUTES]
    with pytest.raises(DataError, match="shard 1 of .*helpful scores other samples"):
        distill(ScoredSamples(scored.samples(), *plain, scored.prompts), tmp_path / "out", method="moec", seed=0)


def test_a_smaller_scale_is_finished_anew_when_the_larger_ones_manifest_lists_what_is_gone(scored):
    scored.samples().path(5).unlink()
    with scored.samples().open_or_create({"x": 1}, shards=3) as store:
        with pytest.raises(RunError, match="000005.parquet cannot be read: it is gone"):
            store.manifest()
        assert len(store.finish({})["shards"]) == 3 and store.finished


def now(value):
    call = Future()
    call.set_result(value)
    return call


def scoring_of(layout, asked):
    """The road over a directory's answers and scores, its scores, and reward models that answer at once."""

    def raw(conversations):
        asked.append(len(conversations))
        return now(judged(conversations[0][1].split()[0]))

    models = {a: types.SimpleNamespace(check=lambda: None, fingerprint=lambda: {}, workers=1) for a in ATTRIBUTES}
    scores = Scores(layout, OPTIMISATION, models, {})
    crew = types.SimpleNamespace(rewards={f"reward.{a}": types.SimpleNamespace(raw=raw, calibration=SIGMOID) for a in ATTRIBUTES})
    samples = layout.samples()
    return Road("score", dict.fromkeys([samples, *scores.stores.values()], {"x": 1}), SHARDS), samples, scores, crew


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lost", [[0], [0, 1, 2, 3, 4], list(range(SHARDS))])
def test_lost_samples_are_made_and_scored_anew_and_the_flow_ends(scored, lost):
    for shard in lost:
        scored.samples().path(shard).unlink()
    done, asked, messages = [], [], {p.prompt_id: p.messages for p in PROMPTS}
    road, samples, scores, crew = scoring_of(scored, asked)

    def script(shard):
        table = (yield from all_of({0: now(answers(shard, "new"))}))[0]
        samples.commit(shard, table, {})
        assert (yield from scores.of_shard(road, crew, shard, messages, table)) == 4
        done.append(shard)

    with road:
        road.open()
        stores = [samples, *scores.stores.values()]
        assert all([road.lacks(store, shard) for shard in range(SHARDS)] == [s in lost for s in range(SHARDS)] for store in stores)
        assert flow(lost, script, 2)
        assert sorted(done) == lost and len(asked) == 2 * len(lost)
        for store in stores:
            store.finish({})
            assert store.missing() == [] and store.finished
    for store in scores.stores.values():
        assert store.read(lost[0])["raw"].to_pylist() == judged("new").tolist()  # the scores are those of the answers that are there


@pytest.mark.timeout(60)
def test_scores_that_one_reward_model_lacks_are_asked_of_it_alone_and_kept_as_they_come(scored):
    scored.scores(OPTIMISATION, "harmless").path(3).unlink()
    asked, broken = [], Future()
    broken.set_exception(DataError("the reward model is gone"))
    road, _, scores, crew = scoring_of(scored, asked)
    with road:
        road.open()
        script = partial(scores.of_shard, road, crew, messages={p.prompt_id: p.messages for p in PROMPTS})
        assert flow(range(SHARDS), script, 2) and asked == [4] and scores.stores["harmless"].missing() == []
    scored.samples().path(3).unlink()
    remake(scored, 3)
    crew.rewards["reward.helpful"].raw = lambda conversations: broken
    with road:
        road.open()
        with pytest.raises(DataError, match="the reward model is gone"):
            flow([3], script, 2)
    assert [scored.scores(OPTIMISATION, a).missing() for a in ATTRIBUTES] == [[3], []]  # what the other one said is not lost


def test_lost_prompts_are_written_again(scored):
    scored.prompts.unlink()
    scored.write_prompts(PROMPTS)
    before = scored.prompts.stat().st_ino
    scored.write_prompts(PROMPTS)
    assert scored.prompts.stat().st_ino == before and list(scored.messages()) == IDS  # those that are there are left alone
    scored.prompts.write_bytes(b"PAR1 half")
    scored.write_prompts(PROMPTS)
    assert list(scored.messages()) == IDS
    assert json.loads((scored.samples().directory / "store.json").read_text())["shards"] == SHARDS
