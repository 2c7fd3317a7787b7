"""A command's flags, read into its config and explained by ``--help``; torch-free."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro

from xcit_dino.errors import InputError, suggest
from xcit_dino.options import (
    UNIONS,
    Config,
    Mismatch,
    coerce,
    ineffective,
    option_types,
    options,
    replace,
)
from xcit_dino.paths import expand

BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


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


def named(argv: Sequence[str], config: type) -> set[str]:
    """The options that a command line gives, whatever their values; it was parsed before."""
    return {name for name, _ in _split(argv, option_types(config))}


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
        return coerce(value, kind)
    except Mismatch as expected:
        raise InputError(f"--{name} {' '.join(words)}: must be {expected}") from None
    except InputError as error:  # no path
        raise InputError(f"--{name}: {error}") from None


def pop_path(argv: Sequence[str], name: str) -> tuple[Path | None, list[str]]:
    """:func:`pop_option` of an option that is a path, its ``~`` opened."""
    value, rest = pop_option(argv, name)
    try:
        return (None if value is None else Path(expand(value))), rest
    except InputError as error:
        raise InputError(f"--{name}: {error}") from None


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
