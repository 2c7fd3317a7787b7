"""For every command a quick base command line, and for every option another value of it.

An option that is not in these tables fails test_options.py, and so does one value of a choice that
is not told from the others.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from tests.turning import Turn, refused, turn

Cases = dict[str, list[Turn]]
ARCH = "xcit_pico_6_p16"

BASES: dict[str, dict[str, str]] = {
    "quickstart": {"output_dir": "new", "data_path": "data"},
    "shards make": {"src": "photos", "dst": "new", "num_workers": "1"},
    "shards check": {"dst": "data", "num_workers": "1"},
    "shards demo": {"dst": "new", "train": "6", "val": "3"},
    "recipe": {
        "shards": "data", "out": "new.yaml", "num_workers": "0", "precision": "fp32",
        "device": "cpu",
    },
    "pretrain": {
        "output_dir": "new", "data_path": "data", "arch": ARCH, "epochs": "2",
        "batch_size_per_gpu": "8", "warmup_epochs": "1", "lr": "0.01", "out_dim": "32",
        "head_nlayers": "2", "head_hidden_dim": "16", "head_bottleneck_dim": "8",
        "global_crops_size": "32", "local_crops_size": "16", "local_crops_number": "2",
        "num_workers": "0", "precision": "fp32", "device": "cpu", "log_every": "1",
        "knn_every": "0", "shuffle_window": "2", "norm_last_layer": "true",
        "use_bn_in_head": "false", "momentum_teacher": "0.9", "compile": "off",
    },
    "finetune": {
        "output_dir": "new", "data_path": "data", "arch": ARCH, "epochs": "2",
        "batch_size_per_gpu": "8", "warmup_epochs": "1", "lr": "0.01", "input_size": "32",
        "num_workers": "0", "precision": "fp32", "device": "cpu", "log_every": "1",
        "eval_every": "0", "shuffle_window": "2", "repeated_aug": "1", "model_ema_decay": "0.9",
    },
    "knn": {
        "output_dir": "run", "num_workers": "0", "precision": "fp32", "device": "cpu",
        "nb_knn": "5 10",
    },
    "linear": {
        "output_dir": "run", "num_workers": "0", "precision": "fp32", "device": "cpu",
        "epochs": "3", "lrs": "0.1 1", "layers": "cls cls2",
        "holdout": "0.3", "batch_size_per_gpu": "8",
    },
    "evaluate": {"output_dir": "tuned", "num_workers": "0", "precision": "fp32", "device": "cpu"},
    "attention": {"src": "photo/a.png", "dst": "new", "output_dir": "run", "device": "cpu",
                  "image_size": "64"},
    "embed": {"dst": "new", "output_dir": "run", "num_workers": "0", "precision": "fp32",
              "device": "cpu", "examples": "2"},
    "duplicates": {"dst": "new", "output_dir": "run", "num_workers": "0", "precision": "fp32",
                   "device": "cpu", "examples": "2"},
    "masks": {"output_dir": "run", "data_path": "masked", "num_workers": "0", "precision": "fp32",
              "device": "cpu", "image_size": "320"},
    "retrieve": {
        "output_dir": "run", "bank": "photos/train", "device": "cpu", "image_size": "32",
        "k": "3", "examples": "2",
    },
    "propagate": {
        "output_dir": "run", "videos": "video/davis", "device": "cpu", "image_size": "32",
        "n_last_frames": "2", "size_mask_neighborhood": "1", "topk": "2",
    },
    "watch": {"run": "run"},
    "report": {"runs": "run", "pictures": "false"},
    "report compare": {"runs": "tuned other"},
    "weights extract": {"checkpoint": "tuned.pth", "output": "new.pth", "prefix": "model"},
    "weights convert": {"checkpoint": "tuned.pth", "output": "new.safetensors"},
    "weights export": {"checkpoint": "tuned.pth", "output": "new.safetensors"},
    "launch status": {"run": "launched"},
    "launch logs": {"run": "launched"},
    "launch rehearse": {"cluster": "slurm", "dry_run": "true"},
    "launch cancel": {"run": "launched"},
}  # fmt: skip
BASES["distill"] = BASES["finetune"] | {
    "teacher_model": ARCH, "teacher_path": "tuned.pth", "teacher_size": "32"
}  # fmt: skip


BASES["segment"] = {
    "output_dir": "new", "data_path": "masked", "arch": ARCH, "epochs": "2",
    "batch_size_per_gpu": "4", "warmup_epochs": "1", "crop_size": "32", "num_workers": "0",
    "precision": "fp32", "device": "cpu", "log_every": "1", "shuffle_window": "2",
}  # fmt: skip


BASES["detect"] = {
    "output_dir": "new", "data_path": "boxed", "arch": ARCH, "epochs": "2",
    "batch_size_per_gpu": "4", "warmup_epochs": "1", "long_side": "48",
    "eval_side": "32", "fpn_dim": "8", "roi_samples": "16", "anchor_sizes": "8 16 24 32 48",
    "num_workers": "0", "precision": "fp32", "device": "cpu", "log_every": "1",
    "shuffle_window": "2",
}  # fmt: skip


# -- what befalls a command ------------------------------------------------------------------------


def skipping(patch: pytest.MonkeyPatch) -> None:
    """Every step's gradients are taken for non-finite ones."""
    from xcit_dino.train import optim

    patch.setattr(optim, "step_unless_nonfinite", lambda *_: torch.tensor(1.0))


def slow(patch: pytest.MonkeyPatch) -> None:
    """Steps take a third of a second."""
    from xcit_dino.train import optim

    inner = optim.step_unless_nonfinite

    def late(*given: Any) -> Any:
        time.sleep(0.3)
        return inner(*given)

    patch.setattr(optim, "step_unless_nonfinite", late)


def ending(patch: pytest.MonkeyPatch) -> None:
    """A process that ends itself is seen to do so, and goes on."""
    slow(patch)

    def leave(code: int) -> None:
        print(f"ended with {code}")

    patch.setattr(os, "_exit", leave)
    patch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)


