"""Sharded networks, one shard per rank: FSDP2, ``torch.distributed.fsdp.fully_shard``.

A rank keeps its rows of every parameter, gradient and moment. A block's parameters are gathered
only while it computes; gradients are averaged over ranks as DistributedDataParallel does, so the
steps are the same up to rounding. Checkpoints contain full tensors: any number of ranks can resume
from them, sharded or not.

Under autocast to 16 bits the weights that autocast would convert, those of a block's linear layers
and convolutions, are gathered in 16 bits: half the bytes, and the same products. All else stays in
float32, as autocast computes it: norms, layer scales (whose type is that of the residuals) and
temperatures, which are few and gathered with what is outside of the blocks. So do shards, gradients
between ranks, moments, averages and checkpoints.

The torch modules needed take a second to import, so only sharded runs import them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xcit_dino.train.distributed import dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(
    network: nn.Module,
    backbone: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    parts: Sequence[nn.Module] = (),
) -> None:
    """Replace the parameters of a network by shards, in place; buffers stay whole.

    Args:
        network: the same on all ranks.
        backbone: the part of it that may have ``blocks``, which go back to shards one by one.
        device: where the network is.
        dtype: of the forward pass, for which autocast is on in all that follows.
        parts: what is called, where the network is not called as a whole. Parts go back to shards
            at once, for these may move before the next call; what a whole network has outside of
            its blocks stays whole until the backward pass is over.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.world_size(),))
    blocks: Sequence[nn.Module] = list(getattr(backbone, "blocks", []))
    cast = {parameter for block in blocks for parameter in _cast_by_autocast(block)}
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=cast)
    if not parts:
        fully_shard(network, mesh=mesh, ignored_params=cast)
    narrow = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = narrow if dtype.itemsize == 2 else MixedPrecisionPolicy()
    for block in blocks:  # what is left of them: the rest already is in shards
        rest = {parameter for parameter in block.parameters() if parameter not in cast}
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=rest)
    network.register_load_state_dict_pre_hook(_cut_weights)


def _cast_by_autocast(block: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of layers that are nothing but a product. A layer derived from these may use its
    weights in other ways too."""
    for module in block.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            yield from module.parameters(recurse=False)


def take_whole_moments(optimizer: torch.optim.Optimizer) -> None:
    """Load the state of an optimizer of full parameters into one of sharded parameters."""
    optimizer.register_load_state_dict_pre_hook(_cut_moments)


def full_tensors(state: Any, everywhere: bool = False) -> Any:
    """``state`` (nested dicts and lists) in host memory, with sharded tensors gathered.

    To be called on all ranks if there are shards; without ``everywhere`` only rank 0 keeps the
    result, one tensor after the other.
    """

    def gathered(tensor: Tensor) -> Tensor | None:
        if not is_shard(tensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if everywhere or dist.is_main() else None

    return pytree.tree_map_only(Tensor, gathered, state)


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one rank's part of a larger one."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, which share its memory; any other as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; for shards to be called on all ranks, with one result."""
    finite = local(tensor).isfinite().all()
    if is_shard(tensor):
        finite = dist.all_reduce_sum((~finite).float()) == 0
    return bool(finite)


def _cut(tensor: Tensor, like: Any) -> Tensor:
    """Shard a full tensor, which every rank has, in the same way as ``like``."""
    if not is_shard(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def _cut_weights(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    wanted = network.state_dict(prefix=prefix)
    state |= {name: _cut(tensor, wanted.get(name)) for name, tensor in state.items()}


def _cut_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {name: _cut(value, parameters[number]) for name, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    return saved | {"state": state}
