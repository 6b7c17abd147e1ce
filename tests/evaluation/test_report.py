"""The report shows the figures of the JSON files, marks the best, names what is missing, and needs nothing from outside."""

import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.control import ATTRIBUTES, CORNERS, grid
from ctrlrl.errors import DataError
from ctrlrl.evaluation.exhibits import collect, default_name
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.evaluation.report import duration, missing, tint, write_report

ORDER = [(attribute, metric) for attribute in ("harmless", "helpful") for metric in METRICS]


class Tables(HTMLParser):
    """Cells of every table that bears a data-table: [(table's attributes, row's attributes, [(cell's attributes, text)])].

    A cell's small print is its attribute "small".
    """

    def __init__(self):
        super().__init__()
        self.rows, self._table, self._cell = [], None, None
        self.sources = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "table":
            self._table = attrs
        elif tag == "tr":
            self.rows.append((self._table, attrs, []))
        elif tag in ("td", "th"):
            self._cell = [attrs, "", False]
        elif tag == "small" and self._cell:
            self._cell[2] = True

    def handle_data(self, data):
        if self._cell and self._cell[2]:
            self._cell[0]["small"] = data
        elif self._cell:
            self._cell[1] += data

    def handle_endtag(self, tag):
        if tag == "small" and self._cell:
            self._cell[2] = False
        if tag in ("td", "th") and self._cell:
            self.rows[-1][2].append((self._cell[0], self._cell[1].strip()))
            self._cell = None

    def named(self, table: str, **attributes):
        return [
            (row, cells)
            for kind, row, cells in self.rows
            if kind.get("data-table") == table and all((kind | row).get(f"data-{name}") == value for name, value in attributes.items())
        ]


