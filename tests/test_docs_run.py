"""Every command in README.md and docs/ runs, page by page and in order, on a few small images.

What is large is replaced: architectures by the smallest of the same patch size, data, runs and
files of weights by stand-ins of the same names. The launcher's commands are dry runs. What is no
command to be typed as it stands (SRC, RUN, FILE) or needs another machine is left to test_docs.py.
"""

from __future__ import annotations

import pickle
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_docs import PAGES, ROOT, commands, name_of, photographs, whole
from tests.turning import done
from xcit_dino.cli import COMMANDS
from xcit_dino.models.zoo import create_model

LEFT = (
    r"knn --baselines true$|\b(FILE|SRC|DST|RUN)\b|/project/|/data/|timm/|resnet18|rehearse|status"
    r"|shards make cifar10 "
)
LARGE = re.compile(r"^xcit_(?:tiny|small)_12_p(8|16)(?:_384)?$")
CPU = "--num_workers 0 --device cpu --precision fp32"
EVALUATION = f"{CPU} --crop_size 32 --resize_size 32"
TRAINING = f"{CPU} --epochs 1 --warmup_epochs 0 --batch_size_per_gpu 8 --log_every 1"
FINETUNE = f"{TRAINING} --input_size 32 --eval_every 0 --repeated_aug 1 --drop_path_rate 0"
SMALL = {
    "knn": f"{EVALUATION} --nb_knn 5",
    "linear": f"{EVALUATION} --epochs 2 --batch_size_per_gpu 8",
    "evaluate": EVALUATION,
    "embed": EVALUATION,
    "duplicates": EVALUATION,
    "masks": f"{CPU} --image_size 32",
    "retrieve": "--image_size 32 --device cpu",
    "propagate": "--image_size 32 --device cpu",
    "attention": "--image_size 32 --device cpu",
    "pretrain": f"{TRAINING} --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 "
    "--out_dim 32 --head_hidden_dim 16 --head_bottleneck_dim 8 --knn_every 1",
    "finetune": FINETUNE,
    "distill": FINETUNE,
    "segment": f"{TRAINING} --crop_size 32",
    "detect": f"{TRAINING} --crop_size 32 --eval_side 32 --fpn_dim 8 --roi_samples 8",
    "launch": "--dry_run true",
    "recipe": "--device cpu --num_workers 0",
    "shards": "--num_workers 1",
}
RUNS = "my_run old xcit_small_12_p16 official_s12_p16 a b"  # p16
RUNS_P8 = "xcit_small_12_p8 small tiny xcit_pico_6_p4"
WEIGHTS = {  # name: (arch, classes)
    "dino_xcit_small_12_p16_pretrain.pth": ("xcit_pico_6_p16", 0),
    "xcit_nano_12_p8_224.pth": ("xcit_nano_12_p8", 3),
    "teacher.pth": ("xcit_pico_6_p8", 3),
}


def lines_of(page: Path) -> list[str]:
    """The commands that can be run, each once."""
    lines = dict.fromkeys(" ".join(line.split()) for line in commands(page))
    return [
        line
        for line in lines
        if whole(line) and len(shlex.split(line, comments=True)) > 2 and not re.search(LEFT, line)
    ]


def stand_in(line: str) -> list[str]:
    """The same command, small."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = words[words.index("xcit_dino.cli") :]
    elif words[0] == "python":
        words = ["", "launch", *words[2:]]
    extra = placed(words) + SMALL.get(words[1], "").split()
    words = [newest(LARGE.sub(r"xcit_pico_6_p\1", word)) for word in words[1:]]
    words = [str(Path(word).expanduser()) if word[0] == "~" else word for word in words]
    if " ".join(words) in COMMANDS:  # it is spoken of
        return []
    if "timm-hub" in words:  # timm has no pico
        words = ["xcit_nano_12_p8_224.pth" if word == "runs/my_run" else word for word in words]
    if words[:2] == ["shards", "demo"]:
        extra = "--train 6 --val 3".split()
    if words[0] == "distill" and "--teacher_path" not in words:
        extra += "--teacher_model xcit_pico_6_p8 --teacher_path teacher.pth".split()
    return [*words, *extra]


def placed(words: list[str]) -> list[str]:
    """The folder that the real command would take, and the cluster that it would find."""
    options = dict(zip(words, [*words[1:], ""], strict=True))
    if words[1] == "launch" and {"--ngpus", "--nodes"} & set(words):
        return ["--cluster", "slurm"]
    if words[1] in ("finetune", "distill") and "--arch" in options:
        if not {"--output_dir", "--pretrained_weights"} & set(words):
            return ["--output_dir", f"runs/{options['--arch']}/{words[1]}"]
    return []


def newest(word: str) -> str:
    """A checkpoint's name with the step that it has here."""
    path = Path(word)
    if re.fullmatch(r"checkpoint-\d{8}\.pth", path.name):
        return str(max(path.parent.glob("checkpoint-*.pth"), default=path))
    return word


