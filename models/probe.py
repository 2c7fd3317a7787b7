"""Check that a backbone accepts the image sizes of a run, by a forward pass before it starts."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError, one_line
from xcit_dino.models.tokens import channels_of, stride_of


def check_sizes(
    model: nn.Module,
    arch: str,
    sizes: dict[str, int],
    features: bool,
    model_option: str = "--arch",
) -> None:
    """Run ``model`` on an image of every size; its state is left unchanged.

    arch: for messages; sizes: option -> side in pixels; features: whether the output must be one
    vector of ``model.embed_dim``; model_option: the option that named the model.

    Raises:
        InputError: it fails, or its output differs; names the nearest size accepted.
    """
    for option, size in sizes.items():
        output = _try_size(model, size)
        if isinstance(output, Exception):
            near = next((s for s in _candidates(model, size) if _accepts(model, s)), None)
            other = f"another {model_option}"
            remedy = f"take --{option} {near}, or {other}" if near else f"take {other}"
            reason = one_line(output, 120)
            raise InputError(
                f"--{option} {size}: {arch} does not accept images of that size ({reason}); "
                f"{remedy}"
            )
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if features and given != [1, model.embed_dim]:
            raise InputError(
                f"--arch {arch}: returns {given} for an image instead of {model.embed_dim} "
                "features; take another --arch"
            )


def check_bf16(
    model: nn.Module, arch: str, sizes: dict[str, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Raise InputError where training in bf16 on a CPU would have wrong gradients.

    For a convolution with stride over a map of one pixel, torch 2.11 leaves the weights' gradient
    uninitialized where the kernel lies outside: NaN, or any number. arch, sizes: as in
    :func:`check_sizes`.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    for option, size in sizes.items():
        seen: list[int] = []

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], seen: list[int] = seen) -> None:
            if max(layer.stride) > 1:  # type: ignore[arg-type]
                seen.append(min(inputs[0].shape[-2:]))

        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        try:
            _try_size(model, size)
        finally:
            for hook in hooks:
                hook.remove()
        if 1 in seen:
            raise InputError(
                f"--{option} {size}: in bf16 on a CPU, torch computes wrong gradients of {arch} "
                "for images this small (its maps have one pixel before the last stride); add "
                f"--precision fp32, or take --{option} {2 * size}"
            )


def unused_parameters(model: nn.Module, arch: str, size: int) -> list[str]:
    """Names of the trainable parameters that features do not depend on, found by a training pass
    of a copy over two images of ``size`` pixels; ``model`` is unchanged.

    Raises:
        InputError: it cannot be trained on features alone.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        trial = copy.deepcopy(model).train()
        shape = (2, channels_of(model), size, size)
        images = torch.randn(shape, dtype=next(trial.parameters()).dtype)
        try:
            trial(images).sum().backward()
        except Exception as error:  # networks raise different types
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise InputError(
                f"--arch {arch}: it cannot be trained ({reason}); take another --arch"
            ) from error
    return [name for name, p in trial.named_parameters() if p.requires_grad and p.grad is None]


def _accepts(model: nn.Module, size: int) -> bool:
    return not isinstance(_try_size(model, size), Exception)


@torch.no_grad()
def _try_size(model: nn.Module, size: int) -> object:
    """The output for one black image, or the exception raised."""
    training = {module: module.training for module in model.modules()}
    weight = next(model.parameters())
    try:
        return model.eval()(weight.new_zeros(1, channels_of(model), size, size))
    except Exception as error:  # networks raise different types
        return error
    finally:
        for module, mode in training.items():
            module.training = mode


def _candidates(model: nn.Module, size: int) -> Iterable[int]:
    """Sizes to suggest: the nearest multiples of the patch size and of 32, and the default size."""
    for step in (stride_of(model), 32):
        near = max(1, round(size / step)) * step
        yield from (near, near + step)
    yield getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
