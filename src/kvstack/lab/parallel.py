"""Training on several GPUs, as torchrun starts it: who this process is, how the model is spread, and state that every spread can load.

    torchrun --nproc-per-node 4 -m kvstack.cli.main lab pretrain ... --parallel fsdp

ddp keeps the whole model on every GPU; fsdp (FSDP2, `fully_shard`) a slice of every parameter. Checkpoints hold whole tensors, so a run
may go on with another number of processes or another spread. Without torchrun there is one process and nothing is spread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

DDP, FSDP = "ddp", "fsdp"
SPREADS = (DDP, FSDP)
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TAKE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@dataclass(frozen=True)
class World:
    """This process among `size`."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x / self.size

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[World]:
    """This process's place in the group that torchrun started, or a world of its own."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield World(dist.get_rank() if size > 1 else 0, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def spread(model: nn.Module, layers: nn.ModuleList, how: str, world: World) -> nn.Module:
    """`model`, ready for steps of all processes; `layers`: what FSDP gathers one by one."""
    if world.size == 1:
        return model
    if how == DDP:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(world.device.type, (world.size,))
    empty = {p for p in model.parameters() if not p.numel()}  # residuals of rank 0, which FSDP cannot cut
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=empty)
    fully_shard(model, mesh=mesh, ignored_params=empty)
    return model


def gather_state(model: nn.Module, opts: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Whole tensors of model and optimisers on the CPU; on other processes than the first, nothing. All processes call it."""
    held = {"model": get_model_state_dict(model, options=_FULL)}
    return held | {f"opt{i}": get_optimizer_state_dict(model, opt, options=_FULL) for i, opt in enumerate(opts)}


def scatter_state(model: nn.Module, opts: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Load what `gather_state` gave; processes but the first may give an empty dict. All processes call it."""
    options = _TAKE if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    for i, opt in enumerate(opts):
        set_optimizer_state_dict(model, opt, state.get(f"opt{i}", {}), options=options)
    # Last: an optimiser's state is made by a step of length zero, which may write a matrix in other factors.
    set_model_state_dict(model, state.get("model", {}), options=options)
