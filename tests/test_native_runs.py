"""Runs on images that are not 8-bit RGB: resumed in the middle, evaluated, refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import victims
from tests.native_sets import make_set
from xcit_dino.errors import InputError
from xcit_dino.eval.config import EvalTargetConfig, ReportConfig
from xcit_dino.eval.context import make_context
from xcit_dino.eval.pictures.false_color import of_channels, of_components
from xcit_dino.inputs import InputSettings
from xcit_dino.models.weights.load import input_settings
from xcit_dino.report import report
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.train.distributed.dist import World
from xcit_dino.train.state import newest_checkpoint

ON = {
    "rot90_prob": 0.5, "channel_jitter": (0.2, 0.2), "noise_prob": 0.5, "channel_drop_prob": 0.2,
    "epochs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("bands") / "set", 5, "uint16", train=20, val=8)


def test_a_run_resumes_in_the_middle_to_the_bit(bands, tmp_path):
    pretrain(victims.config(bands, tmp_path / "whole", **ON))
    pretrain(victims.config(bands, tmp_path / "halves", **ON, max_steps=3))
    pretrain(victims.config(bands, tmp_path / "halves", **ON))
    files = [newest_checkpoint(tmp_path / name) for name in ("whole", "halves")]
    one, two = (torch.load(file, weights_only=True) for file in files)
    for network in ("student", "teacher"):
        for name, value in one[network].items():
            assert torch.equal(value, two[network][name]), name
    first = one["student"]["backbone.patch_embed.proj.0.0.weight"]
    assert first.shape[1] == 5
    settings = input_settings(files[0])
    assert settings is not None
    assert (settings.channels, settings.window) == (5, ((0.0,), (4095.0,)))


def test_two_processes_learn_what_one_does(bands, tmp_path):
    """The same images, crops and augmentation; sums in another order round differently."""
    options = ON | {"max_steps": 2, "batch_size_per_gpu": 2, "drop_path_rate": 0.0}
    alone = victims.start(tmp_path / "one", bands, **options | {"batch_size_per_gpu": 4})
    port = 20_000 + os.getpid() % 20_000 + 2
    ranks = [
        victims.start(tmp_path / "two", bands, rank=f"{rank} of 2 at {port}", **options)
        for rank in range(2)
    ]
    assert [victims.ended(process) for process in (alone, *ranks)] == [0, 0, 0]
    files = [newest_checkpoint(tmp_path / name) for name in ("one", "two")]
    one, two = (torch.load(file, weights_only=True)["student"] for file in files)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_one_channel_has_to_stay(tmp_path):
    gray = make_set(tmp_path / "gray", 1, "uint16", train=8, val=4)
    with pytest.raises(InputError, match="--channel_drop_prob: the images have one channel"):
        pretrain(victims.config(gray, tmp_path / "run", channel_drop_prob=0.5))


def test_splits_of_different_kinds_are_refused(bands, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(bands / "train", both / "train")
    shutil.copytree(make_set(tmp_path / "two", 5, "int16", train=4, val=4) / "val", both / "val")
    settings = InputSettings(channels=5, mean=(0.5,) * 5, std=(0.2,) * 5)
    world = World(0, 1, torch.device("cpu"))
    context = make_context(EvalTargetConfig(num_workers=0), settings, {}, both, world)
    with pytest.raises(
        InputError, match=r"another kind \(5xint16\) than the other split \(5xuint16"
    ):
        context.index("val")


def test_channels_as_colors():
    unit = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    named = of_channels(6, (4, 3, 2))
    assert named is not None and of_channels(6, ()) is None
    assert np.array_equal(named(unit), np.rint(255 * unit[..., [3, 2, 1]]).astype(np.uint8))
    two = of_channels(2, ())
    assert two is not None and not two(unit[..., :2])[..., 2].any()
    colors = of_components(unit.reshape(-1, 6))
    assert colors(unit).shape == (4, 5, 3) and colors(unit).std() > 20


def test_the_report_refuses_channels_that_no_run_has(bands, tmp_path):
    pretrain(victims.config(bands, tmp_path / "run", max_steps=1))
    wrong = ReportConfig((tmp_path / "run",), show_channels=(4, 3, 99))
    with pytest.raises(InputError, match=r"--show_channels 4 3 99: name three .* 1 to 5"):
        report.run(wrong)
    assert not (tmp_path / "run" / "report.html").exists()


def test_weights_of_other_bands_are_a_warning(bands, tmp_path, capsys):
    pretrain(victims.config(bands, tmp_path / "start", bands=(4, 3, 2), max_steps=1))
    line = "was trained with --bands 4 3 2 of its images, and is given --bands 1 2 3 of these"
    given = {"bands": (1, 2, 3), "max_steps": 1}
    capsys.readouterr()
    start = {"init_from": str(tmp_path / "start")}
    pretrain(victims.config(bands, tmp_path / "continued", **given, **start))
    assert f"--init_from {tmp_path / 'start'}: {line}" in "".join(capsys.readouterr())
    teacher = {"objective": "distill", "teacher_path": tmp_path / "start"}
    pretrain(victims.config(bands, tmp_path / "taught", teacher_model="xcit_pico_6_p8", **given,
                            **teacher))  # fmt: skip
    assert f"--teacher_model xcit_pico_6_p8: {line}" in "".join(capsys.readouterr())
    pretrain(victims.config(bands, tmp_path / "same", **given | {"bands": (4, 3, 2)}, **start))
    assert "was trained with --bands" not in "".join(capsys.readouterr())
