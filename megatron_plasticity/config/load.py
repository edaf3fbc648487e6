"""YAML file + `extends` + `key.path=value` overrides → a checked config section, or one message that lists every problem."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_plasticity.config.base import Section
from megatron_plasticity.errors import ConfigError

SectionType = TypeVar("SectionType", bound=Section)


def load_config(cls: type[SectionType], path: Path, overrides: Sequence[str] = ()) -> SectionType:
    """Read `path`, resolve every `extends`, apply `overrides` and check the result against `cls`.

    A mapping at any depth may hold `extends: FILE` (relative to the file that says so): the named file lies underneath,
    and the mapping's own keys win. Overrides look like `optimizer.weight_decay=0.5`; the value is read as YAML.

    Raises ConfigError, with all problems in one message.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return check_config(cls, tree, str(path))


def check_config(cls: type[SectionType], tree: dict[str, Any], origin: str) -> SectionType:
    """Validate a plain tree against `cls`; `origin` names it in the message of the ConfigError."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = list(_describe(cls, error))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{origin}: {count} in the config\n" + "\n".join(f"  {p}" for p in problems)) from None


def read_yaml(path: Path, _including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with every `extends` resolved. Raises ConfigError for a missing, cyclic or unreadable file."""
    if path.resolve() in _including:
        chain = " → ".join(str(p) for p in (*_including, path.resolve()))
        raise ConfigError(f"`extends` goes round in a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        asked_by = f" (named by `extends` in {_including[-1]})" if _including else ""
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            if path.parent.is_dir()
            else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{asked_by}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {type(tree).__name__}")
    return _resolve_extends(tree, path, (*_including, path.resolve()))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in a plain tree; the value is read as YAML, so `null`, lists and numbers work."""
    key_path, separator, text = override.partition("=")
    keys = key_path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r}: expected key.path=value, such as optimizer.weight_decay=0.5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    set_at(tree, keys, value, f"override {override!r}")


def set_at(tree: dict[str, Any], keys: Sequence[str], value: Any, origin: str) -> None:
    """Set `tree[k0][k1]…` in place, making the sections that are not there yet."""
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"{origin}: {key!r} is a value, not a section that has keys")
    node[keys[-1]] = value


def _resolve_extends(node: Any, origin: Path, including: tuple[Path, ...]) -> Any:
    if isinstance(node, list):
        return [_resolve_extends(item, origin, including) for item in node]
    if not isinstance(node, dict):
        return node
    own = {key: _resolve_extends(value, origin, including) for key, value in node.items() if key != "extends"}
    if "extends" not in node:
        return own
    if not isinstance(node["extends"], str):
        raise ConfigError(f"{origin}: `extends` takes the path of one file, found {node['extends']!r}")
    return merge(read_yaml(origin.parent / node["extends"], including), own)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; anything else, lists included, is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _describe(cls: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        location = [part for part in problem["loc"] if part != "__root__"]
        where = ".".join(str(part) for part in location) or "(whole config)"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(cls, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            yield f"{where}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{where}: this key is required"
        elif problem["type"] == "value_error" and "ctx" in problem:
            for line in str(problem["ctx"]["error"]).splitlines():  # a validator may find several things wrong
                yield f"{where}: {line}" if location else line
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            yield f"{where}: {message}, found {problem['input']!r}"


def _known_keys(cls: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Keys of the section at `location` below `cls`."""
    for part in location:
        if isinstance(part, str) and part in cls.model_fields:
            section = _section_inside(cls.model_fields[part].annotation)
            if section is not None:
                cls = section
    return list(cls.model_fields)


def _section_inside(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for argument in get_args(annotation) if (s := _section_inside(argument)) is not None), None)
