"""What rings in fewer bits cost: bits per character of a text read chunk by chunk, by the type of the rings.

    butterfly bench rings FILE ... --chars 16384

Only one chunk is read at a time, so that every partner comes out of a ring, as it does when writing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from butterfly_llm.bench import run
from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.memory import pick_device
from butterfly_llm.model import Butterfly

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@torch.inference_mode()
def stream_nats(model: Butterfly, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """-log p in nats of characters 1.. of ids (1, N), through rings of `dtype`, and their bytes when full."""
    cache, chunk = model.new_cache(dtype=dtype), model.config.chunk_size
    nats = []
    for start in range(0, ids.shape[1] - 1, chunk):
        part = ids[:, start : start + chunk + 1]
        hidden = model.norm(model.append(part[:, :chunk], cache))
        logits = cast(Tensor, model.head(hidden)).float()[0, : part.shape[1] - 1]
        nats.append(F.cross_entropy(logits, part[0, 1:], reduction="none"))
    return torch.cat(nats), cache.nbytes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="texts, each read from its beginning")
    parser.add_argument("--chars", type=int, default=16_384, help="characters of each text at most")
    parser.add_argument("--model", help="checkpoint folder; default: the shipped one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.chars < 2:
        raise ValueError("bench rings: --chars must be at least 2")
    device = pick_device(options.device)
    model = load_pretrained(options.model, device=device)
    if device.type == "cuda":
        model.compute_dtype = torch.bfloat16
    texts = {str(path): path.read_bytes()[: options.chars] for path in options.files}
    for name, data in texts.items():
        if len(data) < 2:
            raise ValueError(f"bench rings: {name} has no two characters")
    rows: list[dict[str, Any]] = []
    print(f"{'rings':<10}{'state, MB':>11}{'bits/char':>11}   of each text")
    for name, dtype in TYPES.items():
        nats = []
        for data in texts.values():
            ids = torch.tensor([list(data)], device=device)
            found, nbytes = stream_nats(model, ids, dtype)
            nats.append(found)
        bits = [float(found.double().mean()) / math.log(2) for found in nats]
        mean = float(torch.cat(nats).double().mean()) / math.log(2)
        rows.append({"rings": name, "bytes": nbytes, "bits_per_char": mean, "texts": bits})
        each = " ".join(f"{value:.4f}" for value in bits)
        print(f"{name:<10}{nbytes / 1e6:>11,.1f}{mean:>11.5f}   {each}")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "texts": {Path(name).name: len(data) for name, data in texts.items()},
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    run("rings", __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    main()
