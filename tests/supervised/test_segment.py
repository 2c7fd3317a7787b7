"""Segmentation: data, heads, windows and metrics against formulas, torchvision and brute force;
whole runs that learn, stop, resume and run on two processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms.functional import adjust_saturation

from tests import victims
from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.pack.make import make
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.data.targets.loader import Key, one_pass
from xcit_dino.errors import InputError
from xcit_dino.files import file_checksum
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.report.report import page
from xcit_dino.supervised.segment import heads
from xcit_dino.supervised.segment.config import SegmentationConfig, SegmentConfig, segment_config
from xcit_dino.supervised.segment.data import (
    IGNORED,
    Scene,
    SceneTransform,
    TrainTransform,
    jittered,
    resized,
)
from xcit_dino.supervised.segment.evaluation import (
    Predictor,
    confusion_of,
    scores_of,
    window_starts,
)
from xcit_dino.supervised.segment.heads import FPN, LinearHead, SemanticFPN, UperNet
from xcit_dino.supervised.segment.network import build_segmenter
from xcit_dino.supervised.segment.train import PolySchedule, pixel_loss, segment
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import read_runs
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

TINY: dict[str, Any] = {
    "arch": "xcit_pico_6_p8", "epochs": 2, "batch_size_per_gpu": 4, "crop_size": 32,
    "scale": (1.0, 1.0), "color_jitter": (0, 0, 0), "warmup_epochs": 0, "num_workers": 0,
    "log_every": 1, "device": "cpu", "precision": "fp32", "lrs": (0.003, 0.03),
}  # fmt: skip


def draw(folder: Path, train: int = 8, val: int = 4) -> Path:
    """Bright squares (class 1) on a dark ground (class 0) in an ignored frame."""
    rng = np.random.default_rng(0)
    for number in range(train + val):
        split = "train" if number < train else "val"
        image, mask = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8), np.zeros((40, 48), np.uint8)
        y, x = 8 * rng.integers(0, 3, 2)
        image[y : y + 16, x : x + 16], mask[y : y + 16, x : x + 16] = 240, 1
        mask[0] = 255
        for kind, content in (("images", image), ("masks", mask)):
            path = folder / f"src/{kind}/{split}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    (folder / "classes.txt").write_text("ground\nsquare\n")
    make(MakeConfig(str(folder / "src"), folder / "shards", masks=("masks",), num_workers=1,
                    mask_classes=str(folder / "classes.txt")))  # fmt: skip
    return folder / "shards"


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return draw(tmp_path_factory.mktemp("squares"))


def tiny(shards: Path, folder: Path, **options: Any) -> SegmentConfig:
    values = TINY | {"data_path": shards, "output_dir": folder} | options
    return replace(SegmentConfig(), values)


def final(folder: Path) -> dict[str, Any]:
    newest = newest_checkpoint(folder)
    assert newest is not None
    return load_checkpoint(newest)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["segment"]


# ---------------------------------------------------------------------------- metrics


def test_scores_against_sets_of_pixels():
    rng = np.random.default_rng(0)
    mask, predicted = rng.integers(0, 4, (2, 30, 40))
    mask[mask == 3] = IGNORED  # class 3 only in the prediction
    matrix = confusion_of(torch.tensor(mask), torch.tensor(predicted), 5).numpy()
    found = scores_of(matrix)
    counts = mask != IGNORED
    for number in range(4):
        truth, guess = (mask == number) & counts, (predicted == number) & counts
        iou = 100 * (truth & guess).sum() / (truth | guess).sum()
        assert found.iou[number] == pytest.approx(iou)
    assert np.isnan(found.iou[4]) and found.iou[3] == 0
    assert found.miou == pytest.approx(found.iou[:4].mean())
    assert found.pixel_accuracy == pytest.approx(100 * (mask == predicted)[counts].mean())
    recall = [100 * (predicted[mask == n] == n).mean() for n in range(3)]
    assert found.mean_accuracy == pytest.approx(np.mean(recall))


def test_a_known_confusion():
    """By hand: class 0 has 3 of 4 right, class 1 has 1 of 2; IoU 3/5 and 1/3."""
    found = scores_of(np.array([[3, 1], [1, 1]]))
    assert found.iou.tolist() == pytest.approx([60, 100 / 3])
    assert found.metrics == pytest.approx(
        {"miou": 46.6666666, "pixel_accuracy": 66.6666666, "mean_accuracy": 62.5}
    )


@pytest.mark.parametrize("length, window, stride", [(512, 512, 341), (683, 512, 341), (40, 64, 9)])
def test_windows_cover_a_side_as_in_mmsegmentation(length: int, window: int, stride: int):
    grids = max(length - window + stride - 1, 0) // stride + 1  # slide_inference
    ends = [min(i * stride + window, length) for i in range(grids)]
    assert window_starts(length, window, stride) == [max(end - window, 0) for end in ends]


class Colors(torch.nn.Module):
    """Logits that are the image's own channels, at an eighth of its size."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [F.avg_pool2d(images, 8)]