def collapsing(patch: pytest.MonkeyPatch) -> None:
    """The alarm for collapse rings at the second step."""
    from xcit_dino.ssl import diagnostics

    patch.setattr(diagnostics, "patience", lambda *_: 1)
    inner = diagnostics.health

    def flat(*given: Any) -> dict[str, torch.Tensor]:
        found = inner(*given)
        return found | {
            name: torch.zeros(()) for name in ("feature_std", "effective_rank") if name in found
        }

    patch.setattr(diagnostics, "health", flat)


def measured(patch: pytest.MonkeyPatch) -> None:
    """A machine of a known speed with nothing else to do."""
    from xcit_dino.ssl.recipe import recipe

    patch.setattr(recipe, "images_per_second", lambda config: 50.0)
    patch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def following(patch: pytest.MonkeyPatch) -> None:
    """The stage goes on, and whether its log is followed is printed."""
    from xcit_dino.slurm import attempts, status

    patch.setattr(status, "owner", lambda run: "somebody")
    patch.setattr(attempts.Record, "finished", property(lambda known: False))
    patch.setattr(status.watch, "show", lambda run, stage, job, active, rank: print(active()))


# -- training --------------------------------------------------------------------------------------

W = {"shows": "weights"}
NO_GPU = [
    refused("cuda", by="no GPU is visible"),
    refused("mps", by="this torch sees no GPU of a Mac"),
]
URL = "file://{here}/data/train"

BANDS = {"data_path": "bands"}
CACHED = {"shard_url": URL, "cache_dir": "copies"}

RUN: Cases = {
    "output_dir": [turn("elsewhere", shows="files")],
    "epochs": [turn("3", shows="metrics")],
    "batch_size_per_gpu": [turn("4", **W)],
    "accum_iter": [turn("2", **W)],
    "seed": [turn("1", "7", **W)],
    "precision": [turn("bf16", **W), refused("fp16", by="needs a GPU")],
    "device": NO_GPU,
    "fsdp": [turn("true", shows="printed")],
    "saveckp_freq": [turn("1", shows="files", given={"keep_checkpoints": "1"})],
    "keep_checkpoints": [turn("1", shows="files")],
    "checkpoint_minutes": [turn("1e-9", shows="files", given={"keep_checkpoints": "9"})],
    "log_every": [turn("2", shows="metrics")],
    "logger": [
        turn("mlflow", shows="files"),
        turn("tensorboard", shows="files", given={"logger": "mlflow"}),
    ],
    "max_skipped": [turn("1", shows="printed", within=skipping)],
    "on_nonfinite": [turn("stop", shows="printed", within=skipping, given={"max_skipped": "1"})],
    "watchdog_minutes": [turn("0.002", shows="files", within=slow)],
    "on_stall": [
        turn("abort", shows="printed", within=ending, given={"watchdog_minutes": "0.001"})
    ],
    "max_steps": [turn("1", shows="files")],
    "may_change": [turn("lr", shows="code", before={"lr": "0.02"})],
    "arch": [turn("xcit_pico_6_p8", "xcit_nano_12_p16", **W)],
    "drop_path_rate": [turn("0.5", **W)],
    "lr": [turn("0.02", **W)],
    "min_lr": [turn("0.005", **W)],
    "warmup_epochs": [turn("0", **W)],
    "warmup_lr": [turn("0.005", **W)],
    "weight_decay": [turn("0.5", **W)],
    "weight_decay_end": [turn("0.9", **W)],
    "clip_grad": [turn("0.01", **W)],
    "layer_decay": [turn("0.5", **W)],
    "data_path": [turn("data2", **W)],
    "shard_url": [refused(URL + "x", by="--max_bad_fraction")],
    "num_workers": [turn("1", shows="calls")],
    "prefetch_factor": [turn("3", shows="calls", given={"num_workers": "1"})],
    "shuffle_window": [turn("1", **W)],
    "last_batch": [turn("wrap", shows="metrics")],
    "bands": [
        turn("4 3 2", "2 3 4", "1", **W, given=BANDS),
        refused("4 6", by="channels 1 to 5", given=BANDS),
        refused("1", by="8-bit RGB"),
    ],
    "window": [
        turn("0 200", **W),
        refused("9 3", by="must be below"),
        turn("0 p90", "p10 p90", f"{'0 4000 ' * 4}0 2000", **W, given=BANDS),
        refused("0 9 0 9 0 9 0 9 0 90", by="none of the values", given=BANDS),
    ],
    "max_bad_fraction": [turn("1", shows="code", given={"data_path": "broken"})],
    "cache_dir": [turn("copies", shows="files", given={"shard_url": URL})],
    "cache_gb": [
        turn("0.0001", shows="files", given=CACHED | {"shuffle_window": "1"}),
        refused("1e-6", by="--cache_gb", given=CACHED),
    ],
    "decoder": [refused("cuda", by="--decoder")],
    "config": [turn("recipe.yaml", **W)],
}

