"""The launcher's command line, its script, its checks, and local runs of a stand-in trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.standin import StandinConfig, plan_of, start
from xcit_dino.data.pack.demo import make
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.options import option_types
from xcit_dino.slurm import (
    attempts,
    checks,
    launch,
    launched,
    local,
    scheduler,
    snapshot,
    status,
    submit,
)
from xcit_dino.slurm.config import (
    CancelConfig,
    Launch,
    LaunchConfig,
    LogsConfig,
    ResourceConfig,
    Stage,
    StatusConfig,
)
from xcit_dino.slurm.stages import launch_config, split_args
from xcit_dino.slurm.tools import dry_run, monitor
from xcit_dino.slurm.tools.monitor import WatchConfig
from xcit_dino.slurm.tools.rehearse import rehearse_config
from xcit_dino.slurm.tools.rehearse import resolve as rehearsal
from xcit_dino.slurm.tools.rehearse import run as rehearse
from xcit_dino.ssl.config import PretrainConfig

ROOT = Path(__file__).parents[2]
ARCH = ["--arch", "xcit_nano_12_p16"]
NOW = "2026-01-01T10:00:00+00:00"


@pytest.fixture(autouse=True)
def no_user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


# -- command line ----------------------------------------------------------------------------------


def test_no_option_means_two_things() -> None:
    assert not set(option_types(LaunchConfig)) & set(option_types(PretrainConfig))


def test_words_go_where_they_belong() -> None:
    own, by_stage, rest = split_args(
        shlex.split("--nodes 2 --epochs=5 --knn.nb-knn 10 20 --setup 'a b' c --lr 1")
    )
    assert own == ["--nodes", "2", "--setup", "a b", "c"]
    assert by_stage == {"knn": ["--nb_knn", "10", "20"]}
    assert rest == ["--epochs=5", "--lr", "1"]


def test_one_line_configures_all_stages(tmp_path: Path) -> None:
    words = [*ARCH, "--output_dir", str(tmp_path / "run"), "--stages", "knn,pretrain,report,embed"]
    words += [
        "--embed.split",
        "val",
        "--nodes",
        "2",
        "--ngpus",
        "4",
        "--partition",
        "gpu",
        "--knn.nb_knn",
        "5",
    ]
    plan = launch_config([*words, "--knn.partition", "short", "--knn.timeout", "30"])
    pretrain, embed, knn, report = plan.stages
    assert (pretrain.resources.nodes, pretrain.num_tasks, pretrain.resources.timeout) == (
        2,
        8,
        None,
    )
    assert (knn.resources.nodes, knn.num_tasks, knn.resources.timeout) == (1, 1, 30)
    assert (knn.resources.partition, report.resources.partition) == ("short", "gpu")
    assert report.resources.ngpus == 0
    assert knn.config.nb_knn == (5,) and embed.config.split == "val"
    assert knn.config.target.output_dir == pretrain.config.run.output_dir == tmp_path / "run"


def test_pretraining_may_be_named_like_the_other_stages() -> None:
    plain = launch_config([*ARCH, "--nodes", "3", "--epochs", "7"])
    assert launch_config([*ARCH, "--pretrain.nodes", "3", "--pretrain.epochs=7"]) == plain


def test_relative_paths_are_those_of_the_command() -> None:
    words = [*ARCH, "--stages", "pretrain,knn", "--data_path", "shards", "--knn.data_path", "other"]
    pretrain, knn = launch_config(words).stages
    assert pretrain.config.loader.data_path == str(Path.cwd() / "shards")
    assert knn.config.target.data_path == str(Path.cwd() / "other")
    url = launch_config([*words, "--knn.data_path", "s3://bucket/shards"]).stages[1]
    assert url.config.target.data_path == "s3://bucket/shards"


def test_run_folder_is_named_after_the_arch() -> None:
    assert launch_config(ARCH).run == Path.cwd() / "runs" / "xcit_nano_12_p16"
    assert launch_config([*ARCH, "--shared_dir", "/big"]).run == Path("/big/xcit_nano_12_p16")


def test_one_run_for_each_seed(tmp_path: Path) -> None:
    words = [*ARCH, "--output_dir", str(tmp_path / "a"), "--stages", "pretrain,knn"]
    first = launch_config([*words, "--seeds", "3", "5", "--job_name", "sweep"])
    for plan, seed in zip((first, *first.others), (3, 5), strict=True):
        assert plan.stages[0].config.run.seed == seed
        assert plan.run == plan.stages[1].config.target.output_dir == tmp_path / f"a-seed{seed}"
        assert plan.job_name == f"sweep-seed{seed}"
    with pytest.raises(InputError, match="--seeds: give each seed once"):
        launch_config([*words, "--seeds", "3", "3"])


def test_users_defaults_give_way_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "home" / "xcit-dino").mkdir(parents=True)
    (tmp_path / "home" / "xcit-dino" / "slurm.yaml").write_text(
        "partition: a\nnodes: 3\nngpus: 2\n"
    )
    asked = launch_config([*ARCH, "--nodes", "5"]).stages[0].resources
    assert (asked.partition, asked.nodes, asked.ngpus) == ("a", 5, 2)
    (tmp_path / "other.yaml").write_text("partitoin: b\n")
    with pytest.raises(
        InputError, match="other.yaml: unknown option 'partitoin'; did you mean part"
    ):
        launch_config([*ARCH, "--launch_defaults", str(tmp_path / "other.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arhc", "x"], "unknown option --arhc; did you mean arch"),
        (["--stages", "pretrain,kn"], "no stage 'kn'; did you mean knn"),
        (["--knn.nb_knn", "5"], "--knn.*: that stage is not in --stages pretrain"),
        (["--kn.nb_knn", "5"], "--kn.nb_knn: no stage 'kn'; did you mean knn"),
        (["--stages", "pretrain,knn", "--knn.nb_kn", "5"], "--knn.nb_kn; did you mean nb_knn"),
        (["--stages", "pretrain,knn", "--knn.nods", "5"], "--knn.nods; did you mean nodes"),
        (["--stages", "pretrain,finetune", "--finetune.lrs", "1"], "--finetune.lrs; did you mean"),
        (["--pretrain.epoch", "5"], "unknown option --epoch; did you mean epochs"),
        (["--stages", "knn", "--pretrain.lr", "1"], "--pretrain.*: that stage is not in --stages"),
        (["--stages", ""], "name one or more stages"),
        (["--nodes", "0"], "--nodes 0: must be from 1 to"),
        (["--ngpus", "-1"], "--ngpus -1: must be from 0 to"),
        (["--slurm", "qos"], "--slurm 'qos': write KEY=VALUE"),
        (["--slurm", "a b=c"], "write KEY=VALUE"),
        (["--slurm", "signal=TERM"], "--slurm signal: set by the launcher itself"),
        (["--slurm", "time=60"], "--slurm time: give --timeout instead"),
        (["--slurm", "ntasks-per-node=2"], "--slurm ntasks_per_node: give --ngpus instead"),
        (["--comment", "a\nrm -rf /"], "--comment: must not contain line breaks"),
        (["--setup", "a\nb"], "--setup: must not contain line breaks"),
        (["--timeout", "2", "--signal_delay", "90"], "--signal_delay 90: must be at most half"),
        (["--output_dir", "runs/a%j"], "must not contain % or control characters"),
        (["--output_dir", "runs/a\nb"], "must not contain % or control characters"),
    ],
)  # fmt: skip
def test_bad_options_get_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        launch_config([*ARCH, *words])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("there", "message"),
    [(2, "a node has 2; take fewer$"), (0, "a node has none; leave it out to use CPUs$")],
)
def test_more_gpus_than_there_are(there: int, message: str, monkeypatch, capsys) -> None:
    """Refused for the first stage; a later one takes what there is, and says so."""
    monkeypatch.setattr(local, "visible_gpus", lambda: list(range(there)))
    asked = launch_config([*ARCH, "--stages", "pretrain,knn", "--ngpus", "8"])
    with pytest.raises(InputError, match=f"--ngpus 8: {message}"):
        launch.with_gpus(asked, "local")
    asked = launch_config([*ARCH, "--stages", "pretrain,knn", "--knn.ngpus", "8"])
    found = launch.with_gpus(asked, "local").stages
    assert [stage.resources.ngpus for stage in found] == [there, there]
    assert f"--knn.ngpus 8: a node has {there or 'none'}; using {there}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--nodes 2: one machine is one node, and SLURM does not respond here (no sbatch)"),
        (["--cluster", "local"], "--nodes 2: one machine is one node; give --cluster slurm"),
        (["--cluster", "slurm"], "--cluster slurm: SLURM does not respond (no sbatch)"),
    ],
)
def test_several_nodes_need_slurm(words: list[str], message: str, monkeypatch) -> None:
    """To run; a dry run shows what SLURM would get."""
    monkeypatch.setattr(scheduler, "unavailable", lambda: "no sbatch")
    asked = [*ARCH, "--nodes", "2", *words]
    with pytest.raises(InputError) as error:
        launch.choose_cluster(launch_config(asked))
    assert message in str(error.value)
    if "local" not in words:
        assert launch.choose_cluster(launch_config([*asked, "--dry_run"])) == "slurm"


def test_a_misspelled_command_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match="no command 'launch stauts'; did you mean status?"):
        launch_config(["stauts", "runs/a"])


def test_a_rehearsal_goes_where_runs_go(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"shared_dir: {tmp_path}\nnodes: 2\n")
    own = rehearse_config(["--launch_defaults", str(tmp_path / "own.yaml"), "--ngpus", "0"])
    assert own.folder == tmp_path / "rehearsal"
    assert rehearse_config(["--shared_dir", "/big"]).folder == Path("/big/rehearsal")
    assert rehearse_config(["--output_dir", "here"]).folder == Path.cwd() / "here"
    with pytest.raises(InputError, match="unknown option --nods; did you mean nodes"):
        rehearse_config(["--nods", "2"])


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_rehearsal_s_crops_suit_the_network(patch: int) -> None:
    plan = rehearsal(rehearse_config(["--arch", f"xcit_nano_12_p{patch}"]), "straight")
    crops = plan.stages[0].config.crops
    assert (crops.local_crops_size, crops.global_crops_size) == (max(8, patch), max(16, 2 * patch))
    own = rehearse_config(["--arch", "xcit_nano_12_p16", "--local_crops_size", "48"])
    assert rehearsal(own, "straight").stages[0].config.crops.local_crops_size == 48


def test_a_dry_rehearsal_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", str(tmp_path / "r"), "--ngpus", "0", "--cluster", "slurm"]
    assert rehearse(rehearse_config([*words, "--dry_run"])) == 0
    assert "#SBATCH --nodes=1" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


# -- dry run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make(DemoConfig(dst=folder, train=50, val=10, size=16))
    return folder


def test_dry_run_says_what_follows(shards: Path, tmp_path: Path) -> None:
    words = [
        *ARCH,
        "--cluster",
        "slurm",
        "--nodes",
        "2",
        "--ngpus",
        "2",
        "--data_path",
        str(shards),
    ]
    words += ["--batch_size_per_gpu", "3", "--accum_iter", "2", "--lr", "0.001", "--epochs", "7"]
    words += ["--output_dir", str(tmp_path / "run"), "--stages", "pretrain,knn", "--dry_run"]
    modules = "import sys; from xcit_dino.cli import main; code = main(sys.argv[1:]); "
    modules += "print(*(set(sys.modules) & {'torch', 'numpy'})); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", modules, "launch", *words],
        env={"PATH": "/nowhere", "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == ""  # neither torch nor numpy
    shown = dict(line.split("  ", 1) for line in lines if "  " in line and not line.startswith("#"))
    steps = Plan(ShardIndex.load(shards / "train").counts, seed=0, batch_size=24).steps_per_epoch
    assert shown["global batch"].split()[0] == "24"
    assert float(shown["effective learning rate"].split()[0]) == pytest.approx(0.001 * 24 / 256)
    assert shown["steps per epoch"].strip() == f"{steps}, {7 * steps} in 7 epochs"
    assert shown["images per rank"].split()[0] == str(steps * 6)
    assert "#SBATCH --dependency=afterok:JOB" in lines and "epochs: 7" in lines
    assert not (tmp_path / "run").exists()


def test_dry_run_without_data_still_shows_the_script() -> None:
    stage = launch_config([*ARCH, "--ngpus", "1"]).stages[0]
    assert dry_run.training_facts(stage)["images"] == "unknown (--data_path is not given)"
    elsewhere = launch_config([*ARCH, "--ngpus", "1", "--data_path", "/elsewhere"]).stages[0]
    found = dry_run.training_facts(elsewhere)["images"]
    assert found == (
        "unknown (--data_path /elsewhere: no index.json there, as seen from this machine)"
    )


def test_dry_run_leaves_shards_behind_a_url_unread() -> None:
    for url in ("s3://bucket/shards", "http://host/shards"):
        with pytest.raises(InputError, match=f"{url} is read when the run starts"):
            dry_run.count_images(url)


def test_nodes_are_asked_for_files_and_not_for_urls(shards: Path, monkeypatch) -> None:
    from xcit_dino.data.shards import index

    monkeypatch.setattr(index, "_has_index", lambda root: True)
    words = [*ARCH, "--stages", "pretrain,knn", "--data_path", str(shards)]
    plan = launch_config([*words, "--knn.data_path", "s3://bucket/shards"])
    assert checks.needs(plan) == [f"{shards}/train/index.json"]
    assert checks.needs(dataclasses.replace(plan, stages=plan.stages[1:])) == []


def test_nodes_are_asked_for_all_that_lies_on_a_file_system(shards: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = [*ARCH, "--stages", "pretrain,evaluate,distill", "--output_dir", str(run)]
    words += ["--data_path", str(shards), "--knn_data_path", str(shards / "train")]
    words += ["--init_from", str(tmp_path / "a.pth"), "--distill.teacher_path", str(other)]
    words += ["--shard_url", str(tmp_path / "{split}"), "--evaluate.head", str(run / "head.pth")]
    assert checks.needs(launch_config(words)) == sorted(
        [f"{shards}/train/index.json", str(tmp_path / "a.pth"), str(other), str(tmp_path / "train")]
    )
    piped = launch_config([*ARCH, "--data_path", str(shards), "--shard_url", "pipe:cat {shard}"])
    assert checks.needs(piped) == [f"{shards}/train/index.json"]


@pytest.mark.parametrize("stage", ["pretrain", "knn", "linear"])
def test_a_stage_on_other_data_is_not_done_already(stage: str, tmp_path: Path) -> None:
    words = ["--stages", stage, f"--{stage}.output_dir", str(tmp_path)]

    def dumped(*more: str) -> dict:
        return checks.dump(launch_config([*words, *more]).stages[0].config)

    before = dumped(f"--{stage}.data_path", "a")
    assert not checks.differ(before, dumped(f"--{stage}.data_path", "a"))
    assert not checks.differ(before, before | {"num_workers": 3, "batch_size_per_gpu": 3})
    assert checks.differ(before, dumped(f"--{stage}.data_path", "b"))


def test_the_augmented_probe_with_another_batch_is_another_one() -> None:
    plan = launch_config(["--stages", "linear", "--linear.output_dir", "r"])
    config = checks.dump(plan.stages[0].config) | {"protocol": "dino"}
    assert checks.differ(config, config | {"batch_size_per_gpu": 3})


def test_dry_run_names_more_neighbors_than_images(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ShardIndex.load(shards / "train").num_samples
    words = [*ARCH, "--ngpus", "0", "--data_path", str(shards), "--stages", "pretrain,knn"]
    dry_run.preview(launch_config(words), "local")
    assert f"100, 200 skipped: the training split has only {images} images" in (
        capsys.readouterr().out
    )
    dry_run.preview(launch_config([*words, "--knn.nb_knn", "5"]), "local")
    assert "skipped: the training" not in capsys.readouterr().out


def test_dry_run_says_when_there_are_fewer_images_than_a_global_batch(shards: Path) -> None:
    words = [*ARCH, "--ngpus", "8", "--data_path", str(shards)]
    (line,) = [
        line
        for line in dry_run.remarks(launch_config(words).stages[0])
        if "--batch_size_per_gpu 64: fewer images (50) than a global batch of 512" in line
    ]
    assert line.endswith("; lower it")


# -- the script ------------------------------------------------------------------------------------


printable = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(comment=printable.filter(str.isprintable), folder=printable.filter(str.isprintable))
def test_nothing_breaks_out_of_the_script(comment: str, folder: str) -> None:
    """Each option stays one word of one comment line; each command stays one command."""
    run = Path("/r", folder.replace("%", "").replace("/", ""))
    resources = ResourceConfig(ngpus=0, comment=comment, slurm=(f"licenses={comment}x",))
    stage = Stage("pretrain", "m:f", StandinConfig(run), resources)
    text = submit.script(Launch(LaunchConfig(), run, (stage,)), stage, run / "code")
    lines = text.split("\n")
    options = dict(
        shlex.split(line.removeprefix("#SBATCH "))[0].partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert options["--comment"] == comment and options["--licenses"] == f"{comment}x"
    commands = [line for line in lines if line and not line.startswith(("#", "trap", "export"))]
    assert len(commands) == 4  # begin, srun, finish, exit
    assert shlex.split(commands[0])[3:6] == ["begin", str(run), "pretrain"]
    assert shlex.split(commands[1])[-1] == str(run / "launch/jobs/%j")


# -- code ------------------------------------------------------------------------------------------


def test_a_run_keeps_the_code_it_was_launched_with(tmp_path: Path) -> None:
    code = snapshot.copy_code(tmp_path)
    assert snapshot.copy_code(tmp_path) == code
    program = "import xcit_dino.provenance as p; print(p.__file__, p.commit())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    file, commit = done.stdout.split()
    assert Path(file) == code / "xcit_dino" / "provenance.py"
    assert commit == (code / "COMMIT").read_text().strip() != ""
    assert (code / "xcit_dino" / "configs" / "rehearsal.yaml").is_file()
    assert (tmp_path / code.name / "COMMIT").is_file()


# -- local runs ------------------------------------------------------------------------------------


def steps(run: Path) -> list[int]:
    return [int(line.split()[0]) for line in (run / "steps").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run 'with' $HOME"
    folder.mkdir()
    (folder / "config.yaml").touch()
    return folder


def test_a_run_goes_through(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(plan_of(run)) == 0
    known = attempts.load(run, "pretrain")
    assert (known.state, known.attempts, known.failures) == ("done", 1, 0)
    assert steps(run) == [1, 2, 3]
    assert checks.unfinished(plan_of(run)) == []
    assert [s.name for s in checks.unfinished(plan_of(run, steps=4))] == ["pretrain"]
    assert launched.read_launch(run)["code"].startswith(str(run / "launch" / "code"))


def test_a_failure_starts_again_once_it_helps(run: Path) -> None:
    assert start(plan_of(run, fail="once")) == 0
    assert (attempts.load(run, "pretrain").attempts, steps(run)) == (2, [1, 2, 1, 2, 3])


def test_the_same_mistake_twice_is_the_end(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(plan_of(run, fail="always")) == 1
    known = attempts.load(run, "pretrain")
    assert (known.state, known.attempts) == ("failed", 2)
    assert "rank 0 on " in known.reason and "RuntimeError: went wrong (twice at" in known.reason
    shown = capfd.readouterr()
    assert "went wrong" in shown.err and "submitit" not in shown.out


def test_the_same_mistake_in_other_words_is_the_end(run: Path) -> None:
    """Process ids, ports and times in a text differ each time; the line of code does not."""
    assert start(plan_of(run, fail="pid")) == 1
    known = attempts.load(run, "pretrain")
    assert (known.state, known.attempts) == ("failed", 2)
    assert "went wrong in " in known.reason and "(twice at the same place)" in known.reason


@pytest.mark.parametrize("cluster", ["local", "debug"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's own
def test_an_outer_job_has_no_part_in_a_local_run(
    run: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run inside an allocation, an srun or a torchrun is a run of its own."""
    outer = {"SLURM_RESTART_COUNT": "3", "SLURM_CPUS_PER_TASK": "3", "SLURMD_NODENAME": "n7"}
    outer |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"}
    outer |= {"SUBMITIT_EXECUTOR": "slurm", "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_NTASKS": "8"}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    plan = plan_of(run, show_environment=True)
    assert launch.start(plan, list(plan.stages), cluster) == 0  # type: ignore[arg-type]
    assert attempts.load(run, "pretrain").attempts == 1
    left = {line.partition("=")[0] for line in (run / "environment").read_text().splitlines()}
    assert not left & (set(outer) - {"SUBMITIT_EXECUTOR"})  # submitit's local one sets this itself
    assert "environment of the enclosing job ignored: " in capfd.readouterr().err
    assert os.environ["SLURM_RESTART_COUNT"] == "3"


