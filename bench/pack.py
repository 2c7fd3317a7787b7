"""How fast images are packed and shards indexed: ``python bench/pack.py --data PATH``.

PATH is a tar of photographs. Small files: 32-pixel JPEGs in class folders, packed in this process
and measured in CPU time, so that other load on the machine has little influence. Foreign shards:
the photographs with captions and ``.json``, as img2dataset writes them, indexed alternately with a
plain read of the same bytes; from the page cache, and after dropping them from it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from rich.console import Console
from rich.table import Table

from xcit_dino.data.pack.demo import render
from xcit_dino.data.pack.make import make
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.scan import IMAGE_EXTENSIONS, scan_shard

Row = tuple[str, str]
CHUNK = 1 << 20


def rows(data: Path, *, files: int = 5000, shards: int = 4, rounds: int = 5) -> Iterator[Row]:
    """What is measured, and the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_files(folder / "small", files)
        for verify in (True, False):
            rate = packing_rate(folder / "small", folder, files, verify, rounds)
            what = "decoded" if verify else "header read"
            yield f"pack small files, each {what}", f"{rate:,.0f} images/s per core"
        samples = write_foreign(folder / "foreign", data, shards)
        for cold in (False, True):
            index, computing, read, size = indexing_times(folder / "foreign", cold, rounds)
            clock, reading, core = (size / t / 1e6 for t in (index, read, computing))
            yield (
                f"index foreign shards, {'from storage' if cold else 'in the page cache'}",
                f"{clock:,.0f} MB/s by the clock (only read: {reading:,.0f}); {core:,.0f} MB/s, "
                f"{samples / computing:,.0f} images/s per core",
            )


def write_small_files(folder: Path, count: int) -> None:
    images, labels = render(np.arange(count), "train", 32, seed=0)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90))


def packing_rate(src: Path, folder: Path, files: int, verify: bool, rounds: int) -> float:
    """Images per second of CPU time, median."""
    rates = []
    for number in range(rounds):
        dst = folder / f"packed-{verify}-{number}"
        begin = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make(MakeConfig(src=str(src), dst=dst, num_workers=1, verify=verify))
        rates.append(files / (time.process_time() - begin))
    return statistics.median(rates)


def write_foreign(folder: Path, data: Path, shards: int) -> int:
    """Shards in img2dataset's layout; returns the number of samples."""
    folder.mkdir()
    with tarfile.open(data) as tar:
        named = [m for m in tar if Path(m.name).suffix[1:].lower() in IMAGE_EXTENSIONS]
        found = (tar.extractfile(member) for member in named)
        images = [file.read() for file in found if file is not None]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number, image in enumerate(images):
                for kind, content in (("jpg", image), ("json", b"{}" * 300), ("txt", b"a photo")):
                    info = tarfile.TarInfo(f"{shard:05}{number:04}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return shards * len(images)


def indexing_times(folder: Path, cold: bool, rounds: int) -> tuple[float, float, float, int]:
    """Medians of the seconds by the clock and of processor time to index all shards, and by the
    clock to read them; their bytes."""
    paths = sorted(folder.iterdir())

    def index() -> None:
        for path in paths:
            scan_shard(folder, path.name, with_sha256=False)

    def read() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.read(CHUNK):
                    pass

    times = [(*timed(index, paths, cold), timed(read, paths, cold)[0]) for _ in range(rounds)]
    clock, computing, reading = (statistics.median(column) for column in zip(*times, strict=True))
    return clock, computing, reading, sum(path.stat().st_size for path in paths)


def timed(work: Callable[[], None], paths: list[Path], cold: bool) -> tuple[float, float]:
    """Seconds by the clock and of processor time; ``cold`` drops the files from the page cache
    before."""
    for path in paths if cold else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, computed = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tar of photographs")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = Table("packing and indexing", "", title=f"load {os.getloadavg()[0]:.1f}")
    for row in rows(args.data, rounds=args.rounds):
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