def make_runs(root, write_evaluation):
    """Three evaluations (one without held-out judges), a PPO and a fine-tuning run, a distillation, a study; and their JSON."""
    found = {}
    found["ppo"] = write_evaluation(root / "ppo", seed=1)[0]
    found["prompting"] = write_evaluation(root / "prompting", method="prompting", seed=2)[0]
    found["cst"] = write_evaluation(root / "cst", method="system", judges=("optimisation",), seed=3)[0]
    steps = [{"step": i, "reward/mean": i / 4, "kl/k1": 0.1, "seconds/step": 2.0, "seconds/generate": 1.5, "seconds/train": 0.5,
              "tokens_per_s/step": 50.0} for i in range(4)]  # fmt: skip
    (root / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps) + '{"step": 4, "rew')
    (root / "exmate").mkdir()
    losses = [{"step": 0, "validation/loss": 2.0, "train/loss": 2.5, "seconds/step": 1.0, "seconds/train": 1.0, "data/tokens": 300}]
    (root / "exmate" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    (root / "moec").mkdir()
    (root / "moec" / "train.parquet").write_bytes(b"")
    classes = {"before": dict(zip((c.name for c in CORNERS), (90, 5, 1, 4), strict=True)), "after": {c.name: 25 for c in CORNERS}}
    report = {"method": "moec", "rows": {"before": 100, "after": 100}, "prompts": {"before": 50, "after": 20}, "classes": classes}
    (root / "moec" / "report.json").write_text(json.dumps(report | {"entanglement": {"pearson": 0.5, "spearman": 0.4}}))
    (root / "critiques" / "critiques").mkdir(parents=True)
    (root / "critiques" / "manifest.json").write_text(json.dumps({"wall_s": 5.0, "counts": {"pairs": 7, "tokens": 90}}))
    study = root / "combine"
    found["min"] = write_evaluation(study / "min", seed=4)[0]
    rows = [{"name": "R_min", "run": "min"}, {"name": "R_ppo", "run": "../ppo"}, {"name": "R_mean", "run": "mean"}]
    (study / "study.json").write_text(json.dumps({"title": "Reward combination", "note": "Same steps.", "rows": rows}))
    return root, found


@pytest.fixture
def runs(tmp_path, write_evaluation):
    """Runs that a test may change."""
    return make_runs(tmp_path / "runs", write_evaluation)


@pytest.fixture(scope="module")
def written(tmp_path_factory, write_evaluation):
    """The report on such runs: its tables, HTML, Markdown, the JSON of the runs, and their directory."""
    out = tmp_path_factory.mktemp("report")
    root, found = make_runs(out / "runs", write_evaluation)
    html, markdown = write_report(collect([str(root)]), out)
    tables = Tables()
    tables.feed(html.read_text())
    return tables, html.read_text(), markdown.read_text(), found, root


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def interval(figure):
    return None if figure["low"] is None else f"{figure['low']:.2f} to {figure['high']:.2f}"


def test_every_figure_of_the_comparison_is_that_of_the_json(written):
    tables, _, markdown, found, _ = written
    for judge, names in (("optimisation", ("cst", "ppo", "prompting")), ("held_out", ("ppo", "prompting"))):
        for name in names:
            ((_, cells),) = tables.named("comparison", judge=judge, run=name)
            # System prompts do not ask for helpfulness: its figures would say nothing of control.
            asked = [a for a in ATTRIBUTES if name != "cst" or a == "harmless"]
            expected = [shown(found[name][judge][a][m]["value"] if a in asked else None) for a, m in ORDER]
            assert [text for _, text in cells[1:]] == expected
            assert [(c["data-attribute"], c["data-metric"]) for c, _ in cells[1:]] == ORDER
            intervals = [interval(found[name][judge][a][m]) if a in asked else None for a, m in ORDER]
            assert [c.get("small") for c, _ in cells[1:]] == intervals and any(intervals)
            section = markdown.split("## Optimisation")[1].split("## Held-out")[judge == "held_out"]
            line = next(line for line in section.splitlines() if line.startswith(f"| {name}"))
            assert [cell.strip().strip("*") for cell in line.split("|")[2:-1]] == expected
    ((_, cells),) = tables.named("comparison", judge="held_out", run="cst")
    assert cells[1][1] == "not judged by this set"
    ((_, cells),) = tables.named("gap", run="ppo")
    assert (
        cells[1][1]
        == f"{found['ppo']['optimisation']['harmless']['mP']['value'] - found['ppo']['held_out']['harmless']['mP']['value']:.3f}"
    )


def test_the_best_of_each_column_is_marked_the_smallest_for_err(written):
    tables, _, markdown, found, _ = written
    rows = [tables.named("comparison", judge="optimisation", run=name)[0][1] for name in ("ppo", "prompting", "cst")]
    for index, (attribute, metric) in enumerate(ORDER, 1):
        values = [found[name]["optimisation"][attribute][metric]["value"] for name in ("ppo", "prompting", "cst")]
        values[2] = None  # cst is asked for safety alone, under two prompts: an easier task
        known = [value for value in values if value is not None]
        best = min(known) if metric == "Err" else max(known)
        assert ["best" in row[index][0]["class"].split() for row in rows] == [v is not None and f"{v:.3f}" == f"{best:.3f}" for v in values]
        assert f"**{best:.3f}**" in markdown
    assert not any("best" in cell.get("class", "") for _, row in tables.named("gap") for cell, _ in row)


def test_matched_control_system_shares_and_data_are_those_of_the_json(written):
    tables, html, _, _, root = written
    details = json.loads((root / "ppo" / "details.json").read_text())
    matched = details["judges"]["held_out"]["matched"]["MP"]
    rows = tables.named("matched", run="ppo", judge="held_out")[1:]
    expected = [[f"{matched[scored][asked]:.3f}" for asked in ("harmless", "helpful")] for scored in ("harmless", "helpful")]
    assert [[text for _, text in cells[1:]] for _, cells in rows] == expected
    shares = json.loads((root / "cst" / "details.json").read_text())["judges"]["optimisation"]["system"]
    ((_, cells),) = tables.named("system", run="cst")
    assert [cell["small"] for cell, _ in cells[2:]] == [interval(shares[s]) for s in ("S0", "S1")]
    judged = details["judges"]["held_out"]
    ((_, row),) = tables.named("ties", run="ppo", judge="held_out")
    assert [text for _, text in row[2:]] == [f"{100 * judged[a][x]:.1f} %" for a in ("harmless", "helpful") for x in ("constant", "ties")]
    ((_, row),) = tables.named("ties", run="cst")
    assert [text for _, text in row[4:]] == ["–", "–"]
    assert [text for _, text in cells[2:]] == [f"{shares[s]['value']:.3f}" for s in ("S0", "S1")]
    assert [text for _, text in tables.named("classes")[1][1]] == ["moec", "moec", "100", "100", "20 of 50", "0.500", "0.400"]
    assert "best of 4 templates" in html and html.count("<small>counts</small>") == 2


def test_costs_are_summed_and_split_by_phase(written):
    tables = written[0]
    rows = {(cells[0][1], cells[1][1]): [text for _, text in cells[2:]] for _, cells in tables.named("cost")[1:]}
    assert rows["ppo", "training"] == ["4 steps", "8 s", "400", "50", "generate 75 %, train 25 %"]
    assert rows["exmate", "training"] == ["1 steps", "1 s", "300", "300", "train 100 %"]
    assert rows["Reward combination: R_min", "evaluation"][0] == "24 answers"
    assert not [name for name, _ in rows if "R_ppo" in name]  # it is the evaluation ppo
    assert "4 evaluated methods" in written[1]
    assert rows["critiques", "self-critique"] == ["7 pairs", "5 s", "90", "18", "–"]
    assert rows["ppo", "evaluation"] == ["24 answers", "40 s", "1,000", "25", "answering and scoring 75 %, starting workers 25 %"]


def test_a_study_is_one_table_and_stays_out_of_the_comparison(written):
    tables, html, markdown, found, _ = written
    rows = {row["data-run"]: [text for _, text in cells[1:]] for row, cells in tables.named("study", judge="held_out") if "data-run" in row}
    assert list(rows) == ["R_min", "R_ppo", "R_mean"] and rows["R_mean"] == ["not judged by this set"]
    assert rows["R_min"] == [shown(found["min"]["held_out"][a][m]["value"]) for a, m in ORDER]
    assert not tables.named("comparison", run="min") and "Same steps." in html and "## Reward combination" in markdown
    assert "study “Reward combination”: R_mean is not evaluated yet" in markdown


def test_a_study_alone_is_a_report(runs, tmp_path):
    found = collect([str(runs[0] / "combine")])
    html, markdown = (path.read_text() for path in write_report(found, tmp_path))
    assert "2 evaluated methods" in html and "| Reward combination: R_ppo | evaluation | 24 answers | 40 s |" in markdown
    assert missing(found) == ["study “Reward combination”: R_mean is not evaluated yet"]


def test_what_is_missing_is_said(runs, tmp_path, write_evaluation):
    root, _ = runs
    for name in ("details.json", "cost.json", "table.parquet"):
        (root / "ppo" / name).unlink()
    found = collect([f"RLHF={root / 'ppo'}", str(root / "cst")])
    markdown = write_report(found, tmp_path)[1].read_text()
    said = markdown.split("## Missing")[1]
    for line in (
        "RLHF: no details.json",
        "RLHF: no cost.json",
        "RLHF: no table.parquet",
        "no distillation among",
        "cst: no held-out reward",
    ):
        assert line in said
    both = collect([str(root / "prompting"), str(root / "cst")])
    assert not [line for line in missing(both) if "same" in line]
    write_evaluation(tmp_path / "small", prompts=2)
    assert "the methods were not asked the same prompts: cst 6, small 2" in missing(collect([str(root / "cst"), str(tmp_path / "small")]))
    write_evaluation(tmp_path / "others", first=6)
    said = missing(collect([str(root / "prompting"), str(tmp_path / "others")]))
    assert "the methods were not asked the same prompts: prompting 6, others 6" in said
    assert "no prompt was answered by all of them, so no answers are shown side by side" in said
    write_evaluation(tmp_path / "fine", controls=grid((0.2, 0.6, 1.0)))
    said = missing(collect([str(root / "prompting"), str(tmp_path / "fine")]))
    assert "the methods were not asked under the same controls: prompting 4, fine 9" in said
    assert "| RLHF |" in markdown and "## Held-out reward models" in markdown


def test_the_page_is_self_contained_and_text_is_escaped(written):
    tables, html, _, _, _ = written
    assert tables.sources and all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in tables.sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", re.sub(r'src="data:[^"]*"', "", html))
    assert "&lt;b&gt;really&lt;/b&gt;" in html and "<b>really" not in html and "Answer 0 &amp; more" in html
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 3 + 6 + 2 + 1 + 1 and all('alt="' in image and 'alt=""' not in image for image in images)
    assert html.count("<blockquote>") == 3 and "not asked for" in html


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    first, second = (write_report(collect([str(runs[0])]), tmp_path)[0].read_bytes() for _ in range(2))
    assert first == second


def test_names(runs, tmp_path, write_evaluation):
    root, _ = runs
    assert [run.name for run in collect([str(root)]).evaluated] == ["cst", "ppo", "prompting"]
    assert [run.name for run in collect([f"all={root}"]).evaluated] == ["all/cst", "all/ppo", "all/prompting"]
    (root / "cst").rename(root / "lr=0.1")
    assert [run.path for run in collect([str(root / "lr=0.1"), f"slow={root / 'lr=0.1'}"]).evaluated] == [root / "lr=0.1"] * 2
    (root / "lr=0.1").rename(root / "cst")
    twice = collect([str(root / "cst"), str(root / "cst")]).evaluated
    assert [run.name for run in twice] == [str(root / "cst")] * 2
    assert default_name(tmp_path / "moec" / "evaluation") == "moec" and default_name(tmp_path / "before") == "before"


def test_the_optimisation_set_comes_first_whatever_the_file_says(runs):
    """Distributions and notes are those of the first set."""
    (run,) = collect([str(runs[0] / "ppo")]).evaluated
    assert list(run.details["judges"]) == ["held_out", "optimisation"] and list(run.judged) == ["optimisation", "held_out"]


def test_wrong_runs_are_named(runs, tmp_path):
    root, _ = runs
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="'nowhere' is no directory"):
        collect(["nowhere"])
    with pytest.raises(DataError, match="holds no evaluation, training run, distillation, bench or study"):
        collect([str(tmp_path / "empty")])
    (root / "combine" / "study.json").write_text('{"title": "x", "rows": [{"name": "a"}]}')
    with pytest.raises(DataError, match='study.json needs a "title" and "rows"'):
        collect([str(root)])
    (root / "exmate" / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2 is damaged"):
        collect([str(root / "exmate")])
    (root / "exmate" / "metrics.jsonl").write_text('{"step": 0, "train/loss": "much"}\n')
    with pytest.raises(DataError, match="metrics.jsonl:1 is no row of metrics"):
        collect([str(root / "exmate")])
    details = json.loads((root / "cst" / "details.json").read_text())
    (root / "cst" / "details.json").write_text(json.dumps({key: value for key, value in details.items() if key != "judges"}))
    with pytest.raises(DataError, match="details.json has no judges: run ctrlrl evaluate --table"):
        collect([str(root / "cst")])
    (root / "cst" / "metrics.json").write_text('{"accuracy": 0.9}')
    with pytest.raises(DataError, match="metrics.json is not of ctrlrl evaluate: it needs mP, MP, Err, BT of helpful and harmless"):
        collect([str(root / "cst")])
    (root / "cst" / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="metrics.json is damaged"):
        collect([str(root / "cst")])
    pq.write_table(pa.table({"text": ["a"]}), root / "ppo" / "table.parquet")
    with pytest.raises(DataError, match="table.parquet has no column prompt_id, helpful_request, harmless_request"):
        collect([str(root / "ppo")])
    (root / "ppo" / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="table.parquet is damaged"):
        collect([str(root / "ppo")])


def test_the_command(runs, tmp_path):
    result = CliRunner().invoke(app, ["report", str(runs[0]), "--out", str(tmp_path / "r"), "--title", "A <title>"])
    assert result.exit_code == 0 and "3 evaluations, 2 training runs, 1 generation, 1 distillation, 1 study" in result.output
    assert "<h1>A &lt;title&gt;</h1>" in (tmp_path / "r" / "report.html").read_text()
    result = CliRunner().invoke(app, ["report", "nowhere", "--out", str(tmp_path / "s")])
    assert result.exit_code == 2 and "'nowhere' is no directory" in result.output and not (tmp_path / "s").exists()


def test_durations_and_tints():
    assert [duration(s) for s in (None, 48.4, 720, 12240)] == ["–", "48 s", "12 min", "3.4 h"]
    assert tint(0) == "rgb(255, 255, 255)" and tint(1) == "rgb(102, 170, 209)" and tint(-1) == "rgb(230, 158, 102)"