TEACHER = {"teacher_model": ARCH, "teacher_path": "tuned.pth", "teacher_size": "32"}
NO_HEAD = {  # the recipe's own: others are refused where there is no head
    "out_dim": "65536", "head_nlayers": "3", "head_hidden_dim": "2048",
    "head_bottleneck_dim": "256",
}  # fmt: skip
DISTILLED = {"objective": "distill"} | TEACHER | NO_HEAD
BOTH = {"objective": "dino+distill"} | TEACHER
FROM_RUN = {"init_from": "run"}
PRETRAIN: Cases = RUN | {
    "objective": [turn("dino+distill", **W, given=DISTILLED),
                  turn("distill", **W, given=BOTH | NO_HEAD)],
    "teacher_model": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8", given=DISTILLED),
                      refused("resnet18", by="--teacher_model or the file", given=DISTILLED),
                      refused(ARCH, by="--objective dino")],
    "teacher_path": [turn("tuned2.pth", **W, given=DISTILLED), refused("tuned.pth", by="dino")],
    "teacher_size": [turn("48", **W, given=DISTILLED)],
    "distill_weight": [turn("3", **W, given=BOTH), refused("3", by="weight", given=DISTILLED)],
    "distill_patch_weight": [turn("0", "3", **W, given=DISTILLED)],
    "init_from": [turn("run", "other", "tuned.pth", **W)],
    "new_head": [turn("true", **W, given={"init_from": "run"})],
    "freeze_batchnorm": [turn("true", **W, given=FROM_RUN)],
    "freeze_backbone": [turn("1", **W, given=FROM_RUN), refused("1", by="without --init_from")],
    "out_dim": [turn("16", **W)],
    "head_nlayers": [turn("1", **W, given={"head_hidden_dim": "2048"})],
    "head_hidden_dim": [turn("8", **W)],
    "head_bottleneck_dim": [turn("4", **W)],
    "norm_last_layer": [turn("false", **W, given={"freeze_last_layer": "0"})],
    "use_bn_in_head": [turn("true", **W)],
    "freeze_last_layer": [turn("0", **W, given={"norm_last_layer": "false"})],
    "student_temp": [turn("0.2", **W)],
    "warmup_teacher_temp": [turn("0.02", **W, given={"warmup_teacher_temp_epochs": "1"})],
    "teacher_temp": [turn("0.07", **W)],
    "warmup_teacher_temp_epochs": [turn("1", **W, given={"warmup_teacher_temp": "0.02"})],
    "center_momentum": [turn("0.5", **W)],
    "centering": [turn("sinkhorn_knopp", **W)],
    "koleo_weight": [turn("0.1", "1", **W)],
    "momentum_teacher": [turn("0.5", **W)],
    "global_crops_number": [turn("1", "3", **W)],
    "global_crops_size": [turn("48", **W)],
    "global_crops_scale": [turn("0.9 1", **W)],
    "stage_scales": [turn("0.5", "2", **W)],
    "stage_shares": [
        turn("0.5 0.5", **W, given={"stage_scales": "0.5 1", "stage_shares": "0 1"})
    ],
    "local_crops_number": [turn("0", "3", **W, given={"local_crops_size": "96"})],
    "local_crops_size": [turn("32", **W)],
    "local_crops_scale": [turn("0.3 0.4", **W)],
    "crops_ratio": [turn("1 1", **W)],
    "flip_prob": [turn("0", **W)],
    "rot90_prob": [turn("1", **W)],
    "channel_jitter": [turn("0.4 0", "0 0.4", **W)],
    "noise_prob": [turn("1", **W)],
    "noise_std": [turn("0.5", **W, given={"noise_prob": "1"}), refused("0.5", by="noise_prob 0")],
    "channel_drop_prob": [turn("0.5", **W)],
    "color_jitter": [turn("0 0 0 0", "0.4 0.4 0.2 0", "0.4 0.4 0 0.1", "0.4 0 0.2 0.1", **W)],
    "color_jitter_prob": [turn("0", **W)],
    "gray_prob": [turn("1", **W), refused("1", by="have no gray", given=BANDS),
                  refused("0.2", by="have no gray", given=BANDS)],  # the recipe's own value
    "blur_prob": [turn("0 0.1 0.5", "1 1 0.5", "1 0.1 0", **W)],
    "blur_sigma": [turn("2 2", **W)],
    "solarize_prob": [turn("1 0.2 0", "0 1 0", "0 0.2 1", **W)],
    "mean": [turn("0.5 0.5 0.5", **W), refused("0.5", by="3 channels")],
    "std": [turn("0.5 0.5 0.5", **W)],
    "knn_every": [turn("1", shows="metrics")],
    "show_channels": [refused("1 2 3", by="shown as they are", given={"knn_every": "1"}),
                      refused("1 9 3", by="1 to 5", given=BANDS | {"knn_every": "1"}),
                      refused("1 2 3", by="--knn_every 0")],
    "knn_data_path": [turn("data2", shows="metrics", given={"knn_every": "1"})],
    "on_collapse": [turn("stop", shows="printed", within=collapsing)],
    "on_forgetting": [
        turn("stop", "rollback", shows="printed", given=FROM_RUN | {"forgetting_threshold": "1"})
    ],
    "forgetting_every": [turn("0", "0.5", shows="metrics", given=FROM_RUN)],
    "forgetting_threshold": [turn("1", shows="printed", given=FROM_RUN)],
    "compile": [turn("on", shows="calls")],
    "grad_checkpointing": [turn("true", shows="calls")],
    "group_backward": [turn("true", shows="calls")],
}  # fmt: skip

NO_MIX = {"mixup": "0", "cutmix": "0"}
FINETUNE: Cases = RUN | {
    "pretrained_weights": [turn("run", "other", **W)],
    "checkpoint_key": [
        turn("student", **W, given={"pretrained_weights": "run"}),
        turn("model_ema", **W, given={"pretrained_weights": "tuned.pth"}),
        refused("model", by="contains no model", given={"pretrained_weights": "run"}),
        refused("teacher", by="contains no teacher", given={"pretrained_weights": "student.pth"}),
    ],
    "new_head": [turn("true", **W, given={"pretrained_weights": "tuned.pth"})],
    "cooldown_epochs": [turn("1", **W)],
    "input_size": [turn("48", **W)],
    "mean": [turn("0.5 0.5 0.5", **W), refused("0.5", by="3 channels")],
    "std": [turn("0.5 0.5 0.5", **W)],
    "train_scale": [turn("0.9 1", **W)],
    "hflip": [turn("0", **W)],
    "aa": [turn("none", "rand-m9-mstd0.5-inc0", "3a", "augmix-m5", **W), refused("x", by="--aa"),
           refused("3a", by="made for 8-bit RGB", given=BANDS)],
    "color_jitter": [turn("0", **W, given={"aa": "none"})],
    "reprob": [turn("1", **W)],
    "remode": [turn("rand", "const", **W, given={"reprob": "1"})],
    "recount": [turn("5", **W, given={"reprob": "1"})],
    "repeated_aug": [turn("2", **W)],
    "mixup": [turn("0.1", **W, given={"cutmix": "0"})],
    "cutmix": [turn("0.1", **W, given={"mixup": "0"})],
    "mixup_prob": [turn("0", **W)],
    "mixup_switch_prob": [turn("0", "1", **W)],
    "mixup_mode": [turn("pair", "elem", **W)],
    "smoothing": [turn("0.3", **W)],
    "model_ema_decay": [turn("0", "0.5", **W)],
    "labels_per_class": [turn("4", "6", **W)],
    "draw_seed": [turn("1", **W, given={"labels_per_class": "4"}), refused("1", by="--draw_seed")],
    "eval_every": [turn("1", shows="metrics")],
    "eval_crop_ratio": [turn("0.5", shows="calls")],
    "eval_batch_size": [turn("4", shows="calls")],
}  # fmt: skip
DISTILL: Cases = FINETUNE | {
    "teacher_model": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8"),
                      refused("resnet18", by="--teacher_model or the file")],
    "teacher_path": [turn("tuned2.pth", **W)],
    "data_path": [refused("data2", by="classes")],
    "bands": [refused("4 3 2", by="classes", given=BANDS), refused("1", by="channels", given=BANDS),
              refused("1", by="8-bit RGB")],
    "window": [turn("0 200", **W), refused("9 3", by="must be below")],
    "teacher_size": [turn("48", **W, given={"distillation_type": "soft"})],
    "distillation_type": [turn("soft", "symmetric", **W)],
    "distillation_alpha": [turn("0.9", **W)],
    "distillation_tau": [
        turn("3", **W, given={"distillation_type": "soft"}),
        turn("3", **W, given={"distillation_type": "symmetric"}),
        refused("3", by="--distillation_tau"),
    ],
}  # fmt: skip

