"""Small training runs in separate processes, to be killed.

The processes come from a fork server that has imported torch once: a victim starts in a fraction of
a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.victims_imports"])

TINY = {
    "arch": "xcit_pico_6_p8", "drop_path_rate": 0.1, "out_dim": 32, "head_hidden_dim": 16,
    "head_bottleneck_dim": 8, "global_crops_size": 16, "local_crops_number": 1,
    "local_crops_size": 8, "batch_size_per_gpu": 4, "epochs": 4, "warmup_epochs": 1, "lr": 0.01,
    "num_workers": 0, "log_every": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip
STEPS = 20  # of a run with 20 images
FIRST = "checkpoint-00000005.pth"


def config(shards: Path, folder: Path, **options: Any) -> Any:
    """The options of a victim."""
    from xcit_dino.options import replace
    from xcit_dino.ssl.config import PretrainConfig

    return replace(PretrainConfig(), TINY | {"data_path": shards, "output_dir": folder} | options)


def train(
    options: dict[str, Any], rank: str, prepare: Callable[..., None] | None = None, *args: Any
) -> None:
    """What a victim does: the training of ``xcit-dino pretrain``, its output into a file.

    options: with ``entry``, "module:function" of another loop.
    prepare: called before it, in the process (to take something away from it).
    """
    if rank:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ |= dict(zip(names, re.findall(r"\d+", rank), strict=True))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    import torch

    from xcit_dino.cli import InputError, RunError, Stopped
    from xcit_dino.train import signals
    from xcit_dino.train.distributed import dist

    folder = Path(options["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    signals.install(signal.SIGTERM, signal.SIGINT)
    if prepare is not None:
        prepare(*args)
    module, _, name = options.pop("entry", "xcit_dino.ssl.pretrain:pretrain").partition(":")
    try:
        with dist.leaving():
            getattr(importlib.import_module(module), name)(config(**options))
    except (InputError, RunError, Stopped) as error:
        print(f"xcit-dino: {error}", flush=True)
        os._exit(2 if isinstance(error, InputError) else 1)
    except Exception:  # as the command ends: nothing is torn down that could wait for other ranks
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


# -- what befalls a victim from within; each is a ``prepare`` of :func:`start`


def at_step(step: int, action: Callable[..., None], *args: Any) -> None:
    """Let something happen just before step ``step`` (from 1) is computed."""
    from xcit_dino.ssl import pretrain

    inner = pretrain.train_step

    def train_step(trainer: Any, *rest: Any) -> Any:
        if trainer.state.step == step - 1:
            action(*args)
        return inner(trainer, *rest)

    pretrain.train_step = train_step  # type: ignore[assignment]


def after_saving(checkpoint: Path, action: Callable[..., None], *args: Any) -> None:
    """Let something happen once a checkpoint, which is written beside the steps, is whole."""
    wait_for(checkpoint.exists)
    action(*args)


def fill(file: Path) -> None:
    """Fill the disk with a file."""
    with open(file, "wb", buffering=0) as output, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while output.write(bytes(size)) == size:
                    pass


def without_privilege(step: int, folder: Path, mode: int) -> None:
    """Root heeds no permissions: give that up, then change a folder's at a step."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0
    at_step(step, after_saving, folder / FIRST, os.chmod, folder, mode)


def limit_memory() -> None:
    """Allow this process no more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def clock_back(seconds: float) -> None:
    """Let the clock of this process jump back."""
    inner = time.time
    time.time = lambda: inner() - seconds


def sleep_with_the_interpreters_lock(seconds: int) -> None:
    """As an extension that hangs without releasing Python's lock does."""
    ctypes.PyDLL(None).sleep(seconds)


def spoil(first: int, last: int, ranks: tuple[int, ...], until_rollbacks: int) -> None:
    """Infinite pixels in the views of some steps (from 1), while the run was rolled back less."""
    from xcit_dino.ssl.trainer import DinoTrainer

    inner = DinoTrainer.views

    def views(trainer: Any, batch: Any) -> Any:
        steps = first <= batch.step + 1 <= last and trainer.state.rollbacks < until_rollbacks
        factor = float("inf") if steps and trainer.world.rank in ranks else 1.0
        return [group * factor for group in inner(trainer, batch)]

    DinoTrainer.views = views


