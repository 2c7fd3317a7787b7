"""``xcit-dino attention``: class attention, one map per head, overlaid on photos (DINO
``visualize_attention.py``; XCiT's class attention, arXiv 2106.09681, figure 1); or with ``--draw
patches`` the principal components of the patches as colors (``eval/pictures/patches.py``).

For ``photo.jpg``: ``DST/photo/head-0.png`` ..., ``mean.png`` and ``all.png``, the photo and every
map side by side. For an animated GIF or WebP: ``DST/clip.gif``, ``all.png`` of every frame; for a
video: ``DST/video.mp4``. With ``--tile`` images are large scenes, read in parts; see
``scene_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from xcit_dino.data import video
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.errors import InputError
from xcit_dino.eval.config import AttentionConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures import false_color, patches, scene_attention
from xcit_dino.eval.pictures.media import (
    Drawing,
    Pixels,
    Values,
    images_in,
    output_names,
    read_image,
    read_values,
    resize_to_patches,
    save,
)
from xcit_dino.eval.target import resolve_without_shards
from xcit_dino.files import check_writable, unfinished_folder
from xcit_dino.models.dense import probe_grid
from xcit_dino.models.tokens import stride_of
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.xcit import XCiT
from xcit_dino.models.zoo import create_model
from xcit_dino.progress import track
from xcit_dino.train.distributed import dist

COLORS = np.array(  # dark to bright: black, violet, red, orange, yellow, white (like "inferno")
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (246, 215, 70), (252, 255, 164)]
)
OPACITY = 0.65
PROBE = 4  # patches to a side of an image that shows whether a network takes it
FOCUSED = 3  # times the mean: attention that has the brightest color at the earliest


def run(config: AttentionConfig) -> None:
    """Draw a photo, an animation, a video or a folder of them.

    Raises:
        InputError: no weights, not an XCiT, or nothing readable.
    """
    files = images_in(config.src)
    names = output_names(files, config.dst)
    check_writable(config.dst, "name another folder for the maps", f"DST {config.dst}")
    world = dist.init(config.device)
    model, context = network(config, world)
    false_color.check_shown(config.show_channels, context)
    context = replace(context, show_channels=config.show_channels)
    if needs_components(context):
        context = replace(context, colors=components(files, config.tile, context))
    write = writer(model, files, config, context)
    bad = []
    for path in track(files, config.draw, len(files), "images"):
        try:
            write(path, config.dst / names[path])
        except BadImage as reason:
            bad.append(f"{path}: {reason}")
    for line in bad:
        print(f"skipped: {line}", flush=True)
    if len(bad) == len(files):
        raise InputError(f"{config.src}: no readable image in it")
    what = "attention maps" if config.draw == "attention" else "components of patches"
    print(f"{what}: {config.dst}", flush=True)


def network(config: AttentionConfig, world: dist.World) -> tuple[nn.Module, Context]:
    """The network with its weights, on its device in evaluation mode, and the evaluation context.

    Raises:
        InputError: arch or weights are missing, not an XCiT though attention is drawn, or no such
            layer.
    """
    target, context = resolve_without_shards(config, world)
    model = create_model(target.arch, num_classes=0, in_chans=target.channels)
    if config.draw == "attention" and not isinstance(model, XCiT):
        raise InputError(
            f"--arch {target.arch}: only XCiT has class attention to show; --draw patches shows "
            "its features"
        )
    print(load_backbone(target.weights, model, target.checkpoint_key), flush=True)
    model = model.to(world.device).eval()
    if config.draw == "patches":
        side = stride_of(model) * PROBE
        images = torch.zeros(1, target.channels, side, side, device=world.device)
        probe_grid(model, config.tap, target.arch, images)
    return model, context


def writer(
    model: nn.Module, files: list[Path], config: AttentionConfig, context: Context
) -> Callable[[Path, Path], None]:
    """What draws a file and writes its pictures under a name without ending."""
    if config.draw == "patches":
        features = patches.GridFeatures(model, config.tap, config.image_size, context)
        if not config.shared_colors:
            return partial(write_patches, features)
        draw = partial(patches.pictures_of, features, patches.shared_colors(features, files))
        return partial(write_pictures, draw, context)
    assert isinstance(model, XCiT)
    if config.tile:
        scene_attention.check_whole(config.tile, model.patch_size)
        return partial(write_scene, model, config, context)
    return partial(write_pictures, partial(pictures_of, model, config, context), context)


def write_pictures(draw: Drawing, context: Context, path: Path, target: Path) -> None:
    """Write the pictures of one file; see the module's docstring.

    target: without its ending.

    Raises:
        BadImage: it cannot be read.
    """
    folder, name = target.parent, target.name
    if path.suffix.lower() in video.SUFFIXES:
        with (
            video.reading(path) as frames,
            video.writing(folder / f"{name}.mp4", frames.rate) as maps,
        ):
            for frame in track(frames, path.name, frames.count, "frames"):
                maps.write(draw(frame)["all"])
        return
    frames, durations = zip(*read_image(path, context), strict=True)
    pictures = [draw(frame) for frame in frames]
    if len(pictures) == 1:
        with unfinished_folder(target) as unfinished:
            for part, picture in pictures[0].items():
                save(unfinished / f"{part}.png", [picture])
    else:
        every = [picture["all"] for picture in pictures]
        save(folder / f"{name}.gif", every, duration=list(durations), loop=0)


def write_patches(features: patches.GridFeatures, path: Path, target: Path) -> None:
    """Write the patches of one file in its own colors."""
    write_pictures(patches.patch_drawing(features, path), features.context, path, target)


def write_scene(
    model: XCiT, config: AttentionConfig, context: Context, path: Path, target: Path
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
            maps.add(y, x, photo, head_maps(model, values, config.layer, config.threshold, context))
    with unfinished_folder(target) as unfinished:
        np.save(unfinished / "attention.npy", maps.heat)
        for part, picture in maps.pictures(overlay).items():
            save(unfinished / f"{part}.png", [picture])


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
    model: XCiT, config: AttentionConfig, context: Context, pixels: Values
) -> dict[str, Pixels]:
    """``head-0`` ..., ``mean`` and ``all`` for one image [H, W, C] in its own units; each
    [H', W', 3], H' and W' whole patches."""
    image = resize_to_patches(pixels, config.image_size, model.patch_size)
    maps = head_maps(model, image, config.layer, config.threshold, context)
    photo = false_color.picture(image, context)
    overlays = {f"head-{i}": overlay(photo, heat) for i, heat in enumerate(maps)}
    overlays["mean"] = overlay(photo, maps.mean(0))
    return overlays | {"all": np.concatenate([photo, *overlays.values()], 1)}


@torch.no_grad()
def head_maps(
    model: XCiT, photo: Values, layer: int, threshold: float, context: Context
) -> NDArray[np.float32]:
    """Attention of each head of a layer to each patch, [h, H, W]; 0 below the threshold."""
    images = context.normalize(torch.tensor(photo).permute(2, 0, 1)[None])
    maps = model.get_attention(images)[layer - 1, 0].float().cpu().numpy()
    return np.stack([strongest(heat, threshold) for heat in maps]) if threshold else maps


def strongest(heat: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Keep the strongest patches that make up ``share`` of the map's sum; set the others to 0."""
    order = np.argsort(-heat, axis=None, kind="stable")
    running = np.cumsum(heat.flatten()[order])
    count = int(np.searchsorted(running, share * running[-1])) + 1
    mask = np.zeros(heat.size, bool)
    mask[order[:count]] = True
    return np.where(mask.reshape(heat.shape), heat, 0)


def overlay(photo: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Overlay a map [H, W] on the photo, color-coded and upsampled bilinearly.

    0 is black. The brightest color is for the map's 99th percentile, so that one bright patch does
    not darken the rest, but at least for ``FOCUSED`` times the mean of what is not above it, so
    that an even map looks even.
    """
    height, width = photo.shape[:2]
    top = max(float(np.percentile(heat, 99)), 1e-12)
    brightest = max(top, FOCUSED * float(np.minimum(heat, top).mean()))
    level = Image.fromarray(np.minimum(heat / brightest, 1).astype(np.float32))
    smooth = np.asarray(level.resize((width, height), Image.Resampling.BILINEAR))
    at = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(smooth, at, channel) for channel in COLORS.T], -1)
    return np.rint(OPACITY * colors + (1 - OPACITY) * photo).astype(np.uint8)
