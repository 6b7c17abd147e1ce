"""What `ctrlrl serve` and a Ray Serve replica serve: the file of dials, checked against the model, and the parts put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import model_validator

from ctrlrl.attributes import PAPER, unlike
from ctrlrl.chat import OWN_TEMPLATE
from ctrlrl.config import load
from ctrlrl.errors import RecipeError
from ctrlrl.models.exporting import trained_attributes
from ctrlrl.models.loading import check_policy, load_tokenizer, within_positions
from ctrlrl.models.sampler import EngineConfig, SamplingConfig, prompt_room
from ctrlrl.models.scorer import ScorerConfig, make_scorer
from ctrlrl.models.served import ServedModel
from ctrlrl.models.unscored import score_or_none
from ctrlrl.prompts import Messages
from ctrlrl.serving.policies import KIND, NAME, Policies
from ctrlrl.serving.service import Service, check_kind


class ServeConfig(Policies):
    """The file of dials, with the engine's settings."""

    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _one_device(self):
        if self.engine.tensor_parallel > 1:
            raise ValueError("engine.tensor_parallel is of rollout workers: a server has one device; serve a larger model with vLLM itself")
        return self


@dataclass(frozen=True)
class Serving:
    """A model and what it is served with, checked, and not yet started."""

    model: str
    dials: str
    overrides: tuple[str, ...]
    name: str
    config: ServeConfig
    kind: KIND

    def again(self) -> "Serving":
        """The same with the file as it is now."""
        return load_serving(self.model, self.dials, self.overrides, self.name)

    async def start(self) -> Service:
        """Start the engine and have it show that it answers, then read the reward models: their threads must not be forked."""
        model = await ServedModel.start(self.model, self.config.engine, self.name)
        scores = scores_of(reward_configs(self.config)) if self.config.rewards else None
        return Service(model, load_tokenizer(self.model), self.config, self.kind, scores)

    def summary(self, service: Service) -> str:
        """One line about policies."""
        policies = service.policies
        keys = f"{len(policies.keys)} keys" if policies.keys else "no keys: everybody on this machine is the operator"
        return f"kind {self.kind}, dials {', '.join(policies.dials) or 'none'}, {keys}"


def load_serving(model: str, dials: str, overrides: Sequence[str], name: str) -> Serving:
    """Read the file and check it, the model and the reward models, before anything is started; CtrlrlError for what is wrong."""
    if not model:
        raise RecipeError("give the model to serve: ctrlrl serve runs/mine/model --dials dials.toml")
    trained = trained_attributes(model)
    known = {a.name: a.model_dump(mode="json", exclude={"name"}) for a in trained}
    config = load(ServeConfig, dials or None, list(overrides), {} if trained == PAPER else {"attributes": known})
    check_policy(model)
    config = _within(model, config)
    kind = kind_of(model, config)
    check_kind(config, kind)
    if kind == "tokens" and (other := unlike(config.attributes, trained)):
        raise RecipeError(f"{model!r} was trained for other attributes than those of the dials ({other}): leave [attributes] out")
    for attribute, judge in reward_configs(config).items():
        if judge.engine:
            raise RecipeError(f"rewards.{attribute}: a judge needs an engine of its own, which a server has for its model: give judge.url")
        judge.check()
    return Serving(model, dials, tuple(overrides), _name(model, name), config, kind)


def kind_of(model: str, policies: Policies) -> KIND:
    """By what dials reach the model: as the file says, or as its dials are, or by whether ctrlrl has exported it."""
    exported = OWN_TEMPLATE in str(load_tokenizer(model).chat_template)
    found = policies.kind or next((dial.kind for dial in policies.dials.values()), "tokens" if exported else "prompting")
    if found == "tokens" and not exported and policies.kind is None:
        raise RecipeError(
            f"{model!r} is not an export of ctrlrl, so it knows no control tokens: ask in words (prompting = true in each dial), or set "
            'kind = "tokens" if it was trained on them'
        )
    return found


def reward_configs(policies: Policies) -> dict[str, ScorerConfig]:
    """The reward models' settings; a plain text is the model's name."""
    given = {a: policies.rewards[a] for a in policies.attributes.names if a in policies.rewards}
    tables = {a: {"model": value} if isinstance(value, str) else value for a, value in given.items()}
    return {a: load(ScorerConfig, None, settings=table) for a, table in tables.items()}


def scores_of(configs: dict[str, ScorerConfig]):
    """A function: scores of answers to one conversation, an object each; None where a service or a judge gives none."""
    judges = {attribute: make_scorer(config) for attribute, config in configs.items()}

    def scores(messages: Messages, answers: Sequence[str]) -> list[dict[str, float | None]]:
        columns = {name: judge.score([(messages, answer) for answer in answers]) for name, judge in judges.items()}
        return [{name: score_or_none(round(float(column[i]), 4)) for name, column in columns.items()} for i in range(len(answers))]

    return scores


def _within(model: str, config: ServeConfig) -> ServeConfig:
    """`config` with as many tokens as the model has positions, where the file does not say how many."""
    if "max_model_tokens" not in config.engine.model_fields_set:
        tokens = within_positions(model, config.engine.max_model_tokens)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"max_model_tokens": tokens})})
    prompt_room(model, config.engine, SamplingConfig(max_new_tokens=1), section="")
    return config


def _name(model: str, name: str) -> str:
    """The model's name for clients: given, or its directory's, or that of the run."""
    path = Path(model).expanduser().resolve() if Path(model).expanduser().exists() else Path(model)
    found = name or (path.parent.name if path.name == "model" else path.name)
    if not NAME.fullmatch(found):
        raise RecipeError(f"--name {found!r} is not a name: use letters, digits, '.', '_' and '-'")
    return found
