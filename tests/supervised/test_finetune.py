"""Supervised training: data, mixing, EMA, layers and schedule against formulas and timm; whole
runs."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.loader import CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError, Stopped
from xcit_dino.eval import evaluate
from xcit_dino.eval.config import EvalTargetConfig, EvaluateConfig
from xcit_dino.eval.scores.few import draw
from xcit_dino.eval.scores.metrics import Scores, class_means, class_rows, lines_of
from xcit_dino.models.zoo import create_model, list_models
from xcit_dino.options import replace
from xcit_dino.report.published import differences_from_published
from xcit_dino.slurm.stages import launch_config
from xcit_dino.supervised import train as supervised
from xcit_dino.supervised.config import FinetuneConfig, RegularizationConfig, finetune_config
from xcit_dino.supervised.data import DeviceAugment, HostAugment, plan_of
from xcit_dino.supervised.finetune import finetune
from xcit_dino.supervised.optim import parameter_groups
from xcit_dino.supervised.trainer import build_model
from xcit_dino.supervised.validation import accuracies
from xcit_dino.train import optim, signals
from xcit_dino.train.distributed import dist
from xcit_dino.train.schedules import Schedule
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

CPU = dist.World(0, 1, torch.device("cpu"))
TINY = {
    "arch": "xcit_pico_6_p8",
    "drop_path_rate": 0.1,
    "input_size": 32,
    "batch_size_per_gpu": 32,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 0.01,
    "model_ema_decay": 0.7,
    "layer_decay": 0.8,
    "eval_every": 1,
    "num_workers": 0,
    "log_every": 1,
    "device": "cpu",
    "precision": "fp32",
}
PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}


def tiny(shards, folder, **options) -> FinetuneConfig:
    return replace(FinetuneConfig(), TINY | {"data_path": shards, "output_dir": folder} | options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- data


def test_every_sample_comes_as_often_as_asked_and_its_copies_together():
    plan = Plan(np.array([5, 7]), seed=3, batch_size=8, repeats=3)
    assert plan.steps_per_epoch == 36 // 8
    places = np.concatenate([plan.batch(step) for step in range(4)])
    order = Plan(np.array([5, 7]), seed=3, batch_size=8).slice(0, 0, 12)
    assert (places % 12).tolist() == np.repeat(order, 3)[:32].tolist()
    assert (places // 12).tolist() == ([0, 1, 2] * 12)[:32]
    assert sorted(plan.batch(4) % 12) != sorted(places[:8] % 12)  # another epoch
    wrap = Plan(np.array([5, 7]), seed=3, batch_size=8, repeats=3, last_batch="wrap")
    assert wrap.batch(4).tolist() == np.concatenate([wrap._copies(0, 32, 36), places[:4]]).tolist()


def test_few_labels_are_those_of_knn_and_nothing_else_is_read(demo_shards, tmp_path):
    index = ShardIndex.load(demo_shards / "train")
    options = {"labels_per_class": 3, "draw_seed": 7, "repeated_aug": 2, "batch_size_per_gpu": 12}
    plan = plan_of(tiny(demo_shards, tmp_path, **options), index, 12)
    chosen = draw(np.asarray(index.labels), 3, 7, 0)
    assert np.bincount(index.labels[chosen]).tolist() == [3] * 12
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.batch(step) for step in steps])
        assert sorted(seen.tolist()) == sorted([*chosen.tolist(), *(chosen + 96).tolist()])
    shard = int(np.searchsorted(index.starts, chosen[0], side="right")) - 1
    assert shard in plan.shards_of_window(0, 0)
    with pytest.raises(InputError, match="the largest class has only 8"):
        plan_of(tiny(demo_shards, tmp_path, labels_per_class=9), index, 12)


def test_a_run_on_few_labels(demo_shards, tmp_path):
    options = {"labels_per_class": 2, "batch_size_per_gpu": 24, "repeated_aug": 1}
    finetune(tiny(demo_shards, tmp_path / "run", **options))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) == 2  # 24 images, 2 epochs
    entry = json.loads((tmp_path / "run/results.json").read_text())["finetune"]
    assert entry["protocol"]["recipe"]["labels_per_class"] == 2
    differing = differences_from_published("finetune", entry["protocol"], 50_000)
    assert differing == ["2 training images a class instead of all"]
    with pytest.raises(InputError, match="labels_per_class 2 -> 3"):
        finetune(tiny(demo_shards, tmp_path / "run", **options | {"labels_per_class": 3}))


def crops(shards, size, *, workers=0, step=0, repeats=3, **options):
    config = replace(FinetuneConfig(), TINY | options)
    index = ShardIndex.load(shards / "train")
    plan = Plan(index.counts, seed=0, batch_size=size, repeats=repeats)
    host_transform = HostAugment(config.regularization, 0)
    loader = CropLoader(
        index, plan, config.regularization.crops, LoaderConfig(num_workers=workers),
        start_step=step, host_transform=host_transform,
    )  # fmt: skip
    (batch,) = next(iter(loader))
    return index, batch, batch.global_crops[0].clone()


def test_copies_share_pixels_and_label_and_differ_in_augmentation(demo_shards):
    index, batch, images = crops(demo_shards, 12)
    assert batch.sources.tolist() == (batch.samples % 96).tolist()
    assert batch.labels.tolist() == index.labels[batch.sources].tolist()
    assert batch.sources[0] == batch.sources[1] and not torch.equal(images[0], images[1])


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "none"])
def test_augmentation_depends_on_seed_and_sample_only(demo_shards, aa):
    """Not on workers, nor on the batch, nor on what was drawn before."""
    _, batch, images = crops(demo_shards, 12, step=1, aa=aa)
    _, other, again = crops(demo_shards, 6, workers=1, step=2, aa=aa)
    assert other.samples.tolist() == batch.samples[:6].tolist()
    assert torch.equal(again, images[:6])


def test_without_augmentation_the_crop_stays_and_half_are_flipped(demo_shards):
    _, _, plain = crops(demo_shards, 96, repeats=1, hflip=0.0, **PLAIN)
    _, _, flipped = crops(demo_shards, 96, repeats=1, hflip=1.0, **PLAIN)
    _, _, some = crops(demo_shards, 96, repeats=1, hflip=0.5, **PLAIN)
    assert torch.equal(flipped, plain.flip(-1))
    share = np.mean([torch.equal(a, b) for a, b in zip(some, flipped, strict=True)])
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("aa", ["v0", "rand-m9-mstd0.5-inc1", "rand-m0", "rand-m20-mmax20-inc1"])
def test_posterizing_to_no_bits_leaves_a_black_image(aa):
    """As in every Pillow before 13, which refuses 0 bits; the default policy draws them too."""
    transform = HostAugment(RegularizationConfig(aa=aa), 0).transform
    image, found = Image.new("RGB", (8, 8), (200, 100, 50)), []
    step = transform.transforms[0]
    ops = getattr(step, "ops", None) or [op for pair in step.policy for op in pair]
    for op in (op for op in ops if op.name.startswith("Posterize")):
        op.prob = 1.0
        found += [op(image).getpixel((0, 0)) for _ in range(200)]
    assert (0, 0, 0) in found


@pytest.mark.parametrize(
    "aa", ["rand-x", "rand-m9-tfoo", "rand-mstdinf", "v0-x", "augmix-z", "rand-tweights-n30"]
)
def test_no_part_of_a_policy_is_ignored(aa):
    with pytest.raises(InputError, match=f"--aa {aa}"):
        HostAugment(RegularizationConfig(aa=aa), 0)


@pytest.mark.parametrize("aa", ["3a", "original-mstd0.5", "rand-m9-n3-t3a", "augmix-m5-w4-d2"])
def test_the_policies_of_timm_s_docs_are_taken(aa):
    HostAugment(RegularizationConfig(aa=aa), 0)


def test_the_policy_is_timms(demo_shards):
    """The worker's result is timm's RandAugment on the plain crop, seeded alike."""
    from xcit_dino.data.rng import random_bits
    from xcit_dino.supervised.data import HOST_STREAM, seed_everything

    _, batch, plain = crops(demo_shards, 24, repeats=1, **PLAIN | {"hflip": 0.0})
    _, _, images = crops(demo_shards, 24, repeats=1, hflip=0.0)
    policy = timm.data.auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": 3},
    )
    changed = 0
    for crop, image, sample in zip(plain, images, batch.samples, strict=True):
        seed_everything(random_bits(0, HOST_STREAM, 0, sample)[0])
        __import__("random").random()  # the flip's
        expected = policy(Image.fromarray(crop.permute(1, 2, 0).numpy()))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))
        changed += not torch.equal(crop, image)
    assert changed > 12


def test_mixed_labels_and_images(demo_shards):
    index, batch, images = crops(demo_shards, 16, **PLAIN)
    count = len(index.classes or [])
    options = TINY | PLAIN | {"smoothing": 0.1}
    plain, labels = DeviceAugment(replace(FinetuneConfig(), options), count, CPU)(batch)
    one_hot = torch.nn.functional.one_hot(batch.labels, count)
    torch.testing.assert_close(labels, one_hot * 0.9 + 0.1 / count)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    torch.testing.assert_close(plain, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    mixing = DeviceAugment(replace(FinetuneConfig(), options | {"mixup": 0.8}), count, CPU)
    mixed, labels = mixing(batch)
    share = ((mixed - plain.flip(0)) / (plain - plain.flip(0))).nanmedian()
    torch.testing.assert_close(mixed, share * plain + (1 - share) * plain.flip(0))
    soft = one_hot * 0.9 + 0.1 / count
    torch.testing.assert_close(labels, share * soft + (1 - share) * soft.flip(0))
    assert torch.equal(mixing(batch)[0], mixed)


def test_erasing_fills_one_rectangle_of_some_images(demo_shards):
    _, batch, _ = crops(demo_shards, 96, repeats=1, **PLAIN)
    config = replace(FinetuneConfig(), TINY | PLAIN | {"reprob": 0.5})
    plain, _ = DeviceAugment(replace(config, {"reprob": 0.0}), 12, CPU)(batch)
    erased, _ = DeviceAugment(config, 12, CPU)(batch)
    touched = [(a != b).any(0) for a, b in zip(plain, erased, strict=True)]
    assert 30 < sum(bool(mask.any()) for mask in touched) < 66
    for mask in touched:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            assert mask.sum() == height * width


# -- optimizer, schedule, average


def test_layers_are_those_of_timms_xcit():
    ours = create_model("xcit_nano_12_p8", num_classes=10)
    theirs = timm.create_model("xcit_nano_12_p8_224", num_classes=10)
    names = {id(p): n for n, p in theirs.named_parameters()}
    expected = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(theirs, layer_decay=0.7)
        for p in group["params"]
    }
    groups = parameter_groups(ours, 0.7)
    names = {id(p): n for n, p in ours.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names)
    for name, group in found.items():
        other = name.replace("pos_embeder", "pos_embed")
        if "cls_attn_blocks" in name:
            other = other.replace(".qkv.", ".q.")  # timm splits them
        assert group["lr_scale"] == pytest.approx(expected[other]), name
        spared = name.endswith((".bias", "temperature", "cls_token"))
        spared |= dict(ours.named_parameters())[name].ndim == 1
        assert group["decays"] is not spared, name


def test_a_layer_decay_of_one_is_plain_adamw():
    groups = parameter_groups(create_model("xcit_pico_6_p8", num_classes=4), 1.0)
    assert [(g["lr_scale"], g["decays"]) for g in groups] in (
        [(1.0, False), (1.0, True)],
        [(1.0, True), (1.0, False)],
    )


@pytest.mark.parametrize(
    ("names", "spared"),
    [(list_models()[:14], set()), (["timm/vit_tiny_patch16_224"], {"pos_embed"})],
)
def test_weight_decay_is_as_in_pretraining_but_for_what_timm_spares(names, spared):
    for name in names:
        with torch.device("meta"):
            model = create_model(name, num_classes=4)
        of = {id(p): name for name, p in model.named_parameters()}
        first = {of[id(p)] for p in optim.parameter_groups(model)[1]["params"]}
        groups = parameter_groups(model, 1.0)
        second = {of[id(p)] for g in groups if not g["decays"] for p in g["params"]}
        assert second - first == spared and first <= second


def test_other_backbones_have_timms_layers():
    model = create_model("timm/vit_tiny_patch16_224", num_classes=4)
    scales = {g["lr_scale"] for g in parameter_groups(model, 0.5)}
    assert scales == {0.5**i for i in range(14)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_epochs": 20}, "--warmup_epochs 20 with --epochs 10: .*50%"),
        ({"cooldown_epochs": 9}, "--cooldown_epochs 9 .*falls to --min_lr at once"),
        ({"cooldown_epochs": 5, "warmup_epochs": 4}, ""),
    ],
)
def test_schedules_that_the_run_is_too_short_for_are_remarked(options, words):
    remarks = replace(FinetuneConfig(), {"epochs": 10, "warmup_epochs": 2} | options).remarks()
    assert len(remarks) == bool(words) and all(re.search(words, remark) for remark in remarks)


def test_schedule():
    options = {"epochs": 10, "warmup_epochs": 2, "cooldown_epochs": 3, "lr": 1.0, "min_lr": 0.1}
    config = replace(FinetuneConfig(), options)
    schedule = Schedule(config, 10, 512, config.cooldown_epochs)
    lrs = [schedule(step).lr for step in range(schedule.total_steps)]
    assert schedule.total_steps == 100 and schedule.peak_lr == 2.0
    assert lrs[0] == pytest.approx(1e-6) and lrs[19] == 2.0 == max(lrs)
    assert lrs[45] == pytest.approx(0.1 + 1.9 * (1 + np.cos(np.pi * 25 / 50)) / 2)
    assert lrs[70:] == [0.1] * 30 and schedule(55).weight_decay == pytest.approx(0.05)


# -- whole runs


def state_of(folder):
    return load_checkpoint(newest_checkpoint(folder))


def logged(folder, name="loss"):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(demo_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finetune(tiny(demo_shards, folder))
    return folder


@pytest.mark.parametrize("cut", [1, 4])
def test_a_run_cut_off_anywhere_ends_with_the_same_bits(cut, demo_shards, uninterrupted, tmp_path):
    for _ in range(2):  # the second time there is nothing left to do
        finetune(tiny(demo_shards, tmp_path, max_steps=cut, num_workers=cut % 3))
        assert state_of(tmp_path)["step"] == cut
    assert not (tmp_path / "results.json").exists()
    torch.rand(7), np.random.rand(7)
    finetune(tiny(demo_shards, tmp_path))
    whole, resumed = state_of(uninterrupted), state_of(tmp_path)
    for network in ("model", "model_ema"):
        for name, value in whole[network].items():
            assert torch.equal(value, resumed[network][name]), name
    assert logged(tmp_path) == logged(uninterrupted) and len(logged(tmp_path)) == 6
    for name in ("finetune", "finetune/ema"):
        assert results(tmp_path)[name]["metrics"] == results(uninterrupted)[name]["metrics"]


def test_results_are_those_of_the_last_checkpoint(demo_shards, uninterrupted):
    found, state = results(uninterrupted), state_of(uninterrupted)
    val = ShardIndex.load(demo_shards / "val")
    config = tiny(demo_shards, uninterrupted)
    for name, network in (("finetune", "model"), ("finetune/ema", "model_ema")):
        model = create_model("xcit_pico_6_p8", num_classes=12)
        model.load_state_dict(state[network])
        scores = {"": Scores(val.num_samples, 12)}
        again = accuracies({"": model}, config, val, CPU, scores)[""]
        rows = class_rows(scores[""].gathered())
        assert again | class_means(rows) == found[name]["metrics"]
        assert lines_of(rows, val.classes) == found[name]["per_class"]
        protocol = found[name]["protocol"]
        assert protocol["network"] == network and protocol["start"] == "scratch"
        assert protocol["recipe"]["mixup"] == 0.8 and protocol["val_index"] == val.checksum
    assert len(logged(uninterrupted, "val_top1")) == len(logged(uninterrupted, "val_ema_top1")) == 2
    before = (uninterrupted / "results.json").stat().st_mtime_ns
    finetune(config)  # a finished run is left alone
    assert (uninterrupted / "results.json").stat().st_mtime_ns == before


def test_the_average_is_the_formula(demo_shards, tmp_path, monkeypatch):
    """Parameters and batch-norm statistics; counters are copied."""
    seen = []
    step = supervised.train_step

    def watched(trainer, *rest):
        if not seen:
            seen.append({k: v.clone() for k, v in trainer.average.state_dict().items()})
        metrics = step(trainer, *rest)
        seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return metrics

    monkeypatch.setattr(supervised, "train_step", watched)
    finetune(tiny(demo_shards, tmp_path, max_steps=3))
    expected, *models = seen
    for model in models:
        for name, value in model.items():
            wide = value.is_floating_point()
            expected[name] = 0.7 * expected[name] + 0.3 * value if wide else value
    for name, value in state_of(tmp_path)["model_ema"].items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_the_norm_of_all_gradients_is_clipped(demo_shards, tmp_path, monkeypatch):
    """As timm's NativeScaler does for DeiT and XCiT; pretraining clips each parameter's."""
    inner, norms = supervised.optim.step_unless_nonfinite, []

    def step(optimizer, *rest):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return inner(optimizer, *rest)

    monkeypatch.setattr(supervised.optim, "step_unless_nonfinite", step)
    finetune(tiny(demo_shards, tmp_path, clip_grad=0.01, max_steps=2))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize("seed", [300_000_000, 2**31])
def test_large_seeds(seed, demo_shards, tmp_path):
    finetune(tiny(demo_shards, tmp_path, seed=seed, max_steps=1))
    assert newest_checkpoint(tmp_path).name == "checkpoint-00000001.pth"


def test_learns(demo_shards, tmp_path):
    options = {
        "epochs": 8,
        "batch_size_per_gpu": 16,
        "lr": 0.05,
        "layer_decay": 1.0,
        "smoothing": 0.0,
    }
    gentle = {"repeated_aug": 1, "drop_path_rate": 0.0, "train_scale": (0.6, 1.0), "eval_every": 0}
    finetune(tiny(demo_shards, tmp_path, **options, **gentle, **PLAIN))
    losses = logged(tmp_path)
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.5
    assert results(tmp_path)["finetune"]["metrics"]["top1"] > 2 * 100 / 12


def test_starts_from_a_run_of_pretraining(run_folder, tmp_path):
    """The newest checkpoint's teacher, without the head of pretraining."""
    argv = ["--pretrained_weights", str(run_folder.path), "--config", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text("epochs: 1\ninput_size: 32\n")
    config = finetune_config(argv)
    assert config.model.arch == "xcit_pico_6_p8" and config.loader.data_path == str(run_folder.data)
    assert config.run.output_dir == run_folder.path / "finetune"
    start = replace(config, {"pretrained_weights": run_folder.weights}).start
    model, facts = build_model(config.model, start, 12, tmp_path / "none", 0)
    expected = torch.load(run_folder.weights)["teacher"]["backbone.blocks.0.attn.qkv.weight"]
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], expected)
    assert facts["start"] == "teacher" and facts["head"] == "new"


