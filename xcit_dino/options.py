"""Typed options: frozen dataclasses, one config per command, filled from YAML and flags.

A command's config is a frozen dataclass whose fields are options or *sections* (nested frozen
dataclasses). Option names are unique within a command, so a recipe is a flat ``name: value`` YAML
file, a flag is ``--name`` and a run folder's ``config.yaml`` lists every option once. This module
imports no torch, so that ``--help`` is quick; flags are read in ``command_line.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from xcit_dino.errors import InputError, one_line, suggest
from xcit_dino.paths import LOCATION, NOT_PATHS, expand

UNIONS = (typing.Union, types.UnionType)
Config = TypeVar("Config")


# -- flat view: option name -> value


def options(config: Any) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of every option of a config, sections opened, in order."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from options(value)
        else:
            yield field.name, value


@cache
def option_types(config_class: type) -> dict[str, Any]:
    """``name -> annotated type`` of every option of a config class."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    found: dict[str, Any] = {}
    for field in fields(config_class):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            found |= option_types(kind)
        else:
            found[field.name] = kind
    return found


def replace(config: Config, values: dict[str, Any], source: str = "the override") -> Config:
    """A copy of ``config`` with options replaced by flat name; an unknown name is an error."""
    known = option_types(type(config))
    for name in values:
        if name not in known:
            raise InputError(f"{source}: unknown option {brief(name)}{suggest(name[:80], known)}")
    changed = {}
    for field in fields(typing.cast(Any, config)):
        value = getattr(config, field.name)
        if is_dataclass(value):
            inner = {k: v for k, v in values.items() if k in option_types(type(value))}
            if inner:
                changed[field.name] = replace(value, inner, source)
        elif field.name in values:
            given = values[field.name]
            try:
                changed[field.name] = coerce(given, known[field.name])
            except Mismatch as expected:
                raise InputError(
                    f"{source}: {field.name} must be {expected}, got {brief(given)}"
                ) from None
            except InputError as error:  # a home folder that does not exist
                raise InputError(f"{source}: {field.name}: {error}") from None
    return dataclasses.replace(typing.cast(Any, config), **changed)


def ineffective(config: Any) -> dict[str, str]:
    """``{name: why}`` of the options that do nothing beside the others: what the methods of that
    name say in a config and its sections. Recipes may hold such options; a command line may not."""
    own = config.ineffective() if hasattr(config, "ineffective") else {}
    sections = (getattr(config, field.name) for field in fields(config))
    inner = (ineffective(section) for section in sections if is_dataclass(section))
    return {name: why for found in (own, *inner) for name, why in found.items()}


def absolute(config: Config) -> Config:
    """The same config with absolute paths: a job, or the next command, may start in another
    folder."""

    def fixed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(fixed(item) for item in value)
        return Path(os.path.abspath(value)) if isinstance(value, Path) else value

    values = {name: fixed(value) for name, value in options(config)}
    for name in ("data_path", "knn_data_path", "shard_url", "init_from"):
        folder = values.get(name)
        if isinstance(folder, str) and "://" not in folder and not folder.startswith(NOT_PATHS):
            values[name] = os.path.abspath(folder)
    return replace(config, values)


class Mismatch(ValueError):
    """A value of another type; the message names the type that is expected."""


def coerce(value: Any, kind: Any) -> Any:
    """Check a value against its type, and open ``~`` in paths; numbers in text pass: YAML reads
    ``1e-6`` as text.

    Raises:
        Mismatch: another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        inner = coerce(value, args[0])
        return expand(inner) if LOCATION in args else inner
    if origin is Literal:
        if value in args:
            return value
        raise Mismatch(f"one of {', '.join(map(str, args))}{suggest(str(value)[:80], args)}")
    if origin is tuple and isinstance(value, list | tuple):
        if Ellipsis in args:
            return tuple(coerce(v, args[0]) for v in value)
        if len(args) == len(value):
            return tuple(coerce(v, k) for v, k in zip(value, args, strict=True))
        raise Mismatch(f"{len(args)} values")
    elif origin in UNIONS:
        for choice in args:
            with contextlib.suppress(Mismatch):
                return coerce(value, choice)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = kind(value)
            if kind is float or number == float(value):
                return number
    elif kind is type(None):
        if value is None:
            return None
    elif kind is Path and isinstance(value, str | Path):
        return Path(expand(str(value)))
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    raise Mismatch(getattr(kind, "__name__", None) or str(kind).replace("typing.", ""))


def brief(value: Any) -> str:
    """A value in a message; a few lines of YAML can stand for gigabytes of text."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


# -- YAML


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat recipe; tags, nesting and anything that is not ``name: value`` are refused."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes, numbers, dates; nesting
        reason = one_line(error, 300)
        raise InputError(f"--config {path}: not YAML: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise InputError(f"--config {path}: must hold lines of 'name: value'")
    return values


def dump_yaml(config: Any) -> str:
    """Every option as ``name: value``, readable again by :func:`read_yaml` + :func:`replace`."""
    plain = {
        name: str(value)
        if isinstance(value, os.PathLike)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in options(config)
    }
    readable = all(str(value).isprintable() for value in plain.values())  # else as escapes
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=readable)


def differing(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """``name -> (old, new)`` of the options in which two configs differ."""
    before = dict(options(old))
    return {k: (before.get(k), v) for k, v in options(new) if before.get(k) != v}
