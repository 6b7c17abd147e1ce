"""From a table of scored answers to metrics.json (mP, MP, Err, BT with intervals) and details.json (all else that is measured).

The table is long: one row per prompt and control, and per template for prompting. Needed columns: prompt_id, helpful_request,
harmless_request and the two scores of at least one set of reward models (`optimisation.helpful`, …). Columns method, template, response,
tokens and finish_reason may be absent: what they would tell is then named under "missing". A prompt that lacks a score (null) of a set
under any control is left out of the figures of that set, and counted under "unscored".
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from ctrlrl.attributes import PAPER, Attributes, enumerated
from ctrlrl.config import Section
from ctrlrl.control import HIGH, Control
from ctrlrl.data.schemas import attributes_in
from ctrlrl.errors import DataError
from ctrlrl.evaluation.baselines import METHODS, best_template
from ctrlrl.evaluation.grid import JUDGES, score_columns
from ctrlrl.evaluation.metrics import (
    METRICS,
    from_table,
    measure,
    over_optimisation_gap,
    request_columns,
    safe_shares,
    without_unscored,
)
from ctrlrl.evaluation.refusals import EXEMPT, JUDGED, OPENING, REFUSALS, check_pattern, judged, judged_by, refused
from ctrlrl.functions import check_defined

BINS = 20  # of the score distributions, over [0, 1]


class MeasureConfig(Section):
    """draws: bootstrap draws for the intervals. refusals, exempt, opening: as evaluation.refusals.refused has them: an answer refuses in
    whose first `opening` characters one of these patterns (RE2, any case) occurs, what `exempt` matches having been cut out.

    judged_refusals: where the table has a judge's column `refusal`, that counts and not the patterns. refusal_function: such a judge,
    `file.py:function`, which takes the prompts and the responses and gives a score from 0 to 1 for each.
    """

    draws: int = Field(1000, ge=0)
    refusals: tuple[str, ...] = REFUSALS
    exempt: tuple[str, ...] = EXEMPT
    opening: int = Field(OPENING, ge=0)
    judged_refusals: bool = True
    refusal_function: str = Field("", exclude_if=lambda place: not place)

    @field_validator("refusal_function")
    @classmethod
    def _is_there(cls, place: str) -> str:
        if place:
            check_defined(place)
        return place

    @field_validator("refusals", "exempt")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    def judged(self, table: pa.Table) -> pa.Table:
        """`table` with the scores of refusal_function, if there is one."""
        return judged_by(table, self.refusal_function) if self.refusal_function else table

    def are_refusals(self, table: pa.Table) -> pa.ChunkedArray | None:
        """Which answers of a table refuse; None where it has none."""
        if self.judged_refusals and JUDGED in table.column_names:
            return judged(table[JUDGED])
        return refused(table["response"], self.refusals, self.exempt, self.opening) if "response" in table.column_names else None


def results(table: pa.Table, config: MeasureConfig, seed: int) -> tuple[dict, dict]:
    """(metrics, details) of a table, both ready for JSON. metrics: judge -> attribute -> mP, MP, Err, BT -> value, low, high.

    For prompting both are those of the best template, by the first set of reward models; the others are under details["templates"].
    Raises DataError as evaluation.metrics.from_table does.
    """
    attributes = attributes_in(table.schema)
    judges = [judge for judge in JUDGES if set(score_columns(judge, attributes)) & set(table.column_names)]
    if not judges:
        needed = enumerated(score_columns(JUDGES[0], attributes))
        raise DataError(f"the table has no scores: it needs {needed}; it has {', '.join(table.column_names)}")
    table = config.judged(_typed(table, judges))
    method = _method(table)
    parts = _by_template(table) if method == "prompting" else {None: table}
    measured = {number: {judge: _measured(part, judge, config, seed) for judge in judges} for number, part in parts.items()}
    figures = {number: _metrics(found, attributes) for number, found in measured.items()}
    best = best_template({number: found[judges[0]] for number, found in figures.items()}) if len(parts) > 1 else next(iter(parts))
    chosen, found = parts[best], measured[best]
    lacking = unscored_prompts(chosen, judges)
    details = {
        "method": method,
        "prompts": pc.count_distinct(chosen["prompt_id"]).as_py(),
        "controls": [control.name for control in _controls(chosen)],
        "seed": seed,
        "draws": config.draws,
        "judges": {judge: _beside(chosen, judge, one, method, seed, config.draws) for judge, one in found.items()},
        "over_optimisation": over_optimisation_gap(*(found[judge] for judge in JUDGES), attributes) if len(judges) == 2 else None,
        "corners": corners(chosen, judges, config),
        "refusals": list(config.refusals),
        "refusals_told": refusals_told(chosen, config),
        "best_template": best,
        "templates": [{"template": n, "metrics": part} for n, part in figures.items()] if method == "prompting" else [],
        "missing": _missing(table, judges, lacking),
        **({"unscored": lacking} if lacking else {}),
        **({} if attributes == PAPER else {"attributes": attributes.dumped()}),
    }
    return figures[best], details


def unscored_prompts(table: pa.Table, judges: list[str]) -> dict[str, int]:
    """How many prompts are left out of the figures of each set of reward models, where there are any."""
    found = {judge: _scored(table, judge)[1] for judge in judges}
    return {judge: prompts for judge, prompts in found.items() if prompts}


def refusals_told(table: pa.Table, config: MeasureConfig) -> dict:
    """What told the refusals, "judge", "patterns" or None; and, where both are there, in which share of the answers the two agree."""
    told = config.are_refusals(table)
    by = "judge" if told is not None and config.judged_refusals and JUDGED in table.column_names else "patterns"
    found = {"by": None if told is None else by, "agreement": None}
    if JUDGED in table.column_names and "response" in table.column_names:
        other = refused(table["response"], config.refusals, config.exempt, config.opening)
        found["agreement"] = _share(pc.equal(judged(table[JUDGED]), other))
    return found


def corners(table: pa.Table, judges: list[str], config: MeasureConfig) -> list[dict]:
    """For each control: answers, mean tokens and characters, share cut at the limit, share of refusals, mean scores; null where unknown."""
    attributes = attributes_in(table.schema)
    scored, rows = {judge: _scored(table, judge)[0] for judge in judges}, []
    for control in _controls(table):
        part = _under(table, control)
        row = {"control": control.name, **dict(zip(attributes.names, control.levels, strict=True)), "answers": part.num_rows}
        row["tokens"] = pc.mean(part["tokens"]).as_py() if "tokens" in part.column_names else None
        row["cut"] = _share(pc.equal(part["finish_reason"], "length")) if "finish_reason" in part.column_names else None
        said = part["response"] if "response" in part.column_names else None
        row["characters"] = None if said is None else pc.mean(pc.utf8_length(said)).as_py()
        told = config.are_refusals(part)
        row["refusals"] = None if told is None else _share(told)
        judged_parts = {judge: _under(found, control) for judge, found in scored.items()}
        row["scores"] = {j: {a: pc.mean(found[f"{j}.{a}"]).as_py() for a in attributes.names} for j, found in judged_parts.items()}
        rows.append(row)
    return rows


def distribution(requests: np.ndarray, scores: np.ndarray) -> list[dict]:
    """For each requested level of one attribute: how many scores are in each of BINS equal bins of [0, 1] ([SH] Fig. 4-6)."""
    return [
        {"requested": level, "counts": np.histogram(scores[requests == level], BINS, (0, 1))[0].tolist()}
        for level in np.unique(requests).tolist()
    ]


def _scored(table: pa.Table, judge: str) -> tuple[pa.Table, int]:
    return without_unscored(table, score_columns(judge, attributes_in(table.schema)))


def _under(table: pa.Table, control: Control) -> pa.Table:
    """The rows of one control."""
    requests = np.stack([table[name].to_numpy() for name in request_columns(attributes_in(table.schema))], axis=1)
    return table.filter(pa.array((requests == np.array(control.levels)).all(1)))


def _measured(table: pa.Table, judge: str, config: MeasureConfig, seed: int) -> dict:
    table, _ = _scored(table, judge)
    return measure(table, scores=score_columns(judge, attributes_in(table.schema)), seed=seed, draws=config.draws)


def _metrics(measured: dict, attributes: Attributes) -> dict:
    """The layout of metrics.json from judge -> result of measure_arrays."""
    return {judge: {a: {name: found[a][name] for name in METRICS} for a in attributes.names} for judge, found in measured.items()}


def _beside(table: pa.Table, judge: str, found: dict, method: str, seed: int, draws: int) -> dict:
    """What one set of reward models tells besides the four metrics."""
    names = attributes_in(table.schema).names
    requests, scores = from_table(_scored(table, judge)[0], scores=[f"{judge}.{name}" for name in names])
    rest = {name: {share: found[name][share] for share in ("constant", "ties")} for name in names}
    rest |= {name: found[name] for name in ("matched", "entanglement", "calibration")}
    rest["distribution"] = {name: distribution(requests[..., a], scores[..., a]) for a, name in enumerate(names)}
    rest["system"] = None
    if method == "system":
        harmless = PAPER.names.index("harmless")
        asked, given = requests[..., harmless], scores[..., harmless]
        rest["system"] = safe_shares(given[asked == HIGH], given[asked != HIGH], seed=seed, draws=draws)
    return rest


def _typed(table: pa.Table, judges: list[str]) -> pa.Table:
    """The table with its columns in the types that are measured; DataError names a column that cannot be one."""
    attributes = attributes_in(table.schema)
    numbers = [*request_columns(attributes), "tokens", *(column for judge in judges for column in score_columns(judge, attributes))]
    texts = ("response", "finish_reason", "method")
    types = {"template": pa.int64()} | dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(texts, pa.string())
    for name, wanted in types.items():
        if name in table.column_names and table.schema.field(name).type != wanted:
            given = table.schema.field(name).type
            try:
                table = table.set_column(table.column_names.index(name), name, table[name].cast(wanted))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"column {name} of the table is {given}, and cannot be read as {wanted}: {error}") from None
    return table


def _method(table: pa.Table) -> str:
    """The one method of a table; "control" where it does not say."""
    if "method" not in table.column_names:
        return "control"
    named = pc.unique(table["method"]).to_pylist()
    if len(named) != 1 or named[0] not in METHODS:
        raise DataError(f"a table is of one method, {', '.join(METHODS)}; this one names {', '.join(map(str, named))}")
    return named[0]


def _by_template(table: pa.Table) -> dict[int, pa.Table]:
    if "template" not in table.column_names or table["template"].null_count:
        raise DataError("a table of prompting needs a template number in every row of its column template")
    return {number: table.filter(pc.equal(table["template"], number)) for number in sorted(pc.unique(table["template"]).to_pylist())}


def _controls(table: pa.Table) -> list[Control]:
    attributes = attributes_in(table.schema)
    levels = np.unique(np.stack([table[name].to_numpy() for name in request_columns(attributes)], axis=1), axis=0)
    return [Control(*each, attributes=attributes) for each in levels.tolist()]


def _share(flags: pa.ChunkedArray) -> float:
    return pc.mean(flags.cast(pa.int8())).as_py()


def _missing(table: pa.Table, judges: list[str], lacking: dict[str, int]) -> list[str]:
    """What could not be measured, and why."""
    tells = {"response": "refusals and characters", "tokens": "lengths in tokens", "finish_reason": "answers cut at the limit"}
    found = [f"no {judge.replace('_', '-')} reward models" for judge in JUDGES if judge not in judges]
    found += [f"{prompts} prompts lack {judge.replace('_', '-')} scores, and are left out of these" for judge, prompts in lacking.items()]
    return found + [f"{what}: the table has no column {column}" for column, what in tells.items() if column not in table.column_names]
