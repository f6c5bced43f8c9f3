"""The thread that decodes: what waits is taken in as rows leave, a piece of a prompt and a step of all rows at a time.

The event loop must answer while the network computes, so the two meet here only: the loop hands `Ask`s over and may
take them back, the thread tells news through `Ask.hear`. The C code and torch let go of Python's lock while they work.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from modules.backbone.model import Network
from modules.generation.continuous import BatchRow, ContinuousBatch, Prefill, TokenScore
from modules.generation.stopping import Decode, TextStream

PIECE = 512
"""Tokens of a prompt between two steps of the rows: longer pieces would be felt by those who read a stream."""


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """What the network says of a prompt's tokens after the first."""

    prompt: int
    """Number of the prompt in its request."""
    scores: list[TokenScore]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What has been added to a completion; all of it at once if it is not streamed."""

    prompt: int
    sample: int
    """Number of the completion among those of its prompt."""
    tokens: list[int]
    text: str
    """What has become certain; without the end-of-text token and stop string."""
    scores: list[TokenScore]
    """Of the tokens, if asked for."""
    finish: str | None
    """Why it ends; None: it goes on."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """There will be no more."""

    message: str


News = PromptScores | Written | Failed


@dataclass(kw_only=True, eq=False)
class Ask:
    """A prompt and its completions."""

    number: int
    """Of the prompt in its request."""
    tokens: list[int]
    rows: list[BatchRow]
    room: int
    """Tokens of a completion at most."""
    scored: int | None = None
    """How many of the most likely tokens are wanted in each place of the prompt; None: the prompt is not scored."""
    streams: bool = False
    """Whether news are wanted after each step."""
    hear: Callable[[News], object]
    """Takes news, in the worker's thread."""
    gone: bool = False
    """Nobody waits for it any more."""
    told: dict[int, int] = field(default_factory=dict)
    """Tokens told of each completion."""


class Worker(threading.Thread):
    """Decodes what is asked for until it is closed.

    Args:
        network: the network, in evaluation mode.
        decode: the tokenizer's decoder, which nobody else uses.
        batch_size: rows that are decoded together.
        most_waiting: rows that may wait.
    """

    def __init__(self, network: Network, decode: Decode, batch_size: int, most_waiting: int) -> None:
        super().__init__(name="decoding")
        self.batch_size, self.most_waiting = batch_size, most_waiting
        self._network, self._decode = network, decode
        self._changed = threading.Condition()  # guards _waiting, _closed and `gone` of all
        self._waiting: deque[Ask] = deque()
        self._closed = False
        self._batch = ContinuousBatch(network)
        self._prefill: tuple[Ask, Prefill] | None = None
        self._running: list[Ask] = []

    def submit(self, asks: Sequence[Ask]) -> bool:
        """Take asks in; return False, and take none, if they find no room."""
        with self._changed:
            if self._closed or self.waiting + sum(len(ask.rows) for ask in asks) > self.most_waiting:
                return False
            self._waiting += asks
            self._changed.notify()
        return True

    def cancel(self, asks: Sequence[Ask]) -> None:
        """Let asks go, whatever has become of them."""
        with self._changed:
            for ask in asks:
                ask.gone = True
            self._waiting = deque(ask for ask in self._waiting if not ask.gone)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its turn; who still waits hears of it."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            return sum(len(ask.rows) for ask in self._waiting)

    @property
    def running(self) -> int:
        """Rows that are being decoded, those whose prompt is on its way included."""
        prefill = self._prefill
        return len(self._batch.rows) + (len(prefill[0].rows) if prefill else 0)

    def run(self) -> None:
        """Decode; a defect costs those that are being decoded, and is printed."""
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception:
                    traceback.print_exc(file=sys.stderr)
                    self._fail("decoding failed; the server's log says why")
        self._fail("the server is stopping")

    def _wait(self) -> bool:
        """Sleep until there is something to do; return False once the thread is to end."""
        with self._changed:
            busy = self._prefill is not None or self._running
            self._changed.wait_for(lambda: busy or self._waiting or self._closed)
            return not self._closed

    def _turn(self) -> None:
        self._let_go()
        self._begin()
        if self._prefill is not None:
            self._advance(*self._prefill)
        if self._batch.rows:
            self._batch.step()
            for ask in self._running:
                self._tell(ask)
            self._batch.leave()
        self._running = [ask for ask in self._running if any(row.finish is None for row in ask.rows)]

    def _let_go(self) -> None:
        """Forget what nobody waits for."""
        if self._prefill is not None and self._prefill[0].gone:
            self._prefill = None
        gone = [ask for ask in self._running if ask.gone]  # read once: more may go at any time
        for row in [row for ask in gone for row in ask.rows]:
            row.finish = row.finish or "stop"
        self._batch.leave()
        self._running = [ask for ask in self._running if ask not in gone]

    def _begin(self) -> None:
        """Start the prompt that has waited longest, if its rows find a place."""
        with self._changed:
            if self._prefill is not None or not self._waiting:
                return
            if len(self._batch.rows) + len(self._waiting[0].rows) > self.batch_size:
                return
            ask = self._waiting.popleft()
            try:
                self._prefill = ask, Prefill(self._network, ask.tokens, ask.room, ask.scored)
            except Exception:
                self._running.append(ask)  # those hear of it
                raise

    def _advance(self, ask: Ask, prefill: Prefill) -> None:
        """Take a piece of a prompt; at its end its rows join the others."""
        if not prefill.advance(PIECE):
            return
        self._running.append(ask)
        self._prefill = None
        if ask.scored is not None:
            ask.hear(PromptScores(prompt=ask.number, scores=prefill.scores))
        if ask.room:
            self._batch.join(prefill, ask.rows)
        self._tell(ask)

    def _tell(self, ask: Ask) -> None:
        """Tell what is new in the completions of a prompt."""
        for sample, row in enumerate(ask.rows):
            told = ask.told.get(sample, 0)
            if told < 0 or not (row.finish or (ask.streams and len(row.tokens) > told)):
                continue
            text = self._new_text(row, ask.tokens)
            news = Written(
                prompt=ask.number,
                sample=sample,
                tokens=row.tokens[told:],
                text=text,
                scores=row.scores[told:],
                finish=row.finish,
            )
            ask.told[sample] = -1 if row.finish else len(row.tokens)
            ask.hear(news)

    def _new_text(self, row: BatchRow, prompt: list[int]) -> str:
        """Return what has become certain of a completion's text; of one that is not followed, all at its end."""
        text = row.text
        if text is None:
            text = TextStream(self._decode, prompt)
            if words := row.tokens[: -1 if row.finish == "eos" else None]:
                text.add(words)
        return text.take() + (text.finish() if row.finish else "")

    def _fail(self, message: str) -> None:
        """Give up all that is being decoded, at the end also what waits."""
        asks, self._running = self._running, []
        if self._prefill is not None:
            asks.append(self._prefill[0])
        self._prefill, self._batch = None, ContinuousBatch(self._network)
        with self._changed:
            if self._closed:
                asks += self._waiting
                self._waiting.clear()
        for ask in asks:
            ask.hear(Failed(message=message))
