"""How much a trained classifier forgets while its backbone is pretrained further without labels.

    python bench/trials/forgetting.py WEIGHTS SHARDS FOLDER [--lr 0.00005] [option of pretrain]

WEIGHTS is a classifier of ``--arch`` (by default timm/tf_efficientnet_lite0), SHARDS labeled images
of its classes. For each learning rate DINO continues from the backbone in ``FOLDER/lr-RATE`` with
``configs/continue/backbone.yaml``. It prints, before and after, the top-1 accuracy of the
*original* classifier on the (teacher's) backbone, and what the guard measured without labels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that bench is found
from xcit_dino.cli import main as xcit_dino
from xcit_dino.errors import InputError, RunError
from xcit_dino.models.weights.load import find_network, load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.provenance import read_results
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.state import newest_checkpoint

RECIPE = Path(__file__).resolve().parents[2] / "configs/continue/backbone.yaml"


def accuracy(weights: Path, arch: str, shards: Path, folder: Path) -> float:
    """Top-1 in percent of a classifier."""
    words = ["evaluate", "--arch", arch, "--pretrained_weights", str(weights)]
    words += ["--data_path", str(shards), "--output_dir", str(folder), "--num_workers", "1"]
    if xcit_dino(words):
        raise SystemExit("evaluate failed")
    return read_results(folder)["evaluate"]["metrics"]["top1"]


def with_classifier(backbone: Path, original: Path, arch: str, target: Path) -> Path:
    """The teacher's backbone of a run with the classifier of the original weights."""
    model = create_model(arch, num_classes=1000)
    load_backbone(original, model, head="required")
    model.load_state_dict(find_network(backbone, "teacher").state, strict=False)
    torch.save({"model": model.state_dict()}, target)
    return target


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--lr", nargs="+", default=["0.00005", "0.0005"])
    given, options = parser.parse_known_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    before = accuracy(given.weights, given.arch, given.shards, given.folder / "before")
    table = Table(box=None)
    for column in ("lr", "top-1 before", "after", "neighbors kept", "CKA", "roll-backs"):
        table.add_column(column, justify="right")
    for lr in given.lr:
        run = given.folder / f"lr-{lr}"
        words = ["pretrain", "--config", str(RECIPE), "--arch", given.arch, "--lr", lr]
        words += ["--init_from", str(given.weights), "--data_path", str(given.shards)]
        code = xcit_dino([*words, "--output_dir", str(run), *options])
        newest = newest_checkpoint(run)
        if newest is None:
            raise SystemExit(f"--lr {lr}: ended with code {code} before the first checkpoint")
        file = with_classifier(newest, given.weights, given.arch, run / "classifier.pth")
        after = accuracy(file, given.arch, given.shards, run / "after")
        last = [line for line in read_metrics(run) if "neighbors_kept" in line][-1]
        kept, cka = f"{last['neighbors_kept']:.2f}", f"{last['feature_cka']:.3f}"
        rollbacks = torch.load(newest, weights_only=True, mmap=True)["rollbacks"]
        table.add_row(lr, f"{before:.2f}", f"{after:.2f}", kept, cka, str(rollbacks))
    Console().print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, RunError) as error:
        sys.exit(f"forgetting.py: {error}")
