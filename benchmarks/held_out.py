"""A finished model on held-out text: bits per character by context, names that come back, recall by hops.

    python benchmarks/held_out.py MODEL CORPUS --json OUT.json

MODEL is a folder that `load_pretrained` reads, CORPUS one made by `butterfly prepare`, whose validation split
is read. Prints each result as it comes and, as its last line, one JSON object. Compressors are left to
`butterfly eval`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from butterfly_llm.checkpoint import load_pretrained
from butterfly_llm.corpus import Corpus
from butterfly_llm.evaluate import evaluate, load_documents
from butterfly_llm.memory import pick_device
from butterfly_llm.recall import Needles, evaluate_recall
from butterfly_llm.repeats import evaluate_repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--other", help="the same model stored otherwise: bits at the longest context only")
    parser.add_argument("--contexts", type=int, nargs="+", default=[65_536, 16_384, 2_048])
    parser.add_argument("--recall", type=int, nargs="*", default=[4_096, 16_384, 65_536], help="lengths")
    parser.add_argument("--windows", type=int, default=32, help="windows for each number of hops")
    parser.add_argument("--distractors", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--match", action="store_true", help="also what model and match give together")
    parser.add_argument("--json", type=Path, help="keep the JSON object here as it grows")
    options = parser.parse_args()

    device = pick_device("auto")
    documents = load_documents([options.corpus])
    text = Corpus(options.corpus, "val").data.tobytes()
    out: dict[str, Any] = {"torch": torch.__version__, "device": _name(device), "bits": {}}
    out |= {"repeats": {}, "recall": {}}

    def load(path: str) -> Any:
        model = load_pretrained(path, device=device)
        model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return model

    def keep(kind: str, label: str, values: dict[str, Any]) -> None:
        out[kind][label] = values
        if options.json:
            options.json.write_text(json.dumps(out) + "\n")

    def bits(label: str, model: Any, context: int) -> None:
        begun = time.perf_counter()
        result = evaluate(
            model, documents, context=context, batch_chars=131_072, compressors=False, match=options.match
        )
        together = "" if result.matched is None else f", {result.matched:.4f} with the match,"
        print(
            f"{label}: {result.bits_per_char:.4f} bits/char{together} on {result.chars:,} characters",
            flush=True,
        )
        print("  " + ", ".join(f"{b.start:,}: {b.bits_per_char:.4f}" for b in result.buckets), flush=True)
        keep("bits", label, {"seconds": round(time.perf_counter() - begun, 1), **result.to_dict()})

    if options.other:
        bits(f"other, context {options.contexts[0]}", load(options.other), options.contexts[0])
    model = load(options.model)
    out["parameters"] = model.num_parameters()
    for context in options.contexts:
        bits(f"context {context}", model, context)
    for distractors in options.distractors:
        for length in options.recall:
            needles = Needles(distractors=distractors)
            result = evaluate_recall(model, text, length=length, windows=options.windows, needles=needles)
            shares = ", ".join(f"{hops}: {share:.2f}" for hops, (share, _) in result.by_hops.items())
            print(f"recall, length {length}, {distractors} distractors, by hops: {shares}", flush=True)
            keep("recall", f"length {length}, {distractors} distractors", json.loads(result.to_json()))
    repeats = evaluate_repeats(model, documents, context=options.contexts[0])
    print("\n".join(repeats.lines()), flush=True)
    keep("repeats", f"context {options.contexts[0]}", json.loads(repeats.to_json()))
    print(json.dumps(out))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
