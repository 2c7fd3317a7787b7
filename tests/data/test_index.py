"""The shard index against tarfile and brute force; damaged and hostile tars and indexes."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards import index as index_module
from xcit_dino.data.shards.index import ShardIndex, key_of, resolve_split
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.data.shards.scan import scan_samples, scan_shard
from xcit_dino.data.shards.tar import Damage, Member, scan
from xcit_dino.errors import InputError


def make_index(folder: Path, counts: tuple[int, ...] = (5, 3, 4)) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    number, parts = 0, []
    for shard, count in enumerate(counts):
        samples = []
        for _ in range(count):
            image = bytes([number]) * (100 + 37 * number)
            samples.append(Sample(f"{number:06d}", "jpg", image, number % 3, {"n": number}))
            number += 1
        parts.append(write_shard(folder, f"shard-{shard:06d}.tar", samples))
    write_index(folder, parts, ["a", "b", "c"])
    return ShardIndex.load(folder)


def tar_bytes(
    members: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def scan_bytes(data: bytes) -> list[Member | Damage]:
    return list(scan(lambda at, length: data[at : at + length], len(data)))


# -- the index -----------------------------------------------------------------------------------


def test_every_sample_is_where_tarfile_finds_it(tmp_path: Path):
    index = make_index(tmp_path)
    number = 0
    for shard, name in enumerate(index.shards):
        with tarfile.open(tmp_path / name) as tar:
            for member in tar:
                if not member.name.endswith(".jpg"):
                    continue
                assert index.locate(number) == (shard, member.offset_data, member.size)
                data = (tmp_path / name).read_bytes()
                assert data[member.offset_data :][: member.size] == bytes([number]) * member.size
                assert (
                    key_of(data[member.offset_data - 512 : member.offset_data]) == f"{number:06d}"
                )
                assert index.labels[number] == number % 3
                number += 1
    assert number == index.num_samples == 12
    assert index.starts.tolist() == [0, 5, 8] and index.counts.tolist() == [5, 3, 4]


def test_arrays_are_mapped_and_pickles_are_small(tmp_path: Path):
    index = make_index(tmp_path)
    assert all(isinstance(a, np.memmap) for a in (index.offsets, index.sizes, index.labels))
    data = pickle.dumps(index)
    assert len(data) < 500 and pickle.loads(data).checksum == index.checksum


def test_a_shard_without_samples_is_skipped_by_locate(tmp_path: Path):
    index = make_index(tmp_path, (2, 0, 3))
    assert [index.locate(n)[0] for n in range(5)] == [0, 0, 2, 2, 2]


def test_the_checksum_is_a_function_of_the_content(tmp_path: Path):
    first = make_index(tmp_path / "a").checksum
    assert make_index(tmp_path / "elsewhere").checksum == first
    assert make_index(tmp_path / "b", (5, 4, 3)).checksum != first
    samples = [Sample("0", "jpg", bytes([n]) * 10, 0, {}) for n in (1, 2)]
    parts = [write_shard(tmp_path, f"{n}.tar", [s]) for n, s in enumerate(samples)]
    digests = {write_index(tmp_path, [p._replace(name="x.tar")], None) for p in parts}
    assert len(digests) == 2  # the same sizes and places, other bytes


SHARD = {"name": "0.tar", "samples": 12, "bytes": 1, "sha256": None}


def edit(folder: Path, checksum: bool = True, **changes: Any) -> None:
    """Change index.json, its checksum corrected or not."""
    meta = json.loads((folder / "index.json").read_text()) | changes
    meta["checksum"] = index_module.checksum_of(meta) if checksum else meta["checksum"]
    (folder / "index.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "index.json").write_text("{"),
        lambda f: (f / "index.json").write_text("[" * 100_000),
        lambda f: (f / "index.json").write_text("[]"),
        lambda f: (f / "index.json").write_bytes((f / "index.json").read_bytes()[:-9] + b"0" * 9),
        lambda f: (f / "index.offsets.npy").unlink(),
        lambda f: (f / "index.offsets.npy").write_bytes(b""),
        lambda f: np.save(f / "index.sizes.npy", np.zeros(12, np.int64)),
        lambda f: np.save(f / "index.labels.npy", np.zeros(11, np.int32)),
        lambda f: np.save(f / "index.labels.npy", np.array([{}], object), allow_pickle=True),
        lambda f: edit(f, version=99),
        lambda f: edit(f, shards=None),
        lambda f: edit(f, classes={"a": 0}),
        lambda f: edit(f, shards=[SHARD | {"samples": 13}, SHARD | {"samples": -1}]),
        lambda f: edit(f, classes=["z"], checksum=False),
        lambda f: edit(f, shards=[SHARD | {"name": "../../etc/x.tar"}]),
        lambda f: edit(f, shards=[SHARD | {"name": "pipe:rm x"}]),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_index_is_refused_in_one_line(tmp_path: Path, damage: Any):
    make_index(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        ShardIndex.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_read_from_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = make_index(tmp_path / "local")
    memory: Any = fsspec.filesystem("memory")
    for file in (tmp_path / "local").iterdir():
        memory.pipe(f"/set/train/{file.name}", file.read_bytes())
    remote = ShardIndex.load("memory://set/train")
    np.testing.assert_array_equal(remote.offsets, local.offsets)
    assert remote.path(1) == "memory://set/train/shard-000001.tar"
    assert resolve_split("memory://set", "train") == "memory://set/train"
    memory.rm("/set", recursive=True)
    with pytest.raises(InputError, match="no index.json"):
        ShardIndex.load("memory://set/train")


def test_splits(tmp_path: Path):
    make_index(tmp_path / "both" / "train")
    make_index(tmp_path / "both" / "val")
    assert resolve_split(tmp_path / "both", "val") == str(tmp_path / "both" / "val")
    make_index(tmp_path / "own")
    assert resolve_split(tmp_path / "own", "train") == str(tmp_path / "own")
    with pytest.raises(InputError, match="needs another one"):
        resolve_split(tmp_path / "own", "val")
    with pytest.raises(InputError, match="shards make SRC"):
        resolve_split(tmp_path / "nothing", "train")
    (tmp_path / "own" / "index.json").unlink()
    with pytest.raises(InputError, match="shards check"):
        resolve_split(tmp_path / "own", "train")


def test_nothing_is_left_under_a_final_name_when_writing_stops(tmp_path: Path):
    def parts():
        yield write_shard(tmp_path, "0.tar", [Sample("0", "jpg", b"x", 0, {})])
        raise KeyboardInterrupt

    make_index(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_index(tmp_path, parts(), None)
    with pytest.raises(InputError, match="has no index.json"):
        ShardIndex.load(tmp_path)


# -- tars of all kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_and_places_agree_with_tarfile(kind: int):
    names = ["a.jpg", "d" * 60 + "/" + "e" * 90 + ".jpg", "n.cls"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".png", "naïve/日本.jpg"]
    data = tar_bytes([(tarfile.TarInfo(n), n.encode() * 7) for n in names], kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert scan_bytes(data) == expected


def test_img2dataset_shards(tmp_path: Path):
    """Foreign members: .png and .webp, captions, no labels, images without a partner."""
    members = ["0.json", "0.png", "0.txt", "1.txt", "2.webp", "2.seg.png", "dir.x/3.jpg"]
    data = tar_bytes([(tarfile.TarInfo(n), n.encode()) for n in members])
    (tmp_path / "00000.tar").write_bytes(data)
    part = scan_shard(tmp_path, "00000.tar", with_sha256=False)
    images = [data[o : o + s] for o, s in zip(part.offsets, part.sizes, strict=True)]
    assert images == [b"0.png", b"2.webp", b"dir.x/3.jpg"]
    assert part.labels.tolist() == [-1, -1, -1] and part.sha256 is None


def test_samples_without_an_image_are_listed():
    names = ["a.jpg", "a.txt", "b.svg", "b.json", "c.v2.png", "readme"]
    data = tar_bytes([(tarfile.TarInfo(name), b"x") for name in names])
    rows, damage = scan_samples(lambda at, n: data[at : at + n], len(data))
    assert [row.key for row in rows] == ["a", "c"]  # c as webdataset has it: its v2.png
    assert {item["key"]: item["reason"] for item in damage} == {
        "b": "no image among its members: .svg .json",
    }


@pytest.mark.parametrize("label", ["x", "-1", "", "99999999999", "2147483647", "1.5", "١"])
def test_an_unreadable_label_keeps_the_sample(label: str):
    pairs = [("0.cls", label.encode()), ("0.jpg", b"i"), ("1.cls", b"7\n"), ("1.jpg", b"i")]
    data = tar_bytes([(tarfile.TarInfo(n), d) for n, d in pairs])
    rows, damage = scan_samples(lambda at, length: data[at : at + length], len(data))
    assert [row[2] for row in rows] == [-1, 7]
    assert [item["key"] for item in damage] == ["0"]
    assert damage[0]["reason"].startswith(f"unreadable label {label[:16]!r}: .cls holds a number")


def hostile(kind: bytes, name: str = "evil.jpg", size: int | None = None) -> bytes:
    """A tar of good.jpg, one hostile member, and last.jpg."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    first = tar_bytes([(tarfile.TarInfo("good.jpg"), b"good")])[:1024]
    return first + bytes(header) + tar_bytes([(tarfile.TarInfo("last.jpg"), b"last")])


