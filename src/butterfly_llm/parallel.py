"""Several processes that train one model together, each on a GPU of its own, as torchrun starts them.

    torchrun --standalone --nproc-per-node 2 -m butterfly_llm.train configs/small.toml corpus=CORPUS

Every process holds the whole model and takes its share of the windows of a step; one sum of all gradients
later all of them make the same update. What a host decides by its clock or a signal is agreed on over gloo,
so that no decision waits for the GPU; gradients are summed by NCCL, or by gloo on a CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=6)  # the others wait while the first one validates and writes
_BUCKET = 2**25  # elements summed at once: few messages, and never a second copy of all gradients


class Team:
    """The processes of a run; alone, the process that there is."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.ended = size == 1
        """Nobody waits for this process any more."""

    def gather(self, value: float, failed: bool = False) -> list[float]:
        """The `value` of every process, by rank; all must call it, in the same order.

        `failed` says instead that this process cannot go on. The first one that failed returns and may say
        why; in all the others it is SystemExit(2) without a word.
        """
        if self.size == 1:
            return [value]
        rows = torch.zeros(self.size, 2, dtype=torch.float64)
        rows[self.rank] = torch.tensor([value, failed], dtype=torch.float64)
        self._sum(rows)
        if rows[:, 1].any():
            self.ended = True
            if not failed or int(rows[:, 1].argmax()) != self.rank:
                raise SystemExit(2)
        return [float(row) for row in rows[:, 0]]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, float32 on the device of the run, by its sum over all processes, in place."""
        if self.size == 1:
            return
        self.gather(0.0)  # who has failed on the way here would be missing below
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self._sum(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as failure:
            if tensor.is_cuda:
                raise
            said = " ".join(str(failure).split())
        else:
            return
        self.ended = True
        # Not in the handler: as its context the failure would keep the group.
        raise ConnectionError(f"train: another process of this run is gone ({said:.200})")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, together until they are more than `_BUCKET` elements."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, by the environment."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The processes that torchrun has started (WORLD_SIZE in the environment), or this one alone.

    device: of the run; auto and cuda become the GPU of LOCAL_RANK. All processes leave together: where one
    fails, its exception is raised there and SystemExit(2) in the others. ValueError for a `device` that
    cannot be one for each process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    # Its functions have the group of the moment as a default. Imported later, as an optimiser does, it would
    # keep the group past its end; then a thread of gloo that is late with its last tensor aborts at exit.
    from torch.distributed import nn  # noqa: F401

    on_gpu = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    members = Team(dist.get_rank(), size)
    failed = True
    try:
        with warnings.catch_warnings():
            if members.rank:
                warnings.simplefilter("ignore")  # the first one says it
            try:
                if on_gpu:
                    torch.cuda.set_device(_gpu(device))
                yield members
                failed = False
            except SystemExit:  # an end in order, as after a signal
                failed = False
                raise
            finally:
                if not members.ended:
                    members.gather(0.0, failed)
    finally:
        dist.destroy_process_group()


def _gpu(device: str) -> int:
    """The number of this process's GPU."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ValueError(f"train: device {device!r} is one for all processes; use auto, cuda or cpu")
    if number >= count:
        raise ValueError(
            f"train: process {number} has no GPU, there are {count}; start at most that many processes"
        )
    return number
