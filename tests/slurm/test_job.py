"""How an attempt is judged, how ranks connect, how a job handles signals and fewer processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.standin import StandinConfig
from xcit_dino.errors import InputError
from xcit_dino.options import replace
from xcit_dino.slurm import attempts, env, job, launched, scheduler
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train import signals

STAGE = "pretrain"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder after its submission, with two restarts allowed."""
    note = {"max_requeues": 2, "stages": {STAGE: {"job_id": "9", "config": {"epochs": 3}}}}
    launched.write_launch(tmp_path, note)
    return tmp_path


def begin(run: Path, restart: int) -> attempts.Record:
    attempt = attempts.begin(run, STAGE, "9", restart, "node[1-2]")
    log = attempts.job_folder(run, "9") / "9_0_log.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(attempts.marker(attempt) + "\n")
    return attempt


def srun_says(run: Path, *lines: str) -> None:
    with open(attempts.job_folder(run, "9") / "9_0_log.err", "a") as file:
        file.writelines(f"{line}\n" for line in lines)


# -- judging an attempt ----------------------------------------------------------------------------


def test_done(run: Path) -> None:
    begin(run, 0)
    attempts.write_status(run, "9", 0, 0, done=True)
    ended = attempts.finish(run, STAGE, 0)
    assert (ended.state, ended.config, ended.failures) == ("done", {"epochs": 3}, 0)


def test_exit_code_0_is_no_proof(run: Path) -> None:
    """Seen on SLURM 22.05: a node dies, and srun's exit code is 0."""
    begin(run, 0)
    srun_says(run, "srun: error: Node failure on node2")
    ended = attempts.finish(run, STAGE, 0)
    assert (ended.state, ended.failures) == ("requeued", 1)
    assert ended.reason == "Node failure on node2"


@pytest.mark.parametrize(
    ("heard", "state"),
    [("SIGUSR2", "requeued"), ("SIGTERM", "requeued"), ("SIGINT", "stopped"), ("", "stopped")],
)
def test_saved_and_left(run: Path, heard: str, state: str) -> None:
    """Only the scheduler's signals put a run back; max_steps and Ctrl-C are the user's."""
    begin(run, 0)
    if heard:
        attempts.write_status(run, "9", 0, 1, heard=heard)
    attempts.write_status(run, "9", 0, 1, stopped=f"{heard} after step 4")
    attempts.write_status(run, "9", 0, 0, port=20000)
    ended = attempts.finish(run, STAGE, 0)
    assert (ended.state, ended.failures) == (state, 0)
    assert ended.reason == f"{heard} after step 4"


def test_the_rank_that_failed_first_is_named(run: Path) -> None:
    begin(run, 0)
    attempts.write_status(run, "9", 0, 3, error="RuntimeError: first", code=1)
    time.sleep(0.01)
    attempts.write_status(run, "9", 0, 0, error="ConnectionError: follows", code=1)
    srun_says(run, "srun: error: node2: task 3: Exited with exit code 1")
    ended = attempts.finish(run, STAGE, 1)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    assert (ended.state, ended.failures) == ("requeued", 1)
    assert ended.reason == f"rank 3 on {host}: RuntimeError: first"


def test_a_killed_rank_is_named_by_srun(run: Path) -> None:
    begin(run, 0)
    attempts.write_status(run, "9", 0, 0, error="ConnectionError: follows", code=1)
    srun_says(run, "srun: error: node2: task 1: Killed", "srun: error: node1: task 0: Terminated")
    assert attempts.finish(run, STAGE, 137).reason == "node2: task 1: Killed"


def test_ended_by_the_scheduler_before_it_listened(run: Path) -> None:
    begin(run, 0)
    srun_says(run, "srun: error: node1: tasks 0-1: Terminated")
    assert (attempts.finish(run, STAGE, 143).state, attempts.load(run, STAGE).failures) == (
        "requeued",
        0,
    )
    begin(run, 1)
    srun_says(run, "srun: error: node1: tasks 0-1: User defined signal 2")
    ended = attempts.finish(run, STAGE, 140)
    assert ended.failures == 1 and "raise --timeout" in ended.reason