def test_windows_are_averaged():
    task = {"crop_size": 32, "stride": 0.5, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    config = replace(SegmentConfig(), {"arch": "xcit_pico_6_p8", **task})
    flat = np.zeros((48, 72, 3), np.uint8)
    flat[:, :, 1] = 255
    predict = Predictor(Colors(), config, torch.device("cpu"))  # type: ignore[arg-type]
    (logits,) = predict.logits(Scene(flat, np.zeros((48, 72), np.uint16)))
    assert logits.shape == (3, 48, 72)
    assert torch.allclose(logits, torch.tensor([0, 1.0, 0]).view(3, 1, 1).expand(3, 48, 72))
    (small,) = predict(Scene(flat[:20, :24], np.zeros((10, 12), np.uint16)))
    assert small.shape == (10, 12)


# ---------------------------------------------------------------------------- heads


def shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in module.parameters())


def module_of(inputs: int, outputs: int, kernel: int) -> list[tuple[int, ...]]:
    """mmcv's ConvModule with SyncBN."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


OFFICIAL = {  # semantic_segmentation/configs/xcit: embed_dim, depth, out_indices
    "tiny_12": (192, 12, (3, 5, 7, 11)),
    "small_12": (384, 12, (3, 5, 7, 11)),
    "small_24": (384, 24, (7, 11, 15, 23)),
    "medium_24": (512, 24, (7, 11, 15, 23)),
}
COUNTED = {  # parameters of mmsegmentation's neck and FPNHead, UPerHead and FCNHead, 150 classes
    192: (2_824_342, 28_095_788), 384: (8_134_294, 30_111_020), 512: (13_312_662, 31_454_508),
}  # fmt: skip


def official_pyramid(width: int, patch: int) -> list[tuple[int, ...]]:
    """``backbone/xcit.py``: fpn1 and fpn2 with SyncBN between two transposed convolutions."""
    up = [(width, width, 2, 2), (width,)]
    return [*up, *up, *up, (width,), (width,)] if patch == 16 else up


def official_fpn(width: int) -> list[tuple[int, ...]]:
    """``sem_fpn_xcit_p*.py``: FPN neck with out_channels = embed_dim, num_outs 4; FPNHead with
    channels 128, feature_strides 4 8 16 32."""
    expected: list[tuple[int, ...]] = []
    for _ in range(4):
        expected += [(width, width, 1, 1), (width,), (width, width, 3, 3), (width,)]
    for convs in (1, 1, 2, 3):
        expected += module_of(width, 128, 3) + (convs - 1) * module_of(128, 128, 3)
    return [*expected, (150, 128, 1, 1), (150,)]


def official_upernet(width: int) -> list[tuple[int, ...]]:
    """``upernet_xcit_p*.py``: UPerHead with channels 512, pool_scales 1 2 3 6; auxiliary FCNHead
    with channels 256, num_convs 1."""
    expected = 4 * module_of(width, 512, 1) + module_of(width + 4 * 512, 512, 3)
    expected += 3 * (module_of(width, 512, 1) + module_of(512, 512, 3))
    expected += module_of(4 * 512, 512, 3) + [(150, 512, 1, 1), (150,)]
    return [*expected, *module_of(width, 256, 3), (150, 256, 1, 1), (150,)]


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("name", OFFICIAL)
def test_heads_are_those_of_the_official_configs(name: str, patch: int):
    """Layers, their shapes and the number of parameters, for every size that was published."""
    width, depth, taps = OFFICIAL[name]
    arch = f"xcit_{name}_p{patch}"
    for number, (head, layers) in enumerate(
        {"fpn": official_fpn, "upernet": official_upernet}.items()
    ):
        config = replace(SegmentConfig(), {"arch": arch, "head": head, "crop_size": 32})
        with torch.device("meta"):
            backbone = create_model(arch, num_classes=0)
            network = build_segmenter(config, backbone, 150)
        assert network.taps == taps and len(backbone.blocks) == depth  # type: ignore[arg-type]
        assert shapes(network.head) == sorted(layers(width))
        assert shapes(network.pyramid) == sorted(official_pyramid(width, patch))
        count = sum(p.numel() for p in network.head.parameters())
        assert count == COUNTED[width][number]


def test_fpn_is_torchvisions():
    ours, theirs = FPN([5, 6, 7], 8), FeaturePyramidNetwork([5, 6, 7], 8)
    for n in range(3):
        theirs.inner_blocks[n].get_submodule("0").load_state_dict(ours.lateral[n].state_dict())
        theirs.layer_blocks[n].get_submodule("0").load_state_dict(ours.output[n].state_dict())
    maps = [torch.randn(2, c, s, s) for c, s in ((5, 12), (6, 6), (7, 3))]
    found = theirs(dict(enumerate(maps)))
    for mine, other in zip(ours(maps), found.values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_outputs_have_the_finest_size():
    maps = [torch.randn(2, 16, s, s) for s in (32, 16, 8, 4)]
    upernet = UperNet([16] * 4, 5)
    assert [x.shape for x in upernet(maps)] == [(2, 5, 32, 32), (2, 5, 8, 8)]
    assert [x.shape for x in upernet.eval()(maps)] == [(2, 5, 32, 32)]
    assert [x.shape for x in SemanticFPN([16] * 4, 5)(maps)] == [(2, 5, 32, 32)]
    assert [x.shape for x in LinearHead([16, 16], 5, 3)(maps[1:3])] == [(2, 5, 16, 16)] * 3


def test_ignored_pixels_do_not_count():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    masks[:, :3] = IGNORED
    large = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large[:, :, 3:], masks[:, 3:]) * 5 / 8  # mmseg: of all pixels
    assert torch.allclose(pixel_loss(logits, masks), expected)
    assert pixel_loss(logits, torch.full_like(masks, IGNORED)) == 0


# ---------------------------------------------------------------------------- data


def numbered(height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red and green are row and column, with a mask that says the same."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([y, x, 0 * y], -1), (y // 4 * 12 + x // 4).astype(np.uint8)


def test_image_and_mask_are_cut_alike():
    task = SegmentationConfig(
        crop_size=32, resize_size=40, scale=(1, 1), color_jitter=(0, 0, 0), cat_max_ratio=1
    )
    pixels, mask = numbered()
    flipped = set()
    for sample in range(20):
        crop = TrainTransform(task)(pixels, mask, Key(0, 0, sample))
        assert crop.image.shape == (32, 32, 3) and crop.mask.shape == (32, 32)
        y, x = crop.image[..., 0].astype(int), crop.image[..., 1].astype(int)
        assert (crop.mask == y // 4 * 12 + x // 4).all()
        flipped.add(bool(x[0, 1] < x[0, 0]))
        again = TrainTransform(task)(pixels, mask, Key(0, 0, sample))
        assert (again.image == crop.image).all() and (again.mask == crop.mask).all()
    assert flipped == {True, False}


def test_small_images_are_padded_with_ignored_pixels():
    task = SegmentationConfig(crop_size=64, resize_size=32, scale=(1, 1), color_jitter=(0, 0, 0))
    crop = TrainTransform(task)(*numbered(), Key(0, 0, 1))
    assert (crop.mask[32:] == IGNORED).all() and (crop.mask[:32, :38] != IGNORED).all()
    scene = SceneTransform(task)(*numbered(), Key(0, 0, 1))
    assert scene.image.shape == (32, 38, 3) and scene.mask.shape == (40, 48)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_the_ignored_value_of_both_depths(kind: Any):
    mask = np.array([[0, np.iinfo(kind).max, 7]], kind)
    scene = SceneTransform(SegmentationConfig())(np.zeros((1, 3, 3), np.uint8), mask, Key(0, 0, 0))
    assert scene.mask.tolist() == [[0, IGNORED, 7]]


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1
    task = SegmentationConfig(crop_size=32, resize_size=64, scale=(1, 1), cat_max_ratio=0.75)
    pixels = np.zeros((64, 64, 3), np.uint8)
    crops = [TrainTransform(task)(pixels, mask, Key(0, 0, n)).mask for n in range(30)]
    pure = sum(min(crop.mean(), 1 - crop.mean()) < 0.25 for crop in crops)
    free = replace(task, {"cat_max_ratio": 1.0})
    others = [TrainTransform(free)(pixels, mask, Key(0, 0, n)).mask for n in range(30)]
    assert pure <= 2 < sum(min(crop.mean(), 1 - crop.mean()) < 0.25 for crop in others)


def test_the_schedule_is_mmsegmentations(tmp_path: Path):
    options = {"epochs": 10, "warmup_epochs": 2, "lr": 6e-5, "head": "fpn", "min_lr": 0.0}
    config = replace(SegmentConfig(), options)
    schedule = PolySchedule(config, 10, 16)
    assert schedule.total_steps == 100
    assert schedule(50).lr == pytest.approx(6e-5 * 0.5)
    poly = 6e-5 * (1 - 10 / 100)
    assert schedule(10).lr == pytest.approx(poly * 10 / 19, rel=1e-3)
    assert replace(config, {"power": 0.9}) and schedule(99).lr == pytest.approx(6e-7)
    assert PolySchedule(config, 10, 32)(50).lr == pytest.approx(6e-5)


# ---------------------------------------------------------------------------- whole runs


def test_learns_the_squares_and_writes_results(squares: Path, tmp_path: Path):
    segment(tiny(squares, tmp_path / "run", epochs=30, eval_every=10))
    found = result(tmp_path / "run")
    assert found["metrics"]["miou"] > 65 and found["iou"]["square"] > 50  # else 40 and 0
    assert [point["lr"] for point in found["grid"]] == [0.003, 0.03]
    assert found["metrics"]["miou"] == max(point["miou"] for point in found["grid"])
    assert found["protocol"]["backbone"] == "frozen" and found["protocol"]["val_images"] == 4
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert sum("val_miou" in json.loads(line) for line in lines) == 3
    text = page(read_runs([tmp_path / "run"]))
    assert "Segmentation, mean IoU</p>" in text and "Predicted masks" in text
    assert 'fill="#800000"/></svg>square' in text and "Not shown" not in text
    before = (tmp_path / "run/results.json").read_bytes()
    segment(tiny(squares, tmp_path / "run", epochs=30, eval_every=10))
    assert (tmp_path / "run/results.json").read_bytes() == before


def test_a_grid_in_one_pass_is_each_rate_alone(squares: Path, tmp_path: Path):
    segment(tiny(squares, tmp_path / "both"))
    both = final(tmp_path / "both")["segmenter"]
    for number, lr in enumerate(TINY["lrs"]):
        segment(tiny(squares, tmp_path / str(lr), lrs=(lr,)))
        alone = final(tmp_path / str(lr))["segmenter"]
        for name in ("weight", "bias"):
            one = alone[f"head.heads.0.{name}"]
            assert torch.allclose(both[f"head.heads.{number}.{name}"], one, atol=1e-6)


def test_a_checkpoint_is_a_backbone_to_start_from(squares: Path, tmp_path: Path, capsys: Any):
    """For other commands, for a file of the backbone alone, and for another segmentation."""
    tuned = {"head": "fpn", "finetune": True, "lr": 0.01, "max_steps": 1}
    segment(tiny(squares, tmp_path / "run", **tuned))
    checkpoint = newest_checkpoint(tmp_path / "run")
    words = ["weights", "extract", checkpoint, "--prefix", "segmenter.backbone"]
    words += ["--remove_prefix", "--output", tmp_path / "backbone.pth"]
    assert main([str(word) for word in words]) == 0
    segment(tiny(squares, tmp_path / "next", pretrained_weights=tmp_path / "run", max_steps=1))
    assert "loaded the model under 'segmenter.backbone.'" in capsys.readouterr().out
    trained = load_checkpoint(checkpoint)["segmenter"]
    for file in (tmp_path / "backbone.pth", checkpoint):
        backbone = create_model("xcit_pico_6_p8", num_classes=0)
        load_backbone(file, backbone, None)
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, trained[f"backbone.{name}"]), name


def test_bf16_whose_gradients_torch_does_not_initialize_is_refused(squares: Path, tmp_path: Path):
    options = {"arch": "timm/resnet10t", "crop_size": 16, "head": "linear", "lrs": (0.01,)}
    with pytest.raises(InputError, match="--crop_size 16: in bf16 on a CPU, torch computes wrong"):
        segment(tiny(squares, tmp_path / "a", precision="bf16", finetune=True, **options))


def test_a_frozen_backbone_stays_as_it_was(squares: Path, tmp_path: Path):
    segment(tiny(squares, tmp_path / "a", head="fpn", max_steps=1))
    segment(tiny(squares, tmp_path / "b", head="fpn"))
    a, b = (final(tmp_path / name)["segmenter"] for name in "ab")
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert {name for name in a if name.startswith("backbone.")} <= same < set(a)


def test_bands_of_16_bits_are_the_same_8_bit_image(squares: Path, tmp_path: Path):
    """The squares as channels 5, 2 and 3 of 16-bit arrays whose other channels are noise."""
    rng = np.random.default_rng(0)
    shutil.copytree(squares.parent / "src", tmp_path / "src")
    for path in sorted((tmp_path / "src/images").rglob("*.png")):
        deep = rng.integers(0, 256, (40, 48, 5)).astype(np.uint16)
        deep[..., [4, 1, 2]] = np.asarray(Image.open(path))
        np.save(path.with_suffix(".npy"), deep)
        path.unlink()
    classes = str(squares.parent / "classes.txt")
    make(MakeConfig(str(tmp_path / "src"), tmp_path / "shards", masks=("masks",), num_workers=1,
                    mask_classes=classes, pixels="5xuint16"))  # fmt: skip
    task = SegmentationConfig(crop_size=32, resize_size=40)
    found = []
    for shards, bands in ((squares, ()), (tmp_path / "shards", (5, 2, 3))):
        loader = LoaderConfig(num_workers=0, bands=bands)
        index = ShardIndex.load(resolve_split(str(shards), "train"))
        scenes = one_pass(index, loader, SceneTransform(task), range(index.num_samples))
        found.append(sorted((scene for _, scene in scenes), key=lambda scene: scene.image.sum()))
    for one, two in zip(*found, strict=True):
        assert one.image.dtype == np.uint8 and two.image.dtype == np.uint16
        assert np.array_equal(one.image, two.image)
        small, deep = resized(one.image, 20, 24), resized(two.image, 20, 24)
        assert np.abs(small.astype(int) - deep).max() <= 2  # uint8 weights are rounded
        assert np.array_equal(one.mask, two.mask)
    segment(tiny(tmp_path / "shards", tmp_path / "all", max_steps=1, color_jitter=(0.1,) * 3))
    weights = final(tmp_path / "all")["segmenter"]
    assert weights["backbone.patch_embed.proj.0.0.weight"].shape[1] == 5


@pytest.mark.parametrize("dtype, low, high", [
    ("uint8", (0.0,), (255.0,)), ("uint16", (0.0,), (4095.0,)),
    ("float32", (-1.0, 0.0), (1.0, 10.0)),
])  # fmt: skip
def test_jitter_is_torchvisions_in_the_window(dtype: str, low: Any, high: Any):
    channels = 2 if len(low) == 2 else 3
    unit = np.random.default_rng(0).random((6, 7, channels)).astype(np.float32)
    begin, span = np.array(low), np.array(high) - np.array(low)
    image = (unit * span + begin).astype(dtype)
    u = np.array([0.9, 0.1, 0.1, 0.0, 0.8, 0.3])
    found = (jittered(image, (0.1, 0.5, 0.4), u, low, high) - begin) / span
    x = torch.tensor((image - begin) / span).permute(2, 0, 1)
    x = x * (1 + 0.5 * 0.6)  # about 0, as mmsegmentation does
    if channels == 3:
        expected = adjust_saturation(x.double(), 1 - 0.4 * 0.4)
    else:
        expected = x.mean(0) + (x - x.mean(0)) * (1 - 0.4 * 0.4)
    wrong = np.abs(found - expected.clamp(0, 1).permute(1, 2, 0).numpy()).max()
    assert wrong < {"uint8": 0.6 / 255, "uint16": 0.6 / 4095, "float32": 1e-5}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_stopped_and_resumed_is_the_same(squares: Path, tmp_path: Path, head: str):
    options = {"head": head, "finetune": True, "drop_path_rate": 0.1, "color_jitter": (0.1,) * 3}
    options |= {"scale": (0.5, 2.0), "lr": 0.001}
    segment(tiny(squares, tmp_path / "whole", **options))
    segment(tiny(squares, tmp_path / "cut", **options, max_steps=3))
    segment(tiny(squares, tmp_path / "cut", **options, num_workers=1))
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    for name, value in whole["segmenter"].items():
        assert torch.equal(value, cut["segmenter"][name]), name
    metrics = [result(tmp_path / name)["metrics"] for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    unused = [n for n in whole["segmenter"] if "cls_attn" in n]
    assert unused and len(whole["optimizer"]["state"]) < len(whole["segmenter"])


def worker(rank: int, port: int, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for head in ("linear", "fpn"):
        of_head(shards, folder / head, head, batch_size_per_gpu=2)
    dist.shutdown()


def of_head(shards: Path, folder: Path, head: str, **options: Any) -> None:
    """A frozen linear probe, or a finetuned head without the dropout that processes draw apart."""
    heads.DROPOUT = 0.0
    tuned = {"head": head, "finetune": True, "lr": 0.001, "drop_path_rate": 0.0}
    segment(tiny(shards, folder, **({} if head == "linear" else tuned), **options))


def test_two_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The frame is ignored, so that processes have different numbers of pixels that count."""
    monkeypatch.setattr(heads, "DROPOUT", heads.DROPOUT)  # restored
    shards = draw(tmp_path / "plain", 8, 3)
    arguments = [(rank, 41_000 + os.getpid() % 20_000, shards, tmp_path) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    ends = [victims.ended(rank) for rank in ranks]
    assert ends == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text() for rank in (0, 1))
    folders = tmp_path, tmp_path / "alone"
    for head in ("linear", "fpn"):
        of_head(shards, tmp_path / "alone" / head, head)
        two, one = (logged(folder / head) for folder in folders)
        for name in ("loss", "grad_norm"):
            assert two[0][name] == pytest.approx(one[0][name], rel=1e-4), head
            assert [line[name] for line in two] == pytest.approx(
                [line[name] for line in one], rel=0.02
            )
        found, alone = (result(folder / head) for folder in folders)
        assert found["metrics"] == pytest.approx(alone["metrics"], abs=0.5)
        assert found["protocol"]["val_images"] == 3
    two, one = (final(folder / "linear")["segmenter"] for folder in folders)
    for name, value in one.items():
        assert torch.allclose(value.double(), two[name].double(), atol=1e-5), name


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log that have a loss, one of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


