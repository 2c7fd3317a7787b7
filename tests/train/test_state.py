"""Checkpoints: intact or absent, newest first; run folders keep their config."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from xcit_dino.errors import InputError, RunError
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.async_copy import HostCopy
from xcit_dino.train.run.folder import open_run
from xcit_dino.train.state import (
    Checkpoints,
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    weights_file,
)


def state(data="abc", batch=8):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState({"student": net}, optimizer, scaler, data=data, global_batch=batch)


def steps(state, number):
    for _ in range(number):
        state.modules["student"](torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1


def test_a_restored_state_goes_on_bit_for_bit(tmp_path):
    whole, first = state(), state()
    steps(whole, 6), steps(first, 3)
    with Checkpoints(tmp_path) as checkpoints:
        path = checkpoints.save(first.state_dict())
    second = state()
    nn.init.zeros_(second.modules["student"].weight)
    second.load_state_dict(load_checkpoint(path))
    steps(second, 3)
    assert second.step == 6
    for a, b in zip(*(s.modules["student"].parameters() for s in (whole, second)), strict=True):
        assert torch.equal(a, b)


def test_the_last_k_and_the_permanent_ones_stay(tmp_path):
    checkpoints, s = Checkpoints(tmp_path, keep=2), state()
    for step in range(1, 7):
        s.step = step
        checkpoints.save(s.state_dict(), permanent=step == 2)
    checkpoints.wait()
    assert [p.stem[-1] for p in checkpoints.all()] == ["2", "5", "6"]
    assert not list(checkpoints.folder.glob("*.tmp"))
    assert len(list(checkpoints.folder.iterdir())) == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "no json", "half a json", "odd json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, tmp_path, capsys):
    checkpoints, s = Checkpoints(tmp_path), state()
    for s.step in (1, 2):
        newest = checkpoints.save(s.state_dict())
    checkpoints.wait()
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(content[:-10])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "no json":
        newest.with_suffix(".json").unlink()
    else:
        newest.with_suffix(".json").write_text("[3]" if damage == "odd json" else '{"step": 2, "by')
    found = checkpoints.newest()
    assert found is not None and load_checkpoint(found)["step"] == 1
    assert newest.exists(), "who looks changes nothing"
    checkpoints.clean()
    assert newest.with_name(newest.name + ".damaged").exists()


def pair(folder):
    """Two checkpoints; the newer one, its content and that of its JSON."""
    checkpoints, s = Checkpoints(folder), state()
    for s.step in (1, 2):
        newest = checkpoints.save(s.state_dict())
    checkpoints.wait()
    return checkpoints, newest, newest.read_bytes(), newest.with_suffix(".json").read_text()


def damages(content, every):
    """Truncations at offsets and single flipped bits, all over a file."""
    yield from (content[:length] for length in range(0, len(content), every))
    for place in range(0, len(content), every):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        yield bytes(flipped)


@pytest.mark.parametrize(
    "every", [41, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])]
)
def test_any_damage_is_found_and_the_one_before_is_taken(every, tmp_path, capsys):
    """Truncated at each offset, each byte with a flipped bit (``make faults``; here each 41st)."""
    checkpoints, newest, content, facts = pair(tmp_path)
    aside = newest.with_name(newest.name + ".damaged")
    count = 0
    for damaged in damages(content, every):
        count += 1
        newest.write_bytes(damaged)
        newest.with_suffix(".json").write_text(facts)
        found = checkpoints.newest()
        checkpoints.clean()
        assert found is not None and found.name == "checkpoint-00000001.pth"
        assert aside.read_bytes() == damaged and not newest.exists()
    assert capsys.readouterr().err.count("is damaged; set aside as") == count
    assert count == 2 * len(range(0, len(content), every))


def test_a_reader_passes_a_damaged_one_over_and_changes_nothing(tmp_path, capsys):
    _, newest, content, _ = pair(tmp_path)
    newest.write_bytes(content[:-10])
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in newest.parent.iterdir()}
    assert newest_checkpoint(tmp_path).name == "checkpoint-00000001.pth"
    assert weights_file(tmp_path, "--x").name == "checkpoint-00000001.pth"
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in newest.parent.iterdir()} == before
    assert f"{newest.name} is damaged; skipped" in capsys.readouterr().err


def test_a_checkpoint_that_another_command_reads_is_not_dropped(tmp_path):
    checkpoints, s = Checkpoints(tmp_path, keep=1), state()
    for s.step in (1, 2, 3):
        checkpoints.save(s.state_dict())
        checkpoints.wait()
        if s.step == 1:
            first = newest_checkpoint(tmp_path)
    assert [path.name for path in checkpoints.all()] == [first.name, "checkpoint-00000003.pth"]
    newest_checkpoint(tmp_path)  # this process reads another
    s.step = 4
    checkpoints.save(s.state_dict())
    checkpoints.wait()
    assert [path.name[-5:] for path in checkpoints.all()] == ["3.pth", "4.pth"]


class Cut(BaseException):
    """The power goes off."""


def test_power_cut_before_each_call_of_a_write(tmp_path, monkeypatch):
    """At each call by which a checkpoint reaches the disk: there is a whole one, old or new, and
    the next start leaves nothing half-written behind."""
    seen = set()
    for number in range(1, 100):
        checkpoints, s = Checkpoints(tmp_path / str(number), keep=1), state()
        for s.step in (1, 2):
            checkpoints.save(s.state_dict())
        checkpoints.wait()
        s.step, left = 3, [number]

        def cut(call, left=left):
            def wrapper(*args, **kwargs):
                left[0] -= 1
                if left[0] <= 0:  # and nothing happens afterwards
                    raise Cut
                return call(*args, **kwargs)

            return wrapper

        copy = HostCopy().take(s.state_dict())
        with monkeypatch.context() as patch:
            for place, name in ((os, "fsync"), (os, "replace"), (os, "open"), (Path, "unlink")):
                patch.setattr(place, name, cut(getattr(place, name)))
            with suppress(Cut):
                checkpoints._write(copy, checkpoints.folder / "checkpoint-00000003.pth", False)
        found = checkpoints.newest()
        assert found is not None
        seen.add(load_checkpoint(found)["step"])
        checkpoints.clean()
        names = {path.suffix for path in checkpoints.folder.iterdir()}
        assert names == {".pth", ".json"} and not list(checkpoints.folder.glob(".*"))
        if left[0] > 0:
            break
    assert seen == {2, 3} and number > 6


def test_a_full_disk_is_said_kept_and_tried_again(tmp_path, monkeypatch, capsys):
    checkpoints, s = Checkpoints(tmp_path), state()
    checkpoints.save(s.state_dict())
    checkpoints.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    s.step = 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(s.state_dict())
        with pytest.raises(RunError, match=r"No space left.*checkpoint-00000000\.pth is intact"):
            checkpoints.wait()
    shown = " ".join(capsys.readouterr().err.split())
    assert "No space left on device; training continues" in shown
    assert [p.name for p in checkpoints.folder.iterdir() if p.name.startswith(".")] == []
    checkpoints.save(s.state_dict())
    checkpoints.wait()
    assert checkpoints.newest().name == "checkpoint-00000001.pth"


def test_what_is_not_finite_is_never_saved(tmp_path):
    checkpoints, s = Checkpoints(tmp_path), state()
    with torch.no_grad():
        s.modules["student"].weight[0, 0] = float("nan")
    checkpoints.save(s.state_dict())
    with pytest.raises(RunError, match=r"student\.weight is non-finite.*there is none yet"):
        checkpoints.wait()
    assert checkpoints.newest() is None


def test_the_copy_is_of_the_moment_and_its_memory_is_used_again(tmp_path):
    checkpoints, s = Checkpoints(tmp_path), state()
    before = s.modules["student"].weight.clone()
    path = checkpoints.save(s.state_dict())
    with torch.no_grad():
        s.modules["student"].weight.zero_()
    checkpoints.wait()
    assert torch.equal(load_checkpoint(path)["student"]["weight"], before)
    places = {key: buffer.data_ptr() for key, buffer in checkpoints._copy.buffers.items()}
    s.step = 1
    checkpoints.save(s.state_dict())
    checkpoints.wait()
    assert places == {key: b.data_ptr() for key, b in checkpoints._copy.buffers.items()}


def test_a_run_refuses_other_data_and_another_batch():
    saved = state().state_dict()
    with pytest.raises(InputError, match="--data_path: the shards changed"):
        state(data="xyz").load_state_dict(saved)
    with pytest.raises(InputError, match="global batch is 16 and was 8"):
        state(batch=16).load_state_dict(saved)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04garbage", b"text", "pickle", "foreign"])
def test_unreadable_checkpoints_are_named_and_never_executed(content, tmp_path, capsys):
    path = tmp_path / "c.pth"
    if content == "pickle":
        torch.save({"format": Evil()}, path)
    elif content == "foreign":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"c\.pth: not a"):
        load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_a_run_folder_holds_one_run(tmp_path):
    config = replace(PretrainConfig(), {"output_dir": tmp_path / "run"})
    open_run(config, config.run)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "checkpoint-00000005.pth").touch()
    same = replace(config, {"num_workers": 3, "log_every": 1})
    open_run(same, same.run)
    other = replace(config, {"lr": 0.1, "out_dim": 128})
    with pytest.raises(
        InputError, match=r"out_dim 65536 -> 128, lr 0\.0005 -> 0\.1.*--may_change out_dim lr"
    ):
        open_run(other, other.run)
    allowed = replace(other, {"may_change": ("lr", "out_dim")})
    open_run(allowed, allowed.run)


def test_a_read_only_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = replace(PretrainConfig(), {"output_dir": tmp_path / "file" / "run"})
    with pytest.raises(InputError, match="--output_dir"):
        open_run(config, config.run)
