"""Every option of every command is changed: it has its effect, or is refused.

The options come from the commands' own dataclasses: a new one without a case in option_cases.py
fails here, and so does a choice of which two values come to the same.
"""

from __future__ import annotations

import json
import shutil
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from tests.native_sets import make_set
from tests.option_cases import (
    ARCH,
    BASES,
    CASES,
    DISTILL,
    EVAL_TARGET,
    EVALUATE,
    EXCEPTIONS,
    FINETUNE,
    RUN,
)
from tests.turning import Outcome, Turn, done, fresh, run, words_of
from xcit_dino.cli import COMMANDS, load
from xcit_dino.options import option_types
from xcit_dino.slurm.config import LaunchConfig

POSITIONAL = ("src", "checkpoint", "runs", "run", "dst", "shards", "out")
ELSEWHERE = {"launch": "test_launch_options.py"}  # turns every option of that command
RECIPES = ("pretrain", "finetune", "distill", "segment", "detect")  # take --config
# Turned by make faults only: options whose code another command shares, and what takes minutes.
REPEATED = {"finetune": FINETUNE, "distill": DISTILL, "evaluate": EVALUATE}
REPEATED |= {"segment": RUN, "detect": RUN, "linear": EVAL_TARGET, "embed": EVAL_TARGET}


def options_of(command: str) -> dict[str, Any]:
    """Option -> its type, of everything that a command takes."""
    if command == "launch rehearse":
        return dict.fromkeys(CASES[command], str)
    make = load(COMMANDS[command].config)
    kind = make if isinstance(make, type) else typing.get_type_hints(make)["return"]
    return option_types(kind) | ({"config": Path} if command in RECIPES else {})


def choices(kind: Any) -> set[str]:
    """All values of the Literals in a type."""
    if typing.get_origin(kind) is Literal:
        return {str(value) for value in typing.get_args(kind)}
    return set().union(*map(choices, typing.get_args(kind)))


# -- the tables are complete -----------------------------------------------------------------------


def test_every_command_has_cases():
    assert set(CASES) | set(ELSEWHERE) == set(COMMANDS)


@pytest.mark.parametrize("command", CASES)
def test_every_option_has_a_case(command):
    kinds = options_of(command)
    assert set(CASES[command]) == set(kinds)
    for name, kind in kinds.items():
        turns = CASES[command][name]
        assert turns or f"{command}.{name}" in EXCEPTIONS, f"{command} --{name}"
        seen = {value for each in turns for value in each.values} | {default(command, name)}
        for value in choices(kind) - seen if turns else ():
            known = {f"{name}={value}", f"{command}.{name}={value}"} & set(EXCEPTIONS)
            assert known, f"{command} --{name} {value}"


def default(command: str, name: str) -> str:
    """The base command's value of an option."""
    if name in BASES[command]:
        return BASES[command][name]
    make = load(COMMANDS[command].config)
    if not isinstance(make, type):
        kind = typing.get_type_hints(make)["return"]
        make = LaunchConfig if command.startswith("launch") else kind
    from xcit_dino.options import options

    try:
        return str(dict(options(make())).get(name))
    except Exception:  # a positional argument is missing: commands of choices have none
        return str(getattr(make, name, None))


def test_every_exception_names_a_reason_or_a_test_that_is_there():
    for name, reason in EXCEPTIONS.items():
        if reason.startswith("test_"):
            file, _, test = reason.partition(": ")
            (found,) = Path(__file__).parent.rglob(file)
            assert test in found.read_text(), f"{name}: {reason}"


# -- turning ---------------------------------------------------------------------------------------

TURNS = [
    pytest.param(
        command,
        name,
        each,
        id=f"{command} --{name} {' | '.join(each.values)}",
        marks=[pytest.mark.faults] if name in REPEATED.get(command, ()) else [],
    )
    for command, cases in CASES.items()
    for name, turns in cases.items()
    for each in turns
]


