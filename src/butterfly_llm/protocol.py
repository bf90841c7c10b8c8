"""What a client may send to the server, checked in full: no unknown field, no value out of range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

try:
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
except ImportError as error:  # pragma: no cover
    raise ImportError(f"butterfly serve: no {error.name} here: pip install 'butterfly-llm[serve]'") from None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
CharacterId = Annotated[int, Field(ge=0, le=255)]


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """What completions and chat have in common. n and the penalties accept what they would be anyway."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    context: str | None = None


class CompletionRequest(Sampled):
    prompt: str | list[CharacterId] = ""
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    attention: bool | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ContextRequest(Strict):
    """Either a text, after a context or not, or the name of a saved state."""

    text: Annotated[str, StringConstraints(min_length=1)] | None = None
    context: str | None = None
    stream: bool = False
    state: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ContextRequest:
        if (self.text is None) == (self.state is None):
            raise ValueError("give a text or the name of a state")
        if self.state is not None and (self.stream or self.context is not None):
            raise ValueError("a state is loaded at once and on its own")
        return self


class SaveRequest(Strict):
    context: str


def chat_text(messages: Sequence[ChatMessage]) -> str:
    """The template: a line with the role and a colon, the content, an empty line; then `assistant:`."""
    return "".join(f"{each.role}:\n{each.content}\n\n" for each in messages) + "assistant:\n"


CHAT_STOP = "\n\nuser:\n"


def request_body(form: type[Strict]) -> dict[str, Any]:
    """A form as OpenAPI describes a request body, the forms inside it written out."""
    schema = form.model_json_schema()
    inner = schema.pop("$defs", {})

    def written_out(node: Any) -> Any:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).removeprefix("#/$defs/")
            return {k: written_out(v) for k, v in (inner[name] if name else node).items()}
        return [written_out(each) for each in node] if isinstance(node, list) else node

    content = {"application/json": {"schema": written_out(schema)}}
    return {"requestBody": {"required": True, "content": content}}
