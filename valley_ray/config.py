"""Configuration: a YAML file plus ``key=value`` overrides becomes one frozen, closed pydantic model.

Knows no particular configuration: each room keeps its own model beside its code and loads it through `load_config`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from valley_ray.errors import ConfigError

COMMAND_LINE = "the command line"

_TYPES = ("int", "float", "str", "bool")


class Config(BaseModel):
    """Base of what a user writes: frozen, closed (an unknown key is an error), field docstrings as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(model: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` (YAML, may be None for defaults), apply ``a.b=value`` overrides (values parsed as YAML), validate.

    A number names a position in a list of the file: ``stages.0.max_steps=5``.

    Raises:
        ConfigError: the file is missing or no mapping, an override has no ``=``, a key is unknown (the nearest valid
            key is named) or a value is out of range; it says whether the file or an override is at fault.
    """
    values = read_yaml(Path(path)) if path is not None else {}
    apply_overrides(values, overrides)
    source = str(path) if path is not None else COMMAND_LINE
    return validate_config(model, values, source=source, overrides=overrides)


def validate_config(
    model: type[ConfigT], values: Mapping[str, Any], *, source: str, overrides: Sequence[str] = ()
) -> ConfigT:
    """Validate `values` as `model`; raises ConfigError with every problem in one line, each with its fix.

    Args:
        source: where the values were read.
        overrides: those that `apply_overrides` has put into `values`; their problems are the command line's.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in _causes(error):
            where = COMMAND_LINE if _is_of(overrides, problem) else source
            problems.setdefault(where, []).append(_describe(model, problem))
        said = "; ".join(f"{where}: {'; '.join(sentences)}" for where, sentences in problems.items())
        raise ConfigError(said) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file; raises ConfigError where it holds anything else."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read configuration {path}: {error.strerror}; give the path of a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"configuration {path} is not valid YAML: {reason}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"configuration {path} must be a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``a.b=value`` overrides in `values`, in place; raises ConfigError for one that does not read so."""
    for override in overrides:
        _apply_override(values, override)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form key=value, for example num_workers=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from error
    *parents, leaf = key.split(".")
    node: Any = values
    for depth, parent in enumerate(parents):
        place = _place(node, parent, override, ".".join(parents[:depth]))
        child = node[place] if isinstance(node, list) else node.get(place)
        node[place] = child.copy() if isinstance(child, dict | list) else {}
        node = node[place]
    node[_place(node, leaf, override, ".".join(parents))] = value


def _place(node: Any, name: str, override: str, parents: str) -> Any:
    """The key or list position that `name` means in `node`; ConfigError for a position that is not there."""
    if isinstance(node, list):
        if name.isdecimal() and int(name) < len(node):
            return int(name)
        raise ConfigError(
            f"override {override!r}: {parents} is a list of {len(node)}; expected a position from 0 to "
            f"{len(node) - 1}, got {name!r}"
        )
    if name.isdecimal() and parents:
        raise ConfigError(
            f"override {override!r}: position {name} of {parents}, which the file does not write as a list; give the "
            f"list whole: {parents}='[{{...}}]'"
        )
    return name


def _is_of(overrides: Sequence[str], problem: Any) -> bool:
    """Whether one of `overrides` made a problem: it set the place, made up a key, or has a name that a rule names."""
    location = [str(part) for part in problem["loc"]]
    for override in overrides:
        key = override.partition("=")[0].split(".")
        if location[: len(key)] == key:
            return True
        if key[: len(location)] != location:
            continue
        if problem["type"] == "extra_forbidden":
            return True
        if problem["type"] == "value_error" and re.search(rf"\b{re.escape(key[-1])}\b", problem["msg"]):
            return True
    return False


def _causes(error: ValidationError) -> list[Any]:
    """The problems at the places that a user wrote, without those that only follow.

    pydantic puts the name of a type behind a place that could have held several, and calls a list too short whose items
    are wrong.
    """
    problems: list[Any] = [{**problem, "loc": _written(problem)} for problem in error.errors()]
    places = [problem["loc"] for problem in problems]

    def follows(problem: Any) -> bool:
        location = problem["loc"]
        return problem["type"] == "too_short" and any(
            len(place) > len(location) and place[: len(location)] == location for place in places
        )

    return [problem for problem in problems if not follows(problem)]


def _written(problem: Any) -> tuple[int | str, ...]:
    location: tuple[int | str, ...] = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return location
    return tuple(part for part in location if not (isinstance(part, str) and ("[" in part or part in _TYPES)))


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location) or "value"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        nearest = _nearest(location[-1], known, _nested_keys(model) if len(location) == 1 else {})
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        return f"unknown key {name!r}{hint} (valid keys: {', '.join(known)})"
    if problem["type"] == "value_error":
        # A validator of ours: its sentence names the fields, as `self.field=value`.
        reason = str(problem["ctx"]["error"]).replace("self.", "")
        return f"{name}: {reason}" if location else reason
    if problem["type"] == "missing":
        return f"missing key {name!r}"
    return f"{name}={problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _known_keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Keys of the model found by walking `parents` from `model`; list positions and union tags are stepped over."""
    current = [model]
    for parent in parents:
        annotations = [m.model_fields[parent].annotation for m in current if parent in m.model_fields]
        nested = [found for annotation in annotations for found in _models_in(annotation)]
        current = nested or current
    return sorted({key for m in current for key in m.model_fields})


def _nearest(word: str, known: Sequence[str], nested: Mapping[str, str]) -> str | None:
    """The key that was meant: one beside it, or (`nested`, by its last part) one further in that is much more alike."""
    beside = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    further = difflib.get_close_matches(word, nested, n=1, cutoff=0.8)
    if beside or not further:
        return next(iter(beside or difflib.get_close_matches(word, known, n=1, cutoff=0.0)), None)
    return nested[further[0]]


def _nested_keys(model: type[BaseModel]) -> dict[str, str]:
    """Keys of the settings one level further in → how they are written, such as `stages.0.max_steps`."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        is_list = get_origin(field.annotation) in (tuple, list)
        for one in _models_in(field.annotation):
            found |= {key: f"{name}{'.0' * is_list}.{key}" for key in one.model_fields}
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