ONE_RATE = {"lrs": "0.01"}
TUNED = {"finetune": "true"} | ONE_RATE
FPN = {"head": "fpn"}
MASKED_URL = "file://{here}/masked/train"
MASKED_BANDS = {"data_path": "masked5"}
MASKED_CACHE = {"shard_url": MASKED_URL, "cache_dir": "copies"}
SEGMENT: Cases = {
    name: turns
    for name, turns in RUN.items()
    if name not in ("warmup_lr", "weight_decay_end", "layer_decay")
} | {
    "batch_size_per_gpu": [turn("2", **W)],
    "fsdp": [refused("true", by="--fsdp")],
    "arch": [turn("xcit_pico_6_p8", **W)],
    "drop_path_rate": [turn("0.5", **W, given=TUNED), refused("0.5", by="--drop_path_rate")],
    "lr": [turn("0.02", **W, given=FPN), refused("0.02", by="--lr")],
    "may_change": [turn("lrs", shows="code", before={"lrs": "0.02"}, given=ONE_RATE)],
    "last_batch": [turn("wrap", shows="metrics", given={"batch_size_per_gpu": "3"})],
    "bands": [
        turn("4 3 2", "2 3 4", "1", **W, given=MASKED_BANDS),
        refused("4 6", by="channels 1 to 5", given=MASKED_BANDS),
        refused("1", by="8-bit RGB"),
    ],
    "window": [
        turn("0 200", **W),
        refused("9 3", by="must be below"),
        turn("0 p90", "p10 p90", "0 9 0 9 0 9 0 9 0 90", **W, given=MASKED_BANDS),
    ],
    "config": [turn("recipe.yaml", **W, given=TUNED)],
    "max_bad_fraction": [turn("1", shows="code", given={"data_path": "masked3"})],
    "data_path": [turn("masked2", **W), refused("data", by="neither masks nor boxes")],
    "shard_url": [refused("file://{here}/masked/train-x", by="--max_bad_fraction")],
    "cache_dir": [turn("copies", shows="files", given={"shard_url": MASKED_URL})],
    "cache_gb": [
        turn("6e-5", shows="files", given=MASKED_CACHE | {"shuffle_window": "1"}),
        refused("1e-6", by="--cache_gb", given=MASKED_CACHE),
    ],
    "pretrained_weights": [turn("run", "other", **W)],
    "checkpoint_key": [
        turn("student", **W, given={"pretrained_weights": "run"}),
        refused("model", "model_ema", by="contains no model", given={"pretrained_weights": "run"}),
    ],
    "lrs": [turn("0.02", "0.01 0.02", **W), refused("0.02", by="--lrs", given=FPN)],
    "power": [turn("2", **W)],
    "head": [turn("fpn", "upernet", **W)],
    "finetune": [turn("true", **W, given=ONE_RATE), refused("true", by="--finetune")],
    "taps": [turn("3", "2 3", **W), refused("9", by="--taps 9")],
    "crop_size": [turn("48", **W)],
    "resize_size": [turn("40", **W)],
    "scale": [turn("1 1", **W)],
    "cat_max_ratio": [turn("0.01", **W)],
    "hflip": [turn("0", **W)],
    "color_jitter": [turn("0 0.5 0.5", "0.125 0 0.5", "0.125 0.5 0", **W)],
    "auxiliary_weight": [turn("3", **W, given={"head": "upernet"}),
                         refused("3", by="--auxiliary_weight")],
    "stride": [turn("0.3", shows="calls")],
    "eval_every": [turn("1", shows="metrics")],
    "mean": [turn("0.5 0.5 0.5", **W)],
    "std": [turn("0.5 0.5 0.5", **W)],
}  # fmt: skip


