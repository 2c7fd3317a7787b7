"""What the images of a set are: found in their headers, or picked with ``--pixels``.

Sets whose images all are 8-bit in gray or color are 8-bit RGB. Any other image makes it necessary
to look at all of them: one kind in all is the set's, several are refused with the option that
picks one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from xcit_dino.data.decode import rgb
from xcit_dino.data.decode.extras import MissingLibrary
from xcit_dino.data.decode.native import Wanted, family_of, open_native
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.config import CheckConfig, MakeConfig
from xcit_dino.data.shards.index import printable
from xcit_dino.errors import InputError
from xcit_dino.progress import progress

LOOKED_AT = 1000
CHUNK = 200  # images a task
RGB = RGB8.name
FOUR = "8-bit TIFF of 4 channels"


@dataclass(frozen=True)
class PixelOptions:
    """What both commands that make an index are told of the pixels."""

    pixels: str
    page: int | None
    nodata: float | None
    max_pixels: int | None

    @staticmethod
    def of(config: MakeConfig | CheckConfig) -> PixelOptions:
        return PixelOptions(config.pixels, config.page, config.nodata, config.max_pixels)

    @property
    def form(self) -> PixelFormat:
        """As far as it is known before the images are measured."""
        if self.pixels in ("auto", RGB):
            return PixelFormat(max_pixels=self.max_pixels)
        channels, dtype = self.pixels.split("x")
        return PixelFormat(int(channels), dtype, self.page, self.nodata, self.max_pixels)


@dataclass
class Kinds:
    """How many images there are of each kind, with the name of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, other: Kinds) -> None:
        self.counts += other.counts
        self.examples = other.examples | self.examples

    @property
    def names(self) -> list[str]:
        return [kind for kind, _ in self.counts.most_common() if kind != FOUR]


def find_kind(
    images: Sequence[Image], options: PixelOptions, num_workers: int | None
) -> tuple[str, list[str]]:
    """(``--pixels`` that fits the set, lines on what was decided).

    Raises:
        InputError: several kinds, or a library that lacks.
    """
    if options.pixels != "auto":
        return options.pixels, []
    evenly = np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).astype(np.int64)
    found = Kinds()
    for n in evenly.tolist():
        found.add(_kinds([images[n]], options))
        if found.names not in ([], [RGB]):
            break
    else:
        return RGB, _four_bands(found)
    found = Kinds()
    tasks = _Chunks(images, options)
    with progress("Look at the kind of each image", len(images), "images") as bar:
        for part in map_processes(_look, tasks, num_workers, bar):
            found.add(part)
    if len(found.names) > 1:
        listed = ", ".join(
            f"{found.counts[kind]:,} {kind} ({found.examples[kind]})" for kind in found.names
        )
        raise InputError(
            f"images of several kinds: {listed}; {_picks(found.names)}, --pixels {RGB} turns all "
            "into 8-bit RGB"
        )
    kind = found.names[0]
    return kind, [f"pixels: {kind} (--pixels {RGB} turns them into 8-bit RGB instead)"]


def _picks(names: list[str]) -> str:
    """Which options take some of several kinds as they are: one kind alone, or, of one number of
    channels, all as float32, which holds the others exactly."""
    natives = [name for name in names if name != RGB]
    wide = f"{natives[0].partition('x')[0]}xfloat32"
    alone = next((name for name in natives if name != wide), wide)
    takes = f"--pixels {alone} takes those alone"
    same = {name.partition("x")[0] for name in natives} == {wide.partition("x")[0]}
    if same and len(natives) == len(names):
        return f"{takes}, --pixels {wide} all of them without loss"
    return takes


def _four_bands(found: Kinds) -> list[str]:
    if not found.counts[FOUR]:
        return []
    return [f"pixels: {FOUR}, of which three are used as RGB; --pixels 4xuint8 keeps all"]


