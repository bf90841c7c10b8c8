"""Evaluation: every character counted once, in the right bucket, on the same bytes as the compressors."""

import json
import lzma
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from butterfly_llm import evaluate as module
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.data import prepare
from butterfly_llm.evaluate import (
    Document,
    character_nats,
    estimate_bytes,
    evaluate,
    format_table,
    load_documents,
)
from toy import Toy

TEXT = bytes(torch.randint(32, 127, (300,), generator=torch.Generator().manual_seed(0)).tolist())
SOURCE = Path(module.__file__).read_bytes()  # long enough for the levels of the compressors to differ


@pytest.fixture
def model():
    return Toy(sharpness=0.3)


def bits_one_by_one(model, data):
    """Bits of each character of one window that starts a text, by stepping."""
    cache, previous, bits = model.new_cache(1), 0, []
    for character in data:
        logits = model.step(torch.tensor([previous]), cache)[0]
        bits.append(-torch.log_softmax(logits.double(), 0)[character].item() / math.log(2))
        previous = character
    return bits


def test_bits_per_char_is_the_mean_over_all_characters_from_the_separator_on(model):
    result = evaluate(model, [Document("a", TEXT)], context=1000)
    expected = bits_one_by_one(model, TEXT)
    assert result.chars == len(TEXT)
    assert result.bits_per_char == pytest.approx(sum(expected) / len(TEXT), rel=1e-5)
    assert result.documents[0].bits_per_char == result.bits_per_char
    assert [(b.start, b.stop, b.chars) for b in result.buckets] == [(0, 128, 128), (128, 1000, 172)]
    assert result.buckets[0].bits_per_char == pytest.approx(sum(expected[:128]) / 128, rel=1e-5)
    assert result.buckets[1].bits_per_char == pytest.approx(sum(expected[128:]) / 172, rel=1e-5)


def test_windows_do_not_overlap_and_begin_with_the_character_before(model):
    result = evaluate(model, [Document("a", TEXT)], context=64)
    stream = torch.tensor([0, *TEXT])
    nats = 0.0
    for start in range(0, 300, 64):
        window = stream[start : start + 65]
        nats += character_nats(model, window[None, :-1], window[None, 1:]).sum().item()
    assert result.bits_per_char == pytest.approx(nats / math.log(2) / 300, rel=1e-5)
    assert [(b.start, b.stop, b.chars) for b in result.buckets] == [(0, 64, 300)]


@pytest.mark.parametrize("batch_chars", [1, 64, 100, 150, 1000])
def test_batching_and_padding_change_nothing(model, batch_chars):
    documents = [Document("a", TEXT), Document("b", TEXT[:1]), Document("c", TEXT[50:107])]
    whole = evaluate(model, documents, context=50, batch_chars=10**6, compressors=False)
    model.widths.clear()
    got = evaluate(model, documents, context=50, batch_chars=batch_chars, compressors=False)
    assert got.chars == whole.chars == 300 + 1 + 57
    for one, other in zip(got.documents, whole.documents, strict=True):
        assert (one.name, one.chars) == (other.name, other.chars)
        assert one.bits_per_char == pytest.approx(other.bits_per_char, rel=1e-6)
    for rows, width in model.widths:
        assert width <= 50 and (rows == 1 or rows * width <= batch_chars)


def test_total_weighs_texts_by_their_characters(model):
    result = evaluate(model, [Document("a", TEXT), Document("b", TEXT[:9])], context=64)
    a, b = result.documents
    assert result.bits_per_char == pytest.approx((a.bits_per_char * 300 + b.bits_per_char * 9) / 309)
    assert result.xz == pytest.approx((a.xz * 300 + b.xz * 9) / 309)
    assert sum(bucket.chars for bucket in result.buckets) == 309


def test_context_defaults_to_the_models_reach_up_to_65536(model):
    assert evaluate(model, [Document("a", b"x")]).context == model.config.reach_chars == 128
    assert evaluate(Toy(num_levels=20), [Document("a", b"x")]).context == 65_536


@pytest.mark.parametrize(
    ("context", "stops"),
    [(1, [1]), (128, [128]), (129, [128, 129]), (65_536, [128, 1024, 4096, 16_384, 65_536])],
)
def test_buckets_end_at_the_context(context, stops):
    assert list(module._edges(context)) == stops


