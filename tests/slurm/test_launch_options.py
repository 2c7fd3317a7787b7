"""Each launcher option: what it changes in the script or on this machine, or what is printed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.standin import plan_of
from xcit_dino.cli import COMMANDS
from xcit_dino.errors import InputError
from xcit_dino.options import option_types, replace
from xcit_dino.slurm import attempts, launch, launched, local, submit
from xcit_dino.slurm.checks import check_input
from xcit_dino.slurm.config import Launch, LaunchConfig
from xcit_dino.slurm.stages import ENTRIES, launch_config
from xcit_dino.slurm.tools.dry_run import ineffective_options

ARCH = ["--arch", "xcit_nano_12_p16", "--ngpus", "0"]
SCRIPT = {  # option -> (words, what the submission script then has)
    "nodes": (["--nodes", "3"], "#SBATCH --nodes=3"),
    "ngpus": (["--ngpus", "2"], "#SBATCH --gpus-per-node=2"),
    "nproc": (["--nproc", "3"], "#SBATCH --ntasks-per-node=3"),
    "cpus_per_task": (["--cpus_per_task", "7"], "#SBATCH --cpus-per-task=7"),
    "mem": (["--mem", "64G"], "#SBATCH --mem=64G"),
    "timeout": (["--timeout", "77"], "#SBATCH --time=77"),
    "partition": (["--partition", "gpu"], "#SBATCH --partition=gpu"),
    "account": (["--account", "lab"], "#SBATCH --account=lab"),
    "qos": (["--qos", "high"], "#SBATCH --qos=high"),
    "constraint": (["--constraint", "a100"], "#SBATCH --constraint=a100"),
    "exclude": (["--exclude", "n1"], "#SBATCH --exclude=n1"),
    "comment": (["--comment", "mine"], "#SBATCH --comment=mine"),
    "slurm": (["--slurm", "exclusive=true"], "#SBATCH --exclusive"),
    "setup": (["--setup", "module load cuda"], "module load cuda"),
    "container": (["--container", "lab#xcit"], "--container-image=lab#xcit"),
    "job_name": (["--job_name", "fast"], "#SBATCH --job-name=fast-pretrain"),
    "signal_delay": (["--signal_delay", "33"], "#SBATCH --signal=USR2@33"),
    "shared_dir": (["--shared_dir", "/big"], "/big/xcit_nano_12_p16/launch"),
}
ELSEWHERE = {  # option -> the test below, or in another file, that turns it
    "max_requeues": "test_no_restart_is_allowed",
    "cluster": "test_each_kind_of_launch",
    "stages": "tests/slurm/test_launch.py, test_one_line_configures_all_stages",
    "seeds": "tests/slurm/test_launch.py, test_one_run_for_each_seed",
    "array_parallelism": "test_runs_at_a_time",
    "dry_run": "tests/slurm/test_launch.py, test_dry_run_shows_what_follows",
}
HERE = {"nproc", "ngpus", "nodes", "cpus_per_task", "timeout", "setup", "shared_dir"}  # and locally
REFUSED_HERE = {"container"}


def script(words: list[str]) -> list[str]:
    plan = launch_config([*ARCH, *words])
    return submit.script(plan, plan.stages[0], plan.run / "code").splitlines()


def test_every_option_is_turned() -> None:
    assert set(SCRIPT) | set(ELSEWHERE) == set(option_types(LaunchConfig))
    assert not set(SCRIPT) & set(ELSEWHERE)


def test_processes_run_in_an_apptainer_image_and_the_jobs_script_on_the_host(tmp_path) -> None:
    image = tmp_path / "my image.sif"
    words = ["--container", str(image), "--ngpus", "2", "--output_dir", str(tmp_path / "run")]
    words += ["--data_path", str(tmp_path / "shards")]
    with pytest.raises(InputError, match="my image.sif: no such file; build it from apptainer.def"):
        script(words)
    image.touch()
    lines = script(words)
    begin, ranks = (
        next(i for i in lines if w in i) for w in ("slurm.job begin", "srun --unbuffered")
    )
    assert sys.executable in begin and "apptainer" not in begin
    binds = f"--bind {tmp_path}/run --bind {tmp_path}/shards '{image}' python -u -m submitit"
    assert f"apptainer exec --nv {binds}" in ranks
    assert "--nv" not in "".join(script([*words, "--ngpus", "0"]))


def test_pyxis_makes_the_container_of_any_other_image(tmp_path) -> None:
    weights = tmp_path / "weights" / "w.pth"
    words = ["--container", "lab#xcit:1", "--output_dir", str(tmp_path / "runs" / "a")]
    words += ["--data_path", str(tmp_path / "runs"), "--init_from", str(weights)]
    (ranks,) = (line for line in script(words) if "srun --unbuffered" in line)
    both = f"{tmp_path}/runs:{tmp_path}/runs,{tmp_path}/weights:{tmp_path}/weights"
    assert f"--container-image=lab#xcit:1 --container-mounts={both} python -u" in ranks.replace(
        "'", ""
    )
    with pytest.raises(InputError, match="cannot mount .*a:b, whose name has a colon"):
        script([*words[:-1], str(tmp_path / "a:b" / "w.pth")])


def test_a_container_without_slurm_is_refused(tmp_path) -> None:
    plan = launch_config([*ARCH, "--container", "lab#xcit", "--cluster", "local"])
    with pytest.raises(InputError, match="--container: makes containers on SLURM only"):
        launch.run(plan)


@pytest.mark.parametrize("option", SCRIPT)
def test_the_script_has_it(option: str) -> None:
    words, expected = SCRIPT[option]
    assert any(expected in line for line in script(words))
    assert not any(expected in line for line in script([]))


@pytest.mark.parametrize(
    "option", sorted(set(SCRIPT) - {"nodes", "ngpus", "nproc", "shared_dir"} - REFUSED_HERE)
)
def test_what_one_machine_has_no_use_for_is_named(option: str) -> None:
    plan = launch_config([*ARCH, "--stages", "pretrain,knn", *SCRIPT[option][0]])
    said = " ".join(ineffective_options(plan, "local"))
    assert (f"--{option}" in said) == (option not in HERE)
    assert ineffective_options(plan, "slurm") == []
    if option in option_types(type(plan.launch.resources)):
        words = [f"--knn.{option}", *SCRIPT[option][0][1:]]
        own = launch_config([*ARCH, "--stages", "pretrain,knn", *words])
        said = " ".join(ineffective_options(own, "local"))
        assert (f"--knn.{option}" in said) == (option not in HERE)


def test_a_debugger_has_use_for_less() -> None:
    words = ["--setup", "true", "--timeout", "5", "--max_requeues", "3", "--cpus_per_task", "2"]
    said = ineffective_options(launch_config([*ARCH, *words]), "debug")
    assert said == [
        "without effect on a debug run: --cpus_per_task, --timeout, --setup, --max_requeues"
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path


def turned(run: Path, **values: object) -> Launch:
    """A launch of the stand-in with options of the launcher changed."""
    plan = plan_of(run, show_environment=True, fail="once")
    options = replace(plan.launch, values)
    stage = type(plan.stages[0])(**(vars(plan.stages[0]) | {"resources": options.resources}))
    return Launch(options, run, (stage,))


def start(plan: Launch) -> int:
    return launch.start(plan, list(plan.stages), "local")


def test_no_restart_is_allowed(run: Path) -> None:
    assert start(turned(run, max_requeues=0)) == 1
    assert attempts.load(run, "pretrain").attempts == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cpus_per_task": 7}, "OMP_NUM_THREADS=7"),
        ({"setup": ("export MINE=yes",)}, "MINE=yes"),
        ({"nproc": 2}, "WORLD_SIZE=2"),
    ],
)
def test_a_local_run_has_it(run: Path, values: dict[str, object], expected: str) -> None:
    assert start(turned(run, **values)) == 0
    assert expected in (run / "environment").read_text().splitlines()


def test_each_kind_of_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, message in (("debug", "--nproc 2: --cluster debug is one process"), ("local", "")):
        plan = launch_config([*ARCH, "--nproc", "2", "--cluster", wanted])
        assert launch.choose_cluster(plan) == wanted
        if message:
            with pytest.raises(InputError, match=message):
                launch.with_gpus(plan, "debug")
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1"])
    plan = launch_config([*ARCH[:2], "--cluster", "debug"])
    assert launch.with_gpus(plan, "debug").stages[0].num_tasks == 1
    with pytest.raises(InputError, match="--nproc 2: with GPUs, each has one process"):
        launch.with_gpus(launch_config([*ARCH[:2], "--ngpus", "1", "--nproc", "2"]), "local")


def test_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of --seeds waits for the one so many places before it."""
    after: list[str | None] = []

    def submitted(one: Launch, *_: object) -> int:
        after.append(_[-1])  # type: ignore[arg-type]
        stages = {"pretrain": {"job_id": str(len(after)), "config": {}}}
        launched.write_launch(one.run, {"stages": stages})
        return 0

    monkeypatch.setattr(launch, "start", submitted)
    words = ["--seeds", "0", "1", "2", "3", "--array_parallelism", "2"]
    plan = launch_config([*ARCH, *words, "--output_dir", str(tmp_path / "a")])
    assert launch.submit_runs([plan, *plan.others], "slurm") == 0
    assert after == [None, None, "1", "2"]
    assert "--array_parallelism" in " ".join(ineffective_options(plan, "local"))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_job_trains_as_the_command_does(name, monkeypatch):
    """The job's function is the one that ``main`` calls: with the k-NN of pretraining, too."""
    module, _, function = ENTRIES[name].partition(":")
    home, called = importlib.import_module(module), []
    monkeypatch.setattr(home, function, called.append)
    monkeypatch.setattr("xcit_dino.train.signals.install", lambda *signals: None)
    assert f"xcit_dino.{COMMANDS[name].run}" == f"{module}:main"
    home.main("the config")
    assert called == ["the config"]


@pytest.mark.parametrize("stage, said", [
    ("segment", "have neither masks nor boxes"), ("masks", "have neither masks nor boxes"),
    ("detect", "--boxes FILE_OR_FOLDER"),
    ("knn", "the images have no labels"), ("linear", "the images have no labels"),
    ("finetune", "the images have no labels"), ("distill", "the images have no labels"),
])  # fmt: skip
def test_a_stage_whose_images_lack_what_it_needs(
    unlabeled: Path, tmp_path: Path, stage: str, said: str
) -> None:
    """It would find out only when the stages before it are done."""
    words = [*ARCH, "--data_path", str(unlabeled), "--batch_size_per_gpu", "4"]
    words += ["--output_dir", str(tmp_path / "run")]
    check_input(launch_config([*words, "--stages", "pretrain,embed,duplicates"]))
    with pytest.raises(InputError, match=said):
        check_input(launch_config([*words, "--stages", f"pretrain,{stage}"]))
    assert not (tmp_path / "run").exists()