def test_earlier_attempts_in_the_log_are_not_read(run: Path) -> None:
    begin(run, 0)
    srun_says(run, "srun: error: node2: task 1: Killed")
    attempts.finish(run, STAGE, 137)
    begin(run, 1)
    assert attempts.finish(run, STAGE, 9).reason == "exit code 9, without a report"


def test_restarts_are_limited(run: Path) -> None:
    states = []
    for restart in range(3):
        begin(run, restart)
        states.append(attempts.finish(run, STAGE, 100 + restart).state)
    assert states == ["requeued", "requeued", "failed"]


def test_the_same_error_counts_again_once_the_run_got_on(run: Path) -> None:
    (run / "checkpoints").mkdir()
    for restart in range(2):
        begin(run, restart)
        attempts.write_status(run, "9", restart, 0, error="OSError: disk", code=1)
        assert attempts.finish(run, STAGE, 1).state == "requeued"
        (run / "checkpoints" / f"checkpoint-{restart:08d}.pth").touch()
    begin(run, 2)
    attempts.write_status(run, "9", 2, 0, error="OSError: disk", code=1)
    assert attempts.finish(run, STAGE, 1).state == "failed"


def fail_at(run: Path, restart: int, error: str, where: str, *srun: str) -> attempts.Record:
    begin(run, restart)
    attempts.write_status(run, "9", restart, 0, error=error, where=where, code=1)
    srun_says(run, *srun)
    return attempts.finish(run, STAGE, 1)


def test_a_mistake_is_known_again_by_its_line_of_code(run: Path) -> None:
    first = fail_at(run, 0, "OSError: .head.30922.tmp", "OSError loop.py:3 save.py:9")
    assert first.state == "requeued"
    again = fail_at(run, 1, "OSError: .head.31007.tmp", "OSError loop.py:3 save.py:9")
    assert again.state == "failed" and "twice at the same place" in again.reason


def test_the_same_words_of_another_line_are_another_mistake(run: Path) -> None:
    for restart, where in enumerate(("OSError loop.py:3", "OSError loop.py:4")):
        assert fail_at(run, restart, "OSError: disk", where).state == "requeued"


def test_ranks_left_alone_by_a_killed_one_are_no_mistake_of_the_code(run: Path) -> None:
    """Machines may well fail twice between two checkpoints."""
    died = "srun: error: node2: task 1: Killed"
    for restart in range(2):
        ended = fail_at(run, restart, "RuntimeError: closed", "RuntimeError dist.py:7", died)
        assert ended.state == "requeued"


def test_the_same_exit_code_without_a_word_twice_is_the_end(run: Path) -> None:
    """Such as an import that fails before the job's own code runs."""
    states = []
    for restart in range(2):
        begin(run, restart)
        states.append(attempts.finish(run, STAGE, 1).state)
    assert states == ["requeued", "failed"]


def test_a_finetuning_gets_on_in_its_own_folder(run: Path) -> None:
    folder = run / "finetune" / "checkpoints"
    folder.mkdir(parents=True)
    stages = {STAGE: {"job_id": "9", "config": {"output_dir": str(folder.parent)}}}
    launched.write_launch(run, {"max_requeues": 5, "stages": stages})
    for restart in range(2):
        assert fail_at(run, restart, "OSError: disk", "OSError loop.py:3").state == "requeued"
        (folder / f"checkpoint-{restart:08d}.pth").touch()


def test_an_error_s_place_is_its_kind_and_its_lines() -> None:
    def places(text: str) -> str:
        try:
            raise OSError(text)
        except OSError as error:
            return job.traceback_location(error)

    assert places("a 1") == places("b 2")
    assert re.fullmatch(r"OSError test_job\.py:\d+", places("a"))


