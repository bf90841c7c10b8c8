"""Every setting of the project as frozen dataclasses, and the named presets."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Routing = Literal["shift", "xor", "xor_causal"]
FeedForward = Literal["relu2", "swiglu"]

VOCAB_SIZE = 256
MAX_REPETITION_WINDOW = 65_536
MAX_ORDER = 63  # of n-grams
MAX_WORDS, MAX_RANKS = 8, 4


@dataclass(frozen=True)
class ButterflyConfig:
    """Shape of a Butterfly model. `ButterflyConfig.preset(name)` gives the named ones."""

    hidden_size: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; must divide num_heads (grouped-query attention when fewer)."""
    head_dim: int = 64
    """Size of one head."""
    intermediate_size: int = 1024
    """Width of the feed-forward layer."""
    feed_forward: FeedForward = "relu2"
    """Squared ReLU, or gated SiLU."""
    num_local_layers: int = 4
    """Layers at the start that read the previous chunk."""
    num_passes: int = 5
    """Whole passes over all levels."""
    num_levels: int = 9
    """Levels in a pass: strides 1, 2, 4, ... 2**(num_levels-1) chunks. Independent of the input."""
    num_extra_levels: int = 0
    """Layers of one more, incomplete pass (13 levels in 45 layers: 3 passes and 6 extra)."""
    num_long_passes: int = 0
    """Of the whole passes, how many reach further: those before the last, which reads what they bring, or
    all."""
    num_long_levels: int = 0
    """Levels in each of them; 0 where there are none."""
    num_refine_layers: int = 4
    """Layers at the end that read the previous chunk."""
    local_chunks: int = 0
    """Chunks just before its own that each chunk reads beside its partner, in the layers of `local_of`."""
    local_every: int = 1
    """Every so many layers one reads `local_chunks`, beginning with layer local_every - 1; 1: all do."""
    chunk_size: int = 128
    """Characters in a chunk."""
    carry_size: int = 64
    """Width of the carry, the memory stream that rides the routing; 0 switches it off."""
    carry_heads: int = 0
    """Parts of the carry that each keep a mean of what their lane has heard, by the softmax of its scores;
    0: a gated sum."""
    routing: Routing = "shift"
    """Partner rule: shift (causal), xor (bidirectional encoder), xor_causal (ablation)."""
    rope_theta: float | None = 10000.0
    """Base of the rotary positions inside a chunk pair; None for no rotation."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    vocab_size: int = VOCAB_SIZE
    """Latin-1: one character, one token."""
    ngram_orders: tuple[int, ...] = ()
    """Numbers n, rising, at most 63: an input of each character is what followed the last n characters when
    they stood before, for each n. Empty: no such input."""
    ngram_words: int = 0
    """Likewise what followed the token so far, alone and behind the same one, two .. words whatever stood
    between them: so many inputs, at most 8."""
    ngram_ranks: int = 1
    """What followed the latest so many of these places, at most 4, each an input."""
    ngram_slots: int = 2**21
    """Places that a stream keeps for each of these n and words, 4 bytes each, 8 where there are more ranks; a
    power of two."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            if whole and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"config: {field.name} must be a whole number, not {value!r}")
            lowest = 0 if field.name in _MAY_BE_ZERO else 1
            if whole and value < lowest:
                raise ValueError(f"config: {field.name} must be at least {lowest}, not {value}")
            if whole and value > _MAX_SIZE and field.name != "ngram_slots":
                raise ValueError(f"config: {field.name} must be at most {_MAX_SIZE}, not {value:.6g}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} must be even for rotary positions")
        if self.num_extra_levels >= self.num_levels:
            raise ValueError(
                f"config: num_extra_levels {self.num_extra_levels} must be below num_levels "
                f"{self.num_levels}: raise num_passes instead"
            )
        if self.carry_heads and self.carry_size % self.carry_heads:
            raise ValueError(
                f"config: carry_heads {self.carry_heads} must divide carry_size {self.carry_size}"
            )
        if self.num_long_passes > self.num_passes:
            raise ValueError(
                f"config: num_long_passes {self.num_long_passes} is above num_passes {self.num_passes}"
            )
        least = self.num_levels + 1 if self.num_long_passes else 0
        if self.num_long_levels < least or (self.num_long_levels and not self.num_long_passes):
            raise ValueError(
                f"config: {self.num_long_passes} long passes of {self.num_long_levels} levels: give both 0, "
                f"or more levels than num_levels {self.num_levels}"
            )
        if self.local_chunks > _MAX_LOCAL or (self.local_chunks and self.routing == "xor"):
            raise ValueError(
                f"config: local_chunks {self.local_chunks} must be at most {_MAX_LOCAL}, 0 for routing xor"
            )
        if self.local_every > 1 and not self.local_chunks:
            raise ValueError(f"config: local_every {self.local_every} must be 1 without local_chunks")
        object.__setattr__(self, "ngram_orders", _orders(self.ngram_orders))
        if self.ngram_words > MAX_WORDS:
            raise ValueError(f"config: ngram_words {self.ngram_words} must be at most {MAX_WORDS}")
        if self.ngram_ranks > (MAX_RANKS if self.num_contexts else 1):
            raise ValueError(
                f"config: ngram_ranks {self.ngram_ranks} must be at most {MAX_RANKS}, "
                "1 without ngram_orders and ngram_words"
            )
        if self.ngram_slots & (self.ngram_slots - 1) or not 16 <= self.ngram_slots <= 2**22:
            raise ValueError(
                f"config: ngram_slots {self.ngram_slots} must be a power of two from 16 to {2**22}"
            )
        if self.num_contexts and self.routing == "xor":
            name = "ngram_orders" if self.ngram_orders else "ngram_words"
            raise ValueError(f"config: {name} must be empty for routing xor, which reads both ways")
        if self.max_levels > 24:
            raise ValueError(f"config: {self.max_levels} levels are above 24 (2 billion characters)")
        if not 1 <= self.num_layers <= _MAX_LAYERS:
            raise ValueError(f"config: the model has {self.num_layers} layers; give 1 to {_MAX_LAYERS}")
        if self.local_every > self.num_layers:
            raise ValueError(
                f"config: local_every {self.local_every} is above the model's {self.num_layers} layers"
            )
        if self.routing not in ("shift", "xor", "xor_causal"):
            raise ValueError(f"config: routing must be shift, xor or xor_causal, not {self.routing!r}")
        if self.feed_forward not in ("relu2", "swiglu"):
            raise ValueError(f"config: feed_forward must be relu2 or swiglu, not {self.feed_forward!r}")
        if self.rope_theta is not None and not (
            isinstance(self.rope_theta, (int, float)) and 0 < self.rope_theta <= 1e18
        ):
            raise ValueError(
                f"config: rope_theta must be from 0 to 1e18 or null, not {self.rope_theta!r:.40}"
            )
        if not isinstance(self.norm_eps, (int, float)) or not 0 < self.norm_eps <= 1:
            raise ValueError(f"config: norm_eps must be above 0 and at most 1, not {self.norm_eps!r:.40}")

    @property
    def max_levels(self) -> int:
        """Of the longest pass."""
        return max(self.num_levels, self.num_long_levels)

    @property
    def pass_levels(self) -> tuple[int, ...]:
        """Levels of each whole pass."""
        last = self.num_passes if self.num_long_passes == self.num_passes else self.num_passes - 1
        long = range(last - self.num_long_passes, last)
        return tuple(self.num_long_levels if i in long else self.num_levels for i in range(self.num_passes))

    @property
    def num_butterfly_layers(self) -> int:
        return sum(self.pass_levels) + self.num_extra_levels

    @property
    def num_layers(self) -> int:
        return self.num_local_layers + self.num_butterfly_layers + self.num_refine_layers

    def local_of(self, index: int) -> int:
        """Chunks just before its own that a chunk reads in layer `index` of the model."""
        return self.local_chunks if index % self.local_every == self.local_every - 1 else 0

    @property
    def num_contexts(self) -> int:
        """Of how many contexts each character is told what followed them."""
        return len(self.ngram_orders) + self.ngram_words

    @property
    def carry_width(self) -> int:
        """Numbers in a row of the carry, scores included."""
        return self.carry_size + (self.carry_heads if self.carry_size else 0)

    @property
    def causal(self) -> bool:
        return self.routing != "xor"

    @property
    def reach_chars(self) -> int:
        """Characters that the longest pass connects: chunk_size * 2**max_levels."""
        return self.chunk_size << self.max_levels

    def with_levels(self, num_levels: int) -> ButterflyConfig:
        """Passes of `num_levels` in as many layers, the last one incomplete; for a new training."""
        passes, extra = divmod(self.num_butterfly_layers, num_levels)
        return dataclasses.replace(
            self, num_passes=passes, num_levels=num_levels, num_extra_levels=extra, num_long_passes=0,
            num_long_levels=0,
        )  # fmt: skip

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ButterflyConfig:
        """A named config, with optional changed fields. ValueError names the presets there are."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown preset {name!r}{hint}: there are {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return dataclasses.asdict(self) | {"ngram_orders": list(self.ngram_orders)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ButterflyConfig:
        """The inverse of `to_dict`; ValueError names an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"config: unknown field {key!r}{hint}")
        return cls(**values)