class _Chunks(Sequence[tuple[list[Image], PixelOptions]]):
    """The images of a set, some hundred a task."""

    def __init__(self, images: Sequence[Image], options: PixelOptions) -> None:
        self.images, self.options = images, options

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, task: int) -> tuple[list[Image], PixelOptions]:  # type: ignore[override]
        if task >= len(self):
            raise IndexError
        start = task * CHUNK
        stop = min(start + CHUNK, len(self.images))
        return [self.images[n] for n in range(start, stop)], self.options


def _look(task: tuple[list[Image], PixelOptions], advance: Advance) -> Kinds:
    found = _kinds(*task)
    advance(len(task[0]))
    return found


def _kinds(images: list[Image], options: PixelOptions) -> Kinds:
    """Unreadable images are of no kind: packing lists them with the reason."""
    found = Kinds()
    wanted = Wanted(options.page, None, options.max_pixels or MAX_PIXELS)
    for image in images:
        try:
            raw = read_image(image)
            kind = kind_of(raw, wanted)
            if kind == RGB and _has_four_bands(raw):
                found.counts[FOUR] += 1
        except MissingLibrary as error:
            raise InputError(f"{printable(image.name)}: {error}") from None
        except BadImage:
            continue
        found.counts[kind] += 1
        found.examples.setdefault(kind, printable(image.name))
    return found


def kind_of(raw: bytes, wanted: Wanted) -> str:
    """``rgb8`` for 8 bits in gray or color, else ``CxDTYPE``.

    Raises:
        BadImage: no image, or damaged.
    """
    family = family_of(raw[:132])
    if family is None:
        if not rgb.read_header(raw, wanted.max_pixels).deep:
            return RGB
    if family == "tiff" and wanted.page is None and _pillow_takes(raw):
        return RGB
    header = open_native(raw, wanted)
    is_rgb = header.dtype == "uint8" and header.channels in (1, 3) and header.pages == 1
    paged = wanted.page is not None and family in ("tiff", "dicom")
    return RGB if is_rgb and not paged else header.kind


def _pillow_takes(raw: bytes) -> bool:
    """Whether Pillow turns a TIFF into RGB and loses nothing by it (but alpha and profiles)."""
    try:
        image = rgb.open_image(raw)
        deep = rgb.is_deep(raw, image) or image.mode.startswith(("I", "F"))
        return not deep and getattr(image, "n_frames", 1) == 1
    except Exception:  # Pillow lacks much, and the native reader decides
        return False


def _has_four_bands(raw: bytes) -> bool:
    """A TIFF in RGB whose fourth channel is not alpha: red, green, blue and infrared."""
    if family_of(raw[:132]) != "tiff":
        return False
    image = rgb.open_image(raw)
    return image.mode.startswith("RGB") and rgb.tag_of(image, 338) == 0


def lines_on(form: PixelFormat) -> list[str]:
    """What was measured, in a line, and whether values lack."""
    found = form.statistics
    if found is None:
        return []
    low, high = min(found.minimum), max(found.maximum)
    used = ""
    if form.dtype in ("uint8", "uint16"):
        bits = max(int(high).bit_length(), 1)
        used = f" ({bits} of {form.numpy.itemsize * 8} bits in use)"
    lines = [f"pixels: {form.name}, values from {low:,.7g} to {high:,.7g}{used}"]
    if share := max(found.invalid):
        whole = sum(found.invalid) / len(found.invalid)
        lines.append(
            f"pixels: {whole:.3%} of the values are invalid (NaN or no-data; of the worst channel "
            f"{share:.3%}) and become the channel's mean"
        )
    if form.max_pixels:
        lines.append(f"pixels: images of up to {form.max_pixels:,} pixels are allowed")
    return lines


def with_limit(form: PixelFormat, largest: int) -> PixelFormat:
    """The format that an index stores: a limit only where an image needs it."""
    return replace(form, max_pixels=largest if largest > MAX_PIXELS else None)
