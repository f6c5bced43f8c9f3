"""The types that cross the wall between data and models, and nothing else.

Datamodules import only this file of `modules/`, so that data code can be read, tested and started without a model.
Shapes: B rows, T positions in a row, M MTP depths, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position without a target (the last token of a document, padding, masked text)."""


@dataclass(kw_only=True)
class PackedBatch:
    """One micro-batch of rows packed with whole documents.

    Document borders reset attention, the convolution, the SSM state and the MTP targets. Padding is a document of its
    own whose labels are all `IGNORED_LABEL`. A stage that needs more of each token extends it with fields [B, T, ...].
    """

    tokens: Tensor
    """int64 [B, T]: token ids."""
    labels: Tensor
    """int64 [B, T]: the target of each position (already shifted by one), or `IGNORED_LABEL`."""
    document_ids: Tensor
    """int32 [B, T]: equal within a row exactly where the document is the same; never falls in a row; T in padding."""
    boundaries: Tensor | None = None
    """int32 [n + 1], always on the host: start of each of the n documents in the flattened [B x T] positions, then
    B x T. Follows from `document_ids`; None: worked out by the network, which on a GPU waits for the device."""
    positions: Tensor | None = None
    """int64 [n]: where targets are, see `target_positions`; follows from `labels`. None: the head computes all."""

    @property
    def text_positions(self) -> Tensor:
        """int64 scalar: positions that hold text, not padding."""
        return (self.document_ids < self.tokens.shape[1]).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return the data by name: all but what follows from them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        derived = ("boundaries", "positions")
        return {name: value for name, value in fields.items() if isinstance(value, Tensor) and name not in derived}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch with `function` of each tensor that goes to a device."""
        tensors = self.tensors() | ({} if self.positions is None else {"positions": self.positions})
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device (called by Lightning)."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(kw_only=True)
class ConversationBatch(PackedBatch):
    """Rows packed with whole conversations; only what an assistant says has labels."""

    loss_weights: Tensor
    """fp32 [B, T]: weight of the conversation at each position with a label, 0 elsewhere."""


@dataclass(kw_only=True)
class Window:
    """What one rank adds up for one optimiser step: Lightning's batch. Windows may differ in size and shape."""

    step: int
    """Number of the step, from 1."""
    micro_batches: Sequence[PackedBatch]
    """At least one, as many on every rank."""
    tokens: int
    """Positions (rows x T, padding included) of the step, over all ranks."""
    samples: int
    """Rows of the step, over all ranks."""

    def pin_memory(self) -> "Window":
        """As `PackedBatch.pin_memory`."""
        return dataclasses.replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])

    def to(self, device: torch.device) -> "Window":
        """As `PackedBatch.to`."""
        return dataclasses.replace(self, micro_batches=[batch.to(device) for batch in self.micro_batches])


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, or how long it is, over all ranks."""

    steps: int = 0
    """Optimiser steps."""
    tokens: int = 0
    """Positions (rows x T, padding included)."""
    samples: int = 0
    """Rows."""

    def after(self, window: Window) -> "Progress":
        """Return the progress with one more step."""
        return Progress(steps=window.step, tokens=self.tokens + window.tokens, samples=self.samples + window.samples)


def next_token_labels(tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Return the next-token labels of packed rows.

    Args:
        tokens: int64 [B, T].
        document_ids: int32 [B, T].

    Returns:
        int64 [B, T]: `tokens[t + 1]` where it belongs to the document of position t, else `IGNORED_LABEL`.
    """
    return shifted_labels(tokens, document_ids, 1)


def shifted_labels(labels: Tensor, document_ids: Tensor, shift: int, missing: int = IGNORED_LABEL) -> Tensor:
    """Return labels moved `shift` positions to the left inside each document (MTP depth k uses shift k).

    Args:
        labels: int64 [B, T]; or what else there is of each label, of any dtype.
        document_ids: int32 [B, T].
        shift: number of positions, >= 0.
        missing: what stands where there is none.

    Returns:
        [B, T]: `labels[t + shift]` where that position exists and has the document of t, else `missing`.
    """
    if shift == 0:
        return labels
    shifted = torch.full_like(labels, missing)
    same = document_ids[:, shift:] == document_ids[:, :-shift]
    shifted[:, :-shift] = torch.where(same, labels[:, shift:], missing)
    return shifted


def target_positions(labels: Tensor, document_ids: Tensor, depths: int) -> Tensor | None:
    """Find what the head must compute; called on the host, where nobody waits for the number.

    Args:
        labels: int64 [B, T], next-token labels.
        document_ids: int32 [B, T].
        depths: number M of MTP depths.

    Returns:
        int64 [n]: where a target is among the next token's [B x T], then those of each MTP depth, [(1 + M) x B x T];
        None where more than 9 in 10 are one: picking them would cost as much as it saves.
    """
    parts = torch.stack([shifted_labels(labels, document_ids, depth) for depth in range(depths + 1)]).flatten()
    positions = (parts != IGNORED_LABEL).nonzero().flatten()
    return positions if 10 * len(positions) < 9 * len(parts) else None


def count_targets(labels: Tensor, document_ids: Tensor, depths: int) -> Tensor:
    """Count the targets of each loss part.

    Args:
        labels: int64 [B, T], next-token labels.
        document_ids: int32 [B, T].
        depths: number M of MTP depths.

    Returns:
        int64 [1 + M]: targets of the next token, then of MTP depths 1 to M.
    """
    parts = [shifted_labels(labels, document_ids, depth) for depth in range(depths + 1)]
    return torch.stack([(part != IGNORED_LABEL).sum() for part in parts])


