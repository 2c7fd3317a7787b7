"""Weights load from and convert to every layout bit for bit, and never execute code."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from xcit_dino.cli import main
from xcit_dino.errors import InputError, RunError
from xcit_dino.files import file_checksum
from xcit_dino.models.config import ConvertConfig, ExportConfig, ExtractConfig
from xcit_dino.models.head import DINOHead
from xcit_dino.models.weights import convert, formats, layouts
from xcit_dino.models.weights.load import (
    find_network,
    load_backbone,
    load_linear,
)
from xcit_dino.models.weights.pretraining import (
    find_pretraining,
    holds_pretraining,
    load_pretraining,
)
from xcit_dino.models.zoo import create_model

State = dict[str, Tensor]


def network(
    arch: str = "xcit_pico_6_p8", num_classes: int = 0, seed: int = 0, **kwargs: Any
) -> Any:
    """A model whose every tensor, batch-norm statistics included, differs from seed to seed."""
    model = create_model(arch, num_classes=num_classes, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.6, generator=generator)
        else:
            value.fill_(7)
    return model


def identical(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def save(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# -- finding the network


def test_every_kind_of_checkpoint(tmp_path: Path) -> None:
    """(file, which) -> the network that must come out, for all the places the family uses."""
    a, b = (network(seed=seed).state_dict() for seed in (1, 2))
    head = DINOHead(80, 16, hidden_dim=8, bottleneck_dim=4).state_dict()
    whole = lambda state: prefixed("backbone.", state) | prefixed("head.", head)  # noqa: E731
    official_dino = {
        "student": prefixed("module.", whole(a)),
        "teacher": prefixed("module.", whole(b)),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="xcit_small_12_p16", lr=0.0005),
        "dino_loss": {"center": torch.ones(1, 16)},
    }
    ours = {"step": 5, "student": whole(a), "teacher": whole(b), "loss": {"center": torch.ones(16)}}
    distilled = prefixed("Student.", a) | prefixed("Teacher.", {"stem.weight": torch.ones(2)})
    cases: list[tuple[Any, str | None, State]] = [
        ({"model": a}, None, a),
        ({"model": a}, "teacher", a),  # one network, nameless: it serves
        ({"model": a, "model_ema": b, "epoch": 1}, None, a),
        ({"model": a, "model_ema": b}, "model_ema", b),
        (a, None, a),
        (a, "teacher", a),
        (prefixed("module.", a), None, a),
        (prefixed("_orig_mod.", a), None, a),
        (prefixed("module.backbone.", a), None, a),
        (official_dino, None, b),
        (official_dino, "student", a),
        (ours, "teacher", b),
        (ours, "student", a),
        (distilled, None, a),
        ({"model": distilled, "epoch": 2}, None, a),
        ({"state_dict": a}, None, a),
    ]
    for number, (tree, which, expected) in enumerate(cases):
        path = save(tmp_path / f"{number}.pth", tree)
        assert identical(find_network(path, which).state, expected), number
        model = create_model("xcit_pico_6_p8")
        load_backbone(path, model, which)
        assert identical(dict(model.state_dict()), expected), number


def test_report_says_what_was_taken(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pth", {"teacher": prefixed("backbone.", network().state_dict())})
    report = load_backbone(path, create_model("xcit_pico_6_p8"))
    assert (report.network, report.layout, report.head) == ("teacher", "official", "none")
    assert report.num_tensors == len(network().state_dict())
    assert "loaded the teacher under 'teacher.backbone.'" in str(report)


def test_asking_for_a_network_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    state = network().state_dict()
    path = save(tmp_path / "c.pth", {"model": state, "model_ema": state})
    with pytest.raises(InputError, match="contains no student") as error:
        find_network(save(tmp_path / "t.pth", {"teacher": state}), "student")
    assert "teacher" in str(error.value)
    assert find_network(path, "student").network == "model"
    with pytest.raises(InputError, match="no network found"):
        find_network(save(tmp_path / "e.pth", {"epoch": 3}))


# -- strictness


def test_another_architecture_is_refused_with_both_names(tmp_path: Path) -> None:
    path = save(tmp_path / "nano.pth", create_model("xcit_nano_12_p8").state_dict())
    with pytest.raises(InputError, match="xcit_nano_12_p8.*xcit_pico_6_p8"):
        load_backbone(path, create_model("xcit_pico_6_p8"))
    with pytest.raises(InputError, match="patch 8, embed_dim 80, depth 2"):
        load_backbone(
            save(tmp_path / "odd.pth", create_model("xcit_pico_6_p8", depth=2).state_dict()),
            create_model("xcit_pico_6_p8"),
        )
    with pytest.raises(InputError, match="no XCiT.*xcit_pico_6_p8"):
        load_backbone(
            save(tmp_path / "r.pth", nn.Linear(2, 2).state_dict()), create_model("xcit_pico_6_p8")
        )


def test_classifiers(tmp_path: Path) -> None:
    state = network(num_classes=5).state_dict()
    path = save(tmp_path / "five.pth", {"model": state})
    bare = save(tmp_path / "none.pth", {"model": network().state_dict()})

    same = create_model("xcit_pico_6_p8", num_classes=5)
    assert load_backbone(path, same, head="required").head == "loaded"
    assert identical(dict(same.state_dict()), state)
    assert load_backbone(path, create_model("xcit_pico_6_p8")).head == "dropped"

    other = create_model("xcit_pico_6_p8", num_classes=3)
    fresh = other.head.weight.clone()
    with pytest.raises(InputError, match="5 classes, but the model 3"):
        load_backbone(path, other)
    for file in (path, bare):
        report = load_backbone(file, other, head="new")
        assert report.head == "new" and report.num_tensors == len(network().state_dict())
        assert torch.equal(other.head.weight, fresh)
    assert torch.equal(other.cls_token, network().cls_token)
    with pytest.raises(InputError, match="no classifier"):
        load_backbone(bare, other, head="required")


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    del state["norm.bias"]
    state["surplus"] = torch.ones(1)
    state["norm.weight"] = torch.ones(3)
    path = save(tmp_path / "c.pth", state)
    model = create_model("xcit_pico_6_p8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        InputError, match="missing: norm.bias; unexpected: surplus; of another shape: norm.weight"
    ):
        load_backbone(path, model)
    assert identical(before, dict(model.state_dict()))


def test_a_backbone_of_timm(tmp_path: Path) -> None:
    source = create_model("timm/resnet18", num_classes=4)
    path = save(tmp_path / "c.pth", {"teacher": prefixed("backbone.", source.state_dict())})
    model = create_model("timm/resnet18")
    assert load_backbone(path, model).head == "dropped"
    assert torch.equal(model.conv1.weight, source.conv1.weight)


def test_a_timm_xcit_takes_official_weights(tmp_path: Path) -> None:
    source = network("xcit_nano_12_p8", num_classes=3)
    model = create_model("timm/xcit_nano_12_p8_224", num_classes=3).eval()
    load_backbone(save(tmp_path / "c.pth", {"model": source.state_dict()}), model)
    images = torch.randn(2, 3, 224, 224)[:, :, :32, :32]
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images), rtol=1e-4, atol=1e-5)


# -- head, center, linear probe


@pytest.mark.parametrize("key", ["loss", "dino_loss"])
def test_a_whole_pretraining_comes_back(key: str, tmp_path: Path) -> None:
    a = prefixed("backbone.", network(seed=1).state_dict()) | {"head.mlp.0.bias": torch.ones(2)}
    b = prefixed("backbone.", network(seed=2).state_dict()) | {"head.mlp.0.bias": torch.zeros(2)}
    tree = {"student": prefixed("module.", a), "teacher": b, key: {"center": torch.randn(1, 16)}}
    student, teacher, center = find_pretraining(save(tmp_path / "c.pth", tree))
    assert identical(student, a) and identical(teacher, b)
    assert torch.equal(center, tree[key]["center"][0])
    with pytest.raises(InputError, match="not a full DINO checkpoint"):
        find_pretraining(save(tmp_path / "b.pth", a))


def whole(seed: int, arch: str = "xcit_pico_6_p8", out_dim: int = 16) -> nn.Module:
    """A backbone and a head, as pretraining has them."""
    net = nn.Module()
    net.backbone = network(arch, seed=seed)
    net.head = DINOHead(80, out_dim, hidden_dim=8, bottleneck_dim=4)
    return net


def test_pretraining_goes_on_from_an_official_checkpoint(tmp_path: Path) -> None:
    """Names of ``main_dino.py``: the student in DistributedDataParallel, the center (1, K)."""
    a, b, center = whole(1), whole(2), torch.randn(1, 16)
    official = {
        "student": prefixed("module.", a.state_dict()),
        "teacher": b.state_dict(),
        "dino_loss": {"center": center},
        "epoch": 300,
        # run_with_submitit.py sets a Path
        "args": argparse.Namespace(arch="xcit_pico_6_p8", output_dir=Path("/checkpoint/me/7")),
    }
    path = save(tmp_path / "checkpoint.pth", official)
    assert holds_pretraining(path)
    student, teacher, ours = whole(3), whole(4), torch.zeros(16)
    taken = load_pretraining(path, student, teacher, ours)
    assert identical(student.state_dict(), a.state_dict())
    assert identical(teacher.state_dict(), b.state_dict())
    assert torch.equal(ours, center[0])
    assert "student and teacher" in taken and "heads of 16 prototypes" in taken

    with pytest.raises(InputError, match="of out_dim 16, but the run out_dim 8; add --out_dim 16"):
        load_pretraining(path, whole(3, out_dim=8), whole(4, out_dim=8), torch.zeros(8))
    with pytest.raises(InputError, match="holds xcit_pico_6_p8, but the model is xcit_pico_6_p4"):
        load_pretraining(path, whole(3, "xcit_pico_6_p4"), teacher, torch.zeros(16))
    del official["teacher"]["head.mlp.0.bias"]
    with pytest.raises(InputError, match="missing: head.mlp.0.bias"):
        load_pretraining(save(tmp_path / "less.pth", official), student, teacher, ours)


def test_official_linear_heads(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    tree = {"epoch": 99, "state_dict": prefixed("module.linear.", layer.state_dict())}
    for path in (
        save(tmp_path / "official.pth", tree),
        save(tmp_path / "bare.pth", layer.state_dict()),
    ):
        weight, bias = load_linear(path)
        assert torch.equal(weight, layer.weight) and torch.equal(bias, layer.bias)
    with pytest.raises(InputError, match="no linear layer"):
        load_linear(save(tmp_path / "none.pth", {"a": torch.ones(1)}))


# -- files that are not what they say


class Payload:
    """A pickle that runs a command where it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> list[Any]:
    """Objects whose loading by plain pickle creates the marker."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return [
        Payload(os.system, f"touch {marker}"),
        Payload(exec, touch),
        Payload(eval, f"__import__('io').{touch}"),
        Payload(os.mkdir, str(marker)),
        {"cls_token": np.ones(2), "evil": Payload(os.system, f"touch {marker}")},
        [np.ones(1), Payload(exec, touch)],
        Payload(shutil.copyfile, os.devnull, str(marker)),
    ]


@pytest.mark.parametrize("number", range(7))
def test_payloads_are_live(number: int, tmp_path: Path) -> None:
    """The next tests prove nothing unless plain pickle does run them."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(payloads(marker)[number]))
    assert marker.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("suffix", [".pth", ".pdparams", ".safetensors"])
