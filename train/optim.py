"""AdamW as DINO uses it: two parameter groups, scaled learning rate, per-parameter clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from xcit_dino.train.distributed.dist import all_reduce_sum
from xcit_dino.train.distributed.fsdp import is_shard, local

NO_DECAY = ("temperature", "cls_token")


def parameter_groups(model: nn.Module) -> list[dict]:
    """Group 0 gets weight decay; group 1 (1-D tensors, biases, `temperature`, `cls_token`) none.

    Source: dino ``utils.get_params_groups``, plus XCiT's two names. Supervised training has timm's
    rule instead (``supervised/optim.py``): the same for XCiT, while for other networks of timm DINO
    decays the positions and timm does not.
    """
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim == 1 or name.endswith((".bias", *NO_DECAY))
            (rest if plain else decay).append(parameter)
    return [{"params": decay}, {"params": rest, "weight_decay": 0.0}]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; learning rate and decay are set before every step."""
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, weight_decay=0.0, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate for all groups, weight decay for group 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, *, together: bool = False
) -> Tensor:
    """Scale down each gradient whose norm exceeds ``limit`` (dino ``utils.clip_gradients``), or
    ``together`` all of them by one factor where the norm of all does (torch ``clip_grad_norm_``, as
    DeiT and XCiT have it). A limit of 0 changes nothing.

    Returns:
        Norms before clipping, one a parameter that has a gradient. Nothing waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = any(map(is_shard, gradients))
    gradients = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(gradients))
    if sharded:
        norms = all_reduce_sum(norms.square()).sqrt()
    if limit:
        size = norms.norm().expand_as(norms) if together else norms
        factors = (limit / (size + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """``target = momentum * target + (1 - momentum) * source`` over parameters; buffers stay.

    DINO's teacher keeps batch-norm statistics of its own (``main_dino.py`` copies parameters only).
    """
    targets, sources = ([local(p) for p in net.parameters()] for net in (target, source))
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * model`` over parameters and floating-point
    buffers; other buffers are copied (timm ``ModelEmaV3``)."""
    states = (map(local, net.state_dict().values()) for net in (average, model))
    pairs = list(zip(*states, strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    targets, sources = map(list, zip(*floats, strict=True))
    torch._foreach_lerp_(targets, sources, 1.0 - decay)
    for target, source in pairs:
        if not target.is_floating_point():
            target.copy_(source)


def step_unless_nonfinite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norms: Tensor
) -> Tensor:
    """Take the step, or skip it on the device where a gradient is not finite; nobody waits to know.

    The norms are those of gradients averaged over ranks, so all ranks skip together.

    Returns:
        1.0 where the step was skipped, else 0.0, a device scalar.
    """
    skipped = (~torch.isfinite(norms.sum())).float()
    if not scaler.is_enabled():
        optimizer.found_inf = skipped  # type: ignore[attr-defined] # the fused kernels look here
    scaler.step(optimizer)
    scaler.update()
    return skipped


def mean_of(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
