"""``xcit-dino retrieve``: image retrieval and copy detection (DINO ``eval_image_retrieval.py``,
``eval_copy_detection.py``) with the features of any backbone.

``RUN/retrieve/NETWORK-DIGEST/neighbors.csv``: the most similar images of each query;
``neighbors.png``: those of some queries. DIGEST is that of the protocol.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from xcit_dino.errors import warn
from xcit_dino.eval.context import Context
from xcit_dino.eval.knn import unit_rows
from xcit_dino.eval.neighbors import evenly_spaced
from xcit_dino.eval.pictures.attention import Pixels
from xcit_dino.eval.pictures.false_color import picture
from xcit_dino.eval.pictures.render import SIDE, framed, mosaic
from xcit_dino.eval.results import write_result
from xcit_dino.eval.retrieval.collection import (
    Collection,
    common,
    images_below,
    open_collection,
    other_files,
)
from xcit_dino.eval.retrieval.config import RetrieveConfig
from xcit_dino.eval.retrieval.duplicates import write_csv
from xcit_dino.eval.retrieval.extract import Extractor
from xcit_dino.eval.retrieval.parts import Parts
from xcit_dino.eval.retrieval.ranking import positions_of, scores
from xcit_dino.eval.retrieval.whitening import Whitening
from xcit_dino.eval.target import Network, networks, resolve_without_shards
from xcit_dino.files import check_writable, unfinished_folder
from xcit_dino.inputs import BYTES
from xcit_dino.provenance import digest
from xcit_dino.train.distributed import dist

FOLDER = "retrieve"
KS = (1, 5, 10)  # of precision and recall
CELLS = 1 << 24  # cosines ranked at a time
SHOWN = 8  # neighbors in a row of the picture
NAMED = 3  # queries named in a message


class Found(NamedTuple):
    """The ranking of one query."""

    query: int
    positions: dict[str, np.ndarray]
    """Setup -> places of the relevant images; see :func:`positions_of`."""
    rows: np.ndarray
    """int64 [k]: the most similar images of the bank, without the query itself and other junk."""
    cosines: np.ndarray
    """float32 [k]."""


def run(config: RetrieveConfig) -> None:
    """Write the neighbors of all queries, and ``retrieve`` (and ``retrieve/random`` ...) to
    ``results.json`` where it is known what is relevant.

    Raises:
        InputError: no weights, no images, or a ground truth that cannot be used.
    """
    collection = open_collection(config)
    world = dist.init(config.device)
    check_writable(config.output_dir, "name another folder for the results")
    target, context = resolve_without_shards(config, world)
    context = dataclasses.replace(context, precision=config.precision)
    if context.inputs.channels > 3:
        context = dataclasses.replace(context, show_channels=(1, 2, 3))
    if world.is_main:
        for line in other_files(config):
            print(line, flush=True)
    search = Search(config, collection, context)
    for network in networks(config, target):
        began = time.monotonic()
        extractor = search.extractor(network)
        extractor.check(target.arch)
        found, counts = search.found(extractor)
        if world.is_main:
            facts: dict[str, Any] = {"wall_seconds": round(time.monotonic() - began, 2)}
            if network.name == "pretrained":
                facts["weights_file"] = target.weights.name
            search.report(extractor, found, counts, facts)
            extractor.parts.remove()
    dist.barrier()


@dataclass(frozen=True)
class Search:
    """A search for all queries of a collection."""

    config: RetrieveConfig
    collection: Collection
    context: Context

    def extractor(self, network: Network) -> Extractor:
        """How images become features; what no option says is as in DINO's script for the data."""
        config, copydays = self.config, self.collection.kind == "copydays"
        return Extractor(
            network, self.context, config.image_size,
            config.resize or ("square" if copydays else "longer"), config.multiscale,
            (config.features or ("cls+gem" if copydays else "cls")) == "cls+gem",
            Parts(config.output_dir / "features" / FOLDER),
        )  # fmt: skip

    def found(self, extractor: Extractor) -> tuple[list[Found], dict[str, int]]:
        """Rankings of all readable queries, and numbers of unreadable images, for the protocol."""
        collection, config = self.collection, self.config
        queries, bad = extractor.all_of(collection.queries, "queries")
        same = collection.queries == collection.bank
        bank, more = (queries, {}) if same else extractor.all_of(collection.bank, "bank")
        counts = {"unreadable_images": len(bad) + len(more)}
        if config.whitening:
            files = images_below(config.whitening, "whitening")
            if dist.is_main() and (shared := common(files, collection.queries + collection.bank)):
                warn(
                    f"--whitening {config.whitening}: {shared:,} of its images are searched too; "
                    "scores are optimistic"
                )
            others, unread = extractor.all_of(files, "whitening")
            more |= unread
            usable = others[readable(others)]
            if len(usable) < usable.shape[1] and dist.is_main():
                warn(
                    f"--whitening {config.whitening}: {len(usable):,} images for "
                    f"{usable.shape[1]:,} features; as many as features are needed, better ten "
                    "times as many"
                )
            whiten = Whitening.of(usable)
            queries, bank = whiten(queries), whiten(bank)
            counts["whitening_images"] = len(files) - len(unread)
        if not dist.is_main():
            return [], counts
        for path, reason in (bad | more).items():
            print(f"skipped: {path}: {reason}", flush=True)
        return [self.of_query(*ranking) for ranking in rankings(queries, bank)], counts

    def of_query(self, query: int, rows: np.ndarray, cosines: np.ndarray) -> Found:
        """A ranking, reduced to what is scored and listed."""
        truths = {setup: all_[query] for setup, all_ in self.collection.truths.items()}
        hidden = reduce(np.intersect1d, (truth.junk for truth in truths.values()))
        first = rows[: self.config.k + len(hidden)]
        kept = np.flatnonzero(~np.isin(first, hidden))[: self.config.k]
        scored = rows[: self.collection.depth]
        positions = {setup: positions_of(scored, truth) for setup, truth in truths.items()}
        return Found(query, positions, rows[kept], cosines[kept])

    def metrics(self, found: Sequence[Found]) -> dict[str, float]:
        """Means of all setups, in percent."""
        ks = () if self.collection.kind == "copydays" else KS
        metrics = {}
        for setup, truths in self.collection.truths.items():
            positions = [one.positions[setup] for one in found]
            of_setup = scores(positions, [len(truths[one.query].relevant) for one in found], ks)
            end = f"_{setup}" if setup else ""
            metrics |= {f"{name}{end}": value for name, value in of_setup.items()}
        return metrics

    def protocol(self, extractor: Extractor, counts: dict[str, int]) -> dict[str, Any]:
        """Everything that must match for two results to be comparable."""
        inputs, collection = self.context.inputs, self.collection
        found = extractor.network.facts | {
            "evaluation": "retrieve", "collection": collection.kind,
            "features": "cls+gem" if extractor.gem else "cls",
            "image_size": extractor.image_size, "resize": extractor.resize,
            "multiscale": extractor.multiscale, "mean": list(inputs.mean), "std": list(inputs.std),
            "precision": self.config.precision, "queries": len(collection.queries),
            "bank": len(collection.bank), "distractors": len(collection.distractors),
            "images_checksum": collection.checksum(),
        }  # fmt: skip
        if inputs.window != BYTES:
            found["window"] = [list(bounds) for bounds in inputs.window]
        return found | counts

    def report(
        self,
        extractor: Extractor,
        found: list[Found],
        counts: dict[str, int],
        facts: dict[str, Any],
    ) -> None:
        """Write the neighbors, print what was found, and store the metrics if there are any."""
        protocol, network = self.protocol(extractor, counts), extractor.network
        folder = self.config.output_dir / FOLDER / f"{network.name}-{digest(protocol)}"
        with unfinished_folder(folder) as new:
            write_csv(
                new / "neighbors.csv", "query place image cosine relevant",
                (line for one in found for line in self.lines(one)),
            )  # fmt: skip
            if rows := self.picture(extractor, found):
                Image.fromarray(mosaic(rows)).save(new / "neighbors.png")
        print(f"neighbors: {folder}", flush=True)
        metrics = self.metrics(found)
        without = self.without(found)
        if not metrics:
            print(
                "no mAP: what is relevant follows from equal names of folders, or --relevant",
                flush=True,
            )
            return
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"retrieve, {network.name}: {shown}", flush=True)
        for setup, names in without.items():
            print(
                f"{len(names):,} of {len(found):,} queries have nothing relevant in the bank"
                f"{f' ({setup})' if setup else ''} and do not count: {', '.join(names[:NAMED])}"
                f"{', ...' if len(names) > NAMED else ''}",
                flush=True,
            )
        if without:
            facts = facts | {
                "queries_without_relevant": {n or "all": len(q) for n, q in without.items()}
            }
        write_result(
            self.config.output_dir, f"retrieve{network.suffix}", metrics, protocol,
            neighbors=str(folder.relative_to(self.config.output_dir)), **facts,
        )  # fmt: skip

    def without(self, found: Sequence[Found]) -> dict[str, list[str]]:
        """Setup -> queries that have nothing relevant in the bank; of Copydays, whose setups divide
        the queries, those of all."""
        truths = self.collection.truths
        setups = [""] if "" in truths else list(truths)
        every = {
            setup: [
                self.collection.name_of_query(one.query)
                for one in found
                if not len(truths[setup][one.query].relevant)
            ]
            for setup in setups
        }
        return {setup: names for setup, names in every.items() if names}

    def relevant(self, query: int) -> np.ndarray:
        """int64 [R]: rows that are relevant in any setup."""
        return np.concatenate([all_[query].relevant for all_ in self.collection.truths.values()])

    def lines(self, one: Found) -> Iterator[tuple[Any, ...]]:
        """Lines of neighbors.csv; ``relevant`` is empty where nothing is known of the query."""
        relevant = self.relevant(one.query)
        for place, (row, cosine) in enumerate(zip(one.rows, one.cosines, strict=True), start=1):
            known = ("yes" if row in relevant else "no") if len(relevant) else ""
            names = self.collection.name_of_query(one.query), self.collection.name_in_bank(row)
            yield names[0], place, names[1], f"{cosine:.4f}", known

    def picture(self, extractor: Extractor, found: list[Found]) -> list[list[Pixels]]:
        """Tiles of some queries, each followed by its nearest; frames show what is relevant."""
        table = []
        for number in evenly_spaced(len(found), self.config.examples).tolist():
            one = found[number]
            relevant = self.relevant(one.query)
            tiles = [self.tile(self.collection.queries[one.query], extractor)]
            for row in one.rows[:SHOWN]:
                pixels = self.tile(self.collection.bank[row], extractor)
                tiles.append(framed(pixels, row in relevant) if len(relevant) else pixels)
            table.append(tiles)
        return table

    def tile(self, path: Any, extractor: Extractor) -> Pixels:
        """An image as a square on white."""
        pixels = extractor.read(path).permute(1, 2, 0).numpy()
        photo = Image.fromarray(picture(pixels, self.context))
        photo = ImageOps.contain(photo, (SIDE, SIDE), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (SIDE, SIDE), "white")
        square.paste(photo, ((SIDE - photo.width) // 2, (SIDE - photo.height) // 2))
        return np.asarray(square)


def readable(features: np.ndarray) -> np.ndarray:
    """int64: rows of the images that could be read."""
    return np.flatnonzero(~np.isnan(features).any(1))


def rankings(queries: np.ndarray, bank: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for each readable query its number, the rows of all readable images of the bank, the
    most similar first and of equal ones the lower row, and their cosines.

    Args:
        queries, bank: float [Q, D] and [N, D], not normalized.
    """
    rows = readable(bank)
    unit = unit_rows(bank[rows])
    numbers = readable(queries)
    for part in np.array_split(numbers, max(1, -(-len(numbers) * len(rows) // CELLS))):
        cosines = unit_rows(queries[part]) @ unit.T
        for number, own in zip(part.tolist(), cosines, strict=True):
            order = np.argsort(-own, kind="stable")
            yield number, rows[order], own[order]
