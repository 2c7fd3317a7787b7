"""The launcher on a real SLURM: two nodes, preemption, time limits, dead ranks, dead nodes, chains.

Weights of interrupted runs are compared bit for bit with those of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm_cluster import Cluster, Unavailable, cluster
from xcit_dino.slurm import record
from xcit_dino.slurm.watch import read_state

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
RECIPE = """
arch: xcit_pico_6_p4
drop_path_rate: 0.05
epochs: 2
batch_size_per_gpu: 4
lr: 0.002
warmup_epochs: 1
out_dim: 64
head_hidden_dim: 32
head_bottleneck_dim: 16
global_crops_size: 16
local_crops_number: 2
local_crops_size: 8
num_workers: 1
log_every: 1
precision: fp32
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as made:
            yield made
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 80 images, a recipe, and room for runs."""
    folder = tmp_path_factory.mktemp("runs and 'data'")
    command = [
        "shards",
        "demo",
        str(folder / "shards"),
        "--train",
        "80",
        "--val",
        "40",
        "--size",
        "16",
    ]
    subprocess.run(
        [sys.executable, "-m", "xcit_dino.cli", *command], check=True, capture_output=True
    )
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


class Run:
    """One run of the tiny recipe."""

    def __init__(self, slurm: Cluster, place: Path, name: str):
        self.slurm, self.place, self.folder = slurm, place, place / name

    def launch(
        self, *words: str, nodes: int = 2, nproc: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """``xcit-dino launch`` with the tiny recipe; the command's result."""
        options = {
            "config": self.place / "tiny.yaml", "data_path": self.place / "shards",
            "output_dir": self.folder, "cluster": "slurm", "nodes": nodes, "nproc": nproc,
            "ngpus": 0, "cpus_per_task": 1,
        }  # fmt: skip
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = os.environ | self.slurm.environment
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, "-m", "xcit_dino.cli", "launch", *flags, *words],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def command(self, name: str) -> subprocess.CompletedProcess[str]:
        """``xcit-dino launch NAME`` for this run."""
        return subprocess.run(
            [sys.executable, "-m", "xcit_dino.cli", "launch", name, str(self.folder)],
            env=os.environ | self.slurm.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def started_again(self, job: str, attempt: int) -> record.Record:
        """Wait until the job runs for the n-th time; SLURM would let it wait for some seconds."""
        wait_until(lambda: int(self.slurm.facts(job)["Restarts"]) >= attempt - 1, self.explain)
        self.slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
        wait_until(lambda: record.load(self.folder, "pretrain").attempts >= attempt, self.explain)
        return record.load(self.folder, "pretrain")

    def shorten_time(self, job: str) -> None:
        """Set a time limit that comes soon."""
        began = time.mktime(time.strptime(self.slurm.facts(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        minutes = int((time.time() - began + 30) / 60) + 1
        self.slurm.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")

    def submit(self, *words: str, nodes: int = 2, nproc: int = 1) -> str:
        """Launch; the job id of the first stage."""
        done = self.launch(*words, nodes=nodes, nproc=nproc)
        assert done.returncode == 0, done.stderr
        return next(iter(record.read_launch(self.folder)["stages"].values()))["job_id"]

    def losses(self) -> dict[int, float]:
        """``step -> loss`` of the metrics; a step that is there twice fails."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    def hold(self, job: str) -> int:
        """Wait until this attempt has done a step, then hold rank 1 (and with it all) by SIGSTOP.

        SLURM's signals come with a SIGCONT, which lets go.

        Returns:
            The process id of rank 1.
        """

        def stepped() -> bool:
            state = read_state(record.progress_file(self.folder, "pretrain"))
            return state is not None and state["done"] > state["start"]

        wait_until(stepped, self.explain)
        pid = rank_pid(job, 1)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def wait_for_end(self, stage: str = "pretrain") -> record.Record:
        wait_until(lambda: record.load(self.folder, stage).finished, self.explain)
        return record.load(self.folder, stage)

    def explain(self) -> str:
        """Records, logs and SLURM's view, for a test that fails."""
        paths = [
            *self.folder.glob("launch/*.progress.json"),
            *self.folder.glob("launch/jobs/*/*log*"),
        ]
        texts = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in paths]
        records = [record.load(self.folder, stage) for stage in ("pretrain", "knn", "linear")]
        jobs = self.slurm.run("scontrol", "show", "job", "--oneliner", check=False)
        return "\n".join([*texts, *map(str, records), self.slurm.log(), jobs])

    def weights(self) -> dict[str, torch.Tensor]:
        """Student, teacher and centre at the end."""
        newest = sorted((self.folder / "checkpoints").glob("*.pth"))[-1]
        return tensors(torch.load(newest, weights_only=True))


def tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested dict, by path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= tensors(value, f"{path}/{key}")
    return found


def wait_until(condition, explain, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def rank_pid(job_id: str, rank: int) -> int:
    """Process id of a rank of a job."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except (OSError, NotADirectoryError):
            continue
        wanted = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= set(words) and b"submitit.core._submit" in command:
            return int(entry.name)
    raise AssertionError(f"no rank {rank} of job {job_id}")


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, place: Path) -> Run:
    """Two nodes with one process each, from the first step to the last."""
    run = Run(slurm, place, "uninterrupted")
    run.submit()
    ended = run.wait_for_end()
    assert (ended.state, ended.attempts) == ("done", 1), run.explain()
    return run


def assert_same_end(run: Run, uninterrupted: Run) -> None:
    """The same bits, and one curve: every step once."""
    expected, found = uninterrupted.weights(), run.weights()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert list(run.losses()) == list(range(1, 21))
    assert run.losses() == uninterrupted.losses()


def assert_close(run: Run, other: Run) -> None:
    """Float sums in another order: the losses agree to 4 digits, the weights to 3 (as a vector)."""
    expected, found = other.losses(), run.losses()
    assert list(found) == list(expected) == list(range(1, 21))
    for step, loss in expected.items():
        assert abs(found[step] - loss) < 1e-4 * loss, (step, found[step], loss)
    pairs = [(run.weights()[name], tensor) for name, tensor in other.weights().items()]
    floats = [(a, b) for a, b in pairs if b.is_floating_point()]
    distance = sum(float((a - b).square().sum()) for a, b in floats) ** 0.5
    assert distance < 1e-3 * sum(float(b.square().sum()) for _, b in floats) ** 0.5


def test_one_run_through_everything(slurm: Cluster, place: Path, uninterrupted: Run) -> None:
    """Preempted, a rank killed, a node set down, out of time: the same end, bit for bit."""
    run = Run(slurm, place, "interrupted")
    job = run.submit("--signal_delay", "30")

    run.hold(job)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1")
    attempt = run.started_again(job, 2)
    assert attempt.failures == 0

    os.kill(run.hold(job), signal.SIGKILL)
    attempt = run.started_again(job, 3)
    assert attempt.failures == 1
    log = (record.job_folder(run.folder, job) / f"{job}_0_log.err").read_text()
    assert "pretrain: requeued (node2: task 1: Killed)" in log

    pid = run.hold(job)
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING", run.explain)
    wait_until(lambda: not record.start_time(pid), run.explain)  # what a dead node has not left
    slurm.run("scontrol", "update", "nodename=node2", "state=resume")
    run.started_again(job, 4)

    run.hold(job)
    run.shorten_time(job)
    run.started_again(job, 5)

    ended = run.wait_for_end()
    assert (ended.state, ended.attempts) == ("done", 5), run.explain()
    assert_same_end(run, uninterrupted)


def test_two_nodes_two_tasks_equal_one_process(slurm: Cluster, place: Path) -> None:
    """Batch-norm is synchronised: both layouts see the statistics of the global batch.

    Drop-path is off: each rank draws its own paths, so that another layout draws others.
    """
    many, one = Run(slurm, place, "2x2"), Run(slurm, place, "1x1")
    many.submit("--batch_size_per_gpu", "2", "--drop_path_rate", "0", nodes=2, nproc=2)
    one.submit("--batch_size_per_gpu", "8", "--drop_path_rate", "0", nodes=1, nproc=1)
    assert {many.wait_for_end().state, one.wait_for_end().state} == {"done"}, many.explain()
    assert_close(many, one)


def test_fewer_nodes_after_a_requeue(slurm: Cluster, place: Path, uninterrupted: Run) -> None:
    """The job shrinks while it waits; the global batch and the order of the data stay.

    It now takes two micro-batches a step, each with batch-norm statistics of its own, and other
    drop-paths, so the curve is near the other one but not on it.
    """
    run = Run(slurm, place, "shrunk")
    job = run.submit()
    run.hold(job)
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING", run.explain)
    slurm.run("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")
    run.started_again(job, 2)
    ended = run.wait_for_end()
    assert (ended.state, ended.hosts) == ("done", "node1"), run.explain()
    expected, found = uninterrupted.losses(), run.losses()
    assert list(found) == list(expected)
    assert all(abs(found[step] - loss) < 0.1 * loss for step, loss in expected.items())
    newest = sorted((run.folder / "checkpoints").glob("*.pth"))[-1]
    assert torch.load(newest, weights_only=True)["global_batch"] == 8


def test_chain(slurm: Cluster, place: Path) -> None:
    """One command: pretraining, k-NN, linear probe, report."""
    run = Run(slurm, place, "chain")
    words = ["--epochs", "1", "--stages", "pretrain,knn,linear,report"]
    words += ["--knn.nb_knn", "5", "--knn.num_workers", "0", "--linear.num_workers", "0"]
    run.submit(*words, "--linear.epochs", "2")
    assert run.wait_for_end("report").state == "done", run.explain()
    results = json.loads((run.folder / "results.json").read_text())
    assert {"knn", "linear"} <= set(results)
    assert (run.folder / "report.html").is_file()
    again = run.launch(*words, "--linear.epochs", "2")
    assert again.returncode == 0 and "nothing to run" in again.stdout


def test_a_failed_stage_cancels_the_later_ones(slurm: Cluster, place: Path) -> None:
    run = Run(slurm, place, "failed chain")
    run.submit("--stages", "pretrain,knn", "--setup", "false || exit 7", "--max_requeues", "0")
    jobs = [stage["job_id"] for stage in record.read_launch(run.folder)["stages"].values()]
    wait_until(lambda: slurm.facts(jobs[1])["JobState"] == "CANCELLED", run.explain)
    shown = run.command("status")
    assert "cancelled: pretrain is" in shown.stdout, shown.stdout + shown.stderr


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "man"], "--partition man: no such partition; did you mean main?"),
        (["--ngpus", "3"], "--ngpus 3: a node has 2"),
        (["--nodes", "3"], "SLURM refuses the job of stage pretrain: "),
        (["--account", "x\ny"], "--account: must not hold line breaks"),
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


def test_names_and_folders_in_use(slurm: Cluster, place: Path) -> None:
    run = Run(slurm, place, "busy")
    job = run.submit("--job_name", "mine")
    again = run.launch("--job_name", "other")
    assert again.returncode == 2 and f"SLURM job {job}" in again.stderr, again.stderr
    twin = Run(slurm, place, "twin").launch("--job_name", "mine")
    assert twin.returncode == 2 and f"job {job} is already called mine-pretrain" in twin.stderr
    assert run.command("cancel").returncode == 0
    wait_until(lambda: not slurm.run("squeue", "--noheader").strip(), run.explain)
    assert "cancelled" in run.command("status").stdout


def test_so_many_seeds_at_a_time(slurm: Cluster, place: Path) -> None:
    run = Run(slurm, place, "sweep")
    words = ["--seeds", "0", "1", "2", "--array_parallelism", "2", "--slurm", "begin=now+1hour"]
    done = run.launch(*words, "--stages", "pretrain,knn")
    assert done.returncode == 0, done.stderr
    runs = [record.read_launch(place / f"sweep-seed{seed}") for seed in range(3)]
    jobs = [[stage["job_id"] for stage in run["stages"].values()] for run in runs]
    waits = [slurm.facts(pretrain)["Dependency"] for pretrain, _ in jobs]
    assert waits == ["(null)", "(null)", f"afterany:{jobs[0][1]}(unfulfilled)"]
    assert slurm.facts(jobs[2][1])["Dependency"] == f"afterok:{jobs[2][0]}(unfulfilled)"
    slurm.run("scancel", *sum(jobs, []))


@pytest.mark.parametrize("hidden", ["launch", "shards"])
def test_folder_that_a_node_does_not_see(slurm: Cluster, place: Path, hidden: str) -> None:
    run = Run(slurm, place, f"unshared {hidden}")
    folder = run.folder if hidden == "launch" else place / "shards"
    folder.mkdir(exist_ok=True)
    slurm.stop_node("node2")
    slurm.start_node("node2", hidden=folder)
    try:
        wait_until(lambda: slurm.idle() == 2, slurm.log, 30)
        run.submit()
        ended = run.wait_for_end()
        assert ended.state == "failed" and ended.bad_input, run.explain()
        assert str(folder) in ended.reason and "cannot be read on node2" in ended.reason
    finally:
        slurm.stop_node("node2")
        slurm.start_node("node2")
        wait_until(lambda: slurm.idle() == 2, slurm.log, 30)
