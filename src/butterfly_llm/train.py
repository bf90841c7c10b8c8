"""Train a Butterfly model; exact to resume, safe to interrupt.

    python -m butterfly_llm.train configs/tiny.toml corpus=CORPUS steps=500

On one device, or under torchrun on one for each process (`parallel`). A step draws its windows from
(seed, step) and its learning rate and window length from the progress of the run, so the checkpoint of a step
holds all that the next step depends on.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from butterfly_llm import memory, parallel
from butterfly_llm.captured import Accumulate, CapturedLoss, accumulate
from butterfly_llm.checkpoint import (
    TrainingState,
    checkpoint_path,
    checkpoints,
    copy_weights,
    load_pretrained,
    load_training,
    newest_training,
    prune,
    save_model,
    save_training,
)
from butterfly_llm.config import ButterflyConfig, SamplingConfig, TrainConfig
from butterfly_llm.corpus import Corpus, check_length, sample_windows, val_windows
from butterfly_llm.curriculum import curriculum
from butterfly_llm.generate import generate_text
from butterfly_llm.model import Butterfly
from butterfly_llm.ops import default_backend
from butterfly_llm.ops.feed_forward import reason_against
from butterfly_llm.optim import Optimizers, fixed_bytes, learning_rate, length_at, progress_at
from butterfly_llm.recompute import Load, describe
from butterfly_llm.reporting import Reporter, Silent, plain_warnings
from butterfly_llm.signals import StopSignals
from butterfly_llm.text import encode
from butterfly_llm.tracking import tracker

Windows = npt.NDArray[np.uint8]
Transform = Callable[[Windows, int, int, float], tuple[Windows, npt.NDArray[np.float32] | None]]
"""(windows (B, N+1), step, first, progress) -> windows, and loss weights (B, N) or None; pure, row by row:
row i may depend on the step and on first + i only. For curricula that plant something into the text."""

# What a resumed run may change: how long it runs, what it tells, where it runs and how it cuts up the work.
_CHANGEABLE = frozenset((
    "steps", "max_seconds", "finish_seconds", "corpus", "out", "resume", "device", "log_every", "val_every",
    "val_length", "val_chars", "sample_every", "sample_chars", "sample_prompt", "checkpoint_every",
    "checkpoint_minutes", "keep", "spike_bits", "max_bad_steps", "export", "micro_chars", "compile",
    "gradient_checkpointing", "deterministic", "cuda_graph", "track",
))  # fmt: skip
_LESS_MEMORY = (
    "lower micro_chars or lengths, set gradient_checkpointing to auto or nested, or use a smaller model"
)
_LESS_HOST_MEMORY = "lower micro_chars or lengths, or set gradient_checkpointing to nested"
_USUAL_SHARE = 0.05  # of a step's loss in the running mean that a spike is measured against


class TrainingDiverged(ValueError):
    """Loss or gradient were not finite, or the loss a spike, for too many steps in a row."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The end of a run."""

    model: Butterfly
    step: int
    chars: int  # characters trained on
    skipped: int  # steps whose loss or gradient was not finite, or whose loss was a spike
    elapsed: float  # seconds, over all restarts
    val_bits: float  # bits per character on the validation split
    losses: list[float]  # bits per character of every step since this start


