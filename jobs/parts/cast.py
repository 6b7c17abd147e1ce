"""What a PPO run is made of: its recipe, its actors and their places, and what a checkpoint holds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from actors.ending import end_all
from actors.placement import ClusterConfig, Demands, Placement, connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.recovery import ready
from actors.reference import AdapterReference, Reference, ReferenceConfig
from actors.reward import Reward, RewardModels
from actors.rollout import Rollout, RolloutConfig, Sync
from actors.sync import publish
from actors.value import Value, ValueConfig, ValueHead
from ctrlrl.attributes import PAPER, AttributesSection, check_named
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section
from ctrlrl.control import corners
from ctrlrl.data.rejects import Reject, aside_line
from ctrlrl.data.sources import Prompt, read_prompts
from ctrlrl.models.exporting import check_attributes, check_export
from ctrlrl.models.layout import check_layout
from ctrlrl.models.loading import check_causal, check_policy, check_value, load_tokenizer, save_control_tokenizer
from ctrlrl.models.lora import check_adapters
from ctrlrl.models.sampler import SamplingConfig, prompt_room
from ctrlrl.models.state import damaged, read_checked, write_checked
from ctrlrl.models.vocabulary import check_same_vocabulary
from ctrlrl.ppo.experience import AlgorithmConfig, minibatch_rows
from ctrlrl.ppo.reward import AdaptiveKL
from ctrlrl.runs import Run, absolute_out
from jobs.parts import sharing
from jobs.parts.interim import InterimConfig
from jobs.parts.reading import askable

_STATE = "state.json"  # of a checkpoint: what is neither policy nor value model


class FullSampling(SamplingConfig):
    """PPO draws from the whole distribution: with top_p below 1 the samples are not quite the policy's."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class PPORecipe(Section):
    """Everything a PPO run depends on. prompts: a file, a directory or a hub data set. placement: whether each worker has devices of its
    own, or the kinds of workers take turns on the same ones."""

    out: str = "runs/ppo"
    seed: int = 0
    steps: int = Field(200, gt=0)
    prompts: str
    skip_bad_rows: bool = False
    checkpoint_every: int = Field(20, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    cluster: ClusterConfig = ClusterConfig()
    policy: PolicyConfig
    chat: ChatVariables = {}
    value: ValueConfig = ValueConfig()
    reference: ReferenceConfig = ReferenceConfig()
    attributes: AttributesSection = PAPER
    reward: RewardModels
    rollout: RolloutConfig = RolloutConfig()
    sync: Sync = "auto"
    placement: Literal["separate", "shared"] = "separate"
    sampling: FullSampling = FullSampling()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    evaluation: InterimConfig = InterimConfig()

    @model_validator(mode="after")
    def _attributes_are_scored(self):
        check_named("reward", self.reward, self.attributes)
        if not self.algorithm.controlled:
            check_named("algorithm.weights", self.algorithm.weights, self.attributes)
        return self

    @model_validator(mode="after")
    def _reference_is_there(self):
        train, reference = self.policy.train, self.reference
        if reference.adapter and (reference.model or not train.lora.rank):
            raise ValueError(
                "reference.adapter = true takes the policy without its adapter: it needs policy.train.lora.rank above 0, and no "
                "reference.model"
            )
        return self

    @model_validator(mode="after")
    def _engine_says_what_the_policy_does(self):
        if self.algorithm.old_logprobs == "engine" and self.sampling.top_p < 1:
            raise ValueError('algorithm.old_logprobs = "engine" needs sampling.top_p = 1: the engine\'s logprobs are those after top-p')
        return self

    @model_validator(mode="after")
    def _ends_of_the_way(self):
        if self.sync == "nccl" and not (self.policy.resources.gpus and self.rollout.resources.gpus):
            raise ValueError('sync = "nccl" is between GPUs: give policy.resources and rollout.resources gpus, or set sync = "auto"')
        if self.sync == "ipc" and self.placement != "shared":
            raise ValueError('sync = "ipc" is between workers that share a device: set placement = "shared", or sync = "auto"')
        return self

    @model_validator(mode="after")
    def _turns_can_be_taken(self):
        if self.placement == "shared" and (fault := sharing.why_not_shared(self)):
            raise ValueError(f'placement = "shared": {fault}')
        return self

    @field_validator("value", "reference", mode="before")
    @classmethod
    def _in_one_word(cls, given, info):
        word = {"value": "head", "reference": "adapter"}[info.field_name]
        return {word: True} if given == word else given

    @model_validator(mode="after")
    def _value_is_there(self):
        if self.value.head and (self.value.model or not self.has_value):
            raise ValueError('value.head = true is a head of the policy: leave value.model out, and set algorithm.advantage = "gae"')
        return self

    @property
    def optimiser_steps(self) -> int:
        """Those of the whole run: of the policy, and of the value model."""
        samples = self.algorithm.queries_per_step * self.algorithm.samples_per_query
        return self.steps * len(minibatch_rows(samples, 0, self.algorithm, self.seed))

    @property
    def has_value(self) -> bool:
        """Whether values are learned."""
        return self.algorithm.advantage == "gae"

    @property
    def has_value_model(self) -> bool:
        """Whether they are those of a model of their own."""
        return self.has_value and not self.value.head

    @property
    def models(self) -> dict[str, str]:
        """Name or path of every model that a run reads, by recipe key."""
        value = {"value.model": self.value.model or self.policy.model} if self.has_value_model else {}
        rewards = {f"reward.{attribute}.model": reward.model for attribute, reward in self.reward.items()}
        reference = {} if self.reference.adapter else {"reference.model": self.reference.model or self.policy.model}
        return {"policy.model": self.policy.model, **reference, **value, **rewards}


@dataclass(frozen=True)
class Cast:
    """The five kinds of actors of a run. rewards: in the order of the attributes. value: None where no values are needed (rloo, grpo)."""

    policy: Policy
    value: Value | ValueHead | None
    rollout: Rollout
    rewards: dict[str, Reward]
    reference: Reference | AdapterReference
    placement: Placement

    @property
    def groups(self) -> list[Policy | Value]:
        """The trained models: what one of them loses, all go back to the checkpoint for."""
        return [self.policy, *([self.value] if isinstance(self.value, Value) else [])]

    @property
    def pools(self) -> dict[str, Rollout | Reward | Reference]:
        """The pools by name."""
        frozen = {"reference": self.reference} if isinstance(self.reference, Reference) else {}
        return {"rollout": self.rollout, **{f"reward.{a}": reward for a, reward in self.rewards.items()}, **frozen}

    def close(self) -> None:
        """End all actors and give their places back."""
        end_all(*(handle.close for handle in (*self.groups, *self.pools.values())), self.placement.release)


def demands_of(config: PPORecipe) -> Demands:
    """The places that the actors of a run need."""
    return sharing.demands_of(sharing.kinds_of(config), config.placement == "shared")


def start_cast(config: PPORecipe) -> Cast:
    """Reserve the places of all actors, start them at the same time (one kind after the other, where they share devices), and return when
    all are ready."""
    demands, kinds, shared = demands_of(config), sharing.kinds_of(config), config.placement == "shared"
    connect(config.cluster, {**demands, "spare": config.rollout.spare})
    place, cluster, model, turns = reserve(demands, config.cluster), config.cluster, config.policy.model, sharing.Sharing(kinds, shared)
    if shared:
        place, config = sharing.placed(place, kinds), sharing.with_shares(config, kinds)
    policy, value = (group.scheduled(config.optimiser_steps) for group in (config.policy, config.value))
    started = []  # to be ended if the next one cannot be started

    def start(name: str, make: Callable):
        turn = turns.turn(name)
        with turn():
            started.append(make(turn=turn))
            turns.started(name, started[-1], cluster)
        return started[-1]

    def start_reference(trained: Policy) -> Reference | AdapterReference:
        frozen, temperature = config.reference, config.sampling.temperature
        if frozen.adapter:
            return AdapterReference(trained)
        return start("reference", partial(Reference, frozen, place, cluster, model=frozen.model or model, temperature=temperature))

    def start_value(trained: Policy) -> Value | ValueHead | None:
        if not config.has_value_model:
            return ValueHead(trained) if config.has_value else None
        return start("value", partial(Value, value, place, cluster, model=value.model or model, seed=config.seed))

    try:
        head, temperature, folder = config.value.head, config.sampling.temperature, absolute_out(config.out)
        trained = start("policy", partial(Policy, policy, place, cluster, temperature=temperature, seed=config.seed, value_head=head))
        names = {a: f"reward.{a}" for a in config.attributes.names}
        cast = Cast(
            rollout=start("rollout", partial(Rollout, config.rollout, model, place, cluster, sync=config.sync)),
            rewards={a: start(name, partial(Reward, name, config.reward[a], place, cluster, folder)) for a, name in names.items()},
            reference=start_reference(trained),
            policy=trained,
            value=start_value(trained),
            placement=place,
        )
        ready(cast.groups, cluster)
        for pool in cast.pools.values():
            pool.wait_ready()
    except BaseException:
        end_all(*(handle.close for handle in started), place.release)
        raise
    return cast


def restore(config: PPORecipe, cast: Cast, run: Run) -> tuple[int, AdaptiveKL]:
    """Steps done and the KL controller: from the last checkpoint if there is one, which is then loaded everywhere."""
    last = run.latest()
    if last is None:
        if cast.rollout.version > 0:  # begun anew before the first checkpoint: the workers have weights that are gone
            publish(cast.policy, cast.rollout, 0)
        return 0, AdaptiveKL(config.algorithm.kl.beta)
    done, folder = last
    kl = _read_kl(folder / _STATE)
    cast.policy.load(folder / "policy")
    if isinstance(cast.value, Value):
        cast.value.load(folder / "value")
    publish(cast.policy, cast.rollout, done)
    return done, kl


def _read_kl(path: Path) -> AdaptiveKL:
    try:
        return AdaptiveKL.from_dict(read_checked(path)["kl"])
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from None


def write_checkpoint(cast: Cast, kl: AdaptiveKL, folder: Path) -> None:
    """All that a resumed run needs; everything else is a function of the recipe and the step."""
    cast.policy.save(folder / "policy")
    if isinstance(cast.value, Value):
        cast.value.save(folder / "value")
    write_checked(folder / _STATE, {"kl": kl.to_dict()})


def check_inputs(config: PPORecipe) -> tuple[list[Prompt], object, list[Reject]]:
    """Everything that can be wrong before an actor starts; returns the prompts, the policy's tokenizer, and the rows set aside."""
    for reward in config.reward.values():
        reward.check()
    return check_asked(config)


def check_asked(config: PPORecipe) -> tuple[list[Prompt], object, list[Reject]]:
    """`check_inputs` but for the reward models themselves, which may be still to be made: of these only how they read the prompts."""
    policy, reference, value = config.policy.model, config.reference.model or config.policy.model, config.value.model or config.policy.model
    check_policy(policy, trained=True)
    check_attributes(policy, config.attributes)
    check_adapters(policy, config.policy.train.lora)
    check_layout(policy, config.policy.train.layout)
    if not config.reference.adapter:
        check_causal(reference, "reference")
        check_layout(reference, config.reference.layout)
        check_same_vocabulary(policy, reference, "reference")
    if config.has_value_model:
        check_value(value)
        check_adapters(value, config.value.train.lora, "value")
        check_same_vocabulary(policy, value, "value model")
    room = prompt_room(policy, config.rollout.engine, config.sampling)
    tokenizer, read = with_variables(load_tokenizer(policy), config.chat), read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows)
    check_export(policy, config.out, partial(save_control_tokenizer, tokenizer, attributes=config.attributes), generates=True)
    asked = lambda prompt: [(prompt.messages, corners(config.attributes)[0].spell())]  # noqa: E731
    prompts, _, aside = askable(
        tokenizer, read, room, config.skip_bad_rows, asked, judges_of(config), config.attributes
    )
    rejects = [*read.report.rejects, *aside]
    if rejects:
        print(aside_line(rejects), flush=True)
    return prompts, tokenizer, rejects


def judges_of(config: PPORecipe) -> list[str]:
    """The reward models."""
    return [reward.model for reward in config.reward.values()]
