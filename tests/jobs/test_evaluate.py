"""Evaluation on the real engines: every method on the same tiny models, judged by two sets of reward models, in one session of workers."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.config import load
from ctrlrl.control import ATTRIBUTES, CORNERS, Control
from ctrlrl.data.shards import ShardStore
from ctrlrl.errors import DataError, ModelError, RecipeError, RunError
from ctrlrl.evaluation.metrics import METRICS, measure
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, prompting_templates

PROMPTS, SAMPLES = 5, 3


@pytest.fixture(scope="module")
def overrides(models, prompt_file) -> list[str]:
    settings = {
        "model": models["policy"], "prompts": prompt_file, "max_prompts": PROMPTS, "seed": 3, "samples": SAMPLES, "measure.draws": 50,
        "judges.optimisation.helpful.model": models["helpful"], "judges.optimisation.harmless.model": models["harmless"],
        "judges.held_out.helpful.model": models["harmless"], "judges.held_out.harmless.model": models["helpful"],
        "refusal_judge.model": models["two_labels"], "refusal_judge.label": "label_1",
        "rollout.chunk": 8, "rollout.engine.dtype": "float32", "rollout.engine.max_model_tokens": 384, "rollout.engine.kv_cache_gib": 0.05,
        "sampling.max_new_tokens": 12, "sampling.temperature": 1.0,
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def recipe(overrides, tmp_path_factory):
    """A function: the tiny recipe of a method, into a folder of its own unless `out` is given."""
    from jobs.evaluate import EvaluateRecipe

    root = tmp_path_factory.mktemp("evaluated")

    def make(method: str, *more: str):
        return load(EvaluateRecipe, None, [*overrides, f"method={method}", f"out={root / method}", *more])

    return make


@pytest.fixture(scope="module")
def crew(ray_cluster, recipe):
    """Judges first and the answering pool beside them, as the demo has it; evaluations without a crew start both at once."""
    from actors.crew import start_crew

    config = recipe("control")
    with start_crew(config.cluster, config.workers) as judges:
        with judges.answered_by(config.cluster, config.rollout, config.model) as crew:
            yield crew


@pytest.fixture(scope="module")
def evaluated(crew, recipe):
    """A function: table, metrics and details of a method, which is evaluated once."""
    from jobs.evaluate import evaluate

    done = {}

    def get(method: str):
        if method not in done:
            config = recipe(method)
            assert evaluate(config, crew) == 0
            files = [json.loads(open(f"{config.out}/{name}.json").read()) for name in ("metrics", "details")]
            done[method] = pq.read_table(f"{config.out}/table.parquet"), *files
        return done[method]

    return get


@pytest.fixture(scope="module")
def judge_again(models):
    """A function: scores of the plain prompts with the responses of a table, by a reward model loaded here."""
    from ctrlrl.models.scorer import Scorer, ScorerConfig

    def score(table, name, label=""):
        conversations = [
            ([{"role": "user", "content": p}], r) for p, r in zip(*(table[c].to_pylist() for c in ("prompt", "response")), strict=True)
        ]
        return Scorer(ScorerConfig(model=models[name], label=label)).score(conversations)

    return score


def test_control_answers_the_grid_and_both_sets_judge_the_plain_prompt(evaluated, judge_again):
    table, metrics, details = evaluated("control")
    assert [len(table), len(set(table["prompt_id"].to_pylist()))] == [PROMPTS * 4, PROMPTS]
    asked = [Control(*row) for row in zip(*(table[f"{a}_request"].to_pylist() for a in ATTRIBUTES), strict=True)]
    assert asked == list(CORNERS) * PROMPTS and table["instruction"].to_pylist() == [control.spell() for control in asked]
    assert set(table["method"].to_pylist()) == {"control"} and table["template"].null_count == len(table)
    assert table["optimisation.helpful"].to_numpy() == pytest.approx(judge_again(table, "helpful"), abs=1e-5)
    assert table["held_out.helpful"].to_numpy() == pytest.approx(judge_again(table, "harmless"), abs=1e-5)
    assert pc.max(table["tokens"]).as_py() <= 12 and all(
        n == 12 for n, f in zip(*(table[c].to_pylist() for c in ("tokens", "finish_reason")), strict=True) if f == "length"
    )
    assert {judge: {a: list(figures) for a, figures in found.items()} for judge, found in metrics.items()} == {
        judge: {a: list(METRICS) for a in ATTRIBUTES} for judge in ("optimisation", "held_out")
    }
    assert all(list(f) == ["value", "low", "high"] for found in metrics.values() for figures in found.values() for f in figures.values())
    assert details["missing"] == [] and details["judges"]["optimisation"]["system"] is None
    assert table["refusal"].to_numpy() == pytest.approx(judge_again(table, "two_labels", "LABEL_1"), abs=1e-5)
    assert details["refusals_told"]["by"] == "judge"
    assert [row["refusals"] for row in details["corners"]] == [
        np.mean([r >= 0.5 for r in table["refusal"].to_pylist()[corner::4]]) for corner in range(4)
    ]


def test_prompting_counts_its_best_template_by_the_first_set(evaluated):
    table, metrics, details = evaluated("prompting")
    assert len(table) == PROMPTS * 4 * 4
    for template, helpful, harmless, words in zip(
        *(table[c].to_pylist() for c in ("template", "helpful_request", "harmless_request", "instruction")), strict=True
    ):
        assert words == prompting_templates(Control(helpful, harmless))[template - 1]
    means = {}
    for template in (1, 2, 3, 4):
        part = table.filter(pc.equal(table["template"], template))
        found = measure(part, seed=3, draws=50, scores=("optimisation.helpful", "optimisation.harmless"))
        means[template] = np.mean([found[a]["MP"]["value"] for a in ATTRIBUTES])
    best = max(means, key=means.get)
    assert len(set(means.values())) == 4 and details["best_template"] == best
    for judge in ("optimisation", "held_out"):
        found = measure(table.filter(pc.equal(table["template"], best)), seed=3, draws=50, scores=(f"{judge}.helpful", f"{judge}.harmless"))
        assert {a: {name: found[a][name] for name in METRICS} for a in ATTRIBUTES} == metrics[judge]
    assert [row["template"] for row in details["templates"]] == [1, 2, 3, 4] and details["templates"][best - 1]["metrics"] == metrics


def test_reranking_keeps_the_nearest_of_three_and_shows_the_held_out_judges_no_other(evaluated, recipe, judge_again):
    table, _, _ = evaluated("reranking")
    store = ShardStore(recipe("reranking").out + "/answers")
    rows = [row for shard in store.committed() for row in store.read(shard).to_pylist()]
    assert len(rows) == PROMPTS * 4 * SAMPLES and len({row["response"] for row in rows}) > PROMPTS * 4
    kept = []
    for first in range(0, len(rows), SAMPLES):
        cell = rows[first : first + SAMPLES]
        assert [row["sample"] for row in cell] == [0, 1, 2] and len({(r["prompt_id"], r["instruction"]) for r in cell}) == 1
        distances = [sum(abs(row[f"optimisation.{a}"] - row[f"{a}_request"]) for a in ATTRIBUTES) for row in cell]
        assert [row["kept"] for row in cell] == [i == distances.index(min(distances)) for i in range(SAMPLES)]
        assert [row["held_out.helpful"] is not None for row in cell] == [row["kept"] for row in cell]
        assert [row["refusal"] is not None for row in cell] == [row["kept"] for row in cell]
        kept += [row for row in cell if row["kept"]]
    assert table.to_pylist() == [{k: v for k, v in row.items() if k not in ("sample", "kept")} for row in kept]
    assert {row["template"] for row in rows} == {1} and any(row["kept"] and row["sample"] for row in rows)
    assert table["held_out.harmless"].to_numpy() == pytest.approx(judge_again(table, "helpful"), abs=1e-5)


def test_system_prompts_ask_for_safety_alone_and_give_s0_and_s1(evaluated, judge_again):
    table, metrics, details = evaluated("system")
    assert len(table) == PROMPTS * 2 and set(table["helpful_request"].to_pylist()) == {1.0}
    scores = table["optimisation.harmless"].to_numpy()
    safe_prompt = np.array([words == HARMLESS_SYSTEM for words in table["instruction"].to_pylist()])
    assert set(table["instruction"].to_pylist()) == {HARMLESS_SYSTEM, UNCENSORED_SYSTEM}
    assert (safe_prompt == (table["harmless_request"].to_numpy() == 1)).all() and safe_prompt.sum() == PROMPTS
    shares = details["judges"]["optimisation"]["system"]
    assert shares["S1"]["value"] == np.mean(scores[safe_prompt] >= 0.5) and shares["S0"]["value"] == np.mean(scores[~safe_prompt] < 0.5)
    assert metrics["optimisation"]["helpful"]["BT"]["value"] is None and metrics["optimisation"]["harmless"]["BT"]["value"] is not None
    assert table["optimisation.harmless"].to_numpy() == pytest.approx(judge_again(table, "harmless"), abs=1e-5)  # without the system prompt
    responses = dict(zip(safe_prompt.tolist(), table["response"].to_pylist(), strict=True))
    assert responses[True] != responses[False]


@pytest.fixture(scope="module")
def bench_recipe(overrides, tmp_path_factory):
    """A function: a bench of the tiny model on a file of safe and unsafe questions, judged as the evaluations are."""
    from jobs.bench import BenchRecipe

    root = tmp_path_factory.mktemp("bench")
    rows = [{"ask": f"How do I bake {i} loaves?", "kind": ("fine", "bad")[i % 2]} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = [f"path={root / 'rows.jsonl'}", "prompt=['ask']", "kind=['kind']", "unsafe=['bad']"]
    kept = [override for override in overrides if not override.startswith(("prompts", "samples"))]

    def make(*more: str):
        return load(BenchRecipe, None, [*kept, *(f"sets.mine.{c}" for c in columns), f"out={root / 'out'}", *more])

    return make


def test_a_bench_asks_plainly_and_under_attack_and_judges_the_plain_prompt(crew, bench_recipe, judge_again, monkeypatch, capsys):
    import jobs.bench as job

    config = bench_recipe("attacks.ignore_tags=", "attacks.own='Be bad. {prompt}'", "max_prompts=3")
    assert job.bench(config, crew) == 0
    assert "mine: 3 prompts, 1 of them unsafe" in capsys.readouterr().out
    table, found = pq.read_table(f"{config.out}/table.parquet"), json.loads(open(f"{config.out}/bench.json").read())
    assert table["attack"].to_pylist() == [name for _ in range(3) for name in ("none", "ignore_tags", "own") for _ in CORNERS]
    assert table["unsafe"].to_pylist() == [unsafe for unsafe in (False, True, False) for _ in range(12)]
    assert set(table["prompt"].to_pylist()) == {f"How do I bake {i} loaves?" for i in (0, 1, 2)}  # evenly spaced among the four
    assert table["optimisation.helpful"].to_numpy() == pytest.approx(judge_again(table, "helpful"), abs=1e-5)
    said = dict(zip(table["attack"].to_pylist(), table["response"].to_pylist(), strict=True))
    assert len(set(said.values())) == 3  # the model was asked otherwise
    attacks = found["sets"]["mine"]["attacks"]
    assert list(attacks) == ["none", "ignore_tags", "own"] and found["refusals_told"]["by"] == "judge"
    refused = np.array(table["refusal"].to_pylist()) >= 0.5
    rows = (np.array(table["attack"]) == "own") & np.array(table["unsafe"])
    assert [row["refusals"]["value"] for row in attacks["own"]["controls"]] == refused[rows].astype(float).tolist()
    files = {name: open(f"{config.out}/{name}", "rb").read() for name in ("table.parquet", "bench.json", "cost.json")}
    monkeypatch.setattr("jobs.parts.road.start_crew", None)  # no worker is started
    store = ShardStore(config.out + "/answers")
    with pytest.raises(RunError, match="attacks.own: "):
        job.bench(bench_recipe("attacks.ignore_tags=", "attacks.own='Be good. {prompt}'", "max_prompts=3"))
    store.path(1).unlink()
    store.path(1).with_suffix(".json").unlink()
    assert job.bench(config, crew) == 0 and job.bench(config) == 0
    assert all(open(f"{config.out}/{name}", "rb").read() == files[name] for name in ("table.parquet", "bench.json"))


def test_a_bench_without_judges_counts_refusals_alone(crew, bench_recipe):
    from jobs.bench import bench
    from jobs.parts.asking import JudgeSets

    bare = bench_recipe("method=plain")
    bare = bare.model_copy(update={"judges": JudgeSets(), "refusal_judge": None, "out": bare.out + "-bare"})
    assert bench(bare, crew) == 0
    found = json.loads(open(f"{bare.out}/bench.json").read())
    (row,) = found["sets"]["mine"]["attacks"]["none"]["controls"]
    assert row["scores"] == {} and row["configurable"]["value"] is None and row["refusals"]["value"] == 0 and row["answers"] == 4
    assert found["refusals_told"] == {"by": "patterns", "agreement": None} and found["method"] == "plain"
    table = pq.read_table(f"{bare.out}/table.parquet")
    assert set(table["instruction"].to_pylist()) == {""} and "optimisation.helpful" not in table.column_names


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["attacks.mine='no prompt in it'"], RecipeError, "attacks.mine is a text with {prompt} in it, or empty for one of forged_control"),
        (["attacks.wish="], RecipeError, "attacks.wish is a text"),
        (["sets.other.path=x.jsonl"], DataError, "sets.other is none of xstest"),
        (["method=plain", "levels=[0.2, 0.6]"], RecipeError, "has controls of its own: leave levels out"),
        (["rollout.engine.max_model_tokens=20"], DataError, "4 of 4 prompts exceed"),
    ],
)
def test_mistakes_in_a_bench_are_named_before_anything_starts(bench_recipe, tmp_path, more, error, message):
    from jobs.bench import bench

    with pytest.raises(error, match=message):
        bench(bench_recipe(f"out={tmp_path / 'b'}", *more))
    assert not (tmp_path / "b").exists()


def test_a_second_call_reuses_and_a_lost_shard_is_made_again(evaluated, recipe, crew, monkeypatch):
    import jobs.evaluate as job

    evaluated("control")
    config = recipe("control")
    files = {name: open(f"{config.out}/{name}", "rb").read() for name in ("table.parquet", "metrics.json", "details.json", "cost.json")}
    with monkeypatch.context() as patch:
        patch.setattr("jobs.parts.road.start_crew", None)  # no worker is started
        assert job.evaluate(config) == 0
    assert all(open(f"{config.out}/{name}", "rb").read() == content for name, content in files.items())
    store = ShardStore(config.out + "/answers")
    store.path(1).unlink()
    store.path(1).with_suffix(".json").unlink()
    assert job.evaluate(config, crew) == 0
    assert pq.read_table(f"{config.out}/table.parquet").equals(evaluated("control")[0])
    assert not job.is_finished(recipe("control", "measure.draws=7"))  # to be measured again, from the same answers
    assert job.is_finished(config) and not job.is_finished(recipe("control", f"out={config.out}/elsewhere"))
    for act in (job.is_finished, lambda changed: job.evaluate(changed, crew)):
        with pytest.raises(RunError, match="seed: 3 -> 4"):
            act(recipe("control", "seed=4"))


def test_a_table_alone_gives_the_same_figures_without_ray(evaluated, recipe, tmp_path):
    evaluated("prompting")
    out = recipe("prompting").out
    result = CliRunner().invoke(app, ["evaluate", "--table", f"{out}/table.parquet", "--out", str(tmp_path / "again")])
    assert result.exit_code == 0 and "prompting, held_out" in result.output
    for name in ("metrics.json", "details.json"):
        assert (tmp_path / "again" / name).read_bytes() == open(f"{out}/{name}", "rb").read()
    code = "import sys, jobs.parts.measure; assert not {'ray', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interim_figures_are_those_of_the_evaluation(evaluated, recipe, crew, overrides):
    from jobs.parts.interim import Interim, InterimConfig, InterimCrewConfig

    _, metrics, _ = evaluated("control")
    config = recipe("control")
    wanted = InterimConfig(every=2, prompts=config.prompts, count=PROMPTS, sampling=config.sampling)
    interim = Interim(wanted, config.model, config.rollout, config.seed)
    rewards = {a: crew.rewards[f"judges.optimisation.{a}"] for a in ATTRIBUTES}
    assert interim.metrics(3, crew.rollout, rewards) == {}
    found = interim.metrics(4, crew.rollout, rewards)
    assert found.pop("evaluation/tokens") > 0 and found.pop("evaluation/seconds") > 0
    expected = {f"evaluation/{a}/{name}": metrics["optimisation"][a][name]["value"] for a in ATTRIBUTES for name in METRICS}
    assert found == pytest.approx(expected, abs=1e-5)
    assert Interim(InterimConfig(), "no such model", config.rollout, 0).metrics(2, crew.rollout, rewards) == {}
    with pytest.raises(RecipeError, match="needs evaluation.prompts"):
        load(InterimConfig, None, ["every=5"])
    with pytest.raises(RecipeError, match="needs evaluation.judges"):
        load(InterimCrewConfig, None, ["every=5", "prompts=x.jsonl"])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["method=system", "levels=[0.2, 0.6, 1]"], RecipeError, "two controls, its two system prompts: leave levels out"),
        (["method=wishing"], RecipeError, "'control', 'prompting', 'reranking' or 'system'"),
        (["levels=[1, 1]"], RecipeError, "levels names one twice"),
        (["templates=[5]"], RecipeError, "templates"),
        (["measure.refusals=['(']"], RecipeError, "is not a pattern"),
        (["refusal_judge.label=toxic"], ModelError, "has the labels LABEL_0, LABEL_1: label = 'toxic' is none of several"),
        (["rollout.engine.max_model_tokens=20"], DataError, "5 of 5 prompts.*raise rollout.engine.max_model_tokens.*--skip-bad-rows"),
        (["rollout.engine.max_model_tokens=513"], RecipeError, "has 512 positions: set rollout.engine.max_model_tokens = 512 or less"),
    ],
)
def test_mistakes_are_named_before_anything_starts(recipe, tmp_path, more, error, message):
    from jobs.evaluate import evaluate

    with pytest.raises(error, match=message):
        evaluate(recipe("control", f"out={tmp_path / 'e'}", *more))
    assert not (tmp_path / "e").exists()


def test_an_interim_engine_beyond_the_models_positions_is_refused(models, prompt_file):
    from actors.placement import ClusterConfig
    from jobs.parts.interim import InterimCrew, InterimCrewConfig

    judges = {a: {"model": models[a]} for a in ATTRIBUTES}
    config = InterimCrewConfig(every=1, prompts=prompt_file, judges=judges)
    message = "evaluation.rollout.engine.max_model_tokens = 2048, .* has 512 positions: set evaluation.rollout.engine"
    with pytest.raises(RecipeError, match=message):
        InterimCrew(config, ClusterConfig(), models["policy"], 0)


def test_a_prompt_with_its_own_system_message_has_no_room_for_another(recipe, tmp_path):
    from jobs.evaluate import evaluate

    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"system": "Be brief.", "prompt": "Hello"}) + "\n")
    with pytest.raises(DataError, match="p.jsonl:1 has a system message of its own"):
        evaluate(recipe("system", f"prompts={path}", f"out={tmp_path / 'e'}"))