def spoil_gradients(first: int, last: int) -> None:
    """Infinite gradients in some steps, all else finite, as with too large a loss scale."""
    from xcit_dino.ssl.loss import DinoLoss
    from xcit_dino.ssl.trainer import DinoTrainer

    inner_views, inner_loss, steps = DinoTrainer.views, DinoLoss.forward, [0]

    def views(trainer: Any, batch: Any) -> Any:
        steps.append(batch.step + 1)
        return inner_views(trainer, batch)

    def loss(module: Any, *args: Any, **options: Any) -> Any:
        found = inner_loss(module, *args, **options)
        if first <= steps[-1] <= last:
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    DinoTrainer.views, DinoLoss.forward = views, loss


def die_in_write(number: int) -> None:
    """Let this process kill itself before the n-th call by which a checkpoint reaches the disk."""
    from xcit_dino.train import state

    left = [number]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    inner = state.Checkpoints._write

    def write(*args: Any) -> None:
        names = [(os, "fsync"), (os, "replace"), (Path, "unlink"), (os, "open")]
        before = [(place, name, getattr(place, name)) for place, name in names]
        for place, name, call in before:
            setattr(place, name, counted(call))
        try:
            inner(*args)
        finally:
            for place, name, call in before:
                setattr(place, name, call)

    state.Checkpoints._write = write


def start(folder: Path, shards: Path, *prepare: Any, rank: str = "", **options: Any) -> Any:
    """Start a victim; ``prepare`` is a function and its arguments, ``rank`` "0 of 2 at PORT"."""
    arguments = ({"folder": folder, "shards": shards} | options, rank, *prepare)
    process = SERVER.Process(target=train, args=arguments)
    process.start()
    return process


def kill_workers() -> None:
    """SIGKILL to the loader's workers, as from the kernel where memory runs out."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def full_between(first: int, last: int, file: Path) -> None:
    """A disk that is full for some steps."""
    at_step(first, fill, file)
    at_step(last, file.unlink)


def pause(until: Path) -> None:
    """Wait for a file, and say so with another."""
    until.with_name(f"{until.name}.awaited").touch()
    wait_for(until.exists, 500)


def ended(process: Any, seconds: float = 400) -> int:
    """Wait for a victim's end; its exit code, negative for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end after {seconds} s")
    return process.exitcode


def said(folder: Path) -> str:
    """What all victims of a folder printed."""
    path = Path(f"{folder}.log")
    return path.read_text() if path.is_file() else ""


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, of steps alone."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if "loss" in line]


def steps_done(folder: Path) -> int:
    """The last step in the metrics, which may be half-written."""
    path = folder / "metrics.jsonl"
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.005)


def final_bits(folder: Path) -> dict[str, Any]:
    """Everything the newest checkpoint of a run holds that two equal runs share."""
    from xcit_dino.train.state import load_checkpoint, newest_checkpoint

    path = newest_checkpoint(folder)
    assert path is not None
    state = load_checkpoint(path)
    return {k: v for k, v in state.items() if k != "config"}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_nothing_lost(run: Path, whole: Path) -> None:
    """The weights are equal bit for bit, every step is in the metrics once, with the same loss."""
    assert same(final_bits(run), final_bits(whole))
    found, expected = lines(run), lines(whole)
    assert [line["step"] for line in found] == list(range(1, len(expected) + 1))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left


def finish(run: Path, shards: Path, **options: Any) -> None:
    assert ended(start(run, shards, **options)) == 0, said(run)


def on_two_processes(words: list[str], folder: Path) -> None:
    """Run a command on two processes, which must both end well; their output goes to ``folder``."""
    port = 41_000 + os.getpid() % 20_000
    ranks = [SERVER.Process(target=_one_of_two, args=(n, port, words, folder)) for n in (0, 1)]
    for rank in ranks:
        rank.start()
    ends = [ended(rank) for rank in ranks]
    assert ends == [0, 0], "\n".join((folder / f"{n}.log").read_text() for n in (0, 1))


def _one_of_two(rank: int, port: int, words: list[str], folder: Path) -> None:
    import torch

    from xcit_dino.cli import main
    from xcit_dino.train.distributed import dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = main(words)
    dist.shutdown()
    raise SystemExit(code)
