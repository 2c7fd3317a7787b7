"""The roofline's counts: operations against the formula of bench/flops.py and bytes against sizes
added by hand, grouping, and that docs/performance.md has what the command prints."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.flops import step_flops
from bench.gpu import roofline
from bench.gpu.operations import Kernel, Recorder, step_kernels
from bench.gpu.roofline import H200, PARTS_OF, at_roof, expected, fused, moved

SMALL = argparse.Namespace(
    arch="xcit_nano_12_p16", batch_size=2, prototypes=512, local_crops=3, global_size=64,
    local_size=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return step_kernels(SMALL)


def test_operations_are_those_of_the_formula(kernels):
    """The formula leaves out the diagnostics and the first layer's gradient with respect to the
    images, which no step computes."""
    counted = sum(k.flops for k in kernels if k.part not in ("diagnostics", "augmentation"))
    stem = [k for k in kernels if k.part == "patch embedding" and k.backward and k.flops]
    assert counted == pytest.approx(step_flops(SMALL) * SMALL.batch_size, rel=0.02)
    assert counted < step_flops(SMALL) * SMALL.batch_size and stem


def test_every_part_is_there_in_both_directions(kernels):
    directions = {part: {k.backward for k in kernels if k.part == part} for part in
                  (k.part for k in kernels)}  # fmt: skip
    once = ("augmentation", "diagnostics")
    assert directions.keys() == {*roofline_parts(), *once}
    for part, found in directions.items():
        assert found == ({False} if part in once else {False, True}), part


def roofline_parts() -> set[str]:
    from bench.gpu.operations import PARTS, UPDATE

    return {*PARTS.values(), UPDATE}


def test_products_are_in_16_bits_but_those_of_the_teachers_scores(kernels):
    wide = Counter(k.part for k in kernels if k.flops and k.dtype == torch.float32)
    assert set(wide) <= {"prototypes and loss", "diagnostics", "augmentation"} and wide


def test_bytes_and_grouping_by_hand():
    """A linear layer of 4 -> 8 on 16 rows in float32, a GELU and a sum."""
    with FakeTensorMode():
        layer, x = nn.Linear(4, 8), torch.zeros(16, 4)
        recorder = Recorder({layer: "backbone.blocks.0"})
        with torch.no_grad(), recorder, recorder.at("backbone.blocks.0"):
            y = layer(x)
            (torch.nn.functional.gelu(y) + 1).sum(0)
    product, gelu, plus, total = recorder.kernels
    assert product.flops == 2 * 16 * 4 * 8 and not product.fusible
    assert moved(product) == 4 * (16 * 4 + 4 * 8 + 8 + 16 * 8)
    assert [moved(k) for k in (gelu, plus, total)] == [8 * 128, 8 * 128, 4 * (128 + 8)]
    group = fused(recorder.kernels)
    assert [k.name for k in group] == ["addmm", "gelu+add+sum"]
    assert moved(group[1]) == 4 * (128 + 8)  # the product's result in, the sums out
    assert at_roof(product, H200) == pytest.approx(moved(product) / 4.8e12)
    assert expected(product, H200) == roofline.SHORTEST


def test_compiling_joins_only_in_blocks_and_changes_no_operations(kernels):
    joined = fused(kernels)
    assert sum(k.flops for k in joined) == sum(k.flops for k in kernels)
    assert sum(map(moved, joined)) < sum(map(moved, kernels)) and len(joined) < len(kernels)
    outside = [k for k in kernels if not k.compiled]
    assert [k for k in joined if not k.compiled] == outside


@pytest.mark.slow
def test_the_page_has_what_the_command_prints():
    """``python bench/gpu/roofline.py --write`` updates it."""
    args = roofline.settings([])
    lines = roofline.tables(args, [PARTS_OF])
    page = roofline.DOCS.read_text().split(roofline.MARKS[0])[1].split(roofline.MARKS[1])[0]
    assert [line for line in lines if line not in page.splitlines()] == []
