"""Retrieval: mAP by its definition, DINO's whitening and pooling, layouts of data, bad input."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from tests import victims
from tests.conftest import ARCH
from xcit_dino.cli import main
from xcit_dino.data.decode import rgb
from xcit_dino.errors import InputError
from xcit_dino.eval.api.preprocess import Preprocess
from xcit_dino.eval.retrieval import extract
from xcit_dino.eval.retrieval.collection import revisited
from xcit_dino.eval.retrieval.extract import (
    Extractor,
    generalized_mean,
    multi_scale,
    outputs,
    reduced,
)
from xcit_dino.eval.retrieval.ranking import Truth, positions_of, scores
from xcit_dino.eval.retrieval.retrieve import rankings
from xcit_dino.eval.retrieval.whitening import Whitening
from xcit_dino.inputs import InputSettings
from xcit_dino.models.tokens import pooled_and_patches
from xcit_dino.models.zoo import create_model
from xcit_dino.report.images import Images
from xcit_dino.report.pictures import retrieved
from xcit_dino.slurm.checks import check_folder
from xcit_dino.train.run.reader import read_run

# of DINO's utils.compute_map on made_up(): mAP, then mP@1, 5, 10 of easy, medium, hard
DINO_VALUES = {
    "easy": [46.69567186719823, 83.33333333333334, 41.66666666666667, 25.833333333333336],
    "medium": [59.12598990972791, 100.0, 73.33333333333333, 47.5],
    "hard": [49.93033738671882, 72.72727272727273, 45.45454545454545, 31.212121212121207],
}
SETUPS = {"easy": ("e", "jh"), "medium": ("eh", "j"), "hard": ("h", "je")}


def made_up() -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Rankings [queries, images], and of each query its easy, hard and junk images."""
    numbers = np.random.default_rng(3)
    rankings_, kinds = [], []
    for query in range(12):
        kind = numbers.choice(list("ehj.........."), 60)
        if query == 4:
            kind[kind == "h"] = "."
        bonus = np.isin(kind, ["e", "h", "j"]) * 0.3
        rankings_.append(np.argsort(-(numbers.random(60) + bonus), kind="stable"))
        kinds.append({name: np.flatnonzero(kind == name) for name in "ehj"})
    return np.stack(rankings_), kinds


def plain_map(ranking: np.ndarray, relevant: set[int], junk: set[int]) -> float:
    """Area under the precision-recall curve, image by image."""
    area, found, seen, precision = 0.0, 0, 0, 1.0
    for row in ranking.tolist():
        if row in junk:
            continue
        seen += 1
        found += row in relevant
        if row in relevant:
            area += (precision + found / seen) / 2 / len(relevant)
        precision = found / seen
    return area


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", SETUPS)
def test_scores_are_those_of_dino(setup: str) -> None:
    ranked, kinds = made_up()
    relevant, junk = SETUPS[setup]
    truths = [Truth(*(np.concatenate([query[k] for k in part]) for part in (relevant, junk)))
              for query in kinds]  # fmt: skip
    positions = [positions_of(*pair) for pair in zip(ranked, truths, strict=True)]
    found = scores(positions, [len(truth.relevant) for truth in truths], (1, 5, 10))
    names = ["map", "precision_1", "precision_5", "precision_10"]
    assert [found[name] for name in names] == pytest.approx(DINO_VALUES[setup], abs=1e-9)
    plain = [
        plain_map(row, set(truth.relevant.tolist()), set(truth.junk.tolist()))
        for row, truth in zip(ranked, truths, strict=True)
        if len(truth.relevant)
    ]
    assert len(plain) == (11 if setup == "hard" else 12)
    assert found["map"] == pytest.approx(100 * np.mean(plain), abs=1e-9)


def test_a_ranking_that_ends_early_lacks_the_rest() -> None:
    """The second of two relevant images is not among those listed."""
    positions = positions_of(np.array([7, 3, 5]), Truth(np.array([3, 1]), np.array([7])))
    assert positions.tolist() == [0]
    assert scores([positions], [2], (1,)) == {"map": 50, "recall_1": 100, "precision_1": 100}
    assert scores([np.empty(0, np.int64)], [2], (5,))["map"] == 0
    assert scores([], [], (1,)) == {}