def test_a_killed_attempt_was_last_seen(run: Path) -> None:
    begin(run, 0)
    bar = {"label": "pretraining", "unit": "steps", "start": 0, "done": 12, "total": 69}
    bar |= {"time": time.mktime((2026, 1, 1, 10, 2, 3, 0, 0, -1))}
    attempts.progress_file(run, STAGE).write_text(json.dumps(bar))
    srun_says(run, "srun: error: node2: task 1: Killed")
    seen = "last seen alive at 2026-01-01 10:02:03 (pretraining 12/69 steps)"
    assert attempts.finish(run, STAGE, 137).reason == f"node2: task 1: Killed, {seen}"
    begin(run, 1)
    attempts.progress_file(run, STAGE).write_text(json.dumps(bar))
    begin(run, 2)  # the node died with the script
    assert attempts.load(run, STAGE).failures == 2


def test_bad_input_does_not_start_again(run: Path) -> None:
    begin(run, 0)
    attempts.write_status(run, "9", 0, 1, error="--x: no", code=2, final=True)
    ended = attempts.finish(run, STAGE, 137)  # srun killed the others
    assert (ended.state, ended.bad_input) == ("failed", True)
    assert ended.reason.endswith(": --x: no")


def test_a_node_that_dies_is_a_failure_and_preemption_is_not(run: Path) -> None:
    """Nobody could say how the attempt ended: had it been told to stop?"""
    begin(run, 0)
    attempts.write_status(run, "9", 0, 0, heard="SIGTERM")
    assert begin(run, 1).failures == 0
    assert begin(run, 2).failures == 1
    assert begin(run, 3).failures == 2
    with pytest.raises(InputError, match="failed 3 times .--max_requeues 2."):
        begin(run, 4)
    assert attempts.load(run, STAGE).state == "failed"


def test_cancelled_runs_do_not_start(run: Path) -> None:
    begin(run, 0)
    launched.cancel(run)
    attempts.write_status(run, "9", 0, 0, heard="SIGTERM", stopped="SIGTERM after step 1")
    assert attempts.finish(run, STAGE, 0).state == "cancelled"
    with pytest.raises(InputError, match="cancelled"):
        begin(run, 1)


# -- the job's script ------------------------------------------------------------------------------