def test_hostile_pickles_are_refused_and_do_not_run(
    suffix: str, protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    for number, payload in enumerate(payloads(marker)):
        path = tmp_path / f"{number}{suffix}"
        contents = [pickle.dumps(payload, protocol=protocol)]
        if suffix == ".pth" and protocol == 2:
            archive = io.BytesIO()
            torch.save({"model": payload}, archive)
            contents.append(archive.getvalue())
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError, match="not a readable weights file"):
                formats.read(path)
            assert not marker.exists()


def test_hostile_opcodes_of_pdparams(tmp_path: Path) -> None:
    """Written by hand, since pickle would not write them: names beyond the few, dotted names,
    states that set attributes of the stand-ins, objects instead of numbers."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    cases = [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tobytes\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x04load\x93\x8c\x01x\x85R.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"}S'a'\n" + array + b"(tR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\ntRI00\n(lI1\nattbs.",
        array + b"}S'__init__'\nNsb.",  # BUILD on the stand-in itself
        b"P1\n.",  # a persistent id
        b"",
        b"\x80\x04",
        b"not a pickle",
    ]
    good = tmp_path / "good.pdparams"
    formats.write(good, {"a": torch.ones(2, 2)}, {})
    for number, content in enumerate(cases):
        path = tmp_path / f"{number}.pdparams"
        path.write_bytes(content)
        with pytest.raises(InputError):
            formats.read(path)
        assert torch.equal(formats.read(good)["a"], torch.ones(2, 2))  # nothing stays poisoned


def test_pickles_that_unfold_to_gigabytes_are_refused(tmp_path: Path) -> None:
    """Twelve bytes that make Python's unpickler take a gigabyte; dicts that hold one another."""
    place = b"\x80\x02}r" + (2**27).to_bytes(4, "little") + b"."
    doubled: dict[str, Any] = {}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    cyclic: dict[str, Any] = {}
    cyclic["a"] = cyclic
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for suffix in (".pdparams", ".pth"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(place)
        with pytest.raises(InputError):
            formats.read(path)
        for tree in (doubled, cyclic, deep):
            torch.save(tree, path) if suffix == ".pth" else path.write_bytes(pickle.dumps(tree))
            with pytest.raises(InputError, match="more than 1,000,000 entries, or 32 levels"):
                formats.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize("suffix", [".pth", ".pdparams", ".safetensors"])
def test_damaged_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"whole{suffix}"
    formats.write(path, {"a": torch.randn(50, 50), "b": torch.randn(300)}, {})
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for number, length in enumerate(generator.integers(0, len(content) - 200, size=12)):
        damaged = tmp_path / f"{number}{suffix}"
        damaged.write_bytes(content[:length])
        with pytest.raises(InputError, match=f"{number}{suffix}"):
            formats.read(damaged)
    with pytest.raises(InputError, match="no such file"):
        formats.read(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("cases", [100, pytest.param(5_000, marks=pytest.mark.faults)])
@pytest.mark.parametrize("suffix", [".pth", ".pdparams", ".safetensors"])
def test_flipped_bytes_never_escape_as_another_error(
    suffix: str, cases: int, tmp_path: Path
) -> None:
    path = tmp_path / f"fuzzed{suffix}"
    formats.write(path, {"a": torch.ones(3, 2), "b": torch.ones(4)}, {})
    content, generator = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(cases):
        fuzzed = bytearray(content)
        for position in generator.integers(0, len(content), size=3):
            fuzzed[position] = generator.integers(0, 256)
        path.write_bytes(fuzzed)
        try:
            formats.read(path)
        except InputError:
            refused += 1
    assert refused > cases // 10


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pdparams_of_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    """Written by plain pickle from numpy arrays, as paddle.save does."""
    arrays = {
        "f4": np.random.default_rng(0).normal(size=(3, 4)).astype("f4"),
        "f8 big-endian, by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)).astype(">f8"),
        "i8": np.arange(5),
        "f2 scalar": np.array(2.5, "f2"),
        "empty": np.zeros((0, 3), "f4"),
    }
    path = tmp_path / "a.pdparams"
    index = {"StructuredToParameterName@@": {name: "p_0" for name in arrays}}
    path.write_bytes(pickle.dumps(arrays | index, protocol=protocol))
    tree = formats.read(path)
    assert tree.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tree[name].shape == array.shape
        assert np.array_equal(tree[name].numpy(), array)


def test_pdparams_are_what_paddle_reads(tmp_path: Path) -> None:
    """Plain pickle finds numpy arrays and the index of names, linear weights transposed."""
    model = network(num_classes=3)
    source = save(tmp_path / "a.pth", model.state_dict())
    convert.convert(ConvertConfig(source, tmp_path / "a.pdparams"))
    arrays = pickle.loads((tmp_path / "a.pdparams").read_bytes())
    index = arrays.pop("StructuredToParameterName@@")
    assert set(index) == set(arrays) and all(type(a) is np.ndarray for a in arrays.values())
    assert np.array_equal(arrays["head.weight"], model.head.weight.detach().numpy().T)
    bn = model.blocks[0].local_mp.bn
    assert np.array_equal(arrays["blocks.0.local_mp.bn._mean"], bn.running_mean.numpy())
    assert np.array_equal(arrays["blocks.0.local_mp.bn._variance"], bn.running_var.numpy())
    assert not any("num_batches" in name for name in arrays)


# -- out and in again


@pytest.mark.parametrize("middle", ["m.safetensors", "m.pth", "timm.pth", "timm.safetensors"])
def test_round_trips_are_bit_exact(middle: str, tmp_path: Path) -> None:
    model = network("xcit_nano_12_p16", num_classes=3)
    source = save(tmp_path / "source.pth", {"model": model.state_dict()})
    layout = "timm" if middle.startswith("timm") else "official"
    convert.convert(ConvertConfig(source, tmp_path / middle, layout=layout))
    convert.convert(ConvertConfig(tmp_path / middle, tmp_path / "back.pth"))
    assert identical(formats.read(tmp_path / "back.pth"), dict(model.state_dict()))
    assert not list(tmp_path.glob(".*"))  # no partial file is left


def test_pdparams_round_trips_are_bit_exact(tmp_path: Path) -> None:
    """From PASSL and back: everything. From torch and back: all but the counters of batches."""
    state = dict(network(num_classes=2).state_dict())
    source = save(tmp_path / "a.pth", state)
    convert.convert(ConvertConfig(source, tmp_path / "a.pdparams"))
    convert.convert(ConvertConfig(tmp_path / "a.pdparams", tmp_path / "b.pth"))
    convert.convert(ConvertConfig(tmp_path / "b.pth", tmp_path / "c.pdparams"))
    assert (tmp_path / "a.pdparams").read_bytes() == (tmp_path / "c.pdparams").read_bytes()
    counters = {name: torch.tensor(0) for name in state if name.endswith("num_batches_tracked")}
    assert counters and identical(formats.read(tmp_path / "b.pth"), state | counters)


def test_timm_computes_the_same_from_our_file(tmp_path: Path) -> None:
    model = network("xcit_nano_12_p16", num_classes=4)
    output = tmp_path / "timm.pth"
    convert.convert(
        ConvertConfig(save(tmp_path / "a.pth", model.state_dict()), output, layout="timm")
    )
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=4).eval()
    theirs.load_state_dict(torch.load(output, weights_only=True))
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        error = (theirs(images) - model(images)).abs().max() / model(images).abs().max()
    assert error < 1e-5


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", {"teacher": prefixed("backbone.", network().state_dict())})
    results = tmp_path / "results.json"
    of = {"weights": file_checksum(source), "network": "teacher"}
    entries = {"knn": {"metrics": {"top1_k20": 61.2}, "protocol": of}}
    results.write_text(json.dumps(entries | {"linear": {"metrics": {}, "protocol": {}}}))
    config = ExportConfig(source, tmp_path / "a.safetensors", results=results)
    convert.export(config)
    facts = formats.metadata(tmp_path / "a.safetensors")
    assert (facts["arch"], facts["network"]) == ("xcit_pico_6_p8", "teacher")
    assert json.loads(facts["results"]) == entries, "of this very network alone"
    assert {"commit", "xcit_dino", "source", "num_classes"} <= facts.keys()


def test_timm_has_no_patch_4(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", network("xcit_pico_6_p4").state_dict())
    with pytest.raises(InputError, match="timm has no xcit_pico_6_p4"):
        convert.convert(ConvertConfig(source, tmp_path / "b.pth", layout="timm"))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_file_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.pth", network("xcit_nano_12_p16").state_dict())

    def wrong(state: State) -> State:
        return {name: value * 1.001 for name, value in layouts_to_timm(state).items()}

    layouts_to_timm = layouts.to_timm
    monkeypatch.setattr(layouts, "to_timm", wrong)
    with pytest.raises(RunError, match="outputs differ from the original"):
        convert.convert(ConvertConfig(source, tmp_path / "b.pth", layout="timm"))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_extract_takes_the_student_out(tmp_path: Path) -> None:
    student = network(num_classes=3).state_dict()
    tree = prefixed("Student.", student) | prefixed("Teacher.", {"fc.weight": torch.ones(2, 2)})
    source, output = save(tmp_path / "c.pth", {"model": tree}), tmp_path / "student.pth"
    convert.extract(ExtractConfig(source, output, prefix="Student", remove_prefix=True))
    assert identical(formats.read(output), dict(student))
    ours = save(tmp_path / "ours.pth", {"student": student, "teacher": {"w": torch.ones(2)}})
    for file in (source, ours):  # the student, however it is spelled
        convert.extract(ExtractConfig(file, output, remove_prefix=True))
        assert identical(formats.read(output), dict(student))
    with pytest.raises(InputError, match="--prefix Student or student: .* begin with weight"):
        convert.extract(ExtractConfig(save(tmp_path / "d.pth", {"weight": torch.ones(2)}), output))
    convert.extract(ExtractConfig(source, tmp_path / "kept.safetensors", prefix="Student"))
    assert identical(formats.read(tmp_path / "kept.safetensors"), prefixed("Student.", student))
    with pytest.raises(InputError, match="--prefix Pupil.*model"):
        convert.extract(ExtractConfig(source, output, prefix="Pupil"))


@pytest.mark.slow
def test_onnx_runs_any_batch_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network(num_classes=3, in_chans=2, depth=1, embed_dim=16)
    monkeypatch.setattr(convert, "_build", lambda found, path: ("small", model))  # for speed
    source, output = save(tmp_path / "a.pth", model.state_dict()), tmp_path / "a.onnx"
    convert.export(ExportConfig(source, output))
    session = onnxruntime.InferenceSession(output)
    for shape in ((1, 2, 8, 32), (5, 2, 64, 48)):
        images = torch.randn(shape)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5
            )
    assert session.get_modelmeta().custom_metadata_map["arch"] == "small"


def test_onnx_without_its_libraries_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.pth", network().state_dict())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"xcit-dino\[onnx\]"):
        convert.export(ExportConfig(source, tmp_path / "a.onnx"))
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (ConvertConfig, {"output": Path("a.bin")}),
        (ConvertConfig, {"output": Path("a.pdparams"), "layout": "timm"}),
        (ExportConfig, {"output": Path("a.pth")}),
        (ExtractConfig, {"output": Path("a")}),
    ],
)
def test_outputs_must_have_a_known_ending(config: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--output|--layout"):
        config(checkpoint=Path("c.pth"), **arguments)


def test_the_commands_end_well(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pth", {"model": network().state_dict()})
    for command, output, *more in (
        ("convert", "b.pdparams"),
        ("export", "c.safetensors"),
        ("extract", "d.pth", "--prefix", "blocks"),
    ):
        words = ["weights", command, str(source), "--output", str(tmp_path / output), *more]
        assert main(words) == 0 and (tmp_path / output).is_file(), command


@pytest.mark.parametrize(("step", "note"), [(10, "98% of it is still the weights"), (2_000, "")])
def test_an_average_over_too_few_steps_is_said(step, note, tmp_path):
    model = create_model("xcit_pico_6_p16", num_classes=3)
    state = {"model": model.state_dict(), "model_ema": model.state_dict(), "step": step}
    torch.save(state | {"config": "model_ema_decay: 0.998\n"}, tmp_path / "run.pth")
    report = load_backbone(tmp_path / "run.pth", model, "model_ema")
    assert report.facts.get("initial_share") == (0.9802 if note else None)
    assert bool(note) == ("before the first step" in str(report)) and note in str(report)
    assert "before the first step" not in str(load_backbone(tmp_path / "run.pth", model, "model"))
