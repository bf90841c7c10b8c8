"""Forward and backward pass captured once as a CUDA graph and replayed for every batch of the same shape.

53 layers are some 3,000 launches a step, which a host needs longer for than the GPU for its work on a narrow
model. A replay is one launch; what it computes is what the captured operations compute, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from butterfly_llm.model import Butterfly

Accumulate = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(ids (B, N), targets (B, N), weights (B, N) or None, share) -> share times the loss, on the device; share
times its gradient is added to the parameters'."""

_WARM_UPS = 2  # compilation and workspaces, then once as it will be


def accumulate(
    model: Butterfly, ids: Tensor, targets: Tensor, weights: Tensor | None, share: float | Tensor
) -> Tensor:
    """One forward and backward pass, as `Accumulate` says."""
    loss = model.loss(ids, targets, weights=weights) * share
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


class CapturedLoss:
    """`accumulate` for a model on a CUDA device. Gradients must be zeroed in place, never dropped.

    Holds the memory of one step from the first call to `release`; a batch of another shape captures anew.
    """

    def __init__(self, model: Butterfly) -> None:
        self.model = model
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
        self._loss: Tensor | None = None

    def __call__(self, ids: Tensor, targets: Tensor, weights: Tensor | None, share: float) -> Tensor:
        """As `Accumulate`; what is returned is overwritten by the next call."""
        if self._graph is None or self._inputs is None or not self._fits(ids, weights):
            self.release()
            self._capture(ids, targets, weights, share)
        assert self._inputs is not None and self._graph is not None and self._loss is not None
        for held, given in zip(self._inputs[:3], (ids, targets, weights), strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        self._inputs[3].fill_(share)
        self._graph.replay()
        return self._loss

    def release(self) -> None:
        """Give the memory of the graph back."""
        self._graph = self._inputs = self._loss = None

    def _fits(self, ids: Tensor, weights: Tensor | None) -> bool:
        assert self._inputs is not None
        return self._inputs[0].shape == ids.shape and (self._inputs[2] is None) == (weights is None)

    def _capture(self, ids: Tensor, targets: Tensor, weights: Tensor | None, share: float) -> None:
        held = None if weights is None else weights.clone()
        self._inputs = ids.clone(), targets.clone(), held, torch.tensor(share, device=ids.device)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        kept = [gradient.clone() for gradient in gradients]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                accumulate(self.model, *self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = accumulate(self.model, *self._inputs)
        torch._foreach_copy_(gradients, kept)  # what the warm-ups added
