"""An HTTP server that speaks the OpenAI protocol (extra `serve`): completions, chat, kept contexts, metrics.

    serve(load_pretrained, port=8000)

Request bodies are read and checked here, in full and strictly, before a stream begins: what a client can get
wrong is 4xx with one sentence. The work is done by `engine.Engine` on its own thread; a request's handler
only waits for events. docs/server.md describes the routes.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send
except ImportError as error:  # pragma: no cover
    raise ImportError(f"butterfly serve: no {error.name} here: pip install 'butterfly-llm[serve]'") from None

from butterfly_llm.answers import Answer, usage_of
from butterfly_llm.cache import routes_of
from butterfly_llm.config import SamplingConfig
from butterfly_llm.engine import (
    Busy,
    Context,
    Engine,
    Event,
    Failed,
    Finished,
    Full,
    Heard,
    Job,
    Logprob,
    Read,
    Stream,
    Written,
)
from butterfly_llm.guard import Guard, Refused, answer_json, error_body, loopback, refusal, token_of
from butterfly_llm.memory import format_bytes
from butterfly_llm.metrics import exposition
from butterfly_llm.model import Butterfly
from butterfly_llm.protocol import (
    CHAT_STOP,
    ChatRequest,
    CompletionRequest,
    ContextRequest,
    SaveRequest,
    Strict,
    chat_text,
    request_body,
)
from butterfly_llm.shelf import Shelf
from butterfly_llm.slots import stepper_for
from butterfly_llm.text import Encoding, StreamDecoder, decode, encode

BODY_SECONDS = 60.0  # a body that takes longer to arrive is given up
_PAGE = Path(__file__).parent / "static" / "index.html"
Form = TypeVar("Form", bound=Strict)
Result = TypeVar("Result")


class _Events(Response):
    """Server-sent events. However it ends, `closing` is called."""

    def __init__(self, chunks: AsyncIterator[Any], closing: Callable[[], None]) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.chunks, self.closing = chunks, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self.chunks:
                text = chunk if isinstance(chunk, str) else json.dumps(chunk)
                body = f"data: {text}\n\n".encode("ascii")
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # the client has left
        finally:
            self.closing()


def no_room(engine: Engine) -> Refused:
    message = f"{engine.max_contexts} contexts are kept, which is all; delete one first"
    return Refused(429, message, Retry_After="60")


class _Run:
    """A stream seen from its request: events in order, cancelled when the client leaves."""

    def __init__(self, engine: Engine, job: Job, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def notify(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        try:
            self.stream: Stream = engine.submit(job, notify)
        except Busy:
            message = f"all {engine.slots} slots are in use; try again soon"
            raise Refused(429, message, Retry_After="1") from None
        except Full:
            raise no_room(engine) from None
        self._queue = queue
        self._watch = loop.create_task(self._leave(receive))

    async def _leave(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stream.cancel()

    async def start(self) -> None:
        """Wait until the stream has its state; Refused when there is no memory for it."""
        event = await self._next()
        if isinstance(event, Failed):
            raise Refused(
                event.status, event.message, **({"Retry_After": "5"} if event.status == 503 else {})
            )

    async def events(self) -> AsyncIterator[Event]:
        """Up to Finished; Refused when it fails on the way."""
        while True:
            event = await self._next()
            if isinstance(event, Failed):
                raise Refused(event.status, event.message)
            if isinstance(event, Finished) and event.reason == "cancelled":
                raise Refused(503, "the stream was cancelled")
            yield event
            if isinstance(event, Finished):
                return

    async def _next(self) -> Event:
        event = await self._queue.get()
        self.stream.consumed += 1
        return event

    def close(self) -> None:
        self.stream.cancel()
        self._watch.cancel()


class _Server:
    """Settings, and the routes as methods."""

    def __init__(
        self, engine: Engine, name: str, encoding: Encoding, max_body: int, max_chars: int, shelf: Shelf
    ) -> None:
        self.engine, self.name, self.encoding = engine, name, encoding
        self.max_body, self.max_chars, self.shelf = max_body, max_chars, shelf
        config = engine.stepper.model.config
        self.reach, self.chunk_size, self.routes = config.reach_chars, config.chunk_size, routes_of(config)
        self.started = time.time()
        self.statuses: Counter[int] = Counter()

    async def form(self, request: Request, kind: type[Form]) -> Form:
        """The body as a `kind`: 413, 408 or 422 otherwise."""
        body = bytearray()
        too_large = Refused(413, f"the body is above {self.max_body:,} bytes (--max-body-bytes)")
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and (len(announced) > 15 or int(announced) > self.max_body):
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.max_body:
                        raise too_large
        except ClientDisconnect:
            raise Refused(400, "the body broke off") from None
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        try:
            return kind.model_validate(json.loads(body.decode()))
        except ValidationError as error:
            found = [
                (".".join(map(str, e["loc"])) or "body", e["msg"]) for e in error.errors(include_url=False)
            ]
            said = "; ".join(f"{where}: {what}" for where, what in found[:3])
            raise Refused(422, said) from None
        except UnicodeDecodeError as error:
            raise Refused(422, f"the body is not UTF-8 (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            said = str(error) if isinstance(error, json.JSONDecodeError) else "too deep, or too long a number"
            raise Refused(422, f"the body is not JSON: {said}") from None

    def encoded(self, text: str, source: str) -> bytes:
        try:
            return encode(text, source=source, encoding=self.encoding)
        except ValueError as error:
            said = str(error).partition("; use ")[0]
            more = "; a server started with --encoding utf-8 takes it" if self.encoding == "latin-1" else ""
            raise Refused(422, said + more) from None

    def base(self, name: str | None) -> Context | None:
        if name is None:
            return None
        context = self.engine.contexts.get(name)
        if context is None:
            raise Refused(404, f"no context {name!a}; POST /v1/contexts makes one")
        return context

    def job(self, form: CompletionRequest | ChatRequest) -> Job:
        if form.model not in (None, "", self.name):
            raise Refused(404, f"no model {form.model!a}; this server has {self.name!a}")
        wanted, fallback = form.max_tokens, 16
        given = [form.stop] if isinstance(form.stop, str) else form.stop or []
        stops = [self.encoded(stop, "stop") for stop in given]
        if isinstance(form, ChatRequest):
            if form.top_logprobs is not None and not form.logprobs:
                raise Refused(422, "top_logprobs: needs logprobs true")
            top = (form.top_logprobs or 0) if form.logprobs else None
            prompt = self.encoded(chat_text(form.messages), "messages")
            wanted, fallback = form.max_completion_tokens if wanted is None else wanted, 512
            stops.append(self.encoded(CHAT_STOP, "stop"))
        else:
            top = form.logprobs
            if form.echo and top is not None:
                raise Refused(422, "echo: not together with logprobs; the prompt's are not computed")
            text = form.prompt
            prompt = self.encoded(text, "prompt") if isinstance(text, str) else bytes(text)
        limit = min(fallback, self.max_chars) if wanted is None else wanted
        if limit > self.max_chars:
            raise Refused(422, f"max_tokens: {limit} is above {self.max_chars} (--max-chars)")
        sampling = SamplingConfig(
            temperature=1.0 if form.temperature is None else form.temperature,
            top_p=1.0 if form.top_p is None else form.top_p,
            seed=secrets.randbits(63) if form.seed is None else form.seed,
        )
        base = self.base(form.context)
        if not prompt and base is None:
            raise Refused(422, "prompt: it is empty; give at least one character, or a context")
        stop = (b"\0", *stops)  # NUL ends a document
        attention = isinstance(form, CompletionRequest) and bool(form.attention)
        if attention and not form.stream:
            raise Refused(422, "attention: only with stream, after each character")
        return Job(prompt, sampling, limit, stop, top, base, attention=attention)

    async def write(self, form: CompletionRequest | ChatRequest, receive: Receive) -> Response:
        job = self.job(form)
        answer = Answer(self.name, self.encoding, isinstance(form, ChatRequest))
        echo = ""
        if isinstance(form, CompletionRequest) and form.echo:
            echo = decode(job.prompt, encoding=self.encoding)
        run = _Run(self.engine, job, receive)
        streaming = False
        try:
            await run.start()
            if form.stream:
                usage = form.stream_options is not None and form.stream_options.include_usage
                streaming = True
                return _Events(self.parts(run, answer, job, echo, usage), run.close)
            text, reason, drawn = [echo], "length", 0
            logprobs: list[Logprob] = []
            async for piece, spelled, finished in self.pieces(run, job):
                text.append(piece)
                logprobs += spelled
                if isinstance(finished, Finished):
                    reason, drawn = finished.reason, finished.drawn
        finally:
            if not streaming:
                run.close()
        kept = None if job.top_logprobs is None else logprobs
        choice = answer.choice("".join(text), kept, reason, part=False)
        return answer_json(200, answer.envelope([choice], part=False, usage=usage_of(job, drawn)))

    async def pieces(
        self, run: _Run, job: Job
    ) -> AsyncIterator[tuple[str, tuple[Logprob, ...], Finished | Heard | None]]:
        decoder = StreamDecoder(self.encoding)
        async for event in run.events():
            if isinstance(event, Written):
                yield "".join(decoder.push(each) for each in event.characters), event.logprobs, None
            elif isinstance(event, Heard):
                yield "", (), event
            elif isinstance(event, Finished):
                yield decoder.finish(), (), event

    async def parts(
        self, run: _Run, answer: Answer, job: Job, echo: str, usage: bool
    ) -> AsyncIterator[dict[str, Any] | str]:
        more: dict[str, Any] = {"usage": None} if usage else {}
        wants = job.top_logprobs is not None
        if echo or answer.chat:
            yield answer.envelope([answer.choice(echo, None, None, part=True)], part=True, **more)
        try:
            async for text, logprobs, finished in self.pieces(run, job):
                if isinstance(finished, Heard):
                    own = [round(share, 3) for share in finished.own]
                    heard = {"position": finished.position, "own": own, "state_bytes": finished.state_bytes}
                    yield answer.envelope([], part=True, attention=heard, **more)
                    continue
                reason = None if finished is None else finished.reason
                if text or logprobs or finished is not None:
                    spelled = logprobs if wants and logprobs else None
                    choice = answer.choice(text, spelled, reason, part=True, first=False)
                    yield answer.envelope([choice], part=True, **more)
                if finished is not None and usage:
                    yield answer.envelope([], part=True, usage=usage_of(job, finished.drawn))
        except Refused as refused:
            yield error_body(refused.status, refused.message)
            return
        yield "[DONE]"

    async def keep(self, form: ContextRequest, receive: Receive) -> Response:
        if form.state is not None:
            context = await self.on_disk(lambda: self.shelf.load(form.state or ""))
            return answer_json(200, self.described(context))
        job = Job(self.encoded(form.text or "", "text"), base=self.base(form.context), keep=True)
        run = _Run(self.engine, job, receive)
        streaming = False
        try:
            await run.start()
            if form.stream:
                streaming = True
                return _Events(self.progress(run), run.close)
            async for event in run.events():
                if isinstance(event, Finished) and event.context is not None:
                    return answer_json(200, self.described(event.context))
        finally:
            if not streaming:
                run.close()
        raise AssertionError("a stream ends with Finished")

    async def save(self, name: str, form: SaveRequest) -> Response:
        context = self.base(form.context)
        assert context is not None
        await self.on_disk(lambda: self.shelf.save(name, context))
        return answer_json(200, {"name": name, "object": "state", "characters": context.characters})

    async def on_disk(self, work: Callable[[], Result]) -> Result:
        """`work` on a thread of its own; what goes wrong as a status and one sentence."""
        try:
            return await asyncio.to_thread(work)
        except FileNotFoundError as error:
            raise Refused(404, str(error)) from None
        except Full:
            raise no_room(self.engine) from None
        except MemoryError as error:
            raise Refused(503, str(error), Retry_After="5") from None
        except ValueError as error:
            raise Refused(422, str(error)) from None
        except OSError as error:
            raise Refused(507, f"the state cannot be read or written: {error.strerror or error}") from None

    async def progress(self, run: _Run) -> AsyncIterator[dict[str, Any] | str]:
        try:
            async for event in run.events():
                if isinstance(event, Read):
                    state = event.state_bytes
                    yield {
                        "object": "context.progress",
                        "read": event.done,
                        "total": event.total,
                        "state_bytes": state,
                    }
                elif isinstance(event, Finished) and event.context is not None:
                    yield self.described(event.context)
        except Refused as refused:
            yield error_body(refused.status, refused.message)
            return
        yield "[DONE]"

    def described(self, context: Context) -> dict[str, Any]:
        facts = {"characters": context.characters, "state_bytes": self.engine.used_bytes(context.cache)}
        return {"id": context.id, "object": "context", "created": context.created, **facts}

    def models(self) -> dict[str, Any]:
        facts = {
            "encoding": self.encoding,
            "reach_chars": self.reach,
            "state_bytes": self.engine.stepper.nbytes,
            "max_chars": self.max_chars,
            "chunk_size": self.chunk_size,
            "layers": [{"stage": route.stage, "stride": route.stride} for route in self.routes],
        }
        head = {"id": self.name, "object": "model", "created": int(self.started), "owned_by": "butterfly-llm"}
        return {"object": "list", "data": [{**head, **facts}]}

    def metrics(self) -> str:
        engine, counted = self.engine, self.engine.counters
        ends = {f'{{reason="{reason}"}}': count for reason, count in counted.finished.items()}
        codes = {f'{{code="{code}"}}': count for code, count in sorted(self.statuses.items())}
        running, waiting = engine.active, engine.waiting
        return exposition(
            [
                ("characters_read_total", "counter", "Characters of prompts read.", counted.read),
                ("characters_written_total", "counter", "Characters drawn.", counted.written),
                ("reading_seconds_total", "counter", "Time spent reading.", counted.reading_seconds),
                ("writing_seconds_total", "counter", "Time spent writing.", counted.writing_seconds),
                ("step_seconds", "histogram", "Time of one step of all streams.", counted.steps.samples()),
                ("streams_total", "counter", "Streams that ended, by reason.", ends),
                ("http_responses_total", "counter", "Answers by status code.", codes),
                ("slots", "gauge", "Streams that may run at once.", engine.slots),
                ("slots_used", "gauge", "Streams that run, the waiting ones included.", running),
                ("streams_waiting", "gauge", "Streams whose prompt is not read yet.", min(waiting, running)),
                ("contexts", "gauge", "Contexts kept.", len(engine.contexts)),
                (
                    "state_bytes",
                    "gauge",
                    "Bytes that states of streams and contexts hold.",
                    engine.state_bytes(),
                ),
                ("start_time_seconds", "gauge", "Start of the server, since 1970.", self.started),
            ]
        )


def create_app(
    engine: Engine,
    *,
    name: str = "butterfly",
    encoding: Encoding = "latin-1",
    token: str | None = None,
    max_body: int = 16_000_000,
    max_chars: int = 65_536,
    states: Path | None = None,
) -> FastAPI:
    """The routes over a running engine; `states` is the directory of saved contexts."""
    shelf = Shelf(engine, engine.stepper.model, states)
    server = _Server(engine, name, encoding, max_body, max_chars, shelf)
    app = FastAPI(title="Butterfly-LLM", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, token=token, statuses=server.statuses)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error.status, error.message, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        said = f"{error.detail}: {request.method} {request.url.path!a}"
        return refusal(error.status_code, said, dict(error.headers or {}))

    @app.get("/health")
    async def health() -> Response:
        return answer_json(200, {"status": "ok"}) if engine.alive else refusal(503, "the engine has stopped")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return answer_json(200, server.models())

    @app.post("/v1/completions", openapi_extra=request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await server.write(await server.form(request, CompletionRequest), request.receive)

    @app.post("/v1/chat/completions", openapi_extra=request_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await server.write(await server.form(request, ChatRequest), request.receive)

    @app.post("/v1/contexts", openapi_extra=request_body(ContextRequest))
    async def keep(request: Request) -> Response:
        return await server.keep(await server.form(request, ContextRequest), request.receive)

    @app.get("/v1/contexts")
    async def contexts() -> Response:
        kept = [server.described(context) for context in list(engine.contexts.values())]
        return answer_json(200, {"object": "list", "data": kept})

    @app.delete("/v1/contexts/{context}")
    async def forget(context: str) -> Response:
        if not engine.forget(context):
            raise Refused(404, f"no context {context!a}")
        return answer_json(200, {"id": context, "object": "context", "deleted": True})

    @app.get("/v1/states")
    async def saved() -> Response:
        return answer_json(200, {"object": "list", "data": await asyncio.to_thread(server.shelf.list)})

    @app.put("/v1/states/{name}", openapi_extra=request_body(SaveRequest))
    async def save(name: str, request: Request) -> Response:
        return await server.save(name, await server.form(request, SaveRequest))

    @app.get("/")
    async def page() -> Response:
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; "
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        )
        return Response(_PAGE.read_bytes(), 200, {"Content-Security-Policy": policy}, "text/html")

    return app


def serve(
    load: Callable[[], Butterfly],
    *,
    name: str = "butterfly",
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    slots: int = 8,
    contexts: int = 4,
    encoding: Encoding = "latin-1",
    max_chars: int = 65_536,
    max_body: int = 16_000_000,
    states: Path | None = None,
) -> None:
    """Serve the model that `load` gives, until SIGINT or SIGTERM.

    ValueError, before loading, for an address that is open to others without a token, or in use.
    """
    token = token_of(token)
    if token is None and not loopback(host):
        raise ValueError(
            f"serve: {host!r} is open to other machines: set BUTTERFLY_TOKEN or --token, or use 127.0.0.1"
        )
    if max_chars < 1 or max_body < 1:
        raise ValueError("serve: --max-chars and --max-body-bytes must be at least 1")
    if states is not None:
        states.mkdir(parents=True, exist_ok=True)
    listener = _listen(host, port)
    model = load()
    listener.listen()
    cuda = model.embed.weight.device.type == "cuda"
    engine = Engine(
        stepper_for(model, slots), slots=slots, contexts=contexts, slice_chars=2048 if cuda else 128
    )
    where = f"[{host}]" if ":" in host else host
    print(
        f"serving {name!r} on http://{where}:{listener.getsockname()[1]}, {slots} slots of up to "
        f"{format_bytes(engine.stepper.nbytes)}, {'token needed' if token else 'this machine only'}",
        file=sys.stderr,
        flush=True,
    )
    with engine:
        app = create_app(
            engine, name=name, encoding=encoding, token=token, max_body=max_body, max_chars=max_chars,
            states=states,
        )  # fmt: skip
        settings = uvicorn.Config(
            app, log_level="warning", limit_concurrency=256, timeout_graceful_shutdown=3, server_header=False
        )
        _Uvicorn(settings, engine).run(sockets=[listener])


class _Uvicorn(uvicorn.Server):
    """Ends the open streams first when it is told to stop, instead of waiting for them."""

    def __init__(self, settings: uvicorn.Config, engine: Engine) -> None:
        super().__init__(settings)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"serve: cannot listen on {host}:{port}: {said}; choose another --port") from None
    return listener
