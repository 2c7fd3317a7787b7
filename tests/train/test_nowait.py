"""A training step never waits for the device: all its operations, on CPUs, on two processes (in
test_sharding.py) and on a pretended GPU."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision

from tests import victims
from tests.nowait import NeverWaits, Waits, pretended_gpu
from xcit_dino.data.batch import Batch
from xcit_dino.data.config import CropsConfig
from xcit_dino.data.targets.loader import TargetBatch
from xcit_dino.eval.teacher import Loaded
from xcit_dino.inputs import InputSettings
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.ssl import pretrain
from xcit_dino.ssl import trainer as ssl_trainer
from xcit_dino.ssl.config import ObjectiveConfig, PretrainConfig
from xcit_dino.ssl.distillation import FrozenTeacher
from xcit_dino.ssl.schedule import DinoHyperparameters, EmaHyperparameters
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.supervised import targets, trainer
from xcit_dino.supervised import train as supervised
from xcit_dino.supervised.config import DistillConfig
from xcit_dino.supervised.data import LabeledData
from xcit_dino.supervised.detect import train as detecting
from xcit_dino.supervised.detect.config import DetectConfig
from xcit_dino.supervised.detect.data import Sample
from xcit_dino.supervised.detect.network import build_detector
from xcit_dino.supervised.distill import DistillationLoss, Teacher
from xcit_dino.supervised.segment import train as segmenting
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.data import Crop
from xcit_dino.supervised.segment.network import build_segmenter
from xcit_dino.supervised.targets import TargetData
from xcit_dino.train.distributed import dist
from xcit_dino.train.schedules import Hyperparameters as SupervisedHyperparameters

TORCH, TORCHVISION = (Path(module.__file__).parent for module in (torch, torchvision))
TINY = {
    "arch": "xcit_pico_6_p8", "drop_path_rate": 0.1, "out_dim": 64, "head_hidden_dim": 32,
    "head_bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16,
    "local_crops_number": 2, "compile": "off",
}  # fmt: skip
ONE_BAND = {
    "mean": (0.5,), "std": (0.2,), "window": (-200.0, 300.0), "color_jitter": (0.4, 0.4, 0.0, 0.0),
    "noise_prob": 0.5, "rot90_prob": 0.5,
}  # fmt: skip
PRETRAINING = {  # name -> (dtype, micro-batches, options)
    "fp32": (torch.float32, 1, {}),
    "fp16 with its scaler, two micro-batches": (torch.float16, 2, {"clip_grad": 0.3}),
    "backward by crop group": (torch.bfloat16, 2, {"group_backward": True}),
    "activations computed again": (
        torch.bfloat16, 1, {"grad_checkpointing": True, "group_backward": True}
    ),
    "no local crops, frozen last layer": (torch.float32, 1, {"local_crops_number": 0}),
    "batch-norm in the head": (torch.float32, 1, {"use_bn_in_head": True}),
    "prototypes with lengths, no clipping": (
        torch.float32, 1, {"norm_last_layer": False, "clip_grad": 0.0}
    ),
    "five bands of 12 bits, every augmentation": (torch.float32, 1, {
        "mean": (0.5,) * 5, "std": (0.2,) * 5, "window": (0.0, 4095.0), "rot90_prob": 0.75,
        "color_jitter": (0.4, 0.4, 0.0, 0.0), "channel_jitter": (0.2, 0.2), "noise_prob": 1.0,
        "channel_drop_prob": 0.4, "flip_prob": 0.5, "blur_prob": (1.0, 1.0, 1.0),
    }),
    "RGB of 12 bits, every augmentation": (torch.float32, 1, {
        "mean": (0.5,) * 3, "std": (0.2,) * 3, "window": (0, 4095, 1, 4000, 2, 4094),
        "rot90_prob": 0.75, "channel_jitter": (0.2, 0.2), "noise_prob": 1.0,
        "channel_drop_prob": 0.4, "gray_prob": 0.5, "solarize_prob": (0.5, 0.5, 0.5),
    }),
    "one band of int16": (torch.bfloat16, 1, ONE_BAND),
    "one band of float32": (torch.float32, 2, ONE_BAND),
    "Sinkhorn-Knopp and KoLeo": (
        torch.bfloat16, 2, {"centering": "sinkhorn_knopp", "koleo_weight": 0.1}
    ),
    "crops of a second stage": (torch.float32, 1, {
        "stage_scales": (1.0, 0.5), "stage_shares": (0.5, 0.5), "group_backward": True
    }),
    "frozen backbone": (torch.float32, 2, {"freeze_backbone": 1.0}),
    "batch-norm statistics kept, learning rates by layer": (
        torch.float32, 1, {"init_from": "w.pth", "freeze_batchnorm": True, "layer_decay": 0.75}
    ),
    "distilled": (torch.float16, 2, {"objective": "distill"}),
    "DINO and distilled": (
        torch.bfloat16, 1, {"objective": "dino+distill", "group_backward": True}
    ),
    "timm's network": (torch.float32, 1, {"arch": "timm/vit_tiny_patch16_224"}),
}  # fmt: skip
KEPT: list[object] = []  # what a pretended GPU's process must not free
SUPERVISED = {  # name -> options
    "mixed by batch": {"reprob": 0.5, "mixup": 0.8, "cutmix": 1.0},
    "mixed by pair": {"reprob": 0.0, "mixup": 0.8, "cutmix": 1.0, "mixup_mode": "pair"},
    "mixed by image": {"mixup": 0.8, "mixup_mode": "elem"},
    "erased only": {"reprob": 1.0, "remode": "const", "mixup": 0.0, "cutmix": 0.0},
    "mixed by batch, distilled, no average": {
        "reprob": 0.5, "mixup": 0.8, "model_ema_decay": 0.0, "distillation_type": "soft"
    },
    "distilled by first choices": {"distillation_type": "hard"},
}  # fmt: skip
SEGMENTING = {  # name -> options
    "frozen backbone, a grid of learning rates": {},
    "finetuned with UperNet": {"head": "upernet", "finetune": True, "lr": 1e-3},
}


def crops(number: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8 [number, 4, 3, size, size], channels last."""
    shape = (number, 4, size, size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)


