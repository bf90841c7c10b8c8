"""The command line: what goes to stdout, one-line errors with exit code 2, nothing slow in --help."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from butterfly_llm import __version__, load_state
from butterfly_llm.checkpoint import load_pretrained, save_model
from butterfly_llm.cli import COMMANDS, main
from butterfly_llm.config import PRESETS, ButterflyConfig, SamplingConfig, TrainConfig
from butterfly_llm.data import prepare
from butterfly_llm.generate import generate_text
from butterfly_llm.recall import RecallResult
from conftest import random_model

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
    "COLUMNS": "100",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread only costs on models this small, dearly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    model = random_model(ButterflyConfig.preset("micro"))
    with torch.no_grad():
        model.head.weight[0] = 0  # no character that ends the document, so that lengths are known
        model.head.weight *= 3
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(model, folder)
    return str(folder)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.py"
    path.write_text("def f(x):\n    return x + 1\n" * 20)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def python(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options,
    )  # fmt: skip


def test_generate_writes_the_text_and_nothing_else_to_stdout(run, model, checkpoint):
    code, out, err = run(
        "generate", "--context", "--prompt", "def main(", "--max-chars", 30, "--temperature", 0.7,
        "--seed", 5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.1, "--model", checkpoint,
    )  # fmt: skip
    sampling = SamplingConfig(temperature=0.7, seed=5, top_k=50, top_p=0.9, repetition_penalty=1.1)
    text = "".join(generate_text(model, list(b"def main("), sampling=sampling, max_chars=30))
    assert (code, out) == (0, text)
    assert err.startswith("read 9 characters at ") and "wrote 30 at" in err and "state" in err


def test_generate_reads_context_files_before_the_prompt(run, model, checkpoint, source):
    code, out, err = run(
        "generate", "--context", source, "--prompt", "def ", "--max-chars", 10, "--model", checkpoint
    )
    document = b"==> source.py <==\n" + Path(source).read_bytes() + b"def "
    assert (code, out) == (0, "".join(generate_text(model, list(document), max_chars=10)))
    assert f"context: {len(document) - 4} characters of 1 files" in err
    cut = run(
        "generate", "--context", source, "--context-chars", 7, "--prompt", "x", "--max-chars", 10,
        "--model", checkpoint,
    )  # fmt: skip
    assert cut[1] == "".join(generate_text(model, list(document[-11:-4] + b"x"), max_chars=10))
    assert f"{len(document) - 11} characters before them left out" in cut[2]


def test_generate_reads_its_own_source_by_default(run, checkpoint):
    code, _, err = run("generate", "--max-chars", 1, "--context-chars", 300, "--model", checkpoint)
    assert code == 0 and "this package's source: 300 characters" in err and "read 300 characters" in err


def test_the_default_context_is_read_whatever_its_characters(run, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = '€'\n", encoding="utf-8")
    monkeypatch.setattr("butterfly_llm.commands.common.PACKAGE", tmp_path)
    code, _, err = run("generate", "--max-chars", 1, "--model", checkpoint)
    assert code == 0 and "1 characters replaced by '?'" in err


def test_generate_stops_at_stop_strings(run, checkpoint):
    arguments = ("generate", "--context", "--prompt", "x", "--max-chars", 40, "--model", checkpoint)
    _, text, _ = run(*arguments)
    code, out, err = run(*arguments, "--stop", text[10:13])
    assert code == 0 and out == text[: text.index(text[10:13])] and "a stop string ended it" in err


def test_generate_ends_with_the_document(run, tmp_path):
    model = random_model(ButterflyConfig.preset("micro"))
    with torch.no_grad():
        model.head.weight[1:] = 0
        model.head.weight[0] *= 1000  # NUL or anything else, by the sign of its logit
    save_model(model, tmp_path / "model")
    endings = []
    for prompt in "abcd":
        code, out, err = run(
            "generate", "--context", "--prompt", prompt, "--max-chars", 5, "--model", tmp_path / "model"
        )
        assert code == 0 and "\0" not in out
        endings.append(len(out) < 5 and "the document or a stop string ended it" in err)
    assert any(endings)


def test_read_once_and_ask_many_times(run, model, checkpoint, source, tmp_path):
    state = tmp_path / "state"
    code, out, err = run("read", source, "--save", state, "--model", checkpoint)
    document = b"==> source.py <==\n" + Path(source).read_bytes()
    assert (code, out) == (0, f"{state}\n")
    assert re.search(rf"{len(document)} characters of 1 files\nread {len(document)} characters at .*/s", err)
    assert re.search(r"state [\d.]+ KB, [\d.]+ KB on disk", err)

    def ask(*arguments):
        return run("generate", "--max-chars", 20, "--model", checkpoint, "--state", state, *arguments)

    for prompt in ("def ", "class "):
        code, out, err = ask("--prompt", prompt)
        expected = "".join(generate_text(model, document + prompt.encode(), max_chars=20))
        assert (code, out) == (0, expected)
        assert f"{len(document)} characters read before" in err and f"read {len(prompt)} characters" in err
    code, out, err = ask()
    assert (code, out) == (0, "".join(generate_text(model, document, max_chars=20)))
    assert "\nwrote 20 at" in err

    code, _, err = run("read", source, "--state", state, "--save", state, "--model", checkpoint)
    assert (
        code == 0 and f"read {len(document)} characters at" in err and f"{2 * len(document):,} in all" in err
    )
    assert ask()[1] == "".join(generate_text(model, document + document, max_chars=20))


def test_read_and_generate_with_rings_in_8_bits(run, model, checkpoint, source, tmp_path):
    code, _, _ = run("read", source, "--save", tmp_path / "s", "--rings", "int8", "--model", checkpoint)
    assert code == 0 and load_state(tmp_path / "s", model).dtype == torch.int8
    code, out, err = run(
        "generate", "--state", tmp_path / "s", "--max-chars", 5, "--num-samples", 2, "--model", checkpoint
    )
    assert code == 0 and out.count("==> sample") == 2 and "wrote 10 at" in err
    sizes = []
    for rings in ("float32", "bfloat16"):
        run("read", source, "--save", tmp_path / rings, "--rings", rings, "--model", checkpoint)
        sizes.append(load_state(tmp_path / rings, model).nbytes)
    assert sizes[0] == 2 * sizes[1]


def test_generate_several_samples_of_one_context(run, model, checkpoint):
    code, out, err = run(
        "generate", "--context", "--prompt", "def main(", "--max-chars", 12, "--num-samples", 3, "--seed", 5,
        "--model", checkpoint,
    )  # fmt: skip
    texts = [
        "".join(generate_text(model, b"def main(", sampling=SamplingConfig(seed=5 + i), max_chars=12))
        for i in range(3)
    ]
    assert len(set(texts)) == 3
    expected = "".join(f"==> sample {i} of 3 <==\n{text}\n" for i, text in enumerate(texts, 1))
    assert (code, out) == (0, expected)
    assert "wrote 36 at" in err and re.search(r"state [\d.]+ KB shared, [\d.]+ KB beside it", err)


def test_generate_in_utf8(run, checkpoint):
    code, _, err = run(
        "generate",
        "--context",
        "--prompt",
        "€",
        "--encoding",
        "utf-8",
        "--max-chars",
        1,
        "--model",
        checkpoint,
    )
    assert code == 0 and "read 3 characters" in err
    code, _, err = run(
        "generate",
        "--context",
        "--prompt",
        "€",
        "--errors",
        "replace",
        "--max-chars",
        1,
        "--model",
        checkpoint,
    )
    assert code == 0 and "read 1 characters" in err


def test_generate_hides_control_characters_from_a_terminal(run, checkpoint, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = run("generate", "--context", "--prompt", "x", "--max-chars", 300, "--model", checkpoint)
    assert len(out) == 301 and out.endswith("\n")
    assert not {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))} & set(out)


def test_eval_prints_a_table_or_one_line_of_json(run, checkpoint, source):
    code, out, _ = run("eval", "--model", checkpoint, source)
    assert code == 0 and "source.py" in out and "xz -9e" in out
    code, out, _ = run("eval", "--model", checkpoint, "--json", "--context", 64, "--max-chars", 100, source)
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (result["context"], result["chars"]) == (64, 100)
    assert 0 < result["bits_per_char"] < 30 and result["xz"] > 0
    assert result["matched"] is None


def test_eval_lets_what_stood_before_propose(run, checkpoint, tmp_path):
    (tmp_path / "twice.txt").write_text("nothing here stands twice: 0123456789\n" * 20)
    code, out, _ = run("eval", "--model", checkpoint, "--match", "--json", tmp_path / "twice.txt")
    result = json.loads(out)
    assert code == 0 and 0 < result["matched"] < 0.5 * result["bits_per_char"]


def test_eval_asks_for_planted_facts_and_names_that_come_back(run, checkpoint, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def compute(value):\n    return compute_once(value)\n" * 30)
    code, out, _ = run(
        "eval", "recall", "--model", checkpoint, "--length", 512, "--windows", 1, "--json", text
    )
    assert code == 0 and json.loads(out)["length"] == 512
    code, out, _ = run("eval", "repeats", "--model", checkpoint, "--max-count", 100, text)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["last", "never", "0+"]
    code, _, err = run("eval", "repeats", "--model", checkpoint, "--context", 0, text)
    assert code == 2 and "--context starts at 1" in err
    code, _, err = run("eval", "recall", "--model", checkpoint, "--windows", 0, text)
    assert code == 2 and "--windows at least 1" in err


def test_prepare_train_eval_generate_in_one_go(run, tmp_path, source):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.py").write_text(f"# {name}\n" + Path(source).read_text())
    corpus, out = tmp_path / "corpus", tmp_path / "run"
    code, stdout, _ = run(
        "prepare", tmp_path / "one", tmp_path / "two", tmp_path / "three", "--out", corpus, "--holdout", "two"
    )
    assert (code, stdout) == (0, f"{corpus}\n")
    toml = tmp_path / "run.toml"
    toml.write_text(
        'preset = "micro"\n[model]\nnum_passes = 1\n[train]\nsteps = 5\nbatch_chars = 256\n'
        "lengths = [[1.0, 128]]\nval_chars = 128\n"
    )
    code, stdout, _ = run("train", toml, "--corpus", corpus, "--out", out, "--steps", 2, "--device", "cpu")
    assert (code, stdout) == (0, f"{out}\n")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    code, stdout, _ = run("eval", "--json", "--model", out, corpus)
    assert code == 0 and [d["name"] for d in json.loads(stdout)["documents"]] == ["two"]
    code, stdout, _ = run("info", "--json", "--model", out)
    config = json.loads(stdout)["models"][str(out)]["config"]
    assert code == 0 and config == ButterflyConfig.preset("micro", num_passes=1).to_dict()


def test_facts_are_planted_into_the_held_out_text_of_a_corpus(run, checkpoint, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.py").write_text(f"# {name}\n" * 200)
    run("prepare", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "corpus", "--holdout", "two")
    seen = []

    def evaluate_task(model, task, text, **_):
        seen.append(text)
        return RecallResult(512, {}, {})

    monkeypatch.setattr("butterfly_llm.tasks.evaluate_task", evaluate_task)
    code, _, err = run("eval", "recall", "--model", checkpoint, tmp_path / "corpus")
    assert code == 0, err
    assert seen == [(tmp_path / "corpus" / "val.bin").read_bytes()] and b"# two" in seen[0]


def test_train_takes_preset_and_settings_as_flags(run, monkeypatch):
    seen = []
    monkeypatch.setattr("butterfly_llm.train.train", lambda *configs: seen.append(configs))
    code, _, err = run(
        "train", "--preset", "tiny", "--model.num-heads", 2, "--model.num-kv-heads", 1, "--steps", 7,
        "--lengths", 0.5, 1024, 1.0, 4096, "--max-seconds", 60,
    )  # fmt: skip
    assert code == 0, err
    assert seen == [
        (
            TrainConfig(steps=7, lengths=((0.5, 1024), (1.0, 4096)), max_seconds=60),
            ButterflyConfig.preset("tiny", num_heads=2, num_kv_heads=1),
        )
    ]


def test_export_writes_a_smaller_model(run, checkpoint, tmp_path):
    out = tmp_path / "small"
    code, printed, _ = run("export", checkpoint, "--out", str(out))
    assert code == 0 and printed.strip() == str(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "int8"

    def weights(folder):
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

    assert weights(out) < 0.35 * weights(checkpoint)
    assert load_pretrained(out).config == load_pretrained(checkpoint).config


def test_info_describes_machine_presets_and_checkpoints(run, model, checkpoint):
    code, out, _ = run("info")
    assert code == 0 and f"butterfly-llm {__version__}" in out and "device cpu" in out
    assert all(f"model {name}: " in out for name in PRESETS)
    code, out, _ = run("info", "--json", "--preset", "micro", "--model", checkpoint)
    facts = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert facts["versions"]["torch"] == torch.__version__ and facts["backends"]["torch"] == "available"
    for name in ("micro", checkpoint):
        described = facts["models"][name]
        assert described["parameters"] == model.num_parameters()
        assert described["reach_chars"] == 128
        assert described["state_bytes_float32"] == model.new_cache().nbytes
        assert described["feed_forward"] == "fused with triton"


@pytest.mark.parametrize("options", [["--help"], ["-h"], []])
def test_help_names_every_command(run, options):
    code, out, _ = run(*options)
    assert code == 0
    assert all(re.search(rf"^\W*{name}\s", out, re.M) for name in COMMANDS)


def test_field_docstrings_are_the_help_of_a_flag(run):
    _, out, _ = run("generate", "--help")
    assert "--top-p" in out and "smallest set of characters" in " ".join(out.replace("│", "").split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["train", "--help"]]
)
def test_help_does_not_import_torch(arguments):
    program = (
        "import sys\nfrom butterfly_llm.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = python("-c", program)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_version_and_module_entry_point():
    process = python("-m", "butterfly_llm", "--version")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"butterfly {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("genrate", "unknown command 'genrate' (did you mean 'generate'?): there are prepare,"),
        ("generate --temprature 1", "--temprature, 1 (did you mean --temperature?)"),
        ("generate --temperature -1", "sampling: temperature must be 0 or above, not -1.0"),
        ("generate --max-chars x", "--max-chars"),
        ("generate --max-chars -1 --context --prompt x", "--max-chars"),
        ("generate --encoding ebcdic", "'ebcdic'"),
        ("generate --context", "context and prompt are both empty"),
        ("generate --context EMPTY", "no text in EMPTY"),
        ("generate --context nosuch", "nosuch"),
        ("generate --context --prompt €", "outside Latin-1; use --errors replace or --encoding utf-8"),
        ("generate --context --prompt x --stop € --model MODEL", "stop string: line 1, column 1"),
        ("generate --context --prompt x --model nosuch", "nosuch"),
        ("generate --context README --model nosuch", "nosuch: no such checkpoint"),
        ("generate --context --prompt x --model DAMAGED", "DAMAGED"),
        ("generate --context --prompt x --model EMPTYDIR", "EMPTYDIR"),
        ("generate --context --prompt x --device tpu", "device 'tpu': use auto, cpu, cuda or cuda:N"),
        ("generate --context --prompt x --device meta", "device 'meta': use auto, cpu, cuda or cuda:N"),
        ("generate --context --prompt x --device cuda:99", "CUDA devices here; use cpu or auto"),
        ("train --preset micro --corpus CORPUS --batch-chars 64 --lengths 1 64 --device meta", "'meta'"),
        ("train --preset micro --corpus README", "README is a file; give the folder"),
        ("train --preset micro --seed 9223372036854775808", "seed must be below 2**63"),
        ("read --save STATE", "no text"),
        ("read README --model MODEL", "--save"),
        ("read nosuch --save STATE", "nosuch: no such file or directory"),
        ("read EMPTY --save STATE", "no text in EMPTY"),
        ("read README --save DAMAGED --model MODEL", "DAMAGED: holds something else than a saved state"),
        ("read README --save STATE --state nosuch --model MODEL", "nosuch: no such saved state"),
        ("generate --prompt x --num-samples 0", "--num-samples must be at least 1, not 0"),
        ("generate --state EMPTYDIR --model MODEL", "EMPTYDIR: no saved state"),
        ("eval --model MODEL", "no text"),
        ("eval --model MODEL nosuch.txt", "nosuch.txt: No such file or directory"),
        ("eval --model MODEL EMPTY", "EMPTY is empty"),
        ("eval --model MODEL --context 0 README", "context must be at least 1"),
        ("eval --model MODEL --max-chars 0 README", "--max-chars must be at least 1"),
        ("eval --model nosuch README", "nosuch"),
        ("prepare README", "--out"),
        ("prepare nosuch --out corpus", "nosuch: no such file or directory"),
        ("prepare --out corpus", "no input"),
        ("train --preset smal", "unknown preset 'smal' (did you mean 'small'?)"),
        ("train nosuch.toml", "nosuch.toml: No such file or directory"),
        ("train BAD.toml", "BAD.toml"),
        ("train README --steps 1", "README: the name of a run file ends in .toml"),
        ("train RUN.toml --preset tiny", "leave --preset out"),
        ("train --preset micro --corpus nosuch", "nosuch"),
        ("train --preset micro --steps 0", "steps must be a whole number from 1 up"),
        ("train --preset micro --model.num-heads 3", "num_kv_heads 2 must divide num_heads 3"),
        ("plot loss --out x.png", "plot loss: which run? give its metrics.jsonl"),
        ("plot context --out x.png", "outputs of butterfly eval --json"),
        ("plot scaling --out x.png", "outputs of butterfly bench"),
        ("plot scaling BAD.toml --out x.png", "BAD.toml: not the output of a benchmark"),
        ("plot context BAD.toml --out x.png", "BAD.toml: not the output of butterfly eval --json"),
        ("plot loss EMPTY EMPTY --out x.png", "one run at a time"),
        ("plot rooting --out x.png", "(did you mean routing?)"),
        ("plot attention README --layer 99 --model MODEL --out x.png", "layer 99: there are 0 to"),
        ("plot attention README --layer 0 --head 9 --model MODEL --out x.png", "head 9: there are 0 to"),
        ("plot attention README --max-chars 0 --out x.png", "--max-chars must be at least 1"),
        ("plot routing --out x.bmp", ".png or .svg"),
        ("plot loss --out x.png nosuch", "nosuch: No such file or directory"),
        ("plot loss --out x.png BAD.toml", "BAD.toml"),
        ("plot loss --out x.png EMPTY", "EMPTY"),
        ("info --preset nosuch", "unknown preset 'nosuch'"),
        ("info --model nosuch", "nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README").write_text("some text\n")
    Path("EMPTY").write_bytes(b"")
    Path("EMPTYDIR").mkdir()
    Path("BAD.toml").write_text("steps =")
    Path("RUN.toml").write_text('preset = "micro"')
    Path("DAMAGED").mkdir()
    for file in Path(checkpoint).iterdir():
        Path("DAMAGED", file.name).write_bytes(file.read_bytes())
    weights = next(Path("DAMAGED").glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes((data[-1] ^ 1,)))
    for name in ("A", "B"):
        Path(name).write_text(f"{name} " * 99)
    if "CORPUS" in arguments:
        prepare(["A", "B"], "CORPUS")
    words = [checkpoint if word == "MODEL" else word for word in arguments.split()]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("butterfly: error: ") and err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("columns", ["40", "200"])
def test_wrong_options_are_one_line_on_every_terminal(encoding, columns):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "COLUMNS": columns}
    result = subprocess.run(
        [sys.executable, "-m", "butterfly_llm", "generate", "--temprature", "1"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    expected = "butterfly: error: Unrecognized options: --temprature, 1 (did you mean --temperature?)\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_unreadable_files_are_one_line(run, checkpoint, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    text = tmp_path / "text"
    text.write_text("x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    code, _, err = run("eval", "--model", checkpoint, text)
    assert (code, err) == (2, f"butterfly: error: {text}: Permission denied\n")


def test_a_directory_in_place_of_a_file_is_one_line(run, tmp_path):
    code, _, err = run("plot", "loss", tmp_path, "--out", tmp_path / "x.png")
    assert (code, err) == (2, f"butterfly: error: {tmp_path}: Is a directory\n")


def test_out_of_memory_is_one_line(run, checkpoint, monkeypatch):
    monkeypatch.setattr("butterfly_llm.memory.available_bytes", lambda device="cpu": 1000)
    code, _, err = run("generate", "--context", "--prompt", "x", "--model", checkpoint)
    assert code == 2 and err.count("\n") == 1 and "1.0 KB are free" in err
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), MemoryError()):

        def fail(*_, _error=error):
            raise _error

        monkeypatch.setattr("butterfly_llm.commands.common.load_model", fail)
        code, _, err = run("generate", "--context", "--prompt", "x", "--model", checkpoint)
        assert code == 2 and err.count("\n") == 1 and "out of memory" in err


def test_a_message_of_several_lines_becomes_one(run, monkeypatch):
    def fail(*_):
        raise ValueError("first\n  second")

    monkeypatch.setattr("butterfly_llm.commands.common.load_model", fail)
    code, _, err = run("generate", "--context", "--prompt", "x")
    assert (code, err) == (2, "butterfly: error: first second\n")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr("butterfly_llm.commands.common.load_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "--context", "--prompt", "x")


def test_ctrl_c_exits_130_without_a_traceback(checkpoint):
    process = python(
        "-m", "butterfly_llm", "generate", "--context", "--prompt", "x", "--max-chars", "1000000",
        "--model", checkpoint,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    assert process.stdout.read(5)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n"


def test_a_reader_that_leaves_ends_the_text_silently(checkpoint):
    process = python(
        "-m", "butterfly_llm", "generate", "--context", "--prompt", "x", "--max-chars", "1000000",
        "--model", checkpoint,
    )  # fmt: skip
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_text_appears_while_it_is_written(checkpoint):
    process = python(
        "-m", "butterfly_llm", "generate", "--context", "--prompt", "x", "--max-chars", "1000000",
        "--model", checkpoint,
    )  # fmt: skip
    first = os.read(process.stdout.fileno(), 100_000)
    process.kill()
    process.communicate()
    assert 0 < len(first) < 1000  # unless it is flushed, Python writes to a pipe in blocks of 8,192 bytes
