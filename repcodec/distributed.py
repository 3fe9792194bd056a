"""What the processes of one run tell one another; with a process alone, nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")
Value = TypeVar("Value")


def several_ranks() -> bool:
    """Whether this process is one of a group that trains together."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) when it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place, where there are several."""
    if several_ranks():
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """Give every rank what rank 0's tensor holds, in place, where there are several."""
    if several_ranks():
        dist.broadcast(tensor, src=0)
    return tensor


@contextmanager
def first_rank_first() -> Iterator[bool]:
    """Run a block that takes long on rank 0 alone: its value is True there; the others leave it together with rank 0.

    They wait in a group of its own, since that of training gives up after a minute or two. It is gloo's, which
    notices a rank that dies while others wait.
    """
    if not several_ranks():
        yield True
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield dist.get_rank() == 0
    dist.barrier(group=group)
    dist.destroy_process_group(group)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows (N, …) of all ranks; N may differ from rank to rank, and be 0."""
    if not several_ranks():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def of_all_ranks(found: dict[Key, Value]) -> dict[Key, Value]:
    """Put what every rank has found together, on each of them."""
    if not several_ranks():
        return found
    parts: list[dict[Key, Value]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
