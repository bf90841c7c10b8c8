"""Decoding on a GPU: the step of all layers captured once as a CUDA graph and replayed for every character.

    decoder = Decoder(model, cache)
    logits = decoder.step(ids)          # (B,) -> (B, 256), as `model.step(ids, cache)`

At this size a step is bound by the launches of its kernels, not by arithmetic or memory. The graph needs
nothing from the host: every place in the rings follows from a tensor of positions on the device, which the
graph itself counts up. On the CPU the same step runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from butterfly_llm.cache import Cache
from butterfly_llm.fused_step import FusedStep, unfused
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import default_backend
from butterfly_llm.persistent_step import PersistentStep, unsupported


class _Step(nn.Module):
    """`Butterfly.step_each` as the forward pass of a module, whose parameters can be replaced for a call."""

    def __init__(self, model: Butterfly) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        return self.model.step_each(ids, positions, cache)


class Decoder:
    """Steps the B streams of a cache. On CUDA it keeps a copy of the weights in the compute dtype.

    The cache may be read on with `model.prefill` in between; parameters that change later are not seen.
    """

    def __init__(
        self, model: Butterfly, cache: Cache, *, capture: bool | None = None, fused: bool | None = None
    ) -> None:
        """capture: replay a CUDA graph; None where there is a GPU.
        fused:   capture a step in one launch, `persistent_step`, or where that is not for this model or
                 several streams, in six launches a layer, `fused_step`; False captures the modules'. None:
                 a fused step where the model has one and Triton's kernels are its backend.

        ValueError for forked and 8-bit rings, and with fused True for a model that has no fused step.
        """
        if cache.paged is not None:
            raise ValueError("a decoder steps whole rings: use cache.gathered() of a fork or of 8-bit rings")
        device = cache.keys[0].device
        self.model, self.cache = model, cache
        self.positions = torch.full((cache.batch_size,), cache.position, dtype=torch.int64, device=device)
        """Characters that each stream has read; streams that stand apart set their own with `step`."""
        self._ids = torch.zeros_like(self.positions)
        self._expected = cache.position
        self._replay: Callable[[], Tensor] | None = None
        self.path = "modules"
        """What steps: "modules", "six launches a layer" or "one launch"."""
        if device.type == "cuda" if capture is None else capture:
            self._replay = self._capture(fused)

    def step(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append a character to each stream: ids (B,) -> logits (B, 256) float32.

        positions (B,): where the streams stand, where not all at `cache.position`. What is returned is
        overwritten by the next step.
        """
        if ids.shape != self._ids.shape:
            raise ValueError(f"ids {tuple(ids.shape)} must be {tuple(self._ids.shape)} for this decoder")
        self._ids.copy_(ids)
        if positions is not None:
            self.positions.copy_(positions)
        elif self._expected != self.cache.position:
            self.positions.fill_(self.cache.position)
        logits = self._step() if self._replay is None else self._replay()
        self.cache.position += 1
        self._expected = self.cache.position
        self.cache.logits = logits
        return logits

    def _step(self) -> Tensor:
        logits = self.model.step_each(self._ids, self.positions, self.cache)
        self.positions += 1
        return logits

    def _capture(self, fused: bool | None) -> Callable[[], Tensor]:
        arguments = (self._ids, self.positions, self.cache)
        config = self.model.config
        if fused is None:
            backend = self.model.backend or default_backend(self.cache.keys[0].device)
            fused = backend == "triton" and None in (unsupported(config, self.cache), unfused(config))
        if fused and unsupported(config, self.cache) is None:
            run = partial(PersistentStep(self.model, self.cache), self._ids, self.positions)
            self.path = "one launch"
        elif fused:
            run = partial(FusedStep(self.model), *arguments)
            self.path = "six launches a layer"
        else:
            step, dtype = _Step(self.model), self.model.compute_dtype
            weights = {name: p.detach().to(dtype) for name, p in step.named_parameters()}
            run = partial(torch.func.functional_call, step, weights, arguments)

        # Compiles kernels, makes workspaces; what these steps write, the first real one overwrites.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                logits = run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run()
            self.positions += 1

        def replay() -> Tensor:
            graph.replay()
            return logits

        self._run = run  # holds the weights, which the graph reads where they lie
        return replay
