"""Every command on images of 13 bands, against the same images in red, green and blue:
python bench/trials/bands.py FOLDER

Draws a labeled set of small multispectral tiles (TIFF, uint16, 12 bits used), whose twelve classes
are four ground covers in three textures. Two covers of a pair have the same red, green and blue and
differ in the ten other bands only. Covers, soil, shape, light, haze and noise are independent.

Then follow packing, pretraining (a whole run, and one that is killed halfway and resumed: their
weights must be equal to the bit), every evaluation and export, and k-NN and linear probe of a run
that reads three of the bands.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

COMMAND = (sys.executable, "-m", "xcit_dino.cli")
BANDS, RGB, SIZE = 13, (4, 3, 2), 32
WAVELENGTHS = (443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190)
"""In nm, as ESA's S2 has them."""
TEXTURES = ("grain", "rows", "fields")
VISIBLE = ((0.05, 0.09, 0.06), (0.11, 0.12, 0.17))  # blue, green, red of a pair of covers
COVERS = {  # pair, and the other bands: coastal, red edge x 3, infrared x 4, shortwave x 2
    "grass": (0, (0.04, 0.16, 0.30, 0.36, 0.40, 0.42, 0.30, 0.04, 0.22, 0.12)),
    "algae": (0, (0.04, 0.10, 0.14, 0.13, 0.10, 0.09, 0.05, 0.01, 0.03, 0.02)),
    "sand": (1, (0.09, 0.20, 0.22, 0.24, 0.26, 0.27, 0.24, 0.05, 0.38, 0.34)),
    "brick": (1, (0.09, 0.24, 0.30, 0.32, 0.31, 0.30, 0.22, 0.03, 0.20, 0.16)),
}
SOIL = np.interp(WAVELENGTHS, (443, 665, 865, 1610, 2190), (0.05, 0.12, 0.18, 0.25, 0.22))
CLASSES = [f"{cover}-{texture}" for cover in COVERS for texture in TEXTURES]
AUGMENTATION = (
    "--rot90_prob 0.75 --color_jitter 0.4 0.4 0 0 --channel_jitter 0.2 0.2 --noise_prob 0.2 "
    "--noise_std 0.02"
).split()
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"planarconfig": "separate", "compression": "zlib"},
    {"planarconfig": "contig", "byteorder": ">"},
    {"planarconfig": "contig", "compression": "lzw", "predictor": True, "tile": (16, 16)},
    {"planarconfig": "separate", "bigtiff": True, "rowsperstrip": 8},
)


def spectrum(cover: str) -> np.ndarray:
    """Reflectance of a cover in every band [13]."""
    pair, other = COVERS[cover]
    return np.array([other[0], *VISIBLE[pair], *other[1:]])


def smooth(rng: np.random.Generator, waves: float, *, size: int = SIZE) -> np.ndarray:
    """A random plane [size, size] of about ``waves`` waves a side, with values from 0 to 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size, indexing="ij")
    power = np.exp(-(((np.hypot(fy, fx) - waves) / (0.3 * waves + 0.3)) ** 2))
    phase = np.exp(2j * np.pi * rng.random(power.shape))
    plane = np.fft.irfft2(power * phase, (size, size))
    return (plane - plane.min()) / np.ptp(plane)


def cover_share(rng: np.random.Generator, texture: str) -> np.ndarray:
    """How much of each pixel is cover and not soil [SIZE, SIZE]; each texture covers about half."""
    if texture == "grain":
        return (smooth(rng, 11) - 0.5) * 3 + 0.5
    if texture == "fields":
        return (smooth(rng, 2.5) - 0.5) * 8 + 0.5
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    angle, waves = rng.random() * np.pi, rng.uniform(5, 7)
    along = x * np.cos(angle) + y * np.sin(angle) + 0.06 * smooth(rng, 1.5)
    return 0.5 + 1.2 * np.sin(2 * np.pi * (waves * along + rng.random()))


def tile(split: str, number: int, seed: int) -> tuple[np.ndarray, str]:
    """uint16 [32, 32, 13] and its class: a function of (seed, split, number)."""
    rng = np.random.default_rng([seed, split == "val", number])
    name = CLASSES[number % len(CLASSES)]
    cover, texture = name.split("-")
    share = np.clip(cover_share(rng, texture), 0, 1)[..., None]
    leaf = spectrum(cover) * rng.uniform(0.75, 1.25)
    ground = SOIL * rng.uniform(0.5, 1.5) * (1 + rng.normal(0, 0.05, BANDS))
    light = rng.uniform(0.4, 1.2) * (0.6 + 0.8 * smooth(rng, 1)[..., None])
    haze = rng.uniform(0, 0.12) * smooth(rng, 1)[..., None] * (443 / np.array(WAVELENGTHS)) ** 1.5
    gain = 1 + rng.normal(0, 0.08, BANDS)  # of the bands, as the atmosphere has it
    reflectance = (share * leaf + (1 - share) * ground) * light * gain + haze
    reflectance += rng.normal(0, 0.006, reflectance.shape)
    return np.clip(reflectance * 6000, 0, 4095).round().astype(np.uint16), name


def write_set(folder: Path, counts: dict[str, int], seed: int) -> None:
    """``folder/SPLIT/CLASS/NUMBER.tif``, in four layouts of TIFF; present files are kept."""
    for split, count in counts.items():
        for number in range(count):
            values, name = tile(split, number, seed)
            path = folder / split / name / f"{number:05}.tif"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            how = LAYOUTS[number // len(CLASSES) % len(LAYOUTS)]
            planar = how["planarconfig"] == "separate"
            data = np.moveaxis(values, -1, 0) if planar else values
            tifffile.imwrite(path, data, photometric="minisblack", **how)


def call(*words: str | Path, log: Path) -> None:
    """A command, its output added to ``log``; ends this program where it fails."""
    began = time.monotonic()
    with log.open("a") as output:
        print(f"\n$ xcit-dino {' '.join(map(str, words))}", file=output, flush=True)
        code = subprocess.run([*COMMAND, *map(str, words)], stdout=output, stderr=output).returncode
    print(f"{time.monotonic() - began:6.1f} s  {' '.join(map(str, words[:2]))}", flush=True)
    if code:
        raise SystemExit(f"{words[0]} failed with exit code {code}: see {log}")


def kill_halfway(words: list[str], run: Path, steps: int, log: Path) -> int:
    """SIGKILL once half of the steps are logged; returns the step."""
    with log.open("a") as output:
        process = subprocess.Popen([*COMMAND, *words], stdout=output, stderr=output)
    while True:
        time.sleep(0.2)
        step = last_step(run)
        if step >= steps // 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return step
        if process.poll() is not None:
            raise SystemExit(f"pretrain ended at step {step}: see {log}")


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def differing(one: Path, two: Path) -> list[str]:
    """Tensors of student and teacher that are not equal to the bit in two runs' checkpoints."""
    import torch

    from xcit_dino.train.state import newest_checkpoint

    files = [newest_checkpoint(run) for run in (one, two)]
    left, right = (torch.load(str(file), weights_only=True) for file in files)
    return [
        f"{network}.{name}"
        for network in ("student", "teacher")
        for name, value in left[network].items()
        if not torch.equal(value, right[network][name])
    ]