def _orders(orders: Any) -> tuple[int, ...]:
    """`ButterflyConfig.ngram_orders` from any sequence, checked."""
    found = tuple(orders) if isinstance(orders, (list, tuple)) else (None,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_ORDER for n in found) or (
        found != tuple(sorted(set(found)))
    ):
        raise ValueError(
            f"config: ngram_orders must be rising whole numbers from 1 to {MAX_ORDER}, not {orders!r:.80}"
        )
    return found


# Far beyond any model, and small enough that refusing one takes neither time nor memory.
_MAX_SIZE = 2**20
_MAX_LAYERS = 512
_MAX_LOCAL = 64
_MAY_BE_ZERO = frozenset({
    "num_local_layers", "num_passes", "num_extra_levels", "num_long_passes", "num_long_levels",
    "num_refine_layers", "local_chunks", "carry_size", "carry_heads", "ngram_words",
})  # fmt: skip

_TOLD: dict[str, Any] = {"ngram_orders": (3, 4, 6, 8, 12, 16, 24), "ngram_words": 3, "ngram_ranks": 3}
PRESETS: dict[str, ButterflyConfig] = {
    # 53 layers, about 375M parameters and the carry
    "full": ButterflyConfig(
        hidden_size=768, num_heads=12, num_kv_heads=12, intermediate_size=3072, carry_size=192, carry_heads=4,
        **_TOLD,
    ),
    # 53 layers; the one that ships trained is told of n-grams alone, one rank of them
    "small": ButterflyConfig(carry_heads=4, **_TOLD),
    # 11 layers, reaches 16k characters: minutes of training on a laptop
    "tiny": ButterflyConfig(
        hidden_size=128, num_heads=4, num_kv_heads=4, head_dim=32, intermediate_size=512, carry_size=32,
        carry_heads=4, num_local_layers=2, num_passes=1, num_levels=7, num_refine_layers=2,
        ngram_slots=2**18, **_TOLD,
    ),
    # 8 layers on chunks of 16, for tests
    "micro": ButterflyConfig(
        hidden_size=64, num_heads=2, num_kv_heads=2, head_dim=32, intermediate_size=192, carry_size=16,
        carry_heads=4, num_local_layers=1, num_passes=2, num_levels=3, num_refine_layers=1, chunk_size=16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """How the next character is drawn. Applied in this order: repetition, temperature, top-k, top-p."""

    temperature: float = 0.8
    """Sharpness of the draw: 1 is the model's own distribution, 0 always takes the likeliest character."""
    top_k: int = 0
    """Draw from the k likeliest characters only; 0 for all."""
    top_p: float = 1.0
    """Draw from the smallest set of characters that together have this probability; 1 for all."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of recent characters; 1 switches it off."""
    no_repeat_ngram: int = 0
    """Never write the same n characters twice within the repetition window; 0 switches it off."""
    repetition_window: int = 1024
    """Characters of the recent past, prompt included, that the two repetition rules look at; up to 65,536."""
    seed: int = 0
    """Same seed, same text: the draw at a position depends on nothing but the seed and the position."""

    def __post_init__(self) -> None:
        for name, lowest in (
            ("top_k", 0), ("no_repeat_ngram", 0), ("repetition_window", 1), ("seed", 0)
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"sampling: {name} must be a whole number from {lowest} up, not {value!r}")
        if self.repetition_window > MAX_REPETITION_WINDOW:
            raise ValueError(
                f"sampling: repetition_window must be at most {MAX_REPETITION_WINDOW}, "
                f"not {self.repetition_window}"
            )
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"sampling: {name} must be a number, not {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling: temperature must be 0 or above, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be above 0 and at most 1, not {self.top_p!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"sampling: repetition_penalty must be above 0, not {self.repetition_penalty!r}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, on one device or on one for each process. All that is random follows from `seed`."""

    corpus: str = "corpus"
    """Folder written by `butterfly prepare`."""
    out: str = "runs/butterfly"
    """Folder for checkpoints, metrics.jsonl and the finished model."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in `out`, if any. never: start anew, refused where there
    is one. Anything else: the checkpoint folder to go on from."""
    init: str = ""
    """Model folder whose weights a new run starts from; optimisers and schedule start anew. Empty for random
    weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, each process of torchrun its own."""
    seed: int = 0
    """Weights, order of the text and samples follow from it."""

    steps: int = 1000
    """Optimiser steps in the run; with max_seconds an upper limit."""
    max_seconds: float | None = None
    """Wall-clock budget of the run over all its restarts, seconds. Progress is then the larger of
    step / steps and elapsed time / budget, and learning rate and length follow progress."""
    finish_seconds: float = 20.0
    """Part of max_seconds kept back for the last validation and the last checkpoint, seconds."""
    batch_chars: int = 65_536
    """Characters in one optimiser step, of all processes together."""
    micro_chars: int = 0
    """Characters in one forward and backward pass (at least one window); 0 for the whole batch."""
    lengths: tuple[tuple[float, int], ...] = ((1.0, 4096),)
    """Stages (until which progress, window length in characters). A batch keeps its characters: windows
    four times as long are four times fewer."""

    recall_share: float = 0.0
    """Share of the windows into which facts and questions about them are planted, at growing distances."""
    recall_weight: float = 10.0
    """Weight in the loss of the two characters of an answer, of more ones together as much; others have 1."""
    recall_long_share: float = 0.0
    """Share of these windows whose answers have 4 to 32 hexadecimal digits."""
    recall_reworded_share: float = 0.0
    """Share of the questions that are asked in other characters than the fact, which no n-gram finds."""
    recall_full_at: float = 0.6
    """Progress (0 to 1) by which the distances have grown to the longest window. 0: from the first step, for
    a run that goes on from a model which finds facts already."""

    learning_rate: float = 2e-3
    """Peak learning rate of both optimisers (Muon's updates are scaled to the size of AdamW's)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Form of the decay after the constant part."""
    decay_from: float = 0.0
    """Progress (0 to below 1) at which the decay begins."""
    final_rate: float = 0.02
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices in the layers; embedding, head and vectors have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    spike_bits: float = 3.0
    """A step whose loss is this many bits per character above the running mean changes nothing, as one whose
    loss or gradient is not finite; 0 lets every finite loss pass."""
    max_bad_steps: int = 10
    """Stop after this many such steps in a row."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations; weights are always kept in float32. auto: bfloat16 on a GPU, else float32."""
    compile: bool = False
    """Compile the layers (slow first steps, then faster)."""
    gradient_checkpointing: Literal["auto", "none", "layer", "offload", "nested"] = "auto"
    """What the backward pass recomputes to save memory. none: nothing. layer: each layer from its input, a
    third more work. offload: the same, the inputs that do not fit in the host's memory. nested: not all the
    inputs are kept either, up to two thirds more. auto: the first that fits, offload on a GPU alone."""
    deterministic: bool = False
    """Use deterministic kernels only; refuses operations that have none."""
    cuda_graph: bool = True
    """On a GPU: replay forward and backward pass as one CUDA graph, captured for each window length; not
    where inputs go to the host's memory (gradient_checkpointing offload)."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl; each one waits for the device."""
    val_every: int = 0
    """Steps between validations; 0 for one at the end."""
    val_length: int = 0
    """Window length of the validation, characters; 0 for the longest in `lengths`."""
    val_chars: int = 1_048_576
    """Characters of the validation split that are read."""
    sample_every: int = 0
    """Steps between samples of text; 0 for none."""
    sample_chars: int = 200
    """Characters in a sample."""
    sample_prompt: str = "\n"
    """Text that a sample continues."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 to leave it to checkpoint_minutes."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; 0 to leave it to checkpoint_every. There is always one at the end."""
    keep: int = 2
    """Checkpoints that are kept."""
    export: str = ""
    """Folder for the model in 8 bits, renewed with every checkpoint: small enough to be copied off a machine
    that may vanish. Empty for none."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where the figures go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, lowest in _TRAIN_WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"train: {name} must be a whole number from {lowest} up, not {value!r}")
        for name, (low, high) in _TRAIN_RANGES.items():
            value = getattr(self, name)
            if name == "max_seconds" and value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"train: {name} must be a number from {low:g} to {high:g}, not {value!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("bool", "str") and type(value).__name__ != field.type:
                raise ValueError(f"train: {field.name} must be a {field.type}, not {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"train: seed must be below 2**63, not {self.seed}")
        mode: Any = self.gradient_checkpointing
        if isinstance(mode, bool):  # as earlier versions wrote it
            object.__setattr__(self, "gradient_checkpointing", "layer" if mode else "none")
        elif mode not in ("auto", "none", "layer", "offload", "nested"):
            raise ValueError(
                f"train: gradient_checkpointing must be auto, none, layer, offload or nested, not {mode!r}"
            )
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f"train: decay must be cosine or linear, not {self.decay!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"train: precision must be auto, float32 or bfloat16, not {self.precision!r}")
        if self.track not in ("none", "tensorboard", "trackio", "wandb"):
            raise ValueError(f"train: track must be none, tensorboard, trackio or wandb, not {self.track!r}")
        if self.max_seconds is not None and self.max_seconds <= self.finish_seconds:
            raise ValueError(
                f"train: max_seconds {self.max_seconds:g} is not above finish_seconds {self.finish_seconds:g}"
            )
        if not self.sample_prompt:
            raise ValueError("train: sample_prompt must not be empty")
        object.__setattr__(self, "lengths", _stages(self.lengths))
        for _, length in self.lengths:
            if self.batch_chars % length:
                raise ValueError(
                    f"train: length {length} does not divide batch_chars {self.batch_chars}: no whole windows"
                )
            if self.windows(length) % self.micro_windows(length) or self.micro_chars % min(
                length, self.micro_chars or length
            ):
                raise ValueError(
                    f"train: micro_chars {self.micro_chars} does not cut batch_chars {self.batch_chars} into "
                    f"equal parts of whole windows of length {length}"
                )

    def windows(self, length: int) -> int:
        """Windows of `length` characters in one optimiser step."""
        return self.batch_chars // length

    def micro_windows(self, length: int, processes: int = 1) -> int:
        """Windows of `length` characters in one forward and backward pass of each of `processes`."""
        return max(1, min(self.micro_chars or self.batch_chars, self.batch_chars // processes) // length)

    def require_shares(self, processes: int) -> None:
        """ValueError where the windows of a step are not as many equal passes for each of `processes`."""
        for _, length in self.lengths:
            windows, pass_windows = self.windows(length), self.micro_windows(length, processes)
            if windows % (processes * pass_windows):
                raise ValueError(
                    f"train: a step has {windows} windows of length {length}, which {processes} processes "
                    f"cannot share evenly {pass_windows} at a time: change batch_chars, micro_chars, lengths "
                    "or the number of processes"
                )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`, JSON and TOML lists allowed; ValueError names an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"train: unknown field {key!r}{hint}")
        return cls(**values)


def _stages(lengths: Any) -> tuple[tuple[float, int], ...]:
    """`TrainConfig.lengths` from any nested sequence, checked."""
    try:
        stages = tuple((float(until), length) for until, length in lengths)
    except (TypeError, ValueError):
        raise ValueError(f"train: lengths must be pairs (until progress, length), not {lengths!r}") from None
    borders = [until for until, _ in stages]
    if not stages or borders[-1] != 1.0 or borders != sorted(set(borders)) or borders[0] <= 0:
        raise ValueError(f"train: the borders of lengths must rise to 1, not {borders}")
    for _, length in stages:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"train: a window length must be a whole number from 1 up, not {length!r}")
    return stages


_TRAIN_WHOLE = {
    "seed": 0, "steps": 1, "batch_chars": 1, "micro_chars": 0, "warmup_steps": 0, "max_bad_steps": 1,
    "log_every": 1, "val_every": 0, "val_length": 0, "val_chars": 1, "sample_every": 0, "sample_chars": 1,
    "checkpoint_every": 0, "keep": 1,
}  # fmt: skip
_TRAIN_RANGES = {
    "max_seconds": (0.0, 1e18), "finish_seconds": (0.0, 1e18),
    "learning_rate": (0.0, 1e18), "decay_from": (0.0, 0.99), "final_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1e18), "clip_norm": (1e-12, 1e18), "spike_bits": (0.0, 1e18),
    "checkpoint_minutes": (0.0, 1e18), "recall_share": (0.0, 1.0), "recall_weight": (1e-6, 1e6),
    "recall_full_at": (0.0, 1.0), "recall_long_share": (0.0, 1.0),
    "recall_reworded_share": (0.0, 1.0),
}  # fmt: skip
