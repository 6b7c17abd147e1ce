"""What follows generation: other scores of the same answers, calibration, distillation, and the inspection of a directory."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.data.schemas import DISTILLED
from jobs.examine import from_the_mean
from tests.models.listening import Listening


@pytest.fixture
def copy(generated, tmp_path):
    """A copy of the generated directory that may be changed."""
    shutil.copytree(generated[0].directory, tmp_path / "run")
    return Layout(tmp_path / "run")


def cli(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert "Traceback" not in result.output
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def column(layout, name, attribute, what="score"):
    return np.concatenate([layout.scores(name, attribute).read(i)[what] for i in range(40)])


def apart(layout, name, attribute):
    """Each score less the mean of the six of its prompt, prompt by prompt."""
    prompts, scores = column(layout, name, attribute, "prompt_id"), column(layout, name, attribute).astype(np.float64)
    of_each = [scores[prompts == prompt] for prompt in sorted(set(prompts))]
    assert {len(six) for six in of_each} == {6}
    return np.concatenate([six - six.mean() for six in of_each])


def test_another_reward_model_scores_the_same_answers_in_its_own_store(copy, models, tmp_path, ray_cluster):
    before = {p: p.read_bytes() for p in (copy.directory / "samples").rglob("*") if p.is_file()}
    swapped = ["--set", f"reward.helpful.model={models['harmless']}", "--set", "reward.helpful.workers=2"]
    code, output = cli("score", copy.directory, *swapped, "--set", "name=swapped")
    assert code == 0 and "score 40/40" in output
    assert np.array_equal(column(copy, "swapped", "helpful"), column(copy, OPTIMISATION, "harmless"))
    assert {p: p.read_bytes() for p in before} == before
    code, output = cli("score", copy.directory, "--set", f"reward.helpful.model={models['helpful']}", "--set", "name=swapped")
    assert code == 2 and "reward.sha256" in output  # a set of scores has one maker
    code, output = cli("distill", copy.directory, "--set", "scores=swapped", "--out", tmp_path / "d")
    assert code == 2 and "for both attributes; it has optimisation" in output and not (tmp_path / "d").exists()

    code, output = cli("calibrate", copy.directory, "--out", tmp_path / "fitted")
    assert code == 0 and "helpful: 240 outputs" in output
    raw = column(copy, OPTIMISATION, "helpful", "raw")
    assert column(copy, OPTIMISATION, "helpful") == pytest.approx(1 / (1 + np.exp(-raw.astype(np.float64))))
    lost = copy.scores("swapped", "helpful").path(7)
    lost.unlink()
    file = tmp_path / "fitted" / "helpful.json"
    fitted = ["--set", "reward.helpful.calibration=quantile", "--set", f"reward.helpful.calibration_file={file}"]
    code, output = cli("score", copy.directory, "--set", f"reward.helpful.model={models['helpful']}", *fitted, "--set", "name=quantile")
    assert code == 0
    scores = column(copy, "quantile", "helpful")
    assert np.array_equal(np.argsort(scores, kind="stable"), np.argsort(raw, kind="stable"))
    assert abs(scores.mean() - 0.5) < 1e-6 and 0 < scores.min() < 0.01 and 0.99 < scores.max() < 1
    code, output = cli("score", copy.directory, *swapped, "--set", "name=swapped")
    assert code == 0 and output.count("score 40/40") == 1 and "score 39/40" not in output  # only what is missing
    assert np.array_equal(column(copy, "swapped", "helpful"), column(copy, OPTIMISATION, "harmless"))
    code, output = cli("inspect", copy.directory)
    agreed = np.corrcoef(apart(copy, OPTIMISATION, "helpful"), apart(copy, "swapped", "helpful"))[0, 1]
    assert code == 0 and f"optimisation and swapped agree on these differences in helpful by {agreed:.2f} (Pearson)" in output


def test_distillation_writes_table_report_and_picture(generated, tmp_path):
    layout, _ = generated
    code, output = cli("distill", layout.directory, "--method", "moec", "--out", tmp_path / "none")
    assert code == 2 and "moec keeps 0 of 240 samples" in output and "Add --calibrate quantile" in output  # random scores: none is extreme
    for method, rows, *more in (("vanilla", 240), ("oversampling", None), ("moec", None, "--calibrate", "quantile")):
        code, output = cli("distill", layout.directory, "--method", method, "--out", tmp_path / method, *more)
        assert code == 0, output
        report = json.loads((tmp_path / method / "report.json").read_text())
        table = pq.read_table(tmp_path / method / "train.parquet")
        assert table.schema.equals(DISTILLED) and len(table) == report["rows"]["after"] and rows in (None, len(table))
        assert f"{method}: 240 samples -> {len(table)} rows" in output and "Pearson" in output and "Spearman" in output
        assert "of 40 prompts kept" in output and "helpful=1,harmless=0.2" in output
        assert (tmp_path / method / "scores.png").read_bytes().startswith(b"\x89PNG")
    code, output = cli("distill", layout.directory, "--method", "mocc", "--out", tmp_path / "x")
    assert code == 2 and "'vanilla', 'oversampling' or 'moec'" in output


def test_inspection_of_a_whole_directory(generated):
    layout, config = generated
    code, output = cli("inspect", layout.directory)
    assert code == 0 and "every shard that is there is sound" in output
    assert "samples                      40 of 40 shards, 240 rows, whole" in output
    assert output.count("--- prompt") == 5 and output.count("user: How do I bake") == 5 and output.count("answer: ") == 5
    counted = output[output.index("classes by optimisation") :].splitlines()[0]
    high = [column(layout, OPTIMISATION, a) >= 0.5 for a in ("helpful", "harmless")]
    assert f"helpful=1,harmless=0.2 {int((high[0] & ~high[1]).sum())}" in counted
    for a in ("helpful", "harmless"):
        spread, whole = apart(layout, OPTIMISATION, a).std(), column(layout, OPTIMISATION, a).std()
        assert f"differ by {spread:.3f} in optimisation.{a} (standard deviation; {whole:.3f} over all)" in output
    assert "agree on these" not in output  # there is one set of scores


def test_two_sets_are_compared_from_the_mean():
    prompts, one = ["a", "a", "b", "b", "b", "c", "d", "d"], np.array([0.1, 0.3, 0.9, 0.5, np.nan, 0.7, np.nan, 0.2])
    expected = [-0.1, 0.1, 0.2, -0.2, np.nan, np.nan, np.nan, np.nan]
    assert np.allclose(from_the_mean(prompts, one), expected, equal_nan=True)


def test_inspection_finds_what_is_wrong(copy):
    samples, helpful = copy.samples(), copy.scores(OPTIMISATION, "helpful")
    (copy.directory / "samples" / "manifest.json").unlink()
    samples.path(39).with_suffix(".json").unlink()
    code, output = cli("inspect", copy.directory, "--examples", 2)
    assert code == 0 and "39 of 40 shards, 234 rows, unfinished" in output and "not made yet: shards 39" in output
    helpful.path(3).unlink()
    code, output = cli("inspect", copy.directory)
    assert code == 1 and "gone although the manifest lists them: shards 3:" in output
    data = bytearray(samples.path(5).read_bytes())
    data[100] ^= 1
    samples.path(5).write_bytes(data)
    code, output = cli("inspect", copy.directory)
    assert code == 1 and "000005.parquet is not the file that was committed" in output
    shutil.copy(samples.path(8), samples.path(9))
    shutil.copy(samples.path(8).with_suffix(".json"), samples.path(9).with_suffix(".json"))
    code, output = cli("inspect", copy.directory)
    assert code == 1 and "6 samples stand more than once" in output
    assert "scores of other samples than those that are there: shards 9" in output


def test_a_service_scores_the_answers_and_one_that_breaks_off_is_not_asked_twice(copy, ray_cluster):
    requests, answered, twice = [], set(), []

    def answer(body, _):
        asked = {(one["messages"][-1]["content"], one["answer"]) for one in body["conversations"]}
        if "Another answer." not in {text for _, text in asked}:  # those on which it is tried
            requests.append(len(body["conversations"]))
            twice.extend(asked & answered)
            if len(requests) < 12:  # one worker asks for one shard after the other, so these are known when the next is asked for
                answered.update(asked)
            if len(requests) == 12:
                return 400, {}, b"closed for today"
        return 200, {}, {"scores": [len(one["answer"]) % 8 / 8 for one in body["conversations"]]}

    service = Listening(answer)
    try:
        given = ["--set", f"reward.helpful.http={service.url}", "--set", "name=service"]
        code, output = cli("score", copy.directory, *given)
        assert code == 2 and f"{service.url} answers 400 Bad Request: closed for today" in output
        code, output = cli("score", copy.directory, *given)
        assert code == 0 and "score 40/40" in output and not twice and len(answered) > 40
        code, output = cli("score", copy.directory, "--set", f"reward.helpful.http.url={service.url}", "--set", "name=service",
                           "--set", "reward.helpful.http.version=2")  # fmt: skip
        assert code == 2 and "reward.sha256" in output
    finally:
        service.close()
    answers = [text for i in range(40) for text in copy.samples().read(i)["response"].to_pylist()]
    assert column(copy, "service", "helpful").tolist() == [len(text) % 8 / 8 for text in answers]
    assert column(copy, "service", "helpful", "raw").tolist() == column(copy, "service", "helpful").tolist()
