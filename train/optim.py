"""AdamW as DINO uses it: weight decay for matrices, layer-wise learning rates, per-parameter
clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.train.distributed.dist import all_reduce_sum, world_size
from xcit_dino.train.distributed.fsdp import is_shard, local

NO_DECAY = ("temperature", "cls_token")


def parameter_groups(model: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group 0 gets weight decay; group 1 (1-D tensors, biases, `temperature`, `cls_token`) none.
    With a ``layer_decay`` below 1 there is such a pair for every layer of ``model.backbone``, the
    highest layers first; what is beside the backbone lies above it.

    Source: dino ``utils.get_params_groups``, plus XCiT's two names. Supervised training has timm's
    rule instead (``supervised/optim.py``): the same for XCiT, while for other networks of timm DINO
    decays the positions and timm does not.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return not (parameter.ndim == 1 or name.endswith((".bias", *NO_DECAY)))

    scales: dict[str, float] = {}
    if layer_decay < 1:
        layers = layer_numbers(model.get_submodule("backbone"))
        top = max(layers.values()) + 1
        scales = {f"backbone.{name}": layer_decay ** (top - n) for name, n in layers.items()}
    groups = grouped(model, decays, scales)
    return sorted(groups, key=lambda group: (-group["lr_scale"], not group["decays"]))


def grouped(
    model: nn.Module, decays: Callable[[str, nn.Parameter], bool], scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A group for each share of the learning rate (``lr_scale``, 1 where ``scales`` has no such
    name) and for parameters with and without weight decay (``decays``)."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale, decay = scales.get(name, 1.0), decays(name, parameter)
            new = {"params": [], "lr_scale": scale, "decays": decay}
            groups.setdefault((scale, decay), new)["params"].append(parameter)
    return list(groups.values())


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Parameter name -> its layer, 0 for the stem, a classifier last; as timm counts them.

    Raises:
        InputError: a network of timm that does not say what its layers are.
    """
    from timm.models import group_parameters  # pyright: ignore # slow to import

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise InputError("--layer_decay: this backbone does not say its layers; leave it at 1")
    return group_parameters(model, matcher(), reverse=True)


def adamw(model: nn.Module, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; learning rate and decay are set before every step."""
    groups = parameter_groups(model, layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Each group its share of the learning rate, and weight decay where it applies."""
    for number, group in enumerate(optimizer.param_groups):
        # checkpoints of earlier versions have two groups without these entries
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = weight_decay if group.get("decays", number == 0) else 0.0


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, *, together: bool = False
) -> Tensor:
    """Scale down each gradient whose norm exceeds ``limit`` (dino ``utils.clip_gradients``), or
    if ``together`` all of them by one factor if their global norm does (torch ``clip_grad_norm_``,
    as in DeiT and XCiT). A limit of 0 disables clipping.

    Returns:
        Norms before clipping, one per parameter with a gradient. Does not synchronize the device.
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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of full parameters over ranks, in place, as DistributedDataParallel
    does; all ranks call this, with gradients of the same parameters."""
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        all_reduce_sum(gradient.div_(world_size()))


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """``target = momentum * target + (1 - momentum) * source`` over parameters; buffers stay.

    DINO's teacher keeps its own batch-norm statistics (``main_dino.py`` copies parameters only).
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
    """Take the step, or skip it on the device if a gradient is non-finite, without synchronization.

    The norms are those of gradients averaged over ranks, so all ranks skip together.

    Returns:
        1.0 if the step was skipped, else 0.0, a device scalar.
    """
    skipped = (~torch.isfinite(norms.sum())).float()
    if skipped.device.type == "mps":  # its fused kernels may not know found_inf: the host waits
        if not skipped:
            optimizer.step()
        return skipped
    if not scaler.is_enabled():
        optimizer.found_inf = skipped  # type: ignore[attr-defined] # the fused kernels look here
    scaler.step(optimizer)
    scaler.update()
    return skipped


def mean_of(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each scalar over micro-batches."""
    return {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}
