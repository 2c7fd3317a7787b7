"""Videos as folders of frames, with masks of some of them: DAVIS 2017, or any folders.

What cannot be propagated (a frame is missing, no mask of the first frame, another size, no object)
is a :class:`BadVideo`, named with its reason.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.errors import InputError, one_line
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures.false_color import is_plain
from xcit_dino.eval.pictures.media import SUFFIXES, read_frames, read_values

DAVIS_FRAMES, DAVIS_MASKS = "JPEGImages/480p", "Annotations/480p"
DAVIS_LIST = "ImageSets/2017/val.txt"
VOID = 255  # a pixel that belongs to nothing
NAMED = 5  # missing frames named in a message
MODES = ("P", "L", "1", "I;16", "I")  # of masks, as Pillow has them
Mask = NDArray[np.uint8]


class BadVideo(Exception):
    """A video that is skipped; the text is the reason."""


@dataclass(frozen=True)
class Video:
    """Frames in order, and what is known of them."""

    name: str
    frames: tuple[Path, ...]
    masks: dict[str, Path]
    """Stem of a frame -> its mask; the first frame has one."""

    def checksum(self) -> str:
        """SHA-256 of all frames and masks."""
        found = hashlib.sha256(self.name.encode())
        for path in (*self.frames, *self.masks.values()):
            found.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()


# -- finding them


def find_videos(folder: Path, masks: Path | None) -> tuple[list[Video], dict[str, str]]:
    """All videos of a folder, and of those that cannot be used the reasons by name.

    Raises:
        InputError: there is none; names the option.
    """
    if not folder.is_dir():
        raise InputError(f"--videos {folder}: no such folder")
    if (folder / "JPEGImages").is_dir():
        if masks is not None:
            raise InputError("--masks: not beside DAVIS 2017, which has its own; leave it out")
        places = davis_places(folder)
    else:
        places = plain_places(folder, masks)
    videos, reasons = [], dict[str, str]()
    for name, (frames, known) in places.items():
        try:
            videos.append(open_video(name, frames, known))
        except BadVideo as reason:
            reasons[name] = str(reason)
    return videos, reasons


def davis_places(root: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> folders of frames and masks of DAVIS 2017's validation videos."""
    listed = root / DAVIS_LIST
    if not listed.is_file():
        raise InputError(f"--videos {root}: {DAVIS_LIST} is missing; unpack DAVIS 2017 there")
    names = list(dict.fromkeys(listed.read_text().split()))
    if bad := [name for name in names if Path(name).name != name or name.startswith(".")]:
        raise InputError(f"--videos {root}: {DAVIS_LIST} names {bad[0]!r}, not a folder")
    if not names:
        raise InputError(f"--videos {root}: {DAVIS_LIST} names no video")
    return {name: (root / DAVIS_FRAMES / name, root / DAVIS_MASKS / name) for name in names}


def plain_places(folder: Path, masks: Path | None) -> dict[str, tuple[Path, Path]]:
    """The same of a folder of frames, or of a folder of such folders."""
    if masks is None:
        raise InputError(
            f"--masks: needed, as {folder} is not DAVIS 2017 (no JPEGImages in it): name the mask "
            "of the first frame, or a folder of masks"
        )
    if not masks.exists():
        raise InputError(f"--masks {masks}: no such file or folder")
    if images_in(folder):
        return {folder.resolve().name or "video": (folder, masks)}
    inner = sorted(each for each in folders_in(folder) if not each.samefile(masks))
    if not any(images_in(each) for each in inner):
        raise InputError(f"--videos {folder}: holds no frames; known are {' '.join(SUFFIXES)}")
    if masks.is_file():
        raise InputError(
            f"--masks {masks}: {folder} holds several videos; name a folder with a folder of masks "
            "for each"
        )
    # what has no frames, or masks alone, is named as a video that cannot be used
    names = sorted({each.name for each in (*inner, *folders_in(masks))})
    return {name: (folder / name, masks / name) for name in names}


def folders_in(folder: Path) -> set[Path]:
    """Folders inside a folder, without hidden ones."""
    return {each for each in folder.iterdir() if each.is_dir() and each.name[0] != "."}


