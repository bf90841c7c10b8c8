"""What training promises: exact to resume, blind to how a batch is cut, safe to interrupt, and it learns."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from butterfly_llm.checkpoint import checkpoints, load_pretrained, load_training, save_model
from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.data import prepare
from butterfly_llm.extend import extend_ngrams
from butterfly_llm.model import Butterfly
from butterfly_llm.optim import Muon, Optimizers, learning_rate, length_at, progress_at
from butterfly_llm.recompute import Load
from butterfly_llm.train import TrainingDiverged, TrainResult, load_run, main, train, training_load
from conftest import random_model

CONFIGS = Path(__file__).parent.parent / "configs"
NANO = ButterflyConfig(
    hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=64, carry_size=8,
    num_local_layers=1, num_passes=1, num_levels=2, num_refine_layers=1, chunk_size=16,
)  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python packages of the standard library; `http` is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "xml")
    out = tmp_path_factory.mktemp("corpus")
    prepare([library / name for name in names], out, holdout=["http"])
    return out


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        corpus=str(corpus),
        out=str(tmp_path / "run"),
        device="cpu",
        steps=8,
        batch_chars=256,
        lengths=((0.5, 32), (1.0, 64)),
        learning_rate=4e-3,
        warmup_steps=4,
        log_every=1,
        val_chars=256,
        checkpoint_minutes=0,
    )


def change(settings: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(settings, **changes)


def metrics(settings: TrainConfig, kind: str = "train") -> list[dict[str, Any]]:
    lines = (Path(settings.out) / "metrics.jsonl").read_text().splitlines()
    return [value for value in map(json.loads, lines) if value["kind"] == kind]


def parameters(result: TrainResult) -> dict[str, Tensor]:
    return dict(result.model.named_parameters())


class Interrupt(Exception):
    pass


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the run fail hard when it looks for windows of `step`."""
    from butterfly_llm import train as module

    original = module.sample_windows

    def sample_windows(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == step:
            raise Interrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "sample_windows", sample_windows)


