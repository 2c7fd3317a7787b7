"""Features: what is extracted, that it is cached by content, that ranks write one file together."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.loader import CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import feature_cache, features
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import make_context
from xcit_dino.eval.features import Rows, count_classes, load_features
from xcit_dino.eval.target import PixelFeatures, networks, pretrained, random_network, resolve
from xcit_dino.inputs import InputSettings
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed.dist import World

ONE = World(0, 1, torch.device("cpu"))


def images_of(index: ShardIndex, numbers: range) -> torch.Tensor:
    """Decoded by Pillow, normalized by torchvision: [n, 3, 32, 32]."""
    images = []
    for number in numbers:
        shard, offset, size = index.locate(number)
        data = Path(index.path(shard)).read_bytes()[offset : offset + size]
        images.append(TF.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")))
    scaled = torch.stack(images).float() / 255
    return TF.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_features_are_the_networks_outputs(run_folder):
    config = run_folder.target(batch_size_per_gpu=20)
    target, context = resolve(config, ONE)
    index, network = context.index("val"), pretrained(target)
    found = load_features(network, index, "val", context)
    with torch.no_grad():
        images = images_of(index, range(48))
        cls = network.model(images)
        tokens = network.model.forward_features(images)
    assert found.blocks["cls"].shape == (48, network.model.embed_dim)
    np.testing.assert_allclose(found.blocks["cls"], cls, atol=1e-4)
    np.testing.assert_allclose(found.blocks["patch"], tokens[:, 1:].mean(1), atol=1e-4)
    assert not np.allclose(found.blocks["cls2"], found.blocks["cls"], atol=1e-2)
    np.testing.assert_array_equal(found.labels, index.labels)
    assert found.num_classes == len(index.classes or []) and found.unreadable == 0


def test_deep_features_are_the_mean_tokens_of_the_last_four_blocks(run_folder):
    target, context = resolve(run_folder.target(batch_size_per_gpu=20), ONE)
    index, network = context.index("val"), pretrained(target)
    plain = load_features(network, index, "val", context)
    found = load_features(network, index, "val", context, deep=True)
    seen: list[torch.Tensor] = []
    for block in network.model.blocks[-4:]:
        block.register_forward_hook(lambda *given: seen.append(given[2].flatten(1, 2)))
    with torch.no_grad():
        network.model(images_of(index, range(48)))
    centered = [tokens - tokens.mean(-1, keepdim=True) for tokens in seen]
    normed = [x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in centered]
    expected = torch.cat([tokens.mean(1) for tokens in normed], dim=1)
    np.testing.assert_allclose(found.blocks["deep"], expected, atol=1e-4)
    for name, block in plain.blocks.items():
        np.testing.assert_array_equal(found.blocks[name], block)
    folders = sorted(path.name[:-17] for path in (context.output_dir / "features").glob("*-val-*/"))
    assert {"pretrained+deep-val", "pretrained-val"} <= set(folders), "both stay"


def test_a_batch_is_written_once_the_next_one_is_queued():
    """So a GPU computes while the host writes; what is written is that of its own batch."""
    order = []

    def batches():
        for number in range(4):
            order.append(f"queued {number}")
            yield {"cls": torch.full((2, 3), float(number))}, np.array([2 * number, 2 * number + 1])

    found = features.one_behind(
        batches(), lambda blocks: order.append(f"seen {blocks['cls'][0, 0]:.0f}")
    )
    for blocks, samples in found:
        assert (blocks["cls"] == samples[0] // 2).all() and len(samples) == 2
        order.append(f"written {samples[0] // 2}")
    assert " ".join(word for word in order if "seen" not in word) == (
        "queued 0 queued 1 written 0 queued 2 written 1 queued 3 written 2 written 3"
    )
    assert [word for word in order if "seen" in word] == [f"seen {n}" for n in range(4)]


def test_cached_until_something_changes(run_folder, monkeypatch):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    index, network = context.index("val"), pretrained(target)
    load_features(network, index, "val", context)
    calls = []
    compute = features._compute
    monkeypatch.setattr(features, "_compute", lambda *a: (calls.append(1), compute(*a))[1])
    load_features(network, index, "val", context)
    assert not calls
    load_features(network, index, "val", dataclasses.replace(context, crop=24))
    inputs = dataclasses.replace(context.inputs, std=(0.5, 0.5, 0.5))
    load_features(network, index, "val", dataclasses.replace(context, inputs=inputs))
    other = dataclasses.replace(network, facts=network.facts | {"weights": "0" * 16})
    load_features(other, index, "val", context)
    assert len(calls) == 3
    folders = [path.name for path in (run_folder.path / "features").glob("[!.]*")]
    assert len(folders) == 1, "features of earlier weights take no room"


def test_an_interrupted_extraction_leaves_nothing_under_its_name(run_folder, monkeypatch):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    network = pretrained(target)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features.Rows, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            load_features(network, context.index("val"), "val", context)
    left = [path.name for path in (run_folder.path / "features").iterdir()]
    assert len(left) == 1 and left[0].endswith(".lock")
    assert len(load_features(network, context.index("val"), "val", context)) == 48


def test_ranks_fill_one_file(run_folder, monkeypatch):
    """Three ranks (threads) write their rows; the result is that of one process."""
    config = run_folder.target(batch_size_per_gpu=7)
    target, context = resolve(config, ONE)
    index = context.index("val")
    network = dataclasses.replace(
        pretrained(target), model=PixelFeatures(), facts={"network": "pixels"}
    )
    alone = load_features(network, index, "val", context)
    expected = np.array(alone.blocks["cls"])
    gate, box = threading.Barrier(3), {}

    def from_main(compute):
        if threading.current_thread().name == "0":
            box["value"] = compute()
        gate.wait()
        value = box["value"]
        gate.wait()
        return value

    monkeypatch.setattr(features.dist, "barrier", gate.wait)
    monkeypatch.setattr(features.dist, "from_main", from_main)
    other = dataclasses.replace(context, output_dir=run_folder.path / "three")
    found = {}

    def work(rank: int) -> None:
        world = World(rank, 3, torch.device("cpu"))
        mine = dataclasses.replace(other, world=world)
        found[rank] = load_features(network, index, "val", mine)

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        np.testing.assert_array_equal(found[rank].blocks["cls"], expected)


def test_two_commands_at_once_compute_features_once(run_folder, monkeypatch):
    """The second (a thread) waits for the first, which is held up, and takes its features."""
    config = run_folder.target()
    target, context = resolve(config, ONE)
    index, network = context.index("val"), pretrained(target)
    calls, found, release = [], {}, threading.Event()
    compute = features._compute

    def held_up(*arguments):
        calls.append(1)
        release.wait(10)
        return compute(*arguments)

    def work(number: int) -> None:
        found[number] = load_features(network, index, "val", context)

    monkeypatch.setattr(features, "_compute", held_up)
    monkeypatch.setattr(feature_cache, "POLL", 0.01)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    np.testing.assert_array_equal(found[0].blocks["cls"], found[1].blocks["cls"])


def test_features_that_are_read_are_not_removed(run_folder):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    index, network = context.index("val"), pretrained(target)

    def kept(crop: int) -> set[str]:
        at = dataclasses.replace(context, crop=crop)
        features = load_features(network, index, "val", at)
        assert features.cache is not None
        used.append(features)
        return {path.name for path in (run_folder.path / "features").glob("[!.]*")}

    used: list[features.Features] = []
    assert len(kept(24)) == 1 and len(kept(16)) == 2
    used.clear()
    assert len(kept(8)) == 1


def test_what_a_killed_extraction_left_is_removed(run_folder):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    node, folder = platform.node(), run_folder.path / "features"
    dead, live = (folder / f".pretrained-val-{n}.{node}.{pid}.tmp" for n, pid in
                  (("0", 2**22 + 1), ("1", 1)))  # fmt: skip
    dead.mkdir(parents=True), live.mkdir()
    load_features(pretrained(target), context.index("val"), "val", context)
    assert live.is_dir() and not dead.exists()


def test_unreadable_images_are_left_out(run_folder, tmp_path):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    index = ShardIndex.load(broken_copy(context.index("val"), tmp_path / "broken"))
    found = load_features(pretrained(target), index, "val", context)
    assert found.unreadable == 1 and len(found) == 47
    np.testing.assert_array_equal(found.labels, np.delete(index.labels, 5))
    assert np.abs(found.blocks["cls"]).sum(1).min() > 0


def test_images_without_a_label_are_left_out(run_folder):
    config = run_folder.target()
    target, context = resolve(config, ONE)
    index = without_label(context.index("val"), 7)
    found = load_features(pretrained(target), index, "val", context)
    assert found.unreadable == 1 and (found.labels >= 0).all()
    np.testing.assert_array_equal(found.labels, np.delete(index.labels, 7))


def test_training_takes_another_image_for_one_without_a_label(run_folder, tmp_path):
    index = without_label(ShardIndex.load(run_folder.data / "val"), 7)
    plan = Plan(index.counts, seed=0, checksum=index.checksum, batch_size=48)
    crops = CropsConfig(global_crops_size=16, local_crops_number=0)
    options = LoaderConfig(num_workers=0)
    taken = {}
    for labeled in (False, True):
        loader = CropLoader(index, plan, crops, options, run_folder=tmp_path, labeled=labeled)
        (taken[labeled],) = next(iter(loader))
    place = taken[False].samples.tolist().index(7)
    assert taken[False].labels[place] == -1 and (taken[True].labels >= 0).all()
    others = np.delete(np.arange(48), place)
    np.testing.assert_array_equal(taken[True].sources[others], taken[False].sources[others])
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"] == "no label"


def without_label(index: ShardIndex, number: int) -> ShardIndex:
    labels = np.array(index.labels)
    labels[number] = -1
    return dataclasses.replace(index, labels=labels)


def broken_copy(index: ShardIndex, folder):
    """The same shards with the bytes of image 5 destroyed."""
    shutil.copytree(index.root, folder)
    shard, offset, size = index.locate(5)
    with open(folder / index.shards[shard], "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    return folder


def test_rows_land_where_they_belong(tmp_path):
    Rows.create(tmp_path / "a.npy", (6, 2), np.float32)
    rows = Rows(tmp_path / "a.npy")
    rows.write(np.array([4, 5, 1]), np.array([[1, 2], [3, 4], [5, 6]], np.float64))
    rows.write(np.array([], np.int64), np.zeros((0, 2)))
    rows.close()
    expected = [[0, 0], [5, 6], [0, 0], [0, 0], [1, 2], [3, 4]]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)


def test_baselines(run_folder):
    config = run_folder.target(baselines=True)
    found = {network.name: network for network in networks(config, resolve(config, ONE)[0])}
    assert list(found) == ["pretrained", "random", "pixels"]
    torch.manual_seed(0)
    fresh = create_model("xcit_pico_6_p8")
    for a, b in zip(fresh.parameters(), found["random"].model.parameters(), strict=True):
        assert torch.equal(a, b)
    state = torch.get_rng_state()
    random_network("xcit_pico_6_p8")
    assert torch.equal(state, torch.get_rng_state()), "no other random numbers are disturbed"
    big = torch.rand(2, 3, 64, 64)
    averaged = big.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5)).flatten(1)
    assert torch.allclose(PixelFeatures()(big), averaged, atol=1e-6)


@pytest.mark.parametrize(
    "options, trained, expected",
    [
        ({}, 224, (256, 224)),
        ({}, None, (256, 224)),
        ({}, 32, (32, 32)),
        ({}, 96, (110, 96)),
        ({"crop_size": 384}, 224, (439, 384)),
        ({"crop_size": 224, "resize_size": 224}, 224, (224, 224)),
    ],
)
def test_geometry(options, trained, expected):
    settings = InputSettings(size=trained)
    context = make_context(EvalTargetConfig(**options), settings, {}, "", ONE)
    assert (context.resize, context.crop) == expected


def test_bad_input_is_named(tmp_path, run_folder):
    def refused(match: str, **options):
        with pytest.raises(InputError, match=match):
            resolve(EvalTargetConfig(**options), ONE)

    refused("--arch: needed", output_dir=tmp_path)
    refused("--data_path: needed", output_dir=tmp_path, arch="xcit_pico_6_p8")
    refused("holds no checkpoint", output_dir=run_folder.path)
    refused("no such file", output_dir=run_folder.path, pretrained_weights=tmp_path / "no.pth")
    refused(
        "unknown arch",
        output_dir=run_folder.path,
        arch="xcit_huge",
        pretrained_weights=run_folder.weights,
    )


def test_splits_must_share_their_classes(demo_shards):
    train = ShardIndex.load(demo_shards / "train")
    other = dataclasses.replace(train, classes=["cat", "dog"])
    with pytest.raises(InputError, match="one label map"):
        count_classes(train, other)
