"""Layer inputs that lie in the host's memory between the forward and the backward pass of a GPU.

An input is copied out while its layer runs, and fetched while the layer after it is differentiated: copies
go over a stream of their own, so neither pass waits for them as long as a layer takes longer than its copy.
`torch.autograd.graph.save_on_cpu` copies on the stream that computes, where every layer would wait for both.

Pinned memory comes from PyTorch, which keeps it from step to step and gives a block out again only once its
last copy is done. It rounds requests up to powers of two, hence the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 28


def host_bytes(nbytes: int) -> int:
    """What an input of `nbytes` takes in the host's memory."""
    blocks, rest = divmod(nbytes, _BLOCK_BYTES)
    return blocks * _BLOCK_BYTES + (1 << (rest - 1).bit_length() if rest else 0)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for both directions: a block is never fetched from before it was filled."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copy(device: torch.device, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
    """Copy (to, from) behind all that has been launched so far -> when that is done; on the CPU at once."""
    if device.type != "cuda":
        for target, source in pairs:
            target.copy_(source)
        return None
    stream, done = _copy_stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    done.record(stream)
    return done


class LayerInput:
    """The input of one layer, kept for its backward pass, on the device or in the host's memory.

    A tensor on the device is held for as long as a copy reads or writes it, and let go only after the stream
    that computes has been told to wait for that copy: whatever gets its memory next comes after it.
    """

    def __init__(self, x: Tensor, before: LayerInput | None, on_host: bool) -> None:
        """x: any shape; before: the input of the layer before, which has been run by now."""
        if before is not None:
            before._leave()
        elif x.is_cuda:  # a pass that failed may have left copies on their way
            torch.cuda.current_stream(x.device).wait_stream(_copy_stream(x.device))
        self._x: Tensor | None = x.detach().contiguous()
        self._before = before
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._blocks: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        if on_host:
            parts = self._parts(self._x)
            self._blocks = [torch.empty(len(p), dtype=x.dtype, pin_memory=x.is_cuda) for p in parts]
            self._copied = _copy(x.device, zip(self._blocks, parts, strict=True))

    def take(self) -> Tensor:
        """The input, once; that of the layer before begins to be fetched."""
        self._fetch()
        self._wait()
        if self._before is not None:
            self._before._fetch()
        x, self._x, self._before = self._x, None, None
        assert x is not None
        return x

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x.view(-1), _BLOCK_BYTES // x.itemsize)

    def _leave(self) -> None:
        """The layer has been run: what lies in the host's memory is no longer needed on the device."""
        if self._blocks:
            self._wait()
            self._x = None

    def _fetch(self) -> None:
        """Begin to bring the input back, unless it is there."""
        if self._x is None and self._blocks:
            # From the stream that computes, so that its memory is free by the time the copy may begin.
            self._x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = _copy(self._device, zip(self._parts(self._x), self._blocks, strict=True))
        self._blocks = []

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None