@pytest.mark.parametrize("page", [page for page in PAGES if lines_of(page)], ids=name_of)
def test_the_commands_of_a_page_run(page: Path, things: Path, tmp_path: Path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(things, here, symlinks=True)
    for config in here.rglob("config.yaml"):  # absolute paths
        config.write_text(config.read_text().replace(str(things), str(here)))
    monkeypatch.chdir(here)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(here))
    monkeypatch.setattr("xcit_dino.ssl.recipe.speed.SECONDS", 0.1)
    for line in lines_of(page):
        if words := stand_in(line):
            done(words, line)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, shards, runs and files of weights under the names that docs use."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("docs") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        photographs(folder / "photos", 6, 3)
        shutil.copytree("photos", "ilsvrc")
        shutil.copy("photos/val/red/0.jpg", "photo.jpg")
        Path("classes100.txt").write_text("green\nred\n")
        for name, part in (("cifar10-train", "train"), ("cifar10-test", "val")):
            with tarfile.open(f"{name}.tar.gz", "w:gz") as tar:
                tar.add(f"photos/{part}", {"val": "test"}.get(part, part))
        with tarfile.open("photos-400.tar", "w") as tar:
            tar.add("photos", "photos")
        targets(folder)
        videos(folder)
        shutil.copytree("photos/val/red", "scans")
        rows = "0.jpg,cyst|mass,P1\n1.jpg,,P2\n2.jpg,mass,P3\n"
        Path("findings.csv").write_text(f"image,finding,patient\n{rows}")
        oxford(folder / "roxford5k"), oxford(folder / "rparis6k")
        for name in ("copydays/original", "copydays/strong", "yfcc20k", "yfcc10k"):
            shutil.copytree("photos/val/red", name)
        done(
            "shards make camvid shards/street --masks masks --mask_classes camvid "
            "--num_workers 1".split()
        )
        (folder / "configs").symlink_to(ROOT / "configs")
        splits = "train=ImageSets/Main/train.txt val=ImageSets/Main/val.txt"
        words = f"bccd shards/bccd --boxes bccd/Annotations --splits {splits} --num_workers 1"
        done(f"shards make {words}".split())
        done("shards make photos shards/imagenet --num_workers 1".split())
        for part in ("train", "test"):
            done(f"shards make cifar10-{part}.tar.gz shards/cifar10 --num_workers 1".split())
        for name in ("mine", "small", "photos"):
            shutil.copytree("shards/imagenet", f"shards/{name}")
        trained(folder)
    return folder


def targets(folder: Path) -> None:
    """``camvid``, images with masks, and ``bccd``, images with boxes."""
    for number in range(12):
        split, pixels = (
            "val" if number > 7 else "train",
            np.full((40, 48, 3), 20 * number, np.uint8),
        )
        mask = np.zeros((40, 48), np.uint8)
        mask[10:30, number : number + 20], pixels[10:30, number : number + 20] = 8, 255
        for path, content in (
            (f"camvid/images/{split}/{number}.png", pixels),
            (f"camvid/masks/{split}/{number}.png", mask),
            (f"bccd/JPEGImages/{number}.png", pixels),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(folder / path)
        box = f"<xmin>{number + 1}</xmin><ymin>11</ymin><xmax>{number + 20}</xmax><ymax>30</ymax>"
        xml = f"<a><object><name>RBC</name><bndbox>{box}</bndbox></object></a>"
        for path, text in (
            (f"bccd/Annotations/{number}.xml", xml),
            (f"bccd/ImageSets/Main/{split}.txt", f"{number}\n"),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("a") as file:
                file.write(text)


def videos(folder: Path) -> None:
    """``DAVIS``, a video as in DAVIS 2017; ``FRAMES`` and ``first_mask.png``, the same alone."""
    for number in range(4):
        mask = np.zeros((32, 64), np.uint8)
        mask[8:24, 8 + number : 40 + number] = 1
        pixels = np.repeat(mask[..., None] * 200, 3, 2)
        for path, content in (
            (f"DAVIS/JPEGImages/480p/a/{number}.jpg", pixels),
            (f"DAVIS/Annotations/480p/a/{number}.png", mask),
            (f"FRAMES/{number}.jpg", pixels),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(folder / path)
    shutil.copy(folder / "DAVIS/Annotations/480p/a/0.png", folder / "first_mask.png")
    (folder / "DAVIS/ImageSets/2017").mkdir(parents=True)
    (folder / "DAVIS/ImageSets/2017/val.txt").write_text("a\n")


def oxford(folder: Path) -> None:
    """Oxford revisited with one query."""
    shutil.copytree("photos/val/red", folder / "jpg")
    truth = {"gnd": [{"easy": [0], "hard": [1], "junk": []}], "imlist": ["0", "1"]}
    with (folder / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump(truth | {"qimlist": ["2"]}, file)


def trained(folder: Path) -> None:
    """Runs and weights, of both patch sizes."""
    for patch, names in ((16, RUNS), (8, RUNS_P8)):
        words = (
            f"pretrain --arch xcit_pico_6_p{patch} --data_path shards/imagenet {SMALL['pretrain']}"
        )
        first, *others = (folder / "runs" / name for name in names.split())
        done([*words.split(), "--output_dir", str(first)])
        done(f"linear --output_dir {first} {SMALL['linear']}".split())
        for other in others:
            shutil.copytree(first, other)
    full = max((folder / "runs/my_run/checkpoints").glob("*.pth"))
    shutil.copy(full, folder / "dino_xcit_small_12_p16_pretrain_full_checkpoint.pth")
    for name, (arch, classes) in WEIGHTS.items():
        torch.save(create_model(arch, num_classes=classes).state_dict(), name)
    done("weights convert xcit_nano_12_p8_224.pth --output xcit_nano_12_p8_224.pdparams".split())
    done(stand_in("xcit-dino finetune --pretrained_weights runs/small"))
    words = "xcit-dino distill --arch xcit_nano_12_p8 --data_path shards/imagenet --output_dir d"
    done(stand_in(words))
    shutil.copy(max(Path("d/checkpoints").glob("*.pth")), "checkpoint-00500400.pth")
