"""One owner of a run folder, whatever the file system and the machine."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest

from xcit_dino.errors import InputError
from xcit_dino.train.run import lock
from xcit_dino.train.run.lock import LOCK, RunLock, held


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.3)
    monkeypatch.setattr(lock, "LEASE", 0.6)
    monkeypatch.setattr(lock, "POLL", 0.02)


def left_by(folder, **owner):
    """What an owner that died left in the folder."""
    folder.mkdir(exist_ok=True)
    facts = {"host": "elsewhere", "pid": 4321, "job": "", "since": "2026-01-01"} | owner
    (folder / LOCK).write_text(json.dumps(facts))


def seconds_to_take(folder):
    began = time.monotonic()
    with held(folder):
        owner = json.loads((folder / LOCK).read_text())
        assert owner["pid"] == os.getpid()
        (folder / "config.yaml").touch()  # a run has begun
    assert (folder / LOCK).read_text() == ""
    return time.monotonic() - began


def test_free_or_left_in_good_order_is_taken_at_once(tmp_path):
    for _ in range(2):
        assert seconds_to_take(tmp_path / "run") < 0.25


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path):
    left_by(tmp_path, host=RunLock(tmp_path).me["host"])
    assert seconds_to_take(tmp_path) < 0.25


def test_an_owner_elsewhere_is_watched_and_then_taken_for_dead(tmp_path, capsys):
    left_by(tmp_path)
    assert 0.3 <= seconds_to_take(tmp_path) < 5
    assert (
        "ended without a report by process 4321 on elsewhere; watching" in capsys.readouterr().out
    )


def test_a_requeued_job_does_not_watch_its_earlier_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    left_by(tmp_path, job="77")
    assert seconds_to_take(tmp_path) < 0.25


def test_a_sign_of_life_from_elsewhere_refuses(tmp_path):
    left_by(tmp_path, job="12")

    def live():
        while not done.wait(0.05):
            os.utime(tmp_path / LOCK)

    done = threading.Event()
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(InputError, match="by process 4321 on elsewhere, job 12, since 2026"):
            RunLock(tmp_path).take()
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_lock_that_somebody_holds(host, tmp_path, monkeypatch):
    """A process of this machine holds it for good; a machine that is gone until its lease ends."""
    left_by(tmp_path, host=RunLock(tmp_path).me["host"] if host == "here" else host)

    def refuse(*_):
        raise OSError(errno.EAGAIN, "locked")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    began = time.monotonic()
    with pytest.raises(InputError, match="is in use by process 4321"):
        RunLock(tmp_path).take()
    assert (time.monotonic() - began > 0.6) == (host == "elsewhere")


def test_without_locks_in_the_file_system_owners_are_watched(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert seconds_to_take(tmp_path / "new") < 0.25
    left_by(tmp_path, host=RunLock(tmp_path).me["host"])
    assert seconds_to_take(tmp_path) >= 0.3


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with held(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        time.sleep(0.3)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir .*Not a directory"):
        RunLock(tmp_path / "file" / "run").take()
