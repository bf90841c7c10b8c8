"""More levels for a trained model: each pass reaches further, and nothing it does so far changes.

A pass of 9 levels connects 65,536 characters, one of 13 connects 1,048,576. Giving the layers there are new
strides would make most of them read at distances that they were not trained for. Instead a pass gets its
new levels at its end, as copies of its farthest layer whose two outputs are set to zero: until it is trained
on, the longer model writes the same characters. Only the carry looks further at once, beyond the old reach.

One long pass is enough to connect everything. The rings of a stream hold each level's stride of characters,
so that most of what a stream keeps belongs to the farthest levels: with 13 of them 6.3 GB of `small` in
bfloat16 where all five passes are long, 1.7 GB where one is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from butterfly_llm.cache import routes_of
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.ngrams import NOTHING, Contexts


def extend_levels(model: Butterfly, num_levels: int, num_passes: int | None = None) -> Butterfly:
    """A copy of `model` with `num_levels` levels in `num_passes` of its whole passes, on its device.

    num_passes: which they are `ButterflyConfig.num_long_passes` says; None for all. The logits are those of
    `model` for texts up to the old reach. ValueError for a model without a whole pass, for levels that are
    not more than it has, for passes that it does not have or fewer than are long already, and where other
    layers than before would read `local_chunks`.
    """
    config = model.config
    if num_levels <= config.max_levels:
        raise ValueError(f"extend: the model has {config.max_levels} levels, {num_levels} are not more")
    if config.num_passes == 0:
        raise ValueError("extend: the model has no whole pass that new levels could continue")
    least = max(1, config.num_long_passes)
    if num_passes is not None and not least <= num_passes <= config.num_passes:
        raise ValueError(f"extend: give {least} to {config.num_passes} passes to continue, not {num_passes}")
    if num_passes is None or num_passes == config.num_passes:
        longer = dataclasses.replace(config, num_levels=num_levels, num_long_passes=0, num_long_levels=0)
    else:
        longer = dataclasses.replace(config, num_long_passes=num_passes, num_long_levels=num_levels)
    sources = dict(_sources(config, longer))
    if any(config.local_of(old) != longer.local_of(i) for i, (old, new) in sources.items() if not new):
        raise ValueError(
            f"extend: one layer in {config.local_every} reads local_chunks, and others would: "
            f"add a multiple of {config.local_every} levels"
        )
    with torch.device(model.embed.weight.device), torch.random.fork_rng(devices=[]):
        extended = Butterfly(longer)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in extended.named_parameters():
            source, muted = _source(name, config.num_local_layers, sources)
            parameter.copy_(values[source])
            if muted:
                parameter.zero_()
    extended.compute_dtype = model.compute_dtype
    return extended


def extend_ngrams(model: Butterfly, orders: tuple[int, ...], words: int = 0, ranks: int = 1) -> Butterfly:
    """A copy of `model` that is told more of what followed, on its device: rows of zeros, so nothing changes.

    orders, words and ranks: as `ButterflyConfig.ngram_orders` and so on; those that the model has stay, with
    as many ranks at least. ValueError where that would be no more than it has.
    """
    config = model.config
    if words < 0 or ranks < 1:
        raise ValueError(f"extend: ngram_words {words} must be at least 0, ngram_ranks {ranks} at least 1")
    had, asked = Contexts.of(config), Contexts(orders, words, ranks)
    if not len(had) + len(asked):
        raise ValueError(f"extend: {ranks} ranks of nothing: give --ngram-orders or --ngram-words too")
    wanted = dataclasses.replace(
        config, ngram_orders=tuple(sorted({*had.orders, *orders})), ngram_words=max(had.words, words),
        ngram_ranks=max(had.ranks, ranks),
    )  # fmt: skip
    if wanted == config:
        raise ValueError(
            f"extend: the model is told of {_described(had)} already, and {_described(asked)} is no more"
        )
    with torch.device(model.embed.weight.device), torch.random.fork_rng(devices=[]):
        extended = Butterfly(wanted)
    assert extended.ngram is not None
    extended.load_state_dict({**model.state_dict(), "ngram.weight": extended.ngram.weight})
    with torch.no_grad():
        if model.ngram is not None:
            old = model.ngram.weight.view(len(had), had.ranks, NOTHING + 1, -1)
            new = extended.ngram.weight.view(wanted.num_contexts, wanted.ngram_ranks, NOTHING + 1, -1)
            every = Contexts.of(wanted).named
            for row, name in enumerate(had.named):
                new[every.index(name), : had.ranks] = old[row]
    extended.compute_dtype = model.compute_dtype
    return extended


def _described(contexts: Contexts) -> str:
    return f"n-grams {list(contexts.orders)} and {contexts.words} of words with {contexts.ranks} rank(s)"


def extend_local(model: Butterfly, chunks: int, every: int = 1) -> Butterfly:
    """A copy of `model` whose layers read chunks just before their own, on its device.

    chunks and every: `ButterflyConfig.local_chunks` and `local_every`. The same parameters: what it writes
    changes, a little (docs/training.md), until it is trained. ValueError for a model that has them already.
    """
    config = model.config
    if config.local_chunks or chunks < 1:
        raise ValueError(
            f"extend: the model reads {config.local_chunks} local chunks, and cannot be given {chunks}"
        )
    with torch.device(model.embed.weight.device), torch.random.fork_rng(devices=[]):
        extended = Butterfly(dataclasses.replace(config, local_chunks=chunks, local_every=every))
    extended.load_state_dict(model.state_dict())
    extended.compute_dtype = model.compute_dtype
    return extended


def _sources(config: ButterflyConfig, longer: ButterflyConfig) -> Iterator[tuple[int, tuple[int, bool]]]:
    """For each layer of the longer model the layer it continues, and whether it is new."""
    old = {(r.pass_index, r.level): r.index for r in routes_of(config) if r.stage == "butterfly"}
    added = longer.num_layers - config.num_layers
    for route in routes_of(longer):
        if route.stage == "local":
            yield route.index, (route.index, False)
        elif route.stage == "refine":
            yield route.index, (route.index - added, False)
        else:
            levels = (*config.pass_levels, config.num_extra_levels)[route.pass_index]
            level = min(route.level, levels - 1)
            yield route.index, (old[route.pass_index, level], route.level > level)


def _source(name: str, num_local: int, sources: dict[int, tuple[int, bool]]) -> tuple[str, bool]:
    """The parameter that one of the longer model is copied from, and whether it is then set to zero."""
    kind, _, rest = name.partition(".")
    if kind not in ("layers", "merges"):
        return name, False
    number, _, rest = rest.partition(".")
    first = num_local if kind == "merges" else 0  # merges are those of the butterfly layers
    source, new = sources[int(number) + first]
    muted = new and rest in ("attention.out.weight", "feed_forward.down.weight")
    return f"{kind}.{source - first}.{rest}", muted
