"""`butterfly serve`: a model over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from butterfly_llm.commands.common import ModelOptions
from butterfly_llm.text import Encoding


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
    states: Path | None = None
    """Directory of saved contexts, each a folder as `butterfly read --save` writes it; made if missing."""
    encoding: Encoding = "latin-1"
    """latin-1: one character, one token. utf-8: one byte, one token."""
    max_chars: int = 65_536
    """Characters that one request may ask for."""
    max_body_bytes: int = 16_000_000
    """Size of a request at most, uploaded texts included."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        from butterfly_llm.serve import serve

        serve(
            self.model.load,
            name="butterfly" if self.model.model is None else self.model.model.resolve().name,
            host=self.host,
            port=self.port,
            token=self.token,
            slots=self.slots,
            contexts=self.contexts,
            encoding=self.encoding,
            max_chars=self.max_chars,
            max_body=self.max_body_bytes,
            states=self.states,
        )
