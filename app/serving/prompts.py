"""From a request to the tokens that the network reads.

A tokenizer is changed by each call (whether names of special tokens are tokens or text), so one thread does all
encoding, with a tokenizer of its own: mixed up, a message could write a turn.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from app.serving.answers import Prompt
from app.serving.errors import RequestError
from app.serving.requests import ChatRequest, CompletionRequest
from datamodules.conversations.replies import thinks
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer

Result = TypeVar("Result")


class Prompts:
    """Encodes prompts and conversations.

    Args:
        tokenizer: the model's, which nobody else uses.
        template: its chat template; None: it has none.
        variables: what the template is told where a request does not say otherwise.
        vocab_size: V of the network.
        special_tokens: whether names of special tokens in prompts are those tokens; of messages the template knows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        variables: dict[str, Any],
        vocab_size: int,
        special_tokens: bool = False,
    ) -> None:
        self._tokenizer, self._template, self._vocab_size = tokenizer, template, vocab_size
        self._variables, self._special_tokens = variables, special_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    async def completion(self, request: CompletionRequest) -> list[Prompt]:
        """Return the prompts of a completion; in a text names of special tokens are text, as in `generate`.

        Raises:
            RequestError: a token id is none of the model's, or a text has no token.
        """
        return await self._run(lambda: [self._encode(prompt) for prompt in request.prompts])

    async def chat(self, request: ChatRequest) -> list[Prompt]:
        """Return a conversation, rendered up to the beginning of the assistant's turn.

        Raises:
            RequestError: the model has no chat template, or one that cannot render this.
        """
        return await self._run(lambda: [self._render(request)])

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return await self._run(lambda: self._tokenizer.encode(text))

    async def detokenize(self, tokens: list[int]) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: a token id is none of the model's.
        """
        return await self._run(lambda: self._text(tokens))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(tokens=self._tokenizer.encode_prompt(prompt, self._special_tokens), text=prompt)
        return Prompt(tokens=prompt, text=self._text(prompt))

    def _text(self, tokens: list[int]) -> str:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise RequestError(
                f"prompt: holds a token id outside 0 to {self._vocab_size - 1}, the model's vocabulary", param="prompt"
            )
        return self._tokenizer.decode(tokens)

    def _render(self, request: ChatRequest) -> Prompt:
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        try:
            tokens = self._template.encode_prompt(
                request.messages, request.tools, **self._variables | request.variables
            )
        except Exception as error:  # a template is a program of the model's, and may stumble over anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(f"messages: {reason}", param="messages") from error
        text = self._tokenizer.decode(tokens)
        return Prompt(tokens=tokens, text=text, thinking=thinks(text))
