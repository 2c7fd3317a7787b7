"""The official DINO loop on a folder of images, for as long as a recipe of ours had:
python bench/recipes/official.py --data IMAGES --minutes 30 --lr 0.0005

The loop of main_dino.py written plainly: torchvision's ImageFolder and transforms, its schedules,
the step of ``bench/reference.py``, timm's XCiT in float32, one thread. Time is processor time; the
steps that fit into it are found from the first ones, and the schedules end with them. The teacher's
backbone is written as an official checkpoint, which ``xcit-dino knn`` and ``linear`` read.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path

import torch
from timm.models.xcit import Xcit
from torch import Tensor
from torchvision.datasets import ImageFolder

from bench.crops import OfficialCrops
from bench.reference import PlainHead, PlainLoss, PlainNet, parameter_groups, plain_step
from xcit_dino.data.config import CropsConfig
from xcit_dino.models.zoo import model_spec

MEASURED = 20  # steps, to find out how many there will be


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The official DINO loop")
    parser.add_argument("--data", required=True, help="images in class folders")
    parser.add_argument("--arch", default="xcit_pico_6_p8", help="patch 8 or 16")
    parser.add_argument("--minutes", type=float, default=30.0, help="of one core")
    parser.add_argument("--lr", type=float, default=5e-4, help="per 256 images")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--momentum_teacher", type=float, default=0.996)
    parser.add_argument("--size", type=int, default=32, help="side of the global crops")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.4, 1.0])
    parser.add_argument("--local_crops", type=int, default=0, help="of half that side")
    parser.add_argument("--local_scale", type=float, nargs=2, default=[0.05, 0.4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("official.pth"))
    return parser.parse_args()


class Crops(OfficialCrops):
    """As a transform of ImageFolder, from the bytes of a file."""

    def load(self, path: str) -> list[Tensor]:
        return self(Path(path).read_bytes())


def network(args: argparse.Namespace) -> PlainNet:
    spec = model_spec(args.arch)
    backbone = Xcit(
        img_size=args.size, patch_size=spec.patch_size, num_classes=0, embed_dim=spec.embed_dim,
        depth=spec.depth, num_heads=spec.num_heads, eta=spec.eta, tokens_norm=spec.tokens_norm,
    )  # fmt: skip
    head = PlainHead(spec.embed_dim, args.out_dim, hidden=2048, bottleneck=256, norm_last=True)
    return PlainNet(backbone, head).train()


def cosine(first: float, last: float, done: float) -> float:
    """``utils.cosine_scheduler``; done: share of the steps, from 0 to 1."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of the official code: the reverse of timm's own conversion."""
    renamed = {name.replace("pos_embed.", "pos_embeder."): value for name, value in state.items()}
    for layer in range(2):
        for kind in ("weight", "bias"):
            name = f"cls_attn_blocks.{layer}.attn.{{}}.{kind}"
            parts = [renamed.pop(name.format(part)) for part in "qkv"]
            renamed[name.format("qkv")] = torch.cat(parts)
    return renamed


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    crops = Crops(
        CropsConfig(
            global_crops_size=args.size, local_crops_size=args.size // 2,
            global_crops_scale=tuple(args.scale), local_crops_number=args.local_crops,
            local_crops_scale=tuple(args.local_scale),
        )
    )  # fmt: skip
    images = ImageFolder(args.data, loader=crops.load)
    loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    student, teacher = network(args), network(args)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_fn = PlainLoss(args.out_dim, 2 + args.local_crops, 0.1, 0.9)
    optimizer = torch.optim.AdamW(parameter_groups(student))
    peak = args.lr * args.batch_size / 256
    step, steps, began, loss = 0, 10**9, time.process_time(), 0.0
    while step < steps:
        for views, _ in loader:
            done, warmup = step / steps, max(1, min(len(loader), steps // 10))
            lr = peak * step / warmup if step < warmup else cosine(peak, 1e-6, done)
            loss = plain_step(
                student, teacher, loss_fn, optimizer, views, lr=lr,
                weight_decay=cosine(0.04, 0.4, done),
                momentum=cosine(args.momentum_teacher, 1.0, done),
                teacher_temp=0.04, clip=3.0, freeze_last_layer=step < min(len(loader), steps // 10),
            )  # fmt: skip
            step += 1
            if step == MEASURED:
                a_step = (time.process_time() - began) / step
                steps = max(step, int(60 * args.minutes / a_step))
            if step % 200 == 0:
                print(f"step {step:,} of {steps:,}, loss {loss:.3f}", flush=True)
            if step == steps:
                break
    took = time.process_time() - began
    print(f"{steps:,} steps of {args.batch_size} images in {took / 60:.1f} min, loss {loss:.3f}")
    backbone = official_names(teacher.backbone.state_dict())
    buffer = io.BytesIO()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in backbone.items()}}, buffer)
    args.output.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    main()
