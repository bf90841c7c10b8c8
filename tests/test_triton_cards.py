"""The kernels compiled ahead of time for cards that are not here: what they need fits what a card has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from butterfly_llm.config import ButterflyConfig
from butterfly_llm.ops import feed_forward, triton_attention
from butterfly_llm.persistent_step import PersistentStep
from conftest import random_model

pytestmark = pytest.mark.skipif(
    not triton_attention._TRITON_FOUND or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
SHAPE = {"HEADS": 4, "GROUP": 1, "CHUNK": 128, "SCALE": 0.125, "TOPOLOGY": "shift", "WHOLE": False}


def built(
    kernel: Any, capability: int, cut: triton_attention.Tiles | feed_forward.Tiles, constants: Any
) -> Any:
    """The kernel for float16 inputs and rows of 16 bytes, compiled as it is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("lse_ptr", "delta_ptr", "table_ptr", "factor_ptr", "bias_out_ptr"):
            return "*fp32"
        if name == "position_ptr":
            return "*i64"
        return "*fp16" if name.endswith("_ptr") else "i32"

    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or name.startswith("stride_")]
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    if cut.registers:
        options["maxnreg"] = cut.registers
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled(
    which: triton_attention.Pass,
    capability: int,
    kilobytes: int,
    head_dim: int,
    stream: bool = False,
    local: int = 0,
) -> Any:
    """A kernel of the attention, with the tiles of a card."""
    from butterfly_llm.ops import triton_kernels

    cut = triton_attention.tiles(which, torch.float16, head_dim, 128, kilobytes * 1024)
    constants = SHAPE | {
        "D": head_dim, "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "STAGES": cut.num_stages,
        "LOCAL": local,
        **({"STREAM": stream} if which == "forward" else {}),
    }  # fmt: skip
    return built(getattr(triton_kernels, f"{which}_kernel"), capability, cut, constants)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "which, capability, kilobytes",
    [("key_gradient", 75, 64), ("forward", 120, 99), ("query_gradient", 120, 99), ("key_gradient", 120, 99)],
)
@pytest.mark.parametrize("local", [0, 1])
def test_tiles_fit_small_cards(
    which: triton_attention.Pass, capability: int, kilobytes: int, local: int
) -> None:
    found = compiled(which, capability, kilobytes, 128, local=local)
    assert 0 < found.metadata.shared <= kilobytes * 1024


@pytest.mark.parametrize(("stream", "local"), [(False, 0), (True, 0), (False, 1), (True, 2)])
def test_three_programs_share_a_hopper_multiprocessor(stream: bool, local: int) -> None:
    found = compiled("forward", 90, 227, 64, stream, local)
    assert 0 < 3 * (found.metadata.shared + 1024) <= 228 * 1024
    assert "wgmma" in found.asm["ptx"]
    assert "cp.async" in found.asm["ptx"]


