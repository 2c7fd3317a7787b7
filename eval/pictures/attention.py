"""``xcit-dino attention``: class attention, one map per head, overlaid on photos (DINO
``visualize_attention.py``; XCiT's class attention, arXiv 2106.09681, figure 1).

For ``photo.jpg``: ``DST/photo/head-0.png`` ..., ``mean.png`` and ``all.png``, the photo and every
map side by side (``DST/photo.jpg/`` if there is also a ``photo.png``). For an animated GIF or
WebP: ``DST/clip.gif``, ``all.png`` of every frame; for a video: ``DST/video.mp4``. With ``--tile``
images are large scenes, read in parts; see ``scene_attention.py``.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from xcit_dino.data import video
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage, Scratch, decode, read_header
from xcit_dino.data.native.crops import resized_values
from xcit_dino.data.native.single import values_of_file
from xcit_dino.errors import InputError
from xcit_dino.eval.config import AttentionConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures import false_color, scene_attention
from xcit_dino.eval.target import resolve_without_shards
from xcit_dino.files import check_writable, unfinished_folder, write_atomic
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.xcit import XCiT
from xcit_dino.models.zoo import create_model
from xcit_dino.progress import track
from xcit_dino.train.distributed import dist

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".npy",
    ".dcm", ".heic", ".avif", ".jp2", ".jxl",
)  # fmt: skip
ANIMATED = (".gif", ".webp")
ENDINGS = ("", ".gif", ".mp4")  # of outputs: a folder, an animation, a video
WRITTEN = re.compile(r"(head-\d+|mean|all)\.png|attention\.npy")  # in the folder
COLORS = np.array(  # dark to bright: black, violet, red, orange, yellow, white (like "inferno")
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (246, 215, 70), (252, 255, 164)]
)
OPACITY = 0.65
Pixels = NDArray[np.uint8]
Values = NDArray[Any]


def run(config: AttentionConfig) -> None:
    """Write the maps of a photo, an animation, a video or a folder of them.

    Raises:
        InputError: no weights, not an XCiT, or nothing readable.
    """
    files = images_in(config.src)
    names = output_names(files, config.dst)
    check_writable(config.dst, "name another folder for the maps", f"DST {config.dst}")
    world = dist.init(config.device)
    model, context = network(config, world)
    if config.tile:
        scene_attention.check_whole(config.tile, model.patch_size)
    false_color.check_shown(config.show_channels, context)
    context = replace(context, show_channels=config.show_channels)
    if needs_components(context):
        context = replace(context, colors=components(files, config.tile, context))
    bad = []
    for path in track(files, "attention", len(files), "images"):
        try:
            write_maps(model, path, names[path], config, context)
        except BadImage as reason:
            bad.append(f"{path}: {reason}")
    for line in bad:
        print(f"skipped: {line}", flush=True)
    if len(bad) == len(files):
        raise InputError(f"{config.src}: no readable image in it")
    print(f"attention maps: {config.dst}", flush=True)


def images_in(src: Path) -> list[Path]:
    """The file, or all images of a folder sorted by name.

    Raises:
        InputError: there is none.
    """
    if src.is_dir():
        files = sorted(path for path in src.iterdir() if readable(path))
    else:
        files = [src] if src.is_file() else []
    if not files:
        raise InputError(f"{src}: no image there; give a photo, a GIF, a video or a folder of them")
    if not readable(files[0]):
        known = " ".join(SUFFIXES + video.SUFFIXES)
        raise InputError(f"{src}: files of this kind cannot be read, only {known}")
    return files


def readable(path: Path) -> bool:
    """Whether the suffix is that of a photo, animation or video."""
    return path.suffix.lower() in SUFFIXES + video.SUFFIXES


def output_names(files: list[Path], dst: Path) -> dict[Path, str]:
    """Output name of each file: ``photo`` for ``photo.jpg``; if two would then have the same
    name (``photo.png``), ``photo.jpg`` for all of them.

    Raises:
        InputError: two would still have the same name, or would replace other files.
    """
    same: list[str] = []
    for names in ([path.stem for path in files], [path.name for path in files]):
        taken = Counter(f"{name}{end}".casefold() for name in names for end in ENDINGS)
        if max(taken.values()) == 1:
            check_free(files, names, dst)
            return dict(zip(files, names, strict=True))
        both = next(name for name, count in taken.items() if count > 1)
        same = [
            path.name
            for path, name in zip(files, names, strict=True)
            if both in [f"{name}{end}".casefold() for end in ENDINGS]
        ]
        if names[0] == files[0].stem:
            print(f"{same[0]} and {same[1]} have the same stem: all maps keep the endings")
    raise InputError(
        f"{files[0].parent}: the maps of {same[0]} and {same[1]} would be one file; rename one"
    )


def check_free(files: list[Path], names: list[str], dst: Path) -> None:
    """Check that the maps replace nothing but maps of an earlier call.

    Raises:
        InputError: names what would be replaced.
    """
    sources = {path.resolve() for path in files}
    for place in (dst / f"{name}{end}" for name in names for end in ENDINGS):
        inside = [path.name for path in place.iterdir()] if place.is_dir() else []
        other = [name for name in inside if not WRITTEN.fullmatch(name)]
        if place.resolve() in sources or other:
            what = f"holds {sorted(other)[0]}, not of attention" if other else "is a source"
            raise InputError(f"{place}: {what}; name another folder for the maps")


def network(config: AttentionConfig, world: dist.World) -> tuple[XCiT, Context]:
    """The XCiT with its weights, on its device in evaluation mode, and the evaluation context.

    Raises:
        InputError: arch or weights are missing, or not an XCiT.
    """
    target, context = resolve_without_shards(config, world)
    model = create_model(target.arch, num_classes=0, in_chans=target.channels)
    if not isinstance(model, XCiT):
        raise InputError(f"--arch {target.arch}: only XCiT has class attention to show")
    print(load_backbone(target.weights, model, target.checkpoint_key), flush=True)
    return model.to(world.device).eval(), context


def write_maps(
    model: XCiT, path: Path, name: str, config: AttentionConfig, context: Context
) -> None:
    """Write the maps of one file under ``name``; see the module's docstring.

    Raises:
        BadImage: it cannot be read.
    """
    if config.tile:
        write_scene(model, path, config.dst / name, config, context)
        return
    if path.suffix.lower() in video.SUFFIXES:
        with (
            video.reading(path) as frames,
            video.writing(config.dst / f"{name}.mp4", frames.rate) as maps,
        ):
            for frame in track(frames, path.name, frames.count, "frames"):
                maps.write(pictures_of(model, frame, config, context)["all"])
        return
    reader = read_frames(path) if false_color.is_plain(context) else read_values(path, context)
    frames, durations = zip(*reader, strict=True)
    pictures = [pictures_of(model, frame, config, context) for frame in frames]
    if len(pictures) == 1:
        with unfinished_folder(config.dst / name) as folder:
            for part, picture in pictures[0].items():
                save(folder / f"{part}.png", [picture])
    else:
        every = [picture["all"] for picture in pictures]
        save(config.dst / f"{name}.gif", every, duration=list(durations), loop=0)


def write_scene(
    model: XCiT, path: Path, folder: Path, config: AttentionConfig, context: Context
) -> None:
    """Write the maps of one scene, read in tiles.

    Raises:
        BadImage: it cannot be read.
    """
    assert config.tile is not None
    with scene_attention.open_for(path, context, config.tile) as scene:
        maps = scene_attention.SceneMaps(scene, config.tile, model.patch_size, model.num_heads)
        for y, x in track(maps.corners, path.name, len(maps.corners), "tiles"):
            values = scene_attention.read_tile(scene, y, x, config.tile, context)
            photo = false_color.picture(values, context)
            maps.add(y, x, photo, head_maps(model, values, config, context))
    with unfinished_folder(folder) as unfinished:
        np.save(unfinished / "attention.npy", maps.heat)
        for part, picture in maps.pictures(overlay).items():
            save(unfinished / f"{part}.png", [picture])


def read_frames(path: Path) -> Iterator[tuple[Pixels, int]]:
    """Yield RGB pixels [H, W, 3] and duration in ms of every frame; a photo has one.

    Raises:
        BadImage: it cannot be read, or is too large.
    """
    raw = path.read_bytes()
    header = read_header(raw)
    if path.suffix.lower() not in ANIMATED:
        yield decode(raw, header, Scratch()), 0
        return
    with Image.open(path) as image:
        if image.width * image.height * getattr(image, "n_frames", 1) > MAX_PIXELS:
            raise BadImage("the animation has too many pixels; take fewer frames")
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB")), int(frame.info.get("duration", 100))


def read_values(path: Path, context: Context) -> Iterator[tuple[Values, int]]:
    """Yield the values [H, W, C] of an image that is not 8-bit RGB, with a duration of 0.

    Raises:
        BadImage: it cannot be read, or has other channels than the network takes.
    """
    yield values_of_file(path.read_bytes(), context.inputs), 0


def needs_components(context: Context) -> bool:
    """Whether pictures are made of principal components."""
    shown = context.show_channels
    return not false_color.is_plain(context) and not false_color.of_channels(
        context.inputs.channels, shown
    )


def components(
    files: list[Path], tile: int | None, context: Context
) -> false_color.FalseColor | None:
    """The principal components of evenly spaced files, or tiles of them, for all; None where none
    can be read."""
    chosen = np.unique(np.linspace(0, len(files) - 1, false_color.SAMPLE_IMAGES).astype(int))
    pixels = []
    for number in chosen:
        with suppress(BadImage):
            path = files[number]
            found = (
                scene_attention.some_tiles(path, tile, context)
                if tile
                else (values for values, _ in read_values(path, context))
            )
            pixels += [false_color.some_pixels(values[None], context) for values in found]
    return false_color.of_components(np.concatenate(pixels)) if pixels else None


def pictures_of(
    model: XCiT, pixels: Values, config: AttentionConfig, context: Context
) -> dict[str, Pixels]:
    """``head-0`` ..., ``mean`` and ``all`` for one image [H, W, C] in its own units; each
    [H', W', 3], H' and W' whole patches."""
    image = resize_to_patches(pixels, config.image_size, model.patch_size)
    maps = head_maps(model, image, config, context)
    photo = false_color.picture(image, context)
    overlays = {f"head-{i}": overlay(photo, heat) for i, heat in enumerate(maps)}
    overlays["mean"] = overlay(photo, maps.mean(0))
    return overlays | {"all": np.concatenate([photo, *overlays.values()], 1)}


def resize_to_patches(pixels: Values, image_size: int, patch: int) -> Values:
    """Resize the shorter side to ``image_size`` (0: keep it), and both to whole patches."""
    sides = pixels.shape[:2]
    factor = image_size / min(sides) if image_size else 1.0
    height, width = (max(1, round(side * factor / patch)) * patch for side in sides)
    return resized(pixels, height, width)


def resized(pixels: Values, height: int, width: int) -> Values:
    """Resize an image [H, W, C], bicubic, antialiased."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        photo = Image.fromarray(pixels.astype(np.uint8, copy=False))
        return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    return resized_values(values, [height, width])[0].permute(1, 2, 0).numpy()


