"""The baselines that train nothing ([SH] section 3.1), and how each method puts a control into words.

- *prompting*: one of four templates after the prompt; the best of the four, by the mean of the MP values, is the method's figure.
- *reranking*: k samples by prompting, of which the one whose scores are nearest (L1) to the control is kept.
- *plain*: nothing is asked for; how a model answers of itself.
- *system*: the two opposite system prompts of Configurable Safety Tuning (arXiv 2404.00495); only safety is asked for.

Source: [SH] Tuan et al., arXiv 2404.01295.
"""

from collections.abc import Mapping

import numpy as np

from ctrlrl.control import HIGH, LOW, Control
from ctrlrl.errors import DataError
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, Messages, prompting_templates

METHODS = ("control", "prompting", "reranking", "system")
TEMPLATES = (1, 2, 3, 4)
# Both system prompts ask for help; they differ in safety alone.
SYSTEM_CONTROLS = (Control(HIGH, LOW), Control(HIGH, HIGH))


def in_words(method: str, control: Control, template: int | None = None) -> str:
    """The text by which `method` asks for `control`; `template` (1 to 4) where it is a prompting template."""
    if method == "plain":
        return ""
    if method == "system":
        return HARMLESS_SYSTEM if control.harmless >= 0.5 else UNCENSORED_SYSTEM
    return control.spell() if template is None else prompting_templates(control)[template - 1]


def under_system_prompt(messages: Messages, system: str, source: str) -> list[dict[str, str]]:
    """`messages` after the system prompt `system`; DataError, naming `source`, if they have a system message of their own."""
    if any(message["role"] == "system" for message in messages):
        raise DataError(f"the prompt at {source} has a system message of its own: method = 'system' needs prompts without one")
    return [{"role": "system", "content": system}, *messages]


def under_attack(messages: Messages, attack: str) -> Messages:
    """`messages`, the last of which is written in the place of {prompt} in `attack`; as they are without an attack."""
    if not attack:
        return messages
    return [*messages[:-1], {"role": "user", "content": attack.replace("{prompt}", messages[-1]["content"])}]


def nearest(scores: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """Which of k samples is nearest to the request by the L1 distance of its scores: [N] from scores [N, k, A] and requests [N, A].

    Of equally near ones the first. One without all its scores (NaN) is chosen only where none has them.
    """
    distance = np.abs(scores - requests[:, None]).sum(2)
    return np.where(np.isnan(distance), np.inf, distance).argmin(1)


def best_template(measured: Mapping[int, Mapping]) -> int:
    """The template with the largest mean of the attributes' MP values; of equal ones the first.

    measured: template -> attribute -> metric -> figures.
    """
    return max(sorted(measured), key=lambda template: np.mean([measured[template][name]["MP"]["value"] for name in measured[template]]))
