"""Generation: the draw, the seed, the cache, stop strings, repetition, text."""

import math

import pytest
import torch

from butterfly_llm.config import ButterflyConfig, SamplingConfig
from butterfly_llm.generate import _hold_back, generate, generate_text, probabilities
from conftest import random_model
from toy import Toy

PROMPT = b"def main(argv):"
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model():
    return Toy()


def write(model, prompt=PROMPT, chars=40, **options):
    return bytes(generate(model, list(prompt), max_chars=chars, **options))


def test_greedy_takes_the_likeliest_character_of_the_forward_pass(model):
    text = write(model, sampling=GREEDY)
    logits = model(torch.tensor([list(PROMPT + text)]))[0, len(PROMPT) - 1 : -1]
    assert text == bytes(logits.argmax(-1).tolist())


def test_same_seed_same_text_and_other_seed_other_text(model):
    assert write(model, sampling=SamplingConfig(seed=3)) == write(model, sampling=SamplingConfig(seed=3))
    assert write(model, sampling=SamplingConfig(seed=3)) != write(model, sampling=SamplingConfig(seed=4))


def test_global_random_state_is_neither_read_nor_changed(model):
    torch.manual_seed(1)
    first = write(model)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert write(model) == first


@pytest.mark.parametrize("cut", [1, 7, len(PROMPT) - 1])
def test_text_does_not_depend_on_how_the_prompt_was_split(model, cut):
    cache = model.new_cache(1)
    model.prefill(torch.tensor([list(PROMPT[:cut])]), cache)
    assert write(model, PROMPT[cut:], cache=cache) == write(model)


def test_writing_can_be_interrupted_and_taken_up_again(model):
    whole = write(model, chars=30)
    cache = model.new_cache(1)
    first = write(model, chars=12, cache=cache)
    assert first == whole[:12]
    # the cache has read all that was yielded: reading one character more gives its place in the whole
    assert whole[13:] == write(model, whole[12:13], chars=17, cache=cache)


def test_the_real_model_writes_the_same_text_however_it_is_fed():
    model = random_model(ButterflyConfig.preset("micro"))
    prompt = PROMPT * 3
    whole = write(model, prompt, chars=20)
    cache = model.new_cache(1)
    for start in range(0, 40, 5):
        model.prefill(torch.tensor([list(prompt[start : start + 5])]), cache)
    first = write(model, prompt[40:], chars=9, cache=cache)
    assert first == whole[:9] and cache.position == len(prompt) + 9
    assert write(model, whole[9:10], chars=10, cache=cache) == whole[10:]
    with pytest.raises(ValueError, match="bidirectional"):
        write(random_model(ButterflyConfig.preset("micro", routing="xor")))


def test_cache_has_read_every_character_at_the_moment_it_is_yielded(model):
    cache = model.new_cache(1)
    for count, _ in enumerate(generate(model, list(PROMPT), max_chars=5, cache=cache), start=1):
        assert cache.position == len(PROMPT) + count


def test_the_prompt_is_read_on_the_first_next_with_progress(model):
    cache, seen = model.new_cache(1), []
    stream = generate(model, list(PROMPT), max_chars=3, cache=cache, progress=seen.append)
    assert cache.position == 0
    next(stream)
    assert seen == list(range(1, len(PROMPT) + 1))


def test_draws_follow_the_distribution():
    logits = torch.full((256,), -math.inf)
    logits[10:14] = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()

    class Fixed(Toy):
        def _read(self, ids, cache):
            super()._read(ids, cache)
            return logits.clamp_min(-1e4)[None]

    text = write(Fixed(), b"x", chars=4000, sampling=SamplingConfig(temperature=1))
    shares = [text.count(c) / len(text) for c in range(10, 14)]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.3, 0.1, 0.4, 0.2], abs=0.03)  # 4 standard deviations


def test_temperature_sharpens_as_the_softmax_does():
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0))
    got = probabilities(logits, b"", SamplingConfig(temperature=0.5))
    torch.testing.assert_close(got, torch.softmax(logits.double() / 0.5, 0))
    cold = probabilities(logits, b"", SamplingConfig(temperature=1e-30))
    assert cold.argmax() == logits.argmax() and cold.max() == 1


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    plain = SamplingConfig(temperature=1)
    assert probabilities(logits, b"", plain).tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    top_k = probabilities(logits, b"", SamplingConfig(temperature=1, top_k=2))
    assert top_k.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    top_p = probabilities(logits, b"", SamplingConfig(temperature=1, top_p=0.8))
    assert top_p.tolist() == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0])
    smallest = probabilities(logits, b"", SamplingConfig(temperature=1, top_p=1e-9))
    assert smallest.tolist() == [1, 0, 0, 0]