class TrainingData(Protocol):
    """What modules and callbacks ask of `trainer.datamodule`, handed over at run time: neither imports the other."""

    progress: Progress
    """What has been handed out for training."""
    sequence_length: int
    """T, the longest row."""
    micro_batch_size: int
    """B of the largest micro-batch."""

    total: Progress
    """Length of the run."""
    micro_batches: int
    """Micro-batches of the longest window of a rank."""

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """The Hugging Face tokenizer folder."""
        ...

    @property
    def order(self) -> Mapping[str, Any]:
        """What decides which rows come, and in which order, as plain JSON values; empty: unknown."""
        ...

    def check_tokenizer(self, folder: Path, model: Path) -> None:
        """Check that token ids mean the same text to these data and to a model.

        Args:
            folder: the model's tokenizer.
            model: the MODEL, for the message.

        Raises:
            UserError: they do not; names the key of the data and the mend.
        """
        ...


@runtime_checkable
class HeldOutText(Protocol):
    """Data whose validation rows are text, so that a loss can be told in bits per byte."""

    def token_bytes(self) -> Tensor:
        """Return int64 [V]: UTF-8 bytes each token stands for (0 for special tokens)."""
        ...

    def gzip_bits_per_byte(self) -> float | None:
        """Return what `gzip -9` needs for the held-out text; None without any."""
        ...


@runtime_checkable
class SamplePrompts(Protocol):
    """Data that have prompts to go on with, and can show tokens as text."""

    def sample_prompts(self, n: int, length: int) -> list[list[int]]:
        """Return up to n prompts of `length` token ids each."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        ...


@runtime_checkable
class ChatTokens(Protocol):
    """Data of conversations, whose turns are made of special tokens."""

    def chat_tokens(self) -> Mapping[str, int]:
        """Return the ids of the special tokens that the chat template writes, by name."""
        ...

    def reserved_tokens(self) -> Sequence[int]:
        """Return the ids of the special tokens without a use, which the template does not write."""
        ...


class SourceUse(Protocol):
    """What has been taken from a source."""

    rows: int
    """Rows, repeats counted."""
    epochs: float
    """Rows over the rows of the source."""


@runtime_checkable
class MixedSources(Protocol):
    """Data mixed of several sources."""

    def asked(self, step: int) -> Mapping[str, float]:
        """Return the share of rows that is asked of each source in the first `step` steps."""
        ...

    def consumed(self, step: int) -> Mapping[str, SourceUse]:
        """Return what the first `step` steps take from each source."""
        ...


Message = dict[str, Any]
"""A turn as OpenAI's and Hugging Face's libraries write it: `role`, `content`, and more keys (`tool_calls`, ...)."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task of an environment, as plain JSON values."""

    messages: list[Message]
    """The conversation that asks; the model's turn is next."""
    answer: str
    """An answer that is judged right."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the environment must know to judge."""
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Tools that the model may call, in OpenAI's form."""

    @property
    def text(self) -> str:
        """What is asked: the contents of all turns. Two problems with the same text are the same problem."""
        return "\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a reply is worth."""

    reward: float
    """1 for an answer that is exactly right; 0 for a wrong one."""
    reason: str
    """Why, in a few words."""
    failure: str | None = None
    """Why there is no judgement: the checker raised or took too long; the reward is then not to be used."""


class Environment(Protocol):
    """Problems without end, and a judge of replies. Plain Python without state: it runs in processes of its own."""

    def problem(self, seed: int, number: int) -> Problem:
        """Return the problem of a number; the same for the same seed and number, everywhere."""
        ...

    def judge(self, problem: Problem, reply: str) -> Judgement:
        """Judge what the model said last, thoughts included."""
        ...


@runtime_checkable
class Conversational(Protocol):
    """An environment that goes on after the model's turn: with tool results, or another question."""

    def respond(self, problem: Problem, messages: Sequence[Message]) -> list[Message]:
        """Return the turns that follow the conversation so far, none when it is at its end."""
        ...


@runtime_checkable
class Worked(Protocol):
    """An environment that can answer its own problems as a model should."""

    def solution(self, problem: Problem) -> Message:
        """Return an assistant's turn that is judged right, with its steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model goes on with when it answers a problem."""

    tokens: list[int]
    """Token ids of the conversation so far, up to where the model's turn begins."""
    key: tuple[int, ...]
    """Names the random numbers of the reply: environment, problem, sample, turn."""


Reply = tuple[list[int], bool]
"""Token ids of a model's turn, what ended it included, and whether it ended by itself (not by its length)."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a model made of a problem."""

    problem: Problem
    dialogue: list[Message]
    """The turns after those of the problem: the model's, and where the environment goes on, its too."""
    reply: str
    """The model's last turn as it was judged, thoughts included."""
    judgement: Judgement
    ended: bool
    """Whether that turn ended by itself; false: it was cut at its longest, and is no answer."""


class Evaluation(Protocol):
    """Held-out problems of environments, to be answered by whatever completes prompts."""

    end_ids: Sequence[int]
    """Tokens that end a turn of the model."""

    def run(
        self,
        problems: int,
        complete: Callable[[Sequence[Prompt]], Sequence[Reply]],
        *,
        samples: int = 1,
        thinking: bool | None = None,
    ) -> Mapping[str, list[list[Attempt]]]:
        """Let held-out problems be answered, and judge the answers; the same problems each time.

        Args:
            problems: number of problems of each environment; a list of problems may hold fewer.
            complete: returns the model's turn for each prompt.
            samples: answers to each problem.
            thinking: what the chat template is told about thinking; None: nothing.

        Returns:
            Environment's name -> its problems -> the attempts at each, one a sample.
        """
        ...


@runtime_checkable
class EvaluatedEnvironments(Protocol):
    """Data that bring environments to evaluate in."""

    def evaluation(self) -> Evaluation | None:
        """Return the held-out problems, the same object each time; None where no environment is named."""
        ...