def deep_crops(number: int, channels: int, size: int, device: torch.device) -> torch.Tensor:
    """int16 [number, 4, channels, size, size] of 12 bits."""
    shape = (number, 4, channels, size, size)
    return torch.randint(0, 4096, shape, dtype=torch.int16, device=device)


def pretraining_step(case: str, device: torch.device, watch: NeverWaits) -> dict:
    """A step of pretraining, the augmentation with it, under the eye of ``watch``."""
    dtype, micros, options = PRETRAINING[case]
    config = replace(PretrainConfig(), TINY | options)
    kind = torch.int16 if "int16" in case else torch.float32 if "of float32" in case else None
    with device, mock.patch.object(ssl_trainer, "frozen_teacher", frozen_teacher):
        trainer = set_up(config, dist.World(0, 1, device), dtype, "", 4)
    stages = [crops for _, crops in config.stages]
    batches = [
        pretraining_batch(trainer, micro, device, stages[-1], kind) for micro in range(micros)
    ]
    now = EmaHyperparameters(1e-2, 0.2, 0.9, freeze_backbone=case == "frozen backbone")
    if config.objective.dino:
        now = DinoHyperparameters(
            now.lr, now.weight_decay, now.momentum_teacher, 0.05, "frozen last" in case,
            freeze_backbone=now.freeze_backbone,
        )  # fmt: skip
    first = pretraining_batch(trainer, 0, device, stages[0], kind)
    pretrain.train_step(trainer, [first], now)  # makes the constants and the optimizer's state
    KEPT.append(trainer)
    with watch:
        return pretrain.train_step(trainer, batches, now)


