"""One optimiser step of a training run: schedules, Muon and AdamW, and their state as named tensors.

Learning rate, window length and progress are pure functions of step, elapsed time and `TrainConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from butterfly_llm.config import TrainConfig
from butterfly_llm.model import Butterfly

ADAM_BETAS = (0.9, 0.95)


def progress_at(step: int, elapsed: float, config: TrainConfig) -> float:
    """Share of the run that is done, 0 to 1: by steps, or by elapsed seconds where that is further on."""
    progress = step / config.steps
    if config.max_seconds is not None:
        progress = max(progress, elapsed / (config.max_seconds - config.finish_seconds))
    return min(1.0, progress)


def learning_rate(step: int, progress: float, config: TrainConfig) -> float:
    """Linear warm-up by step, then constant until `decay_from`, then down to `final_rate` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = max(0.0, progress - config.decay_from) / (1 - config.decay_from)
    rest = 1 - done if config.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return config.learning_rate * warm * (config.final_rate + (1 - config.final_rate) * rest)


def length_at(progress: float, config: TrainConfig) -> int:
    """Window length in characters of the stage that `progress` falls into."""
    return next((length for until, length in config.lengths if progress < until), config.lengths[-1][1])


def fixed_bytes(model: Butterfly) -> int:
    """Bytes of weights, gradients and optimiser state: one momentum for what Muon takes, else two."""
    inside = (model.layers, model.writes, model.merges)
    matrices = sum(p.numel() for module in inside for p in module.parameters() if p.ndim == 2)
    return 4 * (3 * matrices + 4 * (model.num_parameters() - matrices))


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` that orthogonalises all matrices of one shape together, as one batch.

    The same update to rounding and the same state. 53 layers are 300 matrices, and 15 small products for each
    keep a GPU waiting for launches. `found_inf`, a scalar on the device, skips the whole step where it is 1,
    without a word to the host; `torch.optim.AdamW(fused=True)` reads the same attribute.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append((matrix, matrix.grad))
            for pairs in shapes.values():
                self._update([matrix for matrix, _ in pairs], [gradient for _, gradient in pairs], group)
        return loss

    def _update(self, matrices: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """Update K matrices (R, C) of one shape."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradient = torch.stack(gradients)  # (K, R, C)
        keep = torch.ones((), device=gradient.device)
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            gradient = torch.where(keep > 0, gradient, 0.0)
        momentum = torch.stack(buffers).lerp_(gradient, (1 - group["momentum"]) * keep)
        update = gradient.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = matrices[0].shape
        ratio = 0.2 * math.sqrt(max(rows, columns))  # as large as AdamW's update in the root mean square
        update = update.float().mul_(-group["lr"] * ratio * keep)
        torch._foreach_copy_(buffers, momentum.unbind())
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"] * keep)
        torch._foreach_add_(matrices, update.unbind())


def orthogonalise(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iteration on a batch (K, R, C), in bfloat16: singular values to about 1."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    if x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Optimizers:
    """Muon for the matrices, AdamW for embeddings, head and vectors, stepped as one."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.names: dict[Tensor, str] = {}
        self.drop_gradients = True
        """False: zero them in place after a step, for a captured backward pass that adds to them."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            self.names[parameter] = name
            inside = parameter.ndim == 2 and name.split(".")[0] not in ("embed", "ngram", "head")
            (matrices if inside else rest).append(parameter)
        self.muon = Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            rest, lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )

    def step(self, learning_rate: float, bad: Tensor) -> None:
        """Update all parameters and zero the gradients; nothing is updated where the scalar `bad` is true."""
        found_inf = bad.float()
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            setattr(optimizer, "found_inf", found_inf)  # noqa: B010  AdamW reads it but does not declare it
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.drop_gradients)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state of both as (parameter name.entry, tensor)."""
        for optimizer in (self.muon, self.adamw):
            for parameter, entries in optimizer.state.items():
                for entry, tensor in entries.items():
                    yield f"{self.names[parameter]}.{entry}", tensor

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state_tensors` gave; ValueError names a tensor that is missing or does not fit."""
        known: set[str] = set()
        for optimizer, entries in (
            (self.muon, ("momentum_buffer",)),
            (self.adamw, ("exp_avg", "exp_avg_sq", "step")),
        ):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names[parameter]
                    found = {entry: f"{name}.{entry}" for entry in entries if f"{name}.{entry}" in tensors}
                    known.update(found.values())
                    if not found:
                        continue  # no gradient has reached it yet
                    if len(found) < len(entries):
                        missing = next(entry for entry in entries if entry not in found)
                        raise ValueError(f"optimiser state: {name}.{missing} is missing")
                    state: dict[str, Tensor] = {}
                    for entry, key in found.items():
                        found_shape = tuple(tensors[key].shape)
                        shape = tuple(parameter.shape) if entry != "step" else ()
                        if found_shape != shape:
                            raise ValueError(f"optimiser state: {key} is {found_shape}, expected {shape}")
                        state[entry] = tensors[key].to(parameter.device, torch.float32, copy=True)
                    optimizer.state[parameter] = state
        if unknown := sorted(set(tensors) - known):
            raise ValueError(f"optimiser state: {unknown[0]} belongs to no parameter of the model")
