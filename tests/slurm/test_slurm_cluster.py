"""The launcher on a real SLURM: two nodes, preemption, time limits, dead ranks, dead nodes, chains.

Weights of interrupted runs are compared bit for bit with those of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm_cluster import Cluster, Unavailable, cluster
from tests.slurm_run import IMAGES, RECIPE, STEPS, Run
from tests.standin import plan_of
from xcit_dino.slurm import attempts, launch, launched

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]
EPOCH = STEPS // 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as made:
            yield made
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a recipe, and room for runs."""
    folder = tmp_path_factory.mktemp("runs and 'data'")
    words = ["shards", "demo", str(folder / "shards")]
    words += ["--train", str(IMAGES), "--val", "40", "--size", "16"]
    subprocess.run([sys.executable, "-m", "xcit_dino.cli", *words], check=True, capture_output=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


# -- interruptions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, place: Path) -> Run:
    """Two nodes with one process each, from the first step to the last."""
    run = Run(slurm, place, "uninterrupted")
    run.submit()
    ended = run.wait_for_end()
    assert (ended.state, ended.attempts) == ("done", 1), run.explain()
    return run


def test_one_run_through_everything(slurm: Cluster, place: Path, uninterrupted: Run) -> None:
    """Preempted in the middle of an epoch, a rank killed, a node set down, out of time: the same
    end, bit for bit."""
    run = Run(slurm, place, "interrupted")
    job = run.submit("--signal_delay", "120")

    # a job of higher priority; the ranks have been told to stop before, and are told twice
    run.hold(job)
    shown = run.command("status", str(run.folder)).stdout
    assert all(word in shown for word in ("running", "eta", "epoch", "loss", "img/s")), shown
    slurm.run("scancel", "--signal=USR2", job)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    attempt = run.started_again(job, 2)
    assert attempt.failures == 0

    os.kill(run.hold(job), signal.SIGKILL)
    attempt = run.started_again(job, 3)
    assert attempt.failures == 1
    log = (attempts.job_folder(run.folder, job) / f"{job}_0_log.err").read_text()
    assert "pretrain: requeued (node2: task 1: Killed, last seen alive at" in log

    pid = run.hold(job)
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    os.kill(pid, signal.SIGKILL)  # a dead node leaves nothing behind
    run.wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING")
    slurm.run("scontrol", "update", "nodename=node2", "state=resume")
    run.started_again(job, 4)

    run.run_out_of_time(job, run.hold(job))
    attempt = run.started_again(job, 5)
    assert attempt.failures == 2

    ended = run.wait_for_end()
    assert (ended.state, ended.attempts) == ("done", 5), run.explain()
    first, preempted, killed, dead, late = run.tries()
    assert first == 0 < preempted < EPOCH, "it was interrupted in the middle of an epoch"
    assert preempted == killed == dead < late < STEPS, "saved when told to, not when killed"
    assert_same_end(run, uninterrupted)


def test_every_ending_is_judged(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, and the death of the very node that judges, with a trainer without torch."""
    for name, value in (slurm.environment | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    run = Run(slurm, tmp_path, "standin")
    run.folder.mkdir()
    plan = plan_of(run.folder, steps=1000, seconds=0.3)
    assert launch.start(plan, list(plan.stages), "slurm") == 0
    job = launched.read_launch(run.folder)["stages"]["pretrain"]["job_id"]

    def held(attempt: int) -> int:
        """The rank of an attempt that has done a step, stopped."""
        run.wait_until(lambda: slurm.hurry() or len(attempts_of(run)) == attempt)
        pid = slurm.rank_pid(job, 0)
        os.kill(pid, signal.SIGSTOP)
        return pid

    held(1)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    os.kill(held(2), signal.SIGKILL)
    held(3)
    slurm.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    slurm.kill_left_over()  # a dead node leaves nothing behind, not even the job's script
    run.run_out_of_time(job, held(4))
    slurm.run("scontrol", "update", "nodename=node1", "state=resume")
    held(5)
    slurm.run("scancel", job)
    ended = run.wait_for_end()
    assert (ended.state, ended.reason) == ("cancelled", "by scancel"), run.explain()
    assert (ended.attempts, ended.failures) == (5, 2), run.explain()
    preempted, killed, lost, late, cancelled = attempts_of(run)
    assert preempted[0] == 1 and killed[0] == lost[0] == late[0] == preempted[-1] + 1
    assert cancelled[0] == late[-1] + 1


def attempts_of(run: Run) -> list[list[int]]:
    """The steps of the stand-in's attempts, in order."""
    place = run.folder / "steps"
    found: dict[str, list[int]] = {}
    for line in place.read_text().splitlines() if place.is_file() else ():
        step, _, pid = line.split()
        found.setdefault(pid, []).append(int(step))
    return list(found.values())


def assert_same_end(run: Run, uninterrupted: Run) -> None:
    """The same bits, and one curve: every step once."""
    expected, found = uninterrupted.weights(), run.weights()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert list(run.losses()) == list(range(1, STEPS + 1))
    assert run.losses() == uninterrupted.losses()


def test_fewer_nodes_after_a_requeue(slurm: Cluster, place: Path, uninterrupted: Run) -> None:
    """The job shrinks while it waits; the global batch and the order of the data stay.

    It now takes two micro-batches a step, each with batch-norm statistics of its own, and other
    drop-paths, so the curve is near the other one but not on it.
    """
    run = Run(slurm, place, "shrunk")
    job = run.submit()
    run.hold(job)
    slurm.run("scontrol", "requeue", job)
    run.wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING")
    slurm.run("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")
    run.started_again(job, 2)
    ended = run.wait_for_end()
    assert (ended.state, ended.hosts) == ("done", "node1"), run.explain()
    expected, found = uninterrupted.losses(), run.losses()
    assert list(found) == list(expected)
    assert all(abs(found[step] - loss) < 0.1 * loss for step, loss in expected.items())
    newest = sorted((run.folder / "checkpoints").glob("*.pth"))[-1]
    assert torch.load(newest, weights_only=True)["global_batch"] == 8


def test_rehearsal(slurm: Cluster, place: Path) -> None:
    """Two processes of one node, stopped and killed on purpose; the verdict of ``rehearse``."""
    words = ["--output_dir", str(place / "rehearsal"), "--cluster", "slurm", "--nproc", "2"]
    words += ["--ngpus", "0", "--cpus_per_task", "1", "--epochs", "5", "--knn_every", "0"]
    run = Run(slurm, place, "rehearsal/interrupted")
    started = run.start("rehearse", *words)
    run.wait_for_command(started)
    said, complaints = started.communicate()
    assert started.returncode == 0, said + complaints
    assert said.count("\nyes  ") == 6 and said.endswith("verdict: nothing is lost here\n"), said


# -- layouts and chains ----------------------------------------------------------------------------


CHAIN = {
    "stages": "pretrain,knn,linear,finetune,distill,report",
    "batch_size_per_gpu": 8, "drop_path_rate": 0,
    "knn.nb_knn": 5, "knn.num_workers": 0, "linear.epochs": 2, "linear.num_workers": 0,
    "finetune.epochs": 1, "finetune.input_size": 16, "finetune.num_workers": 1,
    "distill.epochs": 1, "distill.input_size": 16, "distill.num_workers": 1,
    "distill.teacher_model": "xcit_pico_6_p4",
}  # fmt: skip


@pytest.fixture(scope="module")
def chain(slurm: Cluster, place: Path) -> Run:
    """One command: pretraining on one process, and all that follows it."""
    run = Run(slurm, place, "chain")
    run.submit(*chain_words(run), nodes=1)
    assert run.wait_for_end("report").state == "done", run.explain()
    return run


def chain_words(run: Run) -> list[str]:
    options = CHAIN | {"distill.teacher_path": run.folder / "finetune"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_chain(chain: Run) -> None:
    states = {
        stage: attempts.load(chain.folder, stage).state for stage in CHAIN["stages"].split(",")
    }
    assert set(states.values()) == {"done"}, states
    assert {"knn", "linear"} <= set(json.loads((chain.folder / "results.json").read_text()))
    for stage in ("finetune", "distill"):
        assert stage in json.loads((chain.folder / stage / "results.json").read_text())
    assert (chain.folder / "report.html").is_file()
    again = chain.launch(*chain_words(chain), nodes=1)
    assert again.returncode == 0 and "nothing to run" in again.stdout, again.stdout + again.stderr


def test_two_nodes_two_tasks_equal_one_process(slurm: Cluster, place: Path, chain: Run) -> None:
    """Batch-norm is synchronized: both layouts see the statistics of the global batch.

    Drop-path is off, since each rank draws its own paths. What remains are float sums in another
    order: losses agree to 4 digits, weights to 3 (as a vector).
    """
    run = Run(slurm, place, "2x2")
    run.submit("--drop_path_rate", "0", "--batch_size_per_gpu", "2", nodes=2, nproc=2)
    assert run.wait_for_end().state == "done", run.explain()
    expected, found = chain.losses(), run.losses()
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert abs(found[step] - loss) < 1e-4 * loss, (step, found[step], loss)
    ours, theirs = run.weights(), chain.weights()
    floats = [(ours[name], b) for name, b in theirs.items() if b.is_floating_point()]
    distance = sum(float((a - b).square().sum()) for a, b in floats) ** 0.5
    assert distance < 1e-3 * sum(float(b.square().sum()) for _, b in floats) ** 0.5


APPTAINER = """#!/bin/bash
# stands in for apptainer: notes its options, then runs the rest with the host's Python
echo "$@" >> {log}
while [ "$1" != {image} ]; do shift; done
shift 2
export IN_CONTAINER=1
exec {python} "$@"
"""


def test_in_a_container(slurm: Cluster, place: Path, uninterrupted: Run) -> None:
    """The ranks are started by the container's runtime, stopped and requeued as without one."""
    programs, image = place / "programs", place / "image.sif"
    programs.mkdir()
    image.touch()
    log = programs / "log"
    text = APPTAINER.format(log=shlex.quote(str(log)), image=shlex.quote(str(image)),
                            python=shlex.quote(sys.executable))  # fmt: skip
    (programs / "apptainer").write_text(text)
    (programs / "apptainer").chmod(0o755)
    run = Run(slurm, place, "contained")
    path = f"export PATH={shlex.quote(str(programs))}:$PATH"
    job = run.submit("--container", str(image), "--setup", path)
    run.hold(job)
    slurm.run("scontrol", "requeue", job)
    run.started_again(job, 2)
    assert run.wait_for_end().state == "done", run.explain()
    assert_same_end(run, uninterrupted)
    seen = log.read_text().splitlines()
    assert len(seen) == 4  # two ranks, two attempts
    assert all(f"--bind {run.folder} --bind {place / 'shards'}" in line for line in seen)


def test_a_failed_stage_cancels_the_later_ones(slurm: Cluster, place: Path) -> None:
    run = Run(slurm, place, "failed chain")
    run.submit("--stages", "pretrain,knn", "--setup", "false || exit 7", "--max_requeues", "0")
    jobs = [stage["job_id"] for stage in launched.read_launch(run.folder)["stages"].values()]
    run.wait_until(lambda: slurm.facts(jobs[1])["JobState"] == "CANCELLED")
    shown = run.command("status", str(run.folder))
    assert "cancelled: pretrain is" in shown.stdout, shown.stdout + shown.stderr


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "man"], "--partition man: no such partition; did you mean main?"),
        (["--ngpus", "3"], "--ngpus 3: a node has 2"),
        (["--nodes", "3"], "SLURM refuses the job of stage pretrain: "),
        (["--account", "x\ny"], "--account: must not contain line breaks"),
        (["--slurm", "licenses=matlab"], "Invalid license specification"),
        (["--data_path", "/nowhere"], "--data_path /nowhere: no train shards there"),
    ],
)
def test_refused(slurm: Cluster, place: Path, words: list[str], message: str) -> None:
    run = Run(slurm, place, "refused")
    done = run.launch(*words)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert not slurm.run("squeue", "--noheader").strip()
    assert not (run.folder / "config.yaml").exists()  # other options may be tried


