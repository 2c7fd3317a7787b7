"""Pretraining from existing weights: every layout a start can have, and files that are refused."""

import json
import re
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.models.test_weights import identical, network, prefixed
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError
from xcit_dino.models.head import DINOHead
from xcit_dino.models.weights import formats, layouts, timm_hub
from xcit_dino.models.zoo import create_model
from xcit_dino.options import absolute, options, replace
from xcit_dino.ssl.config import PretrainConfig, pretrain_config
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.ssl.start import initialize, with_input_settings
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train.distributed import dist
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

ARCH = "xcit_pico_6_p8"
TINY = {
    "arch": ARCH,
    "out_dim": 64,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "batch_size_per_gpu": 8,
    "epochs": 1,
    "warmup_epochs": 0,
    "num_workers": 0,
    "log_every": 1,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make(DemoConfig(folder, train=24, val=16))
    return folder


def trainer_from(source, **changes):
    """A trainer whose networks have begun from ``source``, and the facts about it."""
    config = replace(PretrainConfig(), TINY | {"init_from": str(source)} | changes)
    config = with_input_settings(config)
    world = dist.World(0, 1, torch.device("cpu"))
    trainer = set_up(config, world, torch.float32, data="", global_batch=8)
    before = {name: value.clone() for name, value in trainer.student.head.state_dict().items()}
    return trainer, initialize(trainer), before


def head_of(dim, out_dim=64, hidden=32, bottleneck=16):
    return DINOHead(dim, out_dim, hidden_dim=hidden, bottleneck_dim=bottleneck).state_dict()


def backbones():
    """(name of a layout, how a file of it is written): all from the network of seed 1."""
    a, other = (network(ARCH, seed=seed).state_dict() for seed in (1, 2))
    classifier = network(ARCH, num_classes=5, seed=1).state_dict()
    supervised = a | {k: v for k, v in classifier.items() if k.startswith("head.")}
    dino = {
        "student": prefixed("module.backbone.", other) | prefixed("module.head.", head_of(80)),
        "teacher": prefixed("backbone.", a) | prefixed("head.", head_of(80)),
    }
    return {
        "official DINO, backbone.pth": a,
        "official supervised.pth": {"model": supervised, "epoch": 3},
        "finetuned by us.pth": {"model": supervised, "model_ema": other},
        "without a center.pth": dino,
        "distilled.pth": prefixed("Student.", a) | prefixed("Teacher.", {"w": torch.ones(2)}),
        "vissl.torch": {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": a, "heads": prefixed("0.", head_of(80))}}
            }
        },
        "official DINO in DDP.pth": prefixed("module.backbone.", a),
        "timm.pth": layouts.to_timm(supervised),
        "timm.safetensors": layouts.to_timm(a),
        "ours.safetensors": a,
        "passl.pdparams": layouts.to_paddle(a),
    }


@pytest.mark.parametrize("name", list(backbones()))
def test_a_backbone_of_every_layout_begins_student_and_teacher(name, tmp_path, capsys):
    """Its tensors are in both, and the head is as it was initialized."""
    path, tree = tmp_path / name, backbones()[name]
    if path.suffix in (".pth", ".torch"):
        torch.save(tree, path)
    else:
        formats.write(path, tree, {})
    trainer, facts, head = trainer_from(path)
    want = network(ARCH, seed=1).state_dict()
    if path.suffix == ".pdparams":  # counts no batches
        want = {k: v * (v.ndim > 0 or v.is_floating_point()) for k, v in want.items()}
    for net in (trainer.student, trainer.teacher):
        assert identical(dict(net.backbone.state_dict()), want)
        assert identical(dict(net.head.state_dict()), head)
    assert facts["start"] == path.name and len(facts["start_weights"]) > 10
    said = capsys.readouterr().out
    assert f"{name}: loaded the " in said and "for student and teacher; their heads are new" in said


