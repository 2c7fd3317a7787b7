"""timm's own weights by a model's name: from the cache of this machine, else fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from xcit_dino.errors import InputError, one_line
from xcit_dino.models.zoo import check_timm_name

FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # of a repository on the hub, the preferred first


def pretrained(name: str, option: str, **arguments: Any) -> nn.Module:
    """A timm model with timm's weights; nothing is fetched where they are in the hub's cache.

    Args:
        name: timm's, without a prefix, with or without the tag of its weights
            (``resnet18.a1_in1k``).
        option: the option and its value, for messages.
        arguments: of ``timm.create_model``.

    Raises:
        InputError: timm has no such model, no weights of it, or they could not be fetched (names
            the command that fetches them elsewhere).
    """
    import timm

    check_timm_name(name, option)
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise InputError(f"{option}: timm has no weights of this model; name a file instead")
    if cached := cached_file(known):  # a hub's file is not in the form that custom_load is for
        arguments["pretrained_cfg_overlay"] = {"file": str(cached), "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the download raises many kinds
        reason = one_line(error, 120)
        raise InputError(
            f"{option}: timm's weights are not on this machine and could not be fetched "
            f"({reason}); where there is a network, {command(known)}, and name that file instead"
        ) from error


def cached_file(known: Any) -> Path | None:
    """The file of weights in the hub's cache on this machine; None where it has to be fetched.

    known: timm's ``PretrainedCfg``.
    """
    if not known.hf_hub_id:
        return None
    from huggingface_hub import try_to_load_from_cache

    names = (known.hf_hub_filename,) if known.hf_hub_filename else FILES
    found = (try_to_load_from_cache(known.hf_hub_id, name) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def command(known: Any) -> str:
    """The command line that fetches the weights of a ``PretrainedCfg``."""
    if known.hf_hub_id:
        file = known.hf_hub_filename or FILES[0]
        return f"'hf download {known.hf_hub_id} {file} --local-dir FOLDER'"
    return f"'curl -L -O {known.url}'"
