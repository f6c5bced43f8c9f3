"""Answers in OpenAI's form: of completions and chats, whole or in chunks.

Both are made of the same news. `token_ids` and `prompt_token_ids` (on request) are vLLM's extension: the tokens as the
network wrote and read them, which a text does not always say. Log-probabilities and ids are of all tokens, those that
end a completion included; texts are without them.
"""

import codecs
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.serving.reply_stream import ReplyStream
from app.serving.requests import ChatRequest, CompletionRequest, Request
from app.serving.worker import PromptScores, Written
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError
from modules.generation.continuous import TokenScore

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
"""OpenAI's names of why a completion ends."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the network reads it."""

    tokens: list[int]
    text: str
    """As it was given; of token ids what they stand for."""
    thinking: bool = False
    """Whether its end opens a thought."""


class TokenTexts:
    """What single tokens stand for.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: V of the network, which may know more ids than the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            contents = tokenizer.contents()
        except UserError:  # its tokens stand for no exact bytes
            contents = [tokenizer.decode([token]).encode() for token in range(tokenizer.vocab_size)]
        self._contents = contents + [b""] * (vocab_size - len(contents))

    def bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token."""
        return self._contents[token]

    def name(self, token: int) -> str:
        """Return the text of a token; one that is part of a character as OpenAI writes it."""
        content = self._contents[token]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionAnswer:
    """The answer of /v1/completions.

    Args:
        request: what was asked for.
        prompts: its prompts as the network reads them.
        texts: what tokens stand for.
        model: the model's name.
    """

    stream_object = whole_object = "text_completion"

    def __init__(self, request: CompletionRequest, prompts: Sequence[Prompt], texts: TokenTexts, model: str) -> None:
        self._request, self._prompts, self._texts = request, prompts, texts
        self.head = head("cmpl", model)
        choices = range(len(prompts) * request.n)
        self._logprobs = [_Logprobs(texts) for _ in choices]
        self._begun = [False for _ in choices]
        self._prompt_scores: dict[int, list[TokenScore]] = {}

    def take(self, news: PromptScores) -> None:
        """Keep the scores of a prompt for the choices that repeat it."""
        self._prompt_scores[news.prompt] = news.scores

    def chunk(self, news: Written) -> dict[str, Any]:
        """Return a choice with what is new in it."""
        request, prompt = self._request, self._prompts[news.prompt]
        index = news.prompt * request.n + news.sample
        first, self._begun[index] = not self._begun[index], True
        repeats = first and request.echo
        choice: dict[str, Any] = {
            "index": index,
            "text": (prompt.text if repeats else "") + news.text,
            "logprobs": None,
            "finish_reason": FINISH.get(news.finish or ""),
        }
        if request.logprobs is not None:
            tokens, scores = list(news.tokens), list[TokenScore | None](news.scores)
            if repeats:
                tokens, scores = prompt.tokens + tokens, [None, *self._prompt_scores[news.prompt], *scores]
            elif first:
                self._logprobs[index].pass_over(prompt.text if request.echo else "")
            choice["logprobs"] = self._logprobs[index].add(tokens, scores)
        if request.return_token_ids:
            choice["token_ids"] = news.tokens
            if first:
                choice["prompt_token_ids"] = prompt.tokens
        return choice

    whole = chunk

    def extra(self) -> dict[str, Any]:
        """Return what stands beside the choices of a whole answer."""
        return {}

    def begin(self) -> list[dict[str, Any]]:
        """Return the chunks that come before anything is written."""
        return []


class _Logprobs:
    """Log-probabilities of one choice in the form of completions.

    Args:
        texts: what tokens stand for.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def pass_over(self, text: str) -> None:
        """Let the tokens begin behind a text."""
        self._offset += len(text)

    def add(self, tokens: list[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens; the first of a prompt has none."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._characters.decode(self._texts.bytes(token)))
        return {
            "tokens": [self._texts.name(token) for token in tokens],
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [
                None if score is None else self._likeliest(token, score)
                for token, score in zip(tokens, scores, strict=True)
            ],
            "text_offset": offsets,
        }

    def _likeliest(self, token: int, score: TokenScore) -> dict[str, float]:
        """Return log-probabilities by name, the token itself among them; of two with a name the likelier."""
        found: dict[str, float] = {}
        for other, logprob in [*score.likeliest, (token, score.logprob)]:
            found.setdefault(self._texts.name(other), logprob)
        return found


class ChatAnswer:
    """The answer of /v1/chat/completions; for the arguments see `CompletionAnswer`, with one prompt."""

    whole_object, stream_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, prompts: Sequence[Prompt], texts: TokenTexts, model: str) -> None:
        self._request, self._prompt, self._texts = request, prompts[0], texts
        self.head = head("chatcmpl", model)
        self._replies = [ReplyStream(prompts[0].thinking, request.tools) for _ in range(request.n)]
        self._called = [False] * request.n

    def begin(self) -> list[dict[str, Any]]:
        """Return the chunks that come before anything is written."""
        message = {"role": "assistant", "content": ""}
        return [self._choice(index, "delta", message, None, []) for index in range(self._request.n)]

    def chunk(self, news: Written) -> dict[str, Any]:
        """Return a choice with what is new in it."""
        delta = self._delta(news)
        for place, call in enumerate(delta.get("tool_calls", [])):
            call["index"] = place
        return self._choice(news.sample, "delta", delta, news, news.tokens)

    def whole(self, news: Written) -> dict[str, Any]:
        """Return a choice that is written at once."""
        message = {"role": "assistant", "content": "", **self._delta(news)}
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        return self._choice(news.sample, "message", message, news, news.tokens)

    def extra(self) -> dict[str, Any]:
        """Return what stands beside the choices of a whole answer."""
        return {"prompt_token_ids": self._prompt.tokens} if self._request.return_token_ids else {}

    def _delta(self, news: Written) -> dict[str, Any]:
        reply = self._replies[news.sample]
        delta: dict[str, Any] = reply.add(news.text)
        if news.finish:
            for name, value in reply.finish().items():
                delta[name] = delta[name] + value if name in delta else value
        if "tool_calls" in delta:
            self._called[news.sample] = True
            delta["tool_calls"] = [_open_ai_call(call) for call in delta["tool_calls"]]
        return delta

    def _choice(
        self, index: int, key: str, message: dict[str, Any], news: Written | None, tokens: list[int]
    ) -> dict[str, Any]:
        finish = FINISH.get(news.finish or "") if news else None
        choice: dict[str, Any] = {
            "index": index,
            key: message,
            "logprobs": None,
            "finish_reason": "tool_calls" if finish == "stop" and self._called[index] else finish,
        }
        if self._request.logprobs is not None and news is not None:
            content = [
                self._token(token, score.logprob)
                | {"top_logprobs": [self._token(other, logprob) for other, logprob in score.likeliest]}
                for token, score in zip(news.tokens, news.scores, strict=True)
            ]
            choice["logprobs"] = {"content": content, "refusal": None}
        if self._request.return_token_ids:
            choice["token_ids"] = tokens
        return choice

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        texts = self._texts
        return {"token": texts.name(token), "logprob": logprob, "bytes": list(texts.bytes(token))}


def _open_ai_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call as OpenAI has it: with an id, arguments as text."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """Return what all answers and chunks begin with."""
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def usage(request: Request, prompts: Sequence[Prompt], written: int) -> dict[str, int]:
    """Return the tokens read, each prompt once, and written."""
    read = sum(len(prompt.tokens) for prompt in prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


Answer = CompletionAnswer | ChatAnswer
