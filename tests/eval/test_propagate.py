"""Label propagation: DINO's algorithm written plainly, DAVIS's own values, files, bad videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.reference import plain_label_propagation, plain_mask
from tests.conftest import ARCH
from xcit_dino.cli import main
from xcit_dino.eval.video import videos
from xcit_dino.eval.video.config import LabelPropagation
from xcit_dino.eval.video.methods import network_size
from xcit_dino.eval.video.metrics import statistics
from xcit_dino.eval.video.pictures import PALETTE
from xcit_dino.eval.video.propagation import patch_labels, pixel_labels, propagate
from xcit_dino.eval.video.score import metrics_of, score
from xcit_dino.train.run.reader import read_run

DAVIS_VALUES = {  # of davis2017-evaluation (DAVISEvaluation.evaluate, semi-supervised) on moving()
    "j_mean": 48.43287568815875, "j_recall": 55.55555555555556, "j_decay": 46.50469167147122,
    "f_mean": 35.15141084382629, "f_recall": 50.0, "f_decay": 25.95669921713532,
}  # fmt: skip


def moving(shift: int, frames: int = 11) -> Iterator[np.ndarray]:
    """Masks of two objects that move; with a shift, those that a poor method predicts."""
    y, x = np.indices((48, 72))
    for t in range(frames):
        mask = np.zeros((48, 72), np.uint8)
        mask[(y - 20) ** 2 + (x - 16 - 3 * t - shift * t) ** 2 < 120] = 1
        mask[30 - t + shift : 44 - t, 40 : 58 + shift * t // 2] = 2
        if shift and t == 9:
            mask[mask == 2] = 0
        yield mask


def write(folder: Path, masks: Iterator[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{number:05d}.png")
    return folder


def davis(root: Path, name: str = "two", frames: int = 5) -> Path:
    """DAVIS's layout with a video of a textured disc over another texture."""
    texture = np.random.default_rng(0).integers(0, 256, (2, 80, 112, 3), dtype=np.uint8)
    texture[0] //= 4
    y, x = np.indices((64, 96))
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        (root / kind / "480p" / name).mkdir(parents=True)
        for t in range(frames):
            inside = (y - 30) ** 2 + (x - 24 - 8 * t) ** 2 < 300
            moved = np.roll(texture[1], 8 * t, 1)[:64, :96]
            pixels = np.where(inside[..., None], moved, texture[0, :64, :96])
            image = pixels if suffix == "jpg" else inside.astype(np.uint8)
            Image.fromarray(image).save(root / kind / "480p" / name / f"{t:05d}.{suffix}")
    listed = root / "ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with listed.open("a") as file:
        file.write(f"{name}\n")
    return root


def command(run_folder, *words: object) -> list[str]:
    fixed = ["propagate", "--output_dir", run_folder.path, "--device", "cpu", "--image_size", 64]
    fixed += ["--pretrained_weights", run_folder.weights, "--arch", ARCH]
    return [str(word) for word in (*fixed, *words)]


# -- numbers ---------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_davis(tmp_path: Path) -> None:
    true = write(tmp_path / "true", moving(0))
    predicted = write(tmp_path / "predicted", moving(2))
    video = videos.open_video("a", true, true)
    found = metrics_of([score(video, predicted, whole=False)])
    mean = (DAVIS_VALUES["j_mean"] + DAVIS_VALUES["f_mean"]) / 2
    assert found == pytest.approx(DAVIS_VALUES | {"j_and_f": mean}, abs=1e-9)


def test_the_decay_of_a_long_video_counts_its_last_quarter() -> None:
    """DAVIS's own code takes frame numbers modulo 256 here."""
    assert statistics([1.0] * 300 + [0.0] * 100).decay == pytest.approx(1 - 1 / 101)


@pytest.mark.parametrize("frames, window, topk", [(7, 2, 5), (1, 12, 3), (0, 1, 1), (2, 0, 1000)])
def test_propagation_is_that_of_dino(frames: int, window: int, topk: int) -> None:
    """More tiles than one, frames with equal patches, more context than there are frames."""
    torch.manual_seed(0)
    height, width = (18, 3) if window == 2 else (4, 5)
    features = [torch.randn(height, width, 6) for _ in range(4)]
    first = torch.rand(3, height, width)
    expected = plain_label_propagation(features, first, frames, window, topk)
    found = list(propagate(features, first, LabelPropagation(frames, window, topk)))
    assert len(found) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_all_of_several_equal_patches_count() -> None:
    """As in DINO: those equal to the last of the k most similar."""
    feature = torch.ones(2, 3, 1)
    first = torch.arange(6.0).view(1, 2, 3)
    (found,) = propagate([feature, feature], first, LabelPropagation(topk=2))
    torch.testing.assert_close(found, torch.full((1, 2, 3), 2.5))


def test_masks_of_pixels_are_those_of_dino() -> None:
    torch.manual_seed(0)
    soft = torch.rand(3, 6, 8)
    soft[2] *= 0.1  # each label is scaled by itself
    labels = np.uint8([0, 3, 7])
    found = pixel_labels(soft, labels, (48, 64), (50, 91))
    assert np.array_equal(found, labels[plain_mask(soft.clone(), 8, 50, 91)])
    gone = torch.stack((torch.ones(6, 8), torch.zeros(6, 8)))
    assert not pixel_labels(gone, labels[:2], (48, 64), (50, 91)).any()


