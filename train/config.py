"""Typed options: frozen dataclasses, one config per command, filled from YAML and flags.

A command's config is a frozen dataclass whose fields are options or *sections* (nested frozen
dataclasses). Option names are unique within a command, so a recipe is a flat ``name: value`` YAML
file, a flag is ``--name`` and a run folder's ``config.yaml`` lists every option once. This module
imports no torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import tyro
import yaml

from xcit_dino.errors import InputError, needs, suggest, within
from xcit_dino.paths import LOCATION, expand

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
UNIONS = (typing.Union, types.UnionType)
Config = TypeVar("Config")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedules; names and defaults are those of DINO's ``main_dino.py``."""

    lr: float = 0.0005
    """Peak learning rate for 256 images; scaled linearly with the global batch (DINO's rule)."""
    min_lr: float = 1e-6
    """Learning rate at the end of training; not scaled."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from ``warmup_lr``."""
    warmup_lr: float = 0.0
    """Learning rate at step 0; not scaled."""
    weight_decay: float = 0.04
    """Weight decay at the start; none on biases, norms, `temperature` and `cls_token`."""
    weight_decay_end: float = 0.4
    """Weight decay at the end (cosine)."""
    clip_grad: float = 3.0
    """Largest gradient norm: of each parameter in pretraining (as DINO), of all together in
    finetuning and distillation (as DeiT and XCiT); 0 switches clipping off."""

    def __post_init__(self) -> None:
        within(self, 0, 1e3, "lr", "min_lr", "warmup_lr", "weight_decay", "weight_decay_end")
        within(self, 0, 1e6, "warmup_epochs", "clip_grad")

    def ineffective(self) -> dict[str, str]:
        """See :func:`ineffective`."""
        return needs(self.warmup_epochs, "with --warmup_epochs 0", "warmup_lr")

    def remarks(self, epochs: int) -> list[str]:
        """What the schedules of ``epochs`` epochs do that one would not expect, a line each."""
        if self.warmup_epochs < epochs:
            return []
        given = f"--warmup_epochs {self.warmup_epochs:g} with --epochs {epochs}"
        if self.warmup_epochs == epochs:
            return [f"{given}: the learning rate rises to the end of the run, and never falls"]
        share = epochs / self.warmup_epochs
        return [f"{given}: the run ends at {share:.0%} of the learning rate's way to its peak"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it computes."""

    output_dir: Path = Path("runs/default")
    """The run folder: config, checkpoints, metrics, results, report."""
    epochs: int = 100
    """Passes over the data."""
    batch_size_per_gpu: int = 64
    """Images a process takes at once."""
    accum_iter: int = 1
    """Micro-batches a step; the global batch is batch_size_per_gpu x accum_iter x processes."""
    seed: int = 0
    """Seed of weights, data order, augmentation and drop-path."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Forward arithmetic; weights stay fp32. auto: bf16 where the hardware has it, else fp32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is one."""
    saveckp_freq: int = 20
    """Keep a checkpoint every so many epochs, beside the newest ones."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    checkpoint_minutes: float = 10.0
    """Also save after so many minutes; 0 saves at epoch ends only."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and TensorBoard."""
    max_skipped: int = 20
    """Steps in a row that may be skipped for non-finite gradients."""
    on_nonfinite: Literal["rollback", "stop"] = "rollback"
    """After --max_skipped steps: back to the last checkpoint with half the learning rate (three
    times at most), or stop."""
    watchdog_minutes: float = 10.0
    """Say where each rank hangs, with stacks, after so long without a step; 0 never does."""
    on_stall: Literal["warn", "abort"] = "warn"
    """abort: after twice --watchdog_minutes the process ends itself, for a launcher to restart."""
    max_steps: int = 0
    """Stop (resumably) after this optimiser step; 0 runs to the end. Schedules do not change."""
    may_change: tuple[str, ...] = ()
    """Options that may differ from those the run folder was made with."""

    def __post_init__(self) -> None:
        within(self, 1, 1e6, "epochs", "batch_size_per_gpu", "accum_iter")
        within(self, 1, 1e9, "saveckp_freq", "keep_checkpoints", "log_every", "max_skipped")
        within(self, 0, 2**31, "seed")
        within(self, 0, 1e12, "checkpoint_minutes", "watchdog_minutes", "max_steps")

    def ineffective(self) -> dict[str, str]:
        """See :func:`ineffective`."""
        return needs(self.watchdog_minutes, "with --watchdog_minutes 0", "on_stall")

    def last_step(self, total_steps: int) -> int:
        """The optimiser step after which training stops, at the latest ``total_steps``."""
        return min(total_steps, self.max_steps or total_steps)


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
                changed[field.name] = _coerce(given, known[field.name])
            except _Mismatch as expected:
                raise InputError(
                    f"{source}: {field.name} must be {expected}, got {brief(given)}"
                ) from None
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
    for name in ("data_path", "knn_data_path", "shard_url"):  # a URL stays as it is
        folder = values.get(name)
        if isinstance(folder, str) and "://" not in folder and not folder.startswith("pipe:"):
            values[name] = os.path.abspath(folder)
    return replace(config, values)


class _Mismatch(ValueError):
    """A value of another type; the message names the type that is expected."""


def _coerce(value: Any, kind: Any) -> Any:
    """Check a value against its type, and open ``~`` in paths; numbers in text pass: YAML reads
    ``1e-6`` as text.

    Raises:
        _Mismatch: another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        inner = _coerce(value, args[0])
        return expand(inner) if LOCATION in args else inner
    if origin is Literal:
        if value in args:
            return value
        raise _Mismatch(f"one of {', '.join(map(str, args))}{suggest(str(value)[:80], args)}")
    if origin is tuple and isinstance(value, list | tuple):
        if Ellipsis in args:
            return tuple(_coerce(v, args[0]) for v in value)
        if len(args) == len(value):
            return tuple(_coerce(v, k) for v, k in zip(value, args, strict=True))
        raise _Mismatch(f"{len(args)} values")
    elif origin in UNIONS:
        for choice in args:
            with contextlib.suppress(_Mismatch):
                return _coerce(value, choice)
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
    raise _Mismatch(getattr(kind, "__name__", None) or str(kind).replace("typing.", ""))


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
        reason = " ".join(str(error).split())[:300]
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


# -- command line


def parse(default: Config, argv: Sequence[str], prog: str, description: str = "") -> Config:
    """Apply command-line flags to a config.

    Args:
        default: the config before the flags (defaults, or a recipe already applied).
        argv: flags, ``--batch_size_per_gpu 64`` or ``--batch-size-per-gpu=64``; booleans take
            ``true|false``.

    Raises:
        InputError: an unknown flag, a value of the wrong kind, or an option that changes nothing
            beside the others, in one line.
        SystemExit: after ``--help``.
    """
    if "-h" in argv or "--help" in argv:
        _print_help(default, prog, description)
    kinds = option_types(type(default))
    try:
        given = {name: _from_words(name, words, kinds[name]) for name, words in _split(argv, kinds)}
        for name, value in options(default):
            if value is tyro.MISSING and name not in given:
                positional = tyro.conf.Positional in typing.get_args(kinds[name])
                raise InputError(f"{name.upper() if positional else f'--{name}'} is missing")
    except InputError as error:
        raise InputError(f"{error} (see {prog} --help)") from None
    config, before = replace(default, given), dict(options(default))
    for name, why in ineffective(config).items():
        if name in given and given[name] != before[name]:
            raise InputError(f"--{name}: has no effect {why}; leave it out")
    return config


def _print_help(default: Any, prog: str, description: str) -> NoReturn:
    """Every option with its type, default and docstring, section by section."""
    tyro.cli(
        type(default),
        args=["--help"],
        default=default,
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )
    raise SystemExit(0)


def _split(argv: Sequence[str], kinds: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """``(option, its words)`` of a command line; options without a flag take the words left over,
    in order.

    Raises:
        InputError: an unknown flag, or words that belong to no option.
    """
    words, free = list(argv), []
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            free.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in kinds:
            raise InputError(f"unknown option --{name}{suggest(name, kinds)}")
        given = [value] if equals else []
        while not equals and words and len(given) < _most_words(kinds[name]):
            if _is_flag(words[0]):
                break
            given.append(words.pop(0))
        yield name, given
    for name, kind in kinds.items():
        if free and tyro.conf.Positional in typing.get_args(kind):
            count = _most_words(kind)
            yield name, free[:count]
            free = free[count:]
    if free:
        raise InputError(f"{free[0]!r} belongs to no option")


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _plain(kind: Any) -> tuple[Any, bool]:
    """(a type without its annotations, whether None is allowed beside it)."""
    if typing.get_origin(kind) is typing.Annotated:
        return _plain(typing.get_args(kind)[0])
    if typing.get_origin(kind) in UNIONS and type(None) in typing.get_args(kind):
        return _plain(next(k for k in typing.get_args(kind) if k is not type(None)))[0], True
    return kind, False


def _most_words(kind: Any) -> int:
    """How many words of a command line an option of this type takes."""
    args = typing.get_args(_plain(kind)[0])
    if typing.get_origin(_plain(kind)[0]) is not tuple:
        return 1
    return sys.maxsize if Ellipsis in args else len(args)


def _from_words(name: str, words: list[str], kind: Any) -> Any:
    """The value that the words of a command line stand for.

    Raises:
        InputError: none, or words that are no such value.
    """
    plain, optional = _plain(kind)
    if optional and words == ["None"]:
        return None
    if plain is bool and not words:
        return True
    if typing.get_origin(plain) is tuple:
        value: Any = words
    elif not words:
        raise InputError(f"--{name} needs a value")
    elif plain is bool:
        value = BOOLEANS.get(words[0].lower(), words[0])
    elif typing.get_origin(plain) is Literal:
        value = {str(choice): choice for choice in typing.get_args(plain)}.get(words[0], words[0])
    else:
        value = words[0]
    try:
        return _coerce(value, kind)
    except _Mismatch as expected:
        raise InputError(f"--{name} {' '.join(words)}: must be {expected}") from None


def pop_path(argv: Sequence[str], name: str) -> tuple[Path | None, list[str]]:
    """:func:`pop_option` of an option that is a path, its ``~`` opened."""
    value, rest = pop_option(argv, name)
    return (None if value is None else Path(expand(value))), rest


def pop_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take ``--name VALUE`` out of a command line: (value or None, the rest); the last wins."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        flag, equals, given = word.partition("=")
        if flag.replace("-", "_") != f"__{name}":
            rest.append(word)
        elif (value := given if equals else next(words, None)) is None:
            raise InputError(f"--{name} needs a value")
    return value, rest
