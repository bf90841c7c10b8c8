"""Write text with a model: prefill the prompt, then draw one character at a time.

    for piece in generate_text(model, b"def main(", sampling=SamplingConfig(seed=1), max_chars=200):
        print(piece, end="", flush=True)

Draws are made on the CPU in float64 from (seed, position) alone, so the same seed gives the same text
however the prompt was split over prefills and wherever the writing was interrupted and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from butterfly_llm.config import MAX_REPETITION_WINDOW, SamplingConfig
from butterfly_llm.text import Encoding, StreamDecoder, encode

if TYPE_CHECKING:
    from butterfly_llm.cache import Cache
    from butterfly_llm.model import Butterfly

Progress = Callable[[int], None]
Step = Callable[[Tensor], Tensor]
_RECENT = MAX_REPETITION_WINDOW


def generate(
    model: Butterfly,
    ids: Tensor | Sequence[int],
    *,
    sampling: SamplingConfig | None = None,
    max_chars: int,
    cache: Cache | None = None,
    stop: Sequence[bytes | str] = (),
    progress: Progress | None = None,
    step: Step | None = None,
) -> Iterator[int]:
    """Yield the ids (0 to 255) of new characters, one by one as they are drawn.

    ids:      the prompt, (T,) or (1, T), at least one character; read on the first `next()`. After a cache
              that has read something it may be empty.
    cache:    state to continue from; `ids` are appended to it. Whenever a character is yielded the cache
              has already read it, so another call can go on from there.
    stop:     strings (Latin-1, or bytes) that end the text. They are not yielded: characters that may be
              the beginning of one are held back until that is decided. After a stop string, the cache has
              read it too.
    progress: called with the number of prompt characters read so far.
    step:     appends ids (1,) to `cache` -> logits (1, 256); None for `model.step`. On a GPU the `step` of a
              `decode.Decoder` is many times as fast.

    ValueError, on the call itself, for an empty prompt, a bad id or stop string, a cache of several streams.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    prompt = _prompt(ids, may_be_empty=cache is not None and cache.logits is not None)
    stops = [encode(s, source="stop string") if isinstance(s, str) else bytes(s) for s in stop]
    if not all(stops):
        raise ValueError("generate: a stop string is empty")
    if max_chars < 0:
        raise ValueError(f"generate: max_chars must be 0 or above, not {max_chars}")
    if cache is None:
        cache = model.new_cache(1)
    elif cache.batch_size != 1:
        raise ValueError(f"generate: writes one stream, but the cache holds {cache.batch_size}")
    return _hold_back(_draw(model, prompt, sampling, max_chars, cache, progress, step), stops)


def generate_text(
    model: Butterfly,
    ids: Tensor | Sequence[int],
    *,
    encoding: Encoding = "latin-1",
    sampling: SamplingConfig | None = None,
    max_chars: int,
    cache: Cache | None = None,
    stop: Sequence[bytes | str] = (),
    progress: Progress | None = None,
    step: Step | None = None,
) -> Iterator[str]:
    """`generate`, decoded: yields pieces of text as soon as their characters are complete.

    With encoding "utf-8" one id is one byte: a piece appears when its last byte is drawn, and bytes that
    are not UTF-8 come out as U+FFFD.
    """
    stop = [encode(s, source="stop string", encoding=encoding) if isinstance(s, str) else s for s in stop]
    drawn = generate(
        model,
        ids,
        sampling=sampling,
        max_chars=max_chars,
        cache=cache,
        stop=stop,
        progress=progress,
        step=step,
    )
    return _decode(drawn, StreamDecoder(encoding))


def read(
    model: Butterfly, ids: Tensor | Sequence[int], cache: Cache, *, progress: Progress | None = None
) -> Tensor:
    """Append a text to the stream in `cache` -> logits (1, 256); `generate` then goes on from there.

    ids: (T,) or (1, T); T may be 0 where something was read before. Unlike `Butterfly.prefill` it keeps the
    last characters in `cache.recent`, for the repetition rules.
    """
    prompt = _prompt(ids, may_be_empty=cache.logits is not None)
    cache.recent = (cache.recent + bytes(prompt[0, -_RECENT:].tolist()))[-_RECENT:]
    if prompt.shape[1]:
        return model.prefill(prompt.to(_device(model)), cache, progress=progress)
    assert cache.logits is not None
    return cache.logits


