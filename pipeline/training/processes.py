"""This process among those that train together, as torchrun starts them; alone without it.

The processes share every step: each encodes its part of the queries and candidates, vectors are gathered with their
gradients, gradients are averaged by DistributedDataParallel. Two processes learn what one would with the joint batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(hours=12)  # the others wait while the first one validates


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, vectors_BD: Tensor) -> Tensor:
        """The vectors of all processes in the order of their ranks [world * B, D], with gradients."""
        if self.world == 1:
            return vectors_BD
        import torch
        from torch.distributed.nn.functional import all_gather
        return torch.cat(all_gather(vectors_BD.contiguous()))

    def mean(self, values: Tensor) -> Tensor:
        """The average of each value over the processes."""
        if self.world > 1:
            import torch.distributed
            torch.distributed.all_reduce(values)
            values = values / self.world
        return values

    def all_of(self, value: Any) -> list[Any]:
        """The (picklable) value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed
        found = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.world > 1:
            import torch.distributed
            torch.distributed.barrier()

    def share(self, module: Any) -> Any:
        """The module, its gradients averaged over the processes."""
        if self.world == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel
        # A step may have no text, or no image, in one of the processes: then a tower has no gradient there.
        # Buffers are constants (masks), and processes may run different numbers of forward passes.
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone; UserError if the environment is half set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [os.environ.get(name) for name in names]
    if not any(given):
        yield Processes()
        return
    if not all(value is not None and value.isdigit() for value in given):
        raise UserError(f"of {', '.join(names)} only some are set", "environment",
                        "start with torchrun, which sets them all, or unset them")
    rank, world, _ = (int(str(value)) for value in given)
    import torch.distributed
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    yield Processes(rank, world)
    # Not after an error: with NCCL this waits for the others, who wait for us; torchrun ends them when we are gone.
    torch.distributed.destroy_process_group()
