"""Which test files one process runs after another, because they share what takes long to make (a cluster and its forked workers, runs and
directories of jobs, a server, the imports of a hundred architectures), and in what order: what takes longest comes first, so that no
process waits long for the others.

Two chains have clusters, so that no more than two run at a time; a third process is busy with what needs none.
"""

from xdist.scheduler import LoadFileScheduling

CHAINS = (
    """jobs/test_ppo.py jobs/test_ppo_overlap.py jobs/test_chaos.py models/test_trainer.py jobs/test_finetune.py jobs/test_reward_model.py
    jobs/test_evaluate.py models/test_sampler.py actors/test_sync.py actors/test_placement.py
    actors/test_group.py""".split(),
    """jobs/test_autoscaling.py jobs/test_generate.py jobs/test_score.py jobs/test_study.py jobs/test_critique.py jobs/test_dpo.py
    serving/test_replicas.py jobs/test_cli.py actors/test_pool.py actors/test_nursery.py actors/test_gauges.py""".split(),
    "serving/test_chat.py serving/test_page.py serving/test_server.py".split(),
    ["jobs/test_submit.py"],
    ["serving/test_start.py", "data/test_distill.py"],  # of two files, since what follows one of a single test would be kept waiting
    "models/test_architectures.py models/test_classifiers.py".split(),
    ["models/test_families.py"],
    ["models/test_state.py"],
    ["models/test_checkpoints.py"],
)
_ORDER = {name: place for place, name in enumerate(name for chain in CHAINS for name in chain)}
_CHAIN = {name: f"chain {number}" for number, chain in enumerate(CHAINS) for name in chain}


def in_order(items: list) -> list:
    """Collected tests, file by file; of files that are not named here those come first that use a cluster."""
    clusters = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    return sorted(items, key=lambda item: (_ORDER.get(_file(item.nodeid), len(_ORDER)), item.path not in clusters))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


class ByChain(LoadFileScheduling):
    """Hands out whole chains, and whole files that are in none."""

    def _split_scope(self, nodeid: str) -> str:
        return _CHAIN.get(_file(nodeid)) or super()._split_scope(nodeid)
