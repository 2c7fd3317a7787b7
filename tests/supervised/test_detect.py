"""Detection: data, network and metrics against geometry, torchvision and pycocotools; whole runs
that learn, stop, resume and run on two processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_library
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from tests import victims
from xcit_dino.cli import main
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.pack.make import make
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.formats import Boxes
from xcit_dino.data.targets.loader import Key
from xcit_dino.errors import InputError
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.report.report import page
from xcit_dino.slurm.stages import launch_config
from xcit_dino.supervised.detect import coco, masks
from xcit_dino.supervised.detect.coco import Detections, coco_scores
from xcit_dino.supervised.detect.config import DetectConfig, DetectionConfig, detect_config
from xcit_dino.supervised.detect.data import EvalTransform, TrainTransform, fitted
from xcit_dino.supervised.detect.network import KeyedSampler, build_detector
from xcit_dino.supervised.detect.train import StepSchedule, detect
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import read_runs
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

TINY: dict[str, Any] = {
    "arch": "xcit_pico_6_p8", "epochs": 2, "batch_size_per_gpu": 4, "short_sides": (64,),
    "eval_side": 64, "fpn_dim": 32, "roi_samples": 64, "anchor_sizes": (16, 24, 32, 48, 64),
    "warmup_epochs": 0, "num_workers": 0, "log_every": 1, "device": "cpu", "precision": "fp32",
    "lr": 0.001, "drop_path_rate": 0.0,
}  # fmt: skip
COLORS = {"red": (230, 20, 20), "blue": (20, 20, 230)}


def boxes_of(rows: Any, labels: Any, **more: Any) -> Boxes:
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    none = np.zeros(len(boxes), bool)
    fields: dict[str, Any] = {
        "crowd": none,
        "difficult": none,
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
    }
    return Boxes(boxes, np.array(labels, np.int64).reshape(-1), **fields | more)


def draw(folder: Path, train: int = 8, val: int = 4) -> Path:
    """Red and blue rectangles on noise, as COCO lists them; every fourth image is empty."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for number in range(train + val):
        pixels = rng.integers(90, 130, (64, 80, 3), dtype=np.uint8)
        path = f"{'train' if number < train else 'val'}/{number}.png"
        images.append({"id": number, "file_name": path, "width": 80, "height": 64})
        for label, color in enumerate(COLORS.values()):
            w, h = rng.integers(16, 33, 2).tolist()
            x, y = 40 * label + int(rng.integers(0, 41 - w)), int(rng.integers(0, 65 - h))
            if number % 4 == 3:
                continue
            pixels[y : y + h, x : x + w] = color
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({"image_id": number, "category_id": label, "bbox": [x, y, w, h],
                                "segmentation": outline})  # fmt: skip
        (folder / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "src" / path)
    categories = [{"id": n, "name": name} for n, name in enumerate([*COLORS, "unseen"])]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))
    make(MakeConfig(str(folder / "src"), folder / "shards", boxes=(folder / "boxes.json",),
                    num_workers=1))  # fmt: skip
    return folder / "shards"


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return draw(tmp_path_factory.mktemp("rectangles"))


def tiny(shards: Path, folder: Path, **options: Any) -> DetectConfig:
    return replace(DetectConfig(), TINY | {"data_path": shards, "output_dir": folder} | options)


def final(folder: Path) -> dict[str, Any]:
    newest = newest_checkpoint(folder)
    assert newest is not None
    return load_checkpoint(newest)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["detect"]


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log that have a loss, one of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


# ---------------------------------------------------------------------------- metrics


