"""The kernels compiled ahead of time for cards that are not here: what they need fits what a card has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from butterfly_llm.ops import triton_attention

pytestmark = pytest.mark.skipif(
    not triton_attention._TRITON_FOUND or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
SHAPE = {"HEADS": 4, "GROUP": 1, "CHUNK": 128, "SCALE": 0.125, "TOPOLOGY": "shift", "ROTATE": True}


def compiled(kernel: Any, capability: int, num_warps: int, angles: str, **constants: Any) -> Any:
    """The kernel for float16 inputs and rows of 16 bytes, as `triton_attention` launches it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("lse_ptr", "delta_ptr"):
            return "*fp32"
        return angles if name == "table_ptr" else "*fp16" if name.endswith("_ptr") else "i32"

    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or name.startswith("stride_")]
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": 1}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "which, capability, kilobytes",
    [("key_gradient", 75, 64), ("forward", 120, 99), ("query_gradient", 120, 99), ("key_gradient", 120, 99)],
)
def test_tiles_fit_small_cards(which: triton_attention.Pass, capability: int, kilobytes: int) -> None:
    from butterfly_llm.ops import triton_kernels

    kernel = getattr(triton_kernels, f"{which}_kernel")
    cut = triton_attention.tiles(which, torch.float16, 128, kilobytes * 1024)
    tiles = {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}
    found = compiled(kernel, capability, cut.num_warps, "*fp32", **SHAPE, D=128, **tiles)
    assert 0 < found.metadata.shared <= kilobytes * 1024


def test_three_programs_of_whole_chunks_share_a_multiprocessor() -> None:
    from butterfly_llm.ops.triton_chunk_kernels import chunk_forward_kernel

    cut = triton_attention.ChunkTiles()
    tiles = {"SPLIT": cut.split, "OWN": cut.own, "FAR": cut.far, "WHOLE": True}
    found = compiled(chunk_forward_kernel, 90, cut.num_warps, "*fp16", **SHAPE, D=64, **tiles)
    assert 0 < 3 * (found.metadata.shared + 1024) <= 228 * 1024
    assert "wgmma" in found.asm["ptx"]
