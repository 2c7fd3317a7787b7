"""Remote shards: every way a server can fail, the shared cache, commands."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import numpy as np
import pytest

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io import remote, storage
from xcit_dino.data.io.cache import ReadAhead, ShardCache
from xcit_dino.data.io.remote import Unreadable
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import INDEX, ShardIndex, resolve_split
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.errors import InputError

SHARDS = {f"{n:02}.tar": np.random.RandomState(n).bytes(30_000 + n) for n in range(6)}
PLACES = [(shard, offset, 1000) for shard in range(6) for offset in (0, 512, 29_000)]
EXPECTED = [SHARDS[f"{s:02}.tar"][o : o + n] for s, o, n in PLACES]


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``faults`` are used up one a request, then it behaves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = SHARDS
        self.faults: list[str] = []
        self.always = ""
        self.requests = 0
        self.served = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that gave up


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests += 1
        data = self.server.files.get(self.path.lstrip("/"))
        if data is None:
            return self.send_error(404)
        fault = self.server.always
        if body and self.server.faults:
            fault = self.server.faults.pop(0)
        if fault == "error":
            return self.send_error(503)
        if fault == "stall":
            time.sleep(1.5)
        if fault == "reset":
            self.close_connection = True
            return
        ranged = self.headers.get("Range")
        if ranged and fault != "no ranges":
            first, last = ranged.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "none" if fault == "no ranges" else "bytes")
        self.end_headers()
        if body:
            self.server.served += len(part)
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
            if fault == "short":
                self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)


def index_at(root: str) -> ShardIndex:
    """What a source needs of an index."""
    sizes = np.array([len(data) for data in SHARDS.values()])
    digests = [hashlib.sha256(data).hexdigest() for data in SHARDS.values()]
    index = SimpleNamespace(root=root, shards=list(SHARDS), shard_bytes=sizes, sha256=digests)
    return cast(ShardIndex, index)


def source_of(server: Server, **options) -> storage.Source:
    url = f"http://127.0.0.1:{server.server_port}"
    return storage.open_source(index_at(url), LoaderConfig(shuffle_window=2, **options))


# --------------------------------------------------------------------------------------- servers


def test_range_requests_move_only_what_is_asked_for(server):
    assert source_of(server).read_many(PLACES) == EXPECTED
    assert server.served == 1000 * len(PLACES)


@pytest.mark.parametrize("fault", ["error", "reset", "short", "stall"])
def test_passing_faults_are_outlasted(server, tmp_path, fault):
    server.faults = [fault] * 3
    assert source_of(server).read_many(PLACES[:1]) == EXPECTED[:1]
    server.faults = [fault] * 3
    assert source_of(server, cache_dir=tmp_path).read_many(PLACES[:1]) == EXPECTED[:1]
    assert not server.faults


@pytest.mark.parametrize("fault", ["error", "reset", "short"])
@pytest.mark.parametrize("cached", [False, True])
def test_lasting_faults_cost_one_round_of_attempts(server, tmp_path, fault, cached):
    server.always = fault
    source = source_of(server, **({"cache_dir": tmp_path} if cached else {}))
    (failure,) = source.read_many(PLACES[:1])
    assert isinstance(failure, Unreadable) and "5 attempts failed" in str(failure)
    requests = server.requests
    again = source.read_many(PLACES[:3])
    assert all(isinstance(result, Unreadable) for result in again)
    assert server.requests == requests


def test_lost_shard_is_not_tried_again_and_others_are_read(server, tmp_path, monkeypatch):
    index = index_at(f"http://127.0.0.1:{server.server_port}")
    index.shards[2] = "lost.tar"
    for options in ({}, {"cache_dir": tmp_path}):
        results = storage.open_source(index, LoaderConfig(**options)).read_many(PLACES)
        for place, result, expected in zip(PLACES, results, EXPECTED, strict=True):
            if place[0] == 2:
                assert isinstance(result, Unreadable) and "no such file" in str(result)
            else:
                assert result == expected


def test_server_without_ranges_needs_the_cache(server, tmp_path):
    server.always = "no ranges"
    (failure,) = source_of(server).read_many(PLACES[:1])
    assert isinstance(failure, Unreadable) and "--cache_dir" in str(failure)
    assert source_of(server, cache_dir=tmp_path).read_many(PLACES) == EXPECTED


def test_copy_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    server.faults = ["", "", "", "error", "", "reset", ""]
    assert source_of(server, cache_dir=tmp_path).read_many(PLACES[:1]) == EXPECTED[:1]
    assert server.served == len(SHARDS["00.tar"])


def test_shard_that_changed_since_it_was_indexed_is_refused(server, tmp_path):
    index = index_at(f"http://127.0.0.1:{server.server_port}")
    index.sha256[0] = hashlib.sha256(b"other").hexdigest()
    source = storage.open_source(index, LoaderConfig(cache_dir=tmp_path))
    first, second = source.read_many([PLACES[0], PLACES[3]])
    assert isinstance(first, Unreadable) and "changed" in str(first)
    assert second == EXPECTED[3]
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def index_on_server(server, tmp_path, monkeypatch) -> str:
    """The URL of a data set with its index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = [Sample(f"{n:03}", "jpg", b"image" * n, n, {}) for n in range(5)]
    write_index(tmp_path, [write_shard(tmp_path, "0.tar", samples)], None)
    server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("fault", ["error", "reset", "short", "stall"])
