"""What the fork server of victims.py imports before it forks: all that a training needs, so that a
victim's start costs little. Nothing here starts a thread."""

import importlib

import torch

for name in ("ssl.pretrain", "models.xcit", "data.decode"):
    importlib.import_module(f"xcit_dino.{name}")
for name in ("torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)
torch.set_num_threads(1)
