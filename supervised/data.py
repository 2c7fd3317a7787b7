"""Labeled shards -> augmented, mixed batches, for supervised training.

The loader of pretraining cuts one RandomResizedCrop per image, so that order, resumption,
quarantine and remote shards are the same. Its workers then run timm's own PIL operations on the
crop (:class:`HostAugment`): they define RandAugment, and rewriting fifteen of them for the device
would save little compared with decoding. Erasing and mixing work on normalized batches and run on
the device (:class:`DeviceAugment`).

timm draws from the global generators of random, numpy and torch. They are reseeded for each image
from (seed, epoch, sample, copy), or for each micro-batch from (seed, step, micro, rank), so that no
generator state has to be saved.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xcit_dino.data.augment import normalize
from xcit_dino.data.loader import Batch
from xcit_dino.data.native.scaling import check_same_form
from xcit_dino.data.packed import to_device
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.plan import Plan, Subset
from xcit_dino.data.rng import random_bits
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.data.workers import Task
from xcit_dino.errors import InputError
from xcit_dino.eval.features import count_classes
from xcit_dino.eval.scores.few import check_classes, draw
from xcit_dino.supervised.config import FinetuneConfig, RegularizationConfig
from xcit_dino.train.distributed import dist

HOST_STREAM, ERASE_STREAM, MIX_STREAM = 21, 22, 23
SETS = {"tweights", "t3a", "t3aw"}  # of operations, that RandAugment can draw from


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's, but 0 bits or fewer still give a black image, which Pillow 13 refuses."""
    if bits_to_keep > 0:
        return auto_augment.posterize(image, bits_to_keep)
    return Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP |= {
    name: posterize
    for name, operation in auto_augment.NAME_TO_OP.items()
    if operation is auto_augment.posterize
}


@dataclass(frozen=True)
class LabeledData:
    """Training and validation images that belong together."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int
    form: PixelFormat = RGB8
    """What the images are, once ``--bands`` are picked."""


def open_data(config: FinetuneConfig) -> LabeledData:
    """The two splits of ``--data_path``.

    Raises:
        InputError: a split is missing, images have no labels, or the splits have different classes.
    """
    path = config.loader.data_path
    if path is None:
        raise InputError("--data_path is missing: the folder that xcit-dino shards make wrote")
    train, val = (ShardIndex.load(resolve_split(path, split)) for split in ("train", "val"))
    dist.refuse_other_data(train.checksum + val.checksum, path)
    check_same_form(train, val)
    form = train.pixels.select(config.loader.bands)
    return LabeledData(train, val, count_classes(train, val), form)


def plan_of(config: FinetuneConfig, train: ShardIndex, global_batch: int) -> Plan:
    """The order of the samples, each ``repeated_aug`` times in a global batch; of few labels that
    of the drawn ones, the first draw of ``knn`` with the same seed."""
    few, options = config.few, {
        "seed": config.run.seed, "batch_size": global_batch,
        "window": config.loader.shuffle_window, "last_batch": config.loader.last_batch,
        "repeats": config.regularization.repeated_aug,
    }  # fmt: skip
    if not few.labels_per_class:
        return Plan(train.counts, checksum=train.checksum, **options)
    labels = np.asarray(train.labels, np.int64)
    check_classes(labels, few.labels_per_class)
    return Subset(draw(labels, few.labels_per_class, few.draw_seed, 0), train, **options)


class HostAugment:
    """Flip and timm's automatic augmentation, or color jitter, applied to crops in the worker; to
    images that are not 8-bit RGB the flip alone.

    Raises:
        InputError: timm has no such policy, or would ignore a part of it.
    """

    def __init__(self, config: RegularizationConfig, seed: int, form: PixelFormat = RGB8):
        self.hflip, self.seed = config.hflip, seed
        self.transform = None
        if not form.is_rgb8:
            return
        mean, std = config.normalization
        try:
            refuse_ignored(config.aa)
            _, self.transform, _ = create_transform(  # pyright: ignore
                config.input_size,
                is_training=True,
                separate=True,  # crop and flip, what we want, tensor and normalization
                auto_augment=None if config.aa in ("", "none") else config.aa,
                color_jitter=config.color_jitter,
                interpolation="bicubic",
                mean=mean,
                std=std,
            )
            refuse_too_many(self.transform)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"--aa {config.aa}: timm has no such policy ({error or 'unknown'}); "
                "write rand-m9-mstd0.5-inc1, or none"
            ) from error

    def __call__(self, views: list[Tensor], task: Task) -> None:
        """Change the crops [1, B, C, S, S] in place; 8-bit RGB lies channels last."""
        bits = random_bits(self.seed, HOST_STREAM, task.epoch, task.samples)
        for crop, seed in zip(views[0][0], bits, strict=True):
            seed_everything(seed)
            if self.transform is None:
                if random.random() < self.hflip:
                    values = crop.numpy()  # torch does not flip uint16
                    values[:] = values[..., ::-1].copy()
                continue
            pixels = crop.permute(1, 2, 0).numpy()
            image = Image.fromarray(pixels)
            if random.random() < self.hflip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            np.copyto(pixels, np.asarray(self.transform(image)))


def refuse_ignored(policy: str) -> None:
    """Raise ValueError for a part of a policy that timm would silently ignore."""
    name, *parts = policy.split("-")
    for part in parts:
        known = re.fullmatch(r"[a-z]+\d.*", part) and not part.startswith("t")
        if not known and not (name == "rand" and part in SETS):
            raise ValueError(f"it would ignore {part!r}")


def refuse_too_many(transform: Any) -> None:
    """Raise ValueError if a policy draws more distinct operations than it has."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.RandAugment) and step.choice_weights is not None:
            if step.num_layers > len(step.ops):
                raise ValueError(f"n{step.num_layers}, of {len(step.ops)} operations")


