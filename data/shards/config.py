"""Options of the commands ``shards make``, ``shards check`` and ``shards demo``. No torch here:
``--help`` reads these classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import InputError, within
from xcit_dino.paths import Location

PIXELS = re.compile(r"auto|rgb8|([1-9][0-9]{0,2})x(uint8|uint16|int16|float32)")


def _check_pixels(config: MakeConfig | CheckConfig) -> None:
    """The options on what the images are."""
    from xcit_dino.data.pixels import DTYPES, MAX_CHANNELS

    within(config, 0, 1e6, "page")
    within(config, -3.5e38, 3.5e38, "nodata")
    within(config, 1, 1e10, "max_pixels")
    match = PIXELS.fullmatch(config.pixels)
    if match is None or int(match[1] or 1) > MAX_CHANNELS:
        raise InputError(
            f"--pixels {config.pixels}: auto, rgb8, or channels (1 to {MAX_CHANNELS}) and type "
            f"({', '.join(DTYPES)}), such as 13xuint16"
        )
    for name in ("page", "nodata"):
        if config.pixels == "rgb8" and getattr(config, name) is not None:
            raise InputError(f"--{name}: has no effect with --pixels rgb8")


def _check_tiles(config: MakeConfig) -> None:
    """The options on large images."""
    within(config, 8, 8192, "tile")
    within(config, 1, 1 << 20, "stride")
    within(config, 0, 1, "min_foreground")
    if config.tile is None:
        for name, default in (("stride", None), ("min_foreground", 0.0), ("background", "auto")):
            if getattr(config, name) != default:
                raise InputError(f"--{name}: nothing is cut into tiles without --tile")
        return
    if config.background != "auto" and not config.min_foreground:
        raise InputError("--background: no tile is left out without --min_foreground")
    for name in ("bits", "masks", "boxes", "multi_labels", "values"):
        if getattr(config, name):
            raise InputError(f"--{name}: is not available for tiles; leave it out, or --tile")


@dataclass(frozen=True)
class MakeConfig:
    """``xcit-dino shards make SRC DST``: images from anywhere into WebDataset shards."""

    src: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = tyro.MISSING
    """Folder, tar, tar.gz or zip of images (in class folders, or flat); a .csv or .jsonl of
    path,label; Parquet or Arrow files with images in a column, such as a Hugging Face data set on
    disk; the ILSVRC2012 archives or the folder that holds them; or the name of a torchvision data
    set: cifar10, cifar100, imagenette, flowers102."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = tyro.MISSING
    """Folder for the shards. Sources with train and val parts fill DST/train and DST/val."""
    split: str | None = None
    """Pack a source of one split into DST/SPLIT (train, val, ...), whatever its name."""
    splits: tuple[str, ...] = ()
    """Which folders are the splits: none (all are classes), or SPLIT=FOLDER ..., such as
    train=Training val=Testing; images elsewhere are skipped. A * stands for any folder and stays
    in the names: train=*/train for CLASS/train/x.jpg. FOLDER may also be a text file that names an
    image per line, with or without folder and suffix: train=ImageSets/Main/train.txt. By default
    names such as train, Testing, seg_train, valid or dev are recognized."""
    val_fraction: float = 0.0
    """Share of the images of a source without splits that becomes val, from 0 to 0.9: of each class
    at random, or whole groups."""
    group_column: str | None = None
    """Column of a list (SRC or --labels), such as a patient's number: images of one value all go to
    train or all to val. Of a source with splits it is checked."""
    labels: Path | None = None
    """Labels of a flat source: the ILSVRC2012 devkit, LOC_val_solution.csv, any CSV, TSV or JSONL
    of name,label, or a text file with one label a line in the order of the file names. folders:
    the folders' names, even where there is only one; none: no labels, whatever the folders."""
    label_column: str | None = None
    """Column of a list that holds the label: its name, or its number from 1 where there is no
    header. Needed where several columns could be."""
    image_key: str | None = None
    """Column of Parquet or Arrow files that holds the images. Needed where several do."""
    label_map: Path | None = None
    """Which classes, and their numbers: a text file of class names (line number = label), or JSON
    {"class name": number}. Classes that it does not name are skipped: so a subset is packed."""
    masks: tuple[str, ...] = ()
    """Folders of masks (PNG, BMP, GIF or TIFF), here or in SRC, each called like its image: for
    segmentation. They are stored beside the images, as class numbers."""
    mask_classes: str | None = None
    """What the values of masks mean: ade20k, camvid, cityscapes, cityscapes_train_ids, voc, or a
    file: text with one class name per line, the first for value 0, or JSON {"road": 0, "car":
    [1, 2]}, {"road": "#804080"}. Images with other values are skipped and listed."""
    mask_ignore: tuple[int, ...] = ()
    """Values of pixels that count neither in training nor in evaluation, beside 255 and those of
    the convention."""
    boxes: tuple[Path, ...] = ()
    """Boxes of the images: COCO's JSON files, or folders of Pascal VOC's XML. For detection."""
    multi_labels: Path | None = None
    """Table of images that have several labels each, or none: names of images, and a column with
    the labels, separated by | ; or , (or by spaces), or a column of 0 and 1 for each class."""
    values: Path | None = None
    """Table of numbers that were measured of the images, for regression: names of images, and a
    column for each quantity, all that hold numbers or --label_column."""
    exclude: Path | None = None
    """Images to leave out: a list of their paths, with their split where a path occurs in several,
    such as the duplicates.csv of `xcit-dino duplicates`, or a text with a path a line."""
    shard_size: int = 10_000
    """Images in a shard at most."""
    shard_bytes: float = 1e9
    """Bytes of source images in a shard at most (1e9 = 1 GB)."""
    tile: int | None = None
    """Cut the images, which are large scenes or slides, into square tiles with sides of this many
    pixels; each knows its place in its scene. Scenes are read in parts, in bounded memory."""
    stride: int | None = None
    """Pixels from one tile to the next (default: --tile, so that they do not overlap). The last
    tile of a row or column ends at the edge."""
    min_foreground: float = 0.0
    """Share of a tile's pixels, from 0 to 1, that must be neither no-data nor background; other
    tiles are left out and counted."""
    background: Literal["auto", "slide", "nodata"] = "auto"
    """What is background: slide: whatever has less saturation than Otsu's threshold of the scene,
    such as glass; nodata: only no-data, transparent pixels, and 0 in all channels of unsigned
    integers without a no-data value. auto: slide for files of slide scanners and 8-bit RGB with
    much white, which is printed; nodata for others."""
    resize: int | None = None
    """Shrink images whose shorter side is longer than this to it (bicubic), as JPEG, or, of other
    kinds than 8-bit RGB, as .npy without loss; smaller images and all without this option stay as
    they are, byte for byte."""
    bits: int | None = None
    """How many bits the values of 16-bit images really use (8 to 16, such as 12): these are stored
    as 8-bit PNG with all their contrast. By default they stay as they are, and the upper 8 of 16
    bits are used."""
    pixels: str = "auto"
    """What the images are: rgb8 (8-bit RGB, whatever they are), or channels and type, such as
    1xuint16, 13xuint16, 1xint16 or 3xfloat32; images of other kinds are skipped and listed. auto
    finds it in their headers: 8-bit gray and color make rgb8, one other kind makes that."""
    page: int | None = None
    """Page (from 0) of every multi-page TIFF or DICOM; by default the pages are channels."""
    nodata: float | None = None
    """Pixels of this value have none and become the channel's mean; by default those of the value
    that a GeoTIFF names, beside NaN."""
    max_pixels: int | None = None
    """Pixels of an image at most, where the default of 89,478,485 is too small."""
    quality: int = 90
    """JPEG quality of resized images (4:2:0 chroma below 90, full chroma from 90 on)."""
    shuffle: bool = True
    """Shuffle the images over all shards; training, which shuffles locally, relies on it."""
    seed: int = 0
    """Seed of the shuffling and of --val_fraction."""
    verify: bool = True
    """Decode every image once and skip what cannot be decoded (listed in quarantine.jsonl)."""
    num_workers: int | None = None
    """Processes; by default one per core. The shards do not depend on it."""
    root: Path | None = None
    """Folder that holds a torchvision data set or will hold it (default: DST/..)."""
    download: bool = False
    """Download a torchvision data set that --root does not hold."""

    def __post_init__(self) -> None:
        within(self, 1, 1e9, "shard_size")
        within(self, 0, 0.9, "val_fraction")
        within(self, 1e3, 1e15, "shard_bytes")
        within(self, 1, 16384, "resize")
        within(self, 8, 16, "bits")
        within(self, 1, 100, "quality")
        within(self, 1, 4096, "num_workers")
        within(self, 0, 2**63 - 1, "seed")
        if self.split is not None and not self.split.isidentifier():
            raise InputError(f"--split must be a plain name like train or val, got {self.split!r}")
        within(self, 0, 65535, "mask_ignore")
        if not self.masks:
            for name in ("mask_classes", "mask_ignore"):
                if getattr(self, name):
                    raise InputError(f"--{name}: there are no --masks")
        if self.masks and self.boxes:
            raise InputError("--masks and --boxes: an image has one target; pack two sets")
        if (self.masks or self.boxes) and self.resize is not None:
            raise InputError(
                f"--resize: would shrink images, not their {'masks' if self.masks else 'boxes'}; "
                "leave it out (training and evaluation resize both)"
            )
        _check_pixels(self)
        _check_tiles(self)
        if self.bits is not None and self.pixels not in ("auto", "rgb8"):
            raise InputError("--bits: makes 8-bit images; without it --pixels keeps all bits")
        if self.quality != 90 and self.pixels not in ("auto", "rgb8"):
            raise InputError(f"--quality: images of {self.pixels} are stored without loss")
        if self.quality != 90 and self.resize is None:
            raise InputError("--quality: images are not re-encoded without --resize")
        if self.seed and not (self.shuffle or self.val_fraction):
            raise InputError("--seed: nothing is random with --shuffle false")
        if self.val_fraction and self.split is not None:
            raise InputError(f"--val_fraction: with --split {self.split} there is one split only")


