"""Butterfly as a Hugging Face model: importing this module registers it with the Auto classes.

    import butterfly_llm.hf
    model = AutoModelForCausalLM.from_pretrained(folder)      # written by save_pretrained or export_hf
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=200)

Everything is computed by the one `Butterfly`, which is `model.model`; this module translates. Needs the extra
`hf`. Shapes: B streams, N characters, V = 256.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from tokenizers import Tokenizer, decoders, models
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        TextIteratorStreamer,
        TextStreamer,
    )
    from transformers import Cache as HFCache
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple
except ImportError as failure:
    raise ImportError(
        f"butterfly_llm.hf needs transformers 5.17 or later: pip install 'butterfly-llm[hf]' ({failure})"
    ) from None

from butterfly_llm.cache import Cache
from butterfly_llm.checkpoint import StoredDtype, load_pretrained, save_model
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly
from butterfly_llm.modules import Linear

SEPARATOR = 0  # NUL separates documents: it is the only special token, and stands for begin, end and padding
_FIELDS = tuple(field.name for field in dataclasses.fields(ButterflyConfig))


class ButterflyHFConfig(PreTrainedConfig):
    """The fields of `ButterflyConfig` under their own names; ValueError where those do not fit together."""

    model_type = "butterfly"
    attribute_map = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                kwargs[name] = kwargs.pop(alias)
        butterfly = ButterflyConfig.from_dict({name: kwargs.pop(name) for name in _FIELDS if name in kwargs})
        for name, value in butterfly.to_dict().items():
            setattr(self, name, value)
        self.bos_token_id = self.eos_token_id = self.pad_token_id = SEPARATOR
        self.tie_word_embeddings = False
        self.use_cache = True
        super().__init__(**kwargs)

    @property
    def butterfly(self) -> ButterflyConfig:
        return ButterflyConfig.from_dict({name: getattr(self, name) for name in _FIELDS})

    @property
    def num_hidden_layers(self) -> int:
        return self.butterfly.num_layers


class ButterflyCache(HFCache):
    """The rings of B streams (`butterfly_llm.cache.Cache`), made when the first characters are read.

    A stream cannot be rewound: `crop` refuses. `copy.deepcopy` gives an independent stream.
    """

    def __init__(self, state: Cache | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    def __repr__(self) -> str:
        return f"ButterflyCache(characters={self.get_seq_length()}, streams={self.batch_size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ButterflyCache:
        return ButterflyCache(None if self.state is None else self.state.clone())

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Characters read so far, the same for every layer."""
        return 0 if self.state is None else self.state.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no end."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a Butterfly cache cannot be rewound: copy.deepcopy it before reading on")

    def reset(self) -> None:
        self.state = None

    @torch.inference_mode()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Stream b becomes what stream beam_idx[b] was, in place; only slots that were written are moved."""
        if self.state is None:
            return
        used = -(-self.state.position // self.state.config.chunk_size)
        for ring, slots in self._rings(self.state):
            view = ring.narrow(slots, 0, min(used, ring.shape[slots]))
            view.copy_(view.index_select(0, beam_idx.to(ring.device)))
        if self.state.ngrams is not None:
            for held in self.state.ngrams.tensors().values():
                held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the streams `indices` (integers or a mask), which may be more or fewer than there are."""
        if self.state is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]

        def select(ring: Tensor) -> Tensor:
            return ring.index_select(0, indices.to(ring.device))

        old = self.state
        carries = [None if ring is None else select(ring) for ring in old.carries]
        keys, values = map(select, old.keys), map(select, old.values)
        followed = None if old.ngrams is None else old.ngrams.rows(indices.to(old.ngrams.history.device))
        self.state = Cache(old.config, old.position, list(keys), list(values), carries, followed)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each stream `repeats` times: a prompt read once, continued in several ways."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @staticmethod
    def _rings(state: Cache) -> list[tuple[Tensor, int]]:
        """Every ring and which of its dimensions counts slots."""
        carries = [(ring, 1) for ring in state.carries if ring is not None]
        return [(ring, 2) for ring in (*state.keys, *state.values)] + carries