@torch.no_grad()
def head_maps(
    model: XCiT, photo: Values, config: AttentionConfig, context: Context
) -> NDArray[np.float32]:
    """Attention of each head to each patch, [h, H, W]; 0 below the threshold."""
    images = context.normalize(torch.tensor(photo).permute(2, 0, 1)[None])
    maps = model.get_attention(images)[config.layer - 1, 0].float().cpu().numpy()
    return (
        np.stack([strongest(heat, config.threshold) for heat in maps]) if config.threshold else maps
    )


def strongest(heat: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Keep the strongest patches that make up ``share`` of the map's sum; set the others to 0."""
    order = np.argsort(-heat, axis=None, kind="stable")
    running = np.cumsum(heat.flatten()[order])
    count = int(np.searchsorted(running, share * running[-1])) + 1
    mask = np.zeros(heat.size, bool)
    mask[order[:count]] = True
    return np.where(mask.reshape(heat.shape), heat, 0)


def overlay(photo: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Overlay a map [H, W] on the photo: color-coded from 0 to its maximum, upsampled
    bilinearly."""
    height, width = photo.shape[:2]
    level = Image.fromarray((heat / max(float(heat.max()), 1e-12)).astype(np.float32))
    smooth = np.asarray(level.resize((width, height), Image.Resampling.BILINEAR))
    at = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(smooth, at, channel) for channel in COLORS.T], -1)
    return np.rint(OPACITY * colors + (1 - OPACITY) * photo).astype(np.uint8)


def save(path: Path, pictures: list[Pixels], **options: Any) -> None:
    """Write a PNG, or a GIF of several, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    first, *rest = (Image.fromarray(picture) for picture in pictures)
    more = {"save_all": True, "append_images": rest} if rest else {}
    first.save(content, path.suffix[1:], **more, **options)
    write_atomic(path, content.getvalue())
