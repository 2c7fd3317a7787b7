"""Roll back to an earlier checkpoint and continue with half the learning rate."""

from __future__ import annotations

from xcit_dino.errors import RunError, warn
from xcit_dino.train.distributed import dist
from xcit_dino.train.state import Checkpoints

MAX_ROLLBACKS = 3  # at an eighth of the learning rate, the learning rate is not the cause


class RollBack(Exception):
    """The run has to go back to a checkpoint; the message gives the reason.

    Args:
        reason: in words.
        advice: which options to change if going back does not help.
        until: checkpoints after this step are deleted; None: the newest one is good.
    """

    def __init__(self, reason: str, advice: str, until: int | None = None):
        super().__init__(reason)
        self.advice, self.until = advice, until


def roll_back(reason: RollBack, rollbacks: int, checkpoints: Checkpoints) -> None:
    """Roll back, for the n-th time, and continue with half the learning rate.

    Raises:
        RunError: there is no checkpoint, or earlier roll-backs did not help.
    """
    if (until := reason.until) is not None:
        dist.from_main(lambda: checkpoints.drop_after(until))
    newest = checkpoints.newest()
    if newest is None:
        raise RunError(f"{reason}, before the first checkpoint: {reason.advice}")
    if rollbacks > MAX_ROLLBACKS:
        raise RunError(f"{reason}, despite {MAX_ROLLBACKS} roll-backs: {reason.advice}")
    if dist.is_main():
        factor = 0.5**rollbacks
        warn(f"{reason}: rolled back to {newest.name}, now {factor:g} of the learning rate")