class ButterflyForCausalLM(PreTrainedModel, GenerationMixin):
    """`Butterfly` with the interface of a transformers model."""

    config_class = ButterflyHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _is_stateful = True
    _input_embed_layer = "embed"
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: ButterflyHFConfig) -> None:
        super().__init__(config)
        if not config.butterfly.causal:
            raise ValueError("a bidirectional model (routing xor) is no causal language model")
        self.model = Butterfly(config.butterfly)
        self._parameter_dtype = torch.float32  # activations follow when it is changed
        self.post_init()

    @classmethod
    def from_butterfly(cls, model: Butterfly) -> ButterflyForCausalLM:
        """`model` itself with this interface: nothing is copied."""
        with torch.device("meta"):
            wrapped = cls(ButterflyHFConfig(**model.config.to_dict()))
        wrapped.model = model
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a folder that lacks weights or has foreign ones is refused (ValueError)."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            if names := info[f"{kind}_keys"]:
                raise ValueError(f"{args[0] if args else 'checkpoint'}: tensor {min(names)} is {kind}")
        return (model, info) if with_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """`Butterfly` has initialised itself."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.model._numpy = None  # `assign=True` puts new parameters in the place of those it looks at
        return result

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = cast(Linear, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ButterflyCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, kept, V) float32 for `input_ids` (B, N), which follow what `past_key_values` has read.

        attention_mask:  (B, N), or (B, N + characters in the cache). Padding on the right is allowed without
                         a cache, where no real character can see it; any other is refused.
        past_key_values: read on from here, in place; carries no gradient.
        labels:          (B, N), the input itself: they are shifted here; -100 is left out of the loss.
        use_cache:       True makes a cache where none is given. Nothing else does: it is hundreds of MB.
        logits_to_keep:  logits for that many last characters, or for these positions; 0 for all.

        ValueError for what the model cannot do: other padding, labels with a cache while training.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing")
        if past_key_values is None and use_cache:
            past_key_values = ButterflyCache()
        if attention_mask is not None:
            _check_mask(attention_mask, streaming=past_key_values is not None)
        if self.dtype != self._parameter_dtype:
            self._parameter_dtype = self.model.compute_dtype = self.dtype
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if past_key_values is None:
            logits = self.model.head(self.model.hidden(input_ids)[:, keep]).float()
        else:
            if labels is not None and torch.is_grad_enabled():
                raise ValueError("a cache carries no gradient: train without past_key_values and use_cache")
            logits = self._read(input_ids, past_key_values, keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _read(self, ids: Tensor, cache: ButterflyCache, keep: slice | Tensor) -> Tensor:
        """Append ids (B, N) to the streams -> logits (B, kept, V) float32."""
        if not isinstance(cache, ButterflyCache):
            raise ValueError(f"past_key_values must be a ButterflyCache, not {type(cache).__name__}")
        if cache.state is None:
            cache.state = self.model.new_cache(len(ids))
        state = cache.state
        if ids.ndim == 2 and ids.shape[1] == 1:
            logits = self.model.step(ids[:, 0], state)[:, None]
        elif keep == slice(-1, None):
            logits = self.model.prefill(ids, state)[:, None]
        else:
            logits = self._prefill_all(ids, state)
        # Out of inference mode: logits processors write in place.
        return logits.clone() if logits.shape[1] == 1 else logits[:, keep].clone()

    @torch.inference_mode()
    def _prefill_all(self, ids: Tensor, state: Cache) -> Tensor:
        """`Butterfly.prefill` with the logits of every character: (B, N, V) float32."""
        if ids.ndim != 2 or ids.shape[0] != state.batch_size or ids.shape[1] == 0:
            raise ValueError(
                f"ids {tuple(ids.shape)} must be ({state.batch_size}, characters) for this cache"
            )
        model = self.model
        size = model.slice_chars(len(ids))
        parts = [ids[:, start : start + size] for start in range(0, ids.shape[1], size)]
        hidden = torch.cat([model.append(part, state) for part in parts], dim=1)
        return cast(Tensor, model.head(model.norm(hidden)).float())

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"the cache has read {input_ids.shape[1] - next_sequence_length} characters and input_ids "
                f"hold {input_ids.shape[1]}: give all the text, the new characters last"
            )
        return cast(
            "dict[str, Any]", super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            wanted = generation_config.cache_implementation
            raise ValueError(f"cache_implementation {wanted!r}: the only one is ButterflyCache")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ButterflyCache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _check_mask(mask: Tensor, *, streaming: bool) -> None:
    """Refuse what the model would have to ignore."""
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be (batch, characters), not {tuple(mask.shape)}")
    if bool((mask == 1).all()):
        return
    ones = mask.bool()
    if streaming or bool((ones[:, 1:] & ~ones[:, :-1]).any()):
        where = "with a cache" if streaming else "on the left or inside"
        raise ValueError(
            f"attention_mask has padding {where}, which this model cannot mask: give texts of one length, "
            "or one at a time"
        )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 Latin-1 characters, one token each; NUL is the special token. Other characters become `?`."""
    tokenizer = Tokenizer(models.BPE(vocab={chr(i): i for i in range(256)}, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    separator = chr(SEPARATOR)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=separator,
        eos_token=separator,
        pad_token=separator,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


class CharacterStreamer(TextStreamer):
    """Prints each character as it is drawn, where `TextStreamer` waits for white space."""

    next_tokens_are_prompt: bool

    def put(self, value: Tensor) -> None:
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer writes one text, not {len(value)}")
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        for token in value.flatten().tolist():
            if text := self.tokenizer.decode([token], **self.decode_kwargs):
                self.on_finalized_text(text)

    def end(self) -> None:
        self.next_tokens_are_prompt = True
        self.on_finalized_text("", stream_end=True)


class CharacterIteratorStreamer(CharacterStreamer, TextIteratorStreamer):
    """Yields each character as it is drawn by a `generate` in another thread."""


def export_hf(source: str | Path | None, target: str | Path) -> None:
    """Write the model in our folder `source` (None: the shipped one) as a folder for `from_pretrained`."""
    ButterflyForCausalLM.from_butterfly(load_pretrained(source)).save_pretrained(target)
    make_tokenizer().save_pretrained(target)


def import_hf(source: str | Path, target: str | Path, *, dtype: StoredDtype = "float32") -> None:
    """Write the model in the Hugging Face folder `source` as one of ours; `dtype` as in `save_model`."""
    save_model(ButterflyForCausalLM.from_pretrained(source, dtype=torch.float32).model, target, dtype=dtype)


AutoConfig.register("butterfly", ButterflyHFConfig, exist_ok=True)
AutoModelForCausalLM.register(ButterflyHFConfig, ButterflyForCausalLM, exist_ok=True)
AutoTokenizer.register(ButterflyHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
