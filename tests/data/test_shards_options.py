"""Every option of shards make, check and demo has its intended effect, or is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.shards.config import CheckConfig, DemoConfig, MakeConfig
from xcit_dino.files import file_sha256

POSITIONAL = {"src", "dst"}
MAKE = {  # changed: other files; same: the same by intention; a text: refused with it
    "--split val": "changed",
    "--splits train=a": "changed",
    "--labels none": "changed",
    "--label_column x": "there is no list of labels",
    "--image_key x": "no Parquet or Arrow file with columns",
    "--label_map {}/map.txt": "changed",
    "--exclude {}/gone.csv": "changed",
    "--masks {}/masks": "0, 7, 255",
    "--mask_classes voc": "there are no --masks",
    "--masks {}/masks --mask_classes {}/map.txt --mask_ignore 7": "changed",
    "--boxes {}/boxes.json": "changed",
    "--multi_labels {}/several.csv": "changed",
    "--values {}/several.csv --label_column size": "changed",
    "--val_fraction 0.5": "changed",
    "--group_column size": "needs a list with columns",
    "--shard_size 1": "changed",
    "--shard_bytes 1000": "changed",
    "--tile 20": "changed",
    "--stride 10 --tile 20": "changed",
    "--min_foreground 0.5 --tile 20": "changed",
    "--background slide --min_foreground 0.5 --tile 20": "changed",
    "--resize 20": "changed",
    "--bits 16": "changed",
    "--pixels 3xuint8": "changed",
    "--page 1": "these are 8-bit images",
    "--nodata 7 --pixels 3xuint8": "changed",
    "--max_pixels 90000000": "changed",
    "--quality 50": "without --resize",
    "--shuffle false": "changed",
    "--seed 1": "changed",
    "--verify false": "changed",
    "--num_workers 2": "same",
    "--root {}": "no data set that torchvision downloads",
    "--download": "no data set that torchvision downloads",
}
CHECK = {  # a pattern of what is printed; a text with --: refused with it
    "--sample 1": r"decoded +│ 1 images",
    "--rebuild": r"Index ",
    "--hash": "--hash: .* add --rebuild",
    "--image_key png": "--image_key: .* add --rebuild",
    "--label_key txt": "--label_key: .* add --rebuild",
    "--num_workers 2": r"decoded +│ 4 images",
    "--rebuild --pixels 3xuint8": r"3xuint8, measured on 4 images",
    "--rebuild --pixels 3xuint8 --nodata 7": r"of the values are invalid",
    "--rebuild --pixels rgb8": r"Index ",
    "--page 1": "--page: .* add --rebuild",
    "--max_pixels 1000": "--max_pixels: .* add --rebuild",
    "--nodes 3": r"3 x 1 x 64",
    "--gpus 3": r"1 x 3 x 64",
    "--workers 7": "--workers: .* add --nodes",
    "--workers 7 --gpus 1 --batch_size_per_gpu 1": r"7 workers feed",
    "--batch_size_per_gpu 2": "--batch_size_per_gpu: .* add --nodes",
    "--images_per_second 9": "--images_per_second: .* add --nodes",
    "--images_per_second 9 --gpus 1 --batch_size_per_gpu 1": r"at 9 images/s a GPU",
}
DEMO = ("--train 4", "--val 3", "--size 24", "--seed 1")


def named(options: object) -> set[str]:
    return set(re.findall(r"--(\w+)", " ".join(options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("config, options", [
    (MakeConfig, MAKE), (CheckConfig, CHECK), (DemoConfig, DEMO),
], ids=["make", "check", "demo"])  # fmt: skip
def test_every_option_is_tried(config: type, options: object):
    assert {field.name for field in dataclasses.fields(config)} - POSITIONAL == named(options)


def source(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("a/0.jpg", "a/1.jpg", "b/2.jpg", "b/3.jpg", "b/4.jpg")):
        pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
        data = simplejpeg.encode_jpeg(pixels, quality=80)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data[:-300] if number == 4 else data)
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "a" / "5.png")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("option", MAKE)
def test_options_of_make(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src, expected = source(tmp_path / "src"), MAKE[option]
    (tmp_path / "map.txt").write_text("b\na\n")
    (tmp_path / "gone.csv").write_text("image\na/0.jpg\n")
    rows = "a/0.jpg,a,1\nb/2.jpg,b,2\n"
    (tmp_path / "several.csv").write_text(f"image,label,size\n{rows}")
    (tmp_path / "masks").mkdir()
    mask = np.zeros((40, 40), np.uint8)
    mask[0], mask[1] = 7, 255
    Image.fromarray(mask).save(tmp_path / "masks" / "1.png")
    one = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9]}
    boxes = {"images": [{"id": 0, "file_name": "1.jpg"}], "annotations": [one],
             "categories": [{"id": 1, "name": "cat"}]}  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    command = ["shards", "make", str(src)]
    if "pixels" in option or "page" in option:
        (src / "a" / "5.png").unlink()  # of 16 bits, as --bits has it
    elif "bits" not in option:
        command += ["--pixels", "rgb8"]
    bits = ["--pixels", "rgb8"] if "bits" in option else []
    assert main([*command, str(tmp_path / "plain"), "--num_workers", "1", *bits]) == 0
    code = main([*command, str(tmp_path / "dst"), *shlex.split(option.format(*[tmp_path] * 2))])
    if expected in ("changed", "same"):
        same = digests(tmp_path / "dst") == digests(tmp_path / "plain")
        assert code == 0 and same == (expected == "same")
    else:
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and expected in error and option.split()[0] in error


def test_quality_of_resized_images(tmp_path: Path):
    src = source(tmp_path / "src")
    for quality in ("90", "50"):
        options = ["--resize", "20", "--quality", quality, "--pixels", "rgb8"]
        assert main(["shards", "make", str(src), str(tmp_path / quality), *options]) == 0
    assert digests(tmp_path / "50") != digests(tmp_path / "90")


def test_options_of_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src = source(tmp_path / "src")
    (src / "b" / "4.jpg").unlink()
    (src / "a" / "5.png").unlink()
    assert main(["shards", "make", str(src), str(tmp_path / "dst")]) == 0
    capsys.readouterr()
    for option, expected in CHECK.items():
        code = main(["shards", "check", str(tmp_path / "dst"), *option.split()])
        assert code == (2 if expected.startswith("--") else 0)
        out, err = capsys.readouterr()
        assert re.search(expected, out + err), (option, out, err)


def test_options_of_demo(tmp_path: Path):
    command = ["shards", "demo", "--train", "6", "--val", "6"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    for option in DEMO:
        assert main([*command, str(tmp_path / option), *option.split()]) == 0
        assert digests(tmp_path / option) != digests(tmp_path / "plain"), option
