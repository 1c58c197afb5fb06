"""Configs: typed, documented, frozen; read from YAML with dotted overrides; all errors reported at once.

A component declares its own ``Config`` beside itself. A field's docstring is its `--help`: meaning, unit, and where
the default comes from.
"""

import copy
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from yaml.constructor import ConstructorError

from .errors import UserError


class Config(BaseModel):
    """Base of every section: unknown fields are errors, numbers finite, values fixed; docstrings are the help.

    Integers fit 32 bits, as they do in what computes with them, unless their field has a limit of its own.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _integers_fit(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            limits = cls.model_fields[str(info.field_name)].metadata
            if not any(hasattr(limit, "lt") or hasattr(limit, "le") for limit in limits):
                raise ValueError(f"input should be an integer of 32 bits, found {shortened(value)}")
        return value

    def idle(self) -> dict[str, str]:
        """Fields that have no effect beside the others of the section, each with the reason."""
        return {}


ConfigT = TypeVar("ConfigT", bound=Config)
LARGEST = 2**31


# ---------------------------------------------------------------------------------------------------------- reading


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
"""Words that are not strings in YAML 1.2, in the order they are tried: type, spelling, possible first characters."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as people write it: `1e-2` is a number; `yes`, `12:30` and `2024-01-01` are words; keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes words that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _name, (_spelling, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_spelling})$"), _first)


class _Integer(int):
    """An integer that remembers how it was written: a run may be called 007."""

    spelling: str


class _Real(float):
    """A number that remembers how it was written."""

    spelling: str


def _integer(_: _Loader, node: yaml.ScalarNode) -> _Integer:
    number = _Integer(node.value)
    number.spelling = node.value
    return number


def _real(loader: _Loader, node: yaml.ScalarNode) -> _Real:
    number = _Real(loader.construct_yaml_float(node))
    number.spelling = node.value
    return number


cast(Any, _Loader).add_constructor("tag:yaml.org,2002:int", _integer)
cast(Any, _Loader).add_constructor("tag:yaml.org,2002:float", _real)


DEEPEST, MOST = 40, 100_000
"""How deep values may be nested in a YAML text, and how many there may be where aliases are written out."""


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; raises UserError naming `source` and the line where it does not parse."""
    try:
        value = yaml.load(text, _Loader)
        _count(value)
        return value
    except (yaml.YAMLError, ValueError, IndexError, RecursionError) as error:  # of a tag that is given no text
        raise UserError(f"{shortened(source)}: not valid YAML: {' '.join(str(error).split())}") from error


def _count(value: Any, depth: int = 0) -> int:
    """How many values there are in one, aliases written out. Raises ValueError beyond `DEEPEST` and `MOST`."""
    if depth > DEEPEST:
        raise ValueError(f"values are nested more than {DEEPEST} deep")
    total = 1
    for part in (
        (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        total += _count(part, depth + 1)
        if total > MOST:
            raise ValueError(f"more than {MOST:,} values, aliases written out")
    return total


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, laid over the file that it names as its `base`, if it names one.

    `base: ../cifar10.yaml` is relative to the file. Sections are joined field by field; a base may have a base. Its
    `name` stays its own. Raises UserError for files that are missing, unreadable, something else, or their own base.
    """
    return _over_base(path, ())


def _over_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """`read_yaml`; `above`: the files whose base this one is."""
    data = _mapping_in(path)
    if "base" not in data:
        return data
    base, above = data.pop("base"), (*above, path.resolve())
    if not isinstance(base, str):
        raise UserError(f"{path}: base: takes the path of a YAML file, found {shortened(base)}")
    below = path.parent / base
    if below.resolve() in above:
        raise UserError(f"{path}: base: {base} is based on this file")
    return joined({key: value for key, value in _over_base(below, above).items() if key != "name"}, data)