def probabilities(logits: Tensor, recent: bytes, sampling: SamplingConfig) -> Tensor:
    """The distribution the next character is drawn from: logits (V,) -> float64 (V,) that sums to 1.

    `recent` are the last characters of the stream, prompt included; only the repetition rules read them.
    Temperature 0 gives one to the likeliest character, the lowest id among equals.
    """
    scores = logits.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("generate: the model's output is not finite; is the checkpoint damaged?")
    recent = recent[-sampling.repetition_window :]
    if sampling.repetition_penalty != 1 and recent:
        seen = torch.tensor(sorted(set(recent)))
        hit = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(hit > 0, hit / penalty, hit * penalty)
    banned = _repeats(recent, sampling.no_repeat_ngram)
    if banned and len(banned) < scores.numel():
        scores[sorted(banned)] = -torch.inf

    order = torch.sort(scores, descending=True, stable=True).indices  # (V,)
    if sampling.temperature == 0:
        keep = order[:1]
    elif sampling.top_k:
        keep = order[: sampling.top_k]
    else:
        keep = order
    shifted = scores[keep] - scores[order[0]]  # at most 0, so a tiny temperature cannot overflow
    weights = torch.softmax(shifted / max(sampling.temperature, 1e-12), dim=0)
    if sampling.top_p < 1:
        before = weights.cumsum(0) - weights
        weights = torch.where(before < sampling.top_p, weights, 0.0)
    result = torch.zeros_like(scores)
    result[keep] = weights / weights.sum()
    return result


def _draw(
    model: Butterfly,
    prompt: Tensor,
    sampling: SamplingConfig,
    max_chars: int,
    cache: Cache,
    progress: Progress | None,
    step: Step | None,
) -> Iterator[int]:
    """Prefill, then draw and step; a character is yielded after the model has read it."""
    logits = read(model, prompt, cache, progress=progress)  # (1, V)
    recent = bytearray(cache.recent)
    generator = torch.Generator(device="cpu")
    for _ in range(max_chars):
        weights = probabilities(logits[0], bytes(recent), sampling)
        generator.manual_seed(mix_seed(sampling.seed, cache.position))
        point = torch.rand((), generator=generator, dtype=torch.float64)
        character = pick(weights, point)
        recent.append(character)
        del recent[:-_RECENT]
        cache.recent = bytes(recent)
        ids = torch.tensor([character], device=logits.device)
        logits = model.step(ids, cache) if step is None else step(ids)
        yield character


def pick(weights: Tensor, point: Tensor) -> int:
    """The character at `point` (0 to below 1) of the cumulative distribution `weights` (V,)."""
    possible = weights.nonzero()[:, 0]
    cumulative = weights[possible].cumsum(0)
    index = torch.searchsorted(cumulative, point * cumulative[-1], right=True)
    return int(possible[index.clamp(max=len(possible) - 1)])  # rounding may reach the very end


def _hold_back(drawn: Iterator[int], stops: Sequence[bytes]) -> Iterator[int]:
    """Pass characters on up to the first stop string, keeping back what may be the beginning of one."""
    held = bytearray()
    for character in drawn:
        held.append(character)
        ended = [stop for stop in stops if held.endswith(stop)]
        if ended:
            yield from held[: len(held) - max(map(len, ended))]
            return
        keep = max((overlap(held, stop) for stop in stops), default=0)
        free = len(held) - keep
        yield from held[:free]
        del held[:free]
    yield from held


def overlap(text: bytearray, stop: bytes) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def _decode(drawn: Iterator[int], decoder: StreamDecoder) -> Iterator[str]:
    for character in drawn:
        if piece := decoder.push(character):
            yield piece
    if rest := decoder.finish():
        yield rest


def _repeats(recent: bytes, n: int) -> set[int]:
    """Characters that would complete an n-gram which `recent` already holds."""
    if n < 1 or len(recent) < n:
        return set()
    tail = recent[len(recent) - n + 1 :]
    found: set[int] = set()
    at = recent.find(tail)
    while at != -1 and at + len(tail) < len(recent):
        found.add(recent[at + len(tail)])
        at = recent.find(tail, at + 1)
    return found


def mix_seed(seed: int, position: int) -> int:
    """A 64-bit number that looks random in both arguments (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _prompt(ids: Tensor | Sequence[int], may_be_empty: bool = False) -> Tensor:
    """The prompt as int64 (1, T) on the CPU."""
    tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"generate: ids must be whole numbers, not {tensor.dtype}")
    tensor = tensor.detach().to("cpu", torch.int64)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or tensor.shape[0] != 1:
        raise ValueError(f"generate: ids must be (T,) or (1, T), not {tuple(tensor.shape)}")
    if tensor.shape[1] == 0 and may_be_empty:
        return tensor
    if tensor.shape[1] == 0:
        raise ValueError("generate: the prompt is empty; give at least one character to continue from")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high > 255:
        raise ValueError(f"generate: ids must be 0 to 255, found {low if low < 0 else high}")
    return tensor


def _device(model: Butterfly) -> torch.device:
    return next(model.parameters()).device
