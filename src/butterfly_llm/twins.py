"""Other architectures with the parameters of a Butterfly and its interface, to compare it with.

- butterfly:       the model as configured.
- window:          every layer on the previous chunk and no carry: a window of two chunks.
- full:            causal attention to everything before, rotary positions over the whole sequence.
- gated-deltanet:  `fla.layers.GatedDeltaNet`, a recurrent state with the gated delta rule (CUDA).
- mamba2:          `fla.layers.Mamba2`, a recurrent state with one decay a head (CUDA).
- window+n-grams, full+n-grams: told what followed before, as the Butterfly is (`ngrams.py`).

Depth, width, norms, loss and the form of the feed-forward layer are the same in all; only what mixes
characters differs, and the feed-forward layer is as wide as makes the parameters agree.

Shapes: B batch, N characters, d hidden size, H heads, K key-value heads, D head size, S state size.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from butterfly_llm.cache import Cache
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.layers import Layer
from butterfly_llm.model import Butterfly
from butterfly_llm.modules import FeedForward, RMSNorm
from butterfly_llm.ops.feed_forward import relu2_feed_forward, takes
from butterfly_llm.ops.rope import Angles, position_table

RECURRENT = ("gated-deltanet", "mamba2")
PLAIN = ("butterfly", "window", "full", *RECURRENT)
_TOLD = "+n-grams"
TWINS = (*PLAIN, "window" + _TOLD, "full" + _TOLD)
ROPE_THETA = 500_000.0  # of the full-attention twin: pairs turn slowly enough for 100,000s of characters


def twin(name: str, config: ButterflyConfig) -> Butterfly:
    """An untrained model of the kind `name` with the parameters of Butterfly(config), to about 1%.

    ValueError for an unknown name and for n-grams that the Butterfly has not, ModuleNotFoundError where
    flash-linear-attention is missing.
    """
    return build(name, twin_config(name, config))


def twin_config(name: str, config: ButterflyConfig) -> ButterflyConfig:
    """The config that `build` makes a twin of Butterfly(config) from; raises as `twin` does."""
    if name not in TWINS:
        raise ValueError(f"unknown twin {name!r}: there are {', '.join(TWINS)}")
    if name == "butterfly":
        return config
    told = name.endswith(_TOLD)
    if told and not config.num_contexts:
        raise ValueError(f"no twin {name}: the model has no ngram_orders and no ngram_words")
    with torch.device("meta"):
        target = Butterfly(config).num_parameters()
    # No butterfly layers and no carry: strides and passes mean nothing to a twin.
    plain = dataclasses.replace(
        config, num_local_layers=config.num_layers, num_passes=0, num_extra_levels=0, num_long_passes=0,
        num_long_levels=0, num_refine_layers=0, local_chunks=0, local_every=1, carry_size=0,
        routing="shift", rope_theta=ROPE_THETA if name.startswith("full") else config.rope_theta,
    )  # fmt: skip
    if not told:
        plain = dataclasses.replace(plain, ngram_orders=(), ngram_words=0, ngram_ranks=1)

    def count(width: int) -> int:
        with torch.device("meta"):
            return build(name, dataclasses.replace(plain, intermediate_size=width)).num_parameters()

    least, unit = count(8), count(16) - count(8)
    nearest = 1 + (target - least) / unit  # in eights
    # Whole tiles of matrix products, where that is near enough.
    width = 64 * round(nearest / 8)
    if abs(width / 8 - nearest) * unit > 0.01 * target:
        width = 8 * round(nearest)
    if width < 8:
        raise ValueError(f"no twin of {target:,} parameters: {least:,} are in its other parts")
    return dataclasses.replace(plain, intermediate_size=width)


def build(name: str, config: ButterflyConfig) -> Butterfly:
    """The architecture `name` with exactly the sizes in `config`."""
    if name.removesuffix(_TOLD) == "full":
        return FullAttention(config)
    if name in _MIXERS:
        return Recurrent(config, _MIXERS[name])
    return Butterfly(config)


class Twin(Butterfly):
    """A model that only reads whole sequences: `forward`, `hidden`, `loss`."""

    def new_cache(self, *args: Any, **options: Any) -> Cache:
        raise ValueError("this twin has no streams: it reads whole sequences")


class FullLayer(Layer):
    """A layer that attends to everything before."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, stride: int, backend: Any) -> Tensor:
        """q (B, N, H, D), k and v (B, N, K, D), as `project` makes them -> (B, N, H, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@dataclass
class WholeCache:
    """Keys and values of everything read: for each layer (B, K, N, D) of both."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values))


