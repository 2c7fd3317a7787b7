"""What the fork server of victims.py and crowd.py imports before it forks: all that a training or
an evaluation needs, so that a process's start costs little. Nothing here starts a thread."""

import importlib

import torch

for name in ("ssl.pretrain", "models.xcit", "data.decode.rgb", "eval.knn", "eval.linear"):
    importlib.import_module(f"xcit_dino.{name}")
for name in ("report.report", "report.pictures", "supervised.finetune", "supervised.distill"):
    importlib.import_module(f"xcit_dino.{name}")
for name in ("torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)
torch.set_num_threads(1)
