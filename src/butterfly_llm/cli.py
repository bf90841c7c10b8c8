"""The `butterfly` command: prepare, train, generate, eval, export, plot, serve, info.

Results go to stdout, everything else to stderr. Bad input is one line on stderr and exit code 2. torch is
imported by the commands that need it, so that `butterfly --help` is quick.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from butterfly_llm import __version__
from butterfly_llm.config import PRESETS, ButterflyConfig, SamplingConfig, TrainConfig
from butterfly_llm.memory import format_bytes, pick_device
from butterfly_llm.terminal import flatten, one_line, progress_bar, say, write
from butterfly_llm.text import Encoding, Errors, encode

if TYPE_CHECKING:
    from butterfly_llm.model import Butterfly

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|cuda:N")]
Precision = Literal["auto", "float32", "bfloat16"]

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Prepare:
    """Turn source trees, text files and archives into a corpus: train.bin, val.bin and manifest.json."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Directories, files and archives (.tar.gz, .zip ...); each is one project."""
    out: Path
    """Directory of the corpus."""
    projects: Literal["paths", "children"] = "paths"
    """Each path is a project, or each child of a path is."""
    holdout: tuple[str, ...] = ()
    """Names of the projects kept for validation; none to choose by hash."""
    val_fraction: float = 0.05
    """Share of the projects kept for validation when no --holdout is given."""
    include: tuple[str, ...] = ()
    """Take only files whose path or name fits one of these patterns, such as '*.py'."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "replace"
    """A character outside Latin-1 becomes '?', or is refused."""
    overwrite: bool = False
    """Replace a corpus that is already there."""

    def run(self) -> None:
        from butterfly_llm.data import FileRules, prepare

        if not self.paths:
            raise ValueError("prepare: no input; give directories, files or archives")
        rules = FileRules(include=self.include, encoding=self.encoding, errors=self.errors)
        with progress_bar("preparing", None) as update:
            report = prepare(
                self.paths,
                self.out,
                projects=self.projects,
                holdout=self.holdout,
                val_fraction=self.val_fraction,
                rules=rules,
                overwrite=self.overwrite,
                progress=lambda project, chars: update(chars),
            )
        for line in report.lines():
            say(line)
        print(self.out)


@dataclass(frozen=True)
class Train:
    """Train a model as RUN.toml or a preset says; flags change single settings."""

    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    model: ButterflyConfig = field(default_factory=ButterflyConfig)
    run_file: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN.toml]")] = None
    """Settings of the run: preset = "small", and tables [model] and [train]."""
    preset: str = "small"
    """Named model, where there is no RUN.toml: full, small, tiny or micro."""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Train:
        """What the RUN.toml or the preset among the arguments says, before the flags have their say."""
        run_file = next((Path(a) for a in arguments if a.endswith(".toml")), None)
        preset = _option(arguments, "--preset")
        if run_file is None:
            preset = preset or "small"
            return cls(model=ButterflyConfig.preset(preset), preset=preset)
        if preset is not None:
            raise ValueError(f"train: {run_file} names its preset; leave --preset out")
        from butterfly_llm.train import load_run

        train, model = load_run(run_file)
        return cls(train=train, model=model, run_file=run_file)

    def run(self) -> None:
        if self.run_file is not None and self.run_file.suffix != ".toml":
            raise ValueError(f"train: {self.run_file}: the name of a run file ends in .toml")
        from butterfly_llm.reporting import plain_warnings
        from butterfly_llm.train import train

        plain_warnings()
        train(self.train, self.model)
        print(self.train.out)


@dataclass(frozen=True)
class Generate:
    """Read a context and a prompt, then write on. The text goes to stdout, character by character."""

    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    context: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[PATH ...]")] = None
    """What to read first: files, directories, archives; nothing if empty. Default: this package's source."""
    context_chars: int = 65_536
    """Characters of the context that are kept, the last ones; 0 for all."""
    prompt: str = ""
    """Text after the context that the model continues."""
    max_chars: int = 500
    """Characters to write at most; a document may end before."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not written."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "strict"
    """A character outside Latin-1 is refused, or becomes '?'."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        if self.max_chars < 0 or self.context_chars < 0:
            raise ValueError("generate: --max-chars and --context-chars must be 0 or above")
        data, note = self._context()
        data += encode(self.prompt, source="--prompt", encoding=self.encoding, errors=self.errors)
        if not data:
            raise ValueError("generate: context and prompt are both empty; give --prompt or --context")
        model = _load(self.model, self.device, self.precision)
        from butterfly_llm.generate import generate_text

        cache = model.new_cache(1)
        if note:
            say(note)
        reading, read = time.perf_counter(), 0.0
        with progress_bar("reading", len(data)) as update:

            def progress(chars: int) -> None:
                nonlocal read
                read = time.perf_counter() - reading
                update(chars)

            stream = generate_text(
                model,
                data,
                encoding=self.encoding,
                sampling=self.sampling,
                max_chars=self.max_chars,
                cache=cache,
                stop=("\0", *self.stop),  # NUL ends a document
                progress=progress,
            )
            first = next(stream, "")
        for piece in chain((first,), stream):
            write(piece)
        if sys.stdout.isatty():
            write("\n")
        wrote = time.perf_counter() - reading - read
        drawn = cache.position - len(data)
        say(
            f"read {len(data):,} characters at {len(data) / read:,.0f}/s, "
            f"wrote {drawn:,} at {drawn / wrote:,.1f}/s, state {format_bytes(cache.nbytes)}"
            + ("; the document or a stop string ended it" if drawn < self.max_chars else "")
        )

    def _context(self) -> tuple[bytes, str]:
        """The context, and what to say about it: after all that may be refused, which is one line alone."""
        from butterfly_llm.data import read_context

        paths: Sequence[Path] = sorted(_PACKAGE.rglob("*.py")) if self.context is None else self.context
        if not paths:
            return b"", ""
        found = read_context(
            paths,
            encoding=self.encoding,
            errors="replace" if self.context is None else self.errors,
            max_chars=self.context_chars or None,
        )
        notes = [f"{found.files:,} files"]
        if found.dropped:
            notes.append(f"{found.dropped:,} characters before them left out (--context-chars)")
        if found.replaced:
            notes.append(f"{found.replaced:,} characters replaced by '?'")
        if found.skips.counts:
            notes.append(f"skipped {found.skips.summary()}")
        name = "this package's source" if self.context is None else "context"
        return found.data, f"{name}: {len(found.data):,} characters of {', '.join(notes)}"


