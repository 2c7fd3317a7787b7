"""Cost as a function of resolution: ``python bench/growth.py``.

Forward and backward of one image of 224 to 1024 pixels, with XCiT and timm's ViT of about the same
size, alternately in one process (medians), and their peak memory. Writes the plot to
``docs/growth.svg``. XCiT's attention is between channels, so its cost should be linear in the
number of pixels; a ViT's is quadratic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found
from bench.measure import peak_bytes, timed
from xcit_dino.models.zoo import create_model
from xcit_dino.report.charts import line_chart

STYLE = (
    "<style>text{font:11px sans-serif;fill:#555}.rule{stroke:#ddd}polyline{fill:none;"
    "stroke-width:2}.line-0 *{stroke:#0072b2}.line-1 *{stroke:#c65200}.line-1 polyline"
    "{stroke-dasharray:7 3}circle{fill:#fff}</style>"
)
PLOT = Path(__file__).resolve().parents[1] / "docs" / "growth.svg"


def contestants(args: argparse.Namespace, side: int) -> dict[str, nn.Module]:
    vit = timm.create_model(args.vit, num_classes=0, img_size=side)
    return {args.arch: create_model(args.arch), args.vit: vit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="xcit_tiny_12_p16")
    parser.add_argument("--vit", default="vit_tiny_patch16_224")
    parser.add_argument("--sides", type=int, nargs="+", default=(224, 384, 512, 768, 1024))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="on a busy CPU take 1: processor time counts")
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = (args.arch, args.vit)
    table = Table("side", *(f"{n}, s" for n in names), *(f"{n}, MB" for n in names))
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for side in args.sides:
        images = torch.randn(1, 3, side, side, device=args.device)
        models = {n: m.to(args.device).train() for n, m in contestants(args, side).items()}

        def work(model: nn.Module, images: torch.Tensor = images) -> None:
            model(torch.cat((images, images))).square().sum().backward()
            model.zero_grad()

        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                second = timed(lambda model=model: work(model), args.device)
                if repeat:  # the first one warms up
                    seconds[name].append(second / 2)
        medians = [statistics.median(seconds[name]) for name in names]
        memory = [peak_bytes(lambda m=m: work(m), args.device) / 2e6 for m in models.values()]
        table.add_row(str(side), *(f"{s:.3f}" for s in medians), *(f"{m:.0f}" for m in memory))
        for name, second in zip(names, medians, strict=True):
            curves[name].append((side * side / 1e6, second))
    Console(width=120).print(table)
    args.plot.write_text(svg("Forward and backward of an image, seconds", list(curves.items())))


def svg(title: str, curves: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """The report's chart as a separate file: the first curve solid, the second dashed."""
    figure = str(line_chart(title, curves, "megapixels", from_zero=True))
    start, end = figure.rindex("<svg "), figure.rindex("</figure>")
    return (
        figure[start:end]
        .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        .replace(">", f">{STYLE}", 1)
    )


if __name__ == "__main__":
    main()