def train(
    config: TrainConfig,
    model_config: ButterflyConfig,
    *,
    corpus: Corpus | None = None,
    val_corpus: Corpus | None = None,
    transform: Transform | None = None,
    build: Callable[[ButterflyConfig], Butterfly] | None = None,
) -> TrainResult:
    """Run `config` to its end and leave checkpoints, metrics.jsonl and the finished model in `config.out`.

    The corpora are those in `config.corpus` unless given; `build` makes the model, for twins and ablations.
    On SIGTERM or SIGINT the run writes a checkpoint at the next step boundary and raises SystemExit (143 or
    130); a second signal ends the process at once. Of several processes the first one writes; where another
    one fails, it is SystemExit(2) in this one.
    ValueError for settings, data and checkpoints that do not fit; TrainingDiverged after `max_bad_steps`;
    MemoryError, with the estimate, where the device runs out on the way.
    """
    with parallel.team(config.device) as members:
        if transform is None and config.recall_share > 0:
            transform = curriculum(
                share=config.recall_share,
                weight=config.recall_weight,
                longest=max(length for _, length in config.lengths),
                seed=config.seed,
                full_at=config.recall_full_at,
                long_share=config.recall_long_share,
                reworded_share=config.recall_reworded_share,
            )
        if (corpus is None or val_corpus is None) and Path(config.corpus).is_file():
            raise ValueError(
                f"train: {config.corpus} is a file; give the folder that `butterfly prepare` wrote"
            )
        corpus = Corpus(config.corpus, "train") if corpus is None else corpus
        val_corpus = Corpus(config.corpus, "val") if val_corpus is None else val_corpus
        return _Run(config, model_config, corpus, val_corpus, transform, members, build).to_its_end()


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: ButterflyConfig,
        corpus: Corpus,
        val_corpus: Corpus,
        transform: Transform | None,
        members: parallel.Team,
        build: Callable[[ButterflyConfig], Butterfly] | None,
    ) -> None:
        config.require_shares(members.size)
        if not model_config.causal:
            raise ValueError(f"train: routing {model_config.routing!r} is not causal: nothing to predict")
        longest = max(length for _, length in config.lengths)
        open_tracker = tracker(config.track)
        check_length(corpus, longest)
        check_length(val_corpus, config.val_length or longest)
        self.config, self.corpus, self.val_corpus, self.transform = config, corpus, val_corpus, transform
        self.team = members
        self.device = memory.pick_device(config.device)
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        load = training_load(config, model_config, self.device.type, 2 if half else 4, members.size)
        free_host = memory.available_bytes() if self.device.type == "cuda" else 0
        free_host = free_host and free_host // members.size
        plan = load.plan(config.gradient_checkpointing, memory.available_bytes(str(self.device)), free_host)
        on_host = load.host_bytes(plan) * members.size
        self.estimate = load.nbytes(plan)
        memory.require(self.estimate, str(self.device), "training", _LESS_MEMORY)
        memory.require(on_host, "cpu", "training with gradient_checkpointing offload", _LESS_HOST_MEMORY)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)
        self.model = (build or Butterfly)(model_config).to(self.device)
        self.model.compute_dtype = torch.bfloat16 if half else torch.float32
        self.model.gradient_checkpointing = plan is not None
        self.model.recompute = plan or self.model.recompute
        self.optimizers = Optimizers(self.model, config)
        self.step = self.chars = 0
        self.elapsed_before = 0.0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.bad_streak = torch.zeros_like(self.skipped)
        self.worst_streak = torch.zeros_like(self.skipped)
        self.usual_loss = torch.full((), math.nan, device=self.device)  # running mean of the good steps, nats
        self.validated = -1, math.nan  # the last validation: step, bits per character
        self.losses: list[float] = []
        self.unread: list[Tensor] = []  # (loss, gradient norm, bad) of steps the host has not looked at
        self.unlogged: list[list[float]] = []  # the same, looked at, loss in bits per character
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        state = _find_state(config)
        if state is not None:
            self._take_up(state)
        elif config.init:
            self._start_from(config.init)
        if config.compile:
            self.model.compile_layers()
        self.captured: CapturedLoss | None = None
        self.accumulate: Accumulate = functools.partial(accumulate, self.model)
        if config.cuda_graph and self.device.type == "cuda" and not on_host:
            self.accumulate = self.captured = CapturedLoss(self.model)
            self.optimizers.drop_gradients = False
        self.begun = self.saved_at = self.logged_at = time.monotonic()
        self.logged_chars = self.chars
        self.saved_step = self.step
        self.reporter: Reporter | Silent = Silent()
        if members.rank == 0:
            self.reporter = Reporter(
                out / "metrics.jsonl",
                resumed_at=self.step,
                finished=self.progress() >= 1,
                tracker=None if open_tracker is None else open_tracker(out, config.to_dict()),
            )
        parameters = f"{self.model.num_parameters():,} parameters on {self.device}"
        parameters += f", the first of {members.size} processes" if members.size > 1 else ""
        at = f", resumed at step {self.step}" if state else ""
        self.reporter.say(f"{parameters}, {len(corpus):,} characters{at}")
        about = memory.format_bytes(self.estimate)
        about += f" and {memory.format_bytes(on_host)} of the host's" if on_host else ""
        self.reporter.say(f"about {about} of memory: {describe(plan, model_config.num_layers)}")

    def elapsed(self) -> float:
        """Seconds of training, over all restarts."""
        return self.elapsed_before + time.monotonic() - self.begun

    def progress(self) -> float:
        return progress_at(self.step, self.elapsed(), self.config)

    def to_its_end(self) -> TrainResult:
        """Step by step, until all is done or a signal has come, by the clock of the first process."""
        try:
            with StopSignals() as stop:
                while (progress := self.team.gather(self.progress())[0]) < 1:
                    self.advance(progress)
                    if received := int(max(self.team.gather(stop.received))):
                        self.checkpoint()
                        self.reporter.say(f"stopped at step {self.step}; the same command goes on from there")
                        raise SystemExit(128 + received)
                return self.finish()
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"train: {self.device} is out of memory at step {self.step} "
                f"({memory.format_bytes(self.estimate)} were estimated): {_LESS_MEMORY}"
            ) from None
        finally:
            self.reporter.close()

    def advance(self, progress: float) -> None:
        """One optimiser step, and what is due after it."""
        config = self.config
        length = length_at(progress, config)
        rate = learning_rate(self.step, progress, config)
        loss = torch.zeros((), device=self.device)
        for ids, targets, weights, share in self._micro_batches(length, progress):
            loss += self.accumulate(ids, targets, weights, share)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.team.add_up([loss, *gradients])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm, foreach=True)
        bad = ~(loss.isfinite() & norm.isfinite())
        if config.spike_bits:
            bad |= loss > self.usual_loss + config.spike_bits * math.log(2)  # false while there is no mean
        usual = torch.where(self.usual_loss.isnan(), loss, self.usual_loss.lerp(loss, _USUAL_SHARE))
        self.usual_loss = torch.where(bad, self.usual_loss, usual)
        self.optimizers.step(rate, bad)
        self.skipped += bad
        self.bad_streak = torch.where(bad, self.bad_streak + 1, 0)
        self.worst_streak = torch.maximum(self.worst_streak, self.bad_streak)
        self.unread.append(torch.stack([loss, norm, bad.float()]))
        self.step += 1
        self.chars += config.batch_chars
        self._do_what_is_due(length, rate)

    def _do_what_is_due(self, length: int, rate: float) -> None:
        config = self.config

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        if due(config.log_every):
            self._log(length, rate)
        if self.team.rank:
            return  # the first process does the rest; the others wait for it in the next step
        paused = time.monotonic()
        if due(config.val_every):
            self.validate()
        if due(config.sample_every):
            self._sample()
        minutes = (time.monotonic() - self.saved_at) / 60
        if due(config.checkpoint_every) or 0 < config.checkpoint_minutes <= minutes:
            self.checkpoint()
        self.logged_at += time.monotonic() - paused  # speed is that of training alone

    def _micro_batches(
        self, length: int, progress: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        """ids and targets (b, length), loss weights or None, and the share in the loss of the whole batch.

        Of several processes each takes as many windows of the batch, one after the other.
        """
        config, team = self.config, self.team
        count, windows = config.micro_windows(length, team.size), config.windows(length) // team.size
        parts: list[tuple[Windows, npt.NDArray[np.float32] | None]] = []
        for first in range(team.rank * windows, (team.rank + 1) * windows, count):
            text = sample_windows(
                self.corpus, length=length, count=count, seed=config.seed, step=self.step, first=first
            )
            parts.append(self.transform(text, self.step, first, progress) if self.transform else (text, None))
        sizes = [count * length if weights is None else float(weights.sum()) for _, weights in parts]
        whole = sum(team.gather(sum(sizes)))
        for (text, weights), size in zip(parts, sizes, strict=True):
            ids, targets = self._to_device(text)
            yield (
                ids,
                targets,
                None if weights is None else torch.from_numpy(weights).to(self.device, non_blocking=True),
                size / whole,
            )

    def _to_device(self, text: Windows) -> tuple[Tensor, Tensor]:
        """Windows (b, N+1) uint8 -> ids and targets (b, N) int64 on the device."""
        host = torch.from_numpy(text)
        if self.device.type == "cuda":
            host = host.pin_memory()
        window = host.to(self.device, non_blocking=True).long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def _read(self) -> None:
        """Wait for the device and take over the figures of the steps not looked at yet."""
        if not self.unread:
            return
        rows: list[list[float]] = torch.stack(self.unread).tolist()
        self.unread.clear()
        for row in rows:
            row[0] /= math.log(2)
        self.unlogged += rows
        self.losses += [row[0] for row in rows]
        if int(self.worst_streak) >= self.config.max_bad_steps:
            kept = checkpoints(self.config.out)
            start = f", from the last checkpoint (init={kept[0]})" if kept else ""
            raise TrainingDiverged(
                "loss or gradient were not finite, or the loss a spike (spike_bits), for "
                f"{int(self.worst_streak)} steps in a row before step {self.step}; begin a new run with a "
                f"lower learning_rate or clip_norm{start}"
            )

    def _log(self, length: int, rate: float) -> None:
        """A line of metrics: bits per character are the mean of the finite steps since the last one."""
        self._read()
        good = [row for row in self.unlogged if not row[2]] or self.unlogged
        self.unlogged = []
        bits = sum(row[0] for row in good) / len(good)
        now = time.monotonic()
        speed = (self.chars - self.logged_chars) / max(1e-9, now - self.logged_at)
        self.logged_at, self.logged_chars = now, self.chars
        self.reporter.record(
            "train",
            step=self.step,
            bits_per_char=round(bits, 5),
            learning_rate=rate,
            grad_norm=round(good[-1][1], 5),
            chars=self.chars,
            chars_per_second=round(speed),
            elapsed=round(self.elapsed(), 2),
            length=length,
            skipped=int(self.skipped),
        )
        figures = f"step {self.step}  {bits:.3f} bits/char  {speed / 1000:,.1f}k chars/s  length {length}"
        self.reporter.show(self.progress(), figures)

    def validate(self) -> float:
        """Bits per character on the validation split, in windows of `val_length`."""
        if self.validated[0] == self.step:
            return self.validated[1]
        config = self.config
        length = config.val_length or max(length for _, length in config.lengths)
        windows = list(val_windows(self.val_corpus, length=length, max_chars=config.val_chars))
        count = min(config.micro_windows(length, self.team.size), len(windows))
        self._release_graph()
        nats, chars = torch.zeros((), dtype=torch.float64, device=self.device), 0
        # Compiled layers would be compiled once more for a pass without gradients.
        with torch.set_grad_enabled(config.compile):
            for first in range(0, len(windows), count):
                ids, targets = self._to_device(np.stack(windows[first : first + count]))
                nats += self.model.loss(ids, targets).detach().double() * targets.numel()
                chars += targets.numel()
        bits = float(nats) / chars / math.log(2)
        self.reporter.record(
            "val",
            step=self.step,
            bits_per_char=round(bits, 5),
            chars=chars,
            length=length,
            trained_chars=self.chars,
            elapsed=round(self.elapsed(), 2),
        )
        self.reporter.say(f"step {self.step}: validation {bits:.4f} bits/char on {chars:,} characters")
        self.validated = self.step, bits
        return bits

    def _release_graph(self) -> None:
        """Make room for work between two steps; the next step captures its graph again."""
        if self.captured is not None:
            self.captured.release()

    def _sample(self) -> None:
        self._release_graph()
        text = "".join(
            generate_text(
                self.model,
                list(encode(self.config.sample_prompt, source="sample_prompt")),
                sampling=SamplingConfig(seed=self.config.seed),
                max_chars=self.config.sample_chars,
            )
        )
        self.reporter.record("sample", step=self.step, text=text)
        self.reporter.say(f"step {self.step}: sample\n{self.config.sample_prompt}{text}")

    def checkpoint(self) -> None:
        """Write all that the next step depends on."""
        self._read()
        if self.team.rank:
            return  # the first process writes
        values = {
            "step": self.step,
            "chars": self.chars,
            "skipped": int(self.skipped),
            "bad_streak": int(self.bad_streak),
            "elapsed": self.elapsed(),
            "train": self.config.to_dict(),
        }
        tensors = [("random.cpu", torch.get_rng_state()), ("usual_loss", self.usual_loss)]
        if self.device.type == "cuda":
            tensors.append(("random.cuda", torch.cuda.get_rng_state(self.device)))
        tensors += [("optimizer." + name, tensor) for name, tensor in self.optimizers.state_tensors()]
        save_training(self.model, checkpoint_path(self.config.out, self.step), tensors=tensors, values=values)
        prune(self.config.out, self.config.keep)
        if self.config.export:
            extra = {"step": self.step, "chars": self.chars}
            save_model(self.model, self.config.export, dtype="int8", extra=extra)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _start_from(self, path: str) -> None:
        """Take the weights of a finished model. ValueError names the setting in which it differs."""
        source = load_pretrained(path)
        for key, value in source.config.to_dict().items():
            if (here := self.model.config.to_dict()[key]) != value:
                raise ValueError(
                    f"train: the model in init ({path}) has {key} = {value!r}, this run {here!r}"
                )
        copy_weights(self.model, source.named_parameters(), source=path)

    def _take_up(self, state: TrainingState) -> None:
        """Go on from a checkpoint. ValueError names a setting that may not change."""
        _refuse_changes(self.config, self.model.config, state)
        copy_weights(self.model, state.weights.items(), source=str(state.path))
        prefix = "optimizer."
        self.optimizers.load_tensors(
            {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
        )
        try:
            torch.set_rng_state(state.tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in state.tensors:
                torch.cuda.set_rng_state(state.tensors["random.cuda"], self.device)
            if "usual_loss" in state.tensors:  # not in the first checkpoints of version 1
                self.usual_loss = state.tensors["usual_loss"].to(self.device, torch.float32)
            values = state.values
            self.step, self.chars = int(values["step"]), int(values["chars"])
            self.elapsed_before = float(values["elapsed"])
            self.skipped += int(values["skipped"])
            self.bad_streak += int(values["bad_streak"])
            self.worst_streak += self.bad_streak
        except (KeyError, TypeError) as failure:
            raise ValueError(f"{state.path}: the training state is incomplete ({failure})") from None

    def finish(self) -> TrainResult:
        """The last validation and checkpoint, and the model alone in `out`/model."""
        bits = self.team.gather(0.0 if self.team.rank else self.validate())[0]
        there = checkpoint_path(self.config.out, self.step) in checkpoints(self.config.out)
        if not (there and self.step == self.saved_step):  # else a finished run was started again
            self.checkpoint()
        if self.team.rank == 0:
            extra = {"step": self.step, "chars": self.chars, "val_bits_per_char": bits}
            save_model(self.model, Path(self.config.out) / "model", extra=extra)
        self.reporter.record("end", step=self.step, elapsed=round(self.elapsed(), 2))
        return TrainResult(
            model=self.model,
            step=self.step,
            chars=self.chars,
            skipped=int(self.skipped),
            elapsed=self.elapsed(),
            val_bits=bits,
            losses=self.losses,
        )


def training_load(
    config: TrainConfig, model_config: ButterflyConfig, device: str, value_bytes: int, processes: int = 1
) -> Load:
    """What a training step has to hold in each process; value_bytes: size of one activation, 2 or 4."""
    with torch.device("meta"):
        model = Butterfly(model_config)
    fused = default_backend(device) == "triton"
    return Load(
        model_config,
        chars=max(config.micro_windows(length, processes) * length for _, length in config.lengths),
        value_bytes=value_bytes,
        fixed_bytes=fixed_bytes(model),
        compiled=config.compile,
        fused=fused,
        fused_feed_forward=fused and reason_against(model_config) is None,
    )


def _find_state(config: TrainConfig) -> TrainingState | None:
    """The checkpoint that `config.resume` means, None to start anew."""
    there = checkpoints(config.out)
    if config.resume == "never":
        if there:
            raise ValueError(f"train: {there[0]} exists and resume is never; choose another out")
        return None
    if config.resume != "auto":
        return load_training(config.resume)
    return newest_training(config.out)


def _refuse_changes(config: TrainConfig, model_config: ButterflyConfig, state: TrainingState) -> None:
    before = TrainConfig.from_dict(state.values.get("train", {})).to_dict()
    pairs = [(key, before[key], value) for key, value in config.to_dict().items() if key not in _CHANGEABLE]
    then = state.model_config.to_dict()
    pairs += [(f"model.{key}", then[key], value) for key, value in model_config.to_dict().items()]
    for key, old, new in pairs:
        if old != new:
            raise ValueError(
                f"train: {state.path} was made with {key} = {old!r}, now it is {new!r}; "
                "a resumed run cannot change it, choose another out"
            )


def load_run(path: str | Path, changes: Sequence[str] = ()) -> tuple[TrainConfig, ButterflyConfig]:
    """Read a run preset: `preset = "small"`, a table [model] that changes it, and a table [train].

    changes: `key=value` settings of [train], or `model.key=value`, over those in the file.
    ValueError in one line for an unknown key or a bad value.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise ValueError(f"{path}: not TOML ({failure})") from None
    known = ("preset", "model", "train")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}{hint}: there are {', '.join(known)}")
    model, settings = dict(values.get("model", {})), dict(values.get("train", {}))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is no setting: write key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
        else:
            settings[key] = value
    try:
        base = ButterflyConfig.preset(values.get("preset", "small")).to_dict()
        return TrainConfig.from_dict(settings), ButterflyConfig.from_dict({**base, **model})
    except ValueError as failure:
        raise ValueError(f"{path}: {failure}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m butterfly_llm.train RUN.toml key=value ...`"""
    arguments = sys.argv[1:] if arguments is None else arguments
    plain_warnings()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise ValueError("usage: python -m butterfly_llm.train RUN.toml key=value ...")
        train(*load_run(arguments[0], arguments[1:]))
    except (ValueError, OSError, MemoryError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
