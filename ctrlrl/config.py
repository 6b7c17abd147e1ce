"""Recipes: TOML files and `--set a.b=c`, read into frozen pydantic models. An unknown key names its nearest neighbour."""

import difflib
import json
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from ctrlrl.errors import RecipeError


class Section(BaseModel):
    """Base of every recipe section: frozen, strict about keys. Sections live beside their owner."""

    model_config = ConfigDict(frozen=True, extra="forbid")


AnySection = TypeVar("AnySection", bound=Section)


def load(
    kind: type[AnySection],
    recipe: str | Path | None,
    overrides: list[str] = (),
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> AnySection:
    """Read `recipe` (TOML; None = defaults only) under `settings` under `key.sub=value` overrides under `options`; raises RecipeError.

    settings, options: values as they are. An override is TOML, but for a field that is a text: there it is that text, quoted or not.
    """
    try:
        return kind.model_validate(given(kind, recipe, overrides, settings, options))
    except ValidationError as error:
        raise RecipeError(_explain(kind, error, recipe)) from None


def given(
    kind: type[Section],
    recipe: str | Path | None,
    overrides: list[str] = (),
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values that `load` reads, before they are checked and completed: what is required may be absent. RecipeError as there."""
    values = {}
    if recipe is not None:
        path = Path(recipe)
        if not path.is_file():
            raise RecipeError(f"recipe {str(recipe)!r} does not exist: give the path of a TOML file")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:  # syntax, bytes that are not UTF-8, depth
            raise RecipeError(f"recipe {str(recipe)!r} is not TOML: {error}") from None
    values = laid_over(values, settings or {})
    for override in overrides:
        _override(kind, values, override)
    return laid_over(values, options or {})


def laid_over(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `settings` in their place: sections are merged key by key, anything else is replaced."""
    merged = dict(values)
    for key, value in settings.items():
        old = merged.get(key)
        merged[key] = laid_over(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return merged


def part_of(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of `values` is a key of `kind`, or of sections that every `kind` has (of those that may be left out, nothing)."""
    found = {}
    for key, value in values.items():
        inner = kind.model_fields[key].annotation if key in kind.model_fields else None
        if isinstance(value, Mapping):
            of = get_args(inner)[1] if get_origin(inner) is dict else None
            if isinstance(of, type) and issubclass(of, BaseModel):
                found[key] = {name: part for name, section in value.items() if (part := part_of(of, section))}
            elif isinstance(inner, type) and issubclass(inner, BaseModel) and (part := part_of(inner, value)):
                found[key] = part
        elif inner is not None:
            found[key] = value
    return found


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their dotted keys."""
    parts = (leaves(v, f"{prefix}{k}.") if isinstance(v, Mapping) else {f"{prefix}{k}": v} for k, v in values.items())
    return {key: value for part in parts for key, value in part.items()}


def dump(config: Section) -> str:
    """The resolved config as stable JSON (sorted keys), written with every run and compared at resume."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True)


def completed(kind: type[Section], dumped: str) -> dict:
    """What `dump` wrote, perhaps before `kind` had all its keys, with the defaults of those; as it is if it is no longer a `kind`."""
    values = json.loads(dumped)
    try:
        return json.loads(dump(kind.model_validate(values)))
    except ValidationError:
        return values


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Every leaf in which two dumped configs differ, as `a.b: old -> new`, or `a.0.b` in lists of equally many."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(isinstance(part, dict) for part in (*a, *b)):
            a, b = ({str(i): part for i, part in enumerate(parts)} for parts in (a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found


def _override(kind: type[Section], values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r} is not of the form section.key=value")
    *sections, leaf = path = key.strip().split(".")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # an unquoted string, as people type it
    if not isinstance(value, str) and _is_text(kind, path):
        value = text  # 2026-11-25, 1e3 and true are names of folders, too
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {section!r} is not a section")
    values[leaf] = value


def _is_text(kind: type[Section], path: list[str]) -> bool:
    """Whether the field at `path` takes a text and nothing else (but None)."""
    found = [kind]
    for part in path:
        inner = []
        for annotation in _members(found):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
                inner.append(annotation.model_fields[part].annotation)
            elif get_origin(annotation) is dict:
                inner.append(get_args(annotation)[1])
        found = inner
    return bool(found) and {*_members(found)} - {types.NoneType} == {str}


def _members(annotations: list[Any]) -> list[Any]:
    """`annotations` with the members of unions in their place."""
    for annotation in annotations:
        if get_origin(annotation) in (Union, types.UnionType):
            return _members([member for a in annotations for member in (get_args(a) if a is annotation else [a])])
    return list(annotations)


def _explain(kind: type[Section], error: ValidationError, recipe) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys(kind, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            lines.append(f"unknown key {where!r}: {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is required: set it in the recipe or with --set {where}=…")
        else:
            given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
            lines.append(f"{where + ': ' if where else ''}{item['msg'].removeprefix('Value error, ')}{given}")
    return f"recipe {str(recipe)!r}: " + "; ".join(lines) if recipe else "; ".join(lines)


def _keys(kind: type[BaseModel], location: tuple) -> list[str]:
    """The known keys of the section at `location`, following nested models and dictionaries and lists of models."""
    for part in location:
        field = kind.model_fields.get(part)
        if field is None:
            continue  # a key of a dictionary or an index of a list; `kind` is already the model inside it
        candidates = [field.annotation]
        for candidate in candidates:
            candidates += getattr(candidate, "__args__", ())  # the list grows as it is read: dict[str, list[Section]] | None
        kind = [kind, *(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))][-1]
    return list(kind.model_fields)
