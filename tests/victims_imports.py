"""What the fork server of victims.py imports before it forks; nothing here starts a thread."""

import torch

import xcit_dino.ssl.pretrain
import xcit_dino.train.board

torch.set_num_threads(1)
