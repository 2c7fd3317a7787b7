"""Stages of a training with crops of different sizes."""

from __future__ import annotations

import pytest

from tests import victims
from xcit_dino.data.config import CropsConfig
from xcit_dino.errors import InputError
from xcit_dino.options import replace
from xcit_dino.report.report import image_size
from xcit_dino.slurm.config import ResourceConfig, Stage
from xcit_dino.slurm.tools.dry_run import training_facts
from xcit_dino.ssl import pretrain as module
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain

STAGES = {"stage_scales": (0.5, 1.0, 2.0), "stage_shares": (0.5, 0.25, 0.25)}


def tiny(shards, folder, **options):
    """Four epochs of five steps, crops of 32 and 16 pixels, in three stages."""
    sizes = {"arch": "xcit_pico_6_p8", "global_crops_size": 32, "local_crops_size": 16}
    values = victims.TINY | sizes | {"epochs": 4} | STAGES
    return replace(PretrainConfig(), values | {"data_path": shards, "output_dir": folder} | options)


def sizes(stages):
    return [(first, each.global_crops_size, each.local_crops_size) for first, each in stages]


def test_stages_begin_at_whole_epochs_and_sizes_are_multiples_of_the_patch():
    crops = CropsConfig(stage_scales=(0.5, 1.0), stage_shares=(0.75, 0.25))
    assert sizes(crops.stages(100, 16)) == [(0, 112, 48), (75, 224, 96)]
    assert sizes(crops.stages(10, 16)) == [(0, 112, 48), (8, 224, 96)]
    assert sizes(crops.stages(1, 16)) == [(0, 112, 48)]  # 0.75 of an epoch is one
    assert sizes(CropsConfig().stages(100, 16)) == [(0, 224, 96)]
    small = CropsConfig(
        global_crops_size=32, local_crops_size=16, stage_scales=(0.3, 1.0), stage_shares=(0.5, 0.5)
    )
    assert sizes(small.stages(2, 8)) == [(0, 8, 8), (1, 32, 16)]
    timm = replace(PretrainConfig(), {"arch": "timm/vit_small_patch14_dinov2", "epochs": 4})
    given = {"global_crops_size": 224, "local_crops_size": 98} | STAGES
    assert sizes(replace(timm, given).stages) == [(0, 112, 56), (2, 224, 98), (3, 448, 196)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_trains_on_crops_of_its_stage_in_the_order_of_the_plan(
    shards, tmp_path, monkeypatch, workers
):
    seen, inner = [], module.train_step

    def watched(trainer, batches, now):
        shapes = [(b.step, b.global_crops.shape[-1], b.local_crops.shape[-1]) for b in batches]
        seen.append((shapes, [int(s) for b in batches for s in b.samples]))
        return inner(trainer, batches, now)

    monkeypatch.setattr(module, "train_step", watched)
    pretrain(tiny(shards, tmp_path / "stages", num_workers=workers))
    expected = [(0, 16, 8)] * 10 + [(0, 32, 16)] * 5 + [(0, 64, 32)] * 5
    assert [shapes[0][1:] for shapes, _ in seen] == [each[1:] for each in expected]
    assert [shapes[0][0] for shapes, _ in seen] == list(range(20))
    staged = [samples for _, samples in seen]
    seen.clear()
    plain = {"stage_scales": (1.0,), "stage_shares": (1.0,)}
    pretrain(tiny(shards, tmp_path / "plain", num_workers=workers, **plain))
    assert staged == [samples for _, samples in seen]


@pytest.mark.slow
def test_a_run_stopped_around_its_stages_resumes_bit_for_bit(shards, tmp_path, capsys):
    for folder, stops in (("whole", [0]), ("cut", [9, 10, 11, 15, 0])):
        for stop in stops:
            pretrain(tiny(shards, tmp_path / folder, max_steps=stop))
    victims.assert_nothing_lost(tmp_path / "cut", tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "epoch 1 and later: crops of 16 and 8 pixels" in printed
    assert "epoch 3 and later: crops of 32 and 16 pixels" in printed


def test_a_stage_without_an_epoch_is_said():
    config = replace(PretrainConfig(), {"epochs": 4, "warmup_epochs": 0, "knn_every": 1} | STAGES)
    assert config.remarks() == []
    found = [line for line in replace(config, {"epochs": 1}).remarks() if "stage" in line]
    assert found == [
        "--stage_shares 0.5 0.25 0.25 with --epochs 1: a stage of less than half an epoch is left "
        "out"
    ]


def test_the_report_and_the_dry_run_show_the_sizes_of_all_stages():
    options = {"global_crops_size": 224, "epochs": 100} | STAGES
    assert image_size(options) == "112, 224, 448"
    assert image_size({"global_crops_size": 96, "stage_scales": [1.0]}) == 96
    config = replace(PretrainConfig(), options | {"batch_size_per_gpu": 8})
    stage = Stage("pretrain", "xcit_dino.ssl.pretrain:main", config, ResourceConfig())
    assert training_facts(stage)["stages"] == (
        "epochs 1 to 50: crops of 112 and 48 pixels; epochs 51 to 75: crops of 224 and 96 pixels; "
        "epochs 76 to 100: crops of 448 and 192 pixels"
    )


def test_an_unlike_number_of_scales_and_shares_or_shares_that_miss_one_are_refused():
    with pytest.raises(InputError, match="--stage_scales has 2 values and --stage_shares 1"):
        CropsConfig(stage_scales=(0.5, 1.0))
    with pytest.raises(InputError, match=r"--stage_shares: 0.75 \+ 0.5 is not 1"):
        CropsConfig(stage_scales=(0.5, 1.0), stage_shares=(0.75, 0.5))