def test_rankings_are_by_cosine_and_skip_what_cannot_be_read() -> None:
    bank = np.array([[1, 0], [3, 3], [np.nan, np.nan], [0, 2], [2, 2]], np.float32)
    queries = np.array([[np.nan] * 2, [1, 1]], np.float32)
    ((number, rows, cosines),) = rankings(queries, bank)
    assert number == 1 and rows.tolist() == [1, 4, 0, 3]
    assert cosines == pytest.approx([1, 1, 2**-0.5, 2**-0.5])


def test_whitening_is_that_of_dino() -> None:
    """utils.PCA as eval_copy_detection.py uses it, in plain NumPy."""
    numbers = np.random.default_rng(0)
    reference, others = numbers.normal(1, 2, (50, 6)), numbers.normal(1, 2, (4, 6))
    reference[:, 5] = reference[:, 4]  # an eigenvalue of 0
    variances, axes = np.linalg.eigh(reference.T @ reference / 50)
    variances[variances < variances.max() * 1e-5] = variances.max() * 1e-5
    expected = np.dot(np.diag(1 / variances**0.5) @ axes.T, (others - reference.mean(0)).T).T
    found = Whitening.of(reference)(others)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, expected)]
    np.testing.assert_allclose(unit[0] @ unit[0].T, unit[1] @ unit[1].T, atol=1e-5)


def test_whitening_is_that_of_faiss() -> None:
    """Of centered features, of which the second moment about zero is the covariance."""
    numbers = np.random.default_rng(1)
    reference = numbers.normal(0, [1, 2, 3, 5], (200, 4)) @ numbers.normal(0, 1, (4, 4))
    reference = (reference - reference.mean(0)).astype(np.float32)
    others = numbers.normal(0, 2, (5, 4)).astype(np.float32)
    pca = faiss.PCAMatrix(4, 4, -0.5)
    pca.train(reference)  # type: ignore[call-arg]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True)
            for x in (Whitening.of(reference)(others), pca.apply(others))]  # fmt: skip
    np.testing.assert_allclose(unit[0] @ unit[0].T, unit[1] @ unit[1].T, atol=1e-4)


def scaled(images: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, scale_factor=factor, mode="bilinear")


