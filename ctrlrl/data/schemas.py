"""The Arrow schema of every stage of self-generation, prompts → samples → scores → distilled ([SH] sections 2.2 and 2.3), and of
self-critique, prompts → critiques → pairs ([CST]).

A score shard has the rows of the sample shard of the same number, in the same order.
"""
import json
from collections.abc import Iterable

import pyarrow as pa

from ctrlrl.attributes import PAPER, Attributes, stored
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_KEY = [
    pa.field("prompt_id", pa.string(), nullable=False),  # 16 hexadecimal digits, ctrlrl.data.sources.prompt_id
    pa.field("unit", pa.int32(), nullable=False),  # one pass over the prompt set; --scale 8x is units 0 to 7
    pa.field("index", pa.int32(), nullable=False),  # which of the unit's k samples of the prompt
]
_ANSWER = [
    pa.field("response", pa.string(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32())),  # as the sampler returned them, end token included; null where not kept
    pa.field("finish_reason", pa.string(), nullable=False),  # "stop" or "length"
]

PROMPTS = pa.schema([_KEY[0], pa.field("messages", MESSAGES, nullable=False), pa.field("source", pa.string(), nullable=False)])
SAMPLES = pa.schema(
    [
        *_KEY,
        pa.field("seed", pa.int64(), nullable=False),
        *_ANSWER,
        pa.field("token_count", pa.int32(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),  # fingerprint of the policy that answered
    ]
)
# float64, because MOEC's 0.2 belongs to the low end: the float32 next to 0.2 lies above it.
_RAW = pa.field("raw", pa.float32())  # the reward model's own output, from which another calibration can be fitted
SCORES = pa.schema([*_KEY, pa.field("score", pa.float64(), nullable=False), _RAW])
UNSCORED = pa.schema([*_KEY, pa.field("score", pa.float64()), _RAW])  # of a shard in which an answer has no score: there both are null
_ATTRIBUTES = b"ctrlrl.attributes"  # in the metadata of a schema


def with_attributes(schema: pa.Schema, attributes: Attributes) -> pa.Schema:
    """`schema` with its attributes written into it, unless they are the paper's two."""
    return schema if attributes == PAPER else schema.with_metadata({_ATTRIBUTES: json.dumps(attributes.dumped())})


def attributes_in(schema: pa.Schema, where: object = "the table") -> Attributes:
    """The attributes of a table of this schema; DataError, naming `where` it is from, if they cannot be read."""
    return stored((schema.metadata or {}).get(_ATTRIBUTES), where)


def distilled_schema(attributes: Attributes) -> pa.Schema:
    """The schema of a training table: a column of the control's levels for each attribute."""
    levels = [pa.field(name, pa.float64(), nullable=False) for name in attributes.names]
    return with_attributes(pa.schema([*_KEY, pa.field("messages", MESSAGES, nullable=False), *levels, *_ANSWER]), attributes)


DISTILLED = distilled_schema(PAPER)
CRITIQUES = pa.schema(
    [
        *_KEY,  # unit is 0: one pass over the prompts
        pa.field("seed", pa.int64(), nullable=False),  # of the answer; those of the later turns derive from it
        pa.field("y0", pa.string(), nullable=False),
        pa.field("critique", pa.string()),  # null where it was not asked for
        pa.field("rewrite", pa.string()),  # the reply that should hold y1, as it came
        pa.field("y1", pa.string()),  # null where set aside
        pa.field("aside", pa.string(), nullable=False),  # why the row is no pair; empty where it is one
        pa.field("policy", pa.string(), nullable=False),  # fingerprint of the policy that spoke
    ]
)
PAIRS = pa.schema(
    [
        *_KEY,
        pa.field("messages", MESSAGES, nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("y0", "critique", "y1")),
    ]
)


def conform(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; nullable columns may be absent. Raises DataError with what differs."""
    extra = [name for name in table.column_names if name not in schema.names]
    absent = [f.name for f in schema if f.name not in table.column_names and not f.nullable]
    if extra or absent:
        problems = [f"without {', '.join(absent)}"] * bool(absent) + [f"with unknown {', '.join(extra)}"] * bool(extra)
        raise DataError(f"a table of {what} has the columns {', '.join(schema.names)}; got one {' and '.join(problems)}")
    columns = []
    for field in schema:
        column = table[field.name] if field.name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        if column.null_count and not field.nullable:
            raise DataError(f"column {field.name} of a table of {what} has {column.null_count} empty values, and may have none")
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            raise DataError(f"column {field.name} of a table of {what} is {field.type}; got {column.type}: {error}") from None
    return pa.table(columns, schema=schema)


def prompts_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Prompts as a table of the PROMPTS schema."""
    rows = list(prompts)
    columns = [[p.prompt_id for p in rows], [list(p.messages) for p in rows], [p.source for p in rows]]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, PROMPTS, strict=True)], schema=PROMPTS)
