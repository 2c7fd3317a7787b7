"""Videos, a frame at a time, by PyAV where it is installed; this project does not require it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.errors import InputError

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
USUAL_RATE = Fraction(25)  # where a file has none
Pixels = NDArray[np.uint8]


class Reader:
    """``for frame in reader``: RGB [H, W, 3]; ``rate``: frames a second; ``count``: frames, 0 if
    unknown."""

    def __init__(self, container: Any):
        self.container = container
        self.stream = container.streams.video[0]
        self.rate = self.stream.average_rate or USUAL_RATE
        self.count: int = self.stream.frames

    def __iter__(self) -> Iterator[Pixels]:
        for frame in self.container.decode(self.stream):
            yield frame.to_ndarray(format="rgb24")


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a video.

    Raises:
        InputError: PyAV is not installed.
        BadImage: no video, or a damaged one, also while frames are read.
    """
    av = _library(path)
    try:
        with av.open(str(path)) as container:
            yield Reader(container)
    except (av.FFmpegError, IndexError) as error:
        raise BadImage(f"no video that can be read ({error})") from error


class Writer:
    """H.264 in MP4; all frames have the size of the first, both sides even."""

    def __init__(self, av: Any, container: Any, rate: Fraction):
        self.av, self.container = av, container
        self.stream = container.add_stream("libx264", rate=rate)
        self.stream.pix_fmt = "yuv420p"  # what every player shows
        self.began = False

    def write(self, frame: Pixels) -> None:
        """Append RGB [H, W, 3]."""
        if not self.began:
            self.stream.height, self.stream.width = frame.shape[:2]
            self.began = True
        self._mux(self.av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self._mux(None)

    def _mux(self, frame: Any) -> None:
        for packet in self.stream.encode(frame):
            self.container.mux(packet)


@contextmanager
def writing(path: Path, rate: Fraction) -> Iterator[Writer]:
    """Write a new video, renamed to ``path`` once it is complete.

    Raises:
        InputError: PyAV is not installed.
    """
    av = _library(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            writer = Writer(av, container, rate)
            yield writer
            writer.finish()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _library(path: Path) -> Any:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{path}: videos need PyAV (pip install av); or make a folder of frames, with: "
            "ffmpeg -i VIDEO frames/%05d.jpg, and a video of the maps: "
            "ffmpeg -i DST/%05d/all.png maps.mp4"
        ) from error
    return av
