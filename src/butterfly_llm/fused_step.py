"""The step of all layers in six launches a layer, for a decoder on a GPU.

The weights are copies in the compute dtype. What it computes is `Butterfly.step_each`, to rounding: norms and
gates are not rounded in between.

Shapes: B streams, d hidden size, M carry size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.cache import Cache
from butterfly_llm.carry import lanes_of, written
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.ops.triton_ngrams import ngram_rows
from butterfly_llm.ops.triton_rows import merge_heads_step, merge_step, rows_product
from butterfly_llm.ops.triton_step import step_attention_triton


def unfused(config: ButterflyConfig) -> str | None:
    """Why a model has no such step; None where it has."""
    if config.feed_forward != "relu2":
        return f"feed_forward {config.feed_forward!r} has no kernel, relu2 has"
    return None


def embedded(ids: Tensor, positions: Tensor, cache: Cache, embed: Tensor, ngram: Tensor | None) -> Tensor:
    """ids and positions (B,) int64, tables (256, d) and (O * K * 257, d) -> (B, d), before the norm.

    What followed is looked up, and brought up to date in the cache.
    """
    if ngram is None or cache.ngrams is None:
        return F.embedding(ids, embed)
    return ngram_rows(ids, positions, cache.ngrams, embed, ngram)


class FusedStep:
    """`step_each` of a model, frozen: parameters that change later are not seen."""

    def __init__(self, model: Butterfly) -> None:
        """ValueError for what `unfused` names."""
        reason = unfused(model.config)
        if reason is not None:
            raise ValueError(f"fused step: {reason}")
        self.config, self.routes = model.config, model.routes
        dtype = model.compute_dtype
        self.weights = {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}
        self.head_gains = [
            torch.stack([self.weights[f"layers.{i}.attention.{name}_norm.weight"] for name in ("q", "k")])
            for i in range(len(self.routes))
        ]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """ids and positions (B,) int64 -> logits (B, 256) float32; the rings of `cache` are updated."""
        config, weights = self.config, self.weights
        eps, topology = config.norm_eps, config.routing
        heads = (-1, config.head_dim)
        x = F.rms_norm(
            embedded(ids, positions, cache, weights["embed.weight"], weights.get("ngram.weight")),
            (config.hidden_size,),
            weights["embed_norm.weight"],
            eps,
        )
        scan: Tensor | None = None
        finished: Tensor | None = None
        for route in self.routes:
            layer = f"layers.{route.index}."
            if config.carry_size and route.starts_pass:
                write = f"writes.{route.pass_index}."
                both = rows_product(
                    x, weights[write + "linear.weight"], gain=weights[write + "norm.weight"], eps=eps
                )
                scan = written(both + weights[write + "linear.bias"], config.carry_heads, eps)
            read = None
            if layer + "attention.read.weight" in weights:
                heard = cast(Tensor, scan if finished is None or route.pass_index == 0 else finished)
                read = (
                    lanes_of(heard, config.carry_heads),
                    weights.get(layer + "attention.read_norm.weight"),
                    weights[layer + "attention.read.weight"],
                )
            qkv = rows_product(
                x,
                weights[layer + "attention.qkv.weight"],
                gain=weights[layer + "attention_norm.weight"],
                eps=eps,
                kind="heads",
                read=read,
                heads=(config.num_heads, config.num_kv_heads, self.head_gains[route.index]),
            ).unflatten(-1, heads)  # type: ignore[no-untyped-call]
            q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], 1)
            ring = cache.keys[route.index], cache.values[route.index]
            y = step_attention_triton(
                q, k, v, ring, position=positions, stride=route.stride, topology=topology,
                rope_theta=config.rope_theta, local=config.local_of(route.index),
            ).flatten(1)  # fmt: skip
            x = rows_product(y, weights[layer + "attention.out.weight"], kind="add", residual=x)
            hidden = rows_product(
                x,
                weights[layer + "feed_forward.up.weight"],
                gain=weights[layer + "feed_forward_norm.weight"],
                eps=eps,
                kind="relu2",
            )
            x = rows_product(hidden, weights[layer + "feed_forward.down.weight"], kind="add", residual=x)
            carry = cache.carries[route.index]
            if scan is not None and carry is not None:
                merge = f"merges.{route.index - config.num_local_layers}."
                where: dict[str, Any] = {"stride": route.stride, "topology": topology}
                if config.carry_heads:
                    scan = merge_heads_step(scan, carry, positions, weights[merge + "bias"], **where)
                else:
                    matrix, bias = weights[merge + "linear.weight"], weights[merge + "linear.bias"]
                    scan = merge_step(scan, carry, positions, matrix, bias, **where)
                if route.ends_pass:
                    finished = scan
        return rows_product(
            x, weights["head.weight"], gain=weights["norm.weight"], eps=eps, dtype=torch.float32
        )
