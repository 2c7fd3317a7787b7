"""The operations of a training step on a GPU that is not there: what each computes, reads, writes.

The real step (``ssl/pretrain.py``) runs on torch's fake tensors: shapes, dtypes and devices without
memory or arithmetic. A dispatch mode sees every operation, and counts multiplications and additions
by torch's own formulas, and bytes by the sizes of what is read and written. Operations of the
backward pass belong to the part of the network whose forward pass made their autograd node.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.contestants import GLOBAL_CROPS, NOW
from xcit_dino.data import augment
from xcit_dino.data.batch import Batch
from xcit_dino.options import replace as with_options
from xcit_dino.ssl import diagnostics, fused_loss, pretrain
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.loss import DinoLoss
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.train.distributed import dist

UPDATE, LOSS = "clipping, AdamW, moving average", "prototypes and loss"
AUGMENTATION, DIAGNOSTICS = "augmentation", "diagnostics"
PARTS = {  # pattern of a module's name in a network -> part of the step; the first that fits
    r"backbone\.patch_embed": "patch embedding",
    r"backbone\.blocks\.\d+\.attn": "cross-covariance attention",
    r"backbone\.blocks\.\d+\.local_mp": "local patch interaction",
    r"backbone\.blocks\.\d+\.mlp": "MLPs",
    r"backbone\.blocks\.\d+": "norms and residuals",
    r"backbone": "class attention, positions",
    r"head\.last_layer|loss": LOSS,
    r"head|": "head's MLP",
}
COMPILED = r"backbone\.blocks\.\d+"  # what torch.compile sees
FREE = {  # operations that touch no memory, beside views
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "_unsafe_view", "_reshape_alias", "lift_fresh", "set_",
}  # fmt: skip
WRITES_ONLY = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "fill_",
               "zero_", "ones", "ones_like", "arange", "bernoulli_"}  # fmt: skip
OWN_KERNELS = ("_fused_", "_foreach_", "index", "native_batch_norm", "cudnn_batch_norm", "sort")
READ_TWICE = ("batch_norm",)  # statistics first, then the normalization


@dataclass(frozen=True)
class Kernel:
    """One operation of torch.

    part: of the step; backward: of a backward pass; compiled: inside of what torch.compile sees;
    flops: of products and convolutions, in ``dtype``; reads, writes: number of a tensor's memory ->
    bytes; fusible: the compiler joins it with its neighbors.
    """

    part: str
    backward: bool
    compiled: bool
    name: str
    flops: int
    dtype: torch.dtype
    reads: dict[int, int]
    writes: dict[int, int]
    fusible: bool


class Recorder(TorchDispatchMode):
    """Inside, every operation that touches memory becomes a :class:`Kernel`.

    names: of the modules whose operations are told apart.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.kernels: list[Kernel] = []
        self.places: list[str] = [UPDATE]
        self.of_node: dict[int, str] = {}
        # keeps storages, so that no address comes again; held tensors would be copied by autograd
        self.memory: dict[int, tuple[int, Any]] = {}

    def __enter__(self) -> Recorder:
        before = hooks.register_module_forward_pre_hook(self._enter)
        after = hooks.register_module_forward_hook(self._leave)
        self.handles = before, after
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: object) -> None:
        self.places.append(self.names.get(module, self.places[-1]))

    def _leave(self, *_: object) -> None:
        self.places.pop()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Operations inside, where they are in none of the modules, belong to ``place``."""
        self.places.append(place)
        try:
            yield
        finally:
            self.places.pop()

    def inside(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """``function`` in :meth:`at`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.at(place):
                return function(*args, **kwargs)

        return wrapped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        if node is None:
            place = self.places[-1]
            # the newest node is this operation's, or that of one before
            self.of_node.setdefault(torch.autograd._get_sequence_nr() - 1, place)
        else:
            place = self.of_node.get(node._sequence_nr(), UPDATE)  # sums of gradients
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not (func.is_view or name in FREE):
            self._record(func, name, place, node is not None, args, kwargs, result)
        return result

    def _record(
        self, func: Any, name: str, place: str, backward: bool, args: Any, kwargs: Any, result: Any
    ) -> None:
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        changed = [x for argument, x in given if argument.is_write]
        inputs = [x for argument, x in given if not (argument.is_write and argument.is_out)]
        counter = flop_registry.get(func._overloadpacket)
        flops = counter(*args, **kwargs, out_val=result) if counter else 0
        if name == "convolution_backward":  # torch's formula takes a depthwise one for a full one
            grad, _, weight, *_, wanted = args
            flops = 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
        reads = {} if name in WRITES_ONLY else self._bytes(inputs)
        if any(word in name for word in READ_TWICE):
            reads = {key: 2 * size for key, size in reads.items()}
        tensors = [x for x in pytree.tree_leaves((result, changed)) if isinstance(x, Tensor)]
        if not tensors:
            return  # a question about shapes or dtypes
        self.kernels.append(
            Kernel(
                part_of(place), backward, bool(re.match(COMPILED, place)), name, flops,
                tensors[0].dtype, reads,
                self._bytes([changed, result]), not flops and not name.startswith(OWN_KERNELS),
            )
        )  # fmt: skip

    def _bytes(self, nest: Any) -> dict[int, int]:
        """Memory of all tensors of a nest -> bytes that they cover, each element once."""
        found: dict[int, int] = {}
        seen: set[tuple[Any, ...]] = set()
        for x in pytree.tree_leaves(nest):
            if not isinstance(x, Tensor) or not x.numel():
                continue
            storage = x.untyped_storage()
            key, _ = self.memory.setdefault(storage._cdata, (len(self.memory), storage))
            view = (key, x.storage_offset(), x.shape, x.stride())
            sizes = [s for s, step in zip(x.shape, x.stride(), strict=True) if step]
            if view not in seen:
                seen.add(view)
                found[key] = found.get(key, 0) + int(np.prod(sizes, dtype=np.int64)) * x.itemsize
        return found