CROPS = {"crop_size": "32"}
BOXED_URL = "file://{here}/boxed/train"
BOXED_BANDS = {"data_path": "boxed5"}
BOXED_CACHE = {"shard_url": BOXED_URL, "cache_dir": "copies"}
DETECT: Cases = {
    name: turns
    for name, turns in SEGMENT.items()
    if name not in ("lrs", "power", "min_lr", "head", "resize_size", "cat_max_ratio",
                    "color_jitter", "auxiliary_weight", "stride")
} | {
    "drop_path_rate": [
        turn("0.5", **W), refused("0.5", by="--drop_path_rate", given={"finetune": "false"}),
    ],
    "lr": [turn("0.02", **W)],
    "lr_drops": [turn("0.5", **W)],
    "may_change": [turn("lr", shows="code", before={"lr": "0.02"})],
    "bands": [
        turn("4 3 2", "2 3 4", "1", **W, given=BOXED_BANDS),
        refused("4 6", by="channels 1 to 5", given=BOXED_BANDS),
        refused("1", by="8-bit RGB"),
    ],
    "window": [
        turn("0 200", **W),
        refused("9 3", by="must be below"),
        turn("0 p90", "p10 p90", "0 9 0 9 0 9 0 9 0 90", **W, given=BOXED_BANDS),
    ],
    "config": [turn("recipe.yaml", **W)],
    "max_bad_fraction": [turn("1", shows="code", given={"data_path": "boxed3"})],
    "data_path": [turn("boxed2", **W), refused("data", by="neither masks nor boxes")],
    "shard_url": [refused("file://{here}/boxed/train-x", by="--max_bad_fraction")],
    "cache_dir": [turn("copies", shows="files", given={"shard_url": BOXED_URL})],
    "cache_gb": [
        turn("6e-5", shows="files", given=BOXED_CACHE | {"shuffle_window": "1"}),
        refused("1e-6", by="--cache_gb", given=BOXED_CACHE),
    ],
    "masks": [turn("true", **W), refused("true", by="leave out --masks", given=BOXED_BANDS)],
    "finetune": [turn("false", **W)],
    "taps": [turn("0 1 2 3", **W), refused("0 1 2 9", by="--taps 9")],
    "short_sides": [turn("32", **W), refused("32", by="--short_sides", given=CROPS)],
    "long_side": [turn("40", **W)],
    "eval_side": [turn("48", shows="calls")],
    "crop_size": [turn("32", **W)],
    "scale": [turn("1 1", **W, given=CROPS), refused("1 1", by="--scale")],
    "fpn_dim": [turn("16", **W)],
    "anchor_sizes": [turn("8 16 20 32 48", **W)],
    "roi_samples": [turn("4", **W)],
}  # fmt: skip


# -- evaluations -----------------------------------------------------------------------------------

A, F, C, P = ({"shows": part} for part in ("accuracies", "features", "contents", "printed"))
COPIED = {"data_path": "file://{here}/data", "cache_dir": "copies"}
EVAL_TARGET: Cases = {
    "output_dir": [turn("other", **F)],
    "pretrained_weights": [turn("other", **F)],
    "checkpoint_key": [turn("student", **F), refused("model", "model_ema", by="contains no model")],
    "arch": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8")],
    "data_path": [turn("data2", **F)],
    "cache_dir": [turn("copies", shows="files", given={"data_path": "file://{here}/data"})],
    "shard_url": [refused("file://{here}/data/{split}x", by="--max_bad_fraction")],
    "cache_gb": [refused("1e-4", by="--cache_gb", given=COPIED)],
    "max_bad_fraction": [turn("1", shows="code", given={"data_path": "broken"})],
    "bands": [
        turn("3 2 1", "5 4 3", **F, given=BANDS | {"bands": "1 2 3"}),
        refused("1", by="takes 3 channels", given=BANDS),
        refused("1", by="8-bit RGB"),
    ],
    "interpolation": [turn("bilinear", **F)],
    "window": [turn("0 200", **F)],
    "mean": [turn("0.5 0.5 0.5", **F), refused("0.5 1", by="3 channels")],
    "std": [turn("0.5 0.5 0.5", **F)],
    "crop_size": [turn("48", **F)],
    "resize_size": [turn("64", **F)],
    "baselines": [turn("true", **F)],
    "batch_size_per_gpu": [turn("4", shows="calls")],
    "num_workers": [turn("1", shows="calls")],
    "precision": [turn("bf16", **F), refused("fp16", by="needs a GPU")],
    "device": NO_GPU,
}
LIMITED = {"labels_per_class": "4"}


def few(**shown: Any) -> Cases:
    """Few labels, in a command where the images are shown by this."""
    return {
        "labels_per_class": [turn("4", "6", **shown)],
        "draws": [turn("2", **shown, given=LIMITED), refused("2", by="--draws")],
        "draw_seed": [turn("1", **shown, given=LIMITED), refused("2", by="--draw_seed")],
    }


