"""The server: OpenAI's completions and chats over HTTP, on the worker that decodes.

Whatever is wrong with a request costs an answer of status 4xx in OpenAI's shape. A client that goes, or that does not
read its stream, has its rows let go: the handler of a request ends then, and `_decoded` cancels what it had asked for.
"""

import asyncio
import dataclasses
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from app.serving import fields
from app.serving.answers import Answer, ChatAnswer, CompletionAnswer, Prompt, TokenTexts, usage
from app.serving.errors import RequestError
from app.serving.prompts import Prompts
from app.serving.requests import CompletionRequest, Request, parse_chat, parse_completion
from app.serving.worker import Ask, Failed, News, PromptScores, Worker, Written
from modules.generation.continuous import BatchRow
from modules.generation.stopping import Decode, TextStream

BODY_SECONDS, WRITE_SECONDS = 30, 30
"""How long a client may take to send its request, and to take in a piece of its stream."""
JSON_TYPES = ("application/json", "text/json")
"""Asked for, because a browser sends other types to this server on behalf of any page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    max_context: int
    """Tokens of prompt and completion together."""
    max_body: int
    """Bytes of a request."""
    seconds: float
    """From a request to the end of its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is served."""

    name: str
    created: int
    """Seconds since 1970."""
    prompts: Prompts
    texts: TokenTexts
    decode: Decode
    """Of the worker's tokenizer, for its thread."""
    ends: frozenset[int]
    """Tokens that end a completion."""
    chat_ends: frozenset[int]
    """Tokens that end a reply."""


