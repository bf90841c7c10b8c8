"""The Hugging Face model is the one model: same numbers, whichever of the two interfaces is used."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import butterfly_llm.cache
import butterfly_llm.model
from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.generate import generate
from butterfly_llm.hf import (
    ButterflyCache,
    ButterflyForCausalLM,
    ButterflyHFConfig,
    CharacterIteratorStreamer,
    CharacterStreamer,
    export_hf,
    import_hf,
    make_tokenizer,
)
from butterfly_llm.model import Butterfly
from conftest import random_model

CONFIG = ButterflyConfig.preset(
    "micro", ngram_orders=(1, 2, 3), ngram_words=2, ngram_ranks=2, ngram_slots=4096
)
ALL = bytes(range(256)).decode("latin-1")
LONG = 5 * CONFIG.chunk_size + 3  # characters: partners of stride 1, 2 and 4 exist


@pytest.fixture(scope="module")
def model() -> Butterfly:
    return random_model(CONFIG).eval()


@pytest.fixture(scope="module")
def hf(model: Butterfly) -> ButterflyForCausalLM:
    return ButterflyForCausalLM.from_butterfly(model)


def text(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Seven letters (batch, length), so that n-grams come back; not the separator, which would end a text."""
    return torch.randint(1, 8, (batch, length), generator=torch.Generator().manual_seed(seed))


def write(hf: ButterflyForCausalLM, ids: Tensor, count: int, **options: Any) -> Any:
    """`generate` with all-one mask and nothing that ends a text."""
    options = {"do_sample": False, "eos_token_id": None, **options}
    mask = torch.ones_like(ids)
    return hf.generate(ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0, **options)


@torch.no_grad()
def log_likelihood(model: Butterfly, ids: Tensor, prompt: int) -> float:
    """Of the characters after the first `prompt` of ids (N,), in nats."""
    logs = model(ids[None, :-1]).log_softmax(-1)[0]
    return logs.gather(1, ids[1:, None])[prompt - 1 :].sum().item()


def test_logits_are_those_of_the_model(model, hf):
    ids = text(LONG, 2)
    expected = model(ids)
    assert torch.equal(hf(ids).logits, expected)
    # A product with fewer rows may be summed in another order.
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(hf(ids, logits_to_keep=3).logits, expected[:, -3:], **close)
    some = torch.tensor([0, 7])
    torch.testing.assert_close(hf(ids, logits_to_keep=some).logits, expected[:, some], **close)
    assert hf(ids).past_key_values is None
    assert hf.model is model


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_a_cache_is_read_on_in_any_split_with_the_logits_of_every_character(model, hf, keep, monkeypatch):
    monkeypatch.setattr(model, "prefill_slice", 2 * CONFIG.chunk_size)
    ids = text(LONG, 2)
    expected = model(ids)
    cache, start = None, 0
    with torch.no_grad():
        for count in (20, 1, 10, LONG - 31):
            part = ids[:, start : start + count]
            out = hf(part, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            cache, start = out.past_key_values, start + count
            kept = min(keep or count, count)
            torch.testing.assert_close(out.logits, expected[:, start - kept : start], atol=1e-4, rtol=1e-4)
            assert cache.get_seq_length() == start and not out.logits.is_inference()


def test_the_loss_and_its_gradient_are_those_of_the_model():
    model = random_model(CONFIG)
    hf = ButterflyForCausalLM.from_butterfly(model)
    ids = text(40, 2)
    labels = ids.clone()
    labels[:, 30:] = -100
    loss = hf(ids, labels=labels).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    weights = torch.zeros(2, 39)
    weights[:, :29] = 1
    expected = model.loss(ids[:, :-1], ids[:, 1:], weights)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="no gradient"):
        hf(ids, labels=labels, use_cache=True)


def test_gradient_checkpointing_is_the_models_own(monkeypatch):
    calls = []
    run = butterfly_llm.model.recomputed_layer
    monkeypatch.setattr(
        butterfly_llm.model, "recomputed_layer", lambda *arguments: calls.append(1) or run(*arguments)
    )
    hf = ButterflyForCausalLM.from_butterfly(random_model(CONFIG)).train()
    ids = text(20)
    expected = hf(ids, labels=ids).loss
    hf.gradient_checkpointing_enable()
    assert not calls
    assert hf(ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(calls) == CONFIG.num_layers


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"use_cache": False}])
def test_greedy_is_the_greedy_of_generate(model, hf, options):
    ids = text(LONG)
    expected = list(generate(model, ids, sampling=SamplingConfig(temperature=0), max_chars=20))
    assert write(hf, ids, 20, **options)[0, LONG:].tolist() == expected