KNN = (
    EVAL_TARGET
    | few(shows="calls")
    | {
        "nb_knn": [turn("3", **A)],
        "temperature": [turn("10", "0.001", shows="calls")],
    }
)
DINO_PROBE = {"protocol": "dino", "batch_size_per_gpu": "8"}
LINEAR = (
    EVAL_TARGET
    | {
        "protocol": [turn("dino", **A)],
        "epochs": [turn("9", **A)],
        "lrs": [turn("0.01", **A)],
        "weight_decays": [turn("0.5", **A)],
        "layers": [
            turn("cls+patch", "cls2+patch", "cls", "cls2", "deep", **A, given={"lrs": "0.01"})
        ],
        "probe_batch_size": [
            turn("4", **A),
            refused("4", by="--probe_batch_size", given={"protocol": "dino"}),
        ],
        "holdout": [turn("0.5", **A)],
        "decoder": [refused("cuda", by="--decoder")],
        "seed": [turn("1", **A), turn("1", **A, given=DINO_PROBE)],
    }
    | few(**A)
)
EVALUATE = EVAL_TARGET | {
    "label_map": [turn("cows.json", **A), refused("classes.txt", by="--label_map classes.txt")],
    "output_dir": [turn("tuned2", **A)],
    "pretrained_weights": [turn("tuned2.pth", **A)],
    "checkpoint_key": [turn("model_ema", **P), refused("teacher", "student", by="contains no",
                       given={"pretrained_weights": "ema.pth"})],
    "data_path": [
        turn("broken", shows="calls", given={"max_bad_fraction": "1"}),
        refused("data2", by="classes"),
    ],
    "bands": [refused("1", by="8-bit RGB")],
    "interpolation": [turn("bilinear", shows="calls")],
    "window": [turn("0 200", shows="calls")],
    "mean": [turn("0.5 0.5 0.5", shows="calls")],
    "std": [turn("0.5 0.5 0.5", shows="calls")],
    "crop_size": [turn("48", shows="calls")],
    "resize_size": [turn("64", shows="calls")],
    "baselines": [refused("true", by="--baselines")],
    "precision": [turn("bf16", shows="calls"), refused("fp16", by="needs a GPU")],
    "head": [],
    "cache_gb": [refused("1e-6", by="--cache_gb", given=COPIED)],
}  # fmt: skip
EMBED = EVAL_TARGET | {
    "dst": [turn("elsewhere", shows="files")],
    "split": [turn("val", **C)],
    "patches": [turn("true", **C)],
    "tap": [turn("0", "3", **C, given={"patches": "true"}), refused("0", by="--tap")],
    "image_size": [
        turn("0", "64", **C, given={"patches": "true"}),
        refused("64", by="--image_size"),
    ],
    "examples": [turn("1", "0", **C)],
    "show_channels": [
        turn("3 2 1", "1 1 2", **C, given=BANDS | {"bands": "1 2 3"}),
        refused("1 2 3", by="shown as they are"),
        refused("1 2", by="name three of", given=BANDS | {"bands": "1 2 3"}),
    ],
    "seed": [turn("1", **C)],
}
DUPLICATES = EVAL_TARGET | {
    "dst": [turn("elsewhere", shows="files")],
    "baselines": [refused("true", by="--baselines")],
    "splits": [turn("val", "train", shows="files")],
    "threshold": [],
    "outliers": [turn("2", **C)],
    "examples": [turn("1", "0", **C)],
}
ATTENTION: Cases = {
    "src": [turn("photo", shows="files")],
    "dst": [turn("elsewhere", shows="files")],
    "output_dir": [turn("other", **C)],
    "pretrained_weights": [turn("other", **C)],
    "checkpoint_key": [turn("student", **C), refused("model", "model_ema", by="contains no model")],
    "arch": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8")],
    "image_size": [turn("96", "0", **C), refused("96", by="with --tile", given={"tile": "32"})],
    "tile": [
        turn("32", shows="files", given={"image_size": "480"}),
        refused("30", by="multiple of the patch", given={"image_size": "480"}),
        refused("4096", by="no readable image", given={"image_size": "480"}),
        refused("32", by="--tile", given={"draw": "patches"}),
    ],
    "window": [turn("0 200", **C)],
    "show_channels": [
        refused("1 2", by="shown as they are"),
        turn("3 2 1", **C, given={"window": "0 200"}),
    ],
    "mean": [turn("0.5 0.5 0.5", **C)],
    "std": [turn("0.5 0.5 0.5", **C)],
    "layer": [turn("1", **C), refused("1", by="--layer", given={"draw": "patches"})],
    "threshold": [turn("0.3", **C)],
    "draw": [turn("patches", **C)],
    "shared_colors": [
        turn("true", **C, given={"draw": "patches", "src": "photo"}),
        refused("true", by="--shared_colors"),
    ],
    "tap": [turn("0", **C, given={"draw": "patches"}), refused("0", by="--tap")],
    "device": NO_GPU,
}
MASKS_COPIED = {"data_path": "file://{here}/masked", "cache_dir": "copies"}
ATTENTION_MASKS = EVAL_TARGET | {
    "output_dir": [turn("other", **A)],
    "pretrained_weights": [turn("other", **A)],
    "checkpoint_key": [turn("student", **A), refused("model", "model_ema", by="contains no model")],
    "data_path": [turn("masked2", **A), refused("data", by="neither masks nor boxes")],
    "cache_dir": [turn("copies", shows="files", given={"data_path": "file://{here}/masked"})],
    "shard_url": [refused("file://{here}/masked/{split}x", by="--max_bad_fraction")],
    "cache_gb": [refused("1e-6", by="--cache_gb", given=MASKS_COPIED)],
    "max_bad_fraction": [turn("1", shows="code", given={"data_path": "masked3", "split": "train"})],
    "bands": [
        turn("3 2 1", "5 4 3", **A, given=MASKED_BANDS | {"bands": "1 2 3"}),
        refused("1", by="takes 3 channels", given=MASKED_BANDS),
        refused("1", by="8-bit RGB"),
    ],
    "interpolation": [refused("bilinear", by="--interpolation")],
    "window": [turn("0 200", **A)],
    "mean": [turn("0.5 0.5 0.5", **A)],
    "std": [turn("0.5 0.5 0.5", **A)],
    "crop_size": [refused("48", by="--crop_size")],
    "resize_size": [refused("64", by="--resize_size")],
    "baselines": [turn("true", **A)],
    "batch_size_per_gpu": [refused("4", by="--batch_size_per_gpu")],
    "precision": [turn("bf16", **A), refused("fp16", by="needs a GPU")],
    "split": [turn("train", **A)],
    "background": [turn("1", **A), refused("2", by="no such class")],
    "image_size": [turn("64", "0", **A)],
    "layer": [turn("1", **A)],
    "threshold": [turn("0.3", **A)],
}
RETRIEVE: Cases = {
    "output_dir": [turn("other", shows="files")],
    "bank": [turn("photos/val", **C), refused("nowhere", by="--bank nowhere")],
    "queries": [turn("photos/val", **C)],
    "relevant": [
        turn("pairs.csv", shows="accuracies"),
        refused("two.csv", by="--relevant two.csv"),
    ],
    "distractors": [turn("photo", **C)],
    "pretrained_weights": [turn("other", **C)],
    "checkpoint_key": [turn("student", **C), refused("model", "model_ema", by="contains no model")],
    "arch": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8")],
    "image_size": [turn("48", **C)],
    "resize": [turn("square", **C)],
    "multiscale": [turn("true", **C)],
    "features": [turn("cls+gem", **C)],
    "whitening": [turn("photos/val", **C)],
    "k": [turn("2", **C)],
    "examples": [turn("1", "0", **C)],
    "window": [turn("0 200", **C)],
    "mean": [turn("0.3 0.3 0.3", **C)],
    "std": [turn("0.5 0.5 0.5", **C)],
    "baselines": [turn("true", **C)],
    "precision": [turn("bf16", **C), refused("fp16", by="needs a GPU")],
    "device": NO_GPU,
}
PROPAGATE: Cases = {
    "output_dir": [turn("other", shows="files")],
    "videos": [turn("video/davis2", **C), refused("nowhere", by="--videos nowhere")],
    "masks": [
        refused("masks", by="--masks"),
        turn(
            "video/davis/Annotations/480p/a/0.png",
            shows="accuracies",
            given={
                "videos": "video/davis/JPEGImages/480p/a",
                "masks": "video/davis/Annotations/480p/a",
            },
        ),
    ],
    "pretrained_weights": [turn("other", **C)],
    "checkpoint_key": [turn("student", **C), refused("model", "model_ema", by="contains no model")],
    "arch": [refused("xcit_pico_6_p8", by="xcit_pico_6_p8")],
    "tap": [turn("0", "2", **C)],
    "image_size": [turn("64", **C)],
    "n_last_frames": [turn("0", **C)],
    "size_mask_neighborhood": [turn("0", **C)],
    "topk": [turn("1", **C)],
    "temperature": [turn("1", **C)],
    "window": [turn("0 200", **C)],
    "mean": [turn("0.3 0.3 0.3", **C)],
    "std": [turn("0.5 0.5 0.5", **C)],
    "baselines": [turn("true", **C)],
    "precision": [turn("bf16", **C), refused("fp16", by="needs a GPU")],
    "device": NO_GPU,
}


