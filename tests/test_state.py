"""Checkpoints: whole or not there, newest first; run folders keep their config."""

import pytest
import torch
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.config import replace
from xcit_dino.train.run import open_run
from xcit_dino.train.state import Checkpoints, TrainState, load_checkpoint


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


@pytest.mark.parametrize("damage", ["truncate", "flip", "no json"])
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
    else:
        newest.with_suffix(".json").unlink()
    found = checkpoints.newest()
    assert found is not None and load_checkpoint(found)["step"] == 1
    kept = newest if damage == "no json" else newest.with_name(newest.name + ".damaged")
    assert kept.exists()


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
