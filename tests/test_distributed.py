"""What processes tell one another, in three real ones over gloo; and what one alone makes of the same calls."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from repcodec.distributed import (
    first_rank_first,
    from_first_rank,
    gather_rows,
    of_all_ranks,
    rank_and_world,
    several_ranks,
    sum_over_ranks,
)

WORLD = 3


def talk(rank, folder):
    """Call everything on one rank, and keep what came of it."""
    options = {"rank": rank, "world_size": WORLD, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", **options)
    found = {
        "where": rank_and_world(),
        "sum": sum_over_ranks(torch.tensor([rank, 1.0])).tolist(),
        "first": from_first_rank(torch.tensor([rank + 7])).tolist(),
        # A rank with two rows, one with none, one with one.
        "rows": gather_rows(torch.full(((2, 0, 1)[rank], 2), float(rank))).tolist(),
        "all": of_all_ranks({f"key {rank}": rank, "of each": rank}),
    }
    with first_rank_first() as first:
        found["begun"] = [first, (folder / "made").exists()]
        if first:
            time.sleep(0.5)
            (folder / "made").touch()
    found["made"] = (folder / "made").exists()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_hear_one_another(tmp_path):
    mp.spawn(talk, (tmp_path,), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert [one["where"] for one in found] == [(0, 3), (1, 3), (2, 3)]
    for one in found:
        assert one["sum"] == [3.0, 3.0]
        assert one["first"] == [7]
        assert one["rows"] == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
        assert one["all"] == {"key 0": 0, "key 1": 1, "key 2": 2, "of each": 2}
        assert one["made"], "the others leave the block when rank 0 has made it"
    assert [one["begun"][0] for one in found] == [True, False, False]


def test_one_process_alone_keeps_what_it_has():
    assert not several_ranks() and rank_and_world() == (0, 1)
    rows = torch.arange(6.0).view(3, 2)
    for told in (sum_over_ranks(rows), from_first_rank(rows), gather_rows(rows)):
        assert told.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert of_all_ranks({1: 2}) == {1: 2}
    with first_rank_first() as first:
        assert first