# -- data ------------------------------------------------------------------------------------------

MASKS = {"src": "photo", "masks": "masks", "mask_classes": "classes.txt"}
SLIDES = {"src": "slides", "tile": "20", "min_foreground": "0.5"}
MAKE: Cases = {
    "src": [turn("photos/train", **C)],
    "dst": [turn("elsewhere", shows="files")],
    "splits": [turn("none", **C)],
    "label_column": [turn("age", **C, given={"src": "two.csv", "label_column": "kind"})],
    "val_fraction": [turn("0.5", shows="files", given={"src": "photos/train"}),
                     refused("0.5", by="--val_fraction")],
    "group_column": [turn("age", shows="printed", given={"src": "split.csv", "label_column": "kind",
                                                         "group_column": "kind"}),
                     refused("age", by="--group_column age")],
    "bits": [turn("8", **C, given={"src": "deep", "bits": "12"})],
    "pixels": [turn("rgb8", **C, given={"src": "deep"}), refused("2xint64", by="--pixels 2xint64")],
    "page": [refused("0", by="--page: these are 8-bit images")],
    "nodata": [turn("7", **C, given={"src": "deep"})],
    "max_pixels": [refused("1000", by="--max_pixels")],
    "split": [turn("extra", shows="files", given={"src": "photo"}), refused("extra", by="--split")],
    "labels": [turn("labels.csv", **C, given={"src": "photo"}),
               refused("labels.csv", by="names none of the images")],
    "label_map": [turn("classes.txt", **C)],
    "masks": [refused("masks", by="--mask_classes is missing", given={"src": "photo"})],
    "mask_classes": [turn("voc", **C, given=MASKS), refused("voc", by="--mask_classes")],
    "mask_ignore": [refused("2", by="--mask_ignore")],
    "boxes": [turn("boxes.json", **C, given={"src": "photo"}),
              refused("boxes.json", by="--boxes", given=MASKS)],
    "multi_labels": [turn("labels.csv", **C, given={"src": "photo"}),
                     refused("labels.csv", by="names none of the images")],
    "values": [turn("labels.csv", **C, given={"src": "photo"}),
               refused("labels.csv", by="names none of the images")],
    "image_key": [refused("x", by="no Parquet or Arrow file")],
    "exclude": [turn("gone.csv", **C), refused("two.csv", by="names none of the images")],
    "shard_size": [turn("3", shows="files")],
    "shard_bytes": [turn("1000", shows="files")],
    "tile": [turn("20", "24", **C)],
    "stride": [turn("10", **C, given={"tile": "20"}), refused("10", by="--stride")],
    "min_foreground": [turn("0.5", **C, given={"src": "slides", "tile": "20"}),
                       refused("0.5", by="--min_foreground")],
    "background": [turn("slide", "nodata", **C, given=SLIDES),
                   refused("slide", by="--background", given={"tile": "20"})],
    "resize": [turn("20", **C)],
    "quality": [turn("20", **C, given={"resize": "20"}), refused("20", by="--quality")],
    "shuffle": [turn("false", **C)],
    "seed": [turn("1", **C), refused("1", by="--seed", given={"shuffle": "false"})],
    "verify": [turn("false", **P, given={"src": "damaged"})],
    "num_workers": [turn("2", shows="calls", given={"shard_size": "3"})],
    "root": [refused("nowhere", by="in nowhere", given={"src": "flowers102"}),
             refused("nowhere", by="--root")],
    "download": [refused("true", by="--download")],
}  # fmt: skip
PREFLIGHT = {"nodes": "1", "batch_size_per_gpu": "4"}
FOREIGN = {"dst": "foreign", "rebuild": "true"}
CHECK: Cases = {
    "dst": [turn("data2", **P)],
    "sample": [turn("2", **P)],
    "rebuild": [turn("true", **P, given={"dst": "stale"})],
    "hash": [turn("true", **P, given={"dst": "foreign", "rebuild": "true"}),
             refused("true", by="--hash")],
    "pixels": [turn("3xuint8", **P, given=FOREIGN), refused("rgb8", by="--pixels")],
    "page": [refused("0", by="--page")],
    "nodata": [turn("7", **P, given=FOREIGN | {"pixels": "3xuint8"}), refused("7", by="--nodata")],
    "max_pixels": [refused("1000", by="--max_pixels")],
    "image_key": [refused("jpg", by="add --rebuild")],
    "label_key": [refused("json:x", by="no sample has", given={"rebuild": "true"}),
                  refused("txt", by="add --rebuild")],
    "num_workers": [turn("2", shows="calls")],
    "nodes": [turn("2", **P, given=PREFLIGHT)],
    "gpus": [turn("2", **P, given=PREFLIGHT)],
    "workers": [turn("1", **P, given=PREFLIGHT | {"images_per_second": "1e8"}),
                refused("1", by="--workers")],
    "batch_size_per_gpu": [turn("2", **P, given=PREFLIGHT), refused("2", by="--batch_size")],
    "images_per_second": [turn("1e8", **P, given=PREFLIGHT),
                          refused("1e8", by="--images_per_second")],
}  # fmt: skip
DEMO: Cases = {
    "dst": [turn("elsewhere", shows="files")],
    "train": [turn("5", **C)],
    "val": [turn("4", **C)],
    "size": [turn("16", **C)],
    "seed": [turn("1", **C)],
}