def test_an_index_is_fetched_from_a_failing_server(server, index_on_server, fault):
    server.faults = [fault] * 3
    assert resolve_split(index_on_server, "train") == index_on_server
    server.faults = [fault, fault, "", fault, "", fault, ""]
    index = ShardIndex.load(index_on_server)
    assert index.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_server_that_never_answers_is_not_taken_for_an_empty_one(server, index_on_server):
    server.always = "error"
    for read in (partial(resolve_split, split="train"), ShardIndex.load):
        with pytest.raises(InputError, match="cannot be read: 5 attempts failed"):
            read(index_on_server)
    server.always, server.files = "", {}
    with pytest.raises(InputError, match="no train shards there"):
        resolve_split(index_on_server, "train")


def test_a_changed_index_on_a_server_is_fetched_anew(server, index_on_server):
    ShardIndex.load(index_on_server)
    requests = server.requests
    ShardIndex.load(index_on_server)
    assert server.requests == requests + 2  # is it there, and index.json; the arrays are here
    server.files = server.files | {INDEX: b"{}"}
    with pytest.raises(InputError, match="cannot be used"):
        ShardIndex.load(index_on_server)


def test_arrays_of_another_index_are_refused(server, index_on_server, monkeypatch, tmp_path):
    name = "index.labels.npy"
    changed = server.files[name][:-1] + b"\1"
    whole, server.files = server.files, server.files | {name: changed}
    for files in (server.files, whole | {name: changed[:-4]}):
        server.files = files
        with pytest.raises(InputError, match="index.labels.npy|of .* bytes"):
            ShardIndex.load(index_on_server)
    server.files = whole
    assert ShardIndex.load(index_on_server).labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        ShardIndex.load(index_on_server)


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "nosuch://x"])
def test_places_that_need_another_package_are_named(url, monkeypatch):
    def lacks(protocol: str) -> None:
        raise ImportError(f"Install what serves {protocol}")

    monkeypatch.setattr("fsspec.get_filesystem_class", lacks)
    protocol = url.partition(":")[0]
    for read in (partial(resolve_split, split="val"), ShardIndex.load, remote.Remote):
        with pytest.raises(InputError, match=f"Install what serves {protocol}") as caught:
            read(url)
        assert (f"xcit-dino[{protocol}]" in str(caught.value)) == (protocol in ("s3", "gs"))
    with pytest.raises(InputError):
        storage.open_source(index_at("here"), LoaderConfig(shard_url=url))


# --------------------------------------------------------------------------- other places to read


def test_pipe_runs_a_command_without_a_shell(tmp_path):
    folder = tmp_path / "a folder; echo"
    folder.mkdir()
    for name, data in SHARDS.items():
        (folder / name).write_bytes(data)
    command = f"pipe:cat '{folder}/{{shard}}'"
    config = LoaderConfig(shard_url=command, cache_dir=tmp_path / "cache")
    assert storage.open_source(index_at("unused"), config).read_many(PLACES) == EXPECTED


@pytest.mark.parametrize(
    "command,reason",
    [("cat /nowhere/{shard}", "code 1"), ("no-such-program {shard}", "no such"),
     ("head -c 100 /dev/zero {shard}", "code 1"), ("echo {shard}", "7 bytes, not 30000")],
)  # fmt: skip
def test_failing_commands_are_reported(tmp_path, command, reason):
    config = LoaderConfig(shard_url=f"pipe:{command}", cache_dir=tmp_path)
    (failure,) = storage.open_source(index_at("unused"), config).read_many(PLACES[:1])
    assert isinstance(failure, Unreadable) and reason in str(failure)


def test_silent_command_is_ended():
    begin = time.monotonic()
    with pytest.raises(OSError, match="wrote nothing"):
        list(remote.pipe_chunks("tail -f /dev/null", "x", 100, 0))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("base", ["file://{}", "memory:/{}"])