class Server:
    """Answers requests.

    Args:
        served: the model.
        worker: decodes; it is running.
        limits: what a request may ask for.
        api_key: what clients must know; None: nothing.
    """

    def __init__(self, served: Served, worker: Worker, limits: Limits, api_key: str | None = None) -> None:
        self._served, self._worker, self._limits, self._api_key = served, worker, limits, api_key

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=self._limits.max_body, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/tokenize", self._tokenize),
                web.post("/v1/detokenize", self._detokenize),
            ]
        )
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Give every error its answer."""
        try:
            self._authorize(request)
            return await handler(request)
        except RequestError as error:
            headers = {"Retry-After": "1"} if error.status == 429 else {}
            return web.json_response(error.body(), status=error.status, headers=headers)
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        except web.HTTPException as error:
            if error.status < 400:
                raise
            allowed = error.headers.get("Allow")
            message = f"{request.method} {request.path}: {error.reason}" + (f"; use {allowed}" if allowed else "")
            body = RequestError(message, status=error.status).body()
            return web.json_response(body, status=error.status, headers={"Allow": allowed} if allowed else {})

    def _too_large(self) -> web.Response:
        message = f"the body has more than {self._limits.max_body:,} bytes, the most that this server takes"
        return web.json_response(RequestError(message, status=413).body(), status=413)

    def _authorize(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._api_key is None or request.path == "/health":
            return
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._api_key.encode()):
            raise RequestError(
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    async def _health(self, _: web.Request) -> web.Response:
        worker = self._worker
        ok = worker.is_alive()
        state = {"status": "ok" if ok else "stopped", "running": worker.running, "waiting": worker.waiting}
        return web.json_response(state, status=200 if ok else 503)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._served
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "superbolt"}
        return card | {"max_model_len": self._limits.max_context}

    async def _tokenize(self, request: web.Request) -> web.Response:
        found = await self._read(
            request, lambda body: fields.parse_fields(body, {"prompt": fields.text, "model": fields.text}, ("prompt",))
        )
        tokens = await self._served.prompts.tokenize(found["prompt"])
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": self._limits.max_context})

    async def _detokenize(self, request: web.Request) -> web.Response:
        found = await self._read(
            request, lambda body: fields.parse_fields(body, {"tokens": fields.ids, "model": fields.text}, ("tokens",))
        )
        return web.json_response({"prompt": await self._served.prompts.detokenize(found["tokens"])})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = await self._read(request, parse_completion)
        self._check_model(asked.model)
        prompts = await self._served.prompts.completion(asked)
        answer = CompletionAnswer(asked, prompts, self._served.texts, self._served.name)
        return await self._answer(request, asked, prompts, answer, self._served.ends)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await self._read(request, parse_chat)
        self._check_model(asked.model)
        prompts = await self._served.prompts.chat(asked)
        answer = ChatAnswer(asked, prompts, self._served.texts, self._served.name)
        return await self._answer(request, asked, prompts, answer, self._served.chat_ends)

    async def _read(self, request: web.Request, parse: Callable[[dict[str, Any]], Any]) -> Any:
        """Return a request's body, parsed."""
        if request.content_type not in JSON_TYPES:
            raise RequestError(
                f"send JSON, with the header Content-Type: application/json, not {request.content_type}", status=415
            )
        if (request.content_length or 0) > self._limits.max_body:
            raise web.HTTPRequestEntityTooLarge(self._limits.max_body)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
        except TimeoutError as error:
            raise RequestError(f"the body did not come within {BODY_SECONDS} seconds", status=408) from error
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise RequestError("the body cannot be read: it is not as Content-Encoding says, or cut off") from error
        try:
            return parse(fields.parse_json(body))
        except RecursionError as error:
            raise RequestError("the body is nested too deeply") from error

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._served.name:
            raise RequestError(
                f"model: there is no {name[:80]!r} here, only {self._served.name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def _answer(
        self,
        request: web.Request,
        asked: Request,
        prompts: Sequence[Prompt],
        answer: Answer,
        ends: frozenset[int],
    ) -> web.StreamResponse:
        async with self._decoded(asked, prompts, ends) as news:
            if asked.stream:
                return await self._stream(request, asked, prompts, answer, news)
            choices, written = [], 0
            async for one in news:
                if isinstance(one, PromptScores):
                    self._keep(answer, one)
                else:
                    written += len(one.tokens)
                    choices.append(answer.whole(one))
        choices.sort(key=lambda choice: choice["index"])
        whole = {"object": answer.whole_object, "choices": choices, "usage": usage(asked, prompts, written)}
        return web.json_response(answer.head | whole | answer.extra())

    def _keep(self, answer: Answer, scores: PromptScores) -> None:
        assert isinstance(answer, CompletionAnswer), "only prompts that are repeated are scored"
        answer.take(scores)

    async def _stream(
        self,
        request: web.Request,
        asked: Request,
        prompts: Sequence[Prompt],
        answer: Answer,
        news: AsyncIterator[PromptScores | Written],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

        async def send(content: dict[str, Any] | str) -> None:
            data = content if isinstance(content, str) else json.dumps(content)
            async with asyncio.timeout(WRITE_SECONDS):
                await response.write(f"data: {data}\n\n".encode())

        head = answer.head | {"object": answer.stream_object} | ({"usage": None} if asked.include_usage else {})
        written = 0
        try:
            await response.prepare(request)
            for choice in answer.begin():
                await send(head | {"choices": [choice]} | answer.extra())
            async for one in news:
                if isinstance(one, PromptScores):
                    self._keep(answer, one)
                else:
                    written += len(one.tokens)
                    await send(head | {"choices": [answer.chunk(one)]})
            if asked.include_usage:
                await send(head | {"choices": [], "usage": usage(asked, prompts, written)})
            await send("[DONE]")
        except RequestError as error:
            await send(error.body())
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the client has gone
        return response

    @asynccontextmanager
    async def _decoded(
        self, asked: Request, prompts: Sequence[Prompt], ends: frozenset[int]
    ) -> AsyncIterator[AsyncIterator[PromptScores | Written]]:
        """Hand a request to the worker; give its news, and let it go in the end, whatever happens."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[News]()

        def hear(news: News) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, news)

        asks = self._asks(asked, prompts, ends, hear)
        rows = sum(len(ask.rows) for ask in asks)
        if rows > self._worker.most_waiting:
            raise RequestError(
                f"n: {len(prompts)} prompts of {asked.n} completions are {rows}; ask for at most "
                f"{self._worker.most_waiting} at a time",
                param="n",
            )
        if not self._worker.submit(asks):
            raise RequestError(
                f"{self._worker.waiting} completions are waiting, too many to take more; try again later", status=429
            )

        async def news() -> AsyncIterator[PromptScores | Written]:
            left, seconds = rows, self._limits.seconds
            end = loop.time() + seconds
            while left:
                try:
                    async with asyncio.timeout_at(end):
                        one = await queue.get()
                except TimeoutError as error:
                    raise RequestError(f"the answer was not complete within {seconds:g} seconds", status=408) from error
                if isinstance(one, Failed):
                    raise RequestError(one.message, status=503)
                left -= isinstance(one, Written) and one.finish is not None
                yield one

        try:
            yield news()
        finally:
            self._worker.cancel(asks)

    def _asks(
        self, asked: Request, prompts: Sequence[Prompt], ends: frozenset[int], hear: Callable[[News], None]
    ) -> list[Ask]:
        """Return what the worker is asked for, a prompt each."""
        if asked.n > self._worker.batch_size:
            raise RequestError(
                f"n: must be at most {self._worker.batch_size}, the completions that are written together", param="n"
            )
        asks = []
        echo = isinstance(asked, CompletionRequest) and asked.echo
        for number, prompt in enumerate(prompts):
            room = self._room(asked, len(prompt.tokens))
            follows = asked.stream or bool(asked.stop)
            rows = [
                BatchRow(
                    limit=room,
                    eos_ids=ends,
                    random=asked.sampling.stream((number, sample)),
                    text=TextStream(self._served.decode, prompt.tokens, asked.stop) if follows else None,
                    finish=None if room else "length",
                    sampling=asked.sampling,
                    scored=asked.logprobs,
                )
                for sample in range(asked.n)
            ]
            scored = asked.logprobs if echo else None
            asks.append(
                Ask(
                    number=number,
                    tokens=prompt.tokens,
                    rows=rows,
                    room=room,
                    scored=scored,
                    streams=asked.stream,
                    hear=hear,
                )
            )
        return asks

    def _room(self, asked: Request, read: int) -> int:
        """Return the tokens of a completion at most."""
        most = self._limits.max_context
        what = f"the context is {most:,} tokens at most"
        if read == 0:
            raise RequestError("prompt: must hold at least one token", param="prompt")
        if asked.max_tokens is None and read >= most:
            raise RequestError(f"{what}, and the prompt has {read:,}", code="context_length_exceeded")
        room = most - read if asked.max_tokens is None else asked.max_tokens
        if read + room > most:
            raise RequestError(
                f"{what}; the prompt has {read:,}, and max_tokens asks for {room:,} more, {read + room:,} together",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return room