@pytest.fixture
def in_slurm(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The environment of a job, and what was asked of SLURM."""
    asked: list[tuple[str, ...]] = []

    def ask(*command: str, stdin: str | None = None) -> str:
        asked.append(command)
        return "JobId=9 Restarts=0 JobState=RUNNING Reason=None"

    monkeypatch.setattr(scheduler, "run_command", ask)
    for name, value in {"ID": "9", "NUM_NODES": "1", "NODELIST": "node1"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    launched.write_launch(run, launched.read_launch(run) | {"needs": []})
    attempts.save(run, attempts.Record(STAGE))
    return asked


def test_the_script_requeues_what_saved_itself(run: Path, in_slurm: list[tuple[str, ...]]) -> None:
    assert job.main(["begin", str(run), STAGE]) == 0
    attempts.write_status(run, "9", 0, 0, heard="SIGUSR2", stopped="SIGUSR2 after step 1")
    assert job.main(["finish", str(run), STAGE, "0"]) == attempts.RESUMABLE
    assert in_slurm[-1] == ("scontrol", "requeue", "9")


@pytest.mark.parametrize(
    ("facts", "asked", "state"),
    [
        ("Restarts=0 JobState=RUNNING Reason=None", True, "requeued"),
        ("Restarts=0 JobState=COMPLETING Reason=TimeLimit", True, "requeued"),
        ("Restarts=1 JobState=COMPLETING Reason=None", False, "requeued"),  # preempted
        ("Restarts=0 JobState=COMPLETING Reason=None", False, "cancelled"),  # scancel
    ],
)
def test_the_scheduler_may_have_been_quicker(
    run: Path,
    in_slurm: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    facts: str,
    asked: bool,
    state: str,
) -> None:
    """What ``scontrol show job`` says in a job that saved itself: seen on SLURM 22.05."""
    job.main(["begin", str(run), STAGE])
    attempts.write_status(run, "9", 0, 0, heard="SIGTERM", stopped="SIGTERM after step 1")
    fields = dict(word.split("=") for word in facts.split())
    monkeypatch.setattr(scheduler, "job_fields", lambda job_id: fields)
    assert job.main(["finish", str(run), STAGE, "0"]) == attempts.RESUMABLE
    assert (("scontrol", "requeue", "9") in in_slurm) == asked
    assert attempts.load(run, STAGE).state == state


def test_a_busy_controller_is_asked_again(
    run: Path, in_slurm: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([scheduler.SlurmError("timed out"), "", "", scheduler.SlurmError("timed out")])

    def ask(*command: str, stdin: str | None = None) -> str:
        in_slurm.append(command)
        if command[1] == "requeue" and isinstance(error := next(answers), Exception):
            raise error
        return "Restarts=0 JobState=RUNNING Reason=None"

    monkeypatch.setattr(scheduler, "run_command", ask)
    monkeypatch.setattr(scheduler, "PAUSE", 0.0)
    assert scheduler.requeue("9", 0)
    assert in_slurm.count(("scontrol", "requeue", "9")) == 2
    monkeypatch.setattr(scheduler, "REQUEUE_ATTEMPTS", 1)
    next(answers)
    with pytest.raises(scheduler.SlurmError, match="timed out"):
        scheduler.requeue("9", 0)


def test_a_node_that_starts_nothing_counts_as_a_failure(
    run: Path, in_slurm: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a mistake in the code: the same words twice are not the end."""

    def lacking(paths: list[str], nodes: int) -> str:
        raise scheduler.SlurmError("Task launch failed on node node2")

    monkeypatch.setattr(scheduler, "unreadable", lacking)
    for failures in (1, 2):
        assert job.main(["begin", str(run), STAGE]) == attempts.RESUMABLE
        known = attempts.load(run, STAGE)
        assert (known.state, known.failures) == ("requeued", failures)
        assert known.reason == "Task launch failed on node node2"


def test_a_missing_index_ends_the_job_before_it_trains(
    run: Path, in_slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    launched.write_launch(run, launched.read_launch(run) | {"needs": ["/nowhere/index.json"]})
    assert job.main(["begin", str(run), STAGE]) == 2
    assert "/nowhere/index.json cannot be read on" in capsys.readouterr().err
    assert attempts.load(run, STAGE).state == "failed"


# -- one rank --------------------------------------------------------------------------------------


class Place:
    """A process among others, as submitit describes it."""

    job_id, global_rank, local_rank, num_nodes = "9", 0, 0, 1
    hostnames = ("localhost",)

    def __init__(self, num_tasks: int = 1):
        self.num_tasks = num_tasks


def rank(run: Path, num_tasks: int, config: Any = None, stage: str = STAGE) -> job.Rank:
    made = job.StageJob(stage, "m:f", config, run, num_tasks=4)
    return job.Rank(made, Place(num_tasks))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "size", "accum"), [(4, 6, 1), (2, 6, 2), (1, 6, 4), (8, 3, 1), (3, 6, 4 / 3)]
)
def test_another_number_of_processes_keeps_the_global_batch(
    run: Path, now: int, size: int, accum: float
) -> None:
    config = replace(PretrainConfig(), {"batch_size_per_gpu": 6})
    fitted = rank(run, now, config).adapt_config(config).run
    assert fitted.batch_size_per_gpu * fitted.accum_iter * now == 24
    if accum == int(accum):
        assert (fitted.batch_size_per_gpu, fitted.accum_iter) == (size, accum)


def test_a_number_that_does_not_divide_is_refused(run: Path) -> None:
    config = replace(PretrainConfig(), {"batch_size_per_gpu": 6})
    with pytest.raises(InputError, match="a global batch of 24 does not divide among 5 processes"):
        rank(run, 5, config).adapt_config(config)


def test_signals_are_noted_once(run: Path) -> None:
    here = rank(run, 1)
    here.on_signal(signal.SIGUSR2, None)
    here.on_signal(signal.SIGUSR2, None)
    here.on_signal(signal.SIGTERM, None)
    assert signals.requested() == "SIGUSR2"
    signals.clear()
    assert [word["heard"] for word in attempts.read_statuses(run, "9", 0)] == ["SIGUSR2"]


