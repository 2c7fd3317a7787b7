"""Operations for which the host would wait for a GPU, found without one.

:class:`NeverWaits` sees every operation of torch and raises at those whose result has to be known
on the host (``item``, ``nonzero``, boolean indexing) or that copy between host and device. On a CPU
there is one memory only, so that copies show in a second run: :func:`pretended_gpu` gives this
process a device ``gpu`` without memory or arithmetic (torch's fake tensors, on the device name that
torch leaves free for others), where a tensor of the host beside one of the device is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {  # operators of torch.ops.aten whose result, or its size, must be known on the host
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc",
    "_linalg_check_errors",
}  # fmt: skip
FROM_PYTHON = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor(numbers), torch.from_numpy
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Waits(AssertionError):
    """The host would wait for the device, or something lies where the device cannot see it."""


class NeverWaits(TorchDispatchMode):
    """Inside, an operation for which the host would wait for a GPU is an error.

    device: where every tensor has to be, that of the operations' inputs and of their results.
    numbers: allow tensors of the host's numbers, which may follow in a queued copy.

    Raises:
        Waits: at such an operation.
    """

    def __init__(self, device: str = "cpu", *, numbers: bool = False) -> None:
        super().__init__()
        self.device, self.numbers = device, numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        indices = pytree.tree_leaves(args[1]) if name in INDEXING else ()
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            raise Waits(f"{func}: the host waits for its result")
        if name in FROM_PYTHON and not self.numbers:
            raise Waits(f"{func}: numbers of Python become a tensor, by a copy that waits")
        if any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices):
            raise Waits(f"{func}: the host waits for the number of elements that a mask chooses")
        result = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        elsewhere = {x.device.type for x in (*given, *made) if x.numel()} - {self.device}
        if elsewhere:
            raise Waits(f"{func}: a tensor on {elsewhere.pop()} in work on {self.device}")
        return result


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """A device without memory or arithmetic, on which shapes, dtypes and devices are computed.

    Networks have to be built inside, under ``with device:``. It cannot be taken back, and torch may
    crash where it frees what was there: use it in a process of its own that frees nothing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        def get_rng_state(self, device: object = None) -> Tensor:
            return torch.empty(0, dtype=torch.uint8, device="meta")

        def set_rng_state(self, state: Tensor, device: object = None) -> None:
            pass

        @contextmanager
        def device(self, index: object) -> Iterator[None]:
            yield

    backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    inner, nn.Module.to = nn.Module.to, lambda self, *_, **__: self  # it is built where it belongs
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("gpu", 0)
    finally:
        nn.Module.to = inner
