"""What the fork server of victims.py imports before it forks: all that a training needs, so that a
victim's start costs little. Nothing here starts a thread."""

import torch
import torch._dynamo
import torch.utils.tensorboard

import xcit_dino.ssl.pretrain
import xcit_dino.train.board

torch.set_num_threads(1)
