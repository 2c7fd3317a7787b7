"""Metrics of predicted values, as scikit-learn defines them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np


@dataclass(frozen=True)
class ValueRow:
    """One value by itself."""

    images: int
    r2: float
    """Share of the variance that is explained, in percent; below 0 where the mean is better."""
    mae: float
    """Mean absolute error, in the value's own units."""
    rmse: float
    """Root of the mean squared error."""


def value_rows(predicted: np.ndarray, true: np.ndarray) -> list[ValueRow]:
    """One row a column of float [N, C] each."""
    error = predicted.astype(np.float64) - true
    spread = np.square(true - true.mean(0)).sum(0)
    rows = []
    for wrong, total in zip(error.T, spread.tolist(), strict=True):
        squares = float(np.square(wrong).sum())
        r2 = 1 - squares / total if total else float(squares == 0)
        mae, rmse = float(np.abs(wrong).mean()), (squares / len(wrong)) ** 0.5
        rows.append(ValueRow(len(wrong), 100 * r2, mae, rmse))
    return rows


def value_means(rows: Sequence[ValueRow], names: Sequence[str]) -> dict[str, float]:
    """``r2``, the mean over the values, and ``mae`` and ``rmse`` of each, with its name where there
    are several."""
    found = {"r2": float(np.mean([row.r2 for row in rows]))}
    for row, name in zip(rows, names, strict=True):
        end = f"_{name}" if len(rows) > 1 else ""
        found |= {f"mae{end}": row.mae, f"rmse{end}": row.rmse}
    return found


def lines_of_values(rows: Sequence[ValueRow], names: Sequence[str]) -> list[str]:
    """The rows as lines of CSV under a header, for ``results.json``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("value", *(field.name for field in fields(ValueRow))))
    for row, name in zip(rows, names, strict=True):
        writer.writerow((name, *(f"{value:.6g}" for value in astuple(row))))
    return text.getvalue().splitlines()