def test_names_and_folders_in_use(slurm: Cluster, place: Path) -> None:
    """A job that runs (and does nothing) keeps its folder and its name; cancelling frees both."""
    run = Run(slurm, place, "busy")
    job = run.submit("--job_name", "mine", "--setup", "sleep 3600")
    run.wait_until(lambda: slurm.facts(job)["JobState"] == "RUNNING")
    again = run.launch("--job_name", "other")
    assert again.returncode == 2 and f"SLURM job {job} (RUNNING)" in again.stderr, again.stderr
    twin = Run(slurm, place, "twin").launch("--job_name", "mine")
    assert twin.returncode == 2 and f"job {job} is already called mine-pretrain" in twin.stderr
    assert run.command("cancel", str(run.folder)).returncode == 0
    run.wait_until(lambda: not slurm.run("squeue", "--noheader").strip())
    assert "cancelled" in run.command("status", str(run.folder)).stdout


def test_so_many_seeds_at_a_time(slurm: Cluster, place: Path) -> None:
    run = Run(slurm, place, "sweep")
    words = ["--seeds", "0", "1", "2", "--array_parallelism", "2", "--slurm", "begin=now+1hour"]
    done = run.launch(*words, "--stages", "pretrain,knn")
    assert done.returncode == 0, done.stderr
    runs = [launched.read_launch(place / f"sweep-seed{seed}") for seed in range(3)]
    jobs = [[stage["job_id"] for stage in run["stages"].values()] for run in runs]
    waits = [slurm.facts(pretrain)["Dependency"] for pretrain, _ in jobs]
    assert waits == ["(null)", "(null)", f"afterany:{jobs[0][1]}(unfulfilled)"]
    assert slurm.facts(jobs[2][1])["Dependency"] == f"afterok:{jobs[2][0]}(unfulfilled)"
    slurm.run("scancel", *sum(jobs, []))


def test_folders_that_a_node_does_not_see(slurm: Cluster, place: Path) -> None:
    """The run folder, or the shards' index: found before training, on the node that lacks it."""
    unshared, shared = Run(slurm, place, "unshared"), Run(slurm, place, "shared")
    unshared.folder.mkdir()
    slurm.restart_node("node2", hidden=[unshared.folder, place / "shards"])
    try:
        for run, lacking in ((unshared, unshared.folder), (shared, place / "shards")):
            run.submit()
            ended = run.wait_for_end()
            assert ended.state == "failed" and ended.bad_input, run.explain()
            assert str(lacking) in ended.reason and "cannot be read on node2" in ended.reason
    finally:
        slurm.restart_node("node2")
