"""The run folder: which options may change between two attempts, and that a refused command changes
nothing."""

from __future__ import annotations

import shutil
import socket

import pytest
import torch

from tests.trainings import CONFIGS, config, files, train
from tests.victims import at_step, ended, final_bits, finish, pause, said, same, start, wait_for
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError
from xcit_dino.options import options
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import FREE, open_run
from xcit_dino.train.state import Checkpoints, load_checkpoint, newest_checkpoint

ALL = pytest.mark.parametrize("name", CONFIGS)
BEARING = {  # why an option may not change unasked while a run goes on
    "the length of the training and its schedules": "epochs cooldown_epochs lr min_lr "
    "warmup_epochs warmup_lr weight_decay weight_decay_end clip_grad freeze_last_layer layer_decay",
    "all that is random": "seed",
    "arithmetic": "precision",
    "the network": "arch drop_path_rate out_dim head_nlayers head_hidden_dim head_bottleneck_dim "
    "norm_last_layer use_bn_in_head",
    "where it starts": "init_from pretrained_weights checkpoint_key new_head freeze_backbone "
    "freeze_batchnorm",
    "the loss": "student_temp warmup_teacher_temp teacher_temp warmup_teacher_temp_epochs "
    "center_momentum centering koleo_weight momentum_teacher smoothing objective teacher_model "
    "teacher_path teacher_size distill_weight distill_patch_weight distillation_type "
    "distillation_alpha distillation_tau",
    "the order of the images": "shuffle_window last_batch repeated_aug",
    "which images": "labels_per_class draw_seed",
    "the pixels (a GPU's JPEG decoder rounds in other places)": "decoder global_crops_number "
    "global_crops_size global_crops_scale local_crops_number local_crops_size local_crops_scale "
    "crops_ratio stage_scales stage_shares flip_prob color_jitter color_jitter_prob gray_prob "
    "blur_prob blur_sigma "
    "solarize_prob bands window rot90_prob channel_jitter noise_prob noise_std channel_drop_prob "
    "mean std input_size train_scale hflip aa reprob remode recount mixup cutmix "
    "mixup_prob mixup_switch_prob mixup_mode",
    "a network that results are measured of": "model_ema_decay",
    "the accuracy that the run records at its end": "eval_crop_ratio",
}


def test_every_option_is_free_or_bears_on_what_is_learned():
    """A new option has to be put on one side or the other."""
    bearing = {name for names in BEARING.values() for name in names.split()}
    known = {name for default in CONFIGS.values() for name, _ in options(default)}
    assert not bearing & FREE
    assert bearing | FREE == known, (bearing | FREE) ^ known


# -- refused commands


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "shards"
    make(DemoConfig(folder, train=20, val=10, size=16, seed=5))
    return folder


@ALL
def test_a_refused_command_changes_nothing(name, shards, other_shards, tmp_path):
    run = tmp_path / "run"
    train(name, shards, run, max_steps=2)
    before = files(run)
    for words, changes in (
        ("holds a run with other options .lr 0.01 -> 0.1", {"lr": 0.1}),
        ("the shards changed under this run", {"data_path": other_shards}),
        ("no train shards there", {"data_path": tmp_path / "mistyped"}),
        ("the global batch is 2 and was 4", {"batch_size_per_gpu": 2}),
        ("--may_change rate: no such option", {"may_change": ("rate",)}),
    ):
        with pytest.raises(InputError, match=words):
            train(name, shards, run, **changes)
        assert files(run) == before, words
    train(name, shards, run, max_steps=3)


@ALL
def test_a_refused_first_run_leaves_nothing_in_the_way_of_the_next(name, shards, tmp_path):
    run = tmp_path / "runs" / "run"
    for changes in (
        {"data_path": tmp_path / "mistyped"},
        {"shard_url": "pipe:cat {shard}"},
        {"shard_url": "pipe:cat shard", "cache_dir": tmp_path / "cache"},
        {"batch_size_per_gpu": 100},
        {"init_from": tmp_path / "no.pth"} if name == "pretrain" else
        {"pretrained_weights": tmp_path / "no.pth"},
    ):  # fmt: skip
        with pytest.raises(InputError):
            train(name, shards, run, **changes)
        assert not run.parent.exists(), changes
    train(name, shards, run, max_steps=1)


def test_options_are_settled_by_what_has_been_learned(shards, tmp_path):
    """A first run that dies before it has logged or saved a step may be corrected."""
    first = config("pretrain", shards, tmp_path)
    open_run(first, first.run)
    train("pretrain", shards, tmp_path, lr=0.02, max_steps=1)
    with pytest.raises(InputError, match=r"lr 0\.02 -> 0\.01"):
        train("pretrain", shards, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InputError, match=r"lr 0\.02 -> 0\.01"):
        train("pretrain", shards, tmp_path)