class FullAttention(Twin):
    """Causal attention over the whole sequence in every layer, positions counted from its beginning."""

    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(FullLayer(config, reads_carry=False) for _ in self.layers)

    def _angles(self, position: int | Tensor, ids: Tensor) -> Angles | None:
        """Of every row of ids (B, N), so that compiled layers see one shape whatever B is."""
        table = self._angles_from(0, ids.shape[1], ids.device)
        return None if table is None else (table[0].repeat(len(ids), 1), table[1].repeat(len(ids), 1))

    def _angles_from(self, position: int, num_chars: int, device: torch.device) -> Angles | None:
        """Of positions position.. of a sequence, each (num_chars, D)."""
        config = self.config
        if config.rope_theta is None:
            return None
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        stop = position + num_chars
        return position_table(position, stop, config.head_dim, config.rope_theta, dtype, device)

    def whole_cache(self, length: int, batch_size: int = 1) -> WholeCache:
        """Room for `length` characters of each stream, for `write`."""
        config, device = self.config, self.embed.weight.device
        shape = batch_size, config.num_kv_heads, length, config.head_dim
        keys, values = (
            [torch.zeros(shape, dtype=self.compute_dtype, device=device) for _ in self.layers]
            for _ in range(2)
        )
        return WholeCache(keys, values)

    @torch.no_grad()
    def write(self, ids: Tensor, position: int, cache: WholeCache) -> Tensor:
        """The characters ids (B,) at `position`, all before it in the cache -> logits (B, 256) float32."""
        if self.config.num_contexts:
            raise ValueError("this twin writes without n-grams only: it keeps no table of them")
        config, x = self.config, self._embed(ids)
        angles = self._angles_from(position, 1, ids.device)
        for layer, keys, values in zip(
            cast("list[FullLayer]", self.layers), cache.keys, cache.values, strict=True
        ):
            q, k, v = layer.project(layer, x, None, angles)  # (B, H, D), (B, K, D)
            keys[:, :, position], values[:, :, position] = k, v
            k, v = keys[:, :, : position + 1], values[:, :, : position + 1]
            grouped = config.num_heads != config.num_kv_heads
            y = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=grouped)  # (B, H, 1, D)
            x = layer.finish(layer, x, y[:, :, 0], None)
        return cast(Tensor, self.head(self.norm(x)).float())