def test_labels_of_patches_are_those_of_their_middle() -> None:
    mask = np.zeros((6, 9), np.uint8)
    mask[1, 4] = 5
    found = patch_labels(mask, np.uint8([0, 5]), (2, 3))
    assert found[1].tolist() == [[0, 1, 0], [0, 0, 0]] and torch.equal(found[0], 1 - found[1])


def test_frames_have_dinos_sizes() -> None:
    assert network_size((480, 854), 480, 16) == (480, 832)
    assert network_size((854, 480), 480, 8) == (832, 480)
    assert network_size((480, 910), 480, 14) == (476, 910)
    assert network_size((40, 60), 20, 16) == (16, 64)


# -- the command -----------------------------------------------------------------------------------


def test_a_moving_object_is_followed(run_folder, tmp_path: Path, capsys) -> None:
    root = davis(tmp_path / "davis")
    davis(root, "three", 3)
    (root / "JPEGImages/480p/three/00001.jpg").unlink()
    assert main(command(run_folder, "--videos", root, "--baselines", "true")) == 0
    printed = capsys.readouterr().out
    assert "skipped: three: 1 frames are missing" in printed and "00001" in printed
    results = json.loads((run_folder.path / "results.json").read_text())
    assert set(results) == {"propagate", *(f"propagate/{n}" for n in ("random", "pixels", "copy"))}
    scores = {name: entry["metrics"]["j_and_f"] for name, entry in results.items()}
    assert scores["propagate/pixels"] > scores["propagate/copy"] + 20, scores
    protocol = results["propagate"]["protocol"]
    assert (protocol["videos"], protocol["objects"], protocol["frames"]) == (1, 1, 3)
    assert protocol["unusable_videos"] == 1 and protocol["n_last_frames"] == 7
    folder = run_folder.path / results["propagate"]["masks"]
    written = sorted((folder / "masks/two").iterdir())
    assert [path.name for path in written] == [f"{n:05d}.png" for n in range(5)]
    image = Image.open(written[0])
    assert image.mode == "P" and image.getpalette()[: 3 * 4] == PALETTE[:4].ravel().tolist()
    truth = Image.open(root / "Annotations/480p/two/00000.png")
    assert np.array_equal(np.asarray(image), np.asarray(truth))
    assert len(list((folder / "overlays/two").iterdir())) == 5
    headlines = {name: read_run(run_folder.path).top1(name) for name in ("propagate", "knn")}
    assert headlines == {"propagate": scores["propagate"], "knn": None}
    from xcit_dino.report.report import page

    text = page([read_run(run_folder.path)])
    assert "Objects followed through videos" in text and "two: J&amp;F" in text
    assert "DINO, ViT-S/16, on DAVIS 2017 val" in text and "videos 1 instead of 30" in text


def test_an_interrupted_command_goes_on(run_folder, tmp_path: Path) -> None:
    root = davis(davis(tmp_path / "davis"), "three", 3)
    assert main(command(run_folder, "--videos", root)) == 0
    (folder,) = (run_folder.path / "propagate").iterdir()
    first = json.loads((run_folder.path / "results.json").read_text())["propagate"]
    kept = (folder / "masks/two/00002.png").stat().st_mtime_ns
    before = (folder / "masks/three/00001.png").read_bytes()
    shutil.rmtree(folder / "masks/three")
    (folder / "masks/.three.host.999999999.tmp").mkdir()  # what a killed process leaves
    assert main(command(run_folder, "--videos", root)) == 0
    assert (folder / "masks/two/00002.png").stat().st_mtime_ns == kept
    assert (folder / "masks/three/00001.png").read_bytes() == before
    again = json.loads((run_folder.path / "results.json").read_text())
    assert list(again) == ["propagate"] and again["propagate"]["metrics"] == first["metrics"]
    assert main(command(run_folder, "--videos", root, "--topk", 1)) == 0
    assert len(list((run_folder.path / "propagate").iterdir())) == 2


def test_a_folder_of_frames_and_one_mask(run_folder, tmp_path: Path, capsys) -> None:
    root = davis(tmp_path / "davis")
    black_white = tmp_path / "mask.png"
    mask = np.asarray(Image.open(root / "Annotations/480p/two/00000.png"))
    Image.fromarray(mask * 255).save(black_white)
    frames = root / "JPEGImages/480p/two"
    assert main(command(run_folder, "--videos", frames, "--masks", black_white)) == 0
    assert "no J and F" in capsys.readouterr().out
    assert not (run_folder.path / "results.json").exists()
    (found,) = (run_folder.path / "propagate").glob("*/masks/two/00003.png")
    assert set(np.unique(np.asarray(Image.open(found)))) == {0, 1}
    every = root / "Annotations/480p/two"
    assert main(command(run_folder, "--videos", frames, "--masks", every)) == 0
    whole = main(command(run_folder, "--videos", frames.parent, "--masks", every.parent))
    assert whole == 0 and (run_folder.path / "results.json").exists()
    capsys.readouterr()
    (frames.parent / "empty").mkdir()
    shutil.copytree(every, every.parent / "lost")
    assert main(command(run_folder, "--videos", frames.parent, "--masks", every.parent)) == 0
    printed = capsys.readouterr().out
    for name in ("empty", "lost"):
        assert f"skipped: {name}: {frames.parent / name} holds 0 frames; two are needed" in printed
    saved = json.loads((run_folder.path / "results.json").read_text())
    assert saved["propagate"]["protocol"]["unusable_videos"] == 2