@pytest.mark.parametrize(("command", "name", "turned"), TURNS)
def test_an_option_shows(command: str, name: str, turned: Turn, things: Path, outcomes: Any):
    base = BASES[command] | turned.given
    if turned.refused:
        for value in turned.values:
            found = outcomes(command, base | {name: value}, turned)
            assert found.code == 2, found.printed
            last = found.printed.strip().splitlines()[-1]
            assert turned.refused in last and "Traceback" not in found.printed, found.printed
        return
    found = [outcomes(command, base, turned)]
    found += [outcomes(command, base | {name: value}, turned) for value in turned.values]
    shown = [getattr(each, turned.shows) for each in found]
    for number, one in enumerate(shown):
        assert one not in shown[:number], f"{turned.values} {found[number].printed[-2000:]}"
    if turned.shows not in ("printed", "code"):
        for each in found:
            assert each.code == 0, each.printed[-2000:]


@pytest.fixture(scope="module")
def outcomes(things: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A command line -> its outcome; that of a base command is kept."""
    known: dict[Any, Outcome] = {}

    def outcome(command: str, options: dict[str, str], turned: Turn) -> Outcome:
        key = command, tuple(options.items()), str(turned.before), turned.within, turned.shows
        if key not in known:
            folder = fresh(tmp_path_factory.mktemp("turn") / "here", things)
            options = {k: v.replace("{here}", str(folder)) for k, v in options.items()}
            before = None
            if turned.before is not None:
                before = words_of(command, BASES[command] | turned.before, POSITIONAL)
            words = words_of(command, options, POSITIONAL)
            known[key] = found = run(words, folder, within=turned.within, spy=spy, before=before)
            if turned.shows and found.code == 0:
                getattr(found, turned.shows)
            shutil.rmtree(folder)
        return known[key]

    return outcome


def spy(patch: pytest.MonkeyPatch, record: Any) -> None:
    """Note calls whose arguments change how a thing is computed, and not what comes out."""
    from xcit_dino.data import loader, parallel
    from xcit_dino.data.targets import loader as targets
    from xcit_dino.eval import context, knn
    from xcit_dino.models import xcit
    from xcit_dino.supervised.detect import data as detection
    from xcit_dino.supervised.segment import evaluation

    def watch(owner: Any, name: str, facts: Any, instead: Any = None) -> None:
        inner = getattr(owner, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            record((name, facts(*given)))
            return (instead or inner)(*given, **named)

        patch.setattr(owner, name, wrapped)

    watch(loader, "run_tasks", lambda work, tasks, config, ring: (
        config.num_workers, config.prefetch_factor, [tuple(view.shape) for view in ring.views(0)],
        getattr(work, "resize", 0)))  # fmt: skip
    watch(targets, "run_tasks", lambda work, tasks, config, ring: (
        config.num_workers, config.prefetch_factor))  # fmt: skip
    watch(evaluation, "window_starts", lambda *sides: sides)
    watch(detection, "resized", lambda pixels, *sides: sides)
    watch(parallel, "ProcessPoolExecutor", lambda workers, *_: workers)
    watch(xcit, "checkpointed", lambda *_: "")
    watch(torch.Tensor, "backward", lambda *_: "")
    watch(torch.nn.Module, "compile", lambda *_: "", instead=lambda *_, **__: None)
    watch(knn, "vote_ranks", lambda s, labels, targets, ks, temperature, n: (
        temperature, float(s.sum())))  # fmt: skip
    watch(context.Context, "normalize", lambda own, images: (own.precision, images.sum().item(),
        own.inputs.window, own.inputs.mean, own.inputs.std))  # fmt: skip


# -- what the commands find ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, shards, runs, files of weights: the same for every command, and small."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("things") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        images(folder)
        for command in (
            "shards make photos data --shard_size 8 --num_workers 1",
            "shards demo data2 --train 26 --val 12",
            "shards make damaged broken --verify false --num_workers 1",
        ):
            done(command.split())
        make_set(folder / "bands", 5, "uint16", train=26, size=32)
        video(folder)
        scenes(folder)
        objects(folder)
        foreign(folder)
        trained(folder)
        launched(folder)
    return folder


def images(folder: Path) -> None:
    """``photos`` in classes and splits, two in ``photo``, ``damaged`` with broken files."""
    numbers = np.random.default_rng(0)

    def image(path: Path, label: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 140, (10, 12, 3), dtype=np.uint8)
        pixels[..., label] += 90
        Image.fromarray(pixels).resize((48, 40)).save(path, quality=95)

    for split, count in (("train", 10), ("val", 5)):
        for label, name in enumerate(("ant", "bee", "cow")):
            for n in range(count - label):
                image(folder / "photos" / split / name / f"{n}.jpg", label)
                image(folder / "damaged" / split / name / f"{n}.jpg", label)
                if not n % 4:
                    broken = folder / "damaged" / split / name / f"{n}.jpg"
                    broken.write_bytes(broken.read_bytes()[:1200])
    image(folder / "photo/a.png", 0), image(folder / "photo/b.png", 1)
    (folder / "masks").mkdir()
    for name in "ab":
        Image.fromarray(np.tile(np.uint8([0, 1]), (40, 24))).save(folder / f"masks/{name}.png")
    boxes = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in "ab"],
        "annotations": [{"image_id": n, "category_id": 1, "bbox": [1, 2, 9, 9]} for n in "ab"],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "labels.csv").write_text("name,label\na.png,0\nb.png,1\n")
    (folder / "gone.csv").write_text("path,split\nant/1.jpg,train\n")
    (folder / "two.csv").write_text("image,kind,age\nphoto/a.png,3,30\nphoto/b.png,4,31\n")
    (folder / "cows.json").write_text('{"ant": 2, "bee": 1, "cow": 0}')
    rows = "photo/a.png,3,30,train\nphoto/b.png,4,30,val\n"
    (folder / "split.csv").write_text(f"image,kind,age,split\n{rows}")
    (folder / "pairs.csv").write_text("query,image\nant/1.jpg,bee/1.jpg\n")
    (folder / "deep").mkdir()
    deep = numbers.integers(0, 256, (40, 48)).astype(np.uint16)
    (
        Image.fromarray(deep).save(folder / "deep/a.png"),
        Image.fromarray(deep).save(folder / "deep/b.png"),
    )
    (folder / "slides").mkdir()
    for name, ground in (("a", 240), ("b", 150)):  # much white, as on a slide, and none
        glass = np.full((40, 48, 3), ground, np.uint8)
        glass[:, :24] = (190, 90, 160)
        Image.fromarray(glass).save(folder / f"slides/{name}.png")
    (folder / "classes.txt").write_text("cow\nant\n")
    (folder / "recipe.yaml").write_text(f"arch: {ARCH}\ndrop_path_rate: 0.3\n")
    (folder / "defaults.yaml").write_text("partition: mine\nshared_dir: /shared\n")


def video(folder: Path) -> None:
    """``video/davis``: a textured square that moves, as DAVIS 2017 lays it out."""
    numbers = np.random.default_rng(2)
    back, front = numbers.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    for t in range(5):
        mask = np.zeros((64, 96), np.uint8)
        mask[16 + 4 * t :, 8 + 8 * t : 48 + 8 * t] = 1
        pixels = np.where(mask[..., None], np.roll(front, (4 * t, 8 * t), (0, 1)), back)
        for kind, ending, content in (("JPEGImages", "jpg", pixels), ("Annotations", "png", mask)):
            path = folder / f"video/davis/{kind}/480p/a/{t}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    listed = folder / "video/davis/ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("a\n")
    shutil.copytree(folder / "video/davis", folder / "video/davis2")
    (folder / "video/davis2/JPEGImages/480p/a/4.jpg").unlink()
    (folder / "video/davis2/Annotations/480p/a/4.png").unlink()


def scenes(folder: Path) -> None:
    """Images whose left half, or in ``masked2`` upper half, is of another class; two of ``masked3``
    cannot be read, those of ``masked5`` have five channels of 12 bits."""
    numbers = np.random.default_rng(1)
    for name in ("masked", "masked2", "masked3", "masked5"):
        for n in range(12):
            split = "train" if n < 8 else "val"
            half = np.s_[: 16 + n] if name == "masked2" else np.s_[:, : 20 + n]
            mask = np.zeros((40, 48), np.uint8)
            mask[half] = 1
            for kind in ("images", "masks"):
                (folder / f"{name}-src/{kind}/{split}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / f"{name}-src/masks/{split}/{n}.png")
            path = folder / f"{name}-src/images/{split}/{n}.png"
            if name == "masked5":
                deep = numbers.integers(0, 3000, (40, 48, 5), dtype=np.uint16)
                deep[half] += 1000
                np.save(path.with_suffix(".npy"), deep)
                continue
            pixels = numbers.integers(0, 140, (40, 48, 3), dtype=np.uint8)
            pixels[half] += 90
            Image.fromarray(pixels).save(path)
            if name == "masked3" and n < 2:
                path.write_bytes(path.read_bytes()[:1200])
        done(
            f"shards make {name}-src {name} --masks masks --mask_classes classes.txt "
            "--shard_size 2 --verify false --num_workers 1".split()
        )


def objects(folder: Path) -> None:
    """Images with a bright rectangle each, of class 0 or 1; two of ``boxed3`` cannot be read, those
    of ``boxed5`` have five channels of 12 bits, the rectangles of ``boxed2`` lie elsewhere."""
    numbers = np.random.default_rng(4)
    for name in ("boxed", "boxed2", "boxed3", "boxed5"):
        images, annotations = [], []
        for n in range(12):
            split = "train" if n < 8 else "val"
            ending = "npy" if name == "boxed5" else "png"
            path = folder / f"{name}-src/{split}/{n}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            x, y = (n, 4) if name == "boxed2" else (4, n)
            images.append({"id": n, "file_name": f"{split}/{n}.{ending}"})
            item: dict[str, Any] = {"image_id": n, "category_id": n % 2, "bbox": [x, y, 28, 24]}
            if name == "boxed":
                item["segmentation"] = [[x, y, x + 28, y, x + 28, y + 24]]
            annotations.append(item)
            pixels = numbers.integers(0, 140, (40, 48, 3), dtype=np.uint8)
            pixels[y : y + 24, x : x + 28] += 90
            if name == "boxed5":
                deep = numbers.integers(0, 3000, (40, 48, 5), dtype=np.uint16)
                deep[y : y + 24, x : x + 28] += 1000
                np.save(path, deep)
                continue
            Image.fromarray(pixels).save(path)
            if name == "boxed3" and n < 2:
                path.write_bytes(path.read_bytes()[:1200])
        categories = [{"id": 0, "name": "cell"}, {"id": 1, "name": "plate"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))
        done(
            f"shards make {name}-src {name} --boxes {name}.json "
            "--shard_size 2 --verify false --num_workers 1".split()
        )


def foreign(folder: Path) -> None:
    """Shards whose index has no checksums, and shards with one more than their index says."""
    for name in ("foreign", "stale"):
        (folder / name).mkdir()
        for shard in sorted((folder / "data/train").glob("*.tar"))[:2]:
            shutil.copy(shard, folder / name)
        done(f"shards check {name} --num_workers 1".split())
    shard = sorted((folder / "data/train").glob("*.tar"))[2]
    shutil.copy(shard, folder / "stale")


def trained(folder: Path) -> None:
    """``run`` and ``other``, pretrained; ``tuned`` and ``tuned2``, finetuned; files of weights."""
    for name, seed in (("run", "0"), ("other", "1")):
        own = {"output_dir": name, "seed": seed, "epochs": "1"}
        done(words_of("pretrain", BASES["pretrain"] | own, ()))
    for command in ("knn", "linear"):
        done(words_of(command, BASES[command], ()))
        done(words_of(command, BASES[command] | {"output_dir": "other"}, ()))
    shutil.rmtree(folder / "run/features"), shutil.rmtree(folder / "other/features")
    for name, seed in (("tuned", "0"), ("tuned2", "1")):
        own = {"output_dir": name, "seed": seed, "lr": "0.05"}
        done(words_of("finetune", BASES["finetune"] | own, ()))
        newest = max((folder / name / "checkpoints").glob("*.pth"))
        shutil.copy(newest, folder / f"{name}.pth")
    tuned = torch.load(folder / "tuned.pth", weights_only=True)
    torch.save({"model_ema": tuned["model_ema"]}, folder / "ema.pth")
    torch.save({"student": {f"backbone.{k}": v for k, v in tuned["model"].items()}},
               folder / "student.pth")  # fmt: skip
    from xcit_dino.models.zoo import create_model

    torch.manual_seed(0)
    torch.save(create_model("xcit_nano_12_p16").state_dict(), folder / "nano.pth")


def launched(folder: Path) -> None:
    """A run with two stages that the launcher has brought to their ends."""
    import dataclasses

    from tests import standin
    from xcit_dino.slurm.config import Stage

    plan = standin.plan_of(folder / "launched", steps=1)
    later = standin.StandinConfig(folder / "launched/later", steps=1)
    (folder / "launched/later").mkdir(parents=True)
    stages = (*plan.stages, Stage("knn", "tests.standin:train", later, plan.launch.resources))
    assert standin.start(dataclasses.replace(plan, stages=stages)) == 0
