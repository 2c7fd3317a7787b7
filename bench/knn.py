"""k-NN side by side: DINO's loop written plainly, and ours; also a brute-force twin for the tests.

    python bench/knn.py [--bank 128000 --queries 5000 --dim 384 --classes 1000 --repeats 3]

Both run in one process, alternately, on the same features: clusters with much overlap, so that
accuracies are neither 0 nor 100. The official code searches again for every k; ours searches once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.eval.knn import knn_hits

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def official_knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    targets: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> tuple[float, float]:
    """Top-1 and top-5 in percent as DINO's ``eval_knn.py:knn_classifier`` computes them, a
    hundredth of the queries at a time. bank [N, D] and queries [Q, D] are L2-normalized."""
    top1 = top5 = 0
    for part, target in zip(
        queries.split(max(1, len(queries) // 100)),
        targets.split(max(1, len(queries) // 100)),
        strict=True,
    ):
        similarity, nearest = (part @ bank.t()).topk(k, largest=True, sorted=True)
        neighbors = labels[nearest]
        one_hot = torch.zeros(len(part) * k, num_classes, device=part.device)
        one_hot.scatter_(1, neighbors.view(-1, 1), 1)
        weights = (similarity / temperature).exp()
        votes = (one_hot.view(len(part), k, num_classes) * weights.view(len(part), k, 1)).sum(1)
        predictions = votes.sort(1, descending=True).indices
        correct = predictions == target.view(-1, 1)
        top1 += correct[:, :1].sum().item()
        top5 += correct[:, : min(5, k)].sum().item()
    return 100 * top1 / len(queries), 100 * top5 / len(queries)


def brute_force_hits(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    targets: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> tuple[int, int]:
    """(first, among the first five) right answers, one query at a time, nothing clever; features as
    extracted."""
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    first = five = 0
    for query, target in zip(queries, targets.tolist(), strict=True):
        similarity = (bank.double() @ query.double()).float()
        nearest = similarity.sort(descending=True, stable=True).indices[:k]
        votes = [0.0] * num_classes
        for row in nearest.tolist():
            votes[int(labels[row])] += float(np.exp(float(similarity[row]) / temperature))
        ranking = sorted(range(num_classes), key=lambda label: (-votes[label], label))
        first += ranking[0] == target
        five += target in ranking[: min(5, k)]
    return first, five


def clusters(count: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [count, dim] around class centers, and labels."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centers[labels] + 3.5 * torch.randn(count, dim, generator=generator), labels


def settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in (
        ("bank", 128_000),
        ("queries", 5000),
        ("dim", 384),
        ("classes", 1000),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


@dataclass
class Result:
    """What both found, and the seconds that they took by the clock and of the processor, one pair a
    run."""

    accuracies: dict[str, list[Sequence[float]]]
    seconds: dict[str, list[tuple[float, float]]]

    def medians(self, name: str) -> list[float]:
        return [statistics.median(column) for column in zip(*self.seconds[name], strict=True)]

    def line(self, name: str) -> str:
        pairs = zip(KS, self.accuracies[name], strict=True)
        return "  ".join(f"k {k}: {a:.2f} / {b:.2f}" for k, (a, b) in pairs)


def compared(args: argparse.Namespace) -> Result:
    """Run both alternately."""
    bank, labels = clusters(args.bank, args.dim, args.classes, seed=1)
    queries, targets = clusters(args.queries, args.dim, args.classes, seed=2)
    unit_bank, unit_queries = (F.normalize(x, dim=1).to(args.device) for x in (bank, queries))
    bank_labels, query_labels = labels.to(args.device), targets.to(args.device)

    def official() -> list[Sequence[float]]:
        return [
            official_knn(
                unit_bank, bank_labels, unit_queries, query_labels, k, TEMPERATURE, args.classes
            )
            for k in KS
        ]

    def ours() -> list[Sequence[float]]:
        hits = knn_hits(
            bank.numpy(), labels.numpy(), queries.numpy(), targets.numpy(), KS, TEMPERATURE,
            args.classes, gpu=args.device == "cuda",
        )  # fmt: skip
        return (100 * hits / args.queries).tolist()

    result = Result({}, {"official": [], "ours": []})
    for _ in range(args.repeats):
        for name, function in (("official", official), ("ours", ours)):
            began, busy = time.perf_counter(), time.process_time()
            result.accuracies[name] = function()
            result.seconds[name].append((time.perf_counter() - began, time.process_time() - busy))
    return result


def main() -> None:
    args = settings()
    result = compared(args)
    print(f"bank {args.bank} x {args.dim}, {args.queries} queries, {args.classes} classes")
    print(f"{torch.get_num_threads()} threads; seconds by the clock and of the processor, medians")
    for name in result.accuracies:
        clock, busy = result.medians(name)
        line = result.line(name)
        print(f"{name:<9}{clock:7.2f} s {busy:7.2f} s   top-1 / top-5 in percent: {line}")
    pair = zip(result.medians("official"), result.medians("ours"), strict=True)
    clock, busy = (a / b for a, b in pair)
    print(f"ours is {clock:.1f} times as fast by the clock, {busy:.1f} times by processor time")


if __name__ == "__main__":
    main()
