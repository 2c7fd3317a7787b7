"""Read and write tensor files (torch, safetensors, Paddle), without executing anything in them.

A pickle is a program. torch's are loaded with ``weights_only``, Paddle's by an unpickler that
allows a few names only, nearly all stand-ins that can only describe an array of numbers.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcit_dino.errors import InputError
from xcit_dino.files import atomic_path

Tree = dict[str, Any]
MAX_ENTRIES, MAX_DEPTH = 10**6, 32  # of nested dicts; checkpoints have thousands, in five levels
METADATA = "metadata"  # attribute of a .pth's state dict
PADDLE_NAMES = "StructuredToParameterName@@"  # an index of names that paddle.save adds
COMMAND_LINE = [  # of official checkpoints; run under submitit, it has a Path
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]


def read(path: Path) -> Tree:
    """Read a checkpoint as nested dicts with tensors (on the CPU) as leaves.

    Raises:
        InputError: missing, damaged, or containing anything but plain data; names the file.
    """
    readers = {".safetensors": _read_safetensors, ".pdparams": _read_paddle}
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a checkpoint")
    try:
        tree = readers.get(path.suffix, _read_torch)(path)
        _check_nesting(tree)
    except Exception as error:  # readers raise many kinds: pickle, zip, OS, EOF, value, memory
        raise InputError(
            f"{path}: not a readable weights file, or it contains more than tensors, so it "
            f"was not loaded ({type(error).__name__}: {_first_sentence(error)})"
        ) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: contains a {type(tree).__name__} instead of named tensors")
    return tree


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, or the strings stored next to the tensors in a .pth of
    ours (see :func:`write`); empty for other files."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    if path.suffix == ".pdparams":
        return {}
    return metadata_of(skim(path))


def metadata_of(tree: Any) -> dict[str, str]:
    """The texts of a checkpoint, on its top level, in its ``facts`` and in ``metadata``; its step
    too, in digits."""
    if not isinstance(tree, dict):
        return {}
    places = (tree, tree.get("facts"), getattr(tree, METADATA, None))
    return {
        name: str(value)
        for place in places
        if isinstance(place, dict)
        for name, value in place.items()
        if isinstance(value, str) or (name == "step" and isinstance(value, int))
    }


def skim(path: Path) -> Tree:
    """As :func:`read`, with tensors that stay on the disk in a torch file of the kind that can."""
    try:
        with torch.serialization.safe_globals(COMMAND_LINE):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the older format, or a file that read() refuses with the reason
        tree = None
    return tree if isinstance(tree, dict) else read(path)


def write(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write tensors in the format of the suffix.

    facts: metadata. .safetensors stores them natively; a .pth keeps them as the attribute
    ``metadata`` of its state dict, so that ``model.load_state_dict(torch.load(path))`` works as
    with any other; a .pdparams cannot store them.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save(state, metadata=facts))  # save_file would set mode 600
    elif path.suffix == ".pdparams":
        _write_paddle(path, state)
    else:
        tensors = OrderedDict(state)
        setattr(tensors, METADATA, dict(facts))
        with path.open("wb") as file:  # given a name, torch would store it in the file
            torch.save(tensors, file)


def write_checked(
    path: Path, write_file: Callable[[Path], None], check_file: Callable[[Path], None]
) -> None:
    """Write under a temporary name, check the file, then rename: a file under its final name is
    complete and has passed the check."""
    with atomic_path(
        path, path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    ) as partial:
        write_file(partial)
        check_file(partial)


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals(COMMAND_LINE):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Tree:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _read_paddle(path: Path) -> Any:
    tree, array_type = read_pickle(path)

    def tensors(value: Any) -> Any:
        if isinstance(value, array_type):
            return torch.from_numpy(value.array())
        if isinstance(value, dict):
            return {k: tensors(v) for k, v in value.items() if k != PADDLE_NAMES}
        return value

    return tensors(tree)


def read_pickle(path: Path) -> tuple[Any, Any]:
    """Read a pickle of plain data and numpy arrays; returns it, and the type of the stand-ins for
    arrays in it, whose ``array()`` gives the values.

    Raises:
        Exception: of many kinds, where it is damaged or holds anything else.
    """
    names, array_type = _array_stand_ins()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in names:
                raise pickle.UnpicklingError(f"refused {module}.{name}: only arrays are allowed")
            return names[module, name]

    # From memory, so that a wrong length in the file cannot allocate gigabytes.
    content = path.read_bytes()
    _check_memo(content)
    tree = Unpickler(io.BytesIO(content)).load()
    _check_nesting(tree)
    return tree, array_type


def _check_memo(content: bytes) -> None:
    """Refuse a pickle that skips memo indices: Python's unpickler allocates all of them, up to
    64 GiB for a file of a few bytes."""
    used = 0
    for opcode, place, _ in pickletools.genops(content):
        if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            if place is not None and place > used:
                raise pickle.UnpicklingError(f"refused memo index {place} after {used}")
            used += 1


def _check_nesting(tree: Any) -> None:
    """Refuse dicts that expand to more than a checkpoint contains: a few bytes that refer to one
    another can stand for billions of entries, or expand forever."""
    dicts, entries, depth = [tree], 0, 0
    while dicts := [value for value in dicts if isinstance(value, dict)]:
        entries, depth = entries + sum(map(len, dicts)), depth + 1
        if entries > MAX_ENTRIES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_ENTRIES:,} entries, or {MAX_DEPTH} levels")
        dicts = [value for inner in dicts for value in inner.values()]


def _array_stand_ins() -> tuple[dict[tuple[str, str], Any], Any]:
    """Stand-ins for the names in a pickle of numpy arrays, and the type of its arrays.

    numpy's own classes are not used: their ``__setstate__`` trusts the file. The stand-ins are
    created again for each file, since a pickle can set attributes of them.
    """

    class DType:
        def __init__(self, code: str, *_: Any) -> None:
            self.code, self.order = code, "<"

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = state[1]

        def dtype(self) -> np.dtype[Any]:
            if not re.fullmatch("f[248]|i[1248]", self.code) or self.order not in ("<", ">", "|"):
                raise pickle.UnpicklingError(f"refused an array of type {self.code!r}")
            return np.dtype(f"{self.order}{self.code}")

    class Array:
        def __init__(self, *_: Any) -> None:
            self.state: tuple[Any, ...] = ()

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.state = state  # version, shape, dtype, whether column-major, bytes

        def array(self) -> np.ndarray[Any, Any]:
            _, shape, dtype, fortran, content = self.state
            values = np.frombuffer(content, dtype.dtype())
            values = values.reshape(shape, order="F" if fortran else "C")
            return values.astype(values.dtype.newbyteorder("="), order="C")  # a writable copy

    def from_buffer(content: bytes, dtype: DType, shape: Any, order: str) -> Array:
        array = Array()
        array.state = (1, shape, dtype, order == "F", content)
        return array

    def scalar(dtype: DType, content: bytes) -> Any:
        return np.frombuffer(content, dtype.dtype())[0].item()

    def encode(text: str, encoding: str) -> bytes:
        return text.encode("latin1")  # how protocol 2 encodes bytes

    def no_bytes() -> bytes:
        return b""  # and how it encodes empty bytes

    names: dict[tuple[str, str], Any] = {("numpy", "ndarray"): None, ("numpy", "dtype"): DType}
    for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = Array
        names[f"{core}.multiarray", "scalar"] = scalar
        names[f"{core}.numeric", "_frombuffer"] = from_buffer
    names["_codecs", "encode"] = encode
    names["__builtin__", "bytes"] = no_bytes
    names["collections", "OrderedDict"] = OrderedDict
    return names, Array


def _write_paddle(path: Path, state: dict[str, Tensor]) -> None:
    """As ``paddle.save``: a pickle (protocol 4) of numpy arrays and the index of names."""
    arrays: Tree = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in state.items()
    }
    with path.open("wb") as file:
        pickle.dump({**arrays, PADDLE_NAMES: {name: name for name in state}}, file, protocol=4)


def _first_sentence(error: Exception) -> str:
    """The first sentence only: torch then recommends loading the file without protection. Of a
    refused class or function the name."""
    if refused := re.search(r"(?:GLOBAL|function|type) ([\w.]*\.[\w.]*\w)", str(error)):
        return f"refused {refused[1]}"
    return re.split(r"\n|\. ", str(error).strip())[0] or "no message"
