"""Which model a benchmark measures: options, the model itself, and what a record says of it."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly

_OF_THE_PRESET = (
    "levels", "kv_heads", "carry_heads", "local_chunks", "local_every", "ngram_orders", "ngram_words",
    "ngram_ranks", "sizes",
)  # fmt: skip


def add_preset_options(parser: argparse.ArgumentParser, preset: str | None) -> None:
    """preset: the default; None where a trained model is measured unless one is named."""
    parser.add_argument("--preset", default=preset, help="random weights of full, small, tiny or micro")
    parser.add_argument("--levels", type=int, help="of the preset: levels in a pass, in as many layers")
    parser.add_argument("--kv-heads", type=int, help="of the preset: key and value heads")
    parser.add_argument(
        "--carry-heads", type=int, help="of the preset: heads of the carry, 0 for a gated one"
    )
    parser.add_argument(
        "--local-chunks", type=int, help="of the preset: chunks before its own that every chunk reads too"
    )
    parser.add_argument(
        "--local-every", type=int, help="of the preset: every so many layers one reads the local chunks"
    )
    parser.add_argument(
        "--ngram-orders", type=int, nargs="*", help="of the preset: numbers n whose n-grams it is told of"
    )
    parser.add_argument(
        "--ngram-words", type=int, help="of the preset: inputs of the token so far, behind none, one .. words"
    )
    parser.add_argument("--ngram-ranks", type=int, help="of the preset: followers told of each of these")
    parser.add_argument(
        "--sizes", nargs="+", metavar="FIELD=NUMBER",
        help="of the preset: other fields, as hidden_size=256",
    )  # fmt: skip


def config_of(options: argparse.Namespace) -> ButterflyConfig:
    """The preset that `add_preset_options` means, with its changes."""
    wanted = {
        "num_kv_heads": options.kv_heads,
        "carry_heads": options.carry_heads,
        "local_chunks": options.local_chunks,
        "local_every": options.local_every,
        "ngram_orders": options.ngram_orders,
        "ngram_words": options.ngram_words,
        "ngram_ranks": options.ngram_ranks,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    for size in options.sizes or ():
        name, _, number = size.partition("=")
        if not number.isdecimal():
            raise ValueError(f"--sizes {size}: give a field of the model and a number, as hidden_size=256")
        changes[name] = int(number)
    preset = ButterflyConfig.preset(options.preset)
    config = ButterflyConfig.from_dict(preset.to_dict() | changes)
    return config if options.levels is None else config.with_levels(options.levels)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add_preset_options(parser, None)
    parser.add_argument("--model", help="checkpoint folder; default: the shipped one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers (once for each slice size)"
    )


def model_of(options: argparse.Namespace) -> Butterfly:
    """The model that `add_model_options` means, on its device, in bfloat16 on a GPU."""
    device = pick_device(options.device)
    if options.preset is None:
        for name in _OF_THE_PRESET:
            if getattr(options, name) is not None:
                raise ValueError(f"bench {options.bench}: --{name.replace('_', '-')} goes with --preset")
        model = load_pretrained(options.model, device=device)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            model = Butterfly(config_of(options))
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.compile:
        model.compile_layers()
    return model


def chunks_read(model: Butterfly) -> float:
    """By a character in all layers: half of its own, the local ones, a partner that is none of them."""
    reads = [(route.stride, model.config.local_of(route.index)) for route in model.routes]
    return sum(0.5 + local + (stride > local) for stride, local in reads)


def facts(model: Butterfly) -> dict[str, Any]:
    """What a record must say about a run."""
    on_gpu = model.embed.weight.is_cuda
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "num_levels": model.config.num_levels,
        "num_kv_heads": model.config.num_kv_heads,
        "carry_heads": model.config.carry_heads,
        "local_chunks": model.config.local_chunks,
        "local_every": model.config.local_every,
        "ngram_orders": list(model.config.ngram_orders),
        "ngram_words": model.config.ngram_words,
        "ngram_ranks": model.config.ngram_ranks,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
    }
