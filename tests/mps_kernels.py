"""Operations that torch has no kernel for on Apple's GPUs, found without one.

:class:`HasKernels` sees every operation of torch and raises at those that torch's own table of
operators (``native_functions.yaml``, which lies in the package) gives no kernel for MPS, and at
float64, which Metal does not have.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
FOR_ALL = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")  # made of other operations


class NoKernel(AssertionError):
    """An operation that cannot run on MPS."""


@cache
def table() -> dict[str, dict[str, Any]]:
    """Operator (``add.Tensor``) -> its entry."""
    entries = yaml.load(TABLE.read_text(), yaml.CSafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in entries}


@cache
def has_kernel(operator: str) -> bool:
    """Whether torch has it on MPS: a kernel of its own, or one made of other operations."""
    entry = table().get(operator)
    if entry is None:  # generated: functional and out variants of an operator in the table
        return False
    if delegate := entry.get("structured_delegate"):
        return has_kernel(delegate)
    dispatch = entry.get("dispatch")
    if dispatch is None:
        return True  # composite
    keys = {key.strip() for keys in dispatch for key in keys.split(",")}
    return "MPS" in keys or any(key.startswith(FOR_ALL) for key in keys)


class HasKernels(TorchDispatchMode):
    """Inside, an operation that cannot run on MPS is an error.

    Raises:
        NoKernel: at such an operation.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not has_kernel(name.removesuffix(".default")):
            raise NoKernel(f"{name}: no kernel for MPS")
        tensors = pytree.tree_leaves((args, kwargs, result))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tensors):
            raise NoKernel(f"{name}: float64, which MPS does not have")
        return result
