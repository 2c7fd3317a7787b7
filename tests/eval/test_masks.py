"""Attention masks against true masks: Jaccard by sets of pixels, the threshold by a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.pack.make import make
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.formats import decode_mask
from xcit_dino.errors import InputError
from xcit_dino.eval.dense import masks
from xcit_dino.eval.dense.config import MasksConfig
from xcit_dino.eval.pictures.attention import strongest
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.report.report import page
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import read_runs


def kept(heat: np.ndarray, share: float) -> set[tuple[int, int]]:
    """Patches are added, the strongest first, until they hold the share (DINO drops the weakest
    while those hold no more than the rest)."""
    order = sorted(np.ndindex(*heat.shape), key=lambda at: -heat[at])
    found, mass = set[tuple[int, int]](), 0.0
    for at in order:
        if mass >= share * heat.sum():
            break
        found.add(at)
        mass += heat[at]
    return found


def brute(
    maps: np.ndarray, mask: np.ndarray, share: float, background: tuple[int, ...]
) -> list[list[float]]:
    """Pixel by pixel: for each class the Jaccard index of each head."""
    H, W = mask.shape
    h, w = maps.shape[1:]
    heads = []
    for heat in maps:
        cells = kept(heat, share)
        heads.append({
            (y, x) for y in range(H) for x in range(W)
            if (int((y + 0.5) * h / H), int((x + 0.5) * w / W)) in cells and mask[y, x] != 255
        })  # fmt: skip
    found = []
    for value in sorted(set(mask.ravel().tolist()) - {255, *background}):
        one = {(y, x) for y in range(H) for x in range(W) if mask[y, x] == value}
        found.append([len(head & one) / len(head | one) for head in heads])
    return found


def test_jaccard_against_sets_of_pixels():
    rng = np.random.default_rng(0)
    for _ in range(5):
        maps = rng.random((3, 4, 5)).astype(np.float32) ** 4
        mask = rng.integers(0, 4, (19, 27), dtype=np.uint8)
        mask[rng.random(mask.shape) < 0.2] = 255
        bits = np.stack([strongest(heat, 0.6) for heat in maps]) > 0
        expected = brute(maps, mask, 0.6, (0, 2))
        assert masks.jaccards(bits, mask, (0, 2)) == pytest.approx(np.array(expected))
    nothing = masks.jaccards(np.ones((3, 2, 2), bool), np.zeros((8, 8), np.uint8), (0,))
    assert nothing.shape == (0, 3)


def draw(folder: Path, count: int = 6) -> Path:
    """Squares and discs (classes 1 and 2) on noise, in an ignored frame; the last has none."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.integers(0, 80, (40, 56, 3), dtype=np.uint8)
        mask = np.zeros((40, 56), np.uint8)
        if number < count - 1:
            y, x = rng.integers(2, 10, 2)
            image[y : y + 16, x : x + 16], mask[y : y + 16, x : x + 16] = 230, 1
            rows, columns = np.mgrid[:40, :56]
            disc = (rows - 25) ** 2 + (columns - 42) ** 2 < 80
            image[disc], mask[disc] = (10, 200, 40), 2
        mask[0] = 255
        for kind, content in (("images", image), ("masks", mask)):
            path = folder / f"src/{kind}/val/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    (folder / "classes.txt").write_text("background\nsquare\ndisc\n")
    make(MakeConfig(str(folder / "src"), folder / "shards", masks=("masks",), num_workers=1,
                    mask_classes=str(folder / "classes.txt")))  # fmt: skip
    return folder / "shards"


def test_a_result_is_the_mean_over_images(run_folder: Any, tmp_path: Path):
    shards = draw(tmp_path)
    config = run_folder.target(data_path=str(shards), baselines=True)
    masks.run(MasksConfig(config, image_size=48, layer=1))
    results = json.loads((run_folder.path / "results.json").read_text())
    assert {"masks", "masks/random"} <= set(results) and "masks/pixels" not in results
    found = results["masks"]
    assert found["protocol"]["val_images"] == 5
    assert found["protocol"]["images_without_objects"] == 1
    model = create_model("xcit_pico_6_p8", num_classes=0).eval()
    load_backbone(run_folder.weights, model)
    _, context = masks.resolve(config, dist.init("cpu"))
    index = ShardIndex.load(shards / "val")
    best, heads = [], []
    for sample in range(6):
        places = index.locate(sample), index.locate_target(sample)
        image, mask = (Path(index.path(s)).read_bytes()[at : at + size] for s, at, size in places)
        (tmp_path / "one.png").write_bytes(image)
        with Image.open(tmp_path / "one.png") as photo:
            pixels = np.asarray(photo.resize((64, 48), Image.Resampling.BICUBIC))
        tensor = context.normalize(torch.tensor(pixels).permute(2, 0, 1)[None])
        with torch.no_grad():
            maps = model.get_attention(tensor)[0, 0].numpy()  # type: ignore[operator]
        if rows := brute(maps, decode_mask(mask), 0.6, (0,)):
            best.append(np.mean([max(row) for row in rows]))
            heads.append(np.mean(rows, 0))
    mean = 100 * np.mean(heads, 0)
    assert found["metrics"] == pytest.approx(
        {
            "jaccard": 100 * np.mean(best),
            "jaccard_best_head": mean.max(),
            "jaccard_mean": mean.mean(),
        },
        abs=1e-3,
    )
    assert found["heads"] == pytest.approx(mean.tolist(), abs=1e-3)
    text = page(read_runs([run_folder.path]))
    assert "Attention masks, Jaccard</p>" in text and "over random weights" in text
    assert "on VOC 2012 val" in text


def test_what_is_refused(run_folder: Any, demo_shards: Path, tmp_path: Path):
    shards = draw(tmp_path, 2)
    with pytest.raises(InputError, match="neither masks nor boxes"):
        masks.run(MasksConfig(run_folder.target(data_path=str(demo_shards))))
    config = run_folder.target(data_path=str(shards))
    with pytest.raises(
        InputError, match="--background 3: no such class; there are 0 background, 1"
    ):
        masks.run(MasksConfig(config, background=(3,)))
    with pytest.raises(InputError, match="no mask has a class besides --background 0 1 2"):
        masks.run(MasksConfig(config, background=(0, 1, 2), image_size=32))
    words = ["masks", "--output_dir", str(run_folder.path), "--crop_size", "64"]
    assert main(words) == 2