@dataclass(frozen=True)
class Eval:
    """Bits per character of a model on texts, by position in the context, next to xz and zstd."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Texts: files, directories, archives; of a prepared corpus, its validation projects."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    context: int | None = None
    """Characters of context, and of a window. Default: the model's reach, at most 65,536."""
    max_chars: int | None = None
    """Take at most this many characters of each text, the first ones."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    errors: Errors = "strict"
    """A character outside Latin-1 is refused, or becomes '?'."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        if not self.files:
            raise ValueError("eval: no text; give files, directories, archives or a prepared corpus")
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"eval: --max-chars must be at least 1, not {self.max_chars}")
        from butterfly_llm.evaluate import evaluate, format_table, load_documents

        documents = load_documents(
            self.files, encoding=self.encoding, errors=self.errors, max_chars=self.max_chars
        )
        model = _load(self.model, self.device, self.precision)
        with progress_bar("evaluating", sum(len(d.data) for d in documents)) as update:
            result = evaluate(model, documents, context=self.context, progress=update)
        print(result.to_json() if self.json else format_table(result))


@dataclass(frozen=True)
class Recall:
    """Plant facts into real text, ask for them further on, and count the answers by hops and distance."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Text to plant into: files, directories, archives. Default: this package's source."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    length: int = 4096
    """Characters in a window."""
    windows: int = 8
    """Windows for each number of hops."""
    distractors: int = 0
    """Facts planted beside each one that is asked for."""
    value_chars: int = 2
    """Digits in a value."""
    seed: int = 0
    """Places, keys and values follow from it."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        if self.length < 512 or self.windows < 1:
            raise ValueError("eval recall: --length must be at least 512 and --windows at least 1")
        from butterfly_llm.data import read_context
        from butterfly_llm.recall import Needles, evaluate_recall

        text = read_context(self.files or sorted(_PACKAGE.rglob("*.py")), errors="replace").data
        model = _load(self.model, self.device, self.precision)
        needles = Needles(distractors=self.distractors, value_chars=self.value_chars)
        with progress_bar("asking", None) as update:
            result = evaluate_recall(
                model,
                text,
                length=self.length,
                windows=self.windows,
                needles=needles,
                seed=self.seed,
                progress=update,
            )
        print(result.to_json() if self.json else "\n".join(result.lines()))


