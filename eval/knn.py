"""Weighted k-NN on frozen features (DINO ``eval_knn.py``; Wu et al. 2018, arXiv 1805.01978, section
3.4).

Similarity is the cosine; a neighbor with similarity s votes for its class with weight exp(s / T).
One exact FAISS search for the largest k serves every k, as the neighbors are sorted. Ties are
broken deterministically: among equally similar neighbors the lower number comes first, among
classes with equal votes the lower label.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from xcit_dino.errors import InputError
from xcit_dino.eval.config import KnnConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import (
    Features,
    count_classes,
    count_labels,
    kind_of_labels,
    load_features,
)
from xcit_dino.eval.results import write_result
from xcit_dino.eval.scores.few import check_classes, draw, mean_and_spread, subset
from xcit_dino.eval.scores.heads import target_scores
from xcit_dino.eval.scores.metrics import Scores, class_means, class_rows, lines_of
from xcit_dino.eval.scores.several import unscored
from xcit_dino.eval.scores.weighted import weighted_means
from xcit_dino.eval.target import Network, networks, resolve
from xcit_dino.progress import track
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import HEADLINE_K

QUERY_ROWS = 4096  # queries per search
BANK_ROWS = 1 << 21  # images per index: 3 GB at 384 dimensions
ADD_ROWS = 1 << 16  # images normalized at a time
VOTE_CELLS = 1 << 24  # float64 cells per table of votes, or per widened search
GPU_MAX_K = 2048  # FAISS's limit on GPUs
SCRATCH_BYTES = 1 << 29  # on each GPU


def run(config: KnnConfig) -> None:
    """Evaluate by k-NN and write ``knn`` (and ``knn/random``, ``knn/pixels``), or ``knn-few``, to
    ``results.json``.

    Raises:
        InputError: bad options, unlabeled data, or a bank smaller than every k.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    train, val = context.index("train"), context.index("val")
    kind, few = kind_of_labels(train, val), config.few.labels_per_class
    if kind and few:
        raise InputError(
            "--labels_per_class: not for images with several labels or values; leave it out"
        )
    num_classes = (count_labels if kind else count_classes)(train, val)
    labeled = np.asarray(train.labels if kind else train.labels[train.labels >= 0])
    bank_size = len(draw(labeled, few, 0, 0)) if few else len(labeled)
    fitting_ks(config.nb_knn, bank_size)
    classes = (train.target_classes if kind else train.classes or val.classes) or []
    name = "knn-few" if few else "knn"
    for network in networks(config.target, target):
        began = time.monotonic()
        bank = load_features(network, train, "train", context)
        queries = load_features(network, val, "val", context)
        bank_size = len(draw(bank.labels, few, 0, 0)) if few else len(bank)
        ks = fitting_ks(config.nb_knn, bank_size, verbose=network.name == "pretrained")
        if kind:
            metrics, lines = measure_targets(bank, queries, ks, config, classes, world)
        else:
            metrics, lines = measure(bank, queries, ks, config, num_classes, classes, world)
        if world.is_main:
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            print(f"k-NN, {network.name}: {shown}", flush=True)
            if kind and (line := unscored(lines, classes)):
                print(line, flush=True)
            write_result(
                config.target.output_dir,
                f"{name}{network.suffix}",
                metrics,
                protocol(config, ks, context, network, bank, queries)
                | kind
                | {"train_index": train.checksum, "val_index": val.checksum},
                **({"per_class": lines} if lines else {}),
                weights_file=target.weights.name if network.name == "pretrained" else None,
                wall_seconds=round(time.monotonic() - began, 2),
            )
    dist.barrier()


def measure(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    config: KnnConfig,
    num_classes: int,
    classes: list[str],
    world: dist.World,
) -> tuple[dict[str, float], list[str]]:
    """Accuracies and metrics over classes in percent, and lines of each class, on the main rank;
    with few labels the means of several draws, and no classes."""

    def once(bank: Features) -> tuple[dict[str, float], list[str]]:
        votes = Scores(len(queries), num_classes)
        metrics = evaluate(bank, queries, ks, config.temperature, num_classes, world, votes)
        scored = votes.gathered()
        rows = class_rows(scored) if world.is_main else []
        return metrics | class_means(rows), lines_of(rows, classes) if rows else []

    few = config.few
    if not few.labels_per_class:
        return once(bank)
    check_classes(bank.labels, few.labels_per_class)
    draws = [draw(bank.labels, few.labels_per_class, few.draw_seed, n) for n in range(few.draws)]
    return mean_and_spread([once(subset(bank, rows))[0] for rows in draws]), []