class RecurrentLayer(nn.Module):
    """Pre-norm recurrent mixer, then the feed-forward layer of a Butterfly."""

    def __init__(self, config: ButterflyConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.finish: Callable[[RecurrentLayer, Tensor, Tensor], Tensor] = RecurrentLayer._finish

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, d) -> (B, N, d)."""
        h = self.mixer_norm(x)
        # The mixers keep float32 weights as ours do; autocast rounds them where they are used.
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            y = self.mixer(h)[0]
        return self.finish(self, x, y.to(x.dtype))

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        norm, inner, rows = self.feed_forward_norm, self.feed_forward, x.flatten(0, 1)
        if takes(rows, self.config):
            out = relu2_feed_forward(rows, norm.weight, inner.up.weight, inner.down.weight, norm.eps)
            return out.view(x.shape)
        return cast(Tensor, x + inner(norm(x)))


class Recurrent(Twin):
    """Layers with a recurrent state; `gradient_checkpointing` recomputes each from its input."""

    def __init__(self, config: ButterflyConfig, mixer: Callable[[ButterflyConfig], nn.Module]) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(RecurrentLayer(config, mixer(config)) for _ in self.layers)

    def compile_layers(self) -> None:
        """Compile the feed-forward halves, for any length; the mixers are kernels already."""
        finish = torch.compile(RecurrentLayer._finish, dynamic=True)
        for layer in cast("list[RecurrentLayer]", self.layers):
            layer.finish = finish

    def hidden(self, ids: Tensor, followers: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """As `Butterfly.hidden`."""
        x = self._embed(ids, followers)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x = cast(Tensor, checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False))
            else:
                x = layer(x)
        return cast(Tensor, self.norm(x))


def gated_deltanet(config: ButterflyConfig) -> nn.Module:
    """The layer in its published proportions: keys 0.75 of the width, values twice that, an output gate."""
    layer = _fla("layers").GatedDeltaNet(
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        num_heads=max(1, round(0.75 * config.hidden_size / config.head_dim)),
        expand_v=2,
    )
    nn.init.zeros_(layer.o_proj.weight)  # as ours: every layer starts as the identity
    return cast(nn.Module, layer)


class Mamba2(nn.Module):
    """`fla.layers.Mamba2` in its published proportions, with its scan as gated linear attention.

    The layer itself needs the package mamba-ssm, or else memory for all pairs in a chunk and head. With keys
    B, queries C, values dt * x and the log decay A * dt, its recurrence is that of `chunk_simple_gla`.
    """

    def __init__(self, config: ButterflyConfig) -> None:
        super().__init__()
        logging.getLogger("fla.layers.mamba2").setLevel(logging.ERROR)  # a line a layer, on what is replaced
        self.layer = _fla("layers").Mamba2(
            hidden_size=config.hidden_size, head_dim=config.head_dim, state_size=2 * config.head_dim
        )
        nn.init.zeros_(self.layer.out_proj.weight)
        self.convolve = _fla("modules.convolution").causal_conv1d
        self.scan = _fla("ops.simple_gla").chunk_simple_gla

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """x (B, N, d) -> (B, N, d)."""
        layer = self.layer
        inner, heads = layer.intermediate_size, layer.num_heads
        gate, mixed, dt = layer.in_proj(x).split([inner, layer.conv_dim, heads], -1)
        mixed, _ = self.convolve(
            x=mixed.contiguous(),
            weight=layer.conv1d.weight.squeeze(1),
            bias=layer.conv1d.bias,
            activation="silu",
        )
        values, keys, queries = mixed.split([inner, layer.ssm_state_size, layer.ssm_state_size], -1)
        values = values.unflatten(-1, (heads, -1))  # (B, N, H, D)
        keys, queries = (z.unsqueeze(2).expand(-1, -1, heads, -1) for z in (keys, queries))  # (B, N, H, S)
        dt = F.softplus(dt.float() + layer.dt_bias)  # (B, N, H)
        y, _ = self.scan(
            q=queries,
            k=keys,
            v=(values * dt[..., None]).to(values.dtype),
            g=-layer.A_log.float().exp() * dt,
            scale=1.0,
        )
        y = y + layer.D.to(y.dtype)[:, None] * values
        return (layer.out_proj(layer.norm(y.flatten(2), gate)),)


_MIXERS: dict[str, Callable[[ButterflyConfig], nn.Module]] = {
    "gated-deltanet": gated_deltanet,
    "mamba2": Mamba2,
}


def _fla(module: str) -> Any:
    """A module of flash-linear-attention; ModuleNotFoundError in one line where it is missing."""
    try:
        found = import_module(f"fla.{module}")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"recurrent twins need flash-linear-attention ({missing.name} is missing): "
            "pip install 'butterfly-llm[peers]'"
        ) from None
    _two_warps_on_hopper()
    return found


def _two_warps_on_hopper() -> None:
    """Let two backward kernels of the library run where Triton would miscompile them.

    Triton 3.4 to 3.7.0 gives wrong gradients on Hopper where four warps work on one tile (issues 640 and 984
    of the library), so it refuses to run there. With two warps they take other instructions.
    `kernel_error` says whether that is right on the machine at hand.
    """
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import wy_fast

    if chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1:
        for kernel in (chunk_o.chunk_bwd_kernel_dqkwg, wy_fast.prepare_wy_repr_bwd_kernel):
            tuner = kernel.fn  # below the heuristics
            for config in tuner.configs:
                config.num_warps = 2
            tuner.configs = list({config.num_stages: config for config in tuner.configs}.values())
        chunk_o.TRITON_ABOVE_3_7_1 = True


def kernel_error(name: str, device: str, dtype: torch.dtype, length: int = 192) -> dict[str, float]:
    """How far the kernels of a recurrent twin are from plain float32: output and each gradient.

    RMS error over RMS of the reference. Rounding to 16 bits gives about 0.01; a miscompiled kernel 0.1 and
    more. ValueError for a twin without such kernels.
    """
    if name not in _CASES:
        raise ValueError(f"{name} has no kernels to check: there are {', '.join(_CASES)}")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    leaves, kernels, plain = _CASES[name](draw, length, dtype)
    inputs = [z.requires_grad_() for z in leaves.values()]
    y = kernels(*inputs).float()
    weights = draw(*y.shape)
    found = [y, *torch.autograd.grad(y, inputs, weights)]
    y = plain(*inputs)
    wanted = [y, *torch.autograd.grad(y, inputs, weights)]
    return {
        part: float((a.detach().float() - b.detach()).norm() / b.detach().norm())
        for part, a, b in zip(("y", *leaves), found, wanted, strict=True)
    }


Draw = Callable[..., Tensor]
Case = tuple[dict[str, Tensor], Callable[..., Tensor], Callable[..., Tensor]]


def _delta_case(draw: Draw, length: int, dtype: torch.dtype) -> Case:
    """The operator of the layer against the library's loop over characters."""
    rule = _fla("ops.gated_delta_rule")
    heads = 3
    leaves = {
        "q": draw(1, length, heads, 64), "k": draw(1, length, heads, 64), "v": draw(1, length, heads, 128),
        "g": draw(1, length, heads), "beta": draw(1, length, heads),
        "A_log": draw(heads), "dt_bias": draw(heads),
    }  # fmt: skip

    def kernels(*each: Tensor) -> Tensor:
        q, k, v, g, beta = (z.to(dtype) for z in each[:5])
        y, _ = rule.chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, A_log=each[5], dt_bias=each[6], use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True, state_v_first=True,
        )  # fmt: skip
        return cast(Tensor, y)

    def plain(*each: Tensor) -> Tensor:
        q, k, v, g, beta, a_log, dt_bias = each
        decay = -a_log.exp() * F.softplus(g + dt_bias)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return cast(Tensor, rule.naive_recurrent_gated_delta_rule(q, k, v, beta.sigmoid(), decay)[0])

    return leaves, kernels, plain


def _mamba_case(draw: Draw, length: int, dtype: torch.dtype) -> Case:
    """Our form of the layer against the library's own, which without mamba-ssm is plain PyTorch."""
    config = ButterflyConfig(hidden_size=256, head_dim=64)
    x = draw(1, length, config.hidden_size)
    with torch.device(x.device):
        mixer = Mamba2(config)
    mixer.layer.out_proj.weight.data = draw(*mixer.layer.out_proj.weight.shape) / 16

    def kernels(x: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return cast(Tensor, mixer(x.to(dtype))[0])

    def plain(x: Tensor, *_: Tensor) -> Tensor:
        return cast(Tensor, mixer.layer(x)[0])

    return {"x": x, **dict(mixer.layer.named_parameters())}, kernels, plain


_CASES: dict[str, Callable[[Draw, int, torch.dtype], Case]] = {
    "gated-deltanet": _delta_case,
    "mamba2": _mamba_case,
}
