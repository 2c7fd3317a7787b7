"""Names, sizes, recipes and other backbones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import xcit_dino
from xcit_dino.errors import InputError
from xcit_dino.models.probe import check_sizes
from xcit_dino.models.zoo import canonical_name, create_model, list_models, model_spec


def test_the_official_fourteen_come_first() -> None:
    """timm knows the published names: with _224 they are exactly our first 14."""
    published = {f"{name}_224" for name in list_models()[:14]}
    assert published == set(timm.list_models("xcit_*_224"))
    assert len(list_models()) == len(set(list_models())) == 14 + 7 + 3
    assert xcit_dino.list_models() == list_models()


def test_sizes_equal_timm() -> None:
    for name in list_models()[:14]:
        spec = model_spec(name)
        with torch.device("meta"):
            theirs = timm.create_model(f"{name}_224")
        last = theirs.cls_attn_blocks[-1]
        assert spec.patch_size == theirs.patch_embed.patch_size
        assert (spec.embed_dim, spec.depth) == (theirs.embed_dim, len(theirs.blocks))
        assert spec.num_heads == theirs.blocks[0].attn.num_heads == last.attn.num_heads
        assert spec.tokens_norm == last.tokens_norm


def test_layer_scale_starts_at_eta() -> None:
    for name, eta in (("xcit_tiny_12_p8", 1.0), ("xcit_tiny_24_p8", 1e-5)):
        scales = [p for n, p in create_model(name).named_parameters() if "gamma" in n]
        assert len(scales) == 3 * model_spec(name).depth + 2 * 2
        assert all(torch.equal(p, torch.full_like(p, eta)) for p in scales)


@pytest.mark.parametrize("suffix", ["", "_224", "_384", "_dist", "_224_dist", "_384_dist"])
def test_published_spellings(suffix: str) -> None:
    assert canonical_name(f"xcit_small_12_p8{suffix}") == "xcit_small_12_p8"
    assert model_spec(f"xcit_small_12_p8{suffix}").embed_dim == 384


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="xcit_smal_12_p8.*did you mean xcit_small_12_p8"):
        create_model("xcit_smal_12_p8")
    with pytest.raises(InputError, match="list_models"):
        create_model("??")
    with pytest.raises(InputError, match="timm/resnet5O.*did you mean .*resnet50"):
        create_model("timm/resnet5O")


def test_a_timm_network_without_drop_path_names_the_option() -> None:
    with pytest.raises(InputError, match="timm/vgg11.*--drop_path_rate 0"):
        create_model("timm/vgg11", drop_path_rate=0.1)


def test_a_recipe_names_the_model(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("arch: xcit_pico_6_p8_224\ndrop_path_rate: 0.25\nepochs: 3\n")
    model = xcit_dino.create_model(config=recipe, num_classes=7)
    assert (model.patch_size, model.num_classes) == (8, 7)
    assert model.blocks[0].drop_path_rate == 0.25
    model = create_model(config=str(recipe), drop_path_rate=0.0)
    assert model.blocks[0].drop_path_rate == 0.0


@pytest.mark.parametrize("text", ["epochs: 3\n", "- a\n", "arch: [\n", "arch: 3\n", None])
def test_a_recipe_without_a_model_is_refused(text: str | None, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    with pytest.raises(InputError, match="recipe.yaml"):
        create_model(config=recipe)


def test_name_or_recipe_but_not_both() -> None:
    with pytest.raises(InputError, match="either"):
        create_model()
    with pytest.raises(InputError, match="either"):
        create_model("xcit_pico_6_p8", config="recipe.yaml")


FAMILIES = (
    "mobilenetv3_small_050 vgg11 resnet10t test_vit test_efficientnet vit_tiny_patch16_224 "
    "swin_tiny_patch4_window7_224 hgnet_tiny ghostnet_050 mambaout_femto efficientvit_b0 "
    "inception_next_atto test_convnext edgenext_xx_small regnety_002 deit3_small_patch16_224"
).split()


def widths_of(name: str, device: str) -> tuple[set[torch.Size], int]:
    """Shapes of the features of a small and a large crop, and the width that the model states."""
    with torch.device(device):
        model, images = create_model(f"timm/{name}"), [torch.empty(1, 3, s, s) for s in (96, 224)]
        return {model.eval()(batch).shape for batch in images}, model.embed_dim


@pytest.mark.parametrize("name", [name for name in FAMILIES if timm.is_model(name)])
def test_timm_backbones_have_the_width_of_their_features_and_take_both_crops(name) -> None:
    try:
        widths, width = widths_of(name, "meta")  # shapes alone
    except (NotImplementedError, RuntimeError):  # which not every timm can with every torch
        widths, width = widths_of(name, "cpu")
    if widths == {(1, 0)}:
        pytest.skip("this timm (before 1.0.31) gives no features of it at all")
    assert widths == {(1, width)}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_networks_that_take_any_size_are_those_of_timm_at_their_own(name) -> None:
    torch.manual_seed(0)
    ours, theirs = create_model(f"timm/{name}").eval(), timm.create_model(name, num_classes=0)
    theirs.load_state_dict(ours.state_dict())  # the same names
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("timm/vit_tiny_patch16_224", 100, "take --local_crops_size 96, or"),
        ("timm/efficientformer_l1", 96, "take --local_crops_size 224, or"),
    ],
)
def test_sizes_that_a_network_does_not_take_are_refused_with_one_that_it_takes(arch, size, words):
    model = create_model(arch)
    sizes = {"global_crops_size": 224, "local_crops_size": size}
    with pytest.raises(InputError, match=f"--local_crops_size {size}: {arch} .*{words}") as error:
        check_sizes(model, arch, sizes, features=True)
    assert "\n" not in str(error.value) and model.training
    near = int(re.findall(r"take --local_crops_size (\d+)", str(error.value))[0])
    check_sizes(model, arch, sizes | {"local_crops_size": near}, features=True)


def test_a_network_without_one_vector_an_image_is_refused() -> None:
    model = create_model("timm/resnet10t", global_pool="")
    with pytest.raises(InputError, match=r"returns \[1, 512, 3, 3\] for an image instead of 512"):
        check_sizes(model, "timm/resnet10t", {"local_crops_size": 96}, features=True)


def test_timm_backbones() -> None:
    model = create_model("timm/resnet18", in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, model.embed_dim)
    assert create_model("timm/resnet18", num_classes=5)(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(InputError, match="timm/resnet18.*no_such_argument"):
        create_model("timm/resnet18", no_such_argument=1)
    with pytest.raises(InputError, match="only built-in"):
        model_spec("timm/resnet18")


def test_keyword_arguments_override_a_size() -> None:
    assert len(create_model("xcit_pico_6_p4", depth=2).blocks) == 2


def test_importing_names_does_not_import_torch() -> None:
    code = (
        "import sys, xcit_dino.models.zoo as z; z.model_spec('xcit_pico_6_p4'); z.list_models();"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