def test_pooling_and_scales_are_those_of_dino() -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 6, 3)
    grid = patches.reshape(2, 2, 3, 3).clamp(min=1e-6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(grid.pow(4), (2, 3)).pow(1 / 4).reshape(2, -1)
    torch.testing.assert_close(generalized_mean(patches), expected)
    model = create_model(ARCH, num_classes=0).eval()
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        total = sum(
            model(torch.nn.functional.pad(view, padding, mode="replicate"))
            for view, padding in (
                (images, (0, 0, 0, 0)),
                (scaled(images, 2**-0.5), (0, 3, 0, 7)),  # 33 x 45 pixels to 40 x 48
                (scaled(images, 0.5), (0, 0, 0, 0)),
            )
        )
        found = multi_scale(partial(outputs, model, False), images)
        pooled, tokens = pooled_and_patches(model, images)
        torch.testing.assert_close(pooled, model(images))
    assert tokens.shape == (1, 6 * 8, model.embed_dim)
    torch.testing.assert_close(found, total / total.norm())


def test_images_are_reduced_as_dino_reduces_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels)
    expected.thumbnail((40, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(reduced(pixels, 40), np.asarray(expected))
    assert reduced(pixels, 90) is pixels
    assert reduced(pixels.astype(np.float32)[..., :2], 45).shape == (45, 30, 2)


# -- layouts of data -------------------------------------------------------------------------------


def photo(path: Path, seed: int, size: tuple[int, int] = (48, 40), quality: int = 95) -> None:
    """Random blocks of color, as different from each other as photographs."""
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)


def oxford(root: Path) -> Path:
    """Oxford revisited with 2 queries and 6 images: the first two are of query 0, the next of 1."""
    folder = root / "roxford5k"
    for name, seed in (("q0", 0), ("q1", 1), *((f"im{n}", n // 2) for n in range(6))):
        photo(folder / f"jpg/{name}.jpg", seed, quality=30 if name[0] == "i" else 95)
    gnd = [
        {"bbx": [0.0, 0.0, 9.0, 9.0], "easy": np.array([0]), "hard": [1], "junk": np.array([])},
        {"bbx": np.zeros(4), "easy": [], "hard": [np.int64(2)], "junk": np.array([3], np.int32)},
    ]
    truth = {"gnd": gnd, "imlist": [f"im{n}" for n in range(6)], "qimlist": ["q0", "q1"]}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return folder


def command(run_folder, *words: object) -> list[str]:
    fixed = ["retrieve", "--output_dir", run_folder.path, "--device", "cpu", "--image_size", 32]
    fixed += ["--pretrained_weights", run_folder.weights, "--arch", ARCH]
    return [str(word) for word in (*fixed, *words)]


def results(run_folder) -> dict:
    return json.loads((run_folder.path / "results.json").read_text())


def listed(run_folder, name: str = "retrieve") -> list[dict[str, str]]:
    folder = run_folder.path / results(run_folder)[name]["neighbors"]
    return list(csv.DictReader((folder / "neighbors.csv").read_text().splitlines()))


def test_oxford_revisited(run_folder, tmp_path: Path, capsys) -> None:
    folder = oxford(tmp_path)
    assert main(command(run_folder, "--bank", folder, "--baselines", "true", "--k", 4)) == 0
    found = results(run_folder)
    assert set(found) == {"retrieve", "retrieve/random", "retrieve/pixels"}
    metrics = found["retrieve/pixels"]["metrics"]
    assert {metrics[f"map_{name}"] for name in SETUPS} == {100}
    protocol = found["retrieve"]["protocol"]
    assert (protocol["collection"], protocol["queries"], protocol["bank"]) == ("roxford5k", 2, 6)
    assert (protocol["resize"], protocol["features"]) == ("longer", "cls")
    lines = listed(run_folder, "retrieve/pixels")
    assert [line["image"] for line in lines[:2]] == ["im0.jpg", "im1.jpg"]
    assert [line["relevant"] for line in lines] == ["yes", "yes", "no", "no", "yes", *["no"] * 3]
    assert "im3.jpg" not in [line["image"] for line in lines[4:]]  # junk of that query
    assert read_run(run_folder.path).top1("retrieve") == found["retrieve"]["metrics"]["map_medium"]
    from xcit_dino.report.report import page

    text = page([read_run(run_folder.path)])
    assert "DINO, ViT-S/16, on ROxford, Medium" in text and "image_size 32 instead of 224" in text


def test_the_truth_of_oxford_is_read_as_it_is(tmp_path: Path) -> None:
    folder = oxford(tmp_path)
    found = revisited(folder / "gnd_roxford5k.pkl", folder / "jpg")
    table = {
        setup: [(truth.relevant.tolist(), truth.junk.tolist()) for truth in truths]
        for setup, truths in found.truths.items()
    }
    assert table == {
        "easy": [([0], [1]), ([], [3, 2])],
        "medium": [([0, 1], []), ([2], [3])],
        "hard": [([1], [0]), ([2], [3])],
    }


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickle_executes_nothing(run_folder, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = oxford(tmp_path)
    truth = folder / "gnd_roxford5k.pkl"
    whole = pickle.loads(truth.read_bytes())
    for bad in (
        pickle.dumps(whole | {"more": Hostile()}), pickle.dumps([1]), truth.read_bytes()[:99],
        pickle.dumps(whole | {"gnd": [{"easy": [9], "hard": [], "junk": []}] * 2}),
        pickle.dumps(whole | {"qimlist": ["q0"]}), b"",
    ):  # fmt: skip
        truth.write_bytes(bad)
        assert main(command(run_folder, "--bank", folder)) == 2
        assert "get the file again" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("executed").exists()


def copydays(root: Path) -> Path:
    """Four originals; strong copies, recompressed and cropped ones."""
    for n in range(4):
        photo(root / f"original/20{n:02d}00.jpg", n)
        photo(root / f"jpegqual/5/20{n:02d}00.jpg", n, quality=5)
        photo(root / f"crops/10/20{n:02d}00.jpg", n, (40, 36))
        photo(root / f"strong/20{n:02d}01.jpg", n, (60, 30), quality=30)
    photo(root / "strong/209900.jpg", 9)  # a copy of none
    return root


def test_copydays(run_folder, tmp_path: Path) -> None:
    folder = copydays(tmp_path / "copydays")
    for n in range(6):
        photo(tmp_path / f"others/{n}.jpg", 20 + n)
    assert main(command(run_folder, "--bank", folder, "--baselines", "true")) == 0
    entry = results(run_folder)["retrieve/pixels"]
    names = {"map", "map_strong", "map_jpegqual_5", "map_crops_10"}
    assert set(entry["metrics"]) == names and entry["metrics"]["map_jpegqual_5"] == 100
    words = ["--whitening", tmp_path / "others", "--distractors", tmp_path / "others"]
    assert main(command(run_folder, "--bank", folder, *words)) == 0
    protocol = results(run_folder)["retrieve"]["protocol"]
    assert (protocol["collection"], protocol["queries"], protocol["bank"]) == ("copydays", 13, 10)
    assert (protocol["resize"], protocol["features"]) == ("square", "cls+gem")
    assert (protocol["distractors"], protocol["whitening_images"]) == (6, 6)
    strong = results(run_folder)["retrieve"]["metrics"]["map_strong"]
    assert read_run(run_folder.path).top1("retrieve") == strong


def test_two_processes_are_one(run_folder, tmp_path: Path) -> None:
    """Metrics, neighbors and what could not be read; bank and queries of odd numbers."""
    folder = copydays(tmp_path / "copydays")
    (folder / "strong/200101.jpg").write_bytes(b"no")
    for n in range(7):
        photo(tmp_path / f"others/{n}.jpg", 20 + n)
    words = ["--bank", folder, "--whitening", tmp_path / "others"]
    words += ["--distractors", tmp_path / "others"]

    def found() -> tuple[object, ...]:
        entry = results(run_folder)["retrieve"]
        unreadable = entry["protocol"]["unreadable_images"]
        names = [(line["query"], line["image"]) for line in listed(run_folder)]
        return unreadable, names, entry["metrics"]

    assert main(command(run_folder, *words)) == 0
    *one, metrics = found()
    shutil.rmtree(run_folder.path / results(run_folder)["retrieve"]["neighbors"])
    victims.on_two_processes(command(run_folder, *words), tmp_path)
    *two, on_two = found()
    assert one == two and one[0] == 1
    assert on_two == pytest.approx(metrics, abs=1e-3)


def test_an_interrupted_search_goes_on(run_folder, tmp_path: Path, monkeypatch) -> None:
    """Parts that are finished are not computed again, nor is one that another network, size or
    image would give taken for them; neighbors are the same to the last digit."""
    folder = copydays(tmp_path / "copydays")
    (folder / "strong/200101.jpg").write_bytes(b"no")
    monkeypatch.setattr(extract, "PART", 4)
    words = command(run_folder, "--bank", folder)
    whole, calls = Extractor.__call__, list[int]()

    def computed(words: list[str], until: int = 10**9) -> int:
        """Images before the command ended, or was interrupted in its UNTILth batch."""
        calls.clear()

        def counted(self: Extractor, images: torch.Tensor) -> torch.Tensor:
            if len(calls) == until:
                raise KeyboardInterrupt
            calls.append(len(images))
            return whole(self, images)

        with monkeypatch.context() as patched:
            patched.setattr(Extractor, "__call__", counted)
            assert main(words) == (130 if until < 10**9 else 0)
        return sum(calls) - 1  # one is black, to find out the width

    def neighbors() -> str:
        entry = results(run_folder)["retrieve"]
        file = run_folder.path / entry["neighbors"] / "neighbors.csv"
        text = file.read_text() + json.dumps([entry["metrics"], entry["protocol"]])
        shutil.rmtree(file.parent)
        return text

    kept = run_folder.path / "features/retrieve"
    everything = computed(words)
    expected = neighbors()
    assert not kept.exists()
    before = computed(words, until=5)
    parts = sorted(kept.iterdir())
    assert parts and before < everything
    parts[0].write_bytes(b"cut")
    assert everything - before <= computed(words) < everything
    assert neighbors() == expected and not kept.exists()

    computed(words, until=5)
    assert computed([*words, "--image_size", "48"]) == everything
    computed(words, until=3)  # two parts of four images
    photo(folder / "crops/10/200000.jpg", 77, (40, 36))  # one of the first part's has changed
    assert computed(words) == everything - 4


def test_own_folders(run_folder, tmp_path: Path, capsys) -> None:
    """Classes by folders' names; a query in the bank does not find itself; broken files."""
    bank, queries = tmp_path / "bank", tmp_path / "queries"
    for n in range(4):
        photo(bank / f"{'ab'[n // 2]}/{n}.jpg", n // 2, quality=90 - 10 * n)
        photo(queries / f"{'abc'[n // 2]}/{n}.jpg", n // 2)
    photo(queries / "c/5.jpg", 5)
    (bank / "b/broken.jpg").write_bytes(b"no")
    (queries / "a/broken.jpg").symlink_to("nowhere.jpg")
    (bank / "b/._3.jpg").write_bytes(b"macOS")
    for name in ("c/6.mov", "c/7", ".DS_Store"):
        (queries / name).write_bytes(b"no")
    words = ["--bank", bank, "--baselines", "true"]
    assert main(command(run_folder, *words, "--queries", queries)) == 0
    printed = capsys.readouterr().out
    assert f"skipped: {bank / 'b/broken.jpg'}" in printed
    assert f"skipped: 2 files in {queries} that are no images (.mov, no suffix)" in printed
    lost = "1 of 5 queries have nothing relevant in the bank and do not count: c/5.jpg"
    assert lost in printed
    entry = results(run_folder)["retrieve/pixels"]
    assert entry["protocol"]["unreadable_images"] == 2
    assert entry["queries_without_relevant"] == {"all": 1}
    # of three images of class b one cannot be read: it counts as not found
    assert entry["metrics"]["map"] == pytest.approx(100 * (1 + 1 + 2 / 3 + 2 / 3) / 4)
    assert {line["relevant"] for line in listed(run_folder) if line["query"] == "c/5.jpg"} == {""}
    (bank / "b/broken.jpg").unlink()
    assert main(command(run_folder, *words)) == 0
    entry = results(run_folder)["retrieve/pixels"]
    assert entry["metrics"]["map"] == 100 and entry["protocol"]["queries"] == 4
    assert all(line["query"] != line["image"] for line in listed(run_folder))
    folder = run_folder.path / entry["neighbors"]
    with Image.open(folder / "neighbors.png") as picture:
        assert picture.size == (4 * 132, 4 * 132)
    assert main(command(run_folder, *words, "--examples", 2)) == 0
    shown = retrieved(Images(read_run(run_folder.path)))["groups"][""]
    assert [row[0].caption for row in shown] == ["a/0.jpg", "b/3.jpg"]
    lines = [line["cosine"] for line in listed(run_folder) if line["query"] == "b/3.jpg"]
    assert [tile.caption for tile in shown[1][1:]] == lines and len(lines) == 3


def test_a_table_of_pairs(run_folder, tmp_path: Path, capsys) -> None:
    bank = tmp_path / "bank"
    for n in range(4):
        photo(bank / f"{n}.jpg", n // 2, quality=90 - 10 * n)
    assert main(command(run_folder, "--bank", bank)) == 0
    assert "no mAP" in capsys.readouterr().out
    assert not (run_folder.path / "results.json").exists()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,image\n0.jpg,1.jpg\n2.jpg,3.jpg\n2.jpg,3.jpg\n")
    words = ["--bank", bank, "--relevant", pairs, "--baselines", "true"]
    assert main(command(run_folder, *words)) == 0
    assert results(run_folder)["retrieve/pixels"]["metrics"]["map"] == 100
    pairs.write_text("query,image\n0.jpg,4.jpg\n5.jpg,3.jpg\n")
    assert main(command(run_folder, *words)) == 2
    assert "2 of its names are not among the images, the first is 4.jpg" in capsys.readouterr().err


def test_a_whitening_of_few_or_of_searched_images_is_said(run_folder, tmp_path, capsys) -> None:
    for n in range(3):
        photo(tmp_path / f"bank/{n}.jpg", n)
    photo(tmp_path / "others/3.jpg", 3)
    bank = tmp_path / "bank"
    assert main(command(run_folder, "--bank", bank, "--whitening", tmp_path / "others")) == 0
    error = capsys.readouterr().err
    assert "others: 1 images for" in error and "searched too" not in error
    assert main(command(run_folder, "--bank", bank, "--whitening", bank)) == 0
    assert "bank: 3 of its images are searched too" in capsys.readouterr().err


def test_every_resize_and_scale(run_folder, tmp_path: Path) -> None:
    for n in range(3):
        photo(tmp_path / f"bank/a/{n}.jpg", n, (48, 20 + 9 * n))
    found = set()
    for words in (
        (), ("--resize", "square"), ("--multiscale", "true"), ("--features", "cls+gem"),
        ("--multiscale", "true", "--features", "cls+gem", "--resize", "square"),
    ):  # fmt: skip
        assert main(command(run_folder, "--bank", tmp_path / "bank", *words)) == 0
        found.add(tuple(line["cosine"] for line in listed(run_folder)))
    assert len(found) == 5


# -- bad input -------------------------------------------------------------------------------------


def test_bad_folders_are_named(run_folder, tmp_path: Path, capsys) -> None:
    folder, empty = oxford(tmp_path), tmp_path / "empty"
    empty.mkdir()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a,b\n")

    def refused(*words: object) -> str:
        assert main(command(run_folder, *words)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--bank: name the folder" in refused()
    assert "--queries: name the images to search" in refused("--queries", empty)
    assert "no such folder" in refused("--bank", tmp_path / "none")
    assert "holds no images" in refused("--bank", empty)
    assert "leave it out" in refused("--bank", folder, "--queries", empty)
    assert "leave it out" in refused("--bank", folder, "--relevant", pairs)
    jpg = folder / "jpg"
    assert "no column image" in refused("--bank", jpg, "--relevant", pairs)
    assert "cannot be read" in refused("--bank", jpg, "--relevant", empty)
    assert "holds no images" in refused("--bank", jpg, "--whitening", empty)
    assert "are in the bank already" in refused("--bank", jpg, "--distractors", jpg)
    (jpg / "im4.jpg").unlink()
    assert "1 of its images are missing" in refused("--bank", folder)
    for path in jpg.iterdir():
        path.write_bytes(b"no")
    assert "none of the queries images can be read" in refused("--bank", jpg)
    copies = copydays(tmp_path / "copydays")
    for block in ("strong", "crops", "jpegqual"):
        shutil.rmtree(copies / block)
    photo(copies / "strong/300000.jpg", 0)
    assert "no copy of an image" in refused("--bank", copies)


@pytest.mark.parametrize("option", ["retrieve.bank", "propagate.videos"])
def test_a_stage_names_its_missing_folder(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"--{option} is missing; name the folder of this"):
        check_folder(option, None, "of this")
    with pytest.raises(InputError, match=f"--{option} .*: no such folder; name the folder"):
        check_folder(option, tmp_path / "none", "of this")


def test_a_network_that_takes_one_size(tmp_path: Path, capsys) -> None:
    arch = "timm/gmlp_ti16_224"
    torch.save(create_model(arch, num_classes=0).state_dict(), tmp_path / "vit.pth")
    for n in range(2):
        photo(tmp_path / f"bank/a/{n}.jpg", n)
    words = ["retrieve", "--output_dir", tmp_path / "run", "--arch", arch, "--device", "cpu"]
    words += ["--pretrained_weights", tmp_path / "vit.pth", "--bank", tmp_path / "bank"]
    assert main([str(word) for word in words]) == 2
    assert "add --resize square" in capsys.readouterr().err
    assert main([str(word) for word in (*words, "--resize", "square")]) == 0


def test_files_of_12_bits_are_said(run_folder, tmp_path: Path, capsys, monkeypatch) -> None:
    """An 8-bit network gets the upper 8 of 16 bits; one line names the first file, the gray levels
    that remain and the remedy. In Python too, from files and from Pillow's images."""
    monkeypatch.setattr(rgb, "_said", set())
    rng = np.random.default_rng(0)
    for n in range(3):
        values = rng.integers(0, 4096, (40, 40)).astype(np.uint16)
        (tmp_path / "bank").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / f"bank/{n}.png")
    line = "0.png: 16 bits, but no value uses more than 12: 16 gray levels remain; convert such"
    assert main(command(run_folder, "--bank", tmp_path / "bank")) == 0
    assert capsys.readouterr().err.count(line) == 1

    transform = Preprocess.of(InputSettings(size=32))
    found = transform(tmp_path / "bank/0.png")
    assert "gray levels" not in capsys.readouterr().err, "once"
    rgb._said.clear()
    with Image.open(tmp_path / "bank/0.png") as image:
        torch.testing.assert_close(transform(image), found)
    assert "16 gray levels remain" in capsys.readouterr().err
