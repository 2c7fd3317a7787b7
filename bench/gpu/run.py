"""All measurements that need a GPU, in one command and at most 8 minutes: ``make gpu OUT=DIR``.

    make gpu OUT=DIR [DATA=shards/cifar10] [WHEELS=FOLDER] [MINUTES=8]
    python bench/gpu/run.py --out DIR --device cpu --tiny  # the same lines, small

The parts run in the order of ``PARTS``, the most valuable first, each in a process of its own that
is killed at its time limit. After every part DIR holds ``results.json`` and ``results.md``, whose
tables are those of docs/benchmarks.md, beside one log for each part, so that a run that is cut off
leaves what it found. No network is used. Beside torch, torchvision, numpy and timm, packages come
from ``--wheels``, a folder that ``make wheels`` fills; a part whose packages are missing is
skipped, and the results give the reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that bench is found
from bench.gpu.notes import ROOT, Notes, Setting, enter, markdown


@dataclass(frozen=True)
class Part:
    """module: of bench/gpu, with a function of the part's name; limit: seconds."""

    module: str
    about: str
    limit: float


PARTS = {
    "machine": Part("step_parts", "what this machine reaches", 40),
    "tests": Part("step_parts", "pytest -m gpu", 150),
    "step_p16": Part("step_parts", "step of xcit_small_12_p16", 110),
    "profile": Part("step_parts", "where a step's time goes", 40),
    "step_p8": Part("step_parts", "step of xcit_small_12_p8", 60),
    "launches": Part("step_parts", "small networks, with and without CUDA graphs", 80),
    "data": Part("data_parts", "can the data path feed a step", 70),
    "knn": Part("data_parts", "k-NN", 40),
    "features": Part("data_parts", "feature extraction", 30),
    "kernels": Part("step_parts", "Triton kernels beside the training's code", 30),
    "largest": Part("step_parts", "largest batch", 60),
    "curve": Part("data_parts", "k-NN accuracy while pretraining goes on", float("inf")),
}
PRELOADED = [
    "bench.gpu.step_parts",
    "bench.step",
    "bench.knn",
    "torch._dynamo",
]  # imported once
LEAST = 5  # seconds: with less left, a part is not started


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="try every line on small sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--data", help="folder of labeled shards; else built-in images")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for missing packages")
    return parser.parse_args()


def main() -> None:
    args = settings()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    print(install(args.wheels, out), end="", flush=True)
    path = [str(out / "packages"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.path.insert(0, str(out / "packages"))  # which the parts' processes inherit from here
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    found = []
    for name in args.part:
        left = 60 * args.minutes - (time.monotonic() - began)
        limit = min(left, PARTS[name].limit * (4 if args.tiny else 1))  # a busy CPU
        setting = Setting(args.device, args.tiny, out, args.data, limit)
        found.append(part_in_a_process(server, name, setting))
        collect(out, found, args)
        print(f"{name}: {found[-1]['state']}, {found[-1]['seconds']:.0f} s", flush=True)
    print(f"{out / 'results.md'}: {time.monotonic() - began:.0f} s in all")


def install(wheels: Path | None, out: Path) -> str:
    """Unpack the wheels into ``out/packages``, without pip, which not every Python has; returns
    what is wrong with them, if anything."""
    if wheels is None:
        return ""
    files = sorted(wheels.glob("*.whl"))
    fitting = [file for file in files if fits(file)]
    for file in fitting:
        with ZipFile(file) as archive:
            archive.extractall(out / "packages")
    others = ", ".join(file.name for file in files if file not in fitting)
    if others:
        return f"--wheels {wheels}: not for Python {sys.version.split()[0]}: {others}\n"
    return "" if fitting else f"--wheels {wheels}: holds no wheels\n"


def fits(wheel: Path) -> bool:
    """Whether a wheel is for any Python 3, for its stable interface or for this version."""
    python, abi = wheel.stem.split("-")[-3:-1]
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return "py3" in python.split(".") or abi == "abi3" or python == this


def part_in_a_process(server: Any, name: str, setting: Setting) -> dict:
    """Run a part, and kill it with all its processes at its time limit; returns its notes."""
    file, began, part = setting.out / f"{name}.json", time.monotonic(), PARTS[name]
    notes = Notes(file, name, part.about)
    if setting.seconds < LEAST:
        notes.end("skipped", "no time was left")
        return notes.found
    process = server.Process(
        target=enter, args=(f"bench.gpu.{part.module}:{name}", part.about, setting)
    )
    process.start()
    process.join(setting.seconds)
    late = process.is_alive()
    with suppress(ProcessLookupError):  # it has ended, or not yet begun a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    found = json.loads(file.read_text())
    if found["state"] == "running":
        why = "its time limit" if late else f"it ended with exit code {process.exitcode}"
        found |= {"state": "stopped" if late else "failed", "why": why}
    found["seconds"] = round(time.monotonic() - began, 1)
    file.write_text(json.dumps(found, indent=1))
    return found


def collect(out: Path, found: list[dict], args: argparse.Namespace) -> None:
    """Write ``results.json`` and ``results.md``."""
    from xcit_dino.provenance import commit, now

    facts = {"commit": commit(), "time": now(), "command": " ".join(sys.argv)}
    (out / "results.json").write_text(json.dumps(facts | {"parts": found}, indent=1))
    size = "tiny sizes: no measurement" if args.tiny else "measured"
    text = f"Commit {facts['commit']}, {facts['time']}, `{facts['command']}`; {size}."
    (out / "results.md").write_text(markdown(found, f"On {args.device}", text))


if __name__ == "__main__":
    main()