def test_a_stage_with_nothing_to_save_ends_at_once(run: Path) -> None:
    with pytest.raises(job.Interrupted, match="SIGTERM"):
        rank(run, 1, stage="knn").on_signal(signal.SIGTERM, None)
    assert signals.requested() is None


# -- how ranks meet --------------------------------------------------------------------------------


def meet(key: str, size: int, seconds: float = 10) -> list[tuple[str, int]]:
    """(address, port) that each of the other ranks found; rank 0 answers in this thread."""
    found: list[tuple[str, int]] = []
    deadline = time.monotonic() + seconds

    def other(rank: int) -> None:
        with contextlib.suppress(env.RendezvousError):
            found.append(env.find_rank_zero(key, rank, ["127.0.0.1"], deadline)[:2])

    threads = [threading.Thread(target=other, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    with env.listen(key) as listener:
        assert env.accept_ranks(listener, key, size, deadline) == "lo"
        for thread in threads:
            thread.join()
        assert {port for _, port in found} == {listener.getsockname()[1]}
    return found


def test_ranks_meet() -> None:
    assert len(meet("a", 9)) == 8


def test_each_restart_has_ports_of_its_own() -> None:
    ports = [env.candidates(f"job 7 {restart}") for restart in range(50)]
    assert all(len(set(some)) == env.CANDIDATES for some in ports)
    assert len({some[0] for some in ports}) == 50
    assert all(port in env.PORTS for some in ports for port in some)


def test_ranks_meet_past_strangers() -> None:
    """The first ports belong to a silent listener, a talkative one, and another job's rank 0."""
    key = f"b {os.getpid()}"  # the tests may run twice at a time
    strangers = [socket.socket() for _ in range(3)]
    try:
        for stranger, port in zip(strangers, env.candidates(key), strict=False):
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(("127.0.0.1", port))
            stranger.listen()
        start_answering(strangers[1], b"HTTP/1.0 400\r\n\r\n")
        wrong = f"{env.greeting('c')} 0\n".encode()
        start_answering(strangers[2], wrong)
        found = meet(key, 3, seconds=40)
        assert len(found) == 2 and found[0][1] not in [s.getsockname()[1] for s in strangers]
    finally:
        for stranger in strangers:
            with contextlib.suppress(OSError):
                stranger.shutdown(socket.SHUT_RDWR)
            stranger.close()


def start_answering(listener: socket.socket, words: bytes) -> None:
    """Say the same to everybody, until the listener is shut down."""

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(200)
                    peer.sendall(words)

    threading.Thread(target=answer, daemon=True).start()


def test_strangers_do_not_count() -> None:
    key, deadline = "d", time.monotonic() + 0.5
    with env.listen(key) as listener:
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\n")
            with pytest.raises(env.RendezvousError, match="ranks 1, 2 of 3 did not join"):
                env.accept_ranks(listener, key, 3, deadline)


def test_a_rank_without_rank_0_says_where_it_looked() -> None:
    with pytest.raises(env.RendezvousError, match="rank 5 on .* found no rank 0 at 127.0.0.1"):
        env.find_rank_zero("e", 5, ["127.0.0.1"], time.monotonic() + 0.1)


def test_addresses_that_others_can_reach_come_first() -> None:
    found = env.resolve_hosts(["127.0.1.1", "no-such-host.invalid", "192.0.2.1", "localhost"])
    assert found[0] == "192.0.2.1" and "127.0.1.1" in found[1:]


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert env.join("f", 0, 1, 0, ["localhost"]) is None
    assert "RANK" not in os.environ


def test_standin_resumes(tmp_path: Path) -> None:
    """The stand-in trainer of other tests keeps the real one's contract."""
    from tests.standin import train
    from xcit_dino.errors import Stopped

    signals.request("SIGUSR2")
    with pytest.raises(Stopped, match="after step 1"):
        train(StandinConfig(tmp_path))
    signals.clear()
    train(StandinConfig(tmp_path))
    assert (tmp_path / "step").read_text() == "3"