def test_a_whole_dino_checkpoint_gives_all_or_with_new_head_its_teachers_backbone(tmp_path):
    nets = {}
    for seed, key in ((1, "teacher"), (2, "student")):
        backbone = prefixed("backbone.", network(ARCH, seed=seed).state_dict())
        nets[key] = backbone | prefixed("head.", head_of(80))
    path = tmp_path / "dino.pth"
    torch.save(nets | {"dino_loss": {"center": torch.ones(1, 64)}}, path)
    trainer, *_ = trainer_from(path)
    assert identical(dict(trainer.student.state_dict()), nets["student"])
    assert identical(dict(trainer.teacher.state_dict()), nets["teacher"])
    assert trainer.loss.center.eq(1).all()
    trainer, _, head = trainer_from(path, new_head=True, out_dim=16)
    want = network(ARCH, seed=1).state_dict()
    for net in (trainer.student, trainer.teacher):
        assert identical(dict(net.backbone.state_dict()), want)
        assert identical(dict(net.head.state_dict()), head)
    assert trainer.loss.center.eq(0).all()


def test_a_timm_file_and_timms_own_weights_by_name(tmp_path, monkeypatch, capsys):
    """A classifier; images are then normalized as timm's weights need it."""
    arch = "timm/test_resnet"
    trained = timm.create_model("test_resnet")
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    monkeypatch.setattr(timm_hub, "cached_file", lambda known: path)
    want = {k: v for k, v in trained.state_dict().items() if not k.startswith("fc.")}
    small = {"global_crops_size": 64, "local_crops_size": 32, "drop_path_rate": 0}
    for source in (path, arch, f"{arch}.r160_in1k"):
        trainer, facts, _ = trainer_from(source, arch=arch, **small)
        for net in (trainer.student, trainer.teacher):
            assert identical(dict(net.backbone.state_dict()), want)
        assert trainer.config.augment.mean == (0.5, 0.5, 0.5)
        assert facts["start"] in (path.name, source)
    assert "images are normalized by mean (0.5, 0.5, 0.5)" in capsys.readouterr().out


def test_weights_by_their_publishers_names_fit_timms_network(tmp_path):
    """Meta's DINOv2: a mask token beside timm's tensors, and SwiGLU's and LayerScale's names."""
    arch = "vit_small_patch14_dinov2"
    model = timm.create_model(arch, num_classes=0, img_size=28)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    ours = create_model(f"timm/{arch}", img_size=28)
    from xcit_dino.models.weights.load import load_backbone

    load_backbone(tmp_path / "dinov2_vits14_pretrain.pth", ours)
    assert identical(dict(ours.state_dict()), dict(model.state_dict()))


def test_the_architecture_is_that_of_the_start(tmp_path, monkeypatch):
    """timm's name, or a run folder's; a given --arch wins or is refused."""
    config = pretrain_config(["--init_from", "timm/resnet18.a1_in1k"])
    assert config.model.arch == "timm/resnet18.a1_in1k"
    monkeypatch.chdir(tmp_path)
    assert dict(options(absolute(config)))["init_from"] == "timm/resnet18.a1_in1k"
    Path("run").mkdir()
    Path("run/config.yaml").write_text("arch: xcit_nano_12_p8\n")
    config = pretrain_config(["--init_from", "run"])
    assert config.model.arch == "xcit_nano_12_p8"
    assert dict(options(absolute(config)))["init_from"] == str(tmp_path / "run")
    assert pretrain_config(["--init_from=run", "--arch", ARCH]).model.arch == ARCH
    Path("exported").mkdir()
    for name, arch in (("xcit_nano_12_p8_224", "xcit_nano_12_p8"), ("resnet18", "timm/resnet18")):
        Path("exported/config.json").write_text(json.dumps({"architecture": name}))
        assert pretrain_config(["--init_from", "exported"]).model.arch == arch
    with pytest.raises(InputError, match="not the weights of --arch timm/resnet34; take --arch"):
        pretrain_config(["--init_from", "timm/resnet18", "--arch", "timm/resnet34"])


def test_a_run_keeps_the_normalization_that_its_start_gave(shards, tmp_path):
    mean, std = (0.25, 0.5, 0.75), (0.1, 0.2, 0.3)
    torch.save(
        {"model": network(ARCH).state_dict(), "config": f"mean: {[*mean]}\nstd: {[*std]}\n"
         "global_crops_size: 32\n"},
        tmp_path / "start.pth",
    )  # fmt: skip
    values = TINY | {"data_path": shards, "output_dir": tmp_path / "run"}
    config = replace(PretrainConfig(), values | {"init_from": tmp_path / "start.pth"})
    pretrain(replace(config, {"max_steps": 1}))
    (tmp_path / "start.pth").unlink()
    pretrain(config)  # the start is not read again
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert saved["step"] == 3 and saved["facts"]["start"] == "start.pth"
    assert "mean: [0.25, 0.5, 0.75]" in saved["config"]


