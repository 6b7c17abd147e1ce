"""Asking the grid of an evaluation: shards of answers from the rollout pool, scored by all reward models while later ones are drawn.

Each shard is one engine call of fixed content and is committed once (ctrlrl.data.shards): what a killed run leaves, the next one continues.
With k samples a cell (reranking) the first set of reward models chooses which is kept; only that one is shown to the held-out set.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from actors.crew import Crew
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.shards import ShardStore
from ctrlrl.errors import DataError
from ctrlrl.evaluation.baselines import nearest
from ctrlrl.evaluation.grid import JUDGES, Cell, make_table, score_columns
from ctrlrl.evaluation.refusals import JUDGED
from ctrlrl.models.sampler import Completions, Request, SamplingConfig
from ctrlrl.prompts import Messages, render
from ctrlrl.seeds import derive_seed
from jobs.parts.flow import Flow
from jobs.parts.launch import StopRequest
from jobs.parts.progress import Pace, Steps

Calibrations = Mapping[str, Mapping[str, Calibration]]  # set of reward models -> attribute
REFUSAL_WORKER = "refusal_judge"


def worker_name(judge: str, attribute: str) -> str:
    """The name of a reward model's workers in a crew, as messages and placements show it."""
    return f"judges.{judge}.{attribute}"


def render_cells(cells: Sequence[Cell], tokenizer, room: int) -> list[tuple[int, ...]]:
    """Token ids of every cell's prompt; DataError names the first that exceeds `room` tokens."""
    rendered = [tuple(render(tokenizer, *cell.asked, source=cell.prompt.source, attributes=cell.control.attributes)) for cell in cells]
    long = [cell for cell, ids in zip(cells, rendered, strict=True) if len(ids) > room]
    if long:
        first = f"{len(long)} of {len(cells)} prompts with their controls, the first at {long[0].prompt.source}, exceed {room} tokens"
        raise DataError(f"{first}: raise rollout.engine.max_model_tokens, lower sampling.max_new_tokens, or change the prompts")
    return rendered


def draw_seed(seed: int, cell: Cell, sample: int = 0) -> int:
    """The seed of a cell's response; samples beyond the first have their own."""
    return derive_seed(seed, "evaluate", cell.index, *([sample] if sample else []))


def spoken(tokenizer, completions: Completions) -> list[str]:
    """The responses as text, as the reward models see them."""
    return [text.strip() for text in tokenizer.batch_decode(completions.response_ids, skip_special_tokens=True)]


@dataclass
class Answers:
    """The answers of a shard on their way: one row a sample, of which the `kept` ones are judged further."""

    shard: int
    cells: list[Cell]
    texts: list[str]
    completions: Completions
    kept: np.ndarray
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    refusals: np.ndarray | None = None
    waiting: int = 0

    def conversations(self) -> tuple[np.ndarray, list[tuple[Messages, str]]]:
        """The rows that are kept, and what a judge sees of them: the plain prompt and the answer."""
        rows = np.flatnonzero(self.kept)
        return rows, [(self.cells[row].prompt.messages, self.texts[row]) for row in rows]

    @property
    def tokens(self) -> list[int]:
        """Length of each response."""
        return [len(ids) for ids in self.completions.response_ids]


