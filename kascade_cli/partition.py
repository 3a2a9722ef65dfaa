"""Which of a model's attention heads this process holds, and how the processes put theirs together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Partition:
    """Heads are split evenly and in order: process `rank` of `world` holds heads [rank * local, (rank + 1) * local).

    `group` is the torch.distributed process group of these processes.
    """

    rank: int
    world: int
    group: Any

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """All processes' tensors, equal in shape, joined along `dim` in the order of ranks. Every process calls it."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def own(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor over all heads: what `gather` would join to it (a view)."""
        local = tensor.shape[dim] // self.world
        return tensor.narrow(dim, self.rank * local, local)


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process holds a part (or a replica)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def partition_of(attention: nn.Module) -> Partition | None:
    """How the heads of an attention module are split by transformers' tensor parallelism; None if they are not.

    The parameters tell: DTensors cut along a mesh's dimension named `tp`. Those of FSDP are whole when they are used.
    """
    for parameter in attention.parameters():
        if not sharded(parameter):
            continue
        mesh = parameter.device_mesh
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            if name == "tp" and mesh.size(dim) > 1 and parameter.placements[dim].is_shard():
                return Partition(mesh.get_local_rank(dim), mesh.size(dim), mesh.get_group(dim))
    return None