@pytest.mark.parametrize(("capability", "heads", "local"), [(80, 0, 0), (90, 0, 0), (90, 4, 0), (90, 4, 7)])
def test_the_step_in_one_launch_waits_in_instructions_of_the_card(
    capability: int, heads: int, local: int
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from butterfly_llm.ops.triton_persistent_kernel import persistent_kernel

    model = random_model(ButterflyConfig.preset("tiny", carry_heads=heads, local_chunks=local))
    step = PersistentStep(model, model.new_cache(), programs=64, num_warps=4)
    constants = step.constants | {"WAIT": True, "FETCH": capability >= 90}
    kinds = dict.fromkeys(("ids_ptr", "position_ptr", "table_ptr"), "*i64")
    kinds |= dict.fromkeys(("launch_ptr", "words_ptr"), "*i32") | {"eps": "fp32"}
    kinds |= dict.fromkeys(("weights_ptr", "embed_ptr", "ring_ptr"), "*bf16")
    names = persistent_kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(persistent_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "launch_cooperative_grid": True}
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert "ld.relaxed.gpu.global.b32" in ptx
    assert ("cp.async.bulk.prefetch.L2" in ptx) == (capability == 90)


@pytest.mark.parametrize(("orders", "words", "ranks"), [(7, 0, 1), (7, 3, 3), (0, 1, 1)])
@pytest.mark.parametrize("capability", [75, 90, 120])
def test_the_lookup_of_ngrams_compiles_with_whole_hashes(
    capability: int, orders: int, words: int, ranks: int
) -> None:
    """Hashes are 64 bits wide: their product is, and no order of the loads and stores is left to chance."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from butterfly_llm import ngrams
    from butterfly_llm.ops.triton_ngrams_kernel import ngram_kernel

    constants = {
        "WIDTH": 256, "ORDERS": orders, "WORDS": words, "RANKS": ranks, "SLOTS": 2**21, "R": ngrams.HISTORY,
        "MIX": ngrams.MIX, "BASE": ngrams.BASE, "BLOCK": 256,
    }  # fmt: skip
    kinds = {"entries_ptr": "*i32" if ranks == 1 else "*i64"} | dict.fromkeys(
        ("embed_ptr", "ngram_ptr", "out_ptr"), "*bf16"
    )
    names = ngram_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*i64") for name in names}
    source = ASTSource(ngram_kernel, signature, constexprs=constants)
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    assert "mul.lo.s64" in ptx
    assert ptx.count("bar.sync") >= 2


@pytest.mark.parametrize(
    ("which", "capability", "kilobytes"), [("gradient", 75, 64), ("forward", 90, 227), ("gradient", 90, 227)]
)
def test_feed_forward_tiles_fit(which: feed_forward.Pass, capability: int, kilobytes: int) -> None:
    from butterfly_llm.ops.triton_feed_forward_kernels import up_kernel

    cut = feed_forward.tiles(which, torch.float16, 3072, 768, kilobytes * 1024)
    tiles = {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
    constants = {"K": 768, "N": 3072, **tiles, "GRADIENT": which == "gradient"}
    found = built(up_kernel, capability, cut, constants)
    assert 0 < found.metadata.shared <= kilobytes * 1024
    assert ("wgmma" in found.asm["ptx"]) == (capability == 90)


def test_feed_forward_in_one_kernel_fits() -> None:
    from butterfly_llm.ops.triton_feed_forward_kernels import whole_kernel

    cut = feed_forward.tiles("whole", torch.float16, 1024, 256, 227 * 1024)
    constants = {"D": 256, "F": 1024, "BLOCK_M": cut.block_m, "BLOCK_F": cut.block_n}
    found = built(whole_kernel, 90, cut, constants)
    assert 0 < found.metadata.shared <= 227 * 1024 and "wgmma" in found.asm["ptx"]


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("topology", ["shift", "xor_causal"])
@pytest.mark.parametrize("size", [16, 48])
def test_kernels_of_a_carry_with_heads_compile(capability: int, topology: str, size: int) -> None:
    from butterfly_llm.ops.triton_carry_kernels import merge_rows_gradient_kernel, merge_rows_kernel
    from butterfly_llm.ops.triton_rows_kernels import merge_heads_kernel

    cut = feed_forward.Tiles(64, 1, 1, num_warps=4, num_stages=3)
    common = {"HEADS": 4, "CHUNK": 128, "TOPOLOGY": topology}
    rows = common | {"SIZE": size, "PADDED": 1 << (size - 1).bit_length(), "BLOCK": 64}
    for kernel in (merge_rows_kernel, merge_rows_gradient_kernel):
        assert built(kernel, capability, cut, rows).metadata.shared <= 48 * 1024
    row = 4 * (1 + size)
    step = common | {"ROW": row, "PADDED": 1 << (row - 1).bit_length()}
    assert built(merge_heads_kernel, capability, cut, step).metadata.shared <= 48 * 1024