def refused_starts(tmp_path):
    """(options, words of the message)"""
    a = network(ARCH, seed=1).state_dict()
    broken = {**a, "norm.bias": torch.full_like(a["norm.bias"], torch.nan)}
    trees = {
        "nan.pth": broken,
        "p4.pth": network("xcit_pico_6_p4").state_dict(),
        "effnet.pth": create_model("timm/test_efficientnet").state_dict(),
        "named.pth": {"arch": "timm/test_vit", "model": create_model("timm/test_vit").state_dict()},
        "half.pth": dict(list(a.items())[:-2]),
        "dino.pth": {
            key: prefixed("backbone.", a) | prefixed("head.", head_of(80, 8, 24, 4))
            for key in ("student", "teacher")
        } | {"loss": {"center": torch.ones(8)}},
    }  # fmt: skip
    for name, tree in trees.items():
        torch.save(tree, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty").mkdir()
    vit = {"arch": "timm/test_vit", "drop_path_rate": 0}
    effnet = {"arch": "timm/test_efficientnet", "drop_path_rate": 0}
    return [
        ({"init_from": "nan.pth"}, "NaN or infinite"),
        ({"init_from": "p4.pth"}, f"holds xcit_pico_6_p4, but the model is {ARCH}"),
        ({"init_from": "effnet.pth"}, f"holds no XCiT, but the model is {ARCH}"),
        ({"init_from": "p4.pth", **effnet}, "holds xcit_pico_6_p4.* is timm/test_efficientnet"),
        ({"init_from": "named.pth", **effnet}, "holds timm/test_vit.* is timm/test_efficientnet"),
        ({"init_from": "effnet.pth", **vit}, "does not fit timm/test_vit .missing: .*unexpected"),
        ({"init_from": "half.pth"}, "missing: "),
        (
            {"init_from": "dino.pth"},
            "out_dim 8, head_bottleneck_dim 4, head_hidden_dim 24, but the run out_dim 64.*add "
            "--out_dim 8 --head_bottleneck_dim 4 --head_hidden_dim 24, or .* --new_head true",
        ),
        ({"init_from": "none.pth"}, "no such file"),
        ({"init_from": "list.pth"}, "contains a list instead of named tensors"),
        ({"init_from": "empty"}, "no checkpoint in this folder"),
        ({"init_from": "timm/test_vitt", "arch": "timm/test_vitt"}, "did you mean test_vit"),
        ({"init_from": "timm/test_vit.x", **vit}, "no weights 'x' of test_vit; it has test_vit"),
        (
            {"init_from": "timm/test_vit", **vit},
            "--init_from timm/test_vit: .* could not be fetched .*no network.*; where there is a "
            "network, 'hf download timm/test_vit.r160_in1k model.safetensors --local-dir FOLDER', "
            "then name --init_from FILE --arch timm/test_vit",
        ),
        (
            {"init_from": "timm/coatnet_0_224", "arch": "timm/coatnet_0_224", "drop_path_rate": 0},
            "timm has no weights of this model",
        ),
    ]


def test_a_node_without_a_network_is_told_at_once(monkeypatch):
    def unknown(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(timm_hub.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(timm_hub, "getproxies", dict)
    monkeypatch.setattr(timm_hub, "cached_file", lambda known: None)
    for option, takes in (
        ("--init_from timm/test_vit", "--init_from FILE --arch timm/test_vit"),
        ("--teacher_model test_vit", "--teacher_model test_vit --teacher_path FILE"),
    ):
        with pytest.raises(InputError) as refusal:
            timm_hub.pretrained("test_vit", option)
        line = str(refusal.value)
        assert line.startswith(f"{option}: timm's weights are not on this machine, and ")
        assert "'hf download timm/test_vit.r160_in1k model.safetensors --local-dir FOLDER'" in line
        assert line.endswith(f"then name {takes}")


def test_refused_starts_write_nothing(shards, tmp_path, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("no network")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(timm_hub, "cached_file", lambda known: None)
    monkeypatch.setattr(timm_hub.socket, "getaddrinfo", lambda *_: [])
    for changes, words in refused_starts(tmp_path):
        if not changes["init_from"].startswith("timm/"):
            changes = changes | {"init_from": tmp_path / changes["init_from"]}
        if "coatnet" in str(changes):
            changes = changes | {"global_crops_size": 224, "local_crops_number": 0}
        config = TINY | {"data_path": shards, "output_dir": tmp_path / "run"} | changes
        with pytest.raises(InputError) as refusal:
            pretrain(replace(PretrainConfig(), config))
        assert re.search(words, str(refusal.value)), refusal.value
        assert not (tmp_path / "run").exists()


def test_batchnorm_statistics_stay_where_they_are_to(shards, tmp_path):
    """In student and teacher, to the end, while weights move; those of the head are not meant."""
    model = create_model(ARCH)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    values = TINY | {
        "data_path": shards, "output_dir": tmp_path / "run", "init_from": tmp_path / "start.pth",
        "freeze_batchnorm": True, "epochs": 1, "momentum_teacher": 0.5, "use_bn_in_head": True,
        "norm_last_layer": True, "head_nlayers": 2,
    }  # fmt: skip
    pretrain(replace(PretrainConfig(), values))
    path = newest_checkpoint(tmp_path / "run")
    assert path is not None
    saved = load_checkpoint(path)
    for net in ("student", "teacher"):
        for name, value in model.named_buffers():
            assert torch.equal(saved[net][f"backbone.{name}"], value), name
        assert saved[net]["head.mlp.1.num_batches_tracked"] > 0
        weight = "patch_embed.proj.0.1.weight"
        assert not torch.equal(saved[net][f"backbone.{weight}"], model.state_dict()[weight])


def test_only_the_head_learns_in_the_first_epochs(shards, tmp_path):
    """Student's and teacher's backbones keep their bits; then they move, lower layers less."""
    torch.manual_seed(1)
    model = create_model(ARCH)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    values = TINY | {
        "data_path": shards, "output_dir": tmp_path / "run", "init_from": tmp_path / "start.pth",
        "freeze_backbone": 1, "freeze_last_layer": 0, "epochs": 2, "layer_decay": 0.7, "lr": 0.01,
        "momentum_teacher": 0.5,
        "keep_checkpoints": 9,
    }  # fmt: skip
    config = replace(PretrainConfig(), values)
    pretrain(replace(config, {"max_steps": 3}))
    pretrain(config)
    first, last = (load_checkpoint(tmp_path / f"run/checkpoints/checkpoint-{step:08d}.pth")
                   for step in (3, 6))  # fmt: skip
    for net in ("student", "teacher"):
        for name, value in model.named_buffers():  # batch-norm statistics
            assert torch.equal(first[net][f"backbone.{name}"], value), name
            assert not torch.equal(last[net][f"backbone.{name}"], value), name
    start = dict(model.named_parameters())
    for net in ("student", "teacher"):
        for name, value in start.items():
            assert torch.equal(first[net][f"backbone.{name}"], value), name
            assert not torch.equal(last[net][f"backbone.{name}"], value), name
    assert not torch.equal(
        first["student"]["head.mlp.0.weight"], last["student"]["head.mlp.0.weight"]
    )
    moved = [
        (last["student"][f"backbone.blocks.{n}.mlp.fc1.weight"]
         - start[f"blocks.{n}.mlp.fc1.weight"]).abs().mean()
        for n in (0, 5)
    ]  # fmt: skip
    assert moved[0] < moved[1] / 3  # five blocks lower: 0.7 ** 5 is 1 / 6
    changed = replace(config, {"may_change": ("layer_decay",), "layer_decay": 1.0, "max_steps": 5})
    (tmp_path / "run/checkpoints/checkpoint-00000006.pth").unlink()
    with pytest.raises(InputError, match="keep --layer_decay as it was, or start another"):
        pretrain(changed)
