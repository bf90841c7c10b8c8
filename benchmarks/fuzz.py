"""Feed every reader of foreign input with damaged and made-up input: refused in one line, or read; no crash.

    python benchmarks/fuzz.py --inputs 1000000

Readers: the codec, model, training and sampling configs, run files, manifests and indices of checkpoints,
headers of saved states, manifests of corpora, archives, credentials and request bodies of the server. Inputs
are whole ones with bytes or values changed, and random ones; they follow from the seed. A reader may raise
ValueError or OSError with a message of one line; anything else, and an input that takes longer than --slow
seconds, is counted as a crash and shown. Prints a table and, as its last line, one JSON object; exit code 1
after a crash.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import io
import json
import os
import platform
import random
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch

from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.config import ButterflyConfig, SamplingConfig, TrainConfig
from butterfly_llm.corpus import Corpus
from butterfly_llm.data import prepare, read_context
from butterfly_llm.folder import MANIFEST, Folder
from butterfly_llm.model import Butterfly
from butterfly_llm.state import load_state, save_state
from butterfly_llm.text import Encoding, Errors, StreamDecoder, decode, decode_source, encode_counted
from butterfly_llm.train import load_run

CONFIG = ButterflyConfig(
    hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8, carry_size=4,
    num_local_layers=1, num_passes=1, num_levels=1, num_refine_layers=0, chunk_size=4,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.0, 0.5, 1e308, float("inf"),
    float("-inf"), float("nan"), "", "x", "\0", "\ud800", "\u20ac", "../x", "/etc/passwd", "shift", "float32",
    "a" * 300, "line\nline", [], [[]], [1, 2], {}, {"a": 1}, [None], "step-000000001",
)  # fmt: skip


class Source:
    """Random inputs, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def data(self, most: int = 60) -> bytes:
        return self.random.randbytes(self.random.randrange(most))

    def text(self, most: int = 40) -> str:
        ranges = ((0, 128), (0, 256), (0, 0x3000), (0xD7F0, 0xE010), (0x1F300, 0x1F700))
        low, high = self.random.choice(ranges)
        return "".join(chr(self.random.randrange(low, high)) for _ in range(self.random.randrange(most)))

    def bytes_like(self, whole: bytes) -> bytes:
        """`whole` with a few bytes changed, put in, taken out or doubled; at times cut, at times random."""
        if self.random.random() < 0.05:
            return self.data(200)
        changed = bytearray(whole)
        for _ in range(self.random.choice((1, 1, 1, 2, 5, 20))):
            place, kind = self.random.randrange(len(changed) + 1), self.random.randrange(6)
            if kind == 0 and place < len(changed):
                changed[place] ^= 1 << self.random.randrange(8)
            elif kind == 1 and place < len(changed):
                changed[place] = self.random.randrange(256)
            elif kind == 2:
                changed[place:place] = self.data(8)
            elif kind == 3:
                del changed[place : place + self.random.randrange(1, 9)]
            elif kind == 4:
                changed[place:place] = changed[place : place + self.random.randrange(40)]
            elif self.random.random() < 0.2:
                del changed[place:]
        return bytes(changed)

    def value_like(self, whole: Any) -> Any:
        """A JSON value like `whole` in which one to three places hold something else."""
        changed = json.loads(json.dumps(whole))
        for _ in range(self.random.choice((1, 1, 2, 3))):
            changed = self._changed(changed)
        return changed

    def _changed(self, value: Any) -> Any:
        keys = (
            list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        )
        if not keys or self.random.random() < 0.15:
            return self.odd()
        key = self.random.choice(keys)
        chance = self.random.random()
        if chance < 0.15:
            del value[key]
        elif chance < 0.3 and isinstance(value, dict):
            value[self.random.choice(("x", self.text(8), str(key)[:-1], str(key) + "s"))] = value[key]
        elif chance < 0.4 and isinstance(value, dict):
            value[self.random.choice(("x", self.text(8)))] = value.pop(key)
        elif isinstance(value[key], (dict, list)):
            value[key] = self._changed(value[key])
        else:
            value[key] = self.odd()
        return value

    def odd(self) -> Any:
        return copy.deepcopy(self.random.choice(ODD))

    def json_like(self, whole: Any) -> bytes:
        if self.random.random() < 0.5:
            return self.bytes_like(json.dumps(whole).encode())
        return json.dumps(self.value_like(whole)).encode("utf-8", "surrogatepass")