def images_in(folder: Path) -> list[Path]:
    """Images of a folder in the order of their names, numbers by their value."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted((path for path in found if path.is_file()), key=in_order)


def in_order(path: Path) -> tuple[list[Any], str]:
    """``frame10.jpg`` comes after ``frame9.jpg``."""
    parts = re.split(r"(\d+)", path.stem)
    return [int(part) if part.isdecimal() else part for part in parts], path.suffix


def open_video(name: str, frames: Path, masks: Path) -> Video:
    """Check a video's files by their names.

    Args:
        name: of the video.
        frames: their folder.
        masks: theirs, or the file of the first one.

    Raises:
        BadVideo: frames or the first mask are missing.
    """
    paths = images_in(frames) if frames.is_dir() else []
    if len(paths) < 2:
        raise BadVideo(f"{frames} holds {len(paths)} frames; two are needed")
    stems = [path.stem for path in paths]
    if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
        raise BadVideo(f"{frames} holds frame {twice[0]} twice, in different formats")
    if masks.is_dir():
        known = {path.stem: path for path in images_in(masks)}
    else:
        known = {stems[0]: masks} if masks.is_file() else {}
    if missing := sorted({*gaps(stems), *(stem for stem in known if stem not in stems)}):
        more = ", ..." if len(missing) > NAMED else ""
        raise BadVideo(
            f"{len(missing)} frames are missing in {frames}: {', '.join(missing[:NAMED])}{more}"
        )
    if stems[0] not in known:
        raise BadVideo(f"{masks} holds no mask of the first frame, {stems[0]}.png")
    return Video(name, tuple(paths), {stem: known[stem] for stem in stems if stem in known})


def gaps(stems: list[str]) -> list[str]:
    """Names that are missing in a numbered sequence, by its most frequent step; none where the
    names are not numbered alike."""
    found = [re.fullmatch(r"(.*?)(\d+)", stem) for stem in stems]
    if None in found or len({match[1] for match in found if match}) > 1:
        return []
    numbers = [int(match[2]) for match in found if match]
    step = Counter(np.diff(numbers).tolist()).most_common(1)[0][0]
    match = found[0]
    assert match is not None
    width = len(match[2])
    absent = sorted(set(range(numbers[0], numbers[-1], step)) - set(numbers)) if step > 0 else []
    return [f"{match[1]}{number:0{width}d}" for number in absent]


# -- reading them


def read_pixels(video: Video, context: Context) -> Iterator[NDArray[Any]]:
    """Yield the frames [H, W, C] in their own units, all of one size.

    Raises:
        BadVideo: a frame cannot be read, or has another size.
    """
    size = None
    for path in video.frames:
        try:
            read = read_frames(path) if is_plain(context) else read_values(path, context)
            pixels, _ = next(iter(read))
        except (BadImage, OSError) as reason:
            raise BadVideo(f"{path.name} cannot be read ({one_line(reason, 120)})") from reason
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            raise BadVideo(f"{path.name} is {sides(pixels)}, the frames before it {sides_of(size)}")
        yield pixels


def read_mask(path: Path, size: tuple[int, int], whole: bool = False) -> Mask:
    """Object numbers [H, W], 0 for the background and for pixels that belong to nothing (255).

    Args:
        path: an indexed or gray image.
        size: of its frame.
        whole: 255 is an object, the number of which is 1.

    Raises:
        BadVideo: it cannot be read, has another size, or is no such image.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise BadVideo(
                    f"mask {path.name} is an image in mode {image.mode}; save it indexed or gray, "
                    "with an object's number in each of its pixels"
                )
            # Pillow expands masks of one bit to 0 and 255 only where it converts them
            mask = np.asarray(image.convert("L") if image.mode == "1" else image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as reason:
        raise BadVideo(f"mask {path.name} cannot be read ({one_line(reason, 120)})") from reason
    if mask.shape != size:
        raise BadVideo(f"mask {path.name} is {sides(mask)}, its frame {sides_of(size)}")
    if mask.min() < 0 or mask.max() > VOID:
        raise BadVideo(f"mask {path.name} has the value {mask.max()}; objects are 1 to 254")
    mask = mask.astype(np.uint8)
    if whole:
        return (mask == VOID).astype(np.uint8)
    return np.where(mask == VOID, np.uint8(0), mask)


def is_whole(path: Path) -> bool:
    """Whether the only values of a mask are 0 and 255: one object, in black and white.

    Raises:
        BadVideo: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            values = np.unique(np.asarray(image.convert("L") if image.mode == "1" else image))
    except (OSError, SyntaxError, Image.DecompressionBombError) as reason:
        raise BadVideo(f"mask {path.name} cannot be read ({one_line(reason, 120)})") from reason
    return VOID in values and set(values.tolist()) <= {0, VOID}


def sides(array: NDArray[Any]) -> str:
    """``854 x 480`` of an array [480, 854, ...]."""
    return sides_of(array.shape[:2])


def sides_of(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