def made(images: int = 12, classes: int = 3) -> tuple[dict[int, Boxes], dict[int, Detections]]:
    """Objects of all sizes, some of them crowds, and predictions near and off them."""
    rng, truth, found = np.random.default_rng(3), {}, {}
    for number in range(images):
        count = 0 if number == 5 else int(rng.integers(1, 7))
        corner = rng.uniform(0, 200, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(8, 160, (count, 2))], 1)
        labels = rng.integers(0, classes, count)
        crowd = rng.random(count) < 0.2
        truth[number] = boxes_of(boxes, labels, crowd=crowd)
        near = np.repeat(boxes, 3, 0) + rng.normal(0, 6, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        far = np.tile([5.0, 5, 60, 70], (3, 1)) + rng.uniform(0, 99, (3, 1))
        guesses = np.repeat(labels, 3) + (rng.random(3 * count) < 0.2)
        every = np.concatenate([near, far]).astype(np.float32)
        names = np.concatenate([guesses % classes, rng.integers(0, classes, 3)])
        found[number] = Detections(every, names, rng.random(len(every)).astype(np.float32))
    return truth, found


def test_scores_are_those_of_files_that_pycocotools_reads(tmp_path: Path):
    truth, found = made()
    names, objects, predictions = ["a", "b", "c", "nowhere"], [], []
    for image, target in truth.items():
        for (x0, y0, x1, y1), label, crowd in zip(
            target.boxes.tolist(), target.labels.tolist(), target.crowd.tolist(), strict=True
        ):
            size = [x0, y0, x1 - x0, y1 - y0]
            objects.append({
                "id": len(objects) + 1, "image_id": image + 70, "category_id": label + 10,
                "bbox": size, "area": size[2] * size[3], "iscrowd": int(crowd),
            })  # fmt: skip
        for (x0, y0, x1, y1), label, score in zip(
            *(x.tolist() for x in found[image][:3]), strict=True
        ):
            predictions.append({"image_id": image + 70, "category_id": label + 10, "score": score,
                                "bbox": [x0, y0, x1 - x0, y1 - y0]})  # fmt: skip
    content = {
        "images": [{"id": image + 70} for image in truth], "annotations": objects,
        "categories": [{"id": n + 10, "name": name} for n, name in enumerate(names)],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(predictions))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    scores = coco_scores(truth, found, names)
    for name, row in coco.METRICS.items():
        assert scores.metrics[name] == pytest.approx(100 * evaluation.stats[row], abs=1e-6), name
    assert 10 < scores.metrics["ap"] < scores.metrics["ap50"] < 95
    assert list(scores.by_class) == ["a", "b", "c"]
    for key in ("ap", "ap50"):
        mean = np.mean([values[key] for values in scores.by_class.values()])
        assert mean == pytest.approx(scores.metrics[key], abs=1e-3)


def test_scores_of_masks_are_those_of_pycocotools():
    """Ellipses and crowds, as polygons and run lengths; predictions are shifted ellipses."""
    rng, side, truth, found = np.random.default_rng(5), 120, {}, {}
    y, x = np.mgrid[:side, :side]

    def ellipse(cx: float, cy: float, a: float, b: float) -> np.ndarray:
        return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1

    objects, predictions = [], []
    for image in range(6):
        shapes, guesses = [], []
        for _ in range(4):
            where = rng.uniform(30, 90, 2), rng.uniform(9, 30, 2)
            shapes.append(ellipse(*where[0], *where[1]))
            guesses.append(ellipse(*(where[0] + rng.normal(0, 4, 2)), *where[1]))
        runs, crowd = masks.encoded(np.stack(shapes)), np.array([False, False, False, True])
        area = np.array([shape.sum() for shape in shapes], np.float32)
        sizes = mask_library.toBbox(runs)
        boxes = np.concatenate([sizes[:, :2], sizes[:, :2] + sizes[:, 2:]], 1)
        labels = [0, 1, 0, 1]
        truth[image] = boxes_of(boxes, labels, crowd=crowd, area=area, segmentation=runs)
        scores = rng.random(4).astype(np.float32)
        made = masks.encoded(np.stack(guesses))
        found[image] = Detections(np.zeros((4, 4), np.float32), np.array(labels), scores, made)
        for n in range(4):
            objects.append({
                "id": len(objects) + 1, "image_id": image, "category_id": labels[n],
                "bbox": [0, 0, 1, 1], "area": float(area[n]), "iscrowd": int(crowd[n]),
                "segmentation": runs[n] | {"counts": runs[n]["counts"].decode()},
            })  # fmt: skip
            predictions.append({
                "image_id": image, "category_id": labels[n], "score": float(scores[n]),
                "segmentation": made[n] | {"counts": made[n]["counts"].decode()},
            })  # fmt: skip
    reference = COCO()
    reference.dataset = {
        "images": [{"id": n, "height": side, "width": side} for n in range(6)],
        "categories": [{"id": 0}, {"id": 1}], "annotations": objects,
    }  # fmt: skip
    reference.createIndex()
    evaluation = COCOeval(reference, reference.loadRes(predictions), "segm")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    metrics = coco_scores(truth, found, ["a", "b"], masks=True).metrics
    for name, row in coco.METRICS.items():
        if name in metrics:
            assert metrics[name] == pytest.approx(100 * evaluation.stats[row], abs=1e-6), name
    assert 10 < metrics["ap"] < metrics["ap50"]


def test_masks_of_every_form_of_coco():
    """A rectangle as polygon, as run lengths and as compressed run lengths."""
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 1
    counts = np.diff(np.flatnonzero(np.diff(expected.T.ravel(), prepend=2, append=2))).tolist()
    compressed = masks.encoded(expected[None].astype(bool))[0]
    text = compressed | {"counts": compressed["counts"].decode()}
    shapes = [[[2, 1, 5, 1, 5, 4, 2, 4]], {"size": [6, 8], "counts": counts}, text]
    target = boxes_of([[2, 1, 5, 4]] * 3, [0] * 3, segmentation=shapes)
    found = masks.decoded(masks.run_lengths(target, 6, 8), 6, 8)
    assert (found == expected).all() and found.shape == (3, 6, 8)
    for bad in ([None] * 3, [], [[[1, 2]]] * 3, [{"counts": "x"}] * 3):
        with pytest.raises(BadImage):
            masks.run_lengths(boxes_of([[2, 1, 5, 4]] * 3, [0] * 3, segmentation=bad), 6, 8)
    with pytest.raises(BadImage, match="a mask is for"):
        masks.run_lengths(boxes_of([[2, 1, 5, 4]], [0], segmentation=[text]), 6, 9)


def test_a_known_average_precision():
    """By hand: of two objects the second guess finds one, the fourth the other; precision 1/2 up to
    a recall of 1/2 and beyond."""
    truth = {0: boxes_of([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])}
    guesses = [[90, 90, 99, 99], [0, 0, 10, 10], [70, 0, 80, 9], [50, 50, 60, 60]]
    found = Detections(np.float32(guesses), np.zeros(4, int), np.float32([0.9, 0.8, 0.7, 0.6]))
    assert coco_scores(truth, {0: found}, ["cell"]).metrics["ap50"] == pytest.approx(50)


def test_difficult_objects_are_neither_right_nor_wrong():
    rows, labels = [[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0]
    found = {0: Detections(np.float32(rows), np.zeros(2, int), np.float32([0.5, 0.9]))}
    for second in (True, False):  # a difficult object is found, or missed
        truth = {0: boxes_of(rows, labels, difficult=np.array([False, True]))}
        seen = found if second else {0: Detections(*(x[:1] for x in found[0][:3]))}
        assert coco_scores(truth, seen, ["cell"]).metrics["ap"] == pytest.approx(100)


def test_nothing_found_is_zero():
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0, np.float32))
    scores = coco_scores({0: boxes_of([[0, 0, 9, 9]], [0])}, {0: nothing}, ["a", "b"])
    assert scores.metrics["ap"] == 0 and scores.by_class == {"a": {"ap": 0, "ap50": 0}}
    assert "ap_large" not in scores.metrics


