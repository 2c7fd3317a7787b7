"""timm's own weights by a model's name: from the cache of this machine, else fetched."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from xcit_dino.errors import InputError, one_line
from xcit_dino.models.checkpoints import HUB_WEIGHTS
from xcit_dino.models.zoo import check_timm_name

FILES = (HUB_WEIGHTS, "pytorch_model.bin")  # of a repository on the hub, the preferred first


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
    elif known.hf_hub_id:
        check_network(f"{option}: timm's weights are not on this machine, and", name, known)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the download raises many kinds
        reason = one_line(error, 120)
        raise InputError(
            f"{option}: timm's weights are not on this machine and could not be fetched "
            f"({reason}); {remedy(option, name, known)}"
        ) from error


def check_network(what: str, name: str, known: Any) -> None:
    """Raise InputError at once where the hub's name is not known here, as on nodes without a
    network; the hub's client would try ten times, for a minute."""
    from huggingface_hub.constants import ENDPOINT

    host = urlsplit(ENDPOINT).hostname
    if host is None or getproxies():  # a proxy knows the names
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise InputError(
            f"{what} {host} is not known here, without a network; {remedy(what, name, known)}"
        ) from None


def remedy(option: str, name: str, known: Any) -> str:
    """How to fetch the weights elsewhere, and the option that takes their file."""
    takes = {
        "--init_from": f"--init_from FILE --arch timm/{name}",
        "--teacher_model": f"{option.partition(':')[0]} --teacher_path FILE",
    }
    named = takes.get(option.split()[0], "that file instead")
    return f"where there is a network, {command(known)}, then name {named}"


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
