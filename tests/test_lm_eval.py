"""lm-evaluation-harness, where it is installed (it is no extra): the task of docs/huggingface.md, offline."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.evaluate import character_nats
from butterfly_llm.hf import export_hf
from conftest import random_model

PAGE = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text(encoding="utf-8")


def test_bits_per_byte_of_local_files_are_those_of_the_model(tmp_path):
    model = random_model(ButterflyConfig.preset("micro"))
    save_model(model, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "butterfly-hf")
    texts = ["def f(x):\n    return x\n", "a = 1\n" * 20]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (task,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "task" / "my_texts.yaml").write_text(task)
    (program,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "lm_eval" in code)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=offline, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    nats = 0.0
    for text in texts:
        stream = torch.tensor([[0, *text.encode()]])
        nats += float(character_nats(model, stream[:, :-1], stream[:, 1:]).sum())
    expected = nats / torch.tensor(2.0).log().item() / sum(map(len, texts))
    (got,) = re.findall(r"'bits_per_byte,none': ([\d.]+)", result.stdout)
    assert float(got) == pytest.approx(expected, rel=1e-5)
