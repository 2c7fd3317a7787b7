"""Collapse detection: diagnostics computed on the device, and alarms that name the kind.

The three kinds and their symptoms (K prototypes, N teacher rows of a micro-batch):

* **uniform**: the teacher's output is the same flat distribution for every image. Entropy near
  ln K, the loss stuck at ln K; sharpening is too weak (teacher_temp too high). The *information* in
  the outputs (entropy of the mean output minus mean entropy) goes to 0, whereas a healthy teacher's
  is a good part of ln N.
* **single mode**: the teacher's outputs are a few sharp distributions, in the end a single one;
  centering is off. The mean output covers a few prototypes: the number of *modes* (its perplexity)
  goes to 1.
* **dimensional**: outputs differ, but the features of the backbone lie along few directions, or on
  a point: their *effective rank* goes to 1, or their std to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.errors import RunError, warn
from xcit_dino.train.distributed import dist


@torch.no_grad()
def health(loss: Tensor, targets_GBK: Tensor | None, features_ND: Tensor) -> dict[str, Tensor]:
    """The loss and cheap diagnostics, as device scalars; the first five describe DINO's targets and
    are missing if there are none.

    ``teacher_entropy``: mean entropy of the teacher's outputs, nats, 0 to ln K.
    ``kl``: loss minus entropy, what the student still has to learn.
    ``information``: mutual information of outputs and images as a share of ln min(N, K); 0 for one
    row.
    ``mean_entropy``: entropy of the mean output as a share of ln K; 0 is a single mode.
    ``prototypes_used``: share of prototypes that are the top choice of some image in this batch.
    ``feature_std``: mean std of a dimension of the unit-length features, times sqrt(D): 1 is
    evenly spread, 0 is one point.
    ``effective_rank``: (sum of eigenvalues)^2 / (sum of their squares) of the features' covariance,
    1 to min(N - 1, D): the directions in use, without computing eigenvalues.
    """
    loss = loss.detach()
    of_targets = {} if targets_GBK is None else _target_diagnostics(loss, targets_GBK)
    unit_ND = F.normalize(features_ND.float(), dim=-1)
    spread_ND = unit_ND - unit_ND.mean(0)
    wide = spread_ND.shape[0] < spread_ND.shape[1]
    gram = spread_ND @ spread_ND.T if wide else spread_ND.T @ spread_ND
    return {
        "loss": loss,
        **of_targets,
        "feature_std": spread_ND.square().mean(0).sqrt().mean() * math.sqrt(unit_ND.shape[1]),
        "effective_rank": gram.trace().square() / gram.square().sum().clamp_min(1e-12),
    }


def _target_diagnostics(loss: Tensor, targets_GBK: Tensor) -> dict[str, Tensor]:
    outputs_NK = targets_GBK.flatten(0, 1)
    rows, prototypes = outputs_NK.shape
    possible = max(min(rows, prototypes), 2)
    entropy = torch.special.entr(outputs_NK).sum(-1).mean()
    mean_entropy = torch.special.entr(outputs_NK.mean(0)).sum()
    used = torch.zeros(prototypes, device=loss.device)
    used.index_fill_(0, outputs_NK.argmax(-1), 1.0)
    return {
        "teacher_entropy": entropy,
        "kl": loss - entropy,
        "information": (mean_entropy - entropy) / math.log(possible),
        "mean_entropy": mean_entropy / math.log(prototypes),
        "prototypes_used": used.sum() / possible,
    }


# -- alarms ----------------------------------------------------------------------------------------

Line = dict[str, float]
LOW_INFORMATION, ENOUGH_INFORMATION = 0.03, 0.06
FEW_MODES, ENOUGH_MODES = 6.0, 10.0
FEW_USED, ENOUGH_USED = 0.25, 0.4  # a healthy micro-batch of few images has few modes too
LOW_RANK, ENOUGH_RANK = 1.5, 2.0
LOW_STD, ENOUGH_STD = 0.02, 0.04
FEW_IMAGES = 4  # fewer lie along one direction, and have few modes, even in a healthy run


class Kind(NamedTuple):
    """A kind of collapse: when its alarm is raised, when it is cleared, and what to change."""

    name: str
    collapsed: Callable[[Line], bool]
    cleared: Callable[[Line], bool]
    symptom: str
    advice: str


KINDS = (
    Kind(
        "uniform",
        lambda line: line["information"] < LOW_INFORMATION and line["modes"] > FEW_MODES,
        lambda line: line["information"] > ENOUGH_INFORMATION or line["modes"] < FEW_MODES,
        "the teacher's output is the same for every image, spread over all prototypes (entropy "
        "{teacher_entropy:.2f} "
        "of ln K = {ceiling:.2f}, KL {kl:.3f}, loss {loss:.2f})",
        "sharpen: a lower --teacher_temp and --warmup_teacher_temp (0.04); a higher "
        "--momentum_teacher; for small heads --use_bn_in_head true",
    ),
    Kind(
        "single mode",
        lambda line: line["modes"] < FEW_MODES and line["used"] <= FEW_USED,
        lambda line: line["modes"] > ENOUGH_MODES or line["used"] > ENOUGH_USED,
        "the teacher has {modes:.1f} distinct outputs for all images (entropy "
        "{teacher_entropy:.2f}, "
        "{prototypes_used:.0%} of prototypes used, center {center_norm:.1f})",
        "center: --center_momentum 0.9 (1 never centers); a lower --lr; a longer "
        "--freeze_last_layer; a higher --momentum_teacher",
    ),
    Kind(
        "dimensional",
        lambda line: line["effective_rank"] < LOW_RANK or line["feature_std"] < LOW_STD,
        lambda line: line["effective_rank"] > ENOUGH_RANK and line["feature_std"] > ENOUGH_STD,
        "the features lie along few directions (effective rank {effective_rank:.2f}, std "
        "{feature_std:.3f})",
        "a lower --lr, a longer --warmup_epochs, a larger global batch",
    ),
)


DIMENSIONAL = KINDS[2:]  # those that need only features, no prototypes


class Alarms:
    """Alarms with hysteresis: one is raised after its condition has held in every logged line for
    ``patience`` steps, and cleared after the opposite has held as long, by a wider margin.

    Args:
        prototypes: K; 0 if there are none, and only DIMENSIONAL can be judged.
        patience: steps.
        stop: whether an alarm ends the run.
        views, images: G and B of a micro-batch. In a healthy run all views of an image have the
            same output, so the share of prototypes used is judged as if there were two. With fewer
            than ``FEW_IMAGES`` no alarm is raised, and a warning is printed.
        saved: :meth:`state` of the previous attempt.
    """

    def __init__(
        self,
        prototypes: int,
        patience: int,
        stop: bool,
        *,
        views: int = 2,
        images: int = 64,
        saved: dict[str, Any] | None = None,
    ):
        self.kinds = KINDS if prototypes else DIMENSIONAL
        self.ceiling = math.log(prototypes or 1)
        self.as_two = min(views * images, prototypes) / max(min(2 * images, prototypes), 1)
        self.blind = images < FEW_IMAGES
        if self.blind and dist.is_main():
            warn(
                f"no alarms for collapse: --batch_size_per_gpu {images} is too few images to judge "
                f"by; take {FEW_IMAGES} or more"
            )
        self.patience, self.stop = patience, stop
        saved = saved or {"on": [], "since": {}}
        self.on: set[str] = set(saved["on"])
        self.since: dict[str, int] = dict(saved["since"])  # kinds about to change: since which step

    def state(self) -> dict[str, Any]:
        """What the next attempt needs to raise alarms at the same steps, as plain values."""
        return {"on": sorted(self.on), "since": dict(self.since)}

    def observe(self, step: int, line: Line) -> Line:
        """Process a line of the log, the same on all ranks, so that they stop together.

        Returns:
            For the log: ``alarm_KIND``, 1.0 or 0.0, for those that changed.

        Raises:
            RunError: an alarm, if it is to stop the run.
        """
        if self.blind:
            return {}
        changed = {}
        if self.kinds is KINDS:
            line = line | {
                "modes": math.exp(line["mean_entropy"] * self.ceiling),
                "used": line["prototypes_used"] * self.as_two,
            }
        for kind in self.kinds:
            changes = kind.cleared if kind.name in self.on else kind.collapsed
            if not changes(line):
                self.since.pop(kind.name, None)
            elif step - self.since.setdefault(kind.name, step) >= self.patience:
                del self.since[kind.name]
                changed[f"alarm_{kind.name.replace(' ', '_')}"] = float(kind.name not in self.on)
                self._turn(kind, step, line)
        return changed

    def _turn(self, kind: Kind, step: int, line: Line) -> None:
        self.on ^= {kind.name}
        if kind.name not in self.on:
            text = f"step {step}: the alarm for {kind.name} collapse is cleared"
        else:
            symptom = kind.symptom.format(ceiling=self.ceiling, **line)
            text = f"step {step}: {kind.name} collapse: {symptom}. Change: {kind.advice}"
            if self.stop:
                raise RunError(text)
        if dist.is_main():
            warn(text)


def patience(steps_per_epoch: int) -> int:
    """An epoch, but at least 100 and at most 2,000 steps."""
    return min(max(100, steps_per_epoch), 2_000)
