"""A trained network in one call: ``model, transform = xcit_dino.load("runs/mine")``.

From a run folder, a checkpoint of any kind that ``weights`` reads, an exported file or folder, or
timm's own weights by name; with the images prepared as the network was trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit_dino.data.native.scaling import form_of
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.errors import InputError
from xcit_dino.eval.api.preprocess import Image, Preprocess
from xcit_dino.eval.context import (
    resolve_input_settings,
    run_options,
    settings_of_timm,
    timm_input_settings,
)
from xcit_dino.eval.teacher import timm_weights
from xcit_dino.inputs import InputSettings
from xcit_dino.models.checkpoints import resolve_checkpoint
from xcit_dino.models.tokens import channels_of, first_layer
from xcit_dino.models.weights import formats, layouts
from xcit_dino.models.weights.load import (
    FoundNetwork,
    classifier_names,
    find_network,
    fit,
    name_of,
)
from xcit_dino.models.weights.timm_folder import CONFIG, settings_in
from xcit_dino.models.zoo import TIMM_PREFIX, canonical_name, create_model, list_models
from xcit_dino.options import brief

Loaded = tuple[nn.Module, Preprocess]


def load(
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    which: str | None = None,
    classifier: bool = False,
    device: str | torch.device = "cpu",
) -> Loaded:
    """A trained network in evaluation mode, and the transform of its images.

    Args:
        source: a run folder (its newest checkpoint), a checkpoint or exported file of any layout, a
            folder of ``weights export --format timm-hub``, or ``timm/NAME`` for timm's own weights.
        arch: needed where the file does not say it; refused where it says another: a name from
            ``xcit_dino.list_models()``, a published one such as ``xcit_small_12_p8_224_dist``, or
            ``timm/NAME``.
        which: teacher, student, model or model_ema; by default the teacher of a DINO checkpoint,
            else the only network.
        classifier: load the classifier too: the network then returns logits [B, classes], else
            features [B, embed_dim].
        device: of the network.

    Raises:
        InputError: nothing there, no weights, an unknown architecture or another than the file's,
            no classifier, or no such device.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"load: {brief(source)} is no source; give a run folder, a file or timm/NAME"
        )
    name, form = os.fspath(source), None
    _check_device(device)
    if name.startswith(TIMM_PREFIX):
        model, settings = _from_timm(name, classifier)
    elif (Path(name) / CONFIG).is_file():
        model, settings = _from_hub_folder(Path(name), classifier)
    else:
        _check_there(Path(name))
        model, settings, form = _from_file(Path(name), arch, which, classifier)
    if classifier and not getattr(model, "num_classes", 0):
        raise InputError(
            f"{name}: has no classifier; load the folder of a run of finetune, or fit "
            "xcit_dino.LinearProbe on features of embed (linear's head is for evaluate(head=...))"
        )
    if arch is not None and name_of(create_model(canonical_name(arch))) != name_of(model):
        raise InputError(f"{name}: holds {name_of(model)}, not arch={arch!r}; leave arch out")
    return model.to(device).eval().requires_grad_(False), Preprocess.of(settings, form)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except Exception:  # torch raises different types
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        found = ", ".join(["cpu", *(name for name, is_there in there.items() if is_there)])
        raise InputError(f"device={str(device)!r}: torch finds none here; it has {found}") from None


def _from_timm(name: str, classifier: bool) -> tuple[nn.Module, InputSettings]:
    bare = name.removeprefix(TIMM_PREFIX)
    state = timm_weights(bare, name, None if classifier else 0)
    settings = timm_input_settings(name)
    assert settings is not None  # timm knows weights of this name
    model = create_model(name, num_classes=_num_classes(state, create_model(name)))
    model.load_state_dict(state)
    return model, settings


def _from_hub_folder(folder: Path, classifier: bool) -> tuple[nn.Module, InputSettings]:
    import timm

    options: dict[str, Any] = {} if classifier else {"num_classes": 0}
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    except Exception as error:  # whatever a damaged folder raises
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder}: timm does not load it ({reason}); export it again") from error
    settings = settings_in(folder) or settings_of_timm(model.pretrained_cfg, str(folder))
    return model, settings


def _from_file(
    path: Path, arch: str | None, which: str | None, classifier: bool
) -> tuple[nn.Module, InputSettings, PixelFormat | None]:
    run = run_options(path) if path.is_dir() else run_options(path.parent.parent)
    file = resolve_checkpoint(path)
    found = find_network(file, which)
    arch = _architecture(file, found, arch or run.get("arch"))
    model = create_model(arch)
    in_chans = _in_chans(found.state, model)
    if in_chans != 3:
        model = create_model(arch, in_chans=in_chans)
    if classes := _num_classes(found.state, model) if classifier else 0:
        model = create_model(arch, num_classes=classes, in_chans=in_chans)
    state, _ = fit(file, found, model)
    model.load_state_dict(state)
    settings = resolve_input_settings(arch, file, which, run)
    return model, settings, _form_of_run(run, settings)