def test_several_texts_at_once_are_those_of_each_alone(hf):
    ids = text(LONG, 3)
    alone = [write(hf, row[None], 12) for row in ids]
    assert torch.equal(write(hf, ids, 12), torch.cat(alone))


def test_sampling_follows_the_seed(hf):
    ids = text(20)

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return write(hf, ids, 12, do_sample=True, top_k=50)[0].tolist()

    assert sample(1) == sample(1) != sample(2)


def test_the_separator_ends_a_text(model):
    hf = ButterflyForCausalLM.from_butterfly(copy.deepcopy(model))
    assert hf.generation_config.eos_token_id == 0
    ids = text(20)
    third = int(write(hf, ids, 3)[0, -1])
    assert hf.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=third).shape == (1, 23)


def test_beams_wide_enough_find_the_best_of_all_texts(model, hf):
    # Three characters to choose from, three to write: nine beams keep all pairs, so nothing is lost.
    letters, prompt = [65, 66, 67], text(2 * CONFIG.chunk_size - 2)
    options = {"prefix_allowed_tokens_fn": lambda *_: letters, "output_scores": True, "length_penalty": 0.0}
    found = write(hf, prompt, 3, num_beams=9, num_return_sequences=9, return_dict_in_generate=True, **options)
    texts = [torch.cat([prompt[0], torch.tensor(end)]) for end in itertools.product(letters, repeat=3)]
    ranked = sorted(texts, key=lambda ids: -log_likelihood(model, ids, prompt.shape[1]))[:9]
    assert torch.equal(found.sequences, torch.stack(ranked))
    scores = [log_likelihood(model, ids, prompt.shape[1]) for ids in ranked]
    assert found.sequences_scores.tolist() == pytest.approx(scores, abs=1e-4)


def test_beams_through_several_chunks_score_what_the_model_scores(model, hf):
    # The score is summed over steps from the reordered caches: a beam with another's past would be off.
    prompt = text(LONG, 2)
    found = write(hf, prompt, 40, num_beams=4, return_dict_in_generate=True, output_scores=True)
    for ids, score in zip(found.sequences, found.sequences_scores.tolist(), strict=True):
        assert score * 40 == pytest.approx(log_likelihood(model, ids, LONG), abs=1e-3)
    greedy = write(hf, prompt, 40)
    gains = [
        log_likelihood(model, b, LONG) - log_likelihood(model, g, LONG)
        for b, g in zip(found.sequences, greedy, strict=True)
    ]
    assert sum(gains) > 0