def test_pycocotools_is_named_where_it_is_missing(rectangles: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(InputError, match=r"pip install 'xcit-dino\[detect\]'"):
        detect(tiny(rectangles, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- data


def one_object() -> tuple[np.ndarray, Boxes]:
    """A white rectangle on black, and its box."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:44, 12:60] = 255
    outline = [[12, 20, 60, 20, 60, 44, 12, 44]]
    return pixels, boxes_of([[12, 20, 60, 44]], [1], segmentation=[outline])


def extent(image: np.ndarray) -> list[int]:
    """The box of the bright pixels."""
    y, x = (np.flatnonzero((image[..., 0] > 127).any(axis)) for axis in (1, 0))
    return [x[0], y[0], x[-1] + 1, y[-1] + 1]


@pytest.mark.parametrize("options", [
    {"short_sides": (48, 60, 96), "long_side": 120}, {"crop_size": 64, "scale": (0.5, 2.0)},
])  # fmt: skip
def test_boxes_stay_on_their_objects(options: dict[str, Any]):
    transform, sizes, flips = TrainTransform(DetectionConfig(masks=True, **options)), set(), set()
    for sample in range(40):
        found = transform(*one_object(), Key(0, 0, sample))
        height, width = found.image.shape[:2]
        sizes.add((height, width))
        if not len(found.boxes):
            assert "crop_size" in options and (found.image < 128).all()
            continue
        assert np.abs(found.boxes[0] - extent(found.image)).max() <= 1
        assert found.masks is not None and found.masks.shape == (1, height, width)
        masked = extent(255 * found.masks[0, ..., None])
        assert np.abs(np.subtract(masked, extent(found.image))).max() <= 1
        assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= [width, height]).all()
        assert found.labels.tolist() == [1] and found.boxes.dtype == np.float32
        flips.add(bool(found.boxes[0, 0] > width - found.boxes[0, 2]))
        again = transform(*one_object(), Key(0, 0, sample))
        assert all(map(np.array_equal, found, again))
    assert flips == {True, False} and len(sizes) >= 3
    limit = options.get("crop_size") or options["long_side"]
    assert max(map(max, sizes)) <= limit


def test_sizes_are_mmdetections():
    """``rescale_size`` with (1333, 800): int(side * factor + 0.5)."""
    assert fitted((480, 640), 800, 1333) == (800, 1067)
    assert fitted((400, 1200), 800, 1333) == (444, 1333)
    view = EvalTransform(DetectionConfig(eval_side=30))(*one_object(), Key(0, 0, 0))
    assert view.image.shape == (30, 45, 3) and view.size == (60, 90)


def test_crowds_and_difficult_objects_are_no_examples():
    rows = [[0, 0, 9, 9], [9, 9, 20, 20], [20, 20, 40, 40]]
    target = boxes_of(rows, [0, 1, 2], crowd=np.array([True, False, False]),
                      difficult=np.array([False, True, False]))  # fmt: skip
    task = DetectionConfig(short_sides=(60,), hflip=0)
    found = TrainTransform(task)(np.zeros((60, 90, 3), np.uint8), target, Key(0, 0, 0))
    assert found.boxes.tolist() == [rows[2]] and found.labels.tolist() == [2]


# ---------------------------------------------------------------------------- network


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_pyramid_and_heads_are_torchvisions():
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    net = create_model("timm/resnet50", num_classes=0)
    ours = build_detector(DetectionConfig(), net, 90).rcnn
    assert shapes(ours.rpn) == shapes(theirs.rpn)
    assert shapes(ours.roi_heads) == shapes(theirs.roi_heads)
    assert shapes(ours.backbone.fpn) == shapes(theirs.backbone.fpn)
    masked = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    ours = build_detector(DetectionConfig(masks=True), net, 90).rcnn
    assert shapes(ours.roi_heads) == shapes(masked.roi_heads)


OFFICIAL = {  # embed_dim, depth: detection/configs/xcit/ of facebookresearch/xcit
    "tiny_12": (192, 12), "small_12": (384, 12), "small_24": (384, 24), "medium_24": (512, 24),
}  # fmt: skip


def conv(inner: int, outer: int, side: int) -> int:
    """Parameters of a convolution with bias; of a linear layer with side 1."""
    return inner * outer * side * side + outer


def official_backbone(dim: int, depth: int, patch: int) -> int:
    """Parameters of ``detection/backbone/xcit.py``, which has neither class attention nor a last
    norm."""
    attention = conv(dim, 3 * dim, 1) + conv(dim, dim, 1) + (4 if dim == 192 else 8)  # XCA
    local = 2 * (9 * dim + dim) + 2 * dim  # LPI: two depthwise convolutions, batch-norm
    mlp = conv(dim, 4 * dim, 1) + conv(4 * dim, dim, 1)
    block = attention + local + mlp + 3 * 2 * dim + 3 * dim  # three norms, gamma1 to gamma3
    widths = [3, *(dim >> n for n in range(3 if patch == 16 else 2, -1, -1))]
    stem = sum(9 * a * b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    pyramid = 3 * conv(dim, dim, 2) + 2 * dim if patch == 16 else conv(dim, dim, 2)
    return depth * block + stem + conv(64, dim, 1) + pyramid  # 64: PositionalEncodingFourier


def official_heads(dim: int) -> int:
    """Parameters of ``mask_rcnn_xcit_p*.py`` but for the backbone: FPN of 256 channels, RPNHead,
    Shared2FCBBoxHead, FCNMaskHead, for 80 classes."""
    neck = 4 * (conv(dim, 256, 1) + conv(256, 256, 3))
    rpn = conv(256, 256, 3) + conv(256, 3, 1) + conv(256, 4 * 3, 1)
    box = conv(256 * 49, 1024, 1) + conv(1024, 1024, 1) + conv(1024, 81, 1) + conv(1024, 4 * 80, 1)
    return neck + rpn + box + 4 * conv(256, 256, 3) + conv(256, 256, 2) + conv(256, 80, 1)


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", OFFICIAL)
def test_parameters_are_those_of_the_official_configs(size: str, patch: int):
    """One by one, but for torchvision's outputs of boxes and masks of the background, and what
    XCiT's detector leaves out. In millions: 26.18, 44.39, 65.80 and 101.15 of patches of 16 pixels,
    25.87, 43.17, 64.58 and 98.98 of 8."""
    dim, depth = OFFICIAL[size]
    with torch.device("meta"):
        backbone = create_model(f"xcit_{size}_p{patch}", num_classes=0)
        network = build_detector(DetectionConfig(masks=True, finetune=False), backbone, 80)
    left_out = ("cls_", "norm.", "head.")
    counts = {name: p.numel() for name, p in network.named_parameters()
              if not name.removeprefix("rcnn.backbone.backbone.").startswith(left_out)}  # fmt: skip
    background = 4 * (1024 + 1) + (256 + 1)
    expected = official_backbone(dim, depth, patch) + official_heads(dim)
    assert sum(counts.values()) == expected + background


def test_a_checkpoint_is_a_backbone_to_start_from(tmp_path: Path):
    backbone = create_model("xcit_pico_6_p8", num_classes=0)
    network = build_detector(DetectionConfig(fpn_dim=16, finetune=False), backbone, 2)
    torch.save({"detector": network.state_dict(), "step": 1}, tmp_path / "detector.pth")
    other = create_model("xcit_pico_6_p8", num_classes=0)
    assert load_backbone(tmp_path / "detector.pth", other, None).network == "model"
    expected = backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def pair(**options: Any) -> tuple[Any, FasterRCNN, list[torch.Tensor]]:
    """Our detector, torchvision's with the same weights, and two images that it does not resize."""
    torch.manual_seed(0)
    task = DetectionConfig(**{"fpn_dim": 16, "eval_side": 64} | options)
    ours = build_detector(task, create_model("xcit_pico_6_p8", num_classes=0), 2)
    theirs = FasterRCNN(
        ours.rcnn.backbone, num_classes=3, min_size=64, max_size=96, image_mean=[0.0] * 3,
        image_std=[1.0] * 3, rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**6,
    )  # fmt: skip
    theirs.load_state_dict(ours.rcnn.state_dict())
    return ours, theirs, [torch.randn(3, 64, 96), torch.randn(3, 64, 80)]


def test_detections_are_torchvisions():
    ours, theirs, images = pair()
    with torch.inference_mode():
        for mine, other in zip(ours.eval()(images), theirs.eval()(images), strict=True):
            assert len(mine["boxes"]) > 0
            assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_losses_are_torchvisions_where_nothing_is_drawn():
    """All anchors and proposals, so that samples are not random; ours are divided by how many there
    should be, not by how many there are."""
    ours, theirs, images = pair()
    boxes = torch.tensor([[10.0, 10, 50, 50], [60, 5, 78, 30]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])},
               {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
    for sampler in ours.samplers:
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    found = ours.train()(images, targets, [(1, 2), (3, 4)])
    expected = theirs.train()(images, targets)
    for name, loss in expected.items():
        drawn = ours.samplers["rpn" not in name and "objectness" not in name].drawn
        assert found[name].item() == pytest.approx(loss.item() * int(drawn) / 2e6, rel=1e-5), name


def test_samples_depend_on_the_images_own_key():
    sampler = KeyedSampler(8, 0.5)
    images = [torch.arange(200) % 5 == 0, torch.arange(300) % 7 == 0]
    images = [image.long() for image in images]
    sampler.keys = [11, 12]
    both = sampler(images)
    assert sampler.drawn == 16 and sampler.share() == 1
    before = torch.random.get_rng_state()
    for number, key in ((1, 12), (0, 11)):
        sampler.keys = [key]
        alone = sampler(images[number : number + 1])
        assert all(torch.equal(alone[side][0], both[side][number]) for side in (0, 1))
        assert alone[0][0].sum() == alone[1][0].sum() == 4
    assert torch.equal(torch.random.get_rng_state(), before)
    sampler.keys = [13]
    assert not torch.equal(sampler(images[:1])[0][0], both[0][0])


def test_coordinates_are_float32_under_autocast():
    ours, _, images = pair()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        detections = ours.eval()(images)
    assert {x["boxes"].dtype for x in detections} == {torch.float32}
    fractions = torch.cat([x["boxes"] for x in detections]).flatten() % 1
    assert len(fractions.unique()) > 100  # bfloat16 has two digits


@pytest.mark.parametrize("arch", ["timm/resnet18", "timm/vit_tiny_patch16_224", "xcit_pico_6_p16"])
def test_other_backbones(arch: str):
    network = build_detector(DetectionConfig(fpn_dim=8), create_model(arch, num_classes=0), 2)
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        maps = network.rcnn.backbone.eval()(images)
    assert [tuple(x.shape) for x in maps.values()] == [
        (1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3), (1, 8, 1, 2)
    ]  # fmt: skip


def test_the_schedule_is_mmdetections():
    config = replace(DetectConfig(), {"epochs": 36, "warmup_epochs": 0.5})
    schedule = StepSchedule(config, 100, 16)
    assert schedule(60).lr == schedule(2699).lr == pytest.approx(1e-4)
    assert schedule(2700).lr == schedule(3299).lr == pytest.approx(1e-5)  # after 27 epochs
    assert schedule(3302).lr == pytest.approx(1e-6)
    assert schedule(0).lr == pytest.approx(1e-7) and schedule(25).lr < 6e-5
    assert StepSchedule(config, 100, 8)(60).lr == pytest.approx(5e-5)


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_learns_the_rectangles_and_writes_results(rectangles: Path, tmp_path: Path, capsys: Any):
    run = tmp_path / "run"
    detect(tiny(rectangles, run, epochs=40, eval_every=20))
    found, text = result(run), capsys.readouterr().out
    assert found["metrics"]["ap50"] > 60  # an untrained network: below 5
    assert set(found["by_class"]) == set(COLORS) and found["absent_classes"] == 1
    assert "1 classes have no object there: unseen" in text
    assert found["protocol"]["backbone"] == "finetuned" and found["protocol"]["val_images"] == 4
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert sum("val_ap50" in json.loads(line) for line in lines) == 2
    shown = page(read_runs([run]))
    assert "Detection, box AP" in shown and "Predicted boxes" in shown and "2 objects" in shown
    before = (run / "results.json").read_bytes()
    detect(tiny(rectangles, run, epochs=40, eval_every=20))
    assert (run / "results.json").read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"crop_size": 64, "scale": (0.5, 1.5)}])