def _mapping_in(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of sections, found {type(data).__name__}")
    return data


def joined(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes` in place of its own; mappings in both are joined in the same way."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = joined(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def apply_overrides(data: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `data` with each `section.field=value` set; values are read as YAML."""
    result = copy.deepcopy(dict(data))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise UserError(f"'{override}': an override is written section.field=value")
        target = result
        *sections, field = dotted.split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"'{override}': {section} is a value, not a section")
        target[field] = parse_yaml(text, override)
    return result


# ------------------------------------------------------------------------------------------------------- validation


def validate(config: type[ConfigT], data: Mapping[str, Any], source: str) -> ConfigT:
    """Checks `data` strictly (true is no number, "4" is no integer, 1 is a float) and reports every error at once.

    Raises UserError with one line per error: the field, what was found, what is allowed, the nearest name.
    """
    data = _numbers_as_text(config, data)
    for name, value in flat(data).items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{source}: {name}: {value!r} is not written in UTF-8")
    try:
        # JSON's strict mode is YAML's type system: lists may become tuples and strings paths, nothing else converts.
        return config.model_validate_json(json.dumps(data), strict=True)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise user_error(config, error, source) from error
        raise UserError(f"{source}: {error}") from error


def _numbers_as_text(config: type[Config], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with numbers as they were written, where a field takes text: names and paths may be made of digits."""
    result = dict(data)
    for name, value in data.items():
        field = config.model_fields.get(str(name))
        section = _section_type(field) if field else None
        if section is not None and isinstance(value, Mapping):
            result[name] = _numbers_as_text(section, value)
        elif field is not None and isinstance(value, _Integer | _Real) and _is_text(field.annotation):
            result[name] = value.spelling
    return result


def _is_text(annotation: Any) -> bool:
    return set(typing.get_args(annotation) or (annotation,)) - {type(None)} <= {str, Path}


def refuse_idle(config: Config, prefix: str = "") -> None:
    """Raises UserError naming the first field, of a config and its sections, that was given and has no effect."""
    idle = config.idle()
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            refuse_idle(value, f"{prefix}{name}.")
        elif name in idle and value != field.get_default():
            raise UserError(f"{prefix}{name}: has no effect, {idle[name]}; leave it out (found {value})")


def user_error(config: type[Config], error: ValidationError, source: str) -> UserError:
    """Pydantic's errors for people: `source`, then a line for each."""
    lines = [_sentence(config, problem) for problem in error.errors(include_url=False)]
    return UserError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines))


def _sentence(config: type[Config], problem: Any) -> str:
    """One line for one of pydantic's errors."""
    where = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field{nearest(str(problem['loc'][-1]), _names_at(config, problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: required and missing"
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{where}: {problem['msg'].removeprefix('Value error, ').removeprefix('Assertion failed, ')}"
    found = json.dumps(problem["input"], default=str)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    message += f", found {shortened(found)}"
    if problem["type"] == "literal_error":
        message += nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    return f"{where}: {message}"


def shortened(value: object) -> str:
    """The text of a value in at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"one of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name most like `name`, or the allowed names when none is near."""
    names = list(names)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; allowed: {', '.join(names)}" if names else ""


def _names_at(config: type[Config], loc: tuple[Any, ...]) -> list[str]:
    section: type[Config] | None = config
    for part in loc:
        field = section.model_fields.get(str(part)) if section else None
        section = _section_type(field) if field else None
    return list(section.model_fields) if section else []


def _section_type(field: FieldInfo) -> type[Config] | None:
    """The Config class of a field that is a section (or an optional one), else None."""
    candidates = typing.get_args(field.annotation) or (field.annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


# ------------------------------------------------------------------------------------------------- help and writing


def describe(config: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every field, sections opened in place."""
    for name, field in config.model_fields.items():
        section = _section_type(field)
        if section is not None:
            yield from describe(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(), default=str)
        yield f"{prefix}{name}", _type_name(field.annotation), default, " ".join((field.description or "").split())


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name."""
    values: dict[str, Any] = {}
    for key, value in data.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML; reads back to an equal config."""
    return yaml_of(config.model_dump(mode="json"))


def yaml_of(data: Mapping[str, Any]) -> str:
    """Plain values as YAML."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
