"""What the fork server of victims.py imports before it forks; nothing here starts a thread."""

import torch

import xcit_dino.ssl.pretrain  # noqa: F401
import xcit_dino.train.board  # noqa: F401

torch.set_num_threads(1)
