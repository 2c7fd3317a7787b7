"""Masks and boxes beside the images: packed, checked, read together, and what is refused."""

from __future__ import annotations

import io
import json
import unicodedata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.pack.make import make
from xcit_dino.data.pack.targets.conventions import CONVENTIONS, voc_colors
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.check import check
from xcit_dino.data.shards.config import CheckConfig, MakeConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.formats import Boxes, decode_boxes, decode_mask
from xcit_dino.data.targets.loader import Key, TargetLoader, one_pass
from xcit_dino.errors import InputError

HERE = LoaderConfig(num_workers=0)
NAMES = ["a", "b", "c", "d"]


def save(path: Path, pixels: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path)


def photo(number: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), 10 * number, np.uint8)


def scenes(folder: Path, masks: str = "masks", ending: str = "") -> Path:
    """Four images and their masks in train/, one in val/; mask n has 255, n and 0."""
    for number, name in enumerate([*NAMES, "e"]):
        split = "val" if name == "e" else "train"
        save(folder / f"images/{split}/{name}.png", photo(number))
        mask = np.zeros((6, 8), np.uint8)
        mask[0], mask[1:3] = 255, number % 4
        save(folder / f"{masks}/{split}/{name}{ending}.png", mask)
    return folder


def pack(src: Path, dst: Path, **options: Any) -> ShardIndex:
    make(MakeConfig(src=str(src), dst=dst, num_workers=1, **options))
    return ShardIndex.load(dst / "train" if (dst / "train").exists() else dst)


def contents(index: ShardIndex) -> dict[str, bytes]:
    """Target by the image's first value / 10: a, b, ..."""
    found = {}
    for sample in range(index.num_samples):
        raw = Path(index.path(index.locate(sample)[0])).read_bytes()
        image, target = (
            raw[at : at + size]
            for _, at, size in (index.locate(sample), index.locate_target(sample))
        )
        number = int(np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0]) // 10
        found["abcde"[number]] = target
    return found


