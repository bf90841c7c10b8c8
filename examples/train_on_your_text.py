"""Train a small model on your own text and let it write.

    python examples/train_on_your_text.py FOLDER [STEPS]

Every file and folder in FOLDER is a project; about one in twenty is kept for validation. STEPS are 300 by
default, of 4,096 characters each.
"""

import sys
import tempfile
from pathlib import Path

from butterfly_llm.config import ButterflyConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.generate import generate_text
from butterfly_llm.train import train

folder, *rest = sys.argv[1:]
steps = int(rest[0]) if rest else 300

with tempfile.TemporaryDirectory() as home:
    for line in prepare([folder], Path(home, "corpus"), projects="children").lines():
        print(line, file=sys.stderr)
    settings = TrainConfig(
        corpus=f"{home}/corpus",
        out=f"{home}/run",
        steps=steps,
        batch_chars=4096,
        lengths=((1.0, 1024),),
        val_chars=4096,
        learning_rate=4e-3,
        warmup_steps=20,
    )
    result = train(settings, ButterflyConfig.preset("micro"))

print(f"{result.val_bits:.3f} bits a character on text it has not seen", file=sys.stderr)
print("".join(generate_text(result.model, b"\n", max_chars=200)))
