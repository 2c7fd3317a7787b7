"""Provenance of results: each is stored with protocol, weights, commit, versions and hardware."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xcit_dino.cores import usable_cores
from xcit_dino.errors import InputError, warn
from xcit_dino.files import locked, write_atomic

RESULTS = "results.json"
LOCK = ".results.lock"
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "faiss-gpu",
    "faiss-cpu",
    "webdataset",
    "submitit",
)
_recorded: ContextVar[list[dict[str, Any]] | None] = ContextVar("recorded", default=None)


def provenance() -> dict[str, Any]:
    """Commit, versions, hardware and time of this process, as plain JSON values."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware(), "time": now()}


def now() -> str:
    """UTC time, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def commit() -> str:
    """Commit of the checkout (``+changes`` where files differ) or of a snapshot; else "unknown"."""
    root = Path(__file__).resolve().parents[1]
    if (root / "COMMIT").is_file():  # a copy of the code made by the launcher
        return (root / "COMMIT").read_text().strip()
    if not (root / ".git").exists():  # installed: a parent repository would be unrelated
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip()[:12] + ("+changes" if changed.stdout.strip() else "")


@cache
def versions() -> dict[str, str]:
    """Versions of Python, this project and the libraries that affect a result."""
    from xcit_dino import __version__

    found = {"python": platform.python_version(), "xcit-dino": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


@cache
def hardware() -> dict[str, Any]:
    """CPU and GPUs of this host."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "cores": usable_cores(), "gpus": gpus}


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "unknown"
    )


def record_result(
    folder: Path, name: str, metrics: dict[str, float], protocol: dict[str, Any], **facts: Any
) -> None:
    """Add one evaluation to a run's ``results.json``, under a lock against concurrent commands.

    The newest result of a name is stored under that name. One of another protocol (other weights,
    another network, crop, k ...) is kept: it moves to ``NAME@DIGEST``, with the digest of its
    protocol. One of the same protocol is replaced.

    Args:
        folder: the run folder.
        name: ``knn``, ``linear``, ``knn/random``, ``knn/pixels`` ...: the evaluation, then the
            network if it is not the pretrained backbone.
        metrics: accuracies in percent, and other numbers.
        protocol: every choice that has to match for two numbers to be comparable (k, temperature,
            crop, network, data checksum).
        facts: weights' checksum, wall seconds, and the like.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        try:
            results = read_results(folder)
        except InputError as error:
            os.replace(folder / RESULTS, folder / f"{RESULTS}.damaged")
            warn(f"{error}; set aside as {RESULTS}.damaged")
            results = {}
        if (before := results.pop(name, None)) is not None:
            protocol_before = before.get("protocol") if isinstance(before, dict) else before
            results[f"{name}@{digest(protocol_before)}"] = before
        results.pop(f"{name}@{digest(protocol)}", None)
        results[name] = {"metrics": metrics, "protocol": protocol, **facts, **provenance()}
        text = json.dumps(results, indent=1, sort_keys=True) + "\n"
        write_atomic(folder / RESULTS, text)
    if (entries := _recorded.get()) is not None:
        entries.append(json.loads(text)[name])


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """The entries that this process adds to any ``results.json`` meanwhile, as they are read back,
    in order."""
    token = _recorded.set(entries := [])
    try:
        yield entries
    finally:
        _recorded.reset(token)


def read_results(folder: Path) -> dict[str, Any]:
    """``name -> entry`` of a run folder's ``results.json``; empty if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); move it away") from error
    if not isinstance(results, dict):
        raise InputError(f"{path}: is damaged (no table of results); move it away")
    return results


def digest(protocol: Any) -> str:
    """Eight hex digits that identify a protocol."""
    text = json.dumps(protocol, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