def test_the_launcher_starts_it_from_the_pretraining_run(tmp_path):
    words = ["--arch", "xcit_nano_12_p8", "--data_path", "s", "--output_dir", str(tmp_path)]
    words += ["--stages", "pretrain,finetune,distill", "--ngpus", "0", "--nproc", "2"]
    launch = launch_config([*words, "--finetune.epochs", "3", "--distill.nproc", "1"])
    _, finetuning, distilling = launch.stages
    assert finetuning.entry == "xcit_dino.supervised.finetune:finetune"
    config = finetuning.config
    assert config.model.arch == "xcit_nano_12_p8" and config.run.epochs == 3
    assert config.start.pretrained_weights == tmp_path
    assert config.run.output_dir == tmp_path / "finetune"
    assert str(config.loader.data_path).endswith("/s")
    assert finetuning.num_tasks == 2 and distilling.num_tasks == 1
    assert distilling.config.teacher.teacher_model == "regnety_160.deit_in1k"


def test_evaluate_repeats_its_accuracy(uninterrupted):
    config = EvaluateConfig(EvalTargetConfig(uninterrupted, num_workers=0, device="cpu"))
    evaluate.run(config)
    found = results(uninterrupted)
    assert found["evaluate"]["metrics"] == found["finetune"]["metrics"]
    assert found["evaluate"]["protocol"]["weights"] == found["finetune"]["protocol"]["weights"]


