"""Shared fixtures: a small run folder, and restored signal handlers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from xcit_dino.data.pack.demo import make
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.models.zoo import create_model

ARCH = "xcit_pico_6_p8"
DEPEND_ON_THE_MACHINE = {
    "test_cli": "measures seconds",
    "test_plan": "measures seconds",
    "test_lock": "waits for another process's sign of life",
    "test_watchdog": "stops processes and waits for them to be missed",
    "test_evaluation": "stops processes and waits for them to be missed",
    "test_steady": "kills loader workers",
    "test_faults": "kills processes at many points",
    "test_faults_inside": "kills processes at many points",
    "test_together": "commands at the same time",
    "test_job": "signals and time limits of real processes",
    "test_launch": "signals and time limits of real processes",
    "test_monitor": "watches a process that goes on",
    "test_slurm_cluster": "a real cluster with its own clocks",
}
"""Modules whose tests are tried a second time where they fail, with the reason; pytest counts them
as "rerun". A test anywhere else fails at once."""


SLOW = {
    "test_options": "turns every option of every command",
    "test_docs_run": "runs every command of the docs",
    "test_remedies": "follows the advice of every message",
    "test_readonly": "every command on a run folder that cannot be written",
    "test_together": "every two commands at once",
    "test_faults": "kills processes at many points",
    "test_faults_inside": "kills processes at many points",
    "test_launch": "signals and time limits of real processes",
    "test_evaluation": "stops processes and waits for them to be missed",
    "test_sharding": "two ranks with sharded weights",
    "test_fsdp": "two ranks with sharded weights",
    "test_syncbn": "two ranks",
}
"""Modules for `make test-slow`, which CI runs too, with the reason. Single tests of more than
ten seconds are marked as slow where they are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that depend on the load of the machine, and the slow ones."""
    for item in items:
        if item.path.stem in DEPEND_ON_THE_MACHINE:
            item.add_marker(pytest.mark.flaky(reruns=1))
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class RunFolder:
    """A run folder with a config, and weights that training could have left."""

    path: Path
    data: Path
    weights: Path

    def target(self, **changes: Any) -> EvalTargetConfig:
        """Options that evaluate it in this process."""
        options = {"output_dir": self.path, "pretrained_weights": self.weights, "num_workers": 0}
        return EvalTargetConfig(**(options | {"device": "cpu"} | changes))


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 + 48 labeled images of 32 px in shards."""
    folder = tmp_path_factory.mktemp("shards")
    make(DemoConfig(dst=folder, train=96, val=48))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 + 10 images of 16 px for the victims of the fault tests."""
    folder = tmp_path_factory.mktemp("victims") / "shards"
    make(DemoConfig(folder, train=20, val=10, size=16))
    return folder


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A victim's run that nothing befell."""
    from tests import victims

    folder = tmp_path_factory.mktemp("whole") / "run"
    victims.finish(folder, shards)
    return folder


@pytest.fixture(scope="session")
def crowd_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of crowd.py are called."""
    from tests import crowd

    place = tmp_path_factory.mktemp("crowd")
    crowd.build(place)
    return place


@pytest.fixture
def run_folder(tmp_path: Path, demo_shards: Path) -> RunFolder:
    """A new run folder on the demo images."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"arch: {ARCH}\ndata_path: {demo_shards}\nglobal_crops_size: 32\n"
    )
    torch.manual_seed(1)
    backbone = {f"backbone.{k}": v for k, v in create_model(ARCH).state_dict().items()}
    weights = tmp_path / "weights.pth"
    torch.save({"teacher": backbone, "student": backbone}, weights)
    return RunFolder(run, demo_shards, weights)


@pytest.fixture
def unlabeled(tmp_path: Path, demo_shards: Path) -> Path:
    """The training images without labels, as train and val."""
    index = ShardIndex.load(demo_shards / "train")
    for split in ("train", "val"):
        folder = tmp_path / "unlabeled" / split
        folder.mkdir(parents=True)
        samples = []
        for number in range(8):
            shard, offset, size = index.locate(number)
            image = Path(index.path(shard)).read_bytes()[offset : offset + size]
            samples.append(Sample(f"{number:04d}", "jpg", image, -1, {}))
        write_index(folder, [write_shard(folder, "shard-000000.tar", samples)], None)
    return tmp_path / "unlabeled"


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Commands install handlers that later tests' child processes would inherit."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
