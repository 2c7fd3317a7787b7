"""Every command on one small run folder, each in a process of its own: several at once, or where
the folder cannot be written to.

The processes come from the fork server of victims.py. All paths are relative to one place, so that
a command leaves the same bytes whenever it finds the same run folder there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests import victims

Prepare = Callable[[], None] | None
SKIPPED = 77  # exit code of a process that could not be given its surroundings
KEYS = "--num_workers 0 --device cpu --precision fp32"
TRAINING = f"{KEYS} --data_path shards --arch xcit_pico_6_p8 --batch_size_per_gpu 12"
TRAINING += " --epochs 2 --warmup_epochs 1 --lr 0.01 --log_every 1"
DINO = f"{TRAINING} --out_dim 32 --head_hidden_dim 16 --head_bottleneck_dim 8 --compile off"
DINO += " --global_crops_size 16 --local_crops_number 1 --local_crops_size 8 --knn_every 1"
SUPERVISED = f"{TRAINING} --input_size 16 --pretrained_weights run"
TEACHER = "--teacher_model xcit_pico_6_p8 --teacher_path tuned.pth"
GOES_ON = f"pretrain --output_dir run {DINO} --keep_checkpoints 1 --checkpoint_minutes 1e-9"
SUBJECT = f"--output_dir run {KEYS}"
AUGMENTED = "--protocol dino --batch_size_per_gpu 12"

COMMANDS = {  # name of a way to call a command -> words; ``own`` is a folder of that call alone
    "pretrain": GOES_ON,
    "pretrain from it": f"pretrain --output_dir own/new {DINO} --init_from run",
    "knn": f"knn {SUBJECT} --nb_knn 5",
    "knn, other crop": f"knn {SUBJECT} --nb_knn 5 3 --crop_size 8 --baselines",
    "linear": f"linear {SUBJECT} --epochs 2 --lrs 0.1 1",
    "linear, other lrs": f"linear {SUBJECT} --epochs 2 --lrs 0.2 2",
    "linear, dino": f"linear {SUBJECT} {AUGMENTED} --epochs 2 --lrs 0.1 1",
    "linear, dino, other lrs": f"linear {SUBJECT} {AUGMENTED} --epochs 3 --lrs 0.2 2",
    "evaluate": f"evaluate {SUBJECT} --pretrained_weights tuned.pth",
    "evaluate --head": f"evaluate {SUBJECT} --head run/linear_head.safetensors",
    "finetune": f"finetune {SUPERVISED}",
    "distill": f"distill {SUPERVISED} {TEACHER}",
    "attention": "attention photos own/maps --output_dir run --image_size 32 --device cpu",
    "embed": f"embed {SUBJECT} --examples 2",
    "embed, other seed": f"embed {SUBJECT} --examples 3 --seed 1",
    "watch": "watch run",
    "report": "report run",
    "report compare": "report compare run other",
    "weights extract": "weights extract run --output own/net.pth --prefix teacher",
    "weights convert": "weights convert run --output own/net.safetensors",
    "weights export": "weights export run --output own/handed.safetensors",
    "launch": f"launch --cluster debug --stages pretrain,knn {GOES_ON.removeprefix('pretrain ')}"
    " --knn.num_workers 0 --knn.nb_knn 5",
    "launch status": "launch status run",
    "launch logs": "launch logs run",
    "launch cancel": "launch cancel run",
}
OTHERS = {  # commands that are not here, and why
    "quickstart": "makes a run folder of its own and calls the commands above one by one",
    "shards make": "knows no run folder",
    "shards check": "knows no run folder",
    "shards demo": "knows no run folder",
    "recipe": "the same",
    "duplicates": "reads a run as embed does; test_duplicates.py",
    "masks": "reads a run as knn does; test_masks.py",
    "retrieve": "reads a run as embed does; test_retrieve.py",
    "propagate": "reads a run as embed does; test_propagate.py",
    "segment": "a training of its own folder, as finetune; test_segment.py",
    "detect": "a training of its own folder, as finetune; test_detect.py",
    "launch rehearse": "makes a run folder of its own, on a cluster",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-3000:]}"


def child(
    place: Path, words: str, own: Path, prepare: Callable[[], None] | None, gate: Any
) -> None:
    """What a process does: one command line, its output into files, its code that of the shell."""
    own.mkdir(parents=True, exist_ok=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{own}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(place)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    import torch

    from xcit_dino.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    if gate is not None:
        gate.wait(60)
    code = main(shlex.split(words.replace("own/", f"{own}/")))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def start(place: Path, words: str, own: str, prepare: Prepare = None, gate: Any = None) -> Any:
    """Start a command line at a place."""
    process = victims.SERVER.Process(target=child, args=(place, words, place / own, prepare, gate))
    process.start()
    return process


def ended(process: Any, place: Path, own: str) -> Ended:
    """Wait for its end."""
    code = victims.ended(process, 120)
    return Ended(code, *(Path(f"{place / own}.{name}").read_text() for name in ("out", "err")))


def alone(place: Path, words: str, own: str, prepare: Prepare = None) -> Ended:
    """One command line by itself."""
    return ended(start(place, words, own, prepare), place, own)


def at_once(place: Path, names: Iterable[str]) -> list[Ended]:
    """Calls of COMMANDS that begin at the same moment."""
    names = list(names)
    gate = victims.SERVER.Barrier(len(names))
    owns = [f"own-{number}" for number in range(len(names))]
    started = [
        start(place, COMMANDS[name], own, gate=gate) for name, own in zip(names, owns, strict=True)
    ]
    return [ended(process, place, own) for process, own in zip(started, owns, strict=True)]


# -- the place -------------------------------------------------------------------------------------


def build(place: Path) -> None:
    """Shards, photos, a finetuned file, and ``run``: half pretrained, evaluated, launched; a copy
    of it in ``kept``."""
    from PIL import Image

    from xcit_dino.data.pack.demo import make
    from xcit_dino.data.shards.config import DemoConfig

    make(DemoConfig(place / "shards", train=24, val=12, size=16))
    (place / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 40), (90 * number, 50, 200)).save(place / f"photos/{number}.png")
    launched = COMMANDS["launch"] + " --max_steps 2"
    done = [alone(place, launched, "own")]
    done.append(alone(place, COMMANDS["linear"], "own"))
    for log in (place / "run/launch/jobs/debug").iterdir():  # where local processes leave them
        log.rename(place / "run/launch/jobs" / log.name.rpartition("_0_")[0] / log.name)
    shutil.copytree(place / "run", place / "other")
    tuned = COMMANDS["finetune"] + " --output_dir tuned"
    done.append(alone(place, tuned, "own"))
    for each in done:
        assert each.code == 0, each.said
    newest = max((place / "tuned/checkpoints").glob("*.pth"))
    newest.rename(place / "tuned.pth")
    (place / "run").rename(place / "kept")


def renew(place: Path, kept: str = "kept") -> Path:
    """``run`` as it was, and nothing of earlier calls."""
    for path in (place / "run", *place.glob("own*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(place / kept, place / "run")
    return place / "run"


# -- what cannot be written to ---------------------------------------------------------------------


def read_only_by_mount(folder: Path) -> None:
    """Mount a folder read-only over itself, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, bind, remount, private, recursive, read_only = 0x20000, 4096, 32, 1 << 18, 16384, 1
    name = str(folder).encode()
    steps = [
        libc.unshare(new_mounts),
        libc.mount(None, b"/", None, private | recursive, None),
        libc.mount(name, name, None, bind, None),
        libc.mount(None, name, None, remount | bind | read_only, None),
    ]
    if any(steps):
        os._exit(SKIPPED)


