"""Run one function over many tasks in processes, with one progress bar and a clean Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from xcit_dino.cores import usable_cores
from xcit_dino.progress import Bar

AHEAD = 4  # tasks a process that are submitted or hold an unread result: bounds the memory
Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Advances the bar by an amount of work."""


def map_processes(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    num_workers: int | None,
    bar: Bar,
) -> Iterator[Result]:
    """``function(task, advance)`` for every task; results come in the order of the tasks.

    Args:
        function: at module level, so that a process can import it.
        num_workers: processes; None is one per core, and a single one runs in this process.
    """
    num_workers = min(num_workers or usable_cores(), len(tasks))
    if num_workers <= 1:
        for task in tasks:
            yield function(task, bar.advance)
        return
    context = multiprocessing.get_context("spawn")  # safe whatever threads this process runs
    count, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (count, stop)) as pool:
        waiting: deque[Future[Result]] = deque()
        shown = submitted = 0
        try:
            while submitted < len(tasks) or waiting:
                while submitted < len(tasks) and len(waiting) < AHEAD * num_workers:
                    waiting.append(pool.submit(_call, function, tasks[submitted]))
                    submitted += 1
                while not _is_done(waiting[0]) or shown < count.value:
                    shown, before = count.value, shown
                    bar.advance(shown - before)
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process was killed (out of memory?); fewer --num_workers need less of it"
            ) from None
        except BaseException:  # also Ctrl-C: let the processes drop their work
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _is_done(future: Future[Any]) -> bool:
    return not wait([future], timeout=0.2).not_done


_shared: list[Any] = []  # in a worker: the counter and the event of its parent


def _start_worker(count: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    _shared[:] = [count, stop]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with a parent that is killed, instead of waiting for tasks without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, Advance], Any], task: Any) -> Any:
    return function(task, _advance)


def _advance(amount: int) -> None:
    count, stop = _shared
    if stop.is_set():
        raise InterruptedError
    with count.get_lock():
        count.value += amount
