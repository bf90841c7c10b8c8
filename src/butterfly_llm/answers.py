"""One answer of the server in the form of the OpenAI protocol, whole or in parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from butterfly_llm.engine import Job, Logprob
from butterfly_llm.text import Encoding


class Answer:
    """The words of one answer in the form of the protocol: completion or chat."""

    def __init__(self, model: str, encoding: Encoding, chat: bool) -> None:
        self.model, self.encoding, self.chat = model, encoding, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.offset = 0  # characters before, for logprobs

    def envelope(self, choices: list[dict[str, Any]], *, part: bool, **more: Any) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def choice(
        self,
        text: str,
        logprobs: Sequence[Logprob] | None,
        reason: str | None,
        *,
        part: bool,
        first: bool = True,
    ) -> dict[str, Any]:
        words: dict[str, Any] = {"text": text}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant"} if first else {}
            if text or first or not part:
                message["content"] = text
            words = {"delta" if part else "message": message}
        spelled = None if logprobs is None else self._logprobs(logprobs)
        return {"index": 0, **words, "logprobs": spelled, "finish_reason": reason}

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        first, self.offset = self.offset, self.offset + len(logprobs)
        if not self.chat:
            return {
                "tokens": [self._token(each.character) for each in logprobs],
                "token_logprobs": [each.value for each in logprobs],
                "top_logprobs": [{self._token(i): value for i, value in each.top} for each in logprobs],
                "text_offset": list(range(first, self.offset)),
            }
        return {
            "content": [
                {
                    **self._entry(each.character, each.value),
                    "top_logprobs": [self._entry(i, value) for i, value in each.top],
                }
                for each in logprobs
            ]
        }

    def _entry(self, character: int, value: float) -> dict[str, Any]:
        token = self._token(character)
        data = [character] if self.encoding == "utf-8" else list(token.encode())
        return {"token": token, "logprob": value, "bytes": data}

    def _token(self, character: int) -> str:
        whole = self.encoding == "latin-1" or character < 128
        return chr(character) if whole else f"bytes:\\x{character:02x}"


def usage_of(job: Job, drawn: int) -> dict[str, Any]:
    cached = 0 if job.base is None else job.base.characters
    read = cached + len(job.prompt)
    counts = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}
