"""Which lines of a document surprise the model most, and what the whole is worth in bits.

python examples/score_document.py FILE [MODEL]
"""

import math
import sys
from pathlib import Path

import torch

from butterfly_llm import load_pretrained
from butterfly_llm.evaluate import character_nats

file, *rest = sys.argv[1:]
model = load_pretrained(*rest)
text = Path(file).read_bytes()

# The model sees everything before a character; NUL, which separates documents, stands before the first.
stream = torch.tensor([[0, *text]])
bits = character_nats(model, stream[:, :-1], stream[:, 1:])[0] / math.log(2)  # (characters,)

lines, start = [], 0
for number, line in enumerate(text.splitlines(keepends=True), start=1):
    share = bits[start : start + len(line)]
    start += len(line)
    if line.strip():
        lines.append((share.mean().item(), number, line))

print(f"{bits.mean():.3f} bits a character, {bits.sum() / 8:,.0f} bytes in all, {len(text):,} as they are")
for mean, number, line in sorted(lines, reverse=True)[:5]:
    print(f"{mean:6.2f}  line {number}: {line.decode('latin-1').rstrip()}")
