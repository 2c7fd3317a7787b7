"""Every two commands on one run folder at the same time: each gives what it gives by itself, and
nothing of either is lost or half there."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import crowd
from tests.crowd import COMMANDS, Ended

MISFITS = re.compile(r"^WARNING: --(out_dim|warmup_epochs|global_crops_size)\b.*\n", re.MULTILINE)
"""What pretraining says of images as few and small as these."""
OWNERS = {  # two of them in one folder: the second may be refused, as the folder is in use
    "pretrain": "run", "launch": "run", "finetune": "run/finetune", "distill": "run/distill",
}  # fmt: skip
EXTREME = {
    ("launch", "launch cancel"),
    ("launch cancel", "launch"),
}  # one is there to end the other
PAIRS = list(itertools.combinations_with_replacement(COMMANDS, 2))
QUICK = {
    ("pretrain", "knn"), ("pretrain", "linear"), ("pretrain", "weights extract"),
    ("pretrain", "report"), ("knn", "knn"), ("knn", "linear"), ("knn, other crop", "report"),
    ("linear", "linear, other lrs"), ("linear, dino", "linear, dino, other lrs"),
    ("linear, other lrs", "evaluate --head"), ("embed", "embed, other seed"),
    ("finetune", "finetune"),
}  # fmt: skip


class Known:
    """What commands leave by themselves: on the run as it is kept, and at each checkpoint that its
    training passes."""

    def __init__(self, place: Path):
        self.place = place
        self.metrics: dict[str, Any] = {}
        """Digest of name and protocol -> metrics."""
        self.files: dict[str, set[str]] = {}
        """Kind of file -> checksums."""
        self.results: dict[str, set[str]] = {}
        """Call -> names of the results that it adds."""
        self.done: set[tuple[str, str]] = set()
        self.states: list[str] = []

    def learn(self, name: str, states: list[str]) -> None:
        """Run a command by itself on the run in several states."""
        for state in states:
            if (name, state) not in self.done:
                self.done.add((name, state))
                run = crowd.renew(self.place, state)
                before = set(results(run))
                found = crowd.alone(self.place, COMMANDS[name], "own-0")
                assert found.code == 0, found.said
                self.results.setdefault(name, set()).update(set(results(run)) - before)
                self.note(run)

    def note(self, run: Path) -> None:
        """Keep results and files that are there now."""
        for key, entry in results(run).items():
            self.metrics[key] = entry
        for path in outputs(self.place):
            self.files.setdefault(kind(path), set()).add(crowd.digest(path))

    def passed(self) -> list[str]:
        """The run as its training leaves it at each checkpoint; made once."""
        if not self.states:
            run = crowd.renew(self.place)
            found = crowd.alone(self.place, COMMANDS["pretrain"], "own-0", keep_all)
            assert found.code == 0, found.said
            shutil.copytree(run / "checkpoints", self.place / "all")
            for path in sorted((self.place / "all").glob("*.pth")):
                state = self.place / f"kept-{path.stem}"
                shutil.copytree(self.place / "kept", state)
                shutil.rmtree(state / "checkpoints")
                (state / "checkpoints").mkdir()
                for part in (path, path.with_suffix(".json")):
                    shutil.copy(part, state / "checkpoints")
                self.states.append(state.name)
        return self.states


def keep_all() -> None:
    """Drop no checkpoint."""
    from xcit_dino.train import state

    state.remove_unless_in_use = lambda path: None


def results(run: Path) -> dict[str, Any]:
    """Name and protocol -> metrics and what was chosen, of every result in and below a run."""
    found = {}
    for path in sorted(run.rglob("results.json")):
        for name, entry in json.loads(path.read_text()).items():
            protocol = json.dumps(entry["protocol"], sort_keys=True)
            facts = {k: entry.get(k) for k in ("metrics", "grid", "chosen")}
            found[f"{path.parent.name} {name.partition('@')[0]} {protocol}"] = facts
    return found


def outputs(place: Path) -> list[Path]:
    """Files whose content is told by the command alone."""
    inside = [
        *(place / "run").rglob("*"),
        *(p for own in place.glob("own-*") for p in own.rglob("*")),
    ]
    endings = (".png", ".npy", ".csv", ".safetensors", ".pth")
    return [path for path in inside if path.suffix in endings and path.is_file()]


def kind(path: Path) -> str:
    """What a file is, whatever folder it lies in, or protocol it belongs to."""
    parts = [re.sub("@[0-9a-f]{8}", "", part) for part in path.parts]
    inside = parts[parts.index("run") + 1 :] if "run" in parts else parts[-1:]
    return "/".join(part for part in inside if "-" not in part or "." in part)


@pytest.fixture(scope="module")
def known(crowd_place: Path) -> Known:
    return Known(crowd_place)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(*p, marks=[] if p in QUICK else pytest.mark.faults, id=" + ".join(p))
        for p in PAIRS
    ],
)
def test_two_at_once(one: str, other: str, known: Known, crowd_place: Path) -> None:
    trains = {"pretrain", "launch"} & {one, other}
    for name in {one, other}:
        known.learn(name, known.passed() if trains and name not in OWNERS else ["kept"])
    run = crowd.renew(crowd_place)
    before = results(run)
    both = crowd.at_once(crowd_place, (one, other))

    refused = [found for name, found in zip((one, other), both, strict=True) if in_use(name, found)]
    busy = {OWNERS.get(one)} == {OWNERS.get(other)} - {None} or (one, other) in EXTREME
    assert len(refused) <= busy, refused[0].said
    for found in both:
        assert found.code == 0 or found in refused or (one, other) in EXTREME, found.said
        said = MISFITS.sub("", found.err)
        assert "Traceback" not in said and "WARNING" not in said, found.said

    after = results(run)
    assert {key for key in after if after[key] != known.metrics.get(key, before.get(key))} == set()
    if (one, other) not in EXTREME:
        assert missing(known, (one, other), set(after) | set(before)) == []
    for path in outputs(crowd_place):
        assert crowd.digest(path) in known.files.get(kind(path), set()), path
    for page in (run / "report.html",):
        text = page.read_text() if page.exists() else "</html>"
        assert text.rstrip().endswith("</html>") and "Errno" not in text, text[-500:]
    left = [p for p in run.rglob("*") if p.name.endswith((".tmp", ".partial", ".state.pth"))]
    assert left == []
    check_features(run)


def in_use(name: str, found: Ended) -> bool:
    """Whether a command was refused as another has its folder."""
    return name in OWNERS and found.code == 2 and bool(re.search(" in use by ", found.err))


def missing(known: Known, names: tuple[str, str], there: set[str]) -> list[str]:
    """Results of the two that are nowhere; of several states of the run, one is enough."""
    what = {key.split(" {")[0] for name in names for key in known.results[name]}
    return sorted(what - {key.split(" {")[0] for key in there})


def check_features(run: Path) -> None:
    """Features under their names are whole."""
    for folder in (run / "features").glob("[!.]*"):
        assert json.loads((folder / "meta.json").read_text())
        for path in folder.glob("*.npy"):
            assert np.isfinite(np.load(path)).all()