def test_refused_on_a_live_run(shards, whole, tmp_path):
    """The original command goes on afterwards."""
    run = tmp_path / "run"
    first = start(run, shards, at_step, 3, pause, tmp_path / "go")
    wait_for((tmp_path / "go.awaited").exists)
    before = (run / "config.yaml").read_bytes()
    assert ended(start(run, shards, may_change=("lr",), lr=0.1)) == 2
    assert "is in use by process" in said(run)
    assert (run / "config.yaml").read_bytes() == before
    first.kill()
    first.join()
    finish(run, shards)
    assert same(final_bits(run), final_bits(whole))


def test_a_refused_command_leaves_a_damaged_checkpoint_to_its_owner(shards, tmp_path):
    train("pretrain", shards, tmp_path, max_steps=2)
    newest = newest_checkpoint(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-9])
    before = files(tmp_path)
    with pytest.raises(InputError):
        train("pretrain", shards, tmp_path, lr=0.1)
    assert newest_checkpoint(tmp_path) is None and files(tmp_path) == before


# -- what may change


@ALL
def test_remedies_that_messages_name_are_taken(name, shards, tmp_path):
    """ "lower --prefetch_factor", "raise --max_bad_fraction", other places of the shards."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    train(name, shards, run, max_steps=2)
    shutil.copytree(shards / "train", moved / "train")
    changes = {
        "prefetch_factor": 1, "num_workers": 1, "max_bad_fraction": 0.5, "cache_gb": 7.0,
        "cache_dir": tmp_path / "cache", "shard_url": str(moved / "train"), "max_steps": 4,
        "keep_checkpoints": 3, "log_every": 2, "on_stall": "abort", "watchdog_minutes": 3.0,
    }  # fmt: skip
    if name == "pretrain":
        changes |= {"knn_data_path": str(shards), "knn_every": 1, "max_skipped": 3}
    else:
        changes |= {"eval_every": 0, "eval_batch_size": 3}
    train(name, shards, run, **changes)
    assert load_checkpoint(newest_checkpoint(run))["step"] == 4


def test_other_options_that_were_allowed_are_said(shards, tmp_path, capsys):
    train("pretrain", shards, tmp_path, max_steps=2)
    changes = {"lr": 0.02, "may_change": ("lr",), "prefetch_factor": 3}
    train("pretrain", shards, tmp_path, max_steps=3, **changes)
    assert "step 2 was reached with other options: lr 0.01 -> 0.02\n" in capsys.readouterr().out
    train("pretrain", shards, tmp_path, max_steps=4, **changes)
    assert "was reached with" not in capsys.readouterr().out


def test_a_run_of_an_earlier_version_goes_on(shards, tmp_path, capsys):
    """Its checkpoints hold a checksum of options and the best accuracy, and nothing of the log."""
    train("pretrain", shards, tmp_path, max_steps=2)
    state = load_checkpoint(newest_checkpoint(tmp_path))
    del state["log"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state | {"config_checksum": "0123", "best_knn": 12.0})
    train("pretrain", shards, tmp_path, max_steps=3)
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 3
    assert "was reached with" not in capsys.readouterr().out


@ALL
def test_resuming_and_stopping_are_said(name, shards, tmp_path, capsys):
    label = {"pretrain": "pretraining"}.get(name, name)
    train(name, shards, tmp_path, max_steps=3)
    assert f"{label} stopped after step 3 of 10 (--max_steps 3)" in capsys.readouterr().err
    train(name, shards, tmp_path, max_steps=4)
    assert f"{label} resumes from step 3 of 10" in capsys.readouterr().err


# -- several processes


@ALL
def test_other_shards_on_another_rank_are_refused(name, shards, tmp_path, monkeypatch):
    """As if there were three ranks, of which the second sees other data."""
    monkeypatch.setattr(dist, "on_all_ranks", lambda v: torch.stack([v, v.flip(0), v]))
    with pytest.raises(InputError, match=f"--data_path {shards}: rank 1 found other shards"):
        train(name, shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_with_other_shards_end_in_one_line_each(shards, other_shards, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = (shards, other_shards)
    ranks = [
        start(tmp_path / f"run{n}", place, rank=f"{n} of 2 at {port}", batch_size_per_gpu=2)
        for n, place in enumerate(places)
    ]
    assert [ended(rank) for rank in ranks] == [2, 2]
    for n in range(2):
        assert "rank 1 found other shards there than rank 0" in said(tmp_path / f"run{n}")