@pytest.mark.parametrize(
    "data",
    [
        hostile(tarfile.SYMTYPE), hostile(tarfile.LNKTYPE), hostile(tarfile.CHRTYPE),
        hostile(tarfile.BLKTYPE), hostile(tarfile.FIFOTYPE), hostile(tarfile.GNUTYPE_SPARSE),
        hostile(b"Z"), hostile(tarfile.SYMTYPE, size=1 << 40),
        hostile(tarfile.REGTYPE, size=1 << 40), hostile(tarfile.REGTYPE, size=1 << 80),
        hostile(tarfile.XHDTYPE, size=1 << 33), hostile(tarfile.GNUTYPE_LONGNAME, size=1 << 33),
    ],
)  # fmt: skip
def test_hostile_members_are_named_and_never_followed(data: bytes):
    found = scan_bytes(data)
    assert [m.name for m in found if isinstance(m, Member)][:1] == ["good.jpg"]
    assert sum(isinstance(m, Damage) for m in found) == 1
    assert all(m.offset + m.size <= len(data) for m in found if isinstance(m, Member))


def test_one_damaged_header_costs_one_member():
    data = bytearray(tar_bytes([(tarfile.TarInfo(f"{n}.jpg"), b"i" * 700) for n in range(5)]))
    data[2 * 1536 + 3] ^= 1
    found = scan_bytes(bytes(data))
    assert [m.name for m in found if isinstance(m, Member)] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg"]
    assert [m.reason for m in found if isinstance(m, Damage)] == ["damaged tar header"]