def frozen_teacher(
    objective: ObjectiveConfig, crops: CropsConfig, _: object, ours: InputSettings, dtype: object
) -> tuple[FrozenTeacher, dict]:
    """A teacher of another size and normalization, whose weights need no file."""
    theirs = InputSettings(48, mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded = Loaded(create_model("xcit_pico_6_p8"), theirs, {})
    return FrozenTeacher(loaded, ours, crops.global_crops_size, dtype=dtype), {}


def pretraining_batch(
    trainer: DinoTrainer,
    micro: int,
    device: torch.device,
    geometry: CropsConfig | None = None,
    kind: torch.dtype | None = None,
) -> Batch:
    """A micro-batch as the loader gives it: crops, labels and recipes on the device.

    kind: of the values of images that are not 8-bit RGB, instead of uint16.
    """
    numbers = np.arange(4) + 4 * micro
    geometry, augment = geometry or trainer.config.crops, trainer.config.augment

    def some(number: int, size: int) -> torch.Tensor:
        if augment.window is None:
            return crops(number, size, device)
        values = deep_crops(number, augment.channels, size, device)
        return values.to(kind) if kind else values.view(torch.uint16)

    batch = Batch(
        0, micro, 0, numbers, numbers, torch.zeros(4, device=device, dtype=torch.int64),
        some(geometry.global_crops_number, geometry.global_crops_size),
        some(geometry.local_crops_number, geometry.local_crops_size),
    )  # fmt: skip
    return replaced(batch, recipes=trainer.augment.recipes(batch)).to(device)


def supervised_step(case: str, device: torch.device, watch: NeverWaits) -> dict:
    """A step of finetuning, or of distillation from a network with another normalization."""
    options = {"arch": "xcit_pico_6_p8", "input_size": 16, "precision": "fp32"}
    config = replace(DistillConfig(), options | SUPERVISED[case])
    world, data = dist.World(0, 1, device), LabeledData(Anything(), Anything(), 5)
    with device:
        model, other = (create_model("xcit_pico_6_p8", num_classes=5) for _ in range(2))
        teacher = Teacher(
            other, InputSettings(), InputSettings(24, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        )
        criterion = supervised.soft_cross_entropy
        if "distillation_type" in SUPERVISED[case]:
            criterion = DistillationLoss(teacher, config.teacher)
        method = trainer.Method("finetune", "model", criterion, {})
        training = trainer.set_up(config, method, model, data, world)
    numbers = np.arange(4)
    labels = torch.zeros(4, device=device, dtype=torch.int64)
    batch = Batch(0, 0, 0, numbers, numbers, labels, crops(1, 16, device), crops(0, 8, device))
    now = SupervisedHyperparameters(1e-3, 0.05)
    supervised.train_step(training, [batch], now)
    KEPT.append(training)
    with watch:
        return supervised.train_step(training, [batch], now)


def segmenting_step(case: str, device: torch.device, watch: NeverWaits) -> dict:
    """A step of segmentation, which copies its images itself, from page-locked memory."""
    options = {"arch": "xcit_pico_6_p8", "crop_size": 32, "precision": "fp32", "mean": (0.5,) * 3}
    config = replace(SegmentConfig(), options | {"std": (0.2,) * 3} | SEGMENTING[case])
    world, data = dist.World(0, 1, device), TargetData(Anything(), Anything(), [], Anything())
    backbone, _ = targets.build_backbone(config, config.segmentation, config.segmentation.finetune)
    model = build_segmenter(config, backbone, 3)
    optimizer = partial(segmenting.adamw, config)
    training = targets.set_up(config, "segmenter", model, optimizer, data, world)
    draws = np.random.default_rng(0)
    items = [
        Crop(
            draws.integers(0, 256, (32, 32, 3), np.uint8), draws.integers(0, 3, (32, 32), np.uint16)
        )
        for _ in range(4)
    ]
    batch = TargetBatch(0, 0, 0, np.arange(4), np.arange(4), items)
    now = SupervisedHyperparameters(1e-3, 0.05)
    step = partial(targets.train_step, segmenting.forward_backward, training, [batch])
    step(now)
    with watch:
        return step(now)


def detecting_step(device: torch.device, watch: NeverWaits) -> dict:
    """A step of detection with masks, which copies its images itself, as segmentation does."""
    options = {"arch": "xcit_pico_6_p8", "precision": "fp32", "masks": True, "fpn_dim": 16}
    options |= {"mean": (0.5,) * 3, "std": (0.2,) * 3, "roi_samples": 16}
    config = replace(DetectConfig(), options)
    world, data = dist.World(0, 1, device), TargetData(Anything(), Anything(), [], Anything())
    backbone, _ = targets.build_backbone(config, config.detection, finetune=True)
    model = build_detector(config.detection, backbone, 3)
    training = targets.set_up(config, "detector", model, detecting.adamw, data, world)
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 8:40, 8:40] = masks[1, 30:60, 20:50] = 1
    boxes = np.array([[8, 8, 40, 40], [20, 30, 50, 60]], np.float32)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    items = [Sample(image, boxes, np.arange(2), masks)] * 2
    batch = TargetBatch(0, 0, 0, np.arange(2), np.arange(2), items)
    now = SupervisedHyperparameters(1e-3, 0.05)
    step = partial(targets.train_step, detecting.forward_backward, training, [batch])
    step(now)
    with watch:
        return step(now)


class Anything:
    """An index of which the checksum alone matters."""

    checksum = ""


STEPS = {
    **{f"pretraining, {case}": (pretraining_step, case) for case in PRETRAINING},
    **{f"supervised, {case}": (supervised_step, case) for case in SUPERVISED},
    **{f"segmentation, {case}": (segmenting_step, case) for case in SEGMENTING},
}


@pytest.mark.parametrize("case", STEPS)
def test_no_operation_of_a_step_needs_the_host(case):
    step, name = STEPS[case]
    copied = name in ("mixed by pair", "mixed by image") or name in SEGMENTING  # by the step itself
    metrics = step(name, torch.device("cpu"), NeverWaits(numbers=copied))
    assert metrics["loss"].isfinite()


class OursNeverWaits(NeverWaits):
    """What torchvision does is counted instead."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Waits:
            files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            caller = next(file for file in reversed(files) if not file.is_relative_to(TORCH))
            if not caller.is_relative_to(TORCHVISION):
                raise
            self.waits += 1
            return func(*args, **(kwargs or {}))


def test_in_a_step_of_detection_torchvision_waits_and_nothing_else():
    """Which anchors match, are sampled and survive the suppression is known only to the device."""
    watch = OursNeverWaits(numbers=True)
    metrics = detecting_step(torch.device("cpu"), watch)
    assert metrics["loss"].isfinite() and watch.waits > 0


TRACED = (
    "pretraining, fp16 with its scaler, two micro-batches",
    "pretraining, activations computed again",
    "pretraining, five bands of 12 bits, every augmentation",
    "pretraining, Sinkhorn-Knopp and KoLeo",
    "pretraining, crops of a second stage",
    "pretraining, DINO and distilled",
    "supervised, mixed by batch, distilled, no average",
)


def on_a_pretended_gpu(case: str, file: str) -> None:
    """A step, and what the eye does not see there, in a process of its own."""
    torch.set_num_threads(1)
    gc.disable()
    step, name = STEPS[case]
    with pretended_gpu() as device, torch.autograd.set_multithreading_enabled(False):
        try:
            metrics = step(name, device, NeverWaits("gpu"))
            assert {value.device for value in metrics.values()} == {device}
            unseen = [name for name, work in WAITING_WORK.items() if not noticed(work, device)]
            found = f"unseen: {unseen}" if unseen else ""
        except Exception:
            found = traceback.format_exc()
        Path(file).write_text(found)
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACED)
def test_no_tensor_of_a_step_is_left_on_the_host(case, tmp_path):
    """Nor is there any other copy: all that a step computes lies on the device it is given."""
    file = tmp_path / "found"
    process = victims.SERVER.Process(target=on_a_pretended_gpu, args=(case, str(file)))
    process.start()
    assert victims.ended(process) == 0
    assert file.read_text() == ""


# -- the eye itself


def noticed(work: Callable[[torch.device], object], device: torch.device) -> bool:
    """Whether the eye sees that ``work`` waits."""
    try:
        with NeverWaits(device.type):
            work(device)
    except Waits:
        return True
    return False


ON_ANY_DEVICE = {
    "item": lambda d: torch.ones(1, device=d).item(),
    "truth": lambda d: bool(torch.ones(1, device=d)),
    "nonzero": lambda d: torch.ones(2, device=d).nonzero(),
    "mask": lambda d: torch.ones(2, device=d)[torch.ones(2, device=d) > 0],
    "masked assignment": lambda d: torch.ones(2, device=d).__setitem__(
        torch.ones(2, device=d) > 0, 1.0
    ),
    "masked_select": lambda d: torch.ones(2, device=d).masked_select(torch.ones(2, device=d) > 0),
    "unique": lambda d: torch.ones(2, device=d).unique(),
    "new tensor": lambda d: torch.tensor([1.0, 2.0], device=d),
    "repeat_interleave": lambda d: torch.ones(2, device=d).repeat_interleave(
        torch.ones(2, dtype=torch.int64, device=d)
    ),
}
WAITING_WORK = ON_ANY_DEVICE | {
    "list": lambda d: torch.ones(2, device=d).tolist(),
    "copy to the host": lambda d: torch.ones(2, device=d).cpu(),
    "copy from the host": lambda d: torch.ones(2).to(d, non_blocking=True),
    "a number on the host": lambda d: torch.ones(2, device=d) * torch.ones(()),
}


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
def test_the_eye_sees_what_waits(name):
    assert noticed(ON_ANY_DEVICE[name], torch.device("cpu"))