OTHER_SIZE = "is 9 x 8, its frame 96 x 64"

# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f, m: (f / "00002.jpg").unlink(), "1 frames are missing"),
        (lambda f, m: (m / "00000.png").unlink(), "holds no mask of the first frame, 00000.png"),
        (lambda f, m: Image.new("L", (9, 8), 1).save(m / "00000.png"), OTHER_SIZE),
        (lambda f, m: Image.new("L", (9, 8), 1).save(m / "00003.png"), OTHER_SIZE),
        (lambda f, m: Image.new("L", (96, 64)).save(m / "00000.png"), "holds no object"),
        (lambda f, m: Image.new("RGB", (96, 64)).save(m / "00000.png"), "in mode RGB"),
        (lambda f, m: Image.new("RGB", (9, 8)).save(f / "00003.jpg"), "00003.jpg is 9 x 8"),
        (lambda f, m: (f / "00003.jpg").write_bytes(b"no"), "00003.jpg cannot be read"),
        (lambda f, m: (m / "00001.png").write_bytes(b"no"), "00001.png cannot be read"),
        (lambda f, m: shutil.rmtree(f), "holds 0 frames"),
    ],
)  # fmt: skip
def test_bad_videos_are_named(run_folder, tmp_path: Path, capsys, spoil, said: str) -> None:
    root = davis(tmp_path / "davis")
    spoil(root / "JPEGImages/480p/two", root / "Annotations/480p/two")
    assert main(command(run_folder, "--videos", root)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (run_folder.path / "results.json").exists()
    assert not list(run_folder.path.glob("propagate/*/masks/two"))


def test_bad_folders_are_named(run_folder, tmp_path: Path, capsys) -> None:
    root = davis(tmp_path / "davis")
    listed = root / "ImageSets/2017/val.txt"
    (tmp_path / "empty").mkdir()

    def refused(*words: object) -> str:
        assert main(command(run_folder, *words)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--videos: name the folder" in refused()
    assert "no such folder" in refused("--videos", tmp_path / "none")
    assert "leave it out" in refused("--videos", root, "--masks", root)
    assert "--masks: needed" in refused("--videos", tmp_path / "empty")
    assert "holds no frames" in refused("--videos", tmp_path / "empty", "--masks", root)
    assert "no such file" in refused("--videos", root / "JPEGImages/480p", "--masks", "nowhere")
    assert "several videos" in refused("--videos", root / "JPEGImages/480p", "--masks", listed)
    assert "has layers 0 to 5" in refused("--videos", root, "--tap", 6)
    listed.write_text("../../two\n")
    assert "not a folder" in refused("--videos", root)
    listed.write_text("\n")
    assert "names no video" in refused("--videos", root)
    listed.unlink()
    assert "val.txt is missing" in refused("--videos", root)


def test_the_launcher_refuses_missing_videos(tmp_path: Path, capsys) -> None:
    stage = ["launch", "--cluster", "local", "--ngpus", "0", "--stages", "propagate"]
    stage += ["--propagate.output_dir", str(tmp_path / "run")]
    assert main(stage) == 2
    assert "--propagate.videos is missing" in capsys.readouterr().err
    assert main([*stage, "--propagate.videos", str(tmp_path / "none")]) == 2
    assert "no such folder; name the folder of DAVIS 2017" in capsys.readouterr().err
    assert main([*stage, "--dry_run"]) == 0
    assert "--propagate.videos is missing" in capsys.readouterr().out


def test_masks_without_frames(run_folder, tmp_path: Path, capsys) -> None:
    assert main(command(run_folder, "--masks", tmp_path)) == 2
    assert "--masks: name the frames with --videos too" in capsys.readouterr().err


def test_a_network_of_one_image_size(run_folder, tmp_path: Path, capsys, monkeypatch) -> None:
    def grid_features(*_: object, **__: object) -> None:
        raise AssertionError("Input height (64) doesn't match model (224).")

    monkeypatch.setattr("xcit_dino.models.dense.grid_features", grid_features)
    assert main(command(run_folder, "--videos", davis(tmp_path / "davis"))) == 2
    assert f"--arch {ARCH}: does not accept images of" in capsys.readouterr().err


def test_gaps_in_numbered_frames() -> None:
    assert videos.gaps(["00000", "00005", "00015", "00020"]) == ["00010"]
    assert videos.gaps(["f9", "f10", "f11", "f13"]) == ["f12"]
    assert videos.gaps(["a", "b", "d"]) == [] == videos.gaps(["a1", "b9"])
