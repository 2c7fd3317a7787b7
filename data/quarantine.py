"""The list of unreadable samples, and the share of them that stops a run.

Every rank appends to a file of its own in the run folder (``quarantine.jsonl``, and
``quarantine.rankN.jsonl`` beside it: appending from several nodes to one file loses lines on
network file systems), and counts what all of them hold, so that the limit concerns the data set
and not one rank's share, and a resumed run continues the list.
"""

from __future__ import annotations

import json
from pathlib import Path

from xcit_dino.errors import InputError, warn

SHOWN = 10  # samples named in the message when the run stops


class Quarantine:
    """Counts bad samples of a data set.

    Args:
        folder: of the run; None keeps the list in memory.
        rank: of this process.
        num_samples: of the data set.
        max_bad_fraction: more than this share of all samples (and more than one) stops the run.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        rank: int,
        num_samples: int,
        max_bad_fraction: float,
    ) -> None:
        self.folder = folder
        self.limit = max(1, int(max_bad_fraction * num_samples)) if max_bad_fraction else 0
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[int, str] = {}  # sample -> its JSON line
        self._own = f"quarantine.rank{rank}.jsonl" if rank else "quarantine.jsonl"
        self._read_to: dict[Path, int] = {}

    def add(self, sample: int, shard: str, key: str, reason: str) -> None:
        """Record a bad sample, once.

        Raises:
            InputError: there are too many; the message names the first of them.
        """
        self._read_others()
        if sample in self.bad:
            return
        line = json.dumps({"sample": sample, "shard": shard, "key": key, "reason": reason})
        self.bad[sample] = line
        if self.folder is not None:
            try:
                with (self.folder / self._own).open("a") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk must not end a run
                warn(f"{self.folder / self._own}: {error.strerror}; not written: {line}")
        if len(self.bad) > self.limit:
            raise InputError(self._message())

    def _read_others(self) -> None:
        """Lines that have been added to any of the files since the last call."""
        for path in sorted(self.folder.glob("quarantine*.jsonl")) if self.folder else ():
            with path.open("rb") as file:
                file.seek(self._read_to.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # another process may be writing a line
            self._read_to[path] = self._read_to.get(path, 0) + len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                try:
                    self.bad.setdefault(int(json.loads(line)["sample"]), line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut off by a crash; its sample will be recorded again

    def summary(self) -> str:
        """How many they are, and the first of them."""
        first = json.loads(next(iter(self.bad.values())))
        more = ", such as" if len(self.bad) > 1 else ":"
        return (
            f"{len(self.bad):,} unreadable samples{more} {first['shard']}:{first['key']} "
            f"({first['reason']})"
        )

    def _message(self) -> str:
        first = "; ".join(
            f"{entry['shard']}:{entry['key']} ({entry['reason']})"
            for entry in map(json.loads, list(self.bad.values())[:SHOWN])
        )
        where = f" (all in {self.folder / 'quarantine*.jsonl'})" if self.folder else ""
        return (
            f"{len(self.bad)} samples are unreadable, more than --max_bad_fraction "
            f"{self.max_bad_fraction:g} allows ({self.limit}): {first} ...{where}; "
            "repair the shards (xcit-dino shards check lists what is wrong) or raise the limit"
        )
