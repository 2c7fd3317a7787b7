"""Folders for timm and the hub: timm alone builds the same network from them."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from tests.models.test_weights import prefixed
from xcit_dino.cli import main
from xcit_dino.errors import InputError
from xcit_dino.models import checkpoints
from xcit_dino.models.config import ExportConfig
from xcit_dino.models.weights.convert import export
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.zoo import create_model
from xcit_dino.train.state import weights_file

MEAN, STD = (0.25, 0.5, 0.75), (0.1, 0.2, 0.3)


def write_checkpoint(arch, path, num_classes=0, size=64):
    """A run's checkpoint, and its network in evaluation mode."""
    torch.manual_seed(1)
    model = create_model(arch, num_classes=num_classes)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
    name = "global_crops_size" if not num_classes else "input_size"
    config = f"arch: {arch}\n{name}: {size}\nmean: {[*MEAN]}\nstd: {[*STD]}\n"
    state = model.state_dict()
    tree = {"model": state} if num_classes else {
        "student": prefixed("backbone.", state), "teacher": prefixed("backbone.", state)
    }  # fmt: skip
    torch.save(tree | {"arch": arch, "config": config}, path)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "num_classes", "size"),
    [
        ("xcit_nano_12_p8", 0, 64),
        ("xcit_nano_12_p16", 7, 96),
        ("timm/test_efficientnet", 0, 64),
        ("timm/test_efficientnet", 5, 64),
        ("timm/test_vit", 0, 64),  # its positions are of 160 px
        ("timm/test_resnet", 3, 160),
    ],
)
@torch.no_grad()
def test_timm_computes_the_same_from_the_folder(arch, num_classes, size, tmp_path, capsys):
    model = write_checkpoint(arch, tmp_path / "run.pth", num_classes, size)
    folder = tmp_path / "folder"
    words = ["--output", str(folder), "--format", "timm-hub"]
    assert main(["weights", "export", str(tmp_path / "run.pth"), *words]) == 0
    assert (
        f'timm.create_model("local-dir:{folder}", pretrained=True) loads it'
        in capsys.readouterr().out
    )
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)
    assert other.num_classes == num_classes
    settings = resolve_model_data_config(other)
    assert (
        tuple(settings["input_size"]) == (3, size, size) and settings["interpolation"] == "bicubic"
    )
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (MEAN, STD)
    # Our commands take the folder, and whoever takes its file alone has the normalization, too.
    file = checkpoints.resolve_checkpoint(folder)
    assert file == weights_file(folder, "--init_from") == folder / "model.safetensors"
    own = input_settings(file)
    assert own is not None and (own.mean, own.std, own.size) == (MEAN, STD, size)
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert features(images).shape == (2, model.embed_dim)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "# folder\n" in card
    assert "local-dir:FOLDER" in card and "mean (0.25, 0.5, 0.75)" in card
    assert ("XCiT" in card) == arch.startswith("xcit")


def test_a_file_that_says_nothing_is_named_by_arch_and_gets_timms_settings(tmp_path):
    file = tmp_path / "bare.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    with pytest.raises(InputError, match="does not say which network .* add --arch timm/NAME"):
        export(ExportConfig(file, tmp_path / "folder", "timm-hub"))
    export(ExportConfig(file, tmp_path / "folder", "timm-hub", arch="timm/test_resnet"))
    about = json.loads((tmp_path / "folder/config.json").read_text())
    assert about["num_classes"] == 1000 and about["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(InputError, match="exists; name a new folder"):
        export(ExportConfig(file, tmp_path / "folder", "timm-hub", arch="timm/test_resnet"))


@pytest.mark.parametrize("arch", ["xcit_pico_6_p8", "xcit_nano_12_p4"])
def test_what_timm_does_not_have_is_refused(arch, tmp_path):
    write_checkpoint(arch, tmp_path / "run.pth")
    with pytest.raises(InputError, match=f"--format timm-hub: timm has no {arch}"):
        export(ExportConfig(tmp_path / "run.pth", tmp_path / "folder", "timm-hub"))
    assert not (tmp_path / "folder").exists()


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "bare.pth")
    with pytest.raises(InputError, match="does not fit timm/test_vit"):
        export(
            ExportConfig(tmp_path / "bare.pth", tmp_path / "f", "timm-hub", arch="timm/test_vit")
        )
    with pytest.raises(InputError, match=r"names a file, .* take --output f$"):
        ExportConfig(tmp_path / "bare.pth", Path("f.pth"), "timm-hub")