def test_stopped_and_resumed_is_the_same(rectangles: Path, tmp_path: Path, options: Any):
    options = options | {"drop_path_rate": 0.1}
    detect(tiny(rectangles, tmp_path / "whole", **options))
    detect(tiny(rectangles, tmp_path / "cut", **options, max_steps=3))
    detect(tiny(rectangles, tmp_path / "cut", **options, num_workers=1))
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    for name, value in whole["detector"].items():
        assert torch.equal(value, cut["detector"][name]), name
    metrics = [result(tmp_path / name)["metrics"] for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    unused = [n for n in whole["detector"] if "cls_attn" in n]
    assert unused and len(whole["optimizer"]["state"]) < len(whole["detector"])


def test_a_frozen_backbone_stays_as_it_was(rectangles: Path, tmp_path: Path):
    detect(tiny(rectangles, tmp_path / "a", finetune=False, max_steps=1))
    detect(tiny(rectangles, tmp_path / "b", finetune=False))
    a, b = (final(tmp_path / name)["detector"] for name in "ab")
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert {name for name in a if name.startswith("rcnn.backbone.backbone.")} <= same < set(a)


def test_masks_are_learned_and_measured(rectangles: Path, tmp_path: Path):
    detect(tiny(rectangles, tmp_path / "run", masks=True))
    found = result(tmp_path / "run")
    assert {"ap50", "mask_ap", "mask_ap50"} <= set(found["metrics"])
    assert found["protocol"]["detector"] == "Mask R-CNN"
    assert all("loss_mask" in line for line in logged(tmp_path / "run"))


def worker(rank: int, port: int, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    detect(tiny(shards, folder / "run", batch_size_per_gpu=2))
    dist.shutdown()


def test_two_processes_are_one(tmp_path: Path):
    """Images with and without objects, so that processes have different numbers of them. Rounding
    decides which of two proposals with nearly the same score stays, so only the first losses that
    depend on none of these are equal to the last digits."""
    shards = draw(tmp_path / "drawn", 8, 3)
    arguments = [(rank, 41_000 + os.getpid() % 20_000, shards, tmp_path) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    ends = [victims.ended(rank) for rank in ranks]
    assert ends == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text() for rank in (0, 1))
    detect(tiny(shards, tmp_path / "alone"))
    two, one = (logged(tmp_path / name) for name in ("run", "alone"))
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "grad_norm"):
        exact = 1e-5 if name in ("loss_objectness", "loss_rpn_box_reg") else 0.01
        assert two[0][name] == pytest.approx(one[0][name], rel=exact), name
        assert [x[name] for x in two] == pytest.approx([x[name] for x in one], rel=0.05), name
    found, alone = (result(tmp_path / name) for name in ("run", "alone"))
    assert found["metrics"] == pytest.approx(alone["metrics"], abs=3)
    assert found["protocol"]["val_images"] == 3


REFUSED = [
    ({"taps": (0, 1)}, "--taps: a pyramid takes four layers"),
    ({"taps": (0, 1, 2, 9)}, "--taps 9"),
    ({"fsdp": True}, "--fsdp: detect"),
    ({"decoder": "cuda"}, "--decoder cuda: boxes"),
    ({"short_sides": ()}, "--short_sides"),
    ({"crop_size": 64, "scale": (2.0, 1.0)}, "--scale"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_is_refused(rectangles: Path, tmp_path: Path, options: Any, message: str):
    with pytest.raises(InputError, match=message):
        detect(tiny(rectangles, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_shards_without_boxes_are_refused(demo_shards: Path, tmp_path: Path, capsys: Any):
    words = ["detect", "--data_path", str(demo_shards), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--arch", "xcit_pico_6_p8", "--device", "cpu"]) == 2
    assert "--boxes FILE_OR_FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_images_without_objects(rectangles: Path, tmp_path: Path, capsys: Any):
    """None has one, or crowds alone: refused before the training. One is damaged: counted."""
    content = json.loads((rectangles.parent / "boxes.json").read_text())
    for box in content["annotations"]:
        box["iscrowd"] = int(box["image_id"] >= 8)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    make(MakeConfig(str(rectangles.parent / "src"), tmp_path / "crowds", num_workers=1,
                    boxes=(tmp_path / "boxes.json",)))  # fmt: skip
    with pytest.raises(InputError, match="no object in them counts"):
        detect(tiny(tmp_path / "crowds", tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    shutil.copytree(rectangles, tmp_path / "damaged")
    index = ShardIndex.load(tmp_path / "damaged/val")
    shard, offset, size = index.locate_target(2)
    with Path(index.path(shard)).open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    detect(tiny(tmp_path / "damaged", tmp_path / "run", epochs=1))
    assert result(tmp_path / "run")["protocol"]["unreadable_images"] == 1
    assert "val: skipped 1 unreadable samples: shard-000000.tar:" in capsys.readouterr().err


def test_a_stage_of_the_launcher(rectangles: Path, tmp_path: Path):
    words = f"--arch xcit_pico_6_p8 --data_path {rectangles} --output_dir {tmp_path}/run"
    options = "--stages pretrain,detect --detect.epochs 3 --detect.masks true"
    first, stage = launch_config([*words.split(), *options.split()]).stages
    assert stage.name == "detect" and first.name == "pretrain"
    assert stage.config.start.pretrained_weights == stage.config.run.output_dir.parent
    assert stage.config.run.output_dir == tmp_path / "run/detect"
    assert stage.config.run.epochs == 3 and stage.config.detection.masks
    module, name = stage.entry.split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_recipes_and_run_folders(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("arch: xcit_pico_6_p8\ndata_path: /somewhere\n")
    config = detect_config(["--pretrained_weights", str(tmp_path), "--fpn_dim", "64"])
    assert config.model.arch == "xcit_pico_6_p8" and config.detection.fpn_dim == 64
    assert config.run.output_dir == tmp_path / "detect"