def test_repetition_penalty_weakens_recent_characters_of_either_sign():
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])
    config = SamplingConfig(temperature=1, repetition_penalty=2, repetition_window=2)
    got = probabilities(logits, bytes([2, 3, 0, 1]), config)  # 2 and 3 are out of the window
    torch.testing.assert_close(got, torch.softmax(torch.tensor([1.0, -4.0, 2.0, -2.0]).double(), 0))


def test_no_repeat_ngram_writes_no_ngram_twice():
    config = SamplingConfig(temperature=0, no_repeat_ngram=3)

    class Loop(Toy):  # always wants a b c d a b c d ...
        def _read(self, ids, cache):
            super()._read(ids, cache)
            logits = torch.linspace(0, 1, 256)[None].clone()
            logits[0, (int(ids[0]) - 97 + 1) % 4 + 97] = 9.0
            return logits

    assert write(Loop(), b"a", chars=8, sampling=GREEDY) == b"bcdabcda"
    text = b"a" + write(Loop(), b"a", chars=300, sampling=config)
    grams = [text[i : i + 3] for i in range(len(text) - 2)]
    assert text.startswith(b"abcdab") and len(grams) == len(set(grams))


@pytest.mark.parametrize(
    ("drawn", "stops", "expected"),
    [
        (b"hello END more", [b"END"], b"hello "),
        (b"hello EN more", [b"END"], b"hello EN more"),
        (b"aaab", [b"aab"], b"a"),  # the beginning of a stop string may overlap itself
        (b"text EN", [b"END"], b"text EN"),  # the held back end is not lost
        (b"one\n\ntwo", [b"two", b"\n\n"], b"one"),
        (b"x<end>", [b"d>", b"<end>"], b"x"),
        (b"plain", [], b"plain"),
    ],
)
def test_stop_strings(drawn, stops, expected):
    assert bytes(_hold_back(iter(drawn), stops)) == expected


def test_characters_that_cannot_begin_a_stop_string_are_not_held_back():
    source = iter(b"abENc")
    stream = _hold_back(source, [b"END"])
    assert bytes((next(stream), next(stream))) == b"ab"
    assert bytes(source) == b"ENc"


def test_stop_string_ends_the_text(model):
    text = write(model, sampling=GREEDY)
    stop = text[10:13]
    assert write(model, sampling=GREEDY, stop=[stop]) == text[: text.index(stop)]


def test_text_in_utf8_appears_when_a_character_is_complete():
    target = "aé€😀".encode()

    class Spell(Toy):
        def _read(self, ids, cache):
            super()._read(ids, cache)
            logits = torch.zeros(1, 256)
            logits[0, target[(cache.position - 1) % len(target)]] = 9.0
            return logits

    def read(chars, **options):
        return list(generate_text(Spell(), [0], sampling=GREEDY, max_chars=chars, **options))

    assert read(len(target), encoding="utf-8") == ["a", "é", "€", "😀"]
    assert read(len(target) - 1, encoding="utf-8")[-1] == "\ufffd"
    assert "".join(read(len(target))) == target.decode("latin-1")
    assert read(len(target), encoding="utf-8", stop=["€"]) == ["a", "é"]


@pytest.mark.parametrize("shape", ["list", "vector", "row", "uint8"])
def test_prompt_forms_agree(model, shape):
    ids = torch.tensor(list(PROMPT))
    forms = {"list": list(PROMPT), "vector": ids, "row": ids[None], "uint8": ids.to(torch.uint8)}
    assert bytes(generate(model, forms[shape], max_chars=8)) == write(model, chars=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": []}, "prompt is empty"),
        ({"ids": [256]}, "ids must be 0 to 255, found 256"),
        ({"ids": [-1]}, "ids must be 0 to 255, found -1"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, r"not \(2, 3\)"),
        ({"ids": torch.zeros(3)}, "whole numbers"),
        ({"max_chars": -1}, "max_chars"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": ["€"]}, "outside Latin-1"),
    ],
)
def test_bad_input_is_refused_on_the_call(model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **{"ids": [1], "max_chars": 1, **options})
    assert "\n" not in str(caught.value)


def test_cache_of_several_streams_is_refused(model):
    with pytest.raises(ValueError, match="the cache holds 2"):
        generate(model, [1], max_chars=1, cache=model.new_cache(2))


def test_output_that_is_not_finite_is_reported():
    model = Toy(sharpness=math.nan)
    with pytest.raises(ValueError, match="not finite"):
        write(model)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}, {"repetition_window": 0},
        {"no_repeat_ngram": -1}, {"seed": -1}, {"seed": True},
    ],
)  # fmt: skip
def test_sampling_config_refuses_what_means_nothing(bad):
    with pytest.raises(ValueError, match=f"sampling: {next(iter(bad))}"):
        SamplingConfig(**bad)
