"""Read a codebase once, then complete several beginnings, each from the same place in the stream.

    python examples/complete_codebase.py FOLDER [MODEL]

Only the last 16,384 characters are read, which takes about twenty seconds on two CPU cores.
"""

import sys

import torch

from butterfly_llm import load_pretrained
from butterfly_llm.config import SamplingConfig
from butterfly_llm.data import read_context
from butterfly_llm.generate import generate_text

BEGINNINGS = ("def main(", "import ", "class Test")

folder, *rest = sys.argv[1:]
model = load_pretrained(*rest)
text = read_context([folder], errors="replace", max_chars=16_384).data

cache = model.new_cache()
model.prefill(torch.tensor([list(text)]), cache)
print(f"read {cache.position:,} characters", file=sys.stderr)

# A fork goes on from what was read without copying it.
for beginning, fork in zip(BEGINNINGS, cache.fork(len(BEGINNINGS)), strict=True):
    pieces = generate_text(
        model,
        beginning.encode(),
        sampling=SamplingConfig(temperature=0.3, seed=1),
        max_chars=120,
        cache=fork,
        stop=("\0",),
    )
    print(f"--- {beginning}" + "".join(pieces))