@pytest.fixture
def classes(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    return str(tmp_path / "classes.txt")


def test_masks_are_stored_beside_their_images(tmp_path: Path, classes: str, capsys: Any):
    src = scenes(tmp_path / "src")
    index = pack(src, tmp_path / "dst", masks=("masks",), mask_classes=classes)
    assert "4 images with masks of 4 classes" in capsys.readouterr().out
    assert index.targets == "mask" and index.target_classes == ["sky", "road", "car", "tree"]
    assert index.classes is None and index.labels.tolist() == [-1] * 4
    for number, name in enumerate(NAMES):
        mask = decode_mask(contents(index)[name])
        original = np.asarray(Image.open(src / f"masks/train/{name}.png"))
        assert mask.dtype == np.uint8 and (mask == original).all(), number
    assert check(CheckConfig(dst=str(tmp_path / "dst"), num_workers=1)) == 0
    text = capsys.readouterr().out
    assert "mask of 4 classes, 0 images without" in text
    before = (tmp_path / "dst/train/index.json").read_bytes()
    check(CheckConfig(dst=str(tmp_path / "dst"), num_workers=1, rebuild=True))
    assert (tmp_path / "dst/train/index.json").read_bytes() == before


def test_sets_without_targets_have_the_index_of_before(tmp_path: Path):
    scenes(tmp_path / "src")
    pack(tmp_path / "src/images", tmp_path / "dst")
    meta = json.loads((tmp_path / "dst/train/index.json").read_text())
    assert set(meta) == {
        "version", "samples", "bytes", "classes", "shards", "arrays", "checksum"
    }  # fmt: skip
    assert set(meta["arrays"]) == {"offsets", "sizes", "labels"}
    assert not list((tmp_path / "dst").rglob("*target*"))


@pytest.mark.parametrize("given", ["masks", "gt/masks", "{src}/gt/masks"])
def test_a_folder_of_masks_inside_or_outside(tmp_path: Path, classes: str, given: str):
    inside = "gt/masks" if "gt" in given else "masks"
    src = scenes(tmp_path / "src", inside, "_gt")
    index = pack(
        src, tmp_path / "dst", masks=(given.format(src=src),), mask_classes=classes
    )  # fmt: skip
    assert sorted(contents(index)) == NAMES
    other = tmp_path / "elsewhere"
    (src / inside).rename(other)
    again = pack(src, tmp_path / "dst2", masks=(str(other),), mask_classes=classes)
    assert contents(again) == contents(index)


CODINGS = [  # (classes, values, what they become)
    ("ade20k", [0, 1, 150, 255], [255, 0, 149, 255]),
    ("camvid", [0, 10, 11, 255], [0, 10, 255, 255]),
    ("cityscapes", [7, 33, 0, 16], [0, 18, 255, 255]),
    ("cityscapes_train_ids", [0, 18, 255, 1], [0, 18, 255, 1]),
    ("voc", [0, 20, 255, 15], [0, 20, 255, 15]),
    ('{"road": [3, 4], "car": 1000}', [3, 4, 1000, 255], [0, 0, 1, 255]),
    ('{"road": "#804080", "car": "#0000ff"}', [0x804080, 0x0000FF, 0x804080], [0, 1, 0]),
]  # fmt: skip


@pytest.mark.parametrize("coding, values, expected", CODINGS, ids=[c[0][:12] for c in CODINGS])
def test_values_become_class_numbers(tmp_path: Path, coding: str, values: Any, expected: Any):
    save(tmp_path / "src/images/a.png", photo(0, 1, len(values)))
    if coding.startswith("{"):
        (tmp_path / "map.json").write_text(coding)
        coding = str(tmp_path / "map.json")
    raw = np.array([values])
    if raw.max() > 1 << 16:
        raw = np.stack([raw >> 16, raw >> 8 & 255, raw & 255], -1).astype(np.uint8)
    else:
        raw = raw.astype(np.uint16 if raw.max() > 255 else np.uint8)
    save(tmp_path / "src/masks/a.png", raw)
    index = pack(tmp_path / "src", tmp_path / "dst", masks=("masks",), mask_classes=coding)
    assert decode_mask(contents(index)["a"]).tolist() == [expected]


def test_palettes_and_colors_of_pascal_voc(tmp_path: Path):
    assert voc_colors(5) == [0, 0x800000, 0x008000, 0x808000, 0x000080]  # devkit
    values = np.array([[0, 1, 15, 20]], np.uint8)
    colors = [0, 0x800000, 0xC08080, 0x004080]  # background, aeroplane, person, tvmonitor
    palette = Image.fromarray(values, "L").convert("P")
    palette = Image.fromarray(values)
    palette.putpalette([c for color in voc_colors(256) for c in color.to_bytes(3)])
    (tmp_path / "src/SegmentationClass").mkdir(parents=True)
    palette.save(tmp_path / "src/SegmentationClass/a.png")
    rgb = np.array([[list(color.to_bytes(3)) for color in colors]], np.uint8)
    save(tmp_path / "src/SegmentationClass/b.png", rgb)
    for number, name in enumerate("ab"):
        save(tmp_path / f"src/JPEGImages/{name}.png", photo(number, 1, 4))
    options = {"masks": ("SegmentationClass",), "mask_classes": "voc"}
    found = contents(pack(tmp_path / "src", tmp_path / "dst", **options))
    assert decode_mask(found["a"]).tolist() == decode_mask(found["b"]).tolist() == values.tolist()


def test_many_classes_take_16_bits(tmp_path: Path):
    (tmp_path / "c.txt").write_text("\n".join(f"class {n}" for n in range(300)))
    save(tmp_path / "src/a.png", photo(0, 1, 3))
    save(tmp_path / "masks/a.png", np.array([[299, 255, 7]], np.uint16))
    options = {"masks": (str(tmp_path / "masks"),), "mask_classes": str(tmp_path / "c.txt")}
    mask = decode_mask(contents(pack(tmp_path / "src", tmp_path / "dst", **options))["a"])
    assert mask.dtype == np.uint16 and mask.tolist() == [[299, 255, 7]]


def test_conventions_have_the_published_number_of_classes():
    assert {name: len(coding.classes) for name, coding in CONVENTIONS.items()} == {
        "ade20k": 150, "camvid": 11, "cityscapes": 19, "cityscapes_train_ids": 19, "voc": 21
    }  # fmt: skip


def test_cityscapes_names(tmp_path: Path):
    for name, data in {"leftImg8bit": photo(0), "gtFine_labelIds": np.full((6, 8), 7, np.uint8),
                       "gtFine_labelTrainIds": np.full((6, 8), 18, np.uint8),
                       "gtFine_color": photo(3)}.items():  # fmt: skip
        kind = name.partition("_")[0]
        save(tmp_path / f"src/{kind}/train/ulm/ulm_000000_000019_{name}.png", data)
    for convention, expected in (("cityscapes", 0), ("cityscapes_train_ids", 18)):
        dst = tmp_path / convention
        index = pack(tmp_path / "src", dst, masks=("gtFine",), mask_classes=convention)
        assert index.num_samples == 1 and index.classes is None
        assert np.unique(decode_mask(contents(index)["a"])).tolist() == [expected]


def test_masks_that_do_not_fit_are_skipped_and_listed(tmp_path: Path, classes: str, capsys: Any):
    src = scenes(tmp_path / "src")
    save(src / "masks/train/a.png", np.zeros((5, 8), np.uint8))
    save(src / "masks/train/b.png", np.full((6, 8), 7, np.uint8))
    (src / "masks/train/c.png").unlink()
    save(src / "masks/train/z.png", np.zeros((6, 8), np.uint8))
    index = pack(src, tmp_path / "dst", masks=("masks",), mask_classes=classes)
    text = capsys.readouterr().out
    assert sorted(contents(index)) == ["d"]
    assert "skipped: 1 images without a mask (the first: images/train/c.png)" in text
    assert "skipped: 1 masks without an image" in text
    assert "classes in no image of this split: road, car" in text
    lines = (tmp_path / "dst/train/quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert any("its mask has 8x5 pixels, the image 8x6" in reason for reason in reasons)
    assert any("--mask_classes does not name: 7 (48 pixels)" in reason for reason in reasons)
    with pytest.raises(InputError, match="no such folder"):
        pack(src, tmp_path / "x", masks=("nothing",), mask_classes=classes)
    ignoring = {"mask_classes": classes, "mask_ignore": (7,)}
    again = contents(pack(src, tmp_path / "dst3", masks=("masks",), **ignoring))
    assert np.unique(decode_mask(again["b"])).tolist() == [255]


def test_a_mask_belongs_to_one_image(tmp_path: Path, classes: str, capsys: Any):
    """Of images of one name in several folders, to that of the folder of its name."""
    for folder in "ab":
        save(tmp_path / f"src/images/{folder}/1.png", photo(0))
    save(tmp_path / "src/masks/a/1.png", np.zeros((6, 8), np.uint8))
    options: Any = {"masks": ("masks",), "mask_classes": classes, "labels": Path("none")}
    index = pack(tmp_path / "src", tmp_path / "dst", **options)
    assert index.num_samples == 1
    assert "1 images without a mask (the first: images/b/1.png)" in capsys.readouterr().out
    (tmp_path / "src/masks/a/1.png").rename(tmp_path / "src/masks/1.png")
    with pytest.raises(InputError, match=r"masks/1.png has the name of images/a/1.png and of"):
        pack(tmp_path / "src", tmp_path / "other", **options)


def test_boxes_of_one_name_belong_to_one_image(tmp_path: Path, capsys: Any):
    save(tmp_path / "src/a/1.png", photo(0))
    boxes = [{"image_id": n, "category_id": 1, "bbox": [0, 0, n, 4]} for n in (1, 2)]
    images = [{"id": n, "file_name": f"/data/src/{'ab'[n - 1]}/1.png"} for n in (1, 2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    index = pack(tmp_path / "src", tmp_path / "dst", boxes=(tmp_path / "boxes.json",))
    found = decode_boxes(next(iter(contents(index).values())))
    assert found.boxes.tolist() == [[0, 0, 1, 4]]
    text = capsys.readouterr().out
    assert "skipped: boxes of 1 images that the source lacks (the first: /data/src/b/1.png)" in text
    save(tmp_path / "src/b/1.png", photo(1))
    index = pack(tmp_path / "src", tmp_path / "both", boxes=(tmp_path / "boxes.json",))
    widths = {name: decode_boxes(raw).boxes[0, 2] for name, raw in contents(index).items()}
    assert widths == {"a": 1, "b": 2}
    for image, folder in zip(images, "cd", strict=True):
        image["file_name"] = f"{folder}/1.png"
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="c/1.png and d/1.png may both be 1.png"):
        pack(tmp_path / "src/a", tmp_path / "x", boxes=(tmp_path / "boxes.json",))


REFUSED = [
    (["--masks", "masks"], "what do the values 0, 1, 2, 3, 255 of --masks mean"),
    (["--masks", "masks", "--mask_classes", "nothing"], "no such file, and no convention"),
    (["--masks", "masks", "--mask_classes", "voc", "--mask_ignore", "3"], "has it for bird"),
    (["--mask_classes", "voc"], "there are no --masks"),
    (["--masks", "masks", "--mask_classes", "voc", "--resize", "4"], "would shrink images, not"),
    (
        ["--masks", "masks", "--mask_classes", "voc", "--boxes", "x.json"],
        "has one target; pack two",
    ),
    (["--boxes", "nothing.json"], "no such file or folder"),
    (["--boxes", "train"], "no XML files in it"),
    (["--boxes", "bad.json"], "not COCO's JSON of images, annotations and categories"),
    (["--masks", "nowhere", "--mask_classes", "voc"], "no such folder, neither here nor in"),
    (["--masks", "empty", "--mask_classes", "voc"], "no images (PNG, BMP, GIF, TIFF) in it"),
    (["--masks", "masks", "--mask_classes", "twice.txt"], "each once, no empty line"),
    (["--masks", "masks", "--mask_classes", "bad.json"], "not of the form"),
    (["--masks", "masks", "--mask_classes", "far.json"], "values are numbers from 0 to 65535"),
    (["--masks", "masks", "--mask_classes", "same.json"], "stands for"),
    (["--splits", "train=nothing.txt"], "no such file, neither here nor in"),
    (["--splits", "train=train", "val=none.txt"], "name folders or text files, not both"),
    (["--splits", "train=none.txt"], "lines names an image of"),
]
FILES = {
    "bad.json": "[1, 2]", "twice.txt": "road\nroad\n", "none.txt": "zebra\n",
    "far.json": '{"road": 0, "car": 70000}', "same.json": '{"road": 0, "car": 0}',
}  # fmt: skip


@pytest.mark.parametrize("words, message", REFUSED)
def test_what_is_refused(
    tmp_path: Path, words: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    scenes(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("empty").mkdir()
    Path("train").mkdir(exist_ok=True)
    assert main(["shards", "make", str(tmp_path / "src"), str(tmp_path / "dst"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "dst").exists()


# ---------------------------------------------------------------------------- boxes


def coco(folder: Path) -> Path:
    """a: two boxes, one of which leaves the image, and a crowd; b: one of no area; c: none."""
    for number, name in enumerate(NAMES):
        save(folder / f"photos/{name}.png", photo(number))
    images = [{"id": 7 + n, "file_name": f"{name}.png", "width": 8, "height": 6}
              for n, name in enumerate("abc")]  # fmt: skip
    square = [[1, 1, 3, 1, 3, 4, 1, 4]]
    rows = [(7, 3, [1, 1, 2, 3], 0, square), (7, 90, [6, 4, 5, 1], 0, None),
            (7, 3, [0, 0, 8, 6], 1, {"counts": [0, 48], "size": [6, 8]}),
            (8, 3, [2, 2, 0, 3], 0, None), (8, 90, [9, 1, 3, 3], 0, None)]  # fmt: skip
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd, "area": 5.5,
         "segmentation": shape}
        for n, (i, c, box, crowd, shape) in enumerate(rows)
    ]  # fmt: skip
    categories = [{"id": 90, "name": "car"}, {"id": 3, "name": "dog"}, {"id": 95, "name": "ufo"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_boxes_of_coco(tmp_path: Path, capsys: Any):
    file = coco(tmp_path)
    index = pack(tmp_path / "photos", tmp_path / "dst", boxes=(file,))
    text = capsys.readouterr().out
    assert index.targets == "boxes" and index.target_classes == ["dog", "car", "ufo"]
    found = {name: decode_boxes(raw) for name, raw in contents(index).items()}
    a = found["a"]
    assert a.boxes.tolist() == [[1, 1, 3, 4], [6, 4, 8, 5], [0, 0, 8, 6]]
    assert a.labels.tolist() == [0, 1, 0] and a.crowd.tolist() == [False, False, True]
    assert a.area.tolist() == [5.5, 2, 5.5]  # the second box is cut to 2 x 1 pixels
    assert a.image_id == 7 and not a.difficult.any()
    assert a.segmentation[0] == [[1, 1, 3, 1, 3, 4, 1, 4]]
    assert a.segmentation[2] == {"counts": [0, 48], "size": [6, 8]}
    assert len(found["b"]) == len(found["c"]) == 0 and "d" not in found
    for line in (
        "1 boxes clipped to their image", "1 boxes of no area left out",
        "1 boxes outside their image left out", "classes without instances: ufo",
        "skipped: 1 images that --boxes does not name (the first: d.png)",
        "1 images have no object, and stay as such",
    ):  # fmt: skip
        assert line in text, line
    assert check(CheckConfig(dst=str(tmp_path / "dst"), num_workers=1)) == 0
    assert "boxes of 3 classes" in capsys.readouterr().out


def test_names_in_another_form_of_unicode_and_unknown_sizes(
    tmp_path: Path, classes: str, capsys: Any
):
    """macOS writes é as two code points; some tools write sizes as null or 0."""
    one, two = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    save(tmp_path / f"src/{one}.png", photo(0))
    save(tmp_path / f"src/{one}2.png", photo(1))
    save(tmp_path / f"masks/{two}.png", np.zeros((6, 8), np.uint8))
    index = pack(tmp_path / "src", tmp_path / "m", masks=(str(tmp_path / "masks"),),
                 mask_classes=classes)  # fmt: skip
    assert index.num_samples == 1
    images = [{"id": 1, "file_name": f"{two}.png", "width": None, "height": None},
              {"id": 2, "file_name": f"{two}2.png", "width": 0, "height": 0}]  # fmt: skip
    boxes = [{"image_id": n, "category_id": 1, "bbox": [0, 0, 4, 4]} for n in (1, 2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    index = pack(tmp_path / "src", tmp_path / "b", boxes=(tmp_path / "boxes.json",))
    assert index.num_samples == 2
    (tmp_path / "xml").mkdir()
    box = "<bndbox><xmin>2</xmin><ymin>1</ymin><xmax>8</xmax><ymax>6</ymax></bndbox>"
    (tmp_path / f"xml/{two}.xml").write_text(
        f"<annotation><object><name>x</name>{box}</object></annotation>"
    )
    index = pack(tmp_path / "src", tmp_path / "v", boxes=(tmp_path / "xml",))
    assert index.num_samples == 1


def test_boxes_of_pascal_voc(tmp_path: Path):
    save(tmp_path / "src/JPEGImages/a.png", photo(0))
    box = "<bndbox><xmin>2</xmin><ymin>1</ymin><xmax>8</xmax><ymax>6</ymax></bndbox>"
    size = "<size><width>8</width><height>6</height><depth>3</depth></size>"
    (tmp_path / "src/Annotations").mkdir()
    (tmp_path / "src/Annotations/a.xml").write_text(
        f"<annotation>{size}<object><name>WBC</name><difficult>1</difficult>{box}</object>"
        f"<object><name>RBC</name>{box}</object></annotation>"
    )
    index = pack(tmp_path / "src", tmp_path / "dst", boxes=(tmp_path / "src/Annotations",))
    found = decode_boxes(contents(index)["a"])
    assert index.target_classes == ["RBC", "WBC"] and found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [[1, 0, 8, 6]] * 2 and found.difficult.tolist() == [True, False]


@pytest.mark.parametrize("change, message", [
    ("<!DOCTYPE x>", "declares entities"), ("<object/>", "without a bndbox"), ("<a", "XML"),
])  # fmt: skip
def test_bad_xml_is_named(tmp_path: Path, change: str, message: str, capsys: Any):
    save(tmp_path / "src/a.png", photo(0))
    (tmp_path / "xml").mkdir()
    content = f"{change}<annotation></annotation>" if "!" in change else f"<x>{change}</x>"
    (tmp_path / "xml/a.xml").write_text(content)
    words = ["shards", "make", str(tmp_path / "src"), str(tmp_path / "d"), "--boxes"]
    assert main([*words, str(tmp_path / "xml")]) == 2
    error = capsys.readouterr().err
    assert "a.xml" in error and (message in error or message == "XML")


def test_lists_of_a_split(tmp_path: Path, classes: str, capsys: Any):
    src = scenes(tmp_path / "src")
    (tmp_path / "train.txt").write_text("a\nc.png\nnothing\n")
    (src / "val.txt").write_text("val/e\n")
    splits = (f"train={tmp_path / 'train.txt'}", "val=val.txt")
    options: dict[str, Any] = {"masks": ("masks",), "mask_classes": classes}
    index = pack(src, tmp_path / "dst", splits=splits, **options)
    assert sorted(contents(index)) == ["a", "c"]
    assert sorted(contents(ShardIndex.load(tmp_path / "dst/val"))) == ["e"]
    assert "skipped: 1 images of " in capsys.readouterr().out
    with pytest.raises(InputError, match="a is in train too"):
        (src / "val.txt").write_text("a\n")
        pack(src, tmp_path / "dst2", splits=splits, **options)


# ---------------------------------------------------------------------------- reading


def both(pixels: np.ndarray, target: Any, key: Key) -> tuple[Any, ...]:
    """What a transform sees."""
    content = target.boxes.tolist() if isinstance(target, Boxes) else target.tolist()
    return int(pixels[0, 0, 0]) // 10, pixels.shape, content, key


@pytest.fixture
def packed(tmp_path: Path, classes: str) -> ShardIndex:
    return pack(scenes(tmp_path / "src"), tmp_path / "dst", masks=("masks",), mask_classes=classes)


def test_image_and_target_belong_together(packed: ShardIndex):
    for _, (number, shape, mask, _) in one_pass(packed, HERE, both, range(4)):
        assert shape == (6, 8, 3) and mask[0] == [255] * 8 and mask[1] == [number] * 8


def steps(index: ShardIndex, start: int, count: int, workers: int = 0, **rank: int) -> list[Any]:
    plan = Plan.of(index, HERE, seed=3, batch_size=2)
    config = LoaderConfig(num_workers=workers)
    loader = TargetLoader(index, plan, config, both, start_step=start, **rank)
    return [[batch.items for batch in step] for step in islice(loader, count)]


def test_resumes_exactly_with_other_workers_and_ranks(packed: ShardIndex):
    every = steps(packed, 0, 5)
    assert steps(packed, 2, 3, workers=2) == every[2:]
    ranks = [steps(packed, 0, 5, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [[[a[0][0], b[0][0]]] for a, b in zip(*ranks, strict=True)]
    assert joined == every
    keys = {item[3] for step in every for item in step[0]}
    assert {key.epoch for key in keys} == {0, 1, 2} and {key.seed for key in keys} == {3}


def test_an_unreadable_target_is_replaced_and_recorded(packed: ShardIndex, tmp_path: Path):
    path = Path(packed.path(0))
    data = bytearray(path.read_bytes())
    _, at, _ = packed.locate_target(2)
    data[at + 30 : at + 60] = bytes(30)
    path.write_bytes(data)
    plan = Plan.of(packed, HERE, seed=3, batch_size=4)
    loader = TargetLoader(packed, plan, HERE, both, run_folder=tmp_path)
    (batch,) = next(iter(loader))
    place = batch.samples.tolist().index(2)
    assert batch.sources[place] in (0, 1, 3) and len(batch.items) == 4
    assert '"sample": 2' in (tmp_path / "quarantine.jsonl").read_text()
    assert [n for n, _ in one_pass(packed, HERE, both, range(4))] == [0, 1, 3]
    assert check(CheckConfig(dst=str(Path(packed.root).parent), num_workers=1)) == 1


def test_shards_without_targets_are_refused(demo_shards: Path):
    index = ShardIndex.load(demo_shards / "train")
    with pytest.raises(InputError, match="neither masks nor boxes; pack them with"):
        next(one_pass(index, HERE, both, [0]))