def measure_targets(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    config: KnnConfig,
    names: list[str],
    world: dist.World,
) -> tuple[dict[str, float], list[str]]:
    """Metrics and lines of each label or value, of the neighbors' weighted means; ranks split the
    queries. ``map`` or ``r2`` for every k, the others at the headline's."""
    own = slice(*(len(queries) * (world.rank + i) // world.size for i in (0, 1)))
    search = Search(bank.blocks["cls"], gpu=world.device.type == "cuda")
    features = queries.blocks["cls"][own]
    parts = [np.empty((len(ks), 0, bank.labels.shape[1]))]
    starts = range(0, len(features), QUERY_ROWS)
    for start in track(starts, "k-NN search", len(starts), "blocks"):
        found = search(features[start : start + QUERY_ROWS], ks[-1])
        parts.append(weighted_means(*found, bank.labels, ks, config.temperature))
    own_means = np.concatenate(parts, 1)
    every: list[Any] = [own_means] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(every, own_means)
    means = dict(zip(ks, np.concatenate(every, 1), strict=True))
    of_k = {k: target_scores(means[k], queries.labels, names, logits=False) for k in ks}
    metrics, lines = of_k[HEADLINE_K if HEADLINE_K in ks else ks[0]]
    leading = next(iter(metrics))  # map or r2
    by_k = {f"{leading}_k{k}": of_k[k][0][leading] for k in ks}
    return by_k | {name: metrics[name] for name in metrics if name != leading}, lines


def fitting_ks(ks: Sequence[int], bank_size: int, verbose: bool = False) -> list[int]:
    """The values of k that do not exceed the bank, ascending; verbose: print the skipped ones.

    Raises:
        InputError: none of them.
    """
    fitting = sorted({k for k in ks if k <= bank_size})
    if not fitting:
        raise InputError(
            f"--nb_knn {min(ks)}: the training split has only {bank_size} labeled, readable "
            f"images; ask for at most {bank_size}"
        )
    left_out = sorted(set(ks) - set(fitting))
    if left_out and verbose and dist.is_main():
        words = " and ".join(map(str, left_out))
        print(f"k-NN: k = {words} skipped: the bank has only {bank_size} images", flush=True)
    return fitting


def protocol(
    config: KnnConfig,
    ks: Sequence[int],
    context: Context,
    network: Network,
    bank: Features,
    queries: Features,
) -> dict[str, Any]:
    """Everything that must match for two k-NN accuracies to be comparable, apart from the
    shards."""
    return (
        network.facts
        | context.protocol
        | config.few.protocol
        | {
            "evaluation": "knn",
            "nb_knn": list(ks),
            "temperature": config.temperature,
            "precision": config.target.precision,
            "features": "cls, L2-normalised"
            if network.name != "pixels"
            else "pixels, L2-normalised",
            "train_images": len(bank),
            "val_images": len(queries),
            "unreadable_images": bank.unreadable + queries.unreadable,
        }
    )


def evaluate(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    world: dist.World,
    votes: Scores | None = None,
) -> dict[str, float]:
    """Accuracies in percent, ``top1_k20`` and so on; ranks split the queries.

    votes: receives those of this rank's queries, at the headline's k.
    """
    own = slice(*(len(queries) * (world.rank + i) // world.size for i in (0, 1)))
    hits = knn_hits(
        bank.blocks["cls"], bank.labels, queries.blocks["cls"][own], queries.labels[own],
        ks, temperature, num_classes, gpu=world.device.type == "cuda", votes=votes,
    )  # fmt: skip
    if world.size > 1:
        torch.distributed.all_reduce(hits)
    percent = 100 * hits / len(queries)
    return {
        f"top{5 if five else 1}_k{k}": percent[row, five].item()
        for row, k in enumerate(sorted(set(ks)))
        for five in (0, 1)
    }


def knn_hits(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    gpu: bool = False,
    votes: Scores | None = None,
) -> torch.Tensor:
    """Number of queries whose label is the first, and among the first five, of the classes ranked
    by votes.

    Args:
        bank, queries: float [N, D] and [Q, D], not normalized.
        bank_labels, query_labels: int64 [N] and [Q], from 0 to num_classes - 1.
        ks: values of k, at most N each.
        temperature: T > 0.
        votes: receives each query's shares of the votes at the headline's k.

    Returns:
        float64 [number of ks, 2], ascending in k. For k < 5 the second column counts the
            first k, as in DINO.
    """
    ks = sorted(set(ks))
    hits = torch.zeros(len(ks), 2, dtype=torch.float64)
    search = Search(bank, gpu)
    starts = range(0, len(queries), QUERY_ROWS)
    for start in track(starts, "k-NN search", len(starts), "blocks"):
        part = slice(start, start + QUERY_ROWS)
        similarities, neighbors = search(queries[part], ks[-1])
        ranks = vote_ranks(
            torch.from_numpy(similarities), torch.from_numpy(bank_labels[neighbors]),
            torch.from_numpy(query_labels[part]), ks, temperature, num_classes,
        )  # fmt: skip
        for row, k in enumerate(ks):
            hits[row, 0] += (ranks[row] < 1).sum()
            hits[row, 1] += (ranks[row] < min(5, k)).sum()
        if votes is not None:
            k = HEADLINE_K if HEADLINE_K in ks else ks[0]
            known = torch.from_numpy(bank_labels[neighbors])[:, :k]
            shown, targets = torch.from_numpy(similarities)[:, :k], query_labels[part]
            for first, table in all_votes(shown, known, temperature, num_classes):
                own = torch.from_numpy(targets[first : first + len(table)])
                votes.add(table / table.sum(1, keepdim=True), own)
    return hits


def all_votes(
    similarities: torch.Tensor, labels: torch.Tensor, temperature: float, num_classes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float64 [rows, C]): each class's votes of all K neighbors, some queries at a
    time."""
    rows = max(1, VOTE_CELLS // num_classes)
    for start in range(0, len(labels), rows):
        part, ks = slice(start, start + rows), [labels.shape[1]]
        (table,) = vote_tables(similarities[part], labels[part], ks, temperature, num_classes)
        yield start, table


def vote_ranks(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> torch.Tensor:
    """Rank (0 is first) of each query's own class by the votes of its k nearest, for every k.

    Args:
        similarities: [Q, K] cosines, descending; K = max(ks).
        labels: int64 [Q, K], classes of these neighbors.
        targets: int64 [Q].
        ks: ascending.

    Returns:
        int64 [len(ks), Q].
    """
    ranks = torch.empty(len(ks), len(targets), dtype=torch.int64)
    rows = max(1, VOTE_CELLS // num_classes)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        own_class = targets[part, None]
        lower = torch.arange(num_classes) < own_class
        tables = vote_tables(similarities[part], labels[part], ks, temperature, num_classes)
        for row, table in enumerate(tables):
            own = table.gather(1, own_class)
            ranks[row, part] = ((table > own) | ((table == own) & lower)).sum(1)
    return ranks


def predict(
    similarities: torch.Tensor, labels: torch.Tensor, temperature: float, num_classes: int
) -> torch.Tensor:
    """int64 [Q]: the class with the most votes of all K neighbors; the lowest in a tie."""
    tables = all_votes(similarities, labels, temperature, num_classes)
    # numpy's argmax returns the first of equal values, torch's any of them
    found = [torch.from_numpy(table.numpy().argmax(1)) for _, table in tables]
    return torch.cat([torch.empty(0, dtype=torch.int64), *found])


def vote_tables(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> Iterator[torch.Tensor]:
    """Yield votes float64 [Q, C] of the first k neighbors, for every k; always the same tensor."""
    # a common factor of a query's votes changes nothing; this one keeps exp() finite at any T
    votes = ((similarities - similarities[:, :1]).double() / temperature).exp()
    table = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    done = 0
    for k in ks:
        table.scatter_add_(1, labels[:, done:k], votes[:, done:k])
        yield table
        done = k


class Search:
    """Exact search for the most similar rows of a bank.

    The bank is split into parts, one on each GPU, or one on the CPU, and the parts' neighbors are
    merged. Memory is bounded: parts have at most BANK_ROWS rows, and if there are more parts than
    devices, they are indexed for each search and dropped. With one process per GPU, each uses its
    own GPU, as the processes split the queries.
    """

    def __init__(self, bank: np.ndarray, gpu: bool = False):
        self.bank = bank
        self.gpus: list[int] = []
        if gpu and faiss.get_num_gpus():
            everyone, own = range(faiss.get_num_gpus()), [torch.cuda.current_device()]
            self.gpus = list(everyone) if dist.world_size() == 1 else own
        self.resources = {gpu: gpu_resources(gpu) for gpu in self.gpus}
        self.num_devices = max(1, len(self.gpus))
        self.size = min(BANK_ROWS, -(-len(bank) // self.num_devices))
        self.starts = range(0, len(bank), self.size)
        resident = self.starts if len(self.starts) <= self.num_devices else ()
        self.resident = {start: self._index(start) for start in resident}

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 [Q, k], descending, and row numbers int64 [Q, k], ascending for equal
        cosines."""
        similarities, rows = self._exact(unit_rows(queries), k)
        if (rows < 0).any():  # FAISS's value for "none": every comparison failed
            raise InputError("non-finite features: the weights are damaged, or training diverged")
        return similarities, rows

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """One neighbor more than requested reveals ties at k, of which FAISS may return any; those
        queries are repeated with a larger k until the whole group is found."""
        wide = min(k + 1, len(self.bank))
        similarities, rows = self._search(queries, wide)
        cut = np.flatnonzero(similarities[:, k - 1] == similarities[:, k]) if wide > k else []
        similarities, rows = similarities[:, :k].copy(), rows[:, :k].copy()
        if len(cut):
            wider = min(4 * wide, len(self.bank))
            for part in np.array_split(cut, -(-len(cut) * wider // VOTE_CELLS)):
                found = self._exact(queries[part], wider)
                similarities[part], rows[part] = found[0][:, :k], found[1][:, :k]
        return similarities, rows

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best, sorted; FAISS decides ties at the end."""
        with ThreadPoolExecutor(self.num_devices) as pool:
            found = pool.map(partial(self._search_device, queries, k), range(self.num_devices))
            return merge(found, len(queries), k)

    def _search_device(
        self, queries: np.ndarray, k: int, device: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the parts on one device, one part after the other."""
        starts = self.starts[device :: self.num_devices]
        found = (self._search_part(queries, k, start) for start in starts)
        return merge(found, len(queries), k)

    def _search_part(
        self, queries: np.ndarray, k: int, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of one part, or all of its rows."""
        on_gpu = k <= GPU_MAX_K
        index = self.resident.get(start) if on_gpu or not self.gpus else None
        index = index or self._index(start, on_gpu)
        similarities, rows = index.search(queries, min(k, index.ntotal))
        return similarities, np.where(rows < 0, rows, rows + start)  # -1 is FAISS's "none"

    def _index(self, start: int, on_gpu: bool = True) -> Any:
        """Index of one part of the bank, on its GPU if there are any."""
        rows = self.bank[start : start + self.size]
        index = faiss.IndexFlatIP(rows.shape[1])
        if self.gpus and on_gpu:
            gpu = self.gpus[start // self.size % self.num_devices]
            index = faiss.index_cpu_to_gpu(self.resources[gpu], gpu, index)
        for first in range(0, len(rows), ADD_ROWS):
            index.add(unit_rows(rows[first : first + ADD_ROWS]))
        return index


@cache
def gpu_resources(gpu: int) -> Any:
    """FAISS's scratch memory and streams on a GPU, the same for every search of this process; not
    for two threads at once. FAISS would take 1.5 GB each time, beside what torch has."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    return resources


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """L2-normalize rows, float32; rows of zeros are unchanged."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(rows, np.float32)), dim=1).numpy()


def merge(
    results: Iterable[tuple[np.ndarray, np.ndarray]], num_queries: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge several searches for the same queries: the k best, sorted; no columns if there are
    none."""
    best = np.empty((num_queries, 0), np.float32), np.empty((num_queries, 0), np.int64)
    for found in results:
        similarities, rows = sort_neighbors(*map(np.hstack, zip(best, found, strict=True)))
        best = similarities[:, :k], rows[:, :k]
    return best


def sort_neighbors(similarities: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort each query's neighbors by similarity, descending, then by row number."""
    order = np.lexsort((rows, -similarities), axis=1)
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)