@dataclass(frozen=True)
class CheckConfig:
    """``xcit-dino shards check DST``: verify shards, or index those without an index."""

    dst: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = tyro.MISSING
    """Folder of shards, or of train/ and val/."""
    sample: int | None = None
    """Decode that many images, spread evenly, instead of all."""
    rebuild: bool = False
    """Build the index again from the shards."""
    image_key: str | None = None
    """Extension of the members that are the images, where a sample has several: png, left.jpg."""
    label_key: str | None = None
    """Members that hold the labels of foreign shards: cls (the default), txt, or json:FIELD for a
    field of a .json (json:meta.class for an inner one). Words are classes in alphabetical order, or
    in that of classes.txt."""
    hash: bool = False
    """Put checksums of foreign shards into the index (reads every byte)."""
    pixels: str = "auto"
    """For a new index: what the images are: rgb8 (8-bit RGB, whatever they are), or channels and
    type, such as 1xuint16, 13xuint16, 1xint16 or 3xfloat32; images of other kinds are problems.
    auto finds it in their headers: 8-bit gray and color make rgb8, one other kind makes that."""
    page: int | None = None
    """Page (from 0) of every multi-page TIFF or DICOM; by default the pages are channels."""
    nodata: float | None = None
    """Pixels of this value have none and become the channel's mean; by default those of the value
    that a GeoTIFF names, beside NaN."""
    max_pixels: int | None = None
    """Pixels of an image at most, where the default of 89,478,485 is too small."""
    num_workers: int | None = None
    """Processes; by default one per core."""
    nodes: int | None = None
    """Preflight: nodes of the planned run. This or --gpus prints whether the data fit it."""
    gpus: int | None = None
    """Preflight: GPUs a node."""
    workers: int = 10
    """Preflight: loader processes a GPU."""
    batch_size_per_gpu: int = 64
    """Preflight: images per GPU and micro-batch."""
    images_per_second: float | None = None
    """Preflight: images per second that a GPU trains on, to compute the storage bandwidth."""

    def __post_init__(self) -> None:
        within(self, 1, 1e12, "sample")
        within(self, 1, 4096, "num_workers")
        within(self, 1, 1e6, "nodes", "gpus", "batch_size_per_gpu")
        within(self, 0, 4096, "workers")
        within(self, 1e-3, 1e9, "images_per_second")
        _check_pixels(self)
        if self.nodes is None and self.gpus is None:
            defaults = {"workers": 10, "batch_size_per_gpu": 64, "images_per_second": None}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise InputError(f"--{name}: is for the preflight; add --nodes or --gpus")


@dataclass(frozen=True)
class DemoConfig:
    """``xcit-dino shards demo DST``: the built-in labeled images, no download."""

    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = tyro.MISSING
    """Folder that gets train/ and val/ shards."""
    train: int = 3000
    """Training images."""
    val: int = 1000
    """Validation images."""
    size: int = 32
    """Side of the images in pixels, 16 to 512."""
    seed: int = 0
    """Other seeds draw other images of the same classes."""

    def __post_init__(self) -> None:
        within(self, 16, 512, "size")
        within(self, 1, 1e8, "train", "val")
        within(self, 0, 2**63 - 1, "seed")