def part_of(place: str) -> str:
    """The part of the step to which a module, or a stretch of the step, belongs."""
    if place in (UPDATE, AUGMENTATION, DIAGNOSTICS):
        return place
    return next(part for pattern, part in PARTS.items() if re.match(pattern, place))


def step_kernels(args: argparse.Namespace) -> list[Kernel]:
    """The operations of one step of pretraining with uint8 crops, in order.

    They are recorded in a process of its own that frees nothing, where torch may crash.

    args: arch, batch_size, prototypes, local_crops, global_size, local_size; optionally options,
    a dictionary of further ones.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_kernels, args=(args, theirs))
    process.start()
    theirs.close()
    kernels = ours.recv()
    process.join()
    return kernels


def _send_kernels(args: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(1)
    gc.disable()
    try:
        pipe.send(recorded(args))
    finally:
        sys.stderr.flush()
        os._exit(0)


KEPT: list[object] = []  # what is not to be freed


def recorded(args: argparse.Namespace) -> list[Kernel]:
    """See :func:`step_kernels`."""
    values = {
        "arch": args.arch, "out_dim": args.prototypes, "drop_path_rate": 0.0, "compile": "off",
        "global_crops_size": args.global_size, "local_crops_size": args.local_size,
        "local_crops_number": args.local_crops, "clip_grad": 3.0,
    }  # fmt: skip
    config = with_options(PretrainConfig(), values | getattr(args, "options", {}))
    device = torch.device("cpu")
    recipes = augment.Augment(config.augment, seed=0).recipes(batch_on("meta", args))
    with pretended_gpu():
        trainer = set_up(config, dist.World(0, 1, device), torch.bfloat16, "", args.batch_size)
        block = torch.empty(recipes.block.shape, dtype=torch.uint8, device=device)
        batch = replace(batch_on(device, args), recipes=replace(recipes, block=block))
        pretrain.train_step(trainer, [batch], NOW)  # makes the optimizer's state
        recorder = Recorder(names_of(trainer))
        KEPT.extend((trainer, batch, recorder))
        with recorded_stretches(recorder), recorder:
            pretrain.train_step(trainer, [batch], NOW)
    return recorder.kernels


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Fake tensors, with as many prototypes at a time as on a GPU.

    torch's autograd has no backward pass of fake CUDA tensors without CUDA, so they are a CPU's.
    Autocast rounds the same operations on both: products, convolutions and linear layers here.
    """
    with (
        warnings.catch_warnings(action="ignore", category=UserWarning),  # copies look at addresses
        mock.patch.dict(fused_loss.SCORES_AT_ONCE, cpu=fused_loss.SCORES_AT_ONCE["cuda"]),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),  # it is there
        mock.patch.object(augment, "channel_constants", augment.channel_constants.__wrapped__),
        torch.autograd.set_multithreading_enabled(False),  # this thread alone is watched
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def recorded_stretches(recorder: Recorder) -> Iterator[None]:
    """Tell apart what of a step is in no module."""
    targets = recorder.inside(DinoLoss.targets, "loss")
    views = recorder.inside(DinoTrainer.views, AUGMENTATION)
    health = recorder.inside(diagnostics.health, DIAGNOSTICS)
    with (
        mock.patch.object(DinoLoss, "targets", targets),
        mock.patch.object(DinoTrainer, "views", views),
        mock.patch.object(diagnostics, "health", health),
    ):
        yield


def names_of(trainer: DinoTrainer) -> dict[nn.Module, str]:
    """Names of the modules, the same in student and teacher."""
    found: dict[nn.Module, str] = {}
    for net in (trainer.student, trainer.teacher):
        found |= {module: name for name, module in net.named_modules()}
    return found if trainer.loss is None else found | {trainer.loss: "loss"}


def batch_on(device: Any, args: argparse.Namespace) -> Batch:
    """A micro-batch as the loader gives it, without content."""
    numbers = np.arange(args.batch_size)
    crops = [
        torch.empty(number, args.batch_size, side, side, 3, dtype=torch.uint8, device=device)
        for number, side in ((GLOBAL_CROPS, args.global_size), (args.local_crops, args.local_size))
    ]
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
    large, small = (x.permute(0, 1, 4, 2, 3) for x in crops)
    return Batch(0, 0, 0, numbers, numbers, labels, large, small)