@dataclass(frozen=True)
class Export:
    """Write a model in fewer bits: of a run, the finished model or the newest checkpoint."""

    model: tyro.conf.Positional[Path]
    """Folder of a run, a checkpoint or a model."""
    out: Path
    """Folder of the new model; replaced if it holds one already."""
    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """Type of the matrices; int8 takes a byte a weight and a scale for each row."""

    def run(self) -> None:
        from butterfly_llm import load_pretrained
        from butterfly_llm.checkpoint import save_model

        save_model(load_pretrained(self.model), self.out, dtype=self.dtype)
        print(self.out)


@dataclass(frozen=True)
class Plot:
    """Draw a figure: the routing of the chunks, or the loss of a training run."""

    figure: tyro.conf.Positional[Literal["routing", "loss"]]
    """Which figure."""
    out: Path
    """The file to write, .png or .svg."""
    metrics: Path | None = None
    """For loss: the metrics.jsonl of a run."""

    def run(self) -> None:
        from butterfly_llm.plot import plot_loss, plot_routing

        if self.figure == "routing":
            plot_routing(self.out)
        elif self.metrics is None:
            raise ValueError("plot loss: which run? give --metrics RUN/metrics.jsonl")
        else:
            plot_loss(self.metrics, self.out)
        print(self.out)


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP in the OpenAI protocol, with a page at /. Ends with Ctrl-C."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token: str | None = None
    """What clients must send as Authorization: Bearer. Better set BUTTERFLY_TOKEN: flags show in ps."""
    slots: int = 8
    """Streams at once, each with a state of its own; further ones are told to come back."""
    contexts: int = 4
    """Texts whose state is kept for clients to continue."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    max_chars: int = 65_536
    """Characters that one request may ask for."""
    max_body_bytes: int = 16_000_000
    """Size of a request at most, uploaded texts included."""
    model: Path | None = None
    """Folder of a checkpoint. Default: the one that ships with the package."""
    device: Device = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Type of the activations; auto: bfloat16 on a GPU, else float32."""

    def run(self) -> None:
        from butterfly_llm.serve import serve

        serve(
            lambda: _load(self.model, self.device, self.precision),
            name="butterfly" if self.model is None else self.model.resolve().name,
            host=self.host,
            port=self.port,
            token=self.token,
            slots=self.slots,
            contexts=self.contexts,
            encoding=self.encoding,
            max_chars=self.max_chars,
            max_body=self.max_body_bytes,
        )