def results(run: Path) -> dict[str, float]:
    """Top-1 in percent by the name of the result."""
    found = json.loads((run / "results.json").read_text())
    return {
        name: row["metrics"].get("top1_k20", row["metrics"].get("top1"))
        for name, row in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Every command on images of 13 bands")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=3600)
    parser.add_argument("--val", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    log, shards = folder / "log.txt", folder / "shards"
    write_set(folder / "tiles", {"train": args.train, "val": args.val}, args.seed)
    call("shards", "make", folder / "tiles", shards, log=log)
    call("shards", "check", shards, log=log)
    recipe = [
        "pretrain", "--arch", "xcit_pico_6_p8", "--data_path", str(shards), "--epochs",
        str(args.epochs), "--seed", str(args.seed), "--num_workers", "1", *AUGMENTATION,
    ]  # fmt: skip
    whole, halves, rgb = (folder / name for name in ("whole", "halves", "rgb"))
    steps = args.epochs * (args.train // 64)
    call(*recipe, "--output_dir", whole, log=log)
    again = [*recipe, "--output_dir", str(halves)]
    if last_step(halves) < steps // 2:
        print(f"killed at step {kill_halfway(again, halves, steps, log)} of {steps}")
    call(*again, log=log)
    print("tensors that differ after the resume:", differing(whole, halves) or "none")
    measure(whole, log)
    use(whole, log)
    export(whole, folder, log)
    call(*recipe, "--output_dir", rgb, "--bands", *map(str, RGB), log=log)
    measure(rgb, log)


def measure(run: Path, log: Path) -> None:
    """k-NN and linear probe, of random weights and raw pixels too."""
    call("knn", "--output_dir", run, "--baselines", "true", log=log)
    call("linear", "--output_dir", run, "--baselines", "true", "--epochs", "30", log=log)
    print(run.name, results(run), flush=True)


def use(run: Path, log: Path) -> None:
    """Everything else that is made from a run."""
    call("evaluate", "--output_dir", run, "--head", run / "linear_head.safetensors", log=log)
    tuning = ("--config", "configs/finetune/xcit_pico_6_p8.yaml", "--epochs", "2")
    tuned, distilled = (Path(f"{run}-{name}") for name in ("finetune", "distill"))
    call("finetune", *tuning, "--pretrained_weights", run, "--output_dir", tuned, log=log)
    call("evaluate", "--output_dir", tuned, log=log)
    call("distill", *tuning, "--data_path", run.parent / "shards", "--teacher_path", tuned,
         "--teacher_model", "xcit_pico_6_p8", "--output_dir", distilled, log=log)  # fmt: skip
    call("embed", "--output_dir", run, log=log)
    tiles = sorted((run.parent / "tiles" / "val").glob("*/*.tif"))
    call("attention", tiles[0], run / "maps", "--output_dir", run, "--image_size", "128", log=log)
    call("report", run, tuned, distilled, "--output", run.parent / "report.html", log=log)
    call("report", run, log=log)


def export(run: Path, folder: Path, log: Path) -> None:
    """safetensors and ONNX; each is verified as it is written. (timm has no pico.)"""
    for name in ("bands.safetensors", "bands.onnx"):
        if not (folder / name).exists():
            call("weights", "export", run, "--output", folder / name, log=log)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
