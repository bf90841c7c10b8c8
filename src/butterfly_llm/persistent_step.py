"""The step of one stream, all layers in one launch that stays on the GPU, for a decoder.

The weights are copies in the compute dtype, the gains of the norms multiplied in. What it computes is
`Butterfly.step_each`, to rounding: the values of the stream stay float32 between the products.

Shapes: d hidden size, H heads, K key-value heads, D head size, F feed-forward size, M carry size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from butterfly_llm.cache import Cache
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.ops.rope import rope_table
from butterfly_llm.ops.triton_ngrams import ngram_rows


def unsupported(config: ButterflyConfig, cache: Cache) -> str | None:
    """Why a model has no such step for a cache; None where it has."""
    if cache.batch_size > 1:
        return f"it steps one stream, not {cache.batch_size}"
    for name in ("hidden_size", "head_dim", "intermediate_size"):
        if getattr(config, name) % 16:
            return f"{name} {getattr(config, name)} is no multiple of 16"
    if config.carry_size % 8:
        return f"carry_size {config.carry_size} is no multiple of 8"
    for name in ("head_dim", "chunk_size"):
        size = getattr(config, name)
        if size & (size - 1):
            return f"{name} {size} is no power of two"
    if getattr(torch.version, "hip", None):
        return "its programs wait for each other in instructions that only NVIDIA's cards have"
    return None


def tiling(rows: int, programs: int, num_warps: int) -> tuple[int, int]:
    """(R, T): a program takes T tiles of R rows, such that all rows are taken.

    R is a power of two, where it can be the number of warps: a warp with whole rows adds them up alone. T
    is at most four, because the tiles of a program lie in its registers before their vector is there.
    """
    share = -(-rows // programs)
    size = num_warps
    while size * 4 < share:
        size *= 2
    return size, -(-share // size)


class PersistentStep:
    """`step_each` of a model for a cache of one stream, frozen: parameters that change later are not seen."""

    def __init__(
        self,
        model: Butterfly,
        cache: Cache,
        *,
        programs: int | None = None,
        num_warps: int | None = None,
    ) -> None:
        """programs and num_warps: None for what was quickest, see records/decode_h100.

        ValueError for what `unsupported` names.
        """
        config = model.config
        keys = cache.keys[0]
        reason = unsupported(config, cache)
        if reason is not None:
            raise ValueError(f"persistent step: {reason}")
        self.model, self.cache, self.config = model, cache, config
        wide = config.hidden_size > 512
        on_gpu = keys.device.type == "cuda"
        if programs is None and on_gpu:
            programs = torch.cuda.get_device_properties(keys.device).multi_processor_count
            programs = min(96, programs) if wide else programs
        self.programs = programs or 1
        self.num_warps = num_warps or (8 if wide else 4)
        self.embed = model.embed.weight.detach().to(model.compute_dtype).contiguous()
        self.ngram = None
        if model.ngram is not None:
            self.ngram = model.ngram.weight.detach().to(model.compute_dtype).contiguous()
        self.first = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self.weights = self._matrices()
        self.vectors = self._vectors()
        table, scans = self._table()
        self.table = table.to(keys.device)
        parts = 2 + config.local_chunks  # chunks that a character sees
        positions = torch.arange(parts * config.chunk_size)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, torch.float32)
        half = config.head_dim // 2
        self.turns = torch.stack([cos[:, 0, half:], sin[:, 0, half:]]).contiguous().to(keys.device)
        queries = config.num_heads * config.head_dim
        qkv = queries + 2 * config.num_kv_heads * config.head_dim
        layer = 2 * config.hidden_size + qkv + config.intermediate_size
        layer += parts * (queries + config.num_heads)
        words = (len(model.routes) + 1) * layer + scans * config.carry_width
        self.words = torch.full((2, words), -1, dtype=torch.int32, device=keys.device)
        self.launch = torch.zeros(1, dtype=torch.int32, device=keys.device)
        self.logits = torch.empty(1, config.vocab_size, dtype=torch.float32, device=keys.device)
        tiles = {}
        for name, rows in (
            ("QKV", qkv),
            ("OUT", config.hidden_size),
            ("UP", config.intermediate_size),
            ("DOWN", config.hidden_size),
        ):
            tiles[name + "_R"], tiles[name + "_T"] = tiling(rows, self.programs, self.num_warps)
        self.constants = tiles | {
            "WIDTH": config.hidden_size,
            "HEADS": config.num_heads,
            "KV_HEADS": config.num_kv_heads,
            "D": config.head_dim,
            "FF": config.intermediate_size,
            "CARRY": config.carry_size,
            "CARRY_HEADS": config.carry_heads if config.carry_size else 0,
            "CHUNK": config.chunk_size,
            "VOCAB": config.vocab_size,
            "GATED": config.feed_forward == "swiglu",
            "SHIFT": config.routing == "shift",
            "SCALE": config.head_dim**-0.5 * math.log2(math.e),
            "LOCAL": config.local_chunks,
            "COLUMNS": self.table.shape[1],
            "CARRY_R": 1 << (-(-max(config.carry_size, 1) // self.programs) - 1).bit_length(),
            "HEAD_R": 1 << (-(-config.vocab_size // self.programs) - 1).bit_length(),
            # Two wide layers fill the second cache: fetched ahead, they drive each other out.
            "FETCH": not wide and on_gpu and torch.cuda.get_device_capability(keys.device) >= (9, 0),
            "WAIT": on_gpu,
            "PAUSE": 0 if wide else 40,
            "THREADS": 32 * self.num_warps,
        }

    def _matrices(self) -> Tensor:
        """The head, then of each layer qkv, read, out, up, down and merge, then the carry's writes; flat."""
        config, weights = self.config, {name: p.detach().float() for name, p in self.model.named_parameters()}
        parts = [weights["head.weight"] * weights["norm.weight"]]
        zeros = parts[0].new_zeros
        read_rows = 2 * config.num_kv_heads * config.head_dim
        for route in self.model.routes:
            layer = f"layers.{route.index}."
            parts.append(weights[layer + "attention.qkv.weight"] * weights[layer + "attention_norm.weight"])
            if config.carry_size:
                read = weights.get(layer + "attention.read.weight")
                gain = weights.get(layer + "attention.read_norm.weight")
                if read is None:
                    read = zeros(read_rows, config.carry_size)
                parts.append(read if gain is None else read * gain)
            parts.append(weights[layer + "attention.out.weight"])
            parts.append(
                weights[layer + "feed_forward.up.weight"] * weights[layer + "feed_forward_norm.weight"]
            )
            parts.append(weights[layer + "feed_forward.down.weight"])
            if config.carry_size and not config.carry_heads:
                merge = weights.get(f"merges.{route.index - config.num_local_layers}.linear.weight")
                parts.append(zeros(config.carry_size, 2 * config.carry_size) if merge is None else merge)
        for i in range(len(self.model.writes)):
            parts.append(weights[f"writes.{i}.linear.weight"] * weights[f"writes.{i}.norm.weight"])
        return torch.cat([part.to(self.model.compute_dtype).flatten() for part in parts])

    def _vectors(self) -> Tensor:
        """float32: the embedding's gain; of a layer those of q, k and the merge's bias; biases of writes."""
        config, weights = self.config, {name: p.detach().float() for name, p in self.model.named_parameters()}
        parts = [weights["embed_norm.weight"]]
        for route in self.model.routes:
            attention = f"layers.{route.index}.attention."
            parts += [weights[attention + "q_norm.weight"], weights[attention + "k_norm.weight"]]
            if config.carry_size:
                name = "bias" if config.carry_heads else "linear.bias"
                bias = weights.get(f"merges.{route.index - config.num_local_layers}.{name}")
                size = config.carry_heads or config.carry_size
                parts.append(parts[0].new_zeros(size) if bias is None else bias)
        parts += [weights[f"writes.{i}.linear.bias"] for i in range(len(self.model.writes))]
        return torch.cat(parts)

    def _table(self) -> tuple[Tensor, int]:
        """A row of each layer, and how many scans there are: number 0 is empty, then in their order.

        From the first ring to those of keys, values and carry, in units of 16 elements; slots; stride; the
        scan that is read; the one that the merge gives, 0 for none; the pass that is written and its scan,
        0 for none; the local chunks; slots of the carry.
        """
        first = self.cache.keys[0]

        def place(ring: Tensor | None) -> int:
            return 0 if ring is None else (ring.data_ptr() - first.data_ptr()) // (16 * first.itemsize)

        rows, scans, finished = [], 1, 0
        has_carry = len(self.model.writes) > 0
        scan = 0
        for route in self.model.routes:
            keys, values, carry = self.cache.windows()[route.index]
            written = merged = read = 0
            if has_carry and route.starts_pass:
                written = scan = scans
                scans += 1
            if has_carry and self.model._reads_carry(route.stage):
                read = scan if finished == 0 or route.pass_index == 0 else finished
            if has_carry and route.stage == "butterfly":
                merged = scan = scans
                scans += 1
                if route.ends_pass:
                    finished = scan
            rows.append(
                [
                    *(place(ring) for ring in (keys, values, carry)),
                    keys.shape[-3],
                    min(route.stride, 1 << 30),
                    read,
                    merged,
                    max(route.pass_index, 0),
                    written,
                    self.config.local_of(route.index),
                    1 if carry is None else carry.shape[-3],
                ]
            )
        rows.append([0] * len(rows[0]))  # each layer loads the row of the next
        return torch.tensor(rows, dtype=torch.int64), scans

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions (1,) int64 -> logits (1, 256) float32; the rings of the cache are updated."""
        from butterfly_llm.ops.triton_persistent_kernel import persistent_kernel

        self.launch += 1
        embed, row = self.embed, ids
        if self.ngram is not None and self.cache.ngrams is not None:
            # The kernel takes a row of a table: here that of the only one, which is made just before.
            embed, row = ngram_rows(ids, positions, self.cache.ngrams, embed, self.ngram), self.first
        with torch.cuda.device_of(ids):  # type: ignore[no-untyped-call]
            persistent_kernel[(self.programs,)](
                row, positions, self.launch, self.table, self.weights, self.vectors, embed, self.turns,
                self.cache.keys[0], self.words, self.logits, len(self.model.routes), self.words.shape[1],
                self.config.norm_eps, **self.constants, num_warps=self.num_warps,
                launch_cooperative_grid=True,
            )  # fmt: skip
        return self.logits
