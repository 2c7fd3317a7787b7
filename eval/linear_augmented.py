"""DINO's linear protocol (``eval_linear.py``), for a whole grid of heads at once: RandomResizedCrop
and flip of every image pass through the frozen backbone in every epoch, and all heads train on the
same features. Two grids train at once: one without the held-out images, for selection, and one on
all images, whose head is reported. The selection thus needs no second training.

Interpolation is bicubic; the official code uses torchvision's default, bilinear.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcit_dino.data.augment import sample_params
from xcit_dino.data.config import AugmentConfig, CropsConfig
from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.data.packed import to_device
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval.config import LinearConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import feature_blocks, wants_deep
from xcit_dino.eval.linear_grid import Blocks, Choice, Heads, Probe, best, hold_out
from xcit_dino.eval.target import Network
from xcit_dino.files import write_atomic
from xcit_dino.progress import progress
from xcit_dino.provenance import digest
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist
from xcit_dino.train.schedules import cosine

SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop, as in eval_linear.py


def train_augmented(
    network: Network,
    train: ShardIndex,
    context: Context,
    choices: list[Choice],
    num_classes: int,
    config: LinearConfig,
    facts: dict[str, Any],
) -> Probe:
    """Train all heads on augmented crops; the learning rate changes once per epoch, as in DINO. The
    selection uses center crops of the held-out images.

    facts: all that the heads depend on, so that no other unfinished training is resumed.
    """
    loader = crop_loader(train, context, config)
    plan = loader.plan
    held_out = hold_out(train.num_samples, config.holdout, config.seed)
    deep = wants_deep(choice.layers for choice in choices)
    selection, final = two_grids(network, context, choices, num_classes, config, plan)

    saved = SavedHeads(state_file(config, network, facts), json.dumps(facts, sort_keys=True))
    changing = selection.state() + final.state()
    start = loader.start_step = saved.load_into(changing) * plan.steps_per_epoch
    steps = config.epochs * plan.steps_per_epoch
    with progress(f"{len(choices)} linear heads", steps, "steps", start) as bar, torch.no_grad():
        for (batch,) in islice(loader, steps - start):
            labels = to_device(batch.labels, context.device)
            blocks = gather_rows(features_of(batch, network, context, config.seed, deep))
            rows = gather_rows({"labels": labels, "held_out": held_out[batch.sources]})
            factor = cosine(batch.epoch, config.epochs, 1.0, 0.0)
            step_grids(selection, final, blocks, rows, factor)
            bar.advance()
            if context.world.is_main and (batch.step + 1) % plan.steps_per_epoch == 0:
                saved.save(changing, batch.epoch + 1)

    rows = np.flatnonzero(held_out.numpy())
    with torch.inference_mode():
        batches = held_out_batches(network, train, context, rows, deep)
        scores = selection.score(batches)
    chosen = best(scores)
    return Probe(choices, scores, chosen, *final.head(chosen))


def crop_loader(train: ShardIndex, context: Context, config: LinearConfig) -> CropLoader:
    """RandomResizedCrops of all labeled images, one per image and epoch, not yet flipped."""
    world, size = context.world, context.batch_size * context.world.size
    inherited = context.loader.decoder if world.device.type == "cuda" else "host"
    options = replace(context.loader, decoder=config.decoder or inherited)
    crops = CropsConfig(
        global_crops_number=1,
        global_crops_size=context.crop,
        global_crops_scale=SCALE,
        local_crops_number=0,
    )
    return CropLoader(
        train,
        Plan.of(train, options, seed=config.seed, batch_size=size),
        crops,
        options,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        labeled=True,
    )


def two_grids(
    network: Network,
    context: Context,
    choices: list[Choice],
    num_classes: int,
    config: LinearConfig,
    plan: Plan,
) -> tuple[Heads, Heads]:
    """Two sets of untrained heads: for selection, and to report."""
    device, deep = context.device, wants_deep(choice.layers for choice in choices)
    with torch.inference_mode():
        blocks = feature_blocks(network.model.to(device), context.blank(), deep)
    dims = {name: block.shape[1] for name, block in blocks.items()}
    selection, final = (
        Heads(choices, dims, num_classes, plan.batch_size, config.seed, device) for _ in range(2)
    )
    return selection, final


def features_of(batch: Batch, network: Network, context: Context, seed: int, deep: bool) -> Blocks:
    """float32 feature blocks (B, d) of a batch of crops, half of them flipped."""
    with autocast(context.device, resolve_precision(context.precision, context.device)):
        images = flip_half(context.normalize(batch.global_crops[0]), batch, seed)
        blocks = feature_blocks(network.model, images, deep)
    return {name: block.float() for name, block in blocks.items()}


def step_grids(selection: Heads, final: Heads, blocks: Blocks, rows: Blocks, factor: float) -> None:
    """One step of both grids, without synchronizing host and GPU.

    blocks: (B, d) on the device; rows: ``labels`` int64 (B,) on the device, ``held_out`` bool (B,)
    on the host, so that the number of rows not held out is known on the host.
    """
    labels = rows["labels"]
    final.step(blocks, labels, factor)
    kept = torch.from_numpy(np.flatnonzero(~rows["held_out"].numpy()))
    if len(kept):
        kept = to_device(kept, labels.device)
        others = {name: block[kept] for name, block in blocks.items()}
        selection.step(others, labels[kept], factor)


def state_file(config: LinearConfig, network: Network, facts: dict[str, Any]) -> Path:
    """File of an unfinished training of heads, one per training, as several may run
    concurrently; deleted when its result is written."""
    name = f"linear-dino-{network.name}-{digest(facts)}.state.pth"
    return config.target.output_dir / name


@dataclass(frozen=True)
class SavedHeads:
    """The heads after the last complete epoch, from which a stopped job resumes."""

    path: Path
    key: str
    """What the training depends on; a state with another key is not used."""

    def load_into(self, tensors: list[Tensor]) -> int:
        """Restore the heads' tensors; returns the epochs they have seen. Rank 0 reads for all."""
        state = dist.from_main(self._read)
        if state is None:
            return 0
        for tensor, value in zip(tensors, state["tensors"], strict=True):
            tensor.copy_(value)
        return state["epochs"]

    def _read(self) -> dict[str, Any] | None:
        kind = self.path.name.rpartition("-")[0]
        others = sorted(self.path.parent.glob(f"{kind}*.state.pth"))  # KIND.state.pth: of 0.1
        for path in (self.path, *(other for other in others if other != self.path)):
            with suppress(FileNotFoundError):  # also if another command has just ended
                state = torch.load(path, map_location="cpu", weights_only=True)
                same = state["key"] == self.key
                what = f"resumes after epoch {state['epochs']}" if same else "does not resume"
                why = f"{path.name} is {'of this' if same else 'of another'} training"
                print(f"linear probe {what}: {why}", flush=True)
                if same:
                    return state
        return None

    def save(self, tensors: list[Tensor], epochs: int) -> None:
        """Write the state atomically."""
        content = io.BytesIO()
        torch.save({"key": self.key, "epochs": epochs, "tensors": tensors}, content)
        write_atomic(self.path, content.getvalue())