@pytest.mark.parametrize("length", [5, LONG, 9 * CONFIG.chunk_size + 1])
def test_reordering_and_selecting_streams(model, hf, length):
    ids, then = text(length, 3), text(4, 3, seed=1)

    @torch.no_grad()
    def after(rows: list[int], cache: ButterflyCache) -> None:
        new = then[: len(rows)]
        expected = model(torch.cat([ids[rows], new], 1))[:, -4:]
        logits = hf(new, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    def read() -> ButterflyCache:
        with torch.no_grad():
            return hf(ids, use_cache=True, logits_to_keep=1).past_key_values

    cache = read()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after([2, 0, 0], cache)
    cache = read()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    after([0, 2], cache)
    cache = read()
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    after([1, 1], cache)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_continuation_from_the_past_is_one_run(hf):
    ids = text(LONG)
    whole = write(hf, ids, 20)
    first = write(hf, ids, 8, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == LONG + 7  # the last character was drawn, not read
    branch = copy.deepcopy(cache)
    assert torch.equal(write(hf, first.sequences, 12, past_key_values=cache), whole)
    assert torch.equal(write(hf, first.sequences, 12, past_key_values=branch), whole)
    assert cache.get_seq_length() == branch.get_seq_length() == LONG + 19
    assert len(cache) == CONFIG.num_layers and "streams=1" in repr(cache)


def test_what_a_stream_cannot_do_is_refused_in_one_line(hf):
    ids = text(20)
    out = write(hf, ids, 4, return_dict_in_generate=True)
    cache = out.past_key_values
    with pytest.raises(ValueError, match="has read 23 characters and input_ids hold 20"):
        write(hf, ids, 4, past_key_values=cache)
    with pytest.raises(ValueError, match="rewound"):
        cache.crop(3)
    cache.crop(0)
    assert not cache.is_croppable and not cache.is_compileable and cache.get_max_length() == -1
    with pytest.raises(ValueError, match="must be a ButterflyCache, not DynamicCache"):
        write(hf, ids, 4, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        write(hf, ids, 4, cache_implementation="static")
    with pytest.raises(ValueError, match="for this cache"):
        hf(text(3, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids are missing"):
        hf()
    with pytest.raises(TypeError, match="position_ids"):
        hf(ids, position_ids=ids)
    with pytest.raises(ValueError, match="routing xor"):
        ButterflyForCausalLM(ButterflyHFConfig(**CONFIG.to_dict() | {"routing": "xor"}))


def test_padding_on_the_left_is_refused_on_the_right_it_is_harmless(model, hf):
    ids = text(20, 2)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4] = 0
    right[0, -4:] = 0
    with pytest.raises(ValueError, match="padding on the left"):
        hf(ids, attention_mask=left)
    hole = right.clone()
    hole[0, -1] = 1
    with pytest.raises(ValueError, match="padding on the left or inside"):
        hf(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="must be \\(batch, characters\\)"):
        hf(ids, attention_mask=torch.ones(2, 1, 20, 20))
    for mask in (left, right):
        with pytest.raises(ValueError, match="padding with a cache"):
            hf.generate(ids, attention_mask=mask, max_new_tokens=1)
    short = hf(ids, attention_mask=right).logits[0, :-4]
    torch.testing.assert_close(short, model(ids[:1, :-4])[0], atol=1e-4, rtol=1e-4)


def test_padding_by_the_tokenizer_is_seen(hf):
    batch = make_tokenizer()(["short", "much longer"], padding=True, return_tensors="pt")
    assert torch.isfinite(hf(**batch).logits).all()
    with pytest.raises(ValueError, match="padding with a cache"):
        hf.generate(**batch, max_new_tokens=2)


def test_saved_and_loaded_by_the_auto_classes(model, hf, tmp_path):
    write(hf, text(5), 3)  # decoding on the CPU lays the matrices out anew: saved all the same
    hf.save_pretrained(tmp_path, max_shard_size="200KB")
    make_tokenizer().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(name.endswith(".safetensors") for name in names) > 1 and not any("bin" in n for n in names)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.butterfly == CONFIG and config.num_hidden_layers == CONFIG.num_layers
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ButterflyForCausalLM and not loaded.training
    ids = text(LONG)
    assert torch.equal(loaded(ids).logits, hf(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [97, 98]
    assert loaded.get_input_embeddings() is loaded.model.embed
    assert loaded.get_output_embeddings() is loaded.model.head


def test_what_is_pushed_to_the_hub_is_a_whole_model(hf, tmp_path, monkeypatch):
    """Both uploads, kept in a folder instead, load by the Auto classes."""

    def keep(self, *, operations, **_):
        for operation in operations:
            (tmp_path / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", keep)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# A model\n"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    hf.push_to_hub("someone/butterfly")
    make_tokenizer().push_to_hub("someone/butterfly")
    ids = text(20)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, hf(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [97, 98]
    assert (tmp_path / "README.md").exists() and (tmp_path / "generation_config.json").exists()


def test_the_tokenizer_folder_needs_no_import_of_ours(hf, tmp_path):
    hf.config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import PreTrainedTokenizerFast\n"
        f"t = PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r})\n"
        "assert t('a b').input_ids == [97, 32, 98] and 'butterfly_llm' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_folder_without_all_weights_is_refused(hf, tmp_path):
    weights = dict(hf.state_dict())
    del weights["model.norm.weight"]
    hf.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_new_parameters_are_seen_by_the_next_step(model):
    hf, ids = ButterflyForCausalLM(ButterflyHFConfig(**CONFIG.to_dict())).eval(), text(20)
    write(hf, ids, 3)
    hf.load_state_dict({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, assign=True)
    expected = list(generate(model, ids, sampling=SamplingConfig(temperature=0), max_chars=5))
    assert write(hf, ids, 5)[0, 20:].tolist() == expected


def test_a_new_model_is_initialised_as_ours():
    torch.manual_seed(3)
    expected = Butterfly(CONFIG)
    torch.manual_seed(3)
    built = AutoModelForCausalLM.from_config(ButterflyHFConfig(**CONFIG.to_dict()))
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, built.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="num_kv_heads 3 must divide"):
        ButterflyHFConfig(num_key_value_heads=3)


def test_converted_to_and_from_our_own_folder(model, tmp_path):
    save_model(model, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "back")
    ids = text(20)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits, model(ids))
    assert torch.equal(load_pretrained(tmp_path / "back")(ids), model(ids))
    import_hf(tmp_path / "theirs", tmp_path / "small", dtype="int8")
    error = (load_pretrained(tmp_path / "small")(ids) - model(ids)).abs().max()
    assert 0 < error < 0.2


def test_bfloat16_is_computed_in_bfloat16_and_back(model, hf, tmp_path):
    hf.save_pretrained(tmp_path)
    half = ButterflyForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = text(20)
    out = write(half, ids, 4, return_dict_in_generate=True)
    assert half.model.compute_dtype == torch.bfloat16
    assert out.past_key_values.state.keys[0].dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).logits, model(ids), atol=0.2, rtol=0.1)
    half.float()(ids)
    assert half.model.compute_dtype == torch.float32


def test_every_character_is_a_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one(ALL).input_ids == list(range(256))
        assert one.decode(list(range(256))) == ALL
        assert one("a\0b  .\r\n").input_ids == list(b"a\0b  .\r\n")
        assert one.decode(list(b"a\0? .b"), skip_special_tokens=True) == "a? .b"
        assert one("1 \u20ac").input_ids == list(b"1 ?")
        assert {one.bos_token_id, one.eos_token_id, one.pad_token_id} == {0}
        assert len(one) == 256 and one.all_special_ids == [0]


@pytest.mark.parametrize("skip", [True, False])
def test_the_streamer_hands_out_every_character_at_once(hf, skip):
    pieces: list[str] = []

    class Collect(CharacterStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append("END" if stream_end else text)

    streamer = Collect(make_tokenizer(), skip_prompt=skip)
    for _ in range(2):
        ids = write(hf, text(6), 5, streamer=streamer)[0, 6 if skip else 0 :]
        assert pieces == [*bytes(ids.tolist()).decode("latin-1"), "END"]
        pieces.clear()
    streamer.put(torch.tensor([[97]]))
    streamer.put(torch.tensor([98]))
    assert pieces[-1] == "b"  # without waiting for white space
    with pytest.raises(ValueError, match="one text, not 2"):
        streamer.put(text(3, 2))


def test_the_streamer_as_an_iterator(hf):
    streamer = CharacterIteratorStreamer(make_tokenizer(), skip_prompt=True, timeout=60)
    ids = text(6)
    thread = threading.Thread(target=write, args=(hf, ids, 5), kwargs={"streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert all(len(piece) == 1 for piece in pieces)
    assert "".join(pieces) == bytes(write(hf, ids, 5)[0, 6:].tolist()).decode("latin-1")


def test_only_written_slots_are_moved(hf, monkeypatch):
    """A reorder after few characters must not touch, and so commit, the whole rings; n-grams move whole."""
    cache = ButterflyCache()
    with torch.no_grad():
        hf(text(5, 2), past_key_values=cache)
    moved = 0
    select = Tensor.index_select

    def counting(self: Tensor, *args: Any) -> Tensor:
        nonlocal moved
        moved += self.nbytes
        return select(self, *args)

    monkeypatch.setattr(Tensor, "index_select", counting)
    cache.reorder_cache(torch.tensor([1, 0]))
    slots = [route.stride + 1 for route in butterfly_llm.cache.routes_of(CONFIG)]
    told = cache.state.ngrams.nbytes
    assert 0 < moved - told < (cache.state.nbytes - told) * 1.2 * len(slots) / sum(slots)


def test_without_the_extra_there_is_a_one_line_hint():
    program = "import sys; sys.modules['transformers'] = None; import butterfly_llm.hf"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'butterfly-llm[hf]'" in result.stderr.splitlines()[-1]