class DeviceAugment:
    """Normalize, erase and mix a micro-batch of crops and labels, ready for network and loss."""

    def __init__(self, config: FinetuneConfig, num_classes: int, world: dist.World):
        options = config.regularization
        self.seed, self.num_classes, self.world = config.run.seed, num_classes, world
        self.smoothing, self.normalization = options.smoothing, options.normalization
        self.window = options.window_bounds
        self.erase = RandomErasing(
            options.reprob, mode=options.remode, max_count=options.recount, device=str(world.device)
        )
        self.mix = None
        if options.mixes:
            self.mix = Mixup(
                options.mixup,
                options.cutmix,
                prob=options.mixup_prob,
                switch_prob=options.mixup_switch_prob,
                mode=options.mixup_mode,
                label_smoothing=options.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(float32 [B, C, S, S], soft labels [B, classes]), on the device."""
        device = self.world.device
        images = batch.global_crops[0].to(device, non_blocking=True)
        images = normalize(images, *self.normalization, *self.window)
        labels = batch.labels.to(device, non_blocking=True)
        if self.erase.probability > 0:
            bits = random_bits(self.seed, ERASE_STREAM, batch.epoch, batch.samples)
            for image, seed in zip(images, bits, strict=True):
                seed_everything(seed)
                self.erase(image)
        if self.mix is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        keys = (self.seed, MIX_STREAM, batch.step, batch.micro, self.world.rank)
        seed_everything(random_bits(*keys)[0])
        with QueuedTensors():
            return self.mix(images, labels)


class QueuedTensors(TorchFunctionMode):
    """Inside, ``torch.tensor(array, device=..., dtype=...)`` does not wait for the device.

    timm creates the labels' weights with it if mixing parameters are drawn per image or pair.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **kwargs)
        (array,) = args
        return to_device(
            torch.from_numpy(array).to(kwargs["dtype"]), torch.device(kwargs["device"])
        )


def seed_everything(bits: NDArray[np.uint64] | np.uint64) -> None:
    """Seed the generators that timm draws from."""
    number = int(bits)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)