REFUSED = [
    ({"head": "fpn", "taps": (0, 1)}, "--taps: --head fpn takes four layers"),
    ({"finetune": True}, "a grid of learning rates shares one backbone"),
    ({"crop_size": 40, "head": "fpn"}, "--crop_size 40"),
    ({"crop_size": 36}, "--crop_size 36"),
    ({"fsdp": True}, "--fsdp"),
    ({"decoder": "cuda"}, "--decoder cuda"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_is_refused(squares: Path, tmp_path: Path, options: Any, message: str):
    with pytest.raises(InputError, match=message):
        segment(tiny(squares, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_shards_without_masks_are_refused(demo_shards: Path, tmp_path: Path, capsys: Any):
    words = ["segment", "--data_path", str(demo_shards), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--arch", "xcit_pico_6_p8", "--device", "cpu"]) == 2
    assert "have neither masks nor boxes; pack them with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_results_follow_changed_options_and_trained_on_weights(squares: Path, tmp_path: Path):
    """--may_change stride evaluates a finished run again, --may_change epochs trains on; the
    same command once more leaves the results as they are."""
    run = tmp_path / "run"
    segment(tiny(squares, run, epochs=1))
    first = result(run)
    segment(tiny(squares, run, epochs=1, stride=0.5, may_change=("stride",)))
    second = result(run)
    assert second["protocol"]["stride"] == 0.5
    assert second["weights_file"] == first["weights_file"]
    changes = {"epochs": 2, "stride": 0.5, "may_change": ("epochs", "stride")}
    segment(tiny(squares, run, **changes))
    third = result(run)
    assert third["protocol"]["recipe"]["epochs"] == 2
    assert third["weights_file"] != second["weights_file"]
    assert third["protocol"]["weights"] == file_checksum(
        run / "checkpoints" / third["weights_file"]
    )
    before = (run / "results.json").read_bytes()
    segment(tiny(squares, run, **changes))
    assert (run / "results.json").read_bytes() == before
    with pytest.raises(InputError, match="--epochs 1: ends at step 2, and the run in .* at step 4"):
        segment(tiny(squares, run, **changes | {"epochs": 1}))
    shutil.rmtree(run / "checkpoints")  # trained anew, with another seed
    segment(tiny(squares, run, seed=1, **changes | {"may_change": ("epochs", "stride", "seed")}))
    assert result(run)["protocol"]["weights"] != third["protocol"]["weights"]


def test_validation_masks_that_do_not_count(squares: Path, tmp_path: Path, capsys: Any):
    """None counts: refused before the training. One is damaged: said and counted."""
    shutil.copytree(squares, tmp_path / "damaged")
    index = ShardIndex.load(tmp_path / "damaged/val")
    shard, offset, size = index.locate_target(2)
    with Path(index.path(shard)).open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    segment(tiny(tmp_path / "damaged", tmp_path / "run", epochs=1))
    protocol = result(tmp_path / "run")["protocol"]
    assert protocol["unreadable_images"] == 1 and protocol["val_images"] == 4
    assert "val: skipped 1 unreadable samples: shard-000000.tar:" in capsys.readouterr().err
    src = tmp_path / "src"
    shutil.copytree(squares.parent / "src", src)
    for path in (src / "masks/val").iterdir():
        Image.new("L", (48, 40), 255).save(path)
    names = str(squares.parent / "classes.txt")
    make(MakeConfig(str(src), tmp_path / "empty", masks=("masks",), mask_classes=names,
                    num_workers=1))  # fmt: skip
    with pytest.raises(InputError, match="no pixel of their masks counts"):
        segment(tiny(tmp_path / "empty", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_recipes_and_run_folders(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("arch: xcit_pico_6_p8\ndata_path: /somewhere\n")
    config = segment_config(["--pretrained_weights", str(tmp_path), "--head", "fpn"])
    assert config.model.arch == "xcit_pico_6_p8"
    assert config.run.output_dir == tmp_path / "segment"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's own
def test_a_stage_of_the_launcher(squares: Path, tmp_path: Path, capsys: Any):
    """After pretraining, from its checkpoint; the dry run names it and writes nothing."""
    run = tmp_path / "run"
    words = ["launch", "--stages", "pretrain,segment,report", "--cluster", "debug"]
    pretraining = victims.TINY | {"data_path": squares, "output_dir": run, "batch_size_per_gpu": 4}
    words += [word for name, value in pretraining.items() for word in (f"--{name}", str(value))]
    options = {"epochs": 2, "batch_size_per_gpu": 4, "crop_size": 32, "num_workers": 0}
    options |= {"warmup_epochs": 0, "precision": "fp32", "log_every": 1}
    words += [f"--segment.{name}={value}" for name, value in options.items()]
    assert main([*words, "--dry_run", "true"]) == 0
    shown = capsys.readouterr().out
    assert "== segment" in shown and f"pretrained_weights: {run}\n" in shown
    assert not run.exists()
    assert main(words) == 0
    found = result(run / "segment")
    assert found["metrics"]["miou"] > 0 and found["protocol"]["start"] == "teacher"
    assert "Segmentation, mean IoU" in (run / "report.html").read_text()
