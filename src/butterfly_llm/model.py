"""The Butterfly model: 4 local, 45 butterfly and 4 refinement layers that are one operator with a stride.

`forward` reads whole sequences for training; `prefill` and `step` stream through a `Cache`. The three agree.

Shapes: B batch, N characters, d hidden size, H heads, K key-value heads, D head size, M carry size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from butterfly_llm import ngrams
from butterfly_llm.cache import Cache, prefill_slice, routes_of
from butterfly_llm.carry import CarryMerge, CarryWrite
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.layers import Layer
from butterfly_llm.modules import Linear, RMSNorm
from butterfly_llm.offload import LayerInput
from butterfly_llm.ops import Backend, default_backend, numpy_step
from butterfly_llm.ops.loss import linear_cross_entropy
from butterfly_llm.ops.portable import (
    partner_row_step,
    partner_row_step_each,
    partner_rows,
    partner_rows_prefill,
    prefill_attention,
    step_attention,
    step_attention_each,
)
from butterfly_llm.ops.prefill import prefill_attention_triton
from butterfly_llm.ops.rope import Angles, offset_angles, rope_table
from butterfly_llm.ops.triton_carry import merge_heads_triton
from butterfly_llm.ops.triton_step import step_attention_triton
from butterfly_llm.recompute import Recompute, recomputed_layer
from butterfly_llm.routing import LayerRoute

# Nothing random is run twice, so its state need not be kept.
_CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class Butterfly(nn.Module):
    """A character-level language model over butterfly attention. Parameters are float32."""

    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__()
        self.config = config
        self.routes = routes_of(config)
        self.compute_dtype = torch.float32
        self.backend: Backend | None = None  # None: the best for the device
        self.gradient_checkpointing = False  # recompute in the backward pass, as `recompute` says
        self.recompute = Recompute()
        self._numpy: numpy_step.Weights | None = None
        self._contexts = ngrams.Contexts.of(config)
        self.prefill_slice: int | None = None  # characters per pass through the layers; None: by memory
        has_carry = config.carry_size > 0
        self.embed = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.ngram = None
        if config.num_contexts:  # of each follower a row a character, and one for nothing
            rows = config.num_contexts * config.ngram_ranks * (ngrams.NOTHING + 1)
            self.ngram = nn.Embedding(rows, config.hidden_size, _weight=torch.zeros(rows, config.hidden_size))
        self.embed_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, has_carry and self._reads_carry(route.stage), config.local_of(route.index))
            for route in self.routes
        )
        passes = sum(route.starts_pass for route in self.routes)
        self.writes = nn.ModuleList(CarryWrite(config) for _ in range(passes if has_carry else 0))
        merges = config.num_butterfly_layers if has_carry else 0
        self.merges = nn.ModuleList(CarryMerge(config) for _ in range(merges))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.embed.weight.is_meta:  # where normal_ would import torch's compiler, which takes a second
            nn.init.normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)
        self._write: Callable[[CarryWrite, Tensor], Tensor] = CarryWrite.forward
        self._merge: Callable[[CarryMerge, Tensor, Tensor], Tensor] = CarryMerge.forward

    def _reads_carry(self, stage: str) -> bool:
        return stage == "butterfly" or (stage == "refine" and self.config.num_butterfly_layers > 0)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_lookup_parameters(self) -> int:
        """Of those, the rows that are looked up, which no product reads."""
        return sum(x.weight.numel() for x in (self.embed, self.ngram) if x is not None)

    def compile_layers(self) -> None:
        """Compile the parts of a layer once, for all layers and sequence lengths; for training on a GPU.

        Only `forward` and `loss` use them, with one graph for each number of characters in a batch.
        """
        from torch._dynamo import config

        # With and without carry, with and without gradients, for each number of rows: more than the usual 8.
        config.recompile_limit = max(64, config.recompile_limit)
        project = torch.compile(Layer._project, dynamic=False)
        finish = torch.compile(Layer._finish, dynamic=False)
        for layer in cast("list[Layer]", self.layers):
            layer.project, layer.finish = project, finish
        self._write = torch.compile(CarryWrite.forward, dynamic=False)
        self._merge = torch.compile(CarryMerge.forward, dynamic=False)

    def _embed(self, ids: Tensor, followers: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Integer ids (...) -> (..., d). followers: ids -> (..., F); None: those in whole texts (B, N)."""
        if ids.numel() == 0:
            raise ValueError("no characters: ids is empty")
        if ids.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(f"ids must be uint8, int32 or int64, not {ids.dtype}")
        ids = ids.long()
        x = F.embedding(ids, self.embed.weight)
        if self.ngram is not None:
            found = ngrams.followers(ids, self._contexts) if followers is None else followers(ids)
            first = torch.arange(0, len(self.ngram.weight), ngrams.NOTHING + 1, device=ids.device)
            rows = (found + first).flatten(0, -2)  # of one table, summed at once
            x = x + F.embedding_bag(rows, self.ngram.weight, mode="sum").view_as(x)
        return cast(Tensor, self.embed_norm(x.to(self.compute_dtype)))

    def _angles(self, position: int | Tensor, ids: Tensor) -> Angles | None:
        """By which `project` rotates the characters position.. of ids (B, T), or the next one, ids (B,)."""
        config, num_chars = self.config, ids.shape[1] if ids.ndim > 1 else 1
        return offset_angles(
            position, len(ids), num_chars, chunk_size=config.chunk_size, head_dim=config.head_dim,
            theta=config.rope_theta, dtype=self.compute_dtype, device=ids.device,
        )  # fmt: skip

    def _walk(
        self,
        x: Tensor,
        run_layer: Callable[[int, Tensor, Tensor | None], Tensor],
        run_merge: Callable[[int, int, Tensor], Tensor],
        run_write: Callable[[int, Tensor], Tensor],
        routes: Sequence[LayerRoute],
        scan: Tensor | None = None,
        finished: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Through the layers of `routes` with the carry: written as a pass starts, merged after each level.

        The first pass reads the scan in progress, later passes the finished scan of the pass before, and
        the refinement layers the last finished one. Both scans go in and come out.
        """
        for route in routes:
            if len(self.writes) and route.starts_pass:
                scan = run_write(route.pass_index, x)
            x = run_layer(route.index, x, scan if finished is None or route.pass_index == 0 else finished)
            if scan is not None and route.stage == "butterfly":
                scan = run_merge(route.index, route.index - self.config.num_local_layers, scan)
                if route.ends_pass:
                    finished = scan
        return x, scan, finished

    def _inputs_on_host(self) -> set[int]:
        """The layers whose inputs `recompute` sends to the host's memory."""
        movable = [r.index for r in self.routes if not (r.starts_pass and len(self.writes))]
        return set(movable[: self.recompute.on_host])

    def hidden(self, ids: Tensor, followers: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """ids (B, N) -> normalised hidden states (B, N, d) in the compute dtype.

        followers: ids -> (B, N, F), in place of what `ngrams.followers` finds.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids must be (batch, characters), not {tuple(ids.shape)}")
        config, backend = self.config, self.backend or default_backend(ids.device)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        first_whole = len(self.routes) - self.recompute.whole
        # Slices also bound the workspace of long texts that are only read; on a GPU few, each is launched.
        rows = self.recompute.slice_rows
        if not torch.is_grad_enabled():
            rows = max(rows, self.slice_chars(1))
        slicing = recompute or (not torch.is_grad_enabled() and ids.numel() > rows)

        angles = self._angles(0, ids)
        on_host = self._inputs_on_host() if recompute else set()
        projections = self.recompute.keep_projections
        kept: LayerInput | None = None

        def run_layer(index: int, x: Tensor, memory: Tensor | None) -> Tensor:
            nonlocal kept
            layer, stride = cast(Layer, self.layers[index]), self.routes[index].stride
            if on_host:
                kept = LayerInput(x, kept, index in on_host)
            if slicing and not (recompute and index >= first_whole):
                return recomputed_layer(layer, x, memory, angles, stride, backend, rows, kept, projections)
            return cast(Tensor, layer(x, memory, angles, stride, backend))

        def light(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            """`run`, of which only the inputs are kept where layers are recomputed."""
            return partial(checkpoint, run, **_CHECKPOINT) if recompute else run

        def merge(index: int, merge_index: int, scan: Tensor) -> Tensor:
            module, stride = cast(CarryMerge, self.merges[merge_index]), self.routes[index].stride
            if config.carry_heads and backend == "triton":
                return merge_heads_triton(
                    scan, module.bias, stride=stride, topology=config.routing, chunk_size=config.chunk_size
                )
            heads = config.carry_heads
            partner = partner_rows(scan, stride, config.routing, config.chunk_size, scores=heads)
            merged = self._merge(module, scan.flatten(0, 1), partner.flatten(0, 1))
            return merged.view(scan.shape)

        def write(index: int, x: Tensor) -> Tensor:
            module = cast(CarryWrite, self.writes[index])
            return self._write(module, x.flatten(0, 1)).view(*x.shape[:2], -1)

        walk = partial(self._walk, run_layer=run_layer, run_merge=light(merge), run_write=light(write))
        segments = self.recompute.segments(len(self.routes)) if recompute else [(0, len(self.routes))]
        state: tuple[Tensor, Tensor | None, Tensor | None] = self._embed(ids, followers), None, None
        for start, stop in segments:

            def run(
                x: Tensor, scan: Tensor | None, finished: Tensor | None, start: int = start, stop: int = stop
            ) -> tuple[Tensor, Tensor | None, Tensor | None]:
                return walk(x, routes=self.routes[start:stop], scan=scan, finished=finished)

            last = stop == len(self.routes)
            state = run(*state) if last else checkpoint(run, *state, **_CHECKPOINT)
        return cast(Tensor, self.norm(state[0]))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) integers, any N >= 1 -> logits (B, N, 256) float32."""
        return cast(Tensor, self.head(self.hidden(ids)).float())

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean next-character loss in nats; ids and targets (B, N), weights (B, N) or None."""
        flat = None if weights is None else weights.flatten()
        return linear_cross_entropy(self.hidden(ids).flatten(0, 1), self.head.weight, targets.flatten(), flat)

    def new_cache(
        self,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty stream state; ValueError with the estimate when memory cannot hold it.

        dtype: of the rings, None for the compute dtype. torch.int8 keeps finished chunks in 8 bits with a
        scale for each row.
        """
        device = self.embed.weight.device if device is None else device
        return Cache.new(self.config, batch_size, dtype or self.compute_dtype, device, self.compute_dtype)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, cache: Cache, *, progress: Callable[[int], None] | None = None) -> Tensor:
        """Append ids (B, T), T >= 1, to the stream -> logits (B, 256) float32 for the next character.

        Reads in slices of `prefill_slice` characters, so the workspace does not depend on T; None takes what
        suits the device and its free memory. `progress` is called with the characters of this call read so
        far.
        """
        if ids.ndim != 2 or ids.shape[0] != cache.batch_size:
            raise ValueError(
                f"ids {tuple(ids.shape)} must be ({cache.batch_size}, characters) for this cache"
            )
        if ids.shape[1] == 0:
            raise ValueError("no characters: ids is empty")
        if self._on_cpu_in_float32(cache):
            self._numpy_weights()  # before the first product: its bits must not depend on earlier steps
        size, done = self.slice_chars(cache.batch_size), 0
        while done < ids.shape[1]:
            # Slices end at multiples of their length, so that only the first and the last are ragged.
            count = size - cache.position % size
            part = ids[:, done : done + max(1, count)]
            x = self.append(part, cache)
            done += part.shape[1]
            if progress is not None:
                progress(done)
        cache.logits = cast(Tensor, self.head(self.norm(x[:, -1])).float())
        return cache.logits

    def slice_chars(self, batch_size: int) -> int:
        """Characters that `prefill` reads at once."""
        if self.prefill_slice is not None:
            return self.prefill_slice
        device = str(self.embed.weight.device)
        return prefill_slice(self.config, batch_size, self.compute_dtype.itemsize, device)

    def append(self, ids: Tensor, cache: Cache) -> Tensor:
        """Append ids (B, T) at once -> hidden states (B, T, d), before the last norm."""
        cache.begin()
        backend = self.backend or default_backend(ids.device)
        attend = prefill_attention_triton if backend == "triton" else prefill_attention
        angles = self._angles(cache.position, ids)
        known = partial(
            ngrams.followers, contexts=self._contexts, state=cache.ngrams, position=cache.position
        )
        x = self._embed(ids, known)
        x = self._stream(x, cache.position, cache.rings(), angles, attend, partner_rows_prefill, backend)
        cache.position += ids.shape[1]
        return x

    def _stream(
        self,
        x: Tensor,
        position: int | Tensor,
        rings: Sequence[tuple[Any, Any, Any]],
        angles: Angles | None,
        attend: Callable[..., Tensor],
        partner_of: Callable[..., Tensor],
        backend: Backend = "torch",
    ) -> Tensor:
        """Embedded characters x (B, T, d) or (B, d) of a stream through all layers, which keep its shape."""

        def run_layer(index: int, x: Tensor, memory: Tensor | None) -> Tensor:
            layer, stride = cast(Layer, self.layers[index]), self.routes[index].stride
            return layer.stream(x, memory, stride, rings[index][:2], position, angles, attend, backend)

        def run_merge(index: int, merge_index: int, scan: Tensor) -> Tensor:
            ring = rings[index][2]
            partner = partner_of(
                scan,
                ring,
                position=position,
                stride=self.routes[index].stride,
                topology=self.config.routing,
                scores=self.config.carry_heads,
            )
            module = cast(CarryMerge, self.merges[merge_index])
            lanes = scan.reshape(-1, scan.shape[-1]), partner.reshape(-1, scan.shape[-1])
            return self._merge(module, *lanes).view(scan.shape)

        def run_write(index: int, x: Tensor) -> Tensor:
            module = cast(CarryWrite, self.writes[index])
            return self._write(module, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

        return self._walk(x, run_layer, run_merge, run_write, self.routes)[0]

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """Append one character a stream: ids (B,) -> logits (B, 256) float32. Constant work and memory."""
        if ids.ndim != 1 or ids.shape[0] != cache.batch_size:
            raise ValueError(f"ids {tuple(ids.shape)} must be ({cache.batch_size},) for this cache")
        if len(ids) == 1 and self._on_cpu_in_float32(cache):
            return self.step_streams([int(ids)], [cache])
        cache.begin()
        angles = self._angles(cache.position, ids)
        x = self._embed_step(ids, torch.full_like(ids, cache.position, dtype=torch.int64), cache)
        x = self._stream(x, cache.position, cache.windows(), angles, step_attention, partner_row_step)
        cache.position += 1
        cache.logits = cast(Tensor, self.head(self.norm(x)).float())
        return cache.logits

    @torch.inference_mode()
    def step_each(
        self, ids: Tensor, positions: Tensor, cache: Cache, shares: list[Tensor] | None = None
    ) -> Tensor:
        """`step` for streams that stand apart: ids and positions (B,) int64 -> logits (B, 256) float32.

        The rings are whole, and the caller keeps the positions: `cache.position` is neither read nor changed.
        A stream may be stepped without going on: its next step or prefill overwrites what this one wrote.
        shares: gets (B,) for each layer, the part of the attention that goes to the own chunk.
        """
        if shares is None and (self.backend or default_backend(ids.device)) == "triton":
            attend: Callable[..., Tensor] = step_attention_triton
            angles = None  # the kernel rotates: launches are what a step costs
        else:
            attend = partial(step_attention_each, shares=shares)
            angles = self._angles(positions, ids)
        x = self._embed_step(ids, positions, cache)
        x = self._stream(x, positions, cache.windows(), angles, attend, partner_row_step_each)
        return cast(Tensor, self.head(self.norm(x)).float())

    def _embed_step(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """ids and positions (B,) -> (B, d); what followed is looked up and updated in the cache."""
        state = cache.ngrams
        return self._embed(ids, None if state is None else lambda ids: ngrams.step(ids, positions, state))

    def _on_cpu_in_float32(self, cache: Cache) -> bool:
        tensors = (self.head.weight, cache.keys[0])
        kinds = {(x.device.type, x.dtype) for x in tensors}
        return kinds == {("cpu", torch.float32)} and self.compute_dtype == torch.float32

    @torch.inference_mode()
    def step_streams(
        self,
        characters: Sequence[int],
        caches: Sequence[Cache],
        shares: Sequence[list[float]] | None = None,
    ) -> Tensor:
        """Append a character to each of B streams on the CPU in float32, caches of one stream each that may
        stand anywhere -> logits (B, 256). Weights are read once for all. shares: as in `numpy_step.step`.
        """
        for cache in caches:
            cache.begin()
        positions = [cache.position for cache in caches]
        arrays = [cache.arrays() for cache in caches]
        weights = self._numpy_weights()
        followers = [
            ngrams.step_numpy(character, cache.position, self._contexts, *cache.ngrams.arrays())
            for character, cache in zip(characters, caches, strict=True)
            if cache.ngrams is not None
        ]
        logits = torch.from_numpy(numpy_step.step(characters, positions, weights, arrays, shares, followers))
        for i, cache in enumerate(caches):
            cache.position += 1
            cache.logits = logits[i : i + 1]
        return logits

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Butterfly:
        self._numpy = None  # .to() and its kin give the parameters new memory
        return cast(Butterfly, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._numpy = None
        return super().load_state_dict(*args, **kwargs)

    def _numpy_weights(self) -> numpy_step.Weights:
        """Views of the parameters. The matrices are laid out input by output first, in place."""
        if self._numpy is not None:
            return self._numpy

        def matrix(linear: nn.Module) -> numpy_step.Array:
            weight = cast(Linear, linear).weight
            with torch.inference_mode(False):  # the model may be trained on
                weight.data = weight.data.t().contiguous().t()
            return vector(weight).T

        def vector(parameter: Tensor | nn.Module) -> numpy_step.Array:
            return cast(Tensor, parameter).detach().numpy()

        def merged(merge: CarryMerge) -> tuple[numpy_step.Array, ...]:
            return (vector(merge.bias),) if merge.heads else (matrix(merge.linear), vector(merge.linear.bias))

        config = self.config
        layers, merges = [], iter(self.merges)
        for route, module in zip(self.routes, self.layers, strict=True):
            layer = cast(Layer, module)
            attention = layer.attention
            write = merge = None
            if len(self.writes) and route.starts_pass:
                write = cast(CarryWrite, self.writes[route.pass_index])
            if len(self.merges) and route.stage == "butterfly":
                merge = cast(CarryMerge, next(merges))
            layers.append(
                numpy_step.LayerWeights(
                    attention_norm=vector(layer.attention_norm.weight),
                    qkv=matrix(attention.qkv),
                    q_norm=vector(attention.q_norm.weight),
                    k_norm=vector(attention.k_norm.weight),
                    out=matrix(attention.out),
                    feed_forward_norm=vector(layer.feed_forward_norm.weight),
                    up=matrix(layer.feed_forward.up),
                    down=matrix(layer.feed_forward.down),
                    local=layer.local,
                    read_norm=None if attention.read_norm is None else vector(attention.read_norm.weight),
                    read=None if attention.read is None else matrix(attention.read),
                    write=None
                    if write is None
                    else (vector(write.norm.weight), matrix(write.linear), vector(write.linear.bias)),
                    merge=None if merge is None else merged(merge),
                )
            )
        positions = torch.arange((2 + config.local_chunks) * config.chunk_size)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, torch.float32)
        self._numpy = numpy_step.Weights(
            routes=self.routes,
            layers=layers,
            embed=vector(self.embed.weight),
            ngram=None if self.ngram is None else vector(self.ngram.weight),
            embed_norm=vector(self.embed_norm.weight),
            norm=vector(self.norm.weight),
            head=matrix(self.head),
            rope=(vector(cos[:, 0]), vector(sin[:, 0])),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            chunk_size=config.chunk_size,
            topology=config.routing,
            gated=config.feed_forward == "swiglu",
            carry_heads=config.carry_heads,
            eps=config.norm_eps,
        )
        return self._numpy