def test_bad_input_found_by_a_job_is_one_line(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(plan_of(run, fail="input")) == 2
    known = attempts.load(run, "pretrain")
    assert (known.state, known.attempts, known.bad_input) == ("failed", 1, True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "--x: wrong" in line]
    assert lines and "Traceback" not in "".join(lines)


def in_background(run: Path, *options: str) -> subprocess.Popen[str]:
    """A local run in a process of its own, after its first step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.standin", str(run), *options],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_file(run / "steps", process)
    return process


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "failures"), [(signal.SIGUSR2, 0), (signal.SIGTERM, 0), (signal.SIGKILL, 1)]
)
def test_signals_to_the_ranks(run: Path, number: signal.Signals, failures: int) -> None:
    """A time limit and a preemption save; a killed rank is a failure. All go on afterwards."""
    process = in_background(run, "steps=6", "seconds=0.2")
    os.kill(int((run / "steps").read_text().split()[2]), number)
    _, err = process.communicate(timeout=120)
    known = attempts.load(run, "pretrain")
    assert (process.returncode, known.state, known.attempts) == (0, "done", 2), err
    assert known.failures == failures
    assert sorted(set(steps(run))) == list(range(1, 7))
    if failures:
        assert "restarting after" in err and "Killed" in err
    else:
        assert steps(run) == list(range(1, 7))


def test_signals_while_it_saves_do_no_harm(run: Path) -> None:
    process = in_background(run, "steps=30", "seconds=0.1", "save_seconds=1")
    rank = int((run / "steps").read_text().split()[2])
    os.kill(rank, signal.SIGUSR2)
    wait_for_file(run / "saving", process)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        os.kill(rank, number)
    _, err = process.communicate(timeout=120)
    known = attempts.load(run, "pretrain")
    assert (process.returncode, known.state, known.attempts, known.failures) == (0, "done", 2, 0)
    assert "restarting after SIGUSR2 after step" in err
    assert steps(run) == list(range(1, 31))  # none is lost, none is repeated


def test_ctrl_c_saves_and_leaves(run: Path) -> None:
    process = in_background(run, "steps=100", "seconds=0.1")
    shown = status.owner(run)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert shown == f"process {process.pid} on {os.uname().nodename}"
    known = attempts.load(run, "pretrain")
    assert known.state == "stopped" and known.reason.startswith("SIGINT after step")
    assert int((run / "step").read_text()) == steps(run)[-1]
    assert status.owner(run) == ""


def test_a_signal_to_the_launcher_starts_nothing_again(run: Path) -> None:
    """As of ``kill`` or of a service manager; `launch cancel` marks the run besides."""
    process = in_background(run, "steps=100", "seconds=0.1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    known = attempts.load(run, "pretrain")
    assert (known.state, known.attempts) == ("stopped", 1)
    assert known.reason.startswith("SIGTERM after step")


def test_a_restart_says_from_where(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "checkpoint-00000007.pth").touch()
    assert start(plan_of(run, fail="once")) == 0
    shown = capfd.readouterr()
    assert "resumes from checkpoint-00000007.pth" in shown.out
    assert "went wrong, resumes from checkpoint-00000007.pth" in shown.err


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Run folders as ``--seeds 0 1`` names them."""
    folders = [tmp_path / f"many-seed{seed}" for seed in (0, 1)]
    for folder in folders:
        folder.mkdir()
    return folders


def test_cancelling_one_seed_lets_the_next_one_run(seeds: list[Path]) -> None:
    process = in_background(seeds[0], str(seeds[1]), "steps=30", "seconds=0.1")
    status.cancel(CancelConfig(seeds[0]))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert [attempts.load(one, "pretrain").state for one in seeds] == ["cancelled", "done"]


def test_all_seeds_are_shown_and_cancelled_by_their_common_name(
    seeds: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    process = in_background(seeds[0], str(seeds[1]), "steps=100", "seconds=0.1")
    name = seeds[0].with_name("many")
    status.status(StatusConfig(name))
    shown = capsys.readouterr().out
    assert f"{seeds[0]} (local)" in shown and f"{seeds[1]} (local)" in shown
    assert "running" in shown and "waiting" in shown
    for command, config in ((status.logs, LogsConfig(name)), (monitor.run, WatchConfig(name))):
        with pytest.raises(InputError, match=f"{seeds[0]}, {seeds[1]}"):
            command(config)
    status.cancel(CancelConfig(name))
    assert f"cancelled {seeds[1]}, which had not started" in capsys.readouterr().out
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert attempts.load(seeds[0], "pretrain").state == "cancelled"
    assert not (seeds[1] / "steps").exists()
    status.status(StatusConfig(name))
    assert capsys.readouterr().out.count("cancelled: by `launch cancel`") == 2


def test_a_seed_that_waits_is_cancelled_alone(seeds: list[Path]) -> None:
    process = in_background(seeds[0], str(seeds[1]), "steps=20", "seconds=0.1")
    status.cancel(CancelConfig(seeds[1]))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert attempts.load(seeds[0], "pretrain").state == "done"
    assert not (seeds[1] / "steps").exists()


def test_ctrl_c_ends_all_seeds_and_says_so(seeds: list[Path]) -> None:
    process = in_background(seeds[0], str(seeds[1]), "steps=100", "seconds=0.1")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"{seeds[1]}: not started; the same command starts it" in err


def test_a_seed_that_fails_lets_the_next_one_run(seeds: list[Path]) -> None:
    assert launch.run_here([plan_of(one, fail="always") for one in seeds], "local") == 1
    assert [attempts.load(one, "pretrain").attempts for one in seeds] == [2, 2]


def test_cancel_saves_and_ends(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = in_background(run, "steps=100", "seconds=0.1")
    status.cancel(CancelConfig(run))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert attempts.load(run, "pretrain").state == "cancelled"
    assert int((run / "step").read_text()) == steps(run)[-1]
    status.logs(LogsConfig(run))
    assert "stopped: SIGTERM after step" in capsys.readouterr().err


def test_a_launcher_that_dies_leaves_nothing_behind(run: Path) -> None:
    process = in_background(run, "steps=100", "seconds=0.1")
    process.kill()
    process.communicate(timeout=120)  # the ranks hold its stderr until they have left
    assert int((run / "step").read_text()) == steps(run)[-1]


def test_time_limit(run: Path) -> None:
    """SIGUSR2 comes before the limit; the next attempt goes on."""
    plan = plan_of(run, steps=200, seconds=0.1)
    folder = attempts.job_folder(run, "%j")
    made = local.Executor(folder=folder)
    made.update_parameters(
        nodes=1, tasks_per_node=1, gpus_per_node=0, timeout_min=1, signal_delay_s=54, setup=()
    )
    launched.write_launch(run, {"max_requeues": 0, "stages": {"pretrain": {"config": {}}}})
    attempts.begin(run, "pretrain", "", 0, "here")
    from xcit_dino.slurm.job import make_job

    started = made.submit(make_job(plan, plan.stages[0]))
    known = attempts.load(run, "pretrain")
    known.job_id = started.job_id
    attempts.save(run, known)
    ended = attempts.finish(run, "pretrain", started._process.wait())  # type: ignore[attr-defined]
    assert (ended.state, ended.failures) == ("requeued", 0)
    assert ended.reason.startswith("SIGUSR2 after step")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's own
def test_debug_runs_in_this_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    plan = plan_of(run)
    assert launch.start(plan, list(plan.stages), "debug") == 0
    assert f"pid {os.getpid()}" in (run / "steps").read_text()
    assert before == {number: signal.getsignal(number) for number in before}


# -- what is there already -------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(run: Path) -> None:
    note = {"cluster": "local", "host": os.uname().nodename, "pid": os.getpid()}
    note["pid_start"] = launched.process_start_time(os.getpid())
    launched.write_launch(run, note | {"stages": {}})
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
        checks.refuse_busy(plan_of(run), "local")
    launched.write_launch(run, note | {"pid_start": "1", "stages": {}})  # another process by now
    checks.refuse_busy(plan_of(run), "local")


def test_a_folder_that_a_plain_command_trains_in_is_refused(run: Path) -> None:
    """The healthy run is not to be listed as failed by a launch that cannot begin."""
    keep = (
        "import sys; from pathlib import Path; from xcit_dino.train.run.lock import RunLock; "
        "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", keep, run], stdin=pipe, stdout=pipe) as other:
        assert other.stdout and other.stdout.readline() == b"taken\n"
        before = sorted(run.rglob("*"))
        with pytest.raises(InputError, match=f"is in use by process {other.pid} on .*wait for it"):
            checks.refuse_busy(plan_of(run), "local")
        assert sorted(run.rglob("*")) == before
        other.communicate()
    checks.refuse_busy(plan_of(run), "local")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_of(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="--output_dir .*file/run: Not a directory"):
        launch.start(plan, list(plan.stages), "local")


def test_status_keeps_stages_of_earlier_launches(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = plan_of(run)
    assert start(first) == 0
    evaluation = dataclasses.replace(first.stages[0], name="knn")
    second = dataclasses.replace(first, stages=(evaluation,))
    assert start(second) == 0
    capsys.readouterr()
    status.status(StatusConfig(run))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[2:4]] == [["pretrain", "done"], ["knn", "done"]]
    status.logs(LogsConfig(run, stage="pretrain"))
    launch.prepare(first, list(first.stages), "local")  # and again, the other way round
    assert list(launched.all_stages(launched.read_launch(run))) == ["knn", "pretrain"]


def test_status_says_when_a_lost_job_was_last_seen(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"pretrain": {"job_id": "", "config": {}}}
    note = {"cluster": "local", "host": "elsewhere", "pid": 1, "pid_start": "", "stages": stages}
    launched.write_launch(run, note)
    known = attempts.Record(
        "pretrain", state="running", hosts="n1", began="2026-01-01T10:00:00+00:00"
    )
    attempts.save(run, known)
    bar = {"label": "pretraining", "unit": "steps", "start": 0, "done": 100, "total": 200}
    bar |= {"time": time.mktime((2026, 1, 1, 10, 2, 3, 0, 0, -1)), "seconds": 1, "shown": ""}
    attempts.progress_file(run, "pretrain").write_text(json.dumps(bar))
    status.status(StatusConfig(run))
    shown = " ".join(capsys.readouterr().out.split())
    seen = "last seen alive at 2026-01-01 10:02:03 (pretraining 100/200 steps)"
    assert f"ended without a report on n1, {seen}; launch it again" in shown


def test_status_of_a_run_that_the_launcher_never_came_to(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {name: {"job_id": "", "config": {}} for name in ("pretrain", "knn")}
    note = {"cluster": "local", "host": "elsewhere", "pid": 1, "pid_start": "", "stages": stages}
    launched.write_launch(run, note)
    for name in stages:
        attempts.save(run, attempts.Record(name))
    status.status(StatusConfig(run))
    shown = capsys.readouterr().out
    assert shown.count("not started: launch it again") == 2 and "lost" not in shown
    (run / "results.json").mkdir()
    attempts.save(run, attempts.Record("pretrain", state="done", began=NOW, ended=NOW))
    with pytest.raises(InputError, match=r"results\.json: cannot be read \(Is a directory\)"):
        status.status(StatusConfig(run))


def test_status_says_why_a_stage_was_cancelled(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {name: {"job_id": "", "config": {}} for name in ("pretrain", "knn")}
    note = {"cluster": "local", "host": "elsewhere", "pid": 1, "pid_start": "", "stages": stages}
    launched.write_launch(run, note)
    failed = attempts.Record("pretrain", state="failed", attempts=3, failures=3, reason="no luck")
    attempts.save(run, failed)
    attempts.save(run, attempts.Record("knn"))
    status.status(StatusConfig(run))
    shown = capsys.readouterr().out
    assert "failed: no luck" in shown and "cancelled: pretrain is failed" in shown


def test_status_shows_what_a_stage_came_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "finetune"
    folder.mkdir()
    metrics = {"finetune": {"metrics": {"top1": 81.254}}}
    (folder / "results.json").write_text(json.dumps(metrics))
    stages = {"finetune": {"job_id": "", "config": {"output_dir": str(folder)}}}
    note = {"cluster": "local", "host": "elsewhere", "pid": 1, "pid_start": "", "stages": stages}
    launched.write_launch(run, note)
    times = {"began": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T11:02:03+00:00"}
    attempts.save(run, attempts.Record("finetune", state="done", **times))
    status.status(StatusConfig(run))
    assert "finetune: took 1:02:03  top1 81.25\n" in capsys.readouterr().out


def test_status_shows_progress(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = {"cluster": "local", "host": os.uname().nodename, "pid": os.getpid()}
    note |= {
        "pid_start": launched.process_start_time(),
        "stages": {"pretrain": {"job_id": "", "config": {}}},
    }
    launched.write_launch(run, note)
    attempts.save(
        run, attempts.Record("pretrain", state="running", job_id="7", hosts="n1", attempts=2)
    )
    bar = {"label": "pretraining", "unit": "steps", "start": 50, "done": 100, "total": 200}
    bar |= {"shown": "epoch 5.00  loss 3.21  img/s 450  knn 41.5"}
    bar |= {"seconds": 50.0, "time": time.time()}
    attempts.progress_file(run, "pretrain").write_text(json.dumps(bar))
    status.status(StatusConfig(run))
    shown = " ".join(capsys.readouterr().out.split())
    expected = "pretraining 100/200 steps eta 0:01:40 epoch 5.00 loss 3.21 img/s 450 knn 41.5"
    assert f"pretrain: {expected} next stage: none" in shown
    attempts.progress_file(run, "pretrain").write_text(json.dumps(bar | {"time": time.time() - 90}))
    status.status(StatusConfig(run))
    assert "(as of 0:01:30 ago)" in capsys.readouterr().out
