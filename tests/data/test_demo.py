"""Demo images: deterministic, balanced, and of little use to a nearest neighbor in pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xcit_dino.data.decode.rgb import Scratch, decode, read_header
from xcit_dino.data.pack.demo import CLASSES, make, render
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.files import file_sha256


def test_an_image_depends_on_seed_split_and_number_only():
    images, labels = render(np.arange(40), "train", 32, seed=0)
    again, same = render(np.arange(40)[::-1][:7], "train", 32, seed=0)
    np.testing.assert_array_equal(images[::-1][:7], again)
    np.testing.assert_array_equal(labels[::-1][:7], same)
    for split, seed in (("val", 0), ("train", 1)):
        other, _ = render(np.arange(40), split, 32, seed)
        assert not (other == images).all(axis=(1, 2, 3)).any()


def test_classes_are_balanced_and_many():
    _, labels = render(np.arange(1200), "train", 16, seed=0)
    assert len(CLASSES) >= 10
    assert set(np.bincount(labels)) == {1200 // len(CLASSES)}


def test_raw_pixels_hardly_tell_the_classes():
    """k-NN by hand (k = 20, cosine, the protocol of the evaluation): at most 40 %."""
    bank, bank_labels = render(np.arange(2400), "train", 32, seed=0)
    queries, labels = render(np.arange(480), "val", 32, seed=0)

    def unit(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1) / 127.5 - 1
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    similarity = unit(queries) @ unit(bank).T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.stack([(weights * (bank_labels[nearest] == c)).sum(1) for c in range(len(CLASSES))])
    assert (votes.argmax(0) == labels).mean() <= 0.40


def test_shape_not_color_is_the_class():
    """A class's mean image is as gray as another's: colors carry nothing."""
    images, labels = render(np.arange(2400), "train", 16, seed=0)
    means = images.reshape(len(images), -1, 3).mean(1)
    per_class = np.stack([means[labels == c].mean(0) for c in range(len(CLASSES))])
    assert per_class.std(0).max() < 12  # of 255; a single image's mean color varies by 25


@pytest.mark.parametrize("size", [24, 64])
def test_other_sizes(size: int):
    images, _ = render(np.arange(3), "train", size, seed=0)
    assert images.shape == (3, size, size, 3) and images.dtype == np.uint8


def test_shards_hold_the_images(tmp_path: Path):
    make(DemoConfig(dst=tmp_path, train=1100, val=30))
    index = ShardIndex.load(tmp_path / "train")
    images, labels = render(np.arange(1100), "train", 32, seed=0)
    assert index.classes == CLASSES and index.counts.tolist() == [1000, 100]
    np.testing.assert_array_equal(index.labels, labels)
    for number in (0, 999, 1000, 1099):
        shard, offset, size = index.locate(number)
        raw = Path(index.path(shard)).read_bytes()[offset : offset + size]
        pixels = decode(raw, read_header(raw), Scratch())
        assert np.abs(pixels.astype(int) - images[number]).mean() < 5  # JPEG at quality 95


def test_a_second_time_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path):
    make(DemoConfig(dst=tmp_path / "a", train=60, val=12))
    make(DemoConfig(dst=tmp_path / "b", train=1060, val=12))
    make(DemoConfig(dst=tmp_path / "b", train=60, val=12))
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.*")}
    for name in files:
        assert file_sha256(tmp_path / "a" / name) == file_sha256(tmp_path / "b" / name)


def test_other_peoples_shards_are_not_overwritten(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match="holds other shards"):
        make(DemoConfig(dst=tmp_path))
    assert (tmp_path / "train" / "shard-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize("bad", [{"size": 8}, {"train": 0}, {"seed": -1}])
def test_absurd_options(bad: dict[str, int]):
    with pytest.raises(InputError):
        DemoConfig(dst=Path("x"), **bad)  # type: ignore[arg-type]
