"""A hang is reported once, named after what the main thread does."""

import sys
import threading
import time

from xcit_dino.train import signals
from xcit_dino.train.watchdog import Watchdog, blamed, phase_of


def test_phases_are_read_off_the_stack():
    def inside(call, *args):
        """The phase of a thread that is in the middle of a call."""
        thread = threading.Thread(target=call, args=args, daemon=True)
        thread.start()
        time.sleep(0.05)
        return phase_of(sys._current_frames()[thread.ident])

    class Work:
        def wait(self):
            time.sleep(0.3)

    vote = signals.Vote()
    vote.work = Work()
    assert inside(vote.result) == "collective"

    def train_step():
        time.sleep(0.3)

    assert inside(train_step) == "forward"
    assert inside(time.sleep, 0.3) == "between steps"
    assert phase_of(None) == "between steps"


def test_one_report_a_hang_with_stacks(tmp_path, capsys):
    with Watchdog(tmp_path, minutes=0.15 / 60) as watchdog:
        watchdog.beat(7)
        time.sleep(0.6)
        watchdog.beat(8)
        time.sleep(0.05)
    said = capsys.readouterr().err
    assert said.count("no step for") == 1 and "after step 7: rank 0 on" in said
    place = tmp_path / "stalls" / "step-00000007"
    assert "test_one_report_a_hang" in (place / "rank-0.txt").read_text()
    assert blamed(place, 2)[0].startswith("rank 1 does not respond")


def test_steps_in_time_are_silent(tmp_path, capsys):
    with Watchdog(tmp_path, minutes=0.5 / 60) as watchdog:
        for step in range(20):
            watchdog.beat(step)
            time.sleep(0.03)
    with Watchdog(tmp_path, minutes=0):
        pass
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_those_that_wait_are_not_blamed(tmp_path):
    for rank, phase in enumerate(("backward", "data", "collective")):
        facts = f'{{"rank": {rank}, "phase": "{phase}", "host": "h{rank}"}}'
        (tmp_path / f"rank-{rank}.json").write_text(facts)
    assert blamed(tmp_path, 3) == ["rank 1 on h1 is in: data"]
    (tmp_path / "rank-1.json").unlink()
    assert blamed(tmp_path, 1) == ["all ranks wait for one another: network?"]
