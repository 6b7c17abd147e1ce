"""Asking a grid of prompts and controls, for an evaluation, a bench or a look at a run in training.

Each shard is one engine call of fixed content, and reward models score it while later ones are drawn. With k samples a cell (reranking)
the first set of reward models chooses which is kept; only that one is shown to the held-out set. An answer without a score is null there.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from actors.crew import Crew
from actors.placement import ClusterConfig
from actors.reward import Reward, RewardConfig, RewardModels
from actors.rollout import Rollout, RolloutConfig
from ctrlrl.attributes import HIGH, LOW, PAPER, Attributes, AttributesSection
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section, dump
from ctrlrl.data.atomic import write_atomically, write_json, write_text
from ctrlrl.data.rejects import Reject, write_rejects
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt, PromptSet
from ctrlrl.errors import DataError
from ctrlrl.evaluation.baselines import nearest
from ctrlrl.evaluation.files import COST, RECIPE, TABLE
from ctrlrl.evaluation.grid import Cell, make_table, score_columns
from ctrlrl.evaluation.refusals import JUDGED
from ctrlrl.evaluation.results import MeasureConfig
from ctrlrl.models.exporting import check_attributes
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import Request, SamplingConfig, prompt_room
from ctrlrl.models.unscored import check_unscored, shown
from ctrlrl.runs import output_directory
from ctrlrl.seeds import derive_seed
from jobs.parts.flow import Script, all_of
from jobs.parts.reading import askable
from jobs.parts.road import Road, drawn, drawn_from, spoken

_REFUSALS = "refusal_judge"


class JudgeSets(Section):
    """The reward models that training optimised, and others that took part in nothing else."""

    optimisation: RewardModels | None = None
    held_out: RewardModels | None = None

    @property
    def given(self) -> dict[str, RewardModels]:
        """The sets that are there."""
        return {judge: models for judge, models in self if models is not None}


class AskedRecipe(Section):
    """What every recipe has by which a model is asked under controls and judged. name: what tables call it, by default its folder."""

    name: str = ""
    seed: int = 0
    model: str
    chat: ChatVariables = {}
    samples: int = Field(3, gt=1)
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    levels: tuple[float, ...] = Field((LOW, HIGH), min_length=1)
    attributes: AttributesSection = PAPER
    measure: MeasureConfig = MeasureConfig()
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def answers(self) -> int:
        """How many are drawn for each cell."""
        return self.samples if self.method == "reranking" else 1

    @property
    def workers(self) -> dict[str, RewardConfig]:
        """The reward models of `judges`, and the judge of refusals, by the names of their workers."""
        workers = {worker_name(judge, a): reward for judge, models in self.judges.given.items() for a, reward in models.items()}
        return workers | ({_REFUSALS: self.refusal_judge} if self.refusal_judge else {})

    def check(self) -> None:
        """ModelError or DataError if one of the models cannot do what it is to do."""
        check_policy(self.model)
        check_attributes(self.model, self.attributes)
        for reward in self.workers.values():
            reward.check()

    def made_from(self, keys: Collection[str]) -> dict:
        """What of the recipe the answers and their scores depend on, and `keys` of it: the beginning of a fingerprint."""
        judges = {judge: {a: reward.fingerprint() for a, reward in models.items()} for judge, models in self.judges.given.items()}
        own = {"samples": self.answers, "chunk": self.rollout.chunk, "model": model_fingerprint(self.model), "judges": judges}
        return drawn_from(self, ("method", "attributes", *keys)) | own


def worker_name(judge: str, attribute: str) -> str:
    """The name of a reward model's workers in a crew, as messages and placements show it."""
    return f"judges.{judge}.{attribute}"