@pytest.mark.parametrize("cached", [False, True])
def test_fsspec_file_systems_are_read(tmp_path, base, cached):
    """s3 and gs differ from these in fsspec's class alone."""
    base = base.format(tmp_path)
    filesystem, folder = fsspec.core.url_to_fs(base)
    filesystem.pipe({f"{folder}/{name}": data for name, data in SHARDS.items()})
    config = LoaderConfig(cache_dir=tmp_path / "cache" if cached else None)
    assert storage.open_source(index_at(base), config).read_many(PLACES) == EXPECTED


def test_absurd_sizes_are_not_allocated(tmp_path):
    (tmp_path / "00.tar").write_bytes(b"x")
    source = storage.LocalSource([str(tmp_path / "00.tar")])
    for size in (-1, 1 << 40):
        (failure,) = source.read_many([(0, 0, size)])
        assert isinstance(failure, Unreadable) and "no image" in str(failure)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    index = index_at("s3://bucket")
    for options, words in (
        (dict(shard_url="pipe:cat {shard}"), "--cache_dir"),
        (dict(shard_url="pipe:cat", cache_dir=tmp_path), "{shard}"),
        (dict(cache_dir=tmp_path, cache_gb=1e-6), "--cache_gb"),
    ):
        with pytest.raises(InputError, match=words):
            storage.open_source(index, LoaderConfig(**options))


# ----------------------------------------------------------------------------------------- cache


def slow_chunks(log: Path, name: str, size: int) -> Iterator[bytes]:
    """The shard in pieces, with a line in ``log`` for each download."""
    with log.open("a") as file:
        file.write(f"{name}\n")
    for first in range(0, len(SHARDS[name]), 10_000):
        time.sleep(0.002)
        yield SHARDS[name][first : first + 10_000]


def cache_of(folder: Path, log: Path, shards_kept: float = 100) -> ShardCache:
    index = index_at("")
    return ShardCache(
        folder, partial(slow_chunks, log), index.shards, index.shard_bytes.tolist(), index.sha256,
        source="x", capacity=int(shards_kept * 30_010),
    )  # fmt: skip


def read_all(folder: Path, log: Path, shards_kept: float, seed: int) -> None:
    cache = cache_of(folder, log, shards_kept)
    order = np.random.RandomState(seed).randint(0, 6, 30)
    for shard in order:
        descriptor = cache.open(shard)
        assert os.pread(descriptor, 1 << 20, 0) == SHARDS[f"{shard:02}.tar"]
        os.close(descriptor)


def in_processes(*arguments: tuple) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=read_all, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.slow
def test_processes_share_one_copy_of_each_shard(tmp_path):
    log = tmp_path / "log"
    in_processes(*((tmp_path / "cache", log, 100, seed) for seed in range(3)))
    assert sorted(log.read_text().split()) == list(SHARDS)


def test_cache_stays_within_its_bound_while_processes_read(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    folder.mkdir()
    largest, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            before, sizes = sorted(folder.rglob("[!.]*")), []
            for path in before:
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(path.stat().st_size if path.is_file() else 0)
            # a file that went while another came must not count beside it
            if sorted(folder.rglob("[!.]*")) == before:
                largest[0] = max(largest[0], sum(sizes))

    thread = threading.Thread(target=watch)
    thread.start()
    in_processes(*((folder, log, 3, seed) for seed in range(2)))
    ended.set()
    thread.join()
    assert 2 * 30_000 < largest[0] <= 3 * 30_010
    assert len(log.read_text().split()) > 6


def test_part_left_by_a_killed_process_is_replaced(tmp_path):
    cache = cache_of(tmp_path / "cache", tmp_path / "log")
    part = cache.home / "00.tar.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half a sha")
    assert cache.fetch(0).read_bytes() == SHARDS["00.tar"] and not part.exists()


def test_full_disc_is_one_unreadable_shard(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unreadable, match="No space left"):
        cache_of(tmp_path, tmp_path / "log").open(0)


def test_read_ahead_copies_this_window_and_the_next_one_only(tmp_path):
    cache = cache_of(tmp_path / "cache", tmp_path / "log")
    plan = Plan(np.full(6, 10), seed=0, batch_size=5, window=2)

    def copies() -> set[str]:
        return {path.name for path in cache.home.glob("*.tar")} if cache.home.exists() else set()

    def shards(*windows: int) -> set[str]:
        return {f"{shard:02}.tar" for w in windows for shard in plan.shards_of_window(0, w)}

    with ReadAhead(cache, plan) as ahead:
        for step, expected in ((0, shards(0, 1)), (4, shards(0, 1, 2))):
            ahead.reached(step)
            deadline = time.monotonic() + 10
            while copies() < expected and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert copies() == expected