Reader = Callable[[Source], object]


def readers(folder: Path) -> dict[str, tuple[float, Reader]]:
    """Share of the inputs and reader by name; `folder` is where their files lie."""
    torch.manual_seed(0)
    model = Butterfly(CONFIG)
    checkpoint, state, corpus = folder / "model", folder / "state", folder / "corpus"
    save_model(model, checkpoint)
    cache = model.new_cache()
    model.prefill(torch.arange(9)[None], cache)
    save_state(cache, state, model=model)
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(f"text {name}\n" * 3)
    prepare([folder / "one.txt", folder / "two.txt"], corpus)
    manifests = {path: json.loads((path / MANIFEST).read_text()) for path in (checkpoint, state)}
    corpus_manifest = json.loads((corpus / "manifest.json").read_text())
    shard = next(checkpoint.glob("*.safetensors")).name
    archives = _archives()

    def codec(source: Source) -> None:
        raw = source.data() if source.random.random() < 0.5 else source.text().encode("utf-16", "replace")
        encoding: Encoding = source.random.choice(get_args(Encoding))
        errors: Errors = source.random.choice(get_args(Errors))
        for text in (source.text(), decode_source(raw)):
            ids = encode_counted(text, encoding=encoding, errors=errors).data
            decoder = StreamDecoder(encoding)
            pieces = "".join(decoder.push(each) for each in ids) + decoder.finish()
            if pieces != decode(ids, encoding=encoding):
                raise AssertionError("a stream decodes to something else than the whole")
            if errors == "strict" and pieces != text:
                raise AssertionError("what is encoded does not come back")

    def model_config(source: Source) -> None:
        ButterflyConfig.from_dict(_object(source.value_like(CONFIG.to_dict())))

    def train_config(source: Source) -> None:
        TrainConfig.from_dict(_object(source.value_like(TrainConfig().to_dict())))

    def sampling_config(source: Source) -> None:
        values: dict[str, Any] = {
            field: source.random.choice(ODD) for field in source.random.sample(SAMPLING, 2)
        }
        SamplingConfig(**values)

    def run_file(source: Source) -> None:
        path = folder / "run.toml"
        path.write_bytes(source.bytes_like(RUN))
        load_run(path)

    def put(place: Path, name: str, data: bytes) -> None:
        """A file with its entry in the manifest, as somebody who forges a folder would."""
        (place / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files = {**manifests[place]["files"], name: entry}
        (place / MANIFEST).write_text(json.dumps({**manifests[place], "files": files}))

    def with_file(
        place: Path, name: str, whole: bytes, read: Callable[[], object], values: Any = None
    ) -> Reader:
        def reader(source: Source) -> None:
            data = source.bytes_like(whole) if values is None else source.json_like(values)
            if name == MANIFEST:
                (place / name).write_bytes(data)
            else:
                put(place, name, data)
            try:
                read()
            finally:
                (place / name).write_bytes(whole)

        return reader

    def in_folder(place: Path, name: str, read: Callable[[], object]) -> Reader:
        whole = (place / name).read_bytes()
        values = json.loads(whole) if name.endswith(".json") else None
        return with_file(place, name, whole, read, values)

    def load_model() -> object:
        return load_pretrained(checkpoint)

    def load_stream() -> object:
        return load_state(state, model)

    def list_model() -> object:
        return Folder(checkpoint)

    def corpus_reader(source: Source) -> None:
        (corpus / "manifest.json").write_bytes(source.json_like(corpus_manifest))
        Corpus(corpus, source.random.choice(("train", "val")))

    def archive(source: Source) -> None:
        name, whole = source.random.choice(archives)
        path = folder / name
        path.write_bytes(source.bytes_like(whole))
        read_context([path], errors="replace")

    table: dict[str, tuple[float, Reader]] = {
        "codec": (0.4, codec),
        "model config": (0.13, model_config),
        "training config": (0.1, train_config),
        "sampling config": (0.1, sampling_config),
        "run file": (0.05, run_file),
        "manifest of a model": (0.05, in_folder(checkpoint, MANIFEST, list_model)),
        "config.json": (0.02, in_folder(checkpoint, "config.json", load_model)),
        "index": (0.005, in_folder(checkpoint, INDEX, load_model)),
        "shard": (0.005, in_folder(checkpoint, shard, load_model)),
        "state.json": (0.04, in_folder(state, "state.json", load_stream)),
        "manifest of a corpus": (0.05, corpus_reader),
        "archive": (0.03, archive),
    }
    return {**table, **_of_the_server()}


def _of_the_server() -> dict[str, tuple[float, Reader]]:
    """Its readers that work without a server; none where the extra is missing."""
    try:
        from butterfly_llm import guard, protocol
    except ImportError:
        return {}
    completion = {
        "model": "x", "prompt": "abc", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3,
        "stop": ["a"], "n": 1, "stream": True, "stream_options": {"include_usage": True}, "logprobs": 2,
    }  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    context = {"text": "abc", "context": "ctx-1", "stream": True}
    forms = (
        (protocol.CompletionRequest, completion),
        (protocol.ChatRequest, chat),
        (protocol.ContextRequest, context),
    )

    def body(source: Source) -> None:
        form, whole = source.random.choice(forms)
        try:
            form.model_validate(json.loads(source.json_like(whole)))
        except ValueError:  # of many lines; the server takes them apart
            return

    def headers(source: Source) -> None:
        given = source.random.choice((b"Bearer ", b"Basic ", b"basic\t", b"", b"[", b"::", b"127.0.0.1:"))
        data = given + source.bytes_like(b"dXNlcjp0b2tlbg==")
        if not isinstance(guard._credential(data), bytes):
            raise AssertionError("a credential is bytes")
        guard.loopback(guard._name(data))

    return {"request body": (0.04, body), "headers": (0.04, headers)}


def _object(value: Any) -> Any:
    """What stands where an object is expected; its readers are only ever given objects."""
    return value if isinstance(value, dict) else {}


SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram",
    "repetition_window",
    "seed",
)
RUN = b"""preset = "micro"
[model]
carry_size = 8
[train]
steps = 100
lengths = [[0.5, 256], [1.0, 512]]
batch_chars = 4096
learning_rate = 2e-3
decay = "linear"
"""