def test_a_signal_saves_and_says_how_to_go_on(demo_shards, tmp_path):
    signals.request("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM after step 1; the same command"):
        finetune(tiny(demo_shards, tmp_path))
    assert state_of(tmp_path)["step"] == 1


def test_other_classes_are_refused_unless_a_new_head_is_asked_for(demo_shards, tmp_path):
    weights = tmp_path / "other.pth"
    torch.save({"model": create_model("xcit_pico_6_p8", num_classes=7).state_dict()}, weights)
    options = {"pretrained_weights": weights, "epochs": 1}
    with pytest.raises(InputError, match="7 classes.*12"):
        finetune(tiny(demo_shards, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
    finetune(tiny(demo_shards, tmp_path / "run", **options, new_head=True, max_steps=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_path": None}, "--data_path is missing"),
        ({"batch_size_per_gpu": 100}, "fewer than one global batch"),
        ({"batch_size_per_gpu": 15}, "must be even"),
        ({"input_size": 30}, "multiple of its patch size 8, say 32"),
        ({"aa": "bogus"}, "--aa bogus: timm has no such policy"),
        ({"pretrained_weights": "missing.pth"}, "missing.pth: no such file"),
        ({"train_scale": (0.5, 0.1)}, "--train_scale"),
        ({"decoder": "cuda"}, "--decoder"),
    ],
)
def test_bad_input_writes_nothing(options, words, demo_shards, tmp_path):
    with pytest.raises(InputError, match=words):
        finetune(tiny(demo_shards, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_unlabeled_images_are_refused(unlabeled, tmp_path):
    with pytest.raises(InputError, match="have no label"):
        finetune(tiny(unlabeled, tmp_path / "run", batch_size_per_gpu=4))


def test_recipes():
    config = finetune_config(["--arch", "xcit_small_12_p8_384", "--epochs", "7"])
    assert config.model.arch == "xcit_small_12_p8" and config.run.epochs == 7
    assert config.regularization.input_size == 384
    assert finetune_config(["--arch", "xcit_small_12_p8_224"]).regularization.input_size == 224
