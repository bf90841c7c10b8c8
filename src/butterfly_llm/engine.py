"""Many streams on one model: one thread reads prompts in slices and writes every stream a character a turn.

    with Engine(stepper_for(model, 8), slots=8) as engine:
        stream = engine.submit(Job(prompt=b"def ", max_chars=100), print)

All streams that write take one step together; between two steps a slice of one prompt is read. Slices end at
fixed positions and draws follow from (seed, position), so a stream depends on the others by the rounding of
sums alone, and a turn only decides when it goes on.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from butterfly_llm import memory
from butterfly_llm.cache import Cache
from butterfly_llm.config import SamplingConfig
from butterfly_llm.generate import mix_seed, overlap, pick, probabilities
from butterfly_llm.metrics import Counters
from butterfly_llm.slots import MEMORY_ADVICE, Stepper

Reason = Literal["stop", "length", "context", "cancelled"]
_log = logging.getLogger("butterfly_llm.engine")


class Busy(Exception):
    """No slot is free for another stream."""


class Full(Exception):
    """No further context can be kept."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probabilities under the model itself, before temperature and top-p."""

    character: int
    value: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Read:
    """So many characters of the prompt are read. The first one, with 0: the stream has its state."""

    done: int
    total: int
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """New characters, with one Logprob each where the job asks for them."""

    characters: bytes
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """Where the character at `position` listened, if the job asks: per layer the share of its own chunk."""

    position: int
    own: tuple[float, ...]
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream that did not fail; `drawn` characters, a stop string included."""

    reason: Reason
    drawn: int
    context: Context | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a stream that did: 503 out of memory, 500 anything else."""

    status: int
    message: str


Event = Read | Written | Heard | Finished | Failed


@dataclass(frozen=True)
class Context:
    """A text that has been read, to be continued any number of times."""

    id: str
    cache: Cache
    created: int  # seconds since 1970

    @property
    def characters(self) -> int:
        return self.cache.position


@dataclass(frozen=True)
class Job:
    """What one stream shall do: read `prompt` after `base`, then write, or `keep` the state as a context."""

    prompt: bytes
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_chars: int = 0
    stop: tuple[bytes, ...] = ()
    top_logprobs: int | None = None
    base: Context | None = None
    keep: bool = False
    attention: bool = False  # a Heard after each character

    def __post_init__(self) -> None:
        if not self.prompt and self.base is None:
            raise ValueError("the prompt is empty; give at least one character to continue from")
        if not all(self.stop):
            raise ValueError("a stop string is empty")
        if self.max_chars < 0:
            raise ValueError(f"max_chars must be 0 or above, not {self.max_chars}")


@dataclass(eq=False)
class Stream:
    """A job under way. The engine's thread owns it; others call `cancel` and count up `consumed`."""

    job: Job
    notify: Callable[[Event], None]
    cancelled: bool = False
    consumed: int = 0  # events that the receiver is done with
    produced: int = 0
    cache: Cache | None = None
    logits: Tensor | None = None  # (1, V) for the next character, once the prompt is read
    read: int = 0
    drawn: int = 0
    turn: int = 0  # when it last read a slice
    moved: float = field(default_factory=time.monotonic)  # when it last could go on
    held: bytearray = field(default_factory=bytearray)  # may be the beginning of a stop string
    held_logprobs: list[Logprob] = field(default_factory=list)

    def cancel(self) -> None:
        """End it before the engine's next turn; its state is freed then."""
        self.cancelled = True