def _archives() -> list[tuple[str, bytes]]:
    """Small whole ones of each kind."""
    tar, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("a/x.py", "a/LICENSE"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a/x.py", "abc" * 9)
        zipped.writestr("a/package.json", '{"license": "MIT"}')
    member = b"data.tar        0           0     0     100644  10240     `\n"
    deb = b"!<arch>\n" + member + tar.getvalue()
    return [
        ("a.tar", tar.getvalue()), ("a.zip", packed.getvalue()), ("a.whl", packed.getvalue()), ("a.deb", deb),
        ("a.tar.gz", gzip.compress(tar.getvalue())), ("a.txt.gz", gzip.compress(b"abc\n" * 9)),
    ]  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--inputs", type=int, default=1_000_000, help="of all readers together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="name of one reader")
    options.add_argument("--slow", type=float, default=20.0, help="seconds")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    rows, crashes, total = [], 0, 0
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        table = readers(Path(folder))
        whole = sum(share for share, _ in table.values())
        for name, (share, read) in table.items():
            if arguments.only not in ("", name):
                continue
            source = Source(arguments.seed)
            count = (
                max(1, round(arguments.inputs * share / whole)) if not arguments.only else arguments.inputs
            )
            refused = 0
            longest = 0.0
            started = time.monotonic()
            for number in range(count):
                begun = time.monotonic()
                problem = ""
                try:
                    read(source)
                except (ValueError, OSError) as failure:
                    refused += 1
                    if "\n" in str(failure):
                        problem = f"more than one line: {failure!r}"
                except Exception as failure:
                    problem = f"{type(failure).__name__}: {failure}"
                took = time.monotonic() - begun
                longest = max(longest, took)
                if took > arguments.slow:
                    problem = problem or f"took {took:.1f} s"
                if problem:
                    crashes += 1
                    if crashes <= 20:
                        print(f"{name}, input {number}: {problem[:300]}", flush=True)
            seconds = time.monotonic() - started
            total += count
            rows.append((name, count, refused, longest, seconds))
            print(f"{name:22} {count:9,} inputs  {refused:9,} refused  {seconds:7.1f} s", flush=True)
    result = {
        "inputs": total, "crashes": crashes, "seed": arguments.seed,
        "readers": {name: {"inputs": n, "refused": r, "longest": round(m, 4)} for name, n, r, m, _ in rows},
        "seconds": round(sum(row[4] for row in rows), 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "safetensors": safetensors.__version__},
    }  # fmt: skip
    print(json.dumps(result))
    return 1 if crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
