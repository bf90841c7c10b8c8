"""More levels for a trained model: the same characters at first, and layers that learn when trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from butterfly_llm.cache import cache_nbytes
from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.cli import main
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.extend import extend_levels, extend_local, extend_ngrams
from conftest import random_model

SHAPES = {
    "micro": {},
    "extra levels, gated": {"num_extra_levels": 2, "feed_forward": "swiglu"},
    "gated carry": {"carry_heads": 0},
    "no carry": {"carry_size": 0, "num_refine_layers": 2},
    "local chunks": {"local_chunks": 2, "local_every": 2},
}


@pytest.mark.parametrize("passes", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_longer_model_writes_the_same_within_the_old_reach(shape: str, passes: int | None) -> None:
    model = random_model(ButterflyConfig.preset("micro", **SHAPES[shape]))
    longer = extend_levels(model, 5, passes)
    long = {"num_long_passes": 1, "num_long_levels": 5} if passes == 1 else {"num_levels": 5}
    assert longer.config == dataclasses.replace(model.config, **long)
    assert longer.config.num_layers == model.config.num_layers + 2 * (passes or 2)
    assert longer.config.reach_chars == 4 * model.config.reach_chars
    ids = torch.randint(256, (2, model.config.reach_chars), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(longer(ids), model(ids), rtol=0, atol=1e-5)
    cache = longer.new_cache(2)
    torch.testing.assert_close(longer.prefill(ids, cache), model(ids)[:, -1], rtol=0, atol=1e-4)
    # The carry of a long pass hears further at once, and later passes read it.
    beyond = torch.randint(256, (1, 3 * model.config.reach_chars))
    same = torch.allclose(longer(beyond), model(beyond), atol=1e-4)
    assert same == (model.config.carry_size == 0)


def test_one_long_pass_hears_as_far_as_all_of_them() -> None:
    """The third pass of four: a change in the first character arrives beyond the old reach, and not before
    the model was extended."""
    model = random_model(ButterflyConfig.preset("micro", num_passes=4, num_levels=1, num_refine_layers=0))
    longer = extend_levels(model, 5, 1)
    assert longer.config.pass_levels == (1, 1, 5, 1)
    ids = torch.randint(256, (1, 300), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] ^= 1
    heard = 5 * 16  # a local layer and four of stride 1
    assert torch.equal(model(ids)[0, heard + 16 :], model(other)[0, heard + 16 :])
    assert (longer(ids)[0, 256:] != longer(other)[0, 256:]).any()


def test_a_long_pass_is_made_longer_again() -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    longer = extend_levels(extend_levels(model, 4, 1), 5, 1)
    assert longer.config.pass_levels == (5, 3)
    every = extend_levels(longer, 6)
    assert every.config == dataclasses.replace(model.config, num_levels=6)
    ids = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0))
    for each in (longer, every):
        torch.testing.assert_close(each(ids), model(ids), rtol=0, atol=1e-5)


def test_long_passes_stream_as_they_read() -> None:
    model = random_model(ButterflyConfig.preset("micro", num_long_passes=1, num_long_levels=5))
    ids = torch.randint(256, (1, 700), generator=torch.Generator().manual_seed(0))
    whole, cache = model(ids), model.new_cache()
    torch.testing.assert_close(model.prefill(ids[:, :600], cache), whole[:, 599], rtol=0, atol=1e-4)
    for i in range(600, 700):
        torch.testing.assert_close(model.step(ids[:, i], cache), whole[:, i], rtol=0, atol=1e-4)


def test_most_of_what_a_stream_keeps_belongs_to_the_farthest_levels() -> None:
    config = ButterflyConfig.preset("small", num_levels=13)
    one = ButterflyConfig.preset("small", num_long_passes=1, num_long_levels=13)
    assert one.reach_chars == config.reach_chars == 1_048_576
    assert cache_nbytes(one, dtype=torch.bfloat16) < 0.28 * cache_nbytes(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("passes", [None, 1])
def test_new_layers_learn(passes: int | None) -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    longer = extend_levels(model, 4, passes)
    new = [i for i, route in enumerate(longer.routes) if route.level == 3]
    assert len(new) == (passes or 2) and not any(longer.layers[i].attention.out.weight.any() for i in new)
    ids = torch.randint(256, (1, 300), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(longer.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = longer.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for i in new:
        layer = longer.layers[i]
        assert layer.attention.out.weight.any() and layer.feed_forward.down.weight.any()


def test_what_cannot_be_extended_is_refused() -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    with pytest.raises(ValueError, match="the model has 3 levels, 3 are not more"):
        extend_levels(model, 3)
    for passes in (0, 3):
        with pytest.raises(ValueError, match=f"give 1 to 2 passes to continue, not {passes}"):
            extend_levels(model, 5, passes)
    with pytest.raises(ValueError, match="the model has 5 levels, 4 are not more"):
        extend_levels(extend_levels(model, 5, 1), 4)
    near = random_model(dataclasses.replace(model.config, local_chunks=1, local_every=2))
    with pytest.raises(ValueError, match="add a multiple of 2 levels"):
        extend_levels(near, 4, 1)
    with pytest.raises(ValueError, match="no whole pass"):
        extend_levels(random_model(dataclasses.replace(model.config, num_passes=0)), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_long_passes": 3, "num_long_levels": 4}, "num_long_passes 3 is above num_passes 2"),
        ({"num_long_passes": 1}, "1 long passes of 0 levels"),
        ({"num_long_levels": 4}, "0 long passes of 4 levels"),
        ({"num_long_passes": 1, "num_long_levels": 3}, "more levels than num_levels 3"),
        ({"num_long_passes": 1, "num_long_levels": 25}, "25 levels are above 24"),
    ],
)
def test_long_passes_that_make_no_sense_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ButterflyConfig.preset("micro", **changes)


def test_export_writes_a_longer_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    save_model(model, tmp_path / "model")
    main(
        [
            "export",
            str(tmp_path / "model"),
            "--out",
            str(tmp_path / "longer"),
            "--levels",
            "4",
            "--dtype",
            "float32",
        ]
    )
    longer = load_pretrained(tmp_path / "longer")
    ids = torch.randint(256, (1, 100))
    torch.testing.assert_close(longer(ids), model(ids), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "x"), "--levels", "2"])
    assert (
        "the model has 3 levels, 2 are not more" in capsys.readouterr().err and not (tmp_path / "x").exists()
    )


def test_levels_for_a_new_training_keep_the_layers() -> None:
    config = ButterflyConfig.preset("full").with_levels(13)
    assert (config.num_passes, config.num_extra_levels, config.num_layers) == (3, 6, 53)
    assert config.reach_chars == 1_048_576


def test_a_model_told_of_ngrams_writes_the_same_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    told = extend_ngrams(model, (1, 2, 3))
    assert told.config == dataclasses.replace(model.config, ngram_orders=(1, 2, 3))
    ids = torch.randint(7, (2, 100), generator=torch.Generator().manual_seed(0))
    assert torch.equal(told(ids), model(ids))
    with torch.no_grad():
        told.ngram.weight.normal_()
    assert not torch.allclose(told(ids), model(ids), atol=1e-3)
    save_model(model, tmp_path / "plain", dtype="float32")
    options = ["--ngram-orders", "1", "2", "3", "--dtype", "float32", "--out"]
    main(["export", str(tmp_path / "plain"), *options, str(tmp_path / "told")])
    assert torch.equal(load_pretrained(tmp_path / "told")(ids), model(ids))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "told"), *options, str(tmp_path / "twice")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (
        "the model is told of n-grams [1, 2, 3] and 0 of words with 1 rank(s) already, and n-grams [1, 2, 3] "
        "and 0 of words with 1 rank(s) is no more" in said
    )
    assert not (tmp_path / "twice").exists()


def test_a_model_told_of_more_keeps_what_it_knows(tmp_path: Path) -> None:
    """Orders between those it has, words and ranks: the rows of before stand where they are asked for now."""
    config = ButterflyConfig.preset("micro", ngram_orders=(2, 5), ngram_words=1, ngram_ranks=2)
    model = random_model(config)
    told = extend_ngrams(model, (1, 3), 3, 4)
    assert told.config == dataclasses.replace(config, ngram_orders=(1, 2, 3, 5), ngram_words=3, ngram_ranks=4)
    ids = torch.randint(7, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(told(ids), model(ids))
    for table, count in ((told, 7 * 4), (model, 3 * 2)):
        assert table.ngram is not None and table.ngram.weight.shape == (count * 257, config.hidden_size)
    save_model(model, tmp_path / "plain", dtype="float32")
    options = ["--ngram-words", "2", "--ngram-ranks", "3", "--dtype", "float32", "--out"]
    main(["export", str(tmp_path / "plain"), *options, str(tmp_path / "told")])
    extended = load_pretrained(tmp_path / "told")
    assert extended.config == dataclasses.replace(config, ngram_words=2, ngram_ranks=3)
    torch.testing.assert_close(extended(ids), model(ids))
    plain = random_model(ButterflyConfig.preset("micro"))
    for given, asked, message in (
        (model, ((5,), 0, 1), "is no more"),
        (model, ((), -1, 1), "ngram_words -1 must be at least 0"),
        (model, ((), 0, 0), "ngram_ranks 0 at least 1"),
        (model, ((), 0, 5), "ngram_ranks 5 must be at most 4"),
        (plain, ((), 0, 3), "3 ranks of nothing: give --ngram-orders or --ngram-words too"),
    ):
        with pytest.raises(ValueError, match=message):
            extend_ngrams(given, *asked)


def test_a_model_given_local_chunks_keeps_its_parameters_and_the_first_chunk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(ButterflyConfig.preset("micro"))
    near = extend_local(model, 3, 2)
    assert near.config == dataclasses.replace(model.config, local_chunks=3, local_every=2)
    ids = torch.randint(7, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(near(ids)[:, :16], model(ids)[:, :16])  # nothing lies before it
    assert not torch.allclose(near(ids)[:, 16:], model(ids)[:, 16:], atol=1e-3)
    save_model(model, tmp_path / "plain", dtype="float32")
    options = ["--local-chunks", "3", "--local-every", "2", "--dtype", "float32", "--out"]
    main(["export", str(tmp_path / "plain"), *options, str(tmp_path / "near")])
    assert torch.equal(load_pretrained(tmp_path / "near")(ids), near(ids))
    capsys.readouterr()
    for source, asked, said in (
        ("near", options, "the model reads 3 local chunks, and cannot be given 3"),
        ("plain", ["--local-chunks", "0", "--out"], "the model reads 0 local chunks, and cannot be given 0"),
        ("plain", ["--local-every", "2", "--out"], "--local-every says which layers read --local-chunks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["export", str(tmp_path / source), *asked, str(tmp_path / "x")])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
