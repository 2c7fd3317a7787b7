"""The loader's guarantees: the plan's batches on any layout, exact resumption, bad samples."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from xcit_dino.data.augment import Augment
from xcit_dino.data.config import AugmentConfig, CropsConfig, LoaderConfig
from xcit_dino.data.gpu_crops import DeviceCropper, EncodedWork
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import Batch, CropLoader, ImageLoader, slot_shapes
from xcit_dino.data.plan import Plan
from xcit_dino.data.ring import Ring
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.data.shards.scan import scan_samples, scan_shard
from xcit_dino.data.workers import CropWork, Done, Task
from xcit_dino.errors import InputError

CROPS = CropsConfig(global_crops_size=32, local_crops_number=3, local_crops_size=16)


def jpeg(number: int, size: int = 40) -> bytes:
    """An image with a color of its own, and some structure."""
    noise = np.random.RandomState(number).randint(-20, 20, (3, 4, 3))
    colors = 30 + 65 * np.array([number % 4, number // 4 % 4, number // 16 % 4]) + noise
    image = Image.fromarray(colors.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.resize((size + number % 7, size)).save(file, "JPEG")
    return file.getvalue()


def make_shards(
    folder: Path,
    counts: tuple[int, ...] = (9, 1, 14, 8, 12, 20),
    image: Callable[[int], bytes] = jpeg,
) -> ShardIndex:
    """Shards of numbered images, sample n labeled n % 5."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for _ in range(count):
                label = b"%d" % (number % 5)
                for kind, data in (("jpg", image(number)), ("cls", label)):
                    info = tarfile.TarInfo(f"{number:05}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    names = [f"{shard:03}.tar" for shard in range(len(counts))]
    write_index(folder, [scan_shard(folder, name, with_sha256=False) for name in names], None)
    return ShardIndex.load(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def loader_of(index: ShardIndex, *, num_workers: int = 0, batch_size: int = 8, **change):
    fields = LoaderConfig.__dataclass_fields__
    options = {name: change.pop(name) for name in list(change) if name in fields}
    config = LoaderConfig(num_workers=num_workers, shuffle_window=2, **options)
    plan = Plan.of(index, config, seed=3, batch_size=batch_size)
    return CropLoader(index, plan, CROPS, config, **change)


def copied(batches: list[Batch]) -> tuple[np.ndarray, ...]:
    """samples, sources, labels and crops of a step's micro-batches, joined and copied."""
    return (
        np.concatenate([b.samples for b in batches]),
        np.concatenate([b.sources for b in batches]),
        np.concatenate([b.labels.numpy() for b in batches]),
        np.concatenate([b.global_crops.numpy() for b in batches], 1),
        np.concatenate([b.local_crops.numpy() for b in batches], 1),
    )


def steps_of(loader: CropLoader, count: int) -> list[tuple[np.ndarray, ...]]:
    with closing(iter(loader)) as steps:
        return [copied(batches) for batches in islice(steps, count)]


def global_steps(index: ShardIndex, world_size: int, count: int, **options):
    """Global batches put together from every rank's part."""
    ranks = [
        steps_of(loader_of(index, rank=rank, world_size=world_size, **options), count)
        for rank in range(world_size)
    ]
    accum = options.get("accum", 1)
    for parts in zip(*ranks, strict=True):
        pieces = []
        for place, axis in enumerate((0, 0, 0, 1, 1)):
            split = [np.split(part[place], accum, axis) for part in parts]
            pieces.append(np.concatenate([s[micro] for micro in range(accum) for s in split], axis))
        yield pieces


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "world_size,accum,num_workers",
    [(1, 1, 1), (1, 2, 3), (2, 1, 0), (2, 4, 0), (4, 2, 0), (8, 1, 0), (1, 8, 2)],
)
def test_global_batch_is_the_same_on_every_layout(index, world_size, accum, num_workers):
    expected = steps_of(loader_of(index), 12)  # crosses an epoch of 8 steps
    options = dict(accum=accum, num_workers=num_workers)
    for ours, theirs in zip(global_steps(index, world_size, 12, **options), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("world_size,accum", [(8, 1), (2, 4), (4, 2), (1, 2)])
def test_augmented_global_batch_is_the_same_on_every_layout(index, world_size, accum):
    """What the network sees: the crops after flips, colors, blur and solarization."""
    augment = Augment(AugmentConfig(), seed=3)

    def augmented(world_size: int, accum: int) -> torch.Tensor:
        views = []
        for rank in range(world_size):
            options = dict(rank=rank, world_size=world_size, accum=accum, start_step=6)
            with closing(iter(loader_of(index, **options))) as steps:
                for batch in (batch for step in islice(steps, 3) for batch in step):
                    crops = augment(batch)[1].unflatten(0, (3, -1))
                    views.append((batch.step, batch.micro, rank, crops))
        return torch.cat([crops for *_, crops in sorted(views, key=lambda view: view[:3])], 1)

    torch.testing.assert_close(augmented(world_size, accum), augmented(1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("start_step,num_workers", [(1, 0), (7, 2), (8, 0), (11, 0)])
def test_resumes_at_the_exact_next_sample(index, start_step, num_workers):
    expected = steps_of(loader_of(index), 14)[start_step:]
    resumed = loader_of(index, start_step=start_step, num_workers=num_workers)
    for ours, theirs in zip(steps_of(resumed, 14 - start_step), expected, strict=True):
        assert_same(ours, theirs)


def test_batches_say_where_they_belong(index):
    loader = loader_of(index, accum=2, start_step=7)
    with closing(iter(loader)) as steps:
        first, second = next(steps), next(steps)
    assert [(b.step, b.micro, b.epoch) for b in first + second] == [
        (7, 0, 0), (7, 1, 0), (8, 0, 1), (8, 1, 1)
    ]  # fmt: skip
    assert first[0].global_crops.shape == (2, 4, 3, 32, 32)
    assert first[0].local_crops.shape == (3, 4, 3, 16, 16)
    assert first[0].global_crops.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(first[0].labels, first[0].sources % 5)


def test_epoch_holds_every_sample_and_a_crop_shows_its_image(index):
    samples, colors = [], {}
    for sample, _, _, crops, _ in steps_of(loader_of(index), 8):
        samples.extend(sample)
        colors |= dict(zip(sample, crops[0].mean((-1, -2)), strict=True))
    assert sorted(samples) == list(range(64))
    images = {n: np.asarray(Image.open(io.BytesIO(jpeg(n)))).mean((0, 1)) for n in range(64)}
    nearest = {n: min(images, key=lambda m: abs(images[m] - colors[n]).sum()) for n in range(64)}
    assert sum(nearest[n] == n for n in range(64)) == 64


def test_slots_are_not_overwritten_while_in_use(index):
    """A slow consumer sees the same pixels before and after the workers have run ahead."""
    expected = steps_of(loader_of(index, accum=2), 10)
    loader = loader_of(index, accum=2, num_workers=2)
    previous = None
    with closing(iter(loader)) as steps:
        for number, batches in enumerate(islice(steps, 10)):
            time.sleep(0.03)  # the workers fill whatever they may fill
            assert_same(copied(batches), expected[number])
            if previous is not None:
                assert_same(copied(previous), expected[number - 1])
            previous = batches


def test_wait_meter_counts(index):
    loader = loader_of(index)
    steps_of(loader, 2)
    waited = loader.wait_seconds
    steps_of(loader, 2)
    assert 0 < waited < loader.wait_seconds


def test_uneven_split_is_refused(index):
    with pytest.raises(InputError, match="8 cannot be split evenly over 3 ranks x 1"):
        loader_of(index, world_size=3)


def test_killed_worker_is_noticed_and_others_end(index):
    loader = loader_of(index, num_workers=2)
    with closing(iter(loader)) as steps:
        next(steps)
        children = _workers()
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):
            for _ in range(100):
                next(steps)
    deadline = time.monotonic() + 10
    while _workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _workers()


def test_workers_outlive_the_signals_that_mean_the_run(index):
    with closing(iter(loader_of(index, num_workers=1))) as steps:
        next(steps)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(_workers()[0], number)
        for _ in range(20):
            next(steps)
    assert not _workers()


def _workers() -> list[int]:
    """Loader workers of this process; earlier tests may have left trackers and other children."""
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


# ----------------------------------------------------------------------------------- bad samples


def damage(index: ShardIndex, sample: int, data: bytes) -> None:
    shard, offset, size = index.locate(sample)
    with open(index.path(shard), "r+b") as file:
        file.seek(offset)
        file.write(data[:size].ljust(size, b"\0"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_replaced_listed_and_move_nothing(tmp_path, index, num_workers):
    broken = make_shards(tmp_path / "shards")
    for sample, data in ((5, b""), (20, jpeg(20)[:300]), (41, b"GIF89a nonsense")):
        damage(broken, sample, data)
    options = dict(max_bad_fraction=0.2, num_workers=num_workers, run_folder=tmp_path)
    loader = loader_of(broken, **options)
    expected = steps_of(loader_of(index), 8)
    for ours, theirs in zip(steps_of(loader, 8), expected, strict=True):
        assert np.array_equal(ours[0], theirs[0])
        bad = np.isin(ours[0], [5, 20, 41])
        assert np.array_equal(ours[1] == ours[0], ~bad)
        assert np.array_equal(ours[2], ours[1] % 5)
        for place in (3, 4):
            assert np.array_equal(ours[place][:, ~bad], theirs[place][:, ~bad])
            assert all(crop.std() > 0 for crop in ours[place][:, bad].reshape(-1, 16 * 16))
    again = global_steps(broken, 2, 8, accum=2, max_bad_fraction=0.2)
    for ours, theirs in zip(
        again, steps_of(loader_of(broken, max_bad_fraction=0.2), 8), strict=True
    ):
        assert_same(ours, theirs)

    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    found = {line["sample"]: (line["shard"], line["key"], line["reason"]) for line in lines}
    assert len(lines) == 3 and set(found) == {5, 20, 41}
    assert found[5] == ("000.tar", "00005", found[5][2]) and "cannot be decoded" in found[5][2]
    assert found[20][:2] == ("002.tar", "00020") and "cannot be decoded" in found[20][2]


def test_too_many_bad_samples_stop_the_run_with_the_list(tmp_path):
    broken = make_shards(tmp_path / "shards")
    for sample in range(0, 64, 8):
        damage(broken, sample, b"")
    with pytest.raises(InputError) as caught:
        steps_of(loader_of(broken, max_bad_fraction=0.06, run_folder=tmp_path), 20)
    message = str(caught.value)
    assert "--max_bad_fraction 0.06" in message and ".tar:000" in message and "\n" not in message
    # Another rank, or the resumed run, starts from the list and stops at its first bad sample.
    options = dict(max_bad_fraction=0.06, run_folder=tmp_path, rank=1, world_size=2)
    with pytest.raises(InputError):
        steps_of(loader_of(broken, **options), 20)
    ranks = (tmp_path / "quarantine.rank1.jsonl").read_text().splitlines()
    assert len(ranks) <= 2


def test_one_bad_sample_never_stops_a_small_run(tmp_path):
    broken = make_shards(tmp_path / "shards")
    damage(broken, 7, b"")
    steps_of(loader_of(broken), 16)
    with pytest.raises(InputError, match="unreadable"):
        steps_of(loader_of(broken, max_bad_fraction=0), 16)


def test_lost_and_truncated_shards(tmp_path):
    broken = make_shards(tmp_path / "shards")
    os.unlink(broken.path(1))
    os.truncate(broken.path(5), int(broken.offsets[50]) + 10)
    loader = loader_of(broken, max_bad_fraction=0.5)
    steps_of(loader, 8)
    reasons = {sample: json.loads(line)["reason"] for sample, line in loader.quarantine.bad.items()}
    assert set(reasons) == {9, *range(50, 64)}
    assert "No such file" in reasons[9]
    assert "truncated" in reasons[50] and "truncated" in reasons[63]


def test_data_without_a_readable_image_ends_in_words(tmp_path):
    broken = make_shards(tmp_path / "shards", image=lambda number: b"nothing")
    with pytest.raises(InputError, match="no image can be read"):
        steps_of(loader_of(broken, max_bad_fraction=1.0), 1)
    with pytest.raises(InputError, match="quarantine") as caught:
        steps_of(loader_of(broken, num_workers=1, run_folder=tmp_path), 1)
    assert "--max_bad_fraction" in str(caught.value)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) > 1


# ------------------------------------------------------------------------------- decoder: device


def on_device(index: ShardIndex, task: Task) -> tuple[Done, torch.Tensor, torch.Tensor]:
    """The path of ``--decoder cuda`` on the CPU, workers' part and training process's part."""
    ring = Ring(1, slot_shapes(CROPS, len(task.samples)))
    arguments = index, open_source(index, LoaderConfig()), ring, CROPS, 3
    return DeviceCropper(CropWork(*arguments), torch.device("cpu"))(EncodedWork(*arguments)[task])


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("image", [jpeg, png, lambda n: (jpeg, png)[n % 2](n)])
def test_device_decoder_gives_the_hosts_crops(tmp_path, image):
    index = make_shards(tmp_path / "shards", image=image)
    expected = steps_of(loader_of(index), 1)[0]
    done, global_crops, local_crops = on_device(index, Task(0, expected[0]))
    assert np.array_equal(done.sources, expected[1])
    for ours, theirs in ((global_crops, expected[3]), (local_crops, expected[4])):
        assert ours.shape == theirs.shape and ours.dtype == torch.uint8
        assert abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_device_decoder_leaves_damaged_images_to_the_host(tmp_path):
    index = make_shards(tmp_path / "shards")
    samples = loader_of(index).plan.batch(0)
    damage(index, int(samples[2]), b"")
    damage(index, int(samples[5]), jpeg(int(samples[5]))[:300])
    done, global_crops, _ = on_device(index, Task(0, samples))
    expected = steps_of(loader_of(index, max_bad_fraction=0.2), 1)[0]
    assert np.array_equal(done.sources, expected[1])
    assert {sample for sample, _, _ in done.bad} == set(samples[[2, 5]])
    assert abs(global_crops.numpy().astype(int) - expected[3]).max() <= 1


def test_device_decoder_needs_cuda(index):
    with pytest.raises(InputError, match="--decoder cuda needs CUDA"):
        loader_of(index, decoder="cuda")


# ---------------------------------------------------------------------------- from other machines


@pytest.fixture
def url(index: ShardIndex):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=index.root)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", ["http", "file", "memory", "pipe"])
def test_remote_shards_give_the_same_batches(index, url, tmp_path, place):
    """By whole copies from a server without ranges, by ranges, and from a command; in workers."""
    fsspec.filesystem("memory").pipe(
        {f"/shards/{name}": Path(index.root, name).read_bytes() for name in index.shards}
    )
    options = {
        "memory": dict(shard_url="memory://shards"),
        "http": dict(shard_url=url, cache_dir=tmp_path / "cache"),
        "file": dict(shard_url=f"file://{index.root}"),
        "pipe": dict(shard_url=f"pipe:cat {index.root}/{{shard}}", cache_dir=tmp_path / "cache"),
    }[place]
    remote = loader_of(index, num_workers=2, **options)
    for ours, theirs in zip(steps_of(remote, 10), steps_of(loader_of(index), 10), strict=True):
        assert_same(ours, theirs)


# ------------------------------------------------------------------------------------------ fuzz


def mutated(data: bytes, rng: np.random.RandomState) -> bytes:
    """One of the ways in which a file comes to harm."""
    raw = np.frombuffer(data, np.uint8).copy()
    first = rng.randint(len(raw))
    length = int(2 ** rng.uniform(0, 14))
    match rng.randint(6):
        case 0:  # bits flipped here and there
            raw[rng.randint(len(raw), size=rng.randint(1, 30))] ^= 1 << rng.randint(8)
        case 1:
            raw[first : first + length] = 0
        case 2:
            hole = raw[first : first + length]
            hole[:] = rng.randint(0, 256, len(hole))
        case 3:
            raw = raw[:first]
        case 4:  # everything behind moves
            raw = np.insert(raw, first, rng.randint(0, 256, min(length, 999), dtype=np.uint8))
        case 5:
            raw = np.delete(raw, slice(first, first + length))
    return raw.tobytes()


@pytest.mark.parametrize("cases", [300, pytest.param(5000, marks=pytest.mark.faults)])
def test_mutated_shards_never_crash_and_every_good_sample_is_delivered(tmp_path, cases):
    """By the index of the whole shard, and by an index made of what is left."""
    shard = make_shards(tmp_path / "shards", counts=(12,))
    path, original = Path(shard.path(0)), Path(shard.path(0)).read_bytes()
    samples = np.arange(12)
    ring = Ring(2, slot_shapes(CROPS, 12))
    work = CropWork(shard, open_source(shard, LoaderConfig()), ring, CROPS, seed=0)
    work[Task(0, samples)]
    expected, ours = ([view.numpy() for view in ring.views(slot)] for slot in (0, 1))
    bad_samples = 0
    for case in range(cases):
        data = mutated(original, np.random.RandomState(case))
        path.write_bytes(data)  # in place: the source keeps the file open
        places = [shard.locate(sample) for sample in samples]
        intact = np.array([data[o : o + n] == original[o : o + n] for _, o, n in places])
        done = work[Task(1, samples)]
        assert intact.sum() < 3 or (done.sources >= 0).all(), case
        assert (done.sources[intact] == samples[intact]).all(), case
        for ours_group, expected_group in zip(ours, expected, strict=True):
            assert np.array_equal(ours_group[:, intact], expected_group[:, intact]), case
        replaced = done.sources != samples
        listed = {sample for sample, _, _ in done.bad}
        assert set(samples[replaced]) <= listed and all(reason for _, _, reason in done.bad), case
        bad_samples += replaced.sum()
        if len(data) == len(original):  # nothing has moved: whole members are where they were
            rows, _ = scan_samples(lambda at, n, data=data: data[at : at + n], len(data))
            begins = [(o - 512, o + n) for _, o, n in places]
            whole = {b + 512 for b, e in begins if data[b:e] == original[b:e]}
            assert whole <= {row.offset for row in rows}, case
    assert bad_samples > cases // 3


# ---------------------------------------------------------------------------------- image loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_loader_delivers_each_image_once_in_order(index, num_workers):
    config = LoaderConfig(num_workers=num_workers)
    loader = ImageLoader(index, config, resize=36, crop=32, batch_size=10)
    samples, labels = [], []
    for images, label, sample in loader:
        assert images.shape == (len(sample), 3, 32, 32) and images.dtype == torch.uint8
        samples.extend(sample), labels.extend(label.tolist())
    assert samples == list(range(64)) and labels == [n % 5 for n in range(64)]
    assert len(loader) == 7


def test_image_loader_shards_over_ranks_takes_indices_and_leaves_bad_ones_out(tmp_path):
    broken = make_shards(tmp_path / "shards")
    damage(broken, 12, b"")
    wanted = np.arange(0, 64, 4)
    seen = []
    for rank in range(3):
        loader = ImageLoader(
            broken, LoaderConfig(num_workers=0), resize=None, crop=32, batch_size=4,
            indices=wanted, rank=rank, world_size=3,
        )  # fmt: skip
        for images, labels, samples in loader:
            assert len(images) == len(labels) == len(samples)
            seen.extend(samples)
    assert sorted(seen) == sorted(set(wanted) - {12})