class Asking:
    """The answers of one evaluation: its store, and the work still to be done.

    samples: k of reranking, else 1. chunk: requests of a shard. room: tokens that a prompt may have. refusals: the calibration of a judge
    of refusals, to whom all answers are shown that are kept. job: what progress calls it.
    """

    def __init__(
        self,
        store: ShardStore,
        cells: Sequence[Cell],
        tokenizer,
        calibrations: Calibrations,
        *,
        samples: int,
        chunk: int,
        room: int,
        seed: int,
        refusals: Calibration | None = None,
        job: str = "evaluate",
    ):
        self._job = job
        self._refusals = refusals
        self._store, self._cells, self._tokenizer, self._calibrations = store, cells, tokenizer, calibrations
        self._rendered = render_cells(cells, tokenizer, room)
        self._samples, self._size, self._seed = samples, max(1, chunk // samples), seed
        self._pace, self._start_s, self._committed = Pace(), 0.0, time.monotonic()

    @property
    def shards(self) -> int:
        """How many there are in the end."""
        return -(-len(self._cells) // self._size)

    def run(self, crew: Crew, sampling: SamplingConfig, at_once: int, start_s: float) -> int:
        """Make the missing shards, until all are there or a signal asks to stop; returns the exit code.

        at_once: shards under way. start_s: what the crew's start took, for the costs.
        """
        todo = self._store.missing()
        with StopRequest("the running shards") as stop, Steps(self._job, self.shards, self.shards - len(todo)) as progress:
            flow = Flow()
            self._pace.start()
            self._committed, self._start_s, self._progress = time.monotonic(), start_s, progress
            return 0 if flow.run(todo, partial(self._begin, flow, crew, sampling), at_once, stop) else stop.exit_code

    def finish(self) -> tuple[pa.Table, dict[str, float]]:
        """The table of all kept answers, in the order of the grid, and what they cost."""
        facts = [self._store.record(index).facts for index in range(self.shards)]
        cost = {name: sum(fact[name] for fact in facts) for name in ("answers", "tokens", "start_s", "wall_s", "engine_s")}
        self._store.finish(cost)
        rows = pa.concat_tables([self._store.read(index) for index in range(self.shards)])
        return rows.filter(rows["kept"]).drop_columns(["sample", "kept"]), cost

    def _begin(self, flow: Flow, crew: Crew, sampling: SamplingConfig, shard: int) -> None:
        rows = range(shard * self._size, min((shard + 1) * self._size, len(self._cells)))
        draws = [(row, sample) for row in rows for sample in range(self._samples)]
        requests = [Request(self._rendered[row], draw_seed(self._seed, self._cells[row], sample)) for row, sample in draws]
        cells = [self._cells[row] for row, _ in draws]
        flow.after(crew.rollout.generate_apart(requests, sampling), partial(self._answered, flow, crew, shard, cells))

    def _answered(self, flow: Flow, crew: Crew, shard: int, cells: list[Cell], completions: Completions) -> None:
        texts = spoken(self._tokenizer, completions)
        answers = Answers(shard, cells, texts, completions, np.ones(len(cells), bool))
        if self._calibrations:
            self._judge(flow, crew, answers, list(self._calibrations) if self._samples == 1 else [JUDGES[0]])
        else:
            self._judge_refusals(flow, crew, answers)

    def _judge(self, flow: Flow, crew: Crew, answers: Answers, judges: list[str]) -> None:
        """Have the kept answers scored by the sets `judges`."""
        rows, conversations = answers.conversations()
        answers.waiting = sum(len(self._calibrations[judge]) for judge in judges)
        for judge in judges:
            answers.scores[judge] = {a: np.full(len(answers.cells), np.nan) for a in self._calibrations[judge]}
            for a in self._calibrations[judge]:
                call = crew.rewards[worker_name(judge, a)].raw(conversations)
                flow.after(call, partial(self._judged, flow, crew, answers, judge, a, rows))

    def _judged(self, flow: Flow, crew: Crew, answers: Answers, judge: str, attribute: str, rows: np.ndarray, raw: np.ndarray) -> None:
        answers.scores[judge][attribute][rows] = self._calibrations[judge][attribute](raw)
        answers.waiting -= 1
        if answers.waiting:
            return
        left = [name for name in self._calibrations if name not in answers.scores]
        if self._samples > 1 and len(answers.scores) == 1:
            answers.kept = self._nearest(answers)
        if left:
            self._judge(flow, crew, answers, left)
        else:
            self._judge_refusals(flow, crew, answers)

    def _judge_refusals(self, flow: Flow, crew: Crew, answers: Answers) -> None:
        """Have the judge of refusals, if there is one, see the kept answers; then they are done."""
        if self._refusals:
            rows, conversations = answers.conversations()
            flow.after(crew.rewards[REFUSAL_WORKER].raw(conversations), partial(self._told, flow, answers, rows))
        else:
            self._commit(flow, answers)

    def _told(self, flow: Flow, answers: Answers, rows: np.ndarray, raw: np.ndarray) -> None:
        answers.refusals = np.full(len(answers.cells), np.nan)
        answers.refusals[rows] = self._refusals(raw)
        self._commit(flow, answers)

    def _nearest(self, answers: Answers) -> np.ndarray:
        """Which rows are kept: of the k samples of each cell the one nearest to its control."""
        names = answers.cells[0].control.attributes.names
        scores = np.stack([answers.scores[JUDGES[0]][a] for a in names], axis=1).reshape(-1, self._samples, len(names))
        best = nearest(scores, np.array([cell.control.levels for cell in answers.cells[:: self._samples]]))
        return (np.arange(self._samples) == best[:, None]).ravel()

    def _commit(self, flow: Flow, answers: Answers) -> None:
        table = make_table(answers.cells, answers.texts, answers.tokens, answers.completions.finished, answers.scores)
        attributes = answers.cells[0].control.attributes
        for name in [column for judge in answers.scores for column in score_columns(judge, attributes)]:  # what was not judged has no score
            table = table.set_column(table.column_names.index(name), name, pa.array(table[name].to_numpy(), from_pandas=True))
        if answers.refusals is not None:
            table = table.append_column(JUDGED, pa.array(answers.refusals, from_pandas=True))
        table = table.append_column("sample", pa.array(np.tile(np.arange(self._samples, dtype=np.int8), len(table) // self._samples)))
        now, tokens = time.monotonic(), sum(answers.tokens)
        facts = {"answers": len(table), "tokens": tokens, "engine_s": answers.completions.seconds, "start_s": self._start_s}
        facts["wall_s"] = now - self._committed  # since the run's last commit, so that the sum over shards is the time of all runs
        self._committed, self._start_s = now, 0.0
        self._store.commit(answers.shard, table.append_column("kept", pa.array(answers.kept)), facts)
        self._progress.advance(self._pace.figures(len(table), tokens))