def _form_of_run(run: dict[str, Any], settings: InputSettings) -> PixelFormat | None:
    """What the images of a run's set are; None where it is not on this machine (any more)."""
    data = str(run.get("data_path"))
    form = form_of(data) if Path(data).is_dir() else None
    read = len(settings.bands) or (form.channels if form else 0)
    return form if read == settings.channels else None


def _check_there(path: Path) -> None:
    if path.exists():
        return
    name = str(path)
    if name in list_models() or name.startswith("xcit_"):
        raise InputError(
            f"{name}: the name of an architecture; give the file of its weights, and arch={name!r}"
        )
    raise InputError(f"{name}: no such file or folder; timm's weights are named timm/NAME")


def _architecture(file: Path, found: FoundNetwork, said: str | None) -> str:
    """By the tensors of an XCiT; else as said, by the caller, the run or the file."""
    shape = layouts.infer_shape(found.state)
    if shape is not None and str(shape) in list_models():
        return str(shape)
    said = said or formats.metadata(file).get("arch")
    if said is None:
        raise InputError(f"{file}: does not say which network it holds; add arch='timm/NAME'")
    return canonical_name(said)


def _in_chans(state: dict[str, Tensor], model: nn.Module) -> int:
    """Channels of the images that a network like ``model`` takes, by its first layer."""
    weight = state.get(f"{first_layer(model)}.weight")
    return 3 if weight is None else weight.shape[1]


def _num_classes(state: dict[str, Tensor], model: nn.Module) -> int:
    """Rows of the classifier among the tensors of a network like ``model``; 0 without one."""
    biases = [state[name] for name in classifier_names(state, model) if state[name].ndim == 1]
    return len(biases[0]) if biases else 0


def embed(
    images: Iterable[Image] | Image | Iterable[Tensor],
    model: str | os.PathLike[str] | nn.Module,
    transform: Preprocess | None = None,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Features of images: float32 [N, D], in their order.

    Args:
        images: paths, PIL images, arrays or tensors of single images (:data:`Image`), one or many;
            many also as one array [N, H, W, C] or tensor [N, C, H, W]; or a DataLoader of
            transformed batches [B, C, H, W], alone or first in a tuple.
        model: a network and its ``transform`` as :func:`load` returns them, or what :func:`load`
            takes. It runs where it is, in evaluation mode.
        batch_size: images at once; of a DataLoader it is its own.

    Raises:
        InputError: no images, or one that cannot be read, by its place in the list.
    """
    if not isinstance(model, nn.Module):
        model, transform = load(model)
    batches = _batches(images, transform, batch_size, channels_of(model))
    weight = next(model.parameters())
    training, found = model.training, []
    try:
        with torch.inference_mode():
            found = [model.eval()(batch.to(weight)).float().cpu().numpy() for batch in batches]
    finally:
        model.train(training)
    if not found:
        raise InputError("embed: no images were given")
    return np.concatenate(found)


def _batches(
    images: Any, transform: Preprocess | None, batch_size: int, channels: int
) -> Iterator[Tensor]:
    if isinstance(images, torch.utils.data.DataLoader):
        yield from (_transformed(batch, channels) for batch in images)
        return
    if transform is None:
        raise InputError("embed: give the transform too, as load returns it with the network")
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise InputError(f"embed: batch_size={batch_size!r}; give a whole number from 1")
    stack = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3
    if _is_one(images):
        images = [images]
    elif not isinstance(images, Iterable):
        raise InputError(f"embed: {images!r} is no image; give a path, a PIL image, an array ...")
    remaining, done = iter(images), 0
    while chunk := list(islice(remaining, batch_size)):
        tensors = []
        for number, image in enumerate(chunk, start=done):
            try:
                tensors.append(transform(image))
            except InputError as error:
                several = "; several images are [N, H, W, C], as a tensor [N, C, H, W]"
                raise InputError(f"image {number}: {error}{several if stack else ''}") from None
        done += len(chunk)
        yield torch.stack(tensors)


def _transformed(batch: Any, channels: int) -> Tensor:
    """The images of a DataLoader's batch.

    Raises:
        InputError: it is not what ``transform`` makes; says what it is.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        what = type(images).__name__
    elif not images.is_floating_point() or images.ndim != 4 or images.shape[1] != channels:
        what = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    else:
        return images
    raise InputError(
        f"embed: the DataLoader gives {what}; its data set needs the transform that load returned, "
        f"for batches of float32 [B, {channels}, H, W], alone or first in a tuple"
    )


def _is_one(images: Any) -> bool:
    """Whether this is one image; an array of three dimensions is, whatever its channels."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "convert")