def test_forty_steps_are_twenty_and_twenty(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: parameters, both optimisers, losses, metrics; the lengths change in between."""
    whole = change(settings, steps=40, checkpoint_every=20)
    broken = change(whole, out=str(tmp_path / "broken"))
    draws: list[float] = []

    def draw(windows: Any, step: int, first: int, progress: float) -> tuple[Any, None]:
        draws.append(float(torch.rand(())))
        return windows, None

    once = train(whole, NANO, transform=draw)
    with monkeypatch.context() as patch:
        interrupt_after(23, patch)
        with pytest.raises(Interrupt):
            train(broken, NANO, transform=draw)
    assert checkpoints(broken.out)[0].name == "step-000000020"
    torch.manual_seed(99)
    twice = train(broken, NANO, transform=draw)
    assert draws[:40] == draws[40:60] + draws[63:]  # the random state came back too

    assert (once.step, once.chars, once.skipped) == (twice.step, twice.chars, twice.skipped) == (40, 10240, 0)
    assert len(once.losses) == 40 and once.losses[20:] == twice.losses
    assert once.val_bits == twice.val_bits
    for name, parameter in parameters(once).items():
        assert torch.equal(parameter, parameters(twice)[name]), name
    states = [load_training(checkpoints(config.out)[0]) for config in (whole, broken)]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert sum(key.endswith("momentum_buffer") for key in states[0].tensors) > 10
    for key, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[key]), key
    lines = [
        [(line["step"], line["bits_per_char"], line["grad_norm"], line["chars"]) for line in metrics(config)]
        for config in (whole, broken)
    ]
    assert [line[0] for line in lines[1]] == list(range(1, 41))  # nothing twice, nothing missing
    assert lines[0] == lines[1]
    assert load_pretrained(broken.out).config == NANO


@pytest.mark.parametrize("weighted", [False, True])
def test_one_batch_of_four_is_two_of_two_and_four_of_one(settings: TrainConfig, weighted: bool) -> None:
    def weigh(
        windows: Any, step: int, first: int, progress: float
    ) -> tuple[Any, np.ndarray[Any, np.dtype[np.float32]]]:
        weights = np.ones((len(windows), windows.shape[1] - 1), np.float32)
        for row in range(len(windows)):
            weights[row] += first + row
        return windows, weights

    results, norms = [], []
    for windows in (4, 2, 1):
        micro = change(
            settings, lengths=((1.0, 64),), micro_chars=64 * windows, out=f"{settings.out}{windows}"
        )
        assert micro.micro_windows(64) == windows
        results.append(train(micro, NANO, transform=weigh if weighted else None))
        norms.append([line["grad_norm"] for line in metrics(micro)])
    for other, norm in zip(results[1:], norms[1:], strict=True):
        assert other.losses == pytest.approx(results[0].losses, rel=1e-5)
        assert norm == pytest.approx(norms[0], rel=1e-3)
        for (name, a), b in zip(parameters(other).items(), parameters(results[0]).values(), strict=True):
            # Muon orthogonalises in bfloat16, which makes the rounding of a sum visible.
            assert float((a - b).detach().norm()) <= 0.1 * float(b.detach().norm()), name


def test_learning_rate_and_length_follow_progress_alone() -> None:
    config = TrainConfig(
        steps=100,
        batch_chars=64,
        lengths=((0.5, 16), (0.75, 32), (1.0, 64)),
        learning_rate=1.0,
        warmup_steps=10,
        decay="linear",
        decay_from=0.6,
        final_rate=0.1,
    )
    rates = [learning_rate(s, progress_at(s, 0, config), config) for s in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10:61] == pytest.approx([1.0] * 51)
    assert rates[80] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    cosine = change(config, decay="cosine")
    assert learning_rate(80, 0.8, cosine) == pytest.approx(0.55)
    assert learning_rate(70, 0.7, cosine) > learning_rate(70, 0.7, config)
    assert [length_at(p, config) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [16, 16, 32, 32, 64, 64]

    budget = change(config, max_seconds=50.0, finish_seconds=10.0)
    assert progress_at(10, 0.0, budget) == 0.1  # the steps are further on
    assert progress_at(10, 20.0, budget) == 0.5  # the clock is
    assert progress_at(10, 45.0, budget) == 1.0


def test_a_run_ends_within_its_time_and_has_decayed(settings: TrainConfig) -> None:
    config = change(settings, steps=10**6, max_seconds=5.0, finish_seconds=3.0, warmup_steps=0)
    result = train(config, NANO)
    assert 0 < result.step < 10**6
    assert 2.0 <= result.elapsed < 5.0
    rates = [line["learning_rate"] for line in metrics(config)]
    assert rates[-1] < 0.2 * rates[0]
    assert {line["length"] for line in metrics(config)} == {32, 64}
    again = train(config, NANO)  # the time is used up: nothing but the end is left
    assert again.step == result.step and again.elapsed >= 2.0


def test_muon_in_batches_is_torchs_muon() -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    other = copy.deepcopy(model)
    config = TrainConfig(learning_rate=0.01)
    ours = Optimizers(model, config)
    theirs = torch.optim.Muon(
        [p for n, p in other.named_parameters() if p.ndim == 2 and n.split(".")[0] not in ("embed", "head")],
        lr=0.01,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    matched = dict(other.named_parameters())
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    assert isinstance(ours.muon, Muon)
    for seed in range(3):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            matched[name].grad = parameter.grad.clone()
        ours.muon.step()
        theirs.step()
    for group in ours.muon.param_groups:
        for parameter in group["params"]:
            name = ours.names[parameter]
            moved, expected = parameter - before[name], matched[name] - before[name]
            assert float((moved - expected).detach().norm() / expected.detach().norm()) < 0.02, name
            assert torch.allclose(
                ours.muon.state[parameter]["momentum_buffer"],
                theirs.state[matched[name]]["momentum_buffer"],
                atol=1e-6,
            )


class Poisoned(Butterfly):
    """Gives a loss that is not a number, with gradients to match, at the calls in `bad`."""

    bad: frozenset[int] = frozenset()
    calls = 0

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        loss = super().loss(ids, targets, weights)
        if torch.is_grad_enabled():
            type(self).calls += 1
            if self.calls - 1 in self.bad:
                return loss * math.nan
        return loss


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Poisoned]]:
    monkeypatch.setattr("butterfly_llm.train.Butterfly", Poisoned)
    monkeypatch.setattr(Poisoned, "calls", 0)
    yield Poisoned


def test_a_step_that_is_not_finite_changes_nothing(
    settings: TrainConfig, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoned, "bad", frozenset({4}))
    result = train(change(settings, checkpoint_every=1, keep=9), NANO)
    assert result.skipped == 1 and math.isnan(result.losses[4])
    before, after, later = (load_training(checkpoints(settings.out)[8 - step]) for step in (4, 5, 6))
    assert (after.values["bad_streak"], later.values["bad_streak"]) == (1, 0)
    for name, tensor in before.weights.items():
        assert torch.equal(tensor, after.weights[name]), name
    for key, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[key]), key
    assert any(not torch.equal(t, later.weights[name]) for name, t in after.weights.items())
    assert all(tensor.isfinite().all() for tensor in later.weights.values())


def test_too_many_in_a_row_stop_the_run_and_the_last_checkpoint_stays(
    settings: TrainConfig, poisoned: type[Poisoned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisoned, "bad", frozenset({0, 2, 4, 5, 6}))
    config = change(settings, max_bad_steps=3, log_every=4, checkpoint_every=4)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row before step 8.*step-000000004"):
        train(config, NANO)
    kept = load_training(checkpoints(config.out)[0])
    assert kept.values["step"] == 4 and kept.values["skipped"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint(settings: TrainConfig, number: int) -> None:
    script = f"""
from butterfly_llm.train import train
from butterfly_llm.config import ButterflyConfig, TrainConfig
train(TrainConfig(**{change(settings, steps=100_000).to_dict()!r}), ButterflyConfig(**{NANO.to_dict()!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3 " in line:
            break
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number, rest
    assert "the same command goes on from there" in rest
    state = load_training(checkpoints(settings.out)[0])
    assert state.values["step"] >= 3
    assert metrics(settings)[-1]["step"] == state.values["step"]


def test_the_exported_model_is_renewed_with_every_checkpoint(settings: TrainConfig, tmp_path: Path) -> None:
    export = tmp_path / "exported"
    settings = dataclasses.replace(settings, export=str(export), checkpoint_every=4)
    steps = []
    for until in (4, 8):
        result = train(dataclasses.replace(settings, steps=until), NANO)
        steps.append(json.loads((export / "config.json").read_text())["extra"]["step"])
        exported = load_pretrained(export)
        for name, parameter in result.model.named_parameters():
            step = parameter.abs().amax(-1, keepdim=True) / 127 if parameter.ndim == 2 else 0.0
            assert ((exported.get_parameter(name) - parameter).abs() <= step).all()
    assert steps == [4, 8]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(settings: TrainConfig) -> None:
    config = change(settings, checkpoint_every=4)
    train(config, NANO)
    newest, older = checkpoints(config.out)
    (newest / "state-00001-of-00001.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="checkpoint skipped: .*step-000000008.* cut off"):
        result = train(config, NANO)
    assert (result.step, len(result.losses)) == (8, 4)
    for path in checkpoints(config.out):
        (path / "MANIFEST.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it already
        with pytest.raises(ValueError, match="no checkpoint is whole"):
            train(config, NANO)
    assert older.exists()  # nothing was deleted to hide it


def test_the_command_shows_warnings_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # to have it back
    assert main([]) == 2
    assert warnings.formatwarning("damaged", UserWarning, "train.py", 7) == "warning: damaged\n"


def test_a_resumed_run_may_change_what_does_not_change_the_training(settings: TrainConfig) -> None:
    train(settings, NANO)
    for changes, message in (
        ({"learning_rate": 1e-3}, "with learning_rate = 0.004, now it is 0.001"),
        ({"seed": 1}, "with seed = 0, now it is 1"),
        ({"lengths": ((1.0, 64),)}, r"with lengths = \(\(0.5, 32\), \(1.0, 64\)\), now it is"),
    ):
        with pytest.raises(ValueError, match=message):
            train(change(settings, **changes), NANO)
    with pytest.raises(ValueError, match=r"with model\.carry_size = 8, now it is 0"):
        train(settings, dataclasses.replace(NANO, carry_size=0))
    with pytest.raises(ValueError, match="exists and resume is never"):
        train(change(settings, resume="never"), NANO)
    longer = change(settings, steps=10, log_every=5, val_every=5, micro_chars=128, keep=1)
    assert train(longer, NANO).step == 10
    elsewhere = change(longer, out=settings.out + "2", resume=str(checkpoints(settings.out)[0]), steps=12)
    assert train(elsewhere, NANO).step == 12


def test_a_run_may_start_from_the_weights_of_another(settings: TrainConfig, tmp_path: Path) -> None:
    before = parameters(train(change(settings, steps=2), NANO))
    still = change(settings, steps=1, out=str(tmp_path / "on"), init=settings.out, learning_rate=0.0)
    for name, tensor in parameters(train(still, NANO)).items():
        assert torch.equal(tensor, before[name]), name
    wider = dataclasses.replace(NANO, intermediate_size=NANO.intermediate_size * 2)
    with pytest.raises(ValueError, match=r"the model in init .* has intermediate_size = "):
        train(change(still, out=str(tmp_path / "other")), wider)


def test_rows_of_ngrams_learn_from_the_weights_of_a_run_without_them(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AdamW, as the embedding, and resumed bit by bit; a row that is never looked up stays at zero."""
    plain = train(change(settings, steps=2), NANO).model
    orders = (1, 2)
    save_model(extend_ngrams(plain, orders), tmp_path / "told", dtype="float32")
    config = dataclasses.replace(NANO, ngram_orders=orders)
    run = change(settings, out=str(tmp_path / "on"), init=str(tmp_path / "told"), checkpoint_every=2, steps=4)
    learnt = parameters(train(run, config))
    rows = learnt["ngram.weight"].detach().view(2, 257, -1)
    assert rows[:, [ord(" "), ord("e"), 256]].any(-1).all() and not rows[:, 1:9].any()
    told = Butterfly(config)
    with_muon = Optimizers(told, run).muon.param_groups[0]["params"]
    assert not any(parameter is told.ngram.weight for parameter in with_muon)
    with pytest.raises(ValueError, match=r"the model in init .* has ngram_orders = \[1, 2\], this run \[\]"):
        train(change(run, out=str(tmp_path / "other")), NANO)
    broken = change(run, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(Interrupt):
            train(broken, config)
    for name, tensor in parameters(train(broken, config)).items():
        assert torch.equal(tensor, learnt[name]), name


def test_validation_is_the_mean_over_all_characters(settings: TrainConfig) -> None:
    config = change(settings, val_every=4, val_length=64, val_chars=320, sample_every=8, sample_chars=5)
    result = train(config, NANO)
    text = torch.from_numpy(np.array(Corpus(config.corpus, "val").data[:321])).long()
    with torch.no_grad():
        logits = result.model(text[:-1].view(5, 64))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[1:])
    assert result.val_bits == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    assert [line["step"] for line in metrics(config, "val")] == [4, 8]
    assert len(metrics(config, "sample")[0]["text"]) == 5


def test_a_line_of_metrics_is_the_mean_since_the_last(settings: TrainConfig) -> None:
    config = change(settings, log_every=4, checkpoint_every=3, val_every=1)
    result = train(config, NANO)
    lines = metrics(config)
    assert [line["step"] for line in lines] == [4, 8]
    for line, losses in zip(lines, (result.losses[:4], result.losses[4:]), strict=True):
        assert line["bits_per_char"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert [line["chars"] for line in lines] == [1024, 2048] and result.chars == 2048


def test_recomputed_activations_give_the_same_run(
    settings: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(settings, NANO)
    for mode, deterministic in (("layer", True), ("offload", False), ("nested", False)):
        config = change(settings, gradient_checkpointing=mode, deterministic=deterministic)
        try:
            again = train(change(config, out=settings.out + mode), NANO)
        finally:
            torch.use_deterministic_algorithms(False)
        assert again.losses == pytest.approx(plain.losses, rel=1e-5)
        assert re.search(
            rf"of memory: .*layers are recomputed .*checkpointing {mode}\)", capsys.readouterr().err
        )


def test_the_memory_estimate_is_near_what_is_kept(settings: TrainConfig) -> None:
    """Against the bytes of all tensors that autograd keeps for the backward pass."""
    model_config = ButterflyConfig.preset("tiny")
    config = change(settings, batch_chars=2048, lengths=((1.0, 1024),))
    model = random_model(model_config)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 256, (2, 1024))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(ids, ids)
    activations = sum(kept.values()) - 4 * model.num_parameters()
    assert loss.isfinite()
    load = training_load(config, model_config, "cpu", 4)
    assert load.fixed_bytes > 12 * model.num_parameters()
    assert 0.7 < (load.nbytes(None) - load.fixed_bytes) / activations < 1.6


def test_what_does_not_fit_is_refused_before_it_is_made(
    settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("butterfly_llm.memory.available_bytes", lambda device="cpu": 10_000)
    with pytest.raises(ValueError, match=r"training needs .* on cpu, 10\.0 KB are free: lower micro_chars"):
        train(settings, NANO)
    assert not os.path.exists(settings.out)


def test_inputs_that_the_host_cannot_hold_are_refused(
    settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "host_bytes", lambda *_: 10**15)
    with pytest.raises(ValueError, match=r"offload needs 1000000.0 GB on cpu, .* set .* to nested"):
        train(change(settings, gradient_checkpointing="offload"), NANO)
    assert not os.path.exists(settings.out)


@pytest.mark.parametrize(
    ("changes", "split"),
    [({"lengths": ((1.0, 2**22),), "batch_chars": 2**22}, "train"), ({"val_length": 2**22}, "val")],
)
def test_text_shorter_than_a_window_is_refused_before_the_run_begins(
    settings: TrainConfig, changes: dict[str, Any], split: str
) -> None:
    config = change(settings, **changes)
    with pytest.raises(ValueError, match=rf"{split}\.bin.* a window needs"):
        train(config, NANO)
    assert not Path(config.out).exists()


def test_every_run_preset_loads() -> None:
    found = sorted(CONFIGS.glob("*.toml"))
    assert len(found) >= 3
    for path in found:
        config, model_config = load_run(path)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        longest = max(length for _, length in config.lengths)
        assert longest <= model_config.num_passes * model_config.reach_chars


def test_a_run_file_is_read_with_changes_and_its_errors_name_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "micro"\n[model]\ncarry_size = 0\n[train]\nsteps = 7\n')
    config, model_config = load_run(path, ["steps=9", "corpus=some/where", "model.num_passes=1"])
    assert (config.steps, config.corpus) == (9, "some/where")
    assert model_config == ButterflyConfig.preset("micro", carry_size=0, num_passes=1)
    for text, message in (
        ("[train]\nstep = 3", "unknown field 'step' .did you mean 'steps'"),
        ("[trian]\nsteps = 3", "unknown key 'trian' .did you mean 'train'"),
        ('preset = "tinny"', "unknown preset 'tinny' .did you mean 'tiny'"),
        ("[model]\nhidden = 3", "unknown field 'hidden'"),
        ('[train]\nsteps = "many"', "steps must be a whole number"),
        ("[train]\nlengths = [[0.5, 64]]", "must rise to 1"),
        ("[train]\nlengths = [[1.0, 48]]", "length 48 does not divide batch_chars"),
        ("[train]\nbatch_chars = 8192\nmicro_chars = 5000", "micro_chars 5000 does not cut"),
        ("[train", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_run(path)
        assert "\n" not in str(caught.value)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: not TOML")


def trigram_bits(training: np.ndarray[Any, Any], held_out: np.ndarray[Any, Any]) -> float:
    """Bits per character of an interpolated 3-gram model: each order add-k smoothed with the one below.

    Both strengths are chosen on the held-out text itself: the best that the baseline could do.
    """
    counts = np.bincount(
        (training[:-2].astype(np.int64) * 256 + training[1:-1]) * 256 + training[2:], minlength=256**3
    ).reshape(256, 256, 256)
    pairs, singles = counts.sum(0), counts.sum((0, 1))
    x, y, z = held_out[:-2], held_out[1:-1], held_out[2:]
    one = (singles[z] + 1) / (singles.sum() + 256)
    best = math.inf
    for weak in (1, 3, 10, 30):
        two = (pairs[y, z] + weak * one) / (pairs.sum(1)[y] + weak)
        for strong in (1, 3, 10, 30):
            three = (counts[x, y, z] + strong * two) / (counts.sum(2)[x, y] + strong)
            best = min(best, float(-np.log2(three).mean()))
    return best


@pytest.mark.slow
def test_three_hundred_steps_beat_a_trigram_model(settings: TrainConfig) -> None:
    config = change(
        settings,
        steps=300,
        batch_chars=2048,
        lengths=((1.0, 128),),
        learning_rate=6e-3,
        warmup_steps=20,
        log_every=60,
        val_length=512,
        val_chars=65_536,
    )
    result = train(config, ButterflyConfig.preset("micro"))
    baseline = trigram_bits(Corpus(config.corpus).data, Corpus(config.corpus, "val").data[: 65_536 + 1])
    print(f"model {result.val_bits:.3f}, 3-gram {baseline:.3f} bits/char")
    assert result.val_bits < baseline - 0.05


def test_gradients_can_stay_where_they_are(settings: TrainConfig) -> None:
    model = Butterfly(NANO)
    optimizers = Optimizers(model, settings)
    optimizers.drop_gradients = False
    ids = torch.randint(0, 256, (1, 33))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    places = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    optimizers.step(1e-3, torch.zeros((), dtype=torch.bool))
    assert len(places) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.data_ptr() == places[name] and not p.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("micro_chars", [0, 512])
def test_on_a_gpu_a_captured_step_is_the_step_itself(settings: TrainConfig, micro_chars: int) -> None:
    config = change(settings, lengths=((0.5, 512), (1.0, 1024)), batch_chars=1024, val_every=3)
    config = change(config, device="cuda", micro_chars=micro_chars, recall_share=0.5, deterministic=True)
    try:
        captured = train(config, NANO)
        launched = train(change(config, out=config.out + "2", cuda_graph=False), NANO)
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured.losses == launched.losses
    assert all(torch.equal(p, parameters(launched)[name]) for name, p in parameters(captured).items())
