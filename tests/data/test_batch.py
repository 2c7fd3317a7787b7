"""Copies to the device: what waits for what, checked with streams that only record their calls."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from xcit_dino.data.batch import Batch, Copier


@pytest.fixture
def diary(monkeypatch):
    """What happens on CUDA's streams and events, in order, without CUDA."""
    written = []
    numbers = iter(range(10))

    class Event:
        def __init__(self):
            self.name = f"event {next(numbers)}"
            self.recorded = False

        def record(self, stream):
            self.recorded = True
            written.append(f"{stream.name} records {self.name}")

        def synchronize(self):
            if self.recorded:  # CUDA returns at once otherwise
                written.append(f"host waits for {self.name}")

    class Stream:
        def __init__(self, name="side"):
            self.name = str(name).replace("cpu", "side")

        def wait_event(self, event):
            written.append(f"{self.name} waits for {event.name}")

    @contextmanager
    def stream(chosen):
        written.append(f"on {chosen.name}:")
        yield
        written.append("done")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, s: written.append(f"used on {s.name}")
    )
    return written


def batch(number):
    nothing = np.zeros(0, np.int64)
    crops = torch.full((2, 3), number, dtype=torch.uint8)
    return Batch(number, 0, 0, nothing, nothing, torch.tensor([number]), crops, crops + 1)


def test_the_step_waits_for_its_copy_and_the_host_for_the_one_before(diary):
    copier = Copier(torch.device("cpu"))
    moved = copier.copied([batch(1)])
    assert moved[0].step == 1 and moved[0].global_crops.tolist() == [[1] * 3] * 2
    used = ["used on current"] * 3
    first = ["on side:", "side records event 1", "done", "current waits for event 1"]
    assert diary == first + used
    diary.clear()
    copier.copied([batch(2)])
    second = ["on side:", "side records event 0", "done", "host waits for event 1"]
    assert diary == [*second, "current waits for event 0", *used]