def test_compressors_get_the_same_bytes(model):
    data = SOURCE
    result = evaluate(model, [Document("a", data)], context=64)
    assert result.xz == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    if shutil.which("xz"):
        packed = subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout
        assert result.xz == 8 * len(packed) / len(data)


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd program")
@pytest.mark.parametrize("package", [True, False])
def test_zstd_by_package_or_program(monkeypatch, package):
    packed = subprocess.run(["zstd", "-19", "-q", "-c"], input=SOURCE, capture_output=True, check=True).stdout
    if package:
        pytest.importorskip("zstandard")
    else:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found = module._zstd(SOURCE)
    assert found is not None and abs(found - len(packed)) <= 16  # only the program adds a checksum


def test_without_zstd_it_is_reported_as_missing(model, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    result = evaluate(model, [Document("a", SOURCE[:100])], context=64)
    assert result.zstd is None and result.documents[0].zstd is None
    assert "missing" in format_table(result)


def test_progress_counts_characters_up_to_all(model):
    seen = []
    evaluate(
        model,
        [Document("a", TEXT), Document("b", TEXT[:9])],
        context=64,
        batch_chars=64,
        progress=seen.append,
    )
    assert seen == sorted(set(seen)) and seen[-1] == 309


def test_result_as_json_and_as_table(model):
    result = evaluate(model, [Document("a.txt", TEXT), Document("b.txt", TEXT[:9])], context=200)
    loaded = json.loads(result.to_json())
    assert loaded["bits_per_char"] == result.bits_per_char and loaded["documents"][1]["name"] == "b.txt"
    assert loaded["buckets"][1] == {
        "start": 128, "stop": 200, "chars": 72, "bits_per_char": result.buckets[1].bits_per_char,
    }  # fmt: skip
    table = format_table(result)
    for part in ("a.txt", "b.txt", "all", "309", f"{result.bits_per_char:.3f}", "xz -9e", "128 to 200"):
        assert part in table


def test_a_file_is_evaluated_as_it_stands_and_a_folder_in_the_corpus_format(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "d" / "b.py").write_text("y = 'é'\n", encoding="utf-8")
    file, folder = load_documents([tmp_path / "d" / "b.py", tmp_path / "d"])
    assert (file.name, file.data) == (str(tmp_path / "d" / "b.py"), b"y = '\xe9'\n")
    assert folder.data == b"==> a.py <==\nx = 1\n==> b.py <==\ny = '\xe9'\n"
    (cut,) = load_documents([tmp_path / "d" / "b.py"], max_chars=3, encoding="utf-8")
    assert cut.data == b"y ="


def test_of_a_corpus_the_validation_documents_are_evaluated(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(f"{name}\n")
    prepare([tmp_path / n for n in ("one", "two", "three")], tmp_path / "c", holdout=["one", "two"])
    documents = load_documents([tmp_path / "c"])
    assert [(d.name, d.data) for d in documents] == [
        ("one", b"==> a.py <==\none\n"),
        ("two", b"==> a.py <==\ntwo\n"),
    ]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_documents([tmp_path / "nosuch"])
    (tmp_path / "a").write_text("€")
    with pytest.raises(ValueError, match="outside Latin-1"):
        load_documents([tmp_path / "a"])
    assert load_documents([tmp_path / "a"], errors="replace")[0].data == b"?"


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "no text"),
        ([Document("a", b"x"), Document("b", b"")], {}, "b is empty"),
        ([Document("a", b"x")], {"context": 0}, "context must be at least 1"),
    ],
)
def test_bad_input_is_one_line(model, documents, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, documents, **options)


def test_a_context_that_memory_cannot_hold_is_refused_before_the_pass(model, monkeypatch):
    monkeypatch.setattr("butterfly_llm.memory.available_bytes", lambda device="cpu": 10_000_000)
    documents = [Document("a", bytes(100_000))]
    with pytest.raises(ValueError, match=r"context of 50,000 needs .* 10.0 MB are free: use a shorter"):
        evaluate(model, documents, context=50_000)
    with pytest.raises(ValueError, match="context of 64 needs"):
        evaluate(model, documents, context=64, batch_chars=50_000)
    evaluate(model, [Document("a", bytes(100))], context=50_000)
    assert model.widths == [(1, 100)]


def test_estimate_is_near_the_measured_peak():
    # measured: two layers, float32, one CPU, bytes per character
    for preset, measured in (("tiny", 14_384), ("small", 28_459), ("full", 70_732)):
        assert 0.95 < estimate_bytes(ButterflyConfig.preset(preset), 1) / measured < 1.2


def test_bidirectional_model_has_no_bits_per_character():
    with pytest.raises(ValueError, match="not causal"):
        evaluate(Toy(routing="xor"), [Document("a", b"x")])