@pytest.mark.parametrize("hole", [(1536, 3072), (1700, 4000), (0, 512), (1024, 2048)])
def test_zeros_cost_only_the_members_that_they_touch(hole: tuple[int, int]):
    data = bytearray(tar_bytes([(tarfile.TarInfo(f"{n}.jpg"), b"i" * 700) for n in range(5)]))
    data[slice(*hole)] = bytes(hole[1] - hole[0])
    found = scan_bytes(bytes(data))
    headers = [n for n in range(5) if n * 1536 + 512 <= hole[0] or n * 1536 >= hole[1]]
    assert [m.name for m in found if isinstance(m, Member)] == [f"{n}.jpg" for n in headers]
    assert len(headers) == 5 or any(isinstance(m, Damage) for m in found)


def test_a_tail_of_zeros_is_not_taken_for_the_end():
    data = tar_bytes([(tarfile.TarInfo("0.jpg"), b"i" * 700)])
    assert [type(m) for m in scan_bytes(data)] == [Member]
    assert [type(m) for m in scan_bytes(data + bytes(1 << 21))] == [Member, Damage]


def test_a_truncated_tar_gives_what_is_whole():
    data = tar_bytes([(tarfile.TarInfo(f"{n}.jpg"), b"i" * 700) for n in range(5)])
    for length in range(0, 5 * 1536, 97):
        found = scan_bytes(data[:length])
        whole = sum(length >= n * 1536 + 512 + 700 for n in range(5))
        assert sum(isinstance(m, Member) for m in found) == whole


@pytest.mark.parametrize("cases", [2_000, pytest.param(50_000, marks=pytest.mark.faults)])
def test_mutated_tars_never_break_the_scan(cases: int):
    """Tars with bytes changed, cut out or doubled: only members that lie in the file."""
    rng = np.random.default_rng(0)
    names = ["a.cls", "a.jpg", "b" * 150 + ".jpg", "c.jpg", "c.json"]
    good = tar_bytes([(tarfile.TarInfo(n), b"1" * int(rng.integers(1, 900))) for n in names])[:9216]
    for _ in range(cases):
        data = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)))
            match rng.integers(4):
                case 0:
                    data[at] = rng.integers(256)
                case 1:
                    del data[at : at + int(rng.integers(1, 600))]
                case 2:
                    data[at:at] = data[at : at + 512]
                case 3:
                    data[at : at + 12] = rng.bytes(12)
            data = data or bytearray(b"\0")
        rows, _ = scan_samples(lambda at, n, data=bytes(data): data[at : at + n], len(data))
        assert all(0 <= o and 0 <= s and o + s <= len(data) for o, s, *_ in rows)