def flip_half(crops: Tensor, batch: Batch, seed: int) -> Tensor:
    """The batch's crops, (B, C, H, W), half of them flipped horizontally."""
    params = sample_params(AugmentConfig(), seed, batch.epoch, batch.samples, range(1), 1)
    flip = to_device(torch.from_numpy(params.flip), crops.device)
    return torch.where(flip[:, None, None, None], crops.flip(-1), crops)


def held_out_batches(
    network: Network, train: ShardIndex, context: Context, rows: np.ndarray, deep: bool
) -> Iterator[tuple[Blocks, Tensor]]:
    """Center-crop features and labels of the held-out images, a batch at a time."""
    function = partial(feature_blocks, network.model, deep=deep)
    for blocks, samples in context.batches(function, train, rows, "held-out images"):
        labels = torch.from_numpy(train.labels[samples].astype(np.int64)).to(context.device)
        yield blocks, labels


def gather_rows(tensors: Blocks) -> Blocks:
    """Every rank's rows, in rank order, so that all ranks take the same step of the same heads.
    Rows on the host are exchanged by gloo, beside the GPU's work."""
    if dist.world_size() == 1:
        return tensors
    result = {}
    for name, mine in tensors.items():
        theirs = [torch.empty_like(mine) for _ in range(dist.world_size())]
        torch.distributed.all_gather(theirs, mine.contiguous())
        result[name] = torch.cat(theirs)
    return result