class Asking:
    """The cells of a grid, which `add` fills, and how a shard of them is answered and judged.

    judges: the attributes of each set of reward models. readers: the models that are to read the prompts. samples: k of reranking, else
    1. refusals: whether a judge of refusals sees the answers that are kept. rejects: what was set aside, if `skip`. columns: what the
    table has besides, a value for each cell. section: that of the recipe whose engine must have room for the prompts.
    """

    def __init__(
        self,
        model: str,
        chat: ChatVariables,
        rollout: RolloutConfig,
        sampling: SamplingConfig,
        seed: int,
        *,
        judges: Mapping[str, Collection[str]],
        readers: Iterable[str],
        attributes: Attributes,
        skip: bool,
        samples: int = 1,
        refusals: bool = False,
        section: str = "rollout",
    ):
        self.cells: list[Cell] = []
        self.rejects: list[Reject] = []
        self.columns: dict[str, list] = {}
        self._rendered: list[tuple[int, ...]] = []
        self._tokenizer = with_variables(load_tokenizer(model), chat)
        self._room = prompt_room(model, rollout.engine, sampling, section)
        self._sampling, self._seed, self._judges, self._readers = sampling, seed, judges, list(readers)
        self._attributes, self._skip, self._samples, self._refusals = attributes, skip, samples, refusals
        self._size = max(1, rollout.chunk // samples)

    @classmethod
    def of(cls, config: AskedRecipe) -> "Asking":
        """The empty grid of a recipe."""
        models = [reward.model for reward in config.workers.values()]
        return cls(
            config.model, config.chat, config.rollout, config.sampling, config.seed, judges=config.judges.given, readers=models,
            attributes=config.attributes, skip=config.skip_bad_rows, samples=config.answers, refusals=config.refusal_judge is not None,
        )  # fmt: skip

    def add(self, read: PromptSet, cells_of: Callable[[Prompt], list[Cell]]) -> list[Prompt]:
        """Have the prompts asked in their cells; returns them without those that cannot be. DataError if there are such, unless `skip`."""
        forms = lambda prompt: [cell.asked for cell in cells_of(prompt)]  # noqa: E731
        prompts, rendered, aside = askable(self._tokenizer, read, self._room, self._skip, forms, self._readers, self._attributes)
        self.rejects += [*read.report.rejects, *aside]
        for prompt, ids in zip(prompts, rendered, strict=True):
            self.cells += [replace(cell, index=len(self.cells) + i) for i, cell in enumerate(cells_of(prompt))]
            self._rendered += map(tuple, ids)
        return prompts

    @property
    def shards(self) -> int:
        """How many there are in the end."""
        return -(-len(self.cells) // self._size)

    def shard(self, rollout: Rollout, rewards: Mapping[str, Reward], shard: int) -> Script:
        """In a script: the table of a shard's answers, one row a sample, and the completions. rewards: by the names of their workers."""
        rows = range(shard * self._size, min((shard + 1) * self._size, len(self.cells)))
        draws = [(self.cells[row], sample, self._rendered[row]) for row in rows for sample in range(self._samples)]
        seeds = [derive_seed(self._seed, "evaluate", cell.index, *([sample] if sample else [])) for cell, sample, _ in draws]
        requests = [Request(ids, seed) for (_, _, ids), seed in zip(draws, seeds, strict=True)]
        completions = yield from drawn(rollout, requests, self._sampling)
        cells, texts = [cell for cell, _, _ in draws], spoken(self._tokenizer, completions)
        kept, found, sets = np.ones(len(cells), bool), {}, list(self._judges)
        if self._samples > 1:
            first, *sets = sets
            found |= yield from self._judged(rewards, self._names([first]), cells, texts, kept)
            kept = self._nearest(cells, [found[name] for name in self._names([first])])
        last = [*self._names(sets), *([_REFUSALS] if self._refusals else [])]
        found |= yield from self._judged(rewards, last, cells, texts, kept)
        if self._refusals and (unjudged := np.flatnonzero(np.isnan(found[_REFUSALS]) & kept)).size:
            first = shown((cells[unjudged[0]].prompt.messages, texts[unjudged[0]]))
            raise DataError(f"the judge of refusals has no score for {unjudged.size} answers, the first is {first}: whether they refuse is "
                            "not guessed")  # fmt: skip
        scores = {judge: {a: found[worker_name(judge, a)] for a in names} for judge, names in self._judges.items()}
        table = make_table(cells, texts, [len(ids) for ids in completions.response_ids], completions.finished, scores)
        for name in [column for judge in scores for column in score_columns(judge, self._attributes)]:  # what was not judged has no score
            table = table.set_column(table.column_names.index(name), name, pa.array(table[name].to_numpy(), from_pandas=True))
        if self._refusals:
            table = table.append_column(JUDGED, pa.array(found[_REFUSALS], from_pandas=True))
        table = table.append_column("sample", pa.array([sample for _, sample, _ in draws], pa.int8()))
        return table.append_column("kept", pa.array(kept)), completions

    def _names(self, sets: Sequence[str]) -> list[str]:
        """The workers of these sets of reward models."""
        return [worker_name(judge, a) for judge in sets for a in self._attributes.names]

    def _judged(
        self, rewards: Mapping[str, Reward], names: Sequence[str], cells: Sequence[Cell], texts: Sequence[str], kept: np.ndarray
    ) -> Script:
        """In a script: what each of the workers `names` gives the answers that are kept to the plain prompts; NaN for the others, and for
        what a service or a judge did not score."""
        rows = np.flatnonzero(kept)
        conversations = [(cells[row].prompt.messages, texts[row]) for row in rows]
        raw = yield from all_of({name: rewards[name].raw(conversations) for name in names})
        found = {name: np.full(len(cells), np.nan) for name in names}
        for name in names:
            found[name][rows] = rewards[name].calibration(raw[name])
        return found

    def _nearest(self, cells: Sequence[Cell], scores: Sequence[np.ndarray]) -> np.ndarray:
        """Which rows are kept: of the k samples of each cell the one nearest to its control."""
        asked = np.array([cell.control.levels for cell in cells[:: self._samples]])
        best = nearest(np.stack(scores, axis=1).reshape(-1, self._samples, len(scores)), asked)
        return (np.arange(self._samples) == best[:, None]).ravel()


def ask(config: AskedRecipe, asking: Asking, job: str, origin: dict, summary: str, crew: Crew | None) -> tuple[int, pa.Table | None]:
    """Have the answers made that are missing, by `crew` or by one that is started for it; the exit code, and, if it is 0, the table of the
    answers that are kept, in the order of the grid. It is written beside what they cost, the recipe and what was set aside.

    origin: the fingerprint of the answers. summary: the file of the figures, which goes while answers are made anew.
    """
    out, store = output_directory(config.out), ShardStore(output_directory(config.out) / "answers")
    with Road(job, {store: origin}, asking.shards, summary=out / summary) as road:

        def script(crew: Crew, shard: int) -> Script:
            table, completions = yield from asking.shard(crew.rollout, crew.rewards, shard)
            made = store.commit(shard, table, road.facts([completions]) | {"answers": len(table)})
            return made.rows, made.facts["tokens"]

        if code := road.travel(script, config.cluster, config.workers, config.rollout, config.model, crew):
            return code, None
        facts = [store.record(index).facts for index in range(asking.shards)]
        cost = {name: sum(fact[name] for fact in facts) for name in ("answers", "tokens", "start_s", "wall_s", "engine_s")}
        store.finish(cost)
        rows = pa.concat_tables([store.read(index) for index in range(asking.shards)])
    table = rows.filter(rows["kept"]).drop_columns(["sample", "kept"])
    check_scores(config, table, store)
    for name, values in asking.columns.items():
        table = table.append_column(name, pa.array(values))
    write_rejects(out, asking.rejects)
    write_text(out / RECIPE, dump(config) + "\n")
    write_atomically(out / TABLE, lambda file: pq.write_table(table, file))
    write_json(out / COST, cost)
    return 0, table


def check_scores(config: AskedRecipe, table: pa.Table, store: ShardStore) -> None:
    """DataError if too many of the answers that are kept lack a score."""
    for judge, models in config.judges.given.items():
        for attribute, reward in models.items():
            unscored, limit = table[f"{judge}.{attribute}"].null_count, reward.service.unscored if reward.service else 0
            remedy = f"raise it and run the same command again, or remove {store.directory} to have all asked anew"
            check_unscored(f"judges.{judge}.{attribute}", unscored, len(table), limit, remedy)