class Engine:
    """Steps up to `slots` streams together and keeps up to `contexts` states.

    slice_chars:   characters of a prompt read at a time, between two turns of the writing streams.
    backlog:       events a receiver may leave waiting before its stream pauses.
    stall_seconds: how long a stream may be paused before it is cancelled.
    """

    def __init__(
        self,
        stepper: Stepper,
        *,
        slots: int = 8,
        contexts: int = 4,
        slice_chars: int = 128,
        backlog: int = 256,
        stall_seconds: float = 60.0,
    ) -> None:
        if min(slots, slice_chars, backlog) < 1 or contexts < 0:
            raise ValueError("engine: slots, slice_chars and backlog must be at least 1, contexts at least 0")
        self.stepper = stepper
        self.slots = slots
        self.max_contexts = contexts
        self.slice_chars = slice_chars
        self.backlog = backlog
        self.stall_seconds = stall_seconds
        self.counters = Counters()
        self.contexts: dict[str, Context] = {}
        self._streams: list[Stream] = []
        self._wake = threading.Condition()
        self._closing = False
        self._loading = 0  # contexts on their way from disk
        self._next_slice = 0.0
        self._turns = 0
        self._generator = torch.Generator(device="cpu")
        self._thread = threading.Thread(target=self._run, name="butterfly-engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Cancel all streams and take no more."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._streams)

    @property
    def waiting(self) -> int:
        """Streams whose prompt is not read yet."""
        return sum(stream.logits is None for stream in list(self._streams))

    def state_bytes(self) -> int:
        """Bytes that streams and contexts have written to so far."""
        return sum(self.used_bytes(cache) for cache in self._caches())

    def used_bytes(self, cache: Cache) -> int:
        """Bytes of a state that are committed: of the rings on a CPU, the chunks met so far."""
        if cache.keys[0].device.type != "cpu":
            return cache.nbytes
        if cache.paged is not None:
            return cache.held_nbytes
        return sum(ring.nbytes for name, ring in cache.filled() if name != "logits")

    def submit(self, job: Job, notify: Callable[[Event], None]) -> Stream:
        """Begin a job. `notify` is called on the engine's thread with every event, and must not block.

        Busy when no slot is free, Full when the job wants to keep one context too many.
        """
        stream = Stream(job, notify)
        with self._wake:
            if self._closing or len(self._streams) >= self.slots:
                raise Busy
            if job.keep:
                self._require_room()
            self._streams.append(stream)
            self._wake.notify()
        return stream

    def adopt(self, name: str, load: Callable[[], Cache]) -> Context:
        """Keep the state that `load` gives as a context; one of that name already here is it.

        Runs on the caller's thread. Full as for `submit`; MemoryError when it does not fit.
        """
        with self._wake:
            if name in self.contexts:
                return self.contexts[name]
            self._require_room()
            self._loading += 1
        try:
            self._require_memory()
            context = Context(name, load(), int(time.time()))
            with self._wake:
                return self.contexts.setdefault(name, context)
        finally:
            with self._wake:
                self._loading -= 1

    def _require_room(self) -> None:
        """Full unless one more context may be kept; called under the lock."""
        reading = sum(stream.job.keep for stream in self._streams)
        if len(self.contexts) + self._loading + reading >= self.max_contexts:
            raise Full

    def forget(self, name: str) -> bool:
        """Drop a context; streams that began from it go on."""
        with self._wake:
            return self.contexts.pop(name, None) is not None

    def _caches(self) -> list[Cache]:
        with self._wake:
            states = [stream.cache for stream in self._streams]
            return [c for c in states if c is not None] + [c.cache for c in self.contexts.values()]

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._streams and not self._closing:
                    self._wake.wait()
                streams, closing = list(self._streams), self._closing
            if closing:
                for stream in streams:
                    self._end(stream, Finished("cancelled", stream.drawn))
                return
            idle = not self._turn(streams)
            del streams  # while waiting, hold on to no job's context
            if idle:
                with self._wake:
                    self._wake.wait(0.02)  # all receivers are behind

    def _turn(self, streams: list[Stream]) -> bool:
        """Every writing stream one character, and a slice of one prompt; False if there was nothing to do.

        While streams write, reading takes at most half of the time.
        """
        writing, reading = [], []
        for stream in streams:
            if stream.cancelled or self._stalled(stream):
                self._end(stream, Finished("cancelled", stream.drawn))
            elif stream.logits is None:
                reading.append(stream)
            elif stream.produced - stream.consumed < self.backlog:
                writing.append(stream)
        if writing:
            self._write(writing)
        now = time.monotonic()
        if reading and (not writing or now >= self._next_slice):
            stream = min(reading, key=lambda each: each.turn)
            self._turns += 1
            stream.turn = self._turns
            try:
                self._read(stream)
            except Exception as error:
                self._fail(stream, error)
            after = time.monotonic()
            self.counters.reading_seconds += after - now
            self._next_slice = after + (after - now)
        return bool(writing or reading)

    def _stalled(self, stream: Stream) -> bool:
        now = time.monotonic()
        if stream.produced - stream.consumed < self.backlog:
            stream.moved = now
        return now - stream.moved > self.stall_seconds

    def _read(self, stream: Stream) -> None:
        """The next slice of the prompt; slices end at multiples of `slice_chars`."""
        job = stream.job
        if stream.cache is None:
            stream.cache = self._state(job)
            self._emit(stream, Read(0, len(job.prompt), self.used_bytes(stream.cache)))
        cache = stream.cache
        logits = None if job.base is None else job.base.cache.logits
        if stream.read < len(job.prompt):
            count = self.slice_chars - cache.position % self.slice_chars
            piece = job.prompt[stream.read : stream.read + count]
            logits = self.stepper.read(piece, cache)
            stream.read += len(piece)
            self.counters.read += len(piece)
            self._emit(stream, Read(stream.read, len(job.prompt), self.used_bytes(cache)))
        if stream.read < len(job.prompt):
            return
        assert logits is not None
        cache.logits = stream.logits = logits
        if job.keep:
            before = b"" if job.base is None else job.base.cache.recent
            cache.recent = (before + job.prompt)[-job.sampling.repetition_window :]
            context = Context(f"ctx-{secrets.token_hex(8)}", cache, int(time.time()))
            with self._wake:
                if not stream.cancelled:
                    self.contexts[context.id] = context
            self._end(stream, Finished("context", 0, context))
        elif job.max_chars == 0:
            self._end(stream, Finished("length", 0))

    def _growth(self) -> int:
        """Bytes that the states here will still claim."""
        return sum(cache.nbytes - self.used_bytes(cache) for cache in self._caches())

    def _require_memory(self) -> None:
        nbytes, device = self.stepper.nbytes + self._growth(), str(self.stepper.device)
        try:
            memory.require(nbytes, device, "one more context", MEMORY_ADVICE)
        except ValueError as error:
            raise MemoryError(str(error)) from None

    def _state(self, job: Job) -> Cache:
        """A state to begin with; MemoryError unless it and all others can grow to full size."""
        base = None if job.base is None else job.base.cache
        try:
            return self.stepper.fresh(base, keep=job.keep, reserved=self._growth())
        except ValueError as error:
            raise MemoryError(str(error)) from None

    def _write(self, streams: list[Stream]) -> None:
        """One character for each of the streams."""
        started = time.monotonic()
        going: list[tuple[Stream, Cache, int]] = []
        for stream in streams:
            try:
                character = self._draw(stream)
                if not self._accept(stream, character):
                    assert stream.cache is not None
                    going.append((stream, stream.cache, character))
            except Exception as error:
                self._fail(stream, error)
        if going:
            self._step(going)
        self.counters.writing_seconds += time.monotonic() - started

    def _step(self, going: list[tuple[Stream, Cache, int]]) -> None:
        """All at once; where that fails one by one, so that only those fail which cannot go on."""
        shares: list[list[float]] | None = None
        if any(stream.job.attention for stream, _, _ in going):
            shares = [[] for _ in going]
        started = time.monotonic()
        try:
            logits = self.stepper.step([each[2] for each in going], [each[1] for each in going], shares)
        except Exception as error:
            if len(going) == 1:
                self._fail(going[0][0], error)
                return
            for alone in going:
                self._step([alone])
            return
        self.counters.steps.add(time.monotonic() - started)
        for i, (stream, cache, _) in enumerate(going):
            stream.logits = logits[i : i + 1]
            if shares is not None and stream.job.attention:
                self._emit(stream, Heard(cache.position - 1, tuple(shares[i]), self.used_bytes(cache)))

    def _draw(self, stream: Stream) -> int:
        """As `generate` draws: the same seed writes the same text."""
        assert stream.logits is not None and stream.cache is not None
        sampling = stream.job.sampling
        weights = probabilities(stream.logits[0], b"", sampling)
        self._generator.manual_seed(mix_seed(sampling.seed, stream.cache.position))
        return pick(weights, torch.rand((), generator=self._generator, dtype=torch.float64))

    def _accept(self, stream: Stream, character: int) -> bool:
        """Pass on what cannot be part of a stop string any more; True if the stream has ended."""
        job, held = stream.job, stream.held
        stream.drawn += 1
        self.counters.written += 1
        held.append(character)
        if job.top_logprobs is not None:
            assert stream.logits is not None
            stream.held_logprobs.append(_logprob(stream.logits[0], character, job.top_logprobs))
        ended = max((len(stop) for stop in job.stop if held.endswith(stop)), default=0)
        last = stream.drawn >= job.max_chars
        back = ended or (0 if last else max((overlap(held, stop) for stop in job.stop), default=0))
        free = len(held) - back
        if free:
            self._emit(stream, Written(bytes(held[:free]), tuple(stream.held_logprobs[:free])))
            del held[:free]
            del stream.held_logprobs[:free]
        if ended or last:
            self._end(stream, Finished("stop" if ended else "length", stream.drawn))
        return bool(ended or last)

    def _emit(self, stream: Stream, event: Event) -> None:
        stream.produced += 1
        try:
            stream.notify(event)
        except Exception:  # the receiver's loop is closed
            stream.cancelled = True

    def _fail(self, stream: Stream, error: Exception) -> None:
        scarce = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and "memory" in str(error)
        )
        if scarce:
            said = " ".join(str(error).split())
            message = said if isinstance(error, MemoryError) and said else f"out of memory: {MEMORY_ADVICE}"
            self._end(stream, Failed(503, message))
        else:
            _log.error("a stream failed", exc_info=error)
            self._end(stream, Failed(500, "the stream failed; the server's log says why"))

    def _end(self, stream: Stream, event: Finished | Failed) -> None:
        """Free slot and state, then say so."""
        if stream.cache is not None:
            self.stepper.release(stream.cache)
        stream.cache = stream.logits = None
        with self._wake:
            if stream in self._streams:
                self._streams.remove(stream)
        name = event.reason if isinstance(event, Finished) else "failed"
        self.counters.finished[name] += 1
        self._emit(stream, event)


def _logprob(logits: Tensor, character: int, count: int) -> Logprob:
    """logits (V,)."""
    values = torch.log_softmax(logits.detach().to("cpu", torch.float64), 0)
    best = torch.sort(values, descending=True, stable=True).indices[:count].tolist()
    return Logprob(character, float(values[character]), tuple((i, float(values[i])) for i in best))