M: Any = P | {"within": measured}
RECIPE: Cases = {
    "shards": [turn("data2", "bands", **M)],
    "out": [turn("other.yaml", shows="files", within=measured)],
    "hours": [turn("0.1", "0.2", **M), refused("0.001", by="--hours 0.001")],
    "kind": [
        turn("grayscale", "xray", "satellite", "microscopy", **M),
        turn("photographs", **M, given={"shards": "bands"}),
    ],
    "gpus": [refused("2", by="--gpus 2")],
    "device": [refused("cuda", by="--device cuda")],
    "precision": [turn("bf16", **M), refused("fp16", by="needs a GPU")],
    "num_workers": [turn("3", **M)],
}


# -- reports, weights ------------------------------------------------------------------------------

WATCH: Cases = {"run": [turn("other", **P)], "once": [], "every": []}
REPORT: Cases = {
    "runs": [turn("run other", **C)],
    "output_dir": [turn("other", shows="files", given={"runs": "", "output_dir": "run"})],
    "output": [turn("page.html", shows="files")],
    "pictures": [turn("true", **C)],
    "show_channels": [refused("1 2 3", by="--pictures false")],
}
COMPARE: Cases = {"runs": [turn("run other", **P), refused("run", by="two run folders")]}
EXTRACT: Cases = {
    "checkpoint": [turn("tuned2.pth", **C), turn("tuned2", **C)],
    "output": [turn("new.safetensors", "new.pdparams", shows="files")],
    "prefix": [turn("model_ema", **C), refused("Student", by="--prefix")],
    "remove_prefix": [turn("true", **C)],
}
RESULTS = [turn("run/results.json", **C), refused("nowhere.json", by="--results")]
CONVERT: Cases = {
    "checkpoint": [turn("tuned2.pth", "run", **C)],
    "output": [turn("new.pth", "new.pdparams", shows="files")],
    "which": [
        turn("model_ema", **C),
        turn("student", "teacher", **C, given={"checkpoint": "run"}),
        refused("model", by="contains no model", given={"checkpoint": "run"}),
    ],
    "layout": [turn("timm", **C, given={"checkpoint": "nano.pth"})],
    "results": RESULTS,
}
EXPORT: Cases = {name: CONVERT[name] for name in ("checkpoint", "which", "results")} | {
    "output": [turn("new2.safetensors", shows="files")],
    "format": [refused("timm-hub", by="timm has no xcit_pico_6_p16", given={"output": "folder"})],
    "arch": [
        refused("timm/test_vit", by="--arch"),
        refused(
            "timm/test_vit", by="patch 8 and 16", given={"format": "timm-hub", "output": "folder"}
        ),
    ],
}


# -- launching -------------------------------------------------------------------------------------

LOGS: Cases = {
    "run": [refused("run", by="run")],
    "stage": [turn("report", **P)],
    "rank": [refused("3", by="--rank 3")],
    "follow": [turn("true", **P, within=following)],
}

CASES: dict[str, Cases] = {
    "quickstart": {"output_dir": [], "data_path": []},
    "shards make": MAKE,
    "shards check": CHECK,
    "shards demo": DEMO,
    "recipe": RECIPE,
    "pretrain": PRETRAIN,
    "knn": KNN,
    "linear": LINEAR,
    "evaluate": EVALUATE,
    "finetune": FINETUNE,
    "distill": DISTILL,
    "segment": SEGMENT,
    "detect": DETECT,
    "attention": ATTENTION,
    "embed": EMBED,
    "duplicates": DUPLICATES,
    "masks": ATTENTION_MASKS,
    "retrieve": RETRIEVE,
    "propagate": PROPAGATE,
    "watch": WATCH,
    "report": REPORT,
    "report compare": COMPARE,
    "weights extract": EXTRACT,
    "weights convert": CONVERT,
    "weights export": EXPORT,
    "launch status": {"run": [refused("run", by="run")]},
    "launch logs": LOGS,
    "launch rehearse": {
        "output_dir": [turn("elsewhere", **P)],
        "shared_dir": [turn("big", **P)],
        "launch_defaults": [turn("defaults.yaml", **P)],
        "nodes": [turn("2", **P)],
        "seeds": [refused("0 1", by="--seeds")],
        "stages": [refused("pretrain,knn", by="--stages")],
    },
    "launch cancel": {"run": [refused("run", by="run")]},
}

# Where nothing is turned, and why: a reason, or the test that shows it.
EXCEPTIONS = {
    "logger=wandb": "test_trackers.py: test_wandb_writes_its_offline_files",
    "device=auto": "cuda where there is a GPU, else cpu: one of the two others",
    "precision=auto": "bf16 or fp32 as the hardware has it: one of the two others",
    "checkpoint_key=teacher": "what is taken of these files where the option is left out",
    "evaluate.head": "test_classify.py: test_backbone_and_head_repeat_the_probes_accuracy",
    "linear.decoder=host": "what is taken where there is no GPU",
    "interpolation=bicubic": "what is taken where the option is left out",
    "which=teacher": "the same",
    "evaluate.checkpoint_key=model": "the same, of a finetuned checkpoint",
    "compile=auto": "on with a GPU, off without: one of the two others",
    "quickstart.output_dir": "test_quickstart.py: test_its_command_line_is_one_of_the_launcher",
    "quickstart.data_path": "test_quickstart.py: test_its_command_line_is_one_of_the_launcher",
    "duplicates.threshold": "test_duplicates.py: test_a_higher_threshold_finds_fewer_pairs",
    "retrieve.resize=longer": "what is taken where the option is left out",
    "retrieve.features=cls": "the same",
    "watch.once": "test_monitor.py: test_the_command_shows_once",
    "watch.every": "test_monitor.py: test_absurd_intervals_are_refused",
}
