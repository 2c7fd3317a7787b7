"""Hostile input by the thousand: refused in words or accepted, never executed, no other error.

What else is fuzzed stands with what it is about: archives (test_pack), shards (test_loader,
test_index, test_check), images (test_crops), weights (test_weights), reports (test_report), the
submission script (test_launch).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xcit_dino.data.shards.config import CheckConfig, DemoConfig, MakeConfig
from xcit_dino.errors import InputError
from xcit_dino.eval.config import AttentionConfig, EvaluateConfig, KnnConfig, LinearConfig
from xcit_dino.eval.retrieval.config import DuplicatesConfig, RetrieveConfig
from xcit_dino.eval.video.config import PropagateConfig
from xcit_dino.options import dump_yaml, option_types, options, read_yaml, replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.recipe.config import RecipeConfig
from xcit_dino.ssl.schedule import DinoSchedule
from xcit_dino.supervised.config import DistillConfig, FinetuneConfig
from xcit_dino.supervised.detect.config import DetectConfig
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.train.state import FORMAT, load_checkpoint

SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def fuzzed(few: int, many: int, **strategies: Any) -> Callable[[Any], Any]:
    """A test of ``few`` examples, and one of ``many`` with ``make faults``."""

    def decorate(test: Any) -> Any:
        def run(count: int) -> None:
            options = settings(max_examples=count, deadline=None, suppress_health_check=SUPPRESSED)
            options(given(**strategies)(test))()

        long = pytest.param(many, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])
        return pytest.mark.parametrize("count", [few, long])(run)

    return decorate


absurd = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-320, -1, 0, 2**63, 10**400]),
    st.floats(),
    st.integers(),
    st.text(max_size=20),
    st.none(),
    st.booleans(),
    st.lists(st.floats(), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def one_line(error: InputError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


@fuzzed(200, 5_000, name=st.sampled_from(sorted(option_types(PretrainConfig))), value=absurd)
def test_absurd_options(name: str, value: Any) -> None:
    """Refused in one line, or a config whose schedules are finite and that survives its file."""
    try:
        config = replace(PretrainConfig(), {name: value})
    except InputError as error:
        assert one_line(error) and (name in str(error) or "global_crops" in str(error)), error
        return
    schedule = DinoSchedule(config, steps_per_epoch=7, global_batch=64)
    for step in (0, 1, schedule.total_steps // 2, schedule.total_steps - 1):
        now = schedule(step)
        assert all(map(math.isfinite, (now.lr, now.weight_decay, now.teacher_temp))), now
        assert 0 <= now.momentum_teacher <= 1 and now.lr >= 0 and now.teacher_temp > 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump_yaml(config))
        assert dict(options(replace(PretrainConfig(), read_yaml(path)))) == dict(options(config))


COMMANDS = (
    PretrainConfig, FinetuneConfig, DistillConfig, AttentionConfig, EvaluateConfig, KnnConfig,
    LinearConfig, MakeConfig, CheckConfig, DemoConfig, PropagateConfig, SegmentConfig,
    DetectConfig, DuplicatesConfig, RetrieveConfig, RecipeConfig,
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_beyond_all_sense_are_refused(command: Any) -> None:
    """Each option of each command that takes numbers, alone."""
    config, tried = command(), 0
    for name, kind in option_types(command).items():
        kinds = typing.get_args(kind)
        if {int, float}.isdisjoint((kind, *kinds)):
            continue
        tried += 1
        for number in (math.nan, math.inf, -math.inf, 1e30, -1e30, 10**400):
            if name == "nodata" and abs(number) == 1e30:  # such values do mark missing pixels
                continue
            several = typing.get_origin(kind) is tuple
            value = [number] * (1 if Ellipsis in kinds else len(kinds)) if several else number
            with pytest.raises(InputError, match=name):
                replace(config, {name: value})
    assert tried


yaml_text = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            ["lr: ", "- ", "!!python/object/apply:os.system ", "['true']", "&a ", "*a", "[", "]",
             "{", "}", "<<: ", "1e400", "9" * 5000, "2001-99-99", "\n", "  ", "'", '"', "? ",
             "!!binary x", "%YAML 9.9\n", "---\n", "\x00", "é"]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


@fuzzed(200, 5_000, text=yaml_text)
def test_hostile_yaml(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            replace(PretrainConfig(), read_yaml(path))
        except InputError as error:
            assert one_line(error), error


def test_yaml_that_unfolds_to_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "lr: *a9"]))
    (tmp_path / "nested.yaml").write_text("lr: " + "[" * 20_000)
    (tmp_path / "lr.yaml").write_text("\n".join(lines[:1]) + "\nlr: " + "[" * 50 + "]" * 50)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError) as error:
            values = read_yaml(path)
            replace(PretrainConfig(), {"lr": values["lr"]}, source=path.name)
        assert len(str(error.value)) < 1000


class Touch:
    """A pickle that leaves a mark where it is executed."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def whole_checkpoint() -> bytes:
    content = io.BytesIO()
    torch.save({"format": FORMAT, "step": 3, "student": {"w": torch.ones(40)}}, content)
    return content.getvalue()


WHOLE = whole_checkpoint()


@fuzzed(
    150,
    3_000,
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=9)), max_size=6),
    cut=st.integers(0, len(WHOLE)),
    evil=st.booleans(),
)
def test_hostile_checkpoints(edits: list[tuple[int, bytes]], cut: int, evil: bool) -> None:
    """Bytes exchanged, ends cut off, pickles of commands spliced in."""
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "executed")
        content = bytearray(WHOLE)
        for place, new in edits:
            content[place : place + len(new)] = new
        if evil:
            payload = pickle.dumps(Touch(marker), protocol=2)
            start = content.find(b"\x80\x02")
            content[start : start + len(payload)] = payload
        path = Path(folder, "checkpoint.pth")
        path.write_bytes(content[:cut] if cut % 2 else content)
        try:
            state = load_checkpoint(path)
        except InputError as error:
            assert one_line(error)
        else:
            assert state["format"] == FORMAT
        assert not marker.exists()
