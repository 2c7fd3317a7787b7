"""Near-duplicates and outliers: candidates by features, confirmed by the pictures themselves.

Features find pictures of the same thing, and many of these are no copies. So the nearest neighbors
of each image are candidates only, and a pair counts as near-duplicates where their thumbnails
correlate, in gray: brightness and contrast do not matter to a correlation, recompression and blur
little, and crops are searched for (one picture whole against parts of the other).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.eval.knn import QUERY_ROWS, Search
from xcit_dino.eval.neighbors import nearest_others
from xcit_dino.progress import track

K = 5  # neighbors of each image, more where all of them are near-duplicates
SIDE, SMALL = 32, 16  # pixels of thumbnails, and at which they are compared
WHOLE = 0.5  # correlation of the whole thumbnails below which no crop is searched for
CROPS = ((29, 1.5), (26, 2))  # side of a crop in a thumbnail, step between crops
SAME = 2  # gray levels: thumbnails that differ by less are equal, flat ones included
FLAT = 1  # gray levels of standard deviation below which there is nothing to correlate
ROWS = 1 << 14  # pairs at a time


class Neighborhood(NamedTuple):
    """The nearest others of each of N images, nearest first."""

    cosines: np.ndarray
    """float32 [N, k]"""
    rows: np.ndarray
    """int64 [N, k]"""


class Pair(NamedTuple):
    """Two near-duplicates."""

    correlation: float
    """Of their thumbnails, from -1 to 1."""
    first: int
    """Row number, the smaller one."""
    second: int
    cosine: float
    """Of their features."""


def neighborhood(search: Search, features: np.ndarray, k: int) -> Neighborhood:
    """The k nearest others (fewer in a smaller set) of all rows of a table, exactly."""
    cosines, rows = [], []
    starts = range(0, len(features), QUERY_ROWS)
    for start in track(starts, "neighbors", len(starts), "blocks"):
        queries = np.arange(start, min(start + QUERY_ROWS, len(features)))
        found = nearest_others(features, queries, k, search)
        rows.append(found[0])
        cosines.append(found[1])
    return Neighborhood(np.concatenate(cosines), np.concatenate(rows))


def near_duplicates(
    search: Search,
    features: np.ndarray,
    near: Neighborhood,
    thumbnails: Tensor,
    threshold: float,
) -> list[Pair]:
    """Pairs of neighbors whose thumbnails correlate by ``threshold`` or more, the best first.

    Images all of whose neighbors are near-duplicates are searched again for more.

    Args:
        search: over ``features``, float [N, D].
        near: neighbors of all rows.
        thumbnails: uint8 [N, 32, 32], on the device to compute on.
    """
    found: dict[tuple[int, int], Pair] = {}
    queries, cosines, rows = np.arange(len(features)), *near
    while len(queries) and rows.shape[1]:
        pairs = np.stack([np.repeat(queries, rows.shape[1]), rows.ravel()], 1)
        pairs, places, back = np.unique(
            np.sort(pairs, 1), axis=0, return_index=True, return_inverse=True
        )
        scores = correlations(thumbnails, torch.from_numpy(pairs), threshold)
        for n in np.flatnonzero(scores >= threshold).tolist():
            first, second = pairs[n].tolist()
            cosine = float(cosines.flat[places[n]])
            found[first, second] = Pair(float(scores[n]), first, second, cosine)
        full = (scores[back.ravel()].reshape(rows.shape) >= threshold).all(1)
        wider = min(4 * rows.shape[1], len(features) - 1)
        if wider == rows.shape[1]:
            break
        queries = queries[full]
        if len(queries):
            rows, cosines = nearest_others(features, queries, wider, search)
    return sorted(found.values(), key=lambda pair: (-pair.correlation, pair.first, pair.second))


# -- thumbnails ------------------------------------------------------------------------------------


def correlations(thumbnails: Tensor, pairs: Tensor, threshold: float = 1.0) -> np.ndarray:
    """float32 [P]: correlation of two thumbnails, the highest of one whole with the other, whole or
    cropped; crops are not searched for where the whole reaches ``threshold`` or is far from it.

    Args:
        thumbnails: uint8 [N, 32, 32].
        pairs: int64 [P, 2], on any device.
    """
    device, pairs = thumbnails.device, pairs.to(thumbnails.device)
    whole = _compared(thumbnails, SIDE, 0, 0)
    best = _whole(thumbnails, whole, pairs)
    open_ = torch.nonzero((best >= WHOLE) & (best < threshold)).squeeze(1)
    used, places = torch.unique(pairs[open_], return_inverse=True)
    some, whole = thumbnails[used], whole[used]
    crops = list(_crops())
    for crop in track(crops, "crops", len(crops), "places") if len(used) else ():
        parts = _compared(some, *crop)
        for part in torch.arange(len(open_), device=device).split(ROWS):
            a, b = places[part].unbind(1)
            score = torch.maximum((parts[a] * whole[b]).sum(1), (parts[b] * whole[a]).sum(1))
            best[open_[part]] = torch.maximum(best[open_[part]], score)
    return best.cpu().numpy()


def _whole(thumbnails: Tensor, whole: Tensor, pairs: Tensor) -> Tensor:
    """Correlation of whole thumbnails; 1 where they are equal."""
    scores = []
    for part in pairs.split(ROWS):
        a, b = part.unbind(1)
        score = (whole[a] * whole[b]).sum(1)
        flat = torch.nonzero(~(whole[a].any(1) & whole[b].any(1))).squeeze(1)
        apart = (thumbnails[a[flat]].int() - thumbnails[b[flat]].int()).abs().flatten(1)
        score[flat] = (apart.amax(1) <= SAME).float() if len(flat) else score[flat]
        scores.append(score)
    return torch.cat(scores) if scores else torch.zeros(0, device=thumbnails.device)


def _crops() -> Iterator[tuple[int, float, float]]:
    """(side, top, left) of the crops that are tried, in pixels of a thumbnail."""
    for side, step in CROPS:
        places = np.arange(0, SIDE - side + 1e-6, step).tolist()
        yield from ((side, top, left) for top in places for left in places)


def _compared(thumbnails: Tensor, side: float, top: float, left: float) -> Tensor:
    """A crop of each thumbnail at 16 x 16, as float32 [N, 256] of mean 0 and length 1; zeros
    where it is flat."""
    rows, columns = (_shrink(side, start).to(thumbnails.device) for start in (top, left))
    found = []
    for part in thumbnails.split(ROWS):
        values = (rows @ part.float() @ columns.t()).flatten(1)
        values -= values.mean(1, keepdim=True)
        norm = values.norm(dim=1, keepdim=True)
        flat = norm < FLAT * values.shape[1] ** 0.5
        found.append(torch.where(flat, 0.0, values / norm.clamp_min(1e-9)))
    return torch.cat(found)


def _shrink(side: float, start: float) -> Tensor:
    """float32 [16, 32]: the weights by which a crop's 16 pixels average those of a line, each over
    the area that it covers."""
    edges = start + side / SMALL * torch.arange(SMALL + 1, dtype=torch.float64)
    pixels = torch.arange(SIDE + 1, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], pixels[None, :-1])
    high = torch.minimum(edges[1:, None], pixels[None, 1:])
    return ((high - low).clamp_min(0) * (SMALL / side)).float()


def thumbnail(images: Tensor) -> Tensor:
    """[B, C, S, S] of any type -> uint8 [B, 32, 32]: gray, each pixel the mean of its area; values
    other than uint8 are stretched to 0 to 255, which a correlation does not see."""
    gray = F.adaptive_avg_pool2d(images.float().mean(1), SIDE)
    if images.dtype != torch.uint8:
        low, high = gray.amin((1, 2), keepdim=True), gray.amax((1, 2), keepdim=True)
        gray = (gray - low) / (high - low).clamp_min(1e-9) * 255
    return gray.round().to(torch.uint8)


# -- what to leave out -----------------------------------------------------------------------------


def leave_out(found: list[Pair], order: np.ndarray) -> dict[int, Pair]:
    """``{row: its pair with the most similar kept image}`` of the rows to leave out, so that no two
    of the rest are one of the pairs.

    Rows are kept in ``order`` unless a near-duplicate has been kept before, so every row that is
    left out has a near-duplicate that stays.

    order: int64 [N], all row numbers, those to keep first.
    """
    partners: dict[int, list[Pair]] = {}
    for pair in found:
        partners.setdefault(pair.first, []).append(pair)
        partners.setdefault(pair.second, []).append(pair)
    dropped: dict[int, Pair] = {}
    kept: set[int] = set()
    for row in order[np.isin(order, list(partners))].tolist():
        for pair in partners[row]:  # the most similar first
            if other(pair, row) in kept:
                dropped[row] = pair
                break
        else:
            kept.add(row)
    return dropped


def other(pair: Pair, row: int) -> int:
    """The other image of a pair."""
    return pair.first if pair.second == row else pair.second


def outlying(near: Neighborhood) -> tuple[np.ndarray, np.ndarray]:
    """(rows, mean cosines with their neighbors), the least similar first."""
    means = near.cosines.mean(1) if near.cosines.shape[1] else np.zeros(len(near.cosines))
    order = np.argsort(means, kind="stable")
    return order, means[order]