def read_only_by_mode(folder: Path) -> None:
    """Take the permission to write away from all, and root's override of permissions."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        for number in (0, 1):  # effective, and permitted, which access(2) asks
            sets[number] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.capset(header, sets):
            os._exit(SKIPPED)


def contents(folder: Path, times: bool = True) -> dict[str, Any]:
    """Name -> checksum (a folder has none), and the time of the last change."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        checksum = digest(path) if path.is_file() else ""
        found[str(path.relative_to(folder))] = (checksum, path.stat().st_mtime_ns * times)
    return found


def digest(path: Path) -> str:
    """Checksum of a file without the moment that a page says it was written; of a checkpoint, whose
    options name its folder, that of its networks."""
    if path.name.startswith("checkpoint-") and path.suffix == ".pth":
        return networks(path)
    content = re.sub(rb"Written [^<]*|\d{4}-\d\d-\d\dT[\d:+]*", b"", path.read_bytes())
    return hashlib.sha256(content).hexdigest()


def networks(path: Path) -> str:
    """Checksum of a checkpoint's step and of all tensors that are part of a network."""
    import torch

    state = torch.load(path, weights_only=True)
    found = hashlib.sha256(str(state["step"]).encode())
    for name in ("student", "teacher", "loss", "model", "Student", "model_ema"):
        for key, value in sorted(state.get(name, {}).items()):
            found.update(f"{name} {key}".encode() + value.numpy().tobytes())
    return found.hexdigest()


@cache
def works(place: Path, prepare: Callable[[Path], None]) -> bool:
    """Whether a folder can be made read-only in this way here."""
    folder = place / "try"
    folder.mkdir()
    from functools import partial

    found = alone(place, "watch try", "own-try", partial(prepare, folder))
    shutil.rmtree(folder, ignore_errors=True)
    return found.code != SKIPPED
