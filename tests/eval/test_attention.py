"""Attention maps: the network's own numbers, whole patches, files."""

import shutil
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from xcit_dino.data import video
from xcit_dino.errors import InputError
from xcit_dino.eval.config import AttentionConfig, EvalTargetConfig
from xcit_dino.eval.context import make_context
from xcit_dino.eval.pictures import attention, scene_attention
from xcit_dino.eval.pictures.media import resize_to_patches
from xcit_dino.inputs import InputSettings
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed.dist import World

CPU = torch.device("cpu")


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


def config_for(run_folder, src, dst, **options):
    return AttentionConfig(
        src, dst, run_folder.path, run_folder.weights, image_size=32, device="cpu", **options
    )


def test_sides_become_whole_patches(photo):
    assert resize_to_patches(photo, 0, 8).shape == (48, 72, 3)
    assert resize_to_patches(photo, 32, 8).shape == (32, 48, 3)
    whole = photo[:40, :64]
    assert np.array_equal(resize_to_patches(whole, 0, 8), whole)


def test_maps_are_those_of_the_class_attention(photo):
    """Caught inside the last block, in a forward pass that knows nothing of maps."""
    torch.manual_seed(0)
    model = create_model("xcit_pico_6_p8").eval()
    caught = []
    for block in model.cls_attn_blocks:
        block.attn.register_forward_hook(lambda _m, _i, out: caught.append(out[1]))
    image = resize_to_patches(photo, 0, 8)
    context = make_context(EvalTargetConfig(), InputSettings(), {}, "", World(0, 1, CPU))
    model(context.normalize(torch.tensor(image).permute(2, 0, 1)[None]))
    for layer in (1, 2):
        maps = attention.head_maps(model, image, layer, 0.0, context)
        expected = caught[layer - 1][0, :, 0, 1:].reshape(4, 6, 9)
        np.testing.assert_allclose(maps, expected.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_the_threshold_keeps_that_share_with_the_fewest_patches(share):
    heat = np.random.default_rng(1).random((5, 6)).astype(np.float32)
    kept = attention.strongest(heat, share)
    mask = kept > 0
    assert np.array_equal(kept[mask], heat[mask])
    total = heat.sum()
    assert kept.sum() >= share * total * (1 - 1e-6)
    assert kept.sum() - heat[mask].min() < share * total
    assert mask.all() or heat[mask].min() >= heat[~mask].max()


def test_colors_follow_the_map():
    heat = np.zeros((2, 2), np.float32)
    heat[0, 1] = 5
    gray = np.full((16, 16, 3), 128, np.uint8)
    picture = attention.overlay(gray, heat).astype(int)
    bright, dark = picture[0, -1], picture[-1, 0]
    expected = np.rint(0.65 * attention.COLORS[[-1, 0]] + 0.35 * 128)
    assert bright.tolist() == expected[0].tolist() and dark.tolist() == expected[1].tolist()


def test_an_even_map_looks_even_and_one_bright_patch_darkens_nothing():
    gray = np.full((80, 80, 3), 128, np.uint8)
    even = attention.overlay(gray, np.full((10, 10), 0.01, np.float32)).astype(int)
    third = [np.interp(1 / 3, np.linspace(0, 1, 6), channel) for channel in attention.COLORS.T]
    assert np.abs(even - np.rint(0.65 * np.array(third) + 0.35 * 128)).max() <= 1
    heat = np.full((20, 20), 1.0, np.float32)
    heat[:, :10] = 4
    spot = heat.copy()
    spot[15, 15] = 1000
    far = (slice(0, 40), slice(0, 80))  # of the bright patch
    pictures = [attention.overlay(gray, each)[far].astype(int) for each in (heat, spot)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_a_folder_with_a_photo_an_animation_and_a_broken_file(run_folder, photo, tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "maps"
    src.mkdir()
    Image.fromarray(photo).save(src / "photo.png")
    frames = [Image.fromarray(np.roll(photo, 9 * i, 1)) for i in range(3)]
    frames[0].save(src / "clip.gif", save_all=True, append_images=frames[1:], duration=70)
    (src / "broken.jpg").write_bytes(b"no image")
    (src / "notes.txt").write_text("left alone")
    attention.run(config_for(run_folder, src, dst))
    assert "skipped" in (said := capsys.readouterr().out) and "broken.jpg" in said
    names = {path.name for path in (dst / "photo").iterdir()}
    assert names == {"head-0.png", "head-1.png", "head-2.png", "head-3.png", "mean.png", "all.png"}
    with (
        Image.open(dst / "photo" / "head-0.png") as head,
        Image.open(dst / "photo" / "all.png") as row,
    ):
        assert head.size == (48, 32) and row.size == (6 * 48, 32)
    with Image.open(dst / "clip.gif") as clip:
        assert (clip.n_frames, clip.size, clip.info["duration"]) == (3, (6 * 48, 32), 70)


def test_a_video(run_folder, photo, tmp_path, monkeypatch):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"no video")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)  # as where it is not installed
        with pytest.raises(InputError, match=r"pip install av.*ffmpeg -i VIDEO frames"):
            attention.run(config_for(run_folder, clip, tmp_path / "none"))
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with pytest.raises(InputError, match="no readable image in it"):
        attention.run(config_for(run_folder, clip, tmp_path / "none"))
    with video.writing(clip, Fraction(10)) as writer:
        for i in range(3):
            writer.write(np.roll(photo[:44], 9 * i, 1))
    attention.run(config_for(run_folder, clip, tmp_path / "maps"))
    with av.open(str(tmp_path / "maps" / "clip.mp4")) as maps:
        frames = list(maps.decode(video=0))
        assert maps.streams.video[0].average_rate == 10
    assert [(frame.width, frame.height) for frame in frames] == [(6 * 48, 32)] * 3
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["clip.mp4"]


def test_bad_input(run_folder, photo, tmp_path):
    with pytest.raises(InputError, match="no image there"):
        attention.run(config_for(run_folder, tmp_path / "missing", tmp_path))
    (tmp_path / "notes.txt").write_text("0")
    with pytest.raises(InputError, match="files of this kind cannot be read, only .jpg"):
        attention.run(config_for(run_folder, tmp_path / "notes.txt", tmp_path))
    (tmp_path / "x.png").write_bytes(b"0")
    with pytest.raises(InputError, match="no readable image in it"):
        attention.run(config_for(run_folder, tmp_path / "x.png", tmp_path))
    with pytest.raises(InputError, match="only XCiT"):
        attention.run(config_for(run_folder, tmp_path / "x.png", tmp_path, arch="timm/resnet10t"))
    with pytest.raises(InputError, match="--arch: needed"):
        attention.run(AttentionConfig(tmp_path / "x.png", output_dir=tmp_path / "none"))


def test_no_map_takes_the_place_of_another_or_of_a_source(run_folder, photo, tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "maps"
    src.mkdir()
    for name in ("a.jpg", "a.png", "b.png"):
        Image.fromarray(photo).save(src / name)
    attention.run(config_for(run_folder, src, dst))
    assert sorted(path.name for path in dst.iterdir()) == ["a.jpg", "a.png", "b.png"]
    assert "have the same stem: all maps keep the endings" in capsys.readouterr().out
    assert len({(dst / name / "all.png").read_bytes() for name in ("a.jpg", "a.png")}) == 2
    shutil.copy(src / "a.jpg", src / "A.JPG")
    with pytest.raises(InputError, match=r"the maps of A\.JPG and a\.jpg would be one file"):
        attention.run(config_for(run_folder, src, tmp_path / "more"))
    (src / "A.JPG").unlink()
    (dst / "b.png" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"b\.png: holds notes\.txt, not of attention"):
        attention.run(config_for(run_folder, src, dst))
    clip = src / "clip.gif"
    Image.fromarray(photo).save(clip)
    with pytest.raises(InputError, match=r"clip\.gif: is a source"):
        attention.run(config_for(run_folder, clip, src))


def test_maps_of_a_network_with_fewer_heads_leave_none_of_the_others(run_folder, photo, tmp_path):
    (tmp_path / "maps" / "a").mkdir(parents=True)
    (tmp_path / "maps" / "a" / "head-99.png").write_bytes(b"")
    Image.fromarray(photo).save(tmp_path / "a.png")
    attention.run(config_for(run_folder, tmp_path / "a.png", tmp_path / "maps"))
    names = {path.name for path in (tmp_path / "maps" / "a").iterdir()}
    assert "all.png" in names and "head-99.png" not in names
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["a"]


@pytest.mark.parametrize("ending", [".tif", ".npy", ".png"])
def test_a_scene_is_the_maps_of_its_tiles(run_folder, tmp_path, ending):
    scene = np.random.default_rng(2).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    path = tmp_path / f"north{ending}"
    if ending == ".npy":
        np.save(path, scene)
    elif ending == ".tif":
        tifffile.imwrite(path, scene, tile=(16, 16), photometric="rgb")
    else:
        Image.fromarray(scene).save(path)
    config = AttentionConfig(
        path, tmp_path / "maps", run_folder.path, run_folder.weights, tile=32, device="cpu"
    )
    attention.run(config)
    folder = tmp_path / "maps" / "north"
    maps = np.load(folder / "attention.npy")
    assert maps.shape == (4, 9, 13) and maps.dtype == np.float16
    model, context = attention.network(config, World(0, 1, CPU))
    # 72 and 104 pixels of whole patches; the last tile of a row or column ends there and counts.
    for y, x, rows, columns in ((0, 0, 4, 4), (0, 64, 4, 1), (40, 72, 4, 4)):
        part = scene[y : y + 32, x : x + 32]
        alone = attention.head_maps(model, part, 2, 0.0, context)
        there = maps[:, y // 8 : y // 8 + rows, x // 8 : x // 8 + columns]
        alone /= alone.sum((1, 2), keepdims=True)  # without the class token's own share
        np.testing.assert_allclose(there, 16 * alone[:, :rows, :columns], rtol=2e-3)
    np.testing.assert_allclose(maps[:, :4, :4].mean((1, 2)), 1, rtol=2e-3)
    names = sorted(file.name for file in folder.glob("*.png"))
    assert names == ["all.png", *(f"head-{n}.png" for n in range(4)), "mean.png"]
    for name, width in (("mean", 13), ("all", 6 * 13)):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size == (width, 9)


def test_a_scene_that_a_tile_does_not_fit_is_named(run_folder, tmp_path, capsys):
    Image.new("RGB", (100, 60)).save(tmp_path / "small.png")
    config = AttentionConfig(
        tmp_path / "small.png",
        tmp_path / "maps",
        run_folder.path,
        run_folder.weights,
        tile=64,
        device="cpu",
    )
    with pytest.raises(InputError, match="no readable image"):
        attention.run(config)
    assert "--tile 64 is larger than its 100 x 60 pixels; at most 60" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--tile 60: .* the patch, 8; take 64"):
        attention.run(replace(config, tile=60))


def test_large_maps_are_averaged_in_pictures():
    cells = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert scene_attention.reduced(cells, 2).tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    assert scene_attention.reduced(cells[:3, :5], 2).tolist() == [[3.5, 5.5]]