@dataclass(frozen=True)
class Info:
    """Versions, devices and backends; parameters, state and reach of a preset or a checkpoint."""

    model: Path | None = None
    """Folder of a checkpoint."""
    preset: str | None = None
    """Name of a preset."""
    json: bool = False
    """Print one line of JSON instead of text."""

    def run(self) -> None:
        import torch

        from butterfly_llm.ops import backends, default_backend

        devices = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
        facts: dict[str, Any] = {
            "versions": {"butterfly-llm": __version__, "python": platform.python_version()}
            | {name: _version(name) for name in ("torch", "triton", "numpy", "safetensors")},
            "devices": devices,
            "backends": backends(),
            "default_backends": {name: default_backend(name) for name in devices},
            "models": {name: _describe(config) for name, config in self._configs().items()},
        }
        print(json.dumps(facts) if self.json else "\n".join(_lines(facts)))

    def _configs(self) -> dict[str, ButterflyConfig]:
        if self.model is None and self.preset is None:
            return dict(PRESETS)
        configs = {} if self.preset is None else {self.preset: ButterflyConfig.preset(self.preset)}
        if self.model is not None:
            from butterfly_llm import load_pretrained

            configs[str(self.model)] = load_pretrained(self.model).config
        return configs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its text
    try:
        _parse(arguments).run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left; closing the broken stdout at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        say(f"butterfly: error: {message}")
        sys.exit(2)


_COMMANDS: dict[str, Any] = {
    "prepare": Prepare, "train": Train, "generate": Generate, "eval": Eval,
    "export": Export, "plot": Plot, "serve": Serve, "info": Info,
}  # fmt: skip


def _parse(arguments: Sequence[str]) -> Any:
    """The chosen command with its options. SystemExit after --help and --version."""
    name, options = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name == "--version":
        print(f"butterfly {__version__}")
        sys.exit(0)
    if name == "eval" and options[:1] == ["recall"]:
        return _tyro(Recall, prog="butterfly eval recall", args=options[1:])
    if name in _COMMANDS:
        default = {"default": Train.defaults(options)} if name == "train" else {}
        return _tyro(_COMMANDS[name], prog=f"butterfly {name}", args=options, **default)
    if name in ("-h", "--help"):
        every = [Annotated[command, tyro.conf.subcommand(each)] for each, command in _COMMANDS.items()]
        description = "A character-level language model for contexts of 64k to 1M+ characters."
        return _tyro(Union[tuple(every)], prog="butterfly", args=["--help"], description=description)  # noqa: UP007
    near = difflib.get_close_matches(name, _COMMANDS, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown command {name!r}{hint}: there are {', '.join(_COMMANDS)}")


def _tyro(form: Any, **options: Any) -> Any:
    """tyro.cli, with what it says about wrong options in one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(form, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone), **options)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(flatten(complaint.getvalue())) from None
        raise


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE` among raw arguments."""
    for argument, following in zip(arguments, (*arguments[1:], None), strict=True):
        if argument == name:
            return following
        if argument.startswith(name + "="):
            return argument[len(name) + 1 :]
    return None


def _load(path: Path | None, device: str, precision: str) -> Butterfly:
    import torch

    from butterfly_llm import load_pretrained

    where = pick_device(device)
    model = load_pretrained(path, device=where).eval()
    if precision == "bfloat16" or (precision == "auto" and where.type == "cuda"):
        model.compute_dtype = torch.bfloat16
    return model


def _describe(config: ButterflyConfig) -> dict[str, Any]:
    """Numbers of a model, without allocating it."""
    import torch

    from butterfly_llm.cache import cache_nbytes
    from butterfly_llm.model import Butterfly

    with torch.device("meta"):
        parameters = Butterfly(config).num_parameters()
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "parameters": parameters,
        "reach_chars": config.reach_chars,
        "state_bytes_float32": cache_nbytes(config, 1, torch.float32) if config.causal else None,
        "config": config.to_dict(),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    for name, what in facts["devices"].items():
        yield f"device {name}: {what}, backend {facts['default_backends'][name]}"
    for name, status in facts["backends"].items():
        yield f"backend {name}: {status}"
    for name, model in facts["models"].items():
        state = model["state_bytes_float32"]
        yield (
            f"model {name}: {model['parameters']:,} parameters, {model['layers']} layers of width "
            f"{model['hidden_size']}, reach {model['reach_chars']:,} characters, "
            f"state {format_bytes(state) if state is not None else 'none (bidirectional)'}"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
