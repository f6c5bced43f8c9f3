"""The data of supervised fine-tuning: prepared conversations, mixed by weight; what the assistant says is learnt.

A source that is not there is prepared at the start where the run file says what of: files of conversations, the worked
problems of an environment, or the docstrings of the Python standard library. What is made is written as JSONL beside
the corpus first, so that it can be read, and that errors can name its lines.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.conversations.docstrings import docstring_conversations
from datamodules.conversations.source import ConversationOptions, ConversationPolicies
from datamodules.conversations.template import TEMPLATE_FILE, ChatTemplate
from datamodules.corpora import CorpusData, CorpusRef, Phase, check_positive, check_prepared
from datamodules.environments.draws import normalised, overlap
from datamodules.environments.evaluation import HeldOutProblems, held_out_problems
from datamodules.environments.pool import Pool
from datamodules.text.files import write_blocks
from datamodules.text.preparation import Preparation, check_options, describe, prepare_corpus
from datamodules.tokenizer import Tokenizer, special_names
from modules.batch import Message, Problem, Progress
from modules.errors import UserError

_HELD_OUT_PROBLEMS = 500
"""Held-out problems of each environment that conversations are compared with."""
_SEED = 0
"""Seed of problems; those to train on and held-out ones are different texts, whatever the seed."""
UNKNOWN = Progress(steps=1 << 40, tokens=1 << 60, samples=1 << 50)
"""Length of a run in epochs of what is still to be prepared."""


@dataclass(frozen=True, kw_only=True)
class ConversationSource(CorpusRef):
    """Prepared conversations in a mixture, and what to prepare them of where they are missing."""

    weight: float | None = None
    """Weight in the mixture, > 0, where there are no phases; null in all sources: their numbers of rows."""
    conversations: list[str] | None = None
    """Files, folders, URLs and datasets of conversations, as `prepare` takes them."""
    environment: dict[str, Any] | None = None
    """`class_path` and `init_args` of an environment with worked solutions; `count` says how many."""
    docstrings: bool = False
    """Whether to take questions and answers made of the docstrings of the Python standard library."""
    count: int | None = None
    """Problems to draw; of docstrings the pairs to take, null takes all."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What the conversations are made from, as plain JSON values; None: from no recipe, or from files."""
        if self.environment is not None:
            return {"environment": self.environment, "count": self.count}
        return {"docstrings": True, "count": self.count} if self.docstrings else None

    @property
    def is_made(self) -> bool:
        """Whether a missing folder can be prepared."""
        return self.conversations is not None or self.recipe is not None

    def check(self, name: str) -> None:
        """Check that there is at most one recipe, a whole one.

        Raises:
            UserError: there is not.
        """
        key = f"data.init_args.sources.{name}"
        ways = [self.conversations is not None, self.environment is not None, self.docstrings]
        if sum(ways) > 1:
            raise UserError(f"{key}: give one of conversations, environment and docstrings")
        if self.environment is not None and self.count is None:
            raise UserError(f"{key}.count: an environment has problems without end, say how many to draw")
        if self.count is not None and (self.count < 1 or self.recipe is None):
            raise UserError(f"{key}.count: {self.count} must be positive, and goes with environment or docstrings")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"{key}.weight: {self.weight} is not positive; leave the source out")


class SFTData(CorpusData):
    """Batches of conversations for supervised fine-tuning.

    Args:
        sources: The conversations by name, `{name: {path: FOLDER}}`: folders that `python -m app prepare` wrote, or
            URLs that LitData reads. A missing folder is prepared at the start from what its source names:
            `conversations` (files), `environment` and `count`, or `docstrings`. `weight`s mix the sources; without any,
            and without phases, each has the weight of its number of rows.
        tokenizer: MODEL whose tokenizer and chat template missing folders are prepared with: the one that the run
            starts from. Not needed where all are there.
        phases: How `sources` are mixed: an ordered list of `{sources: {name: weight}, until_tokens: N}`; null mixes
            them by their weights.
        sequence_length: Tokens in a row; must be that of the prepared rows.
        global_batch_size: Rows in an optimiser step, over all devices.
        micro_batch_size: Rows that one device computes at a time; gradients of the micro-batches of a step are added.
        total_tokens: Length of the run in tokens (positions, padding included), rounded up to whole steps.
        epochs: Length of the run in rows of all sources together, in place of total_tokens.
        validation_rows: Rows of each validation, taken evenly from the held-out rows; null takes all, 0 none.
        validation_fraction: Share of the conversations that is held out of what is prepared at the start.
        policies: How missing folders are prepared: mask, template, what is drawn, what is done with long and malformed
            conversations; null takes the defaults.
        environments: Environments by name, `{name: {class_path: CLASS, init_args: {...}}}`, whose held-out problems the
            model is judged by; no row that is prepared at the start holds one of them.
        workers: Processes that read ahead on each device; 0 reads in the training process (enough on local disks).
        seed: Seed of the order of the rows.
    """

    kind = "conversations"

    def __init__(
        self,
        sources: dict[str, ConversationSource],
        tokenizer: str | None = None,
        phases: list[Phase] | None = None,
        sequence_length: int = 512,
        global_batch_size: int = 16,
        micro_batch_size: int = 8,
        total_tokens: int | None = None,
        epochs: float | None = None,
        validation_rows: int | None = None,
        validation_fraction: float = 0.02,
        policies: ConversationOptions | None = None,
        environments: dict[str, dict[str, Any]] | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sources, phases, sequence_length, global_batch_size, micro_batch_size, validation_rows, workers, seed
        )
        for name, source in sources.items():
            source.check(name)
        given = [source.weight is not None for source in sources.values()]
        if any(given) and not all(given):
            raise UserError(
                f"data.sources: give all of them a weight, or none: {list(sources)[given.index(False)]} has none"
            )
        self._sources = sources
        self._tokenizer = tokenizer
        self._validation_fraction = validation_fraction
        self._policies = ConversationPolicies(conversation=policies or ConversationOptions())
        self.environments = environments or {}
        if (total_tokens is None) == (epochs is None):
            raise UserError("data.total_tokens: give the length of the run by it or by data.epochs, one of both")
        self._epochs = epochs
        if total_tokens is not None:
            check_positive(total_tokens=total_tokens)
            self.total = self.after(-(-total_tokens // self.after(1).tokens))
        if epochs is not None:
            check_positive(epochs=epochs)
            self.total = UNKNOWN if self.missing else self._length_of_epochs(epochs)

    def prepare_data(self) -> None:
        """Prepare what is missing (on rank zero), and check that what is there was prepared as the run file says.

        Raises:
            UserError: it was not, or cannot be.
        """
        for name, source in self._sources.items():
            if name not in self.missing and source.is_made:
                try:
                    check_options(self._preparation(source))
                except UserError as error:
                    raise UserError(f"data.init_args.sources.{name}: {error}") from None
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """Open the corpora; see `CorpusData`.

        Raises:
            UserError: as there, or they were rendered by different chat templates: a checkpoint can hold one.
        """
        if self._epochs is not None:
            self.total = self._length_of_epochs(self._epochs)
        super().setup(stage)
        templates = {corpus.path: corpus.metadata["options"]["template"] for corpus in self.corpora.values()}
        for path, template in templates.items():
            if template != templates[self._corpus.path]:
                raise UserError(
                    f"data.sources: {path} and {self._corpus.path} were rendered by different chat templates; prepare "
                    f"one again with --template {self.tokenizer_folder / TEMPLATE_FILE}"
                )

    def prepare(self, missing: list[str]) -> None:
        """Prepare missing conversations from what their sources name; see `CorpusData`."""
        for name in missing:
            if not self._sources[name].is_made:
                check_prepared(self._sources[name].path)
        if self._tokenizer is None:
            raise UserError(
                f"data.init_args.tokenizer: {self._sources[missing[0]].path} is not there yet, and is prepared with "
                "the tokenizer and chat template of a MODEL; name the one that the run starts from"
            )
        with Pool(self.environments, processes=len(os.sched_getaffinity(0))) as pool:
            held_out = [
                problem for name in self.environments for problem in held_out_problems(pool, name, _HELD_OUT_PROBLEMS)
            ]
        policies = replace(self._policies, held_out=frozenset(normalised(problem.text) for problem in held_out))
        for name in missing:
            source = self._sources[name]
            print(f"{source.path} is not there yet: preparing {_describe(source)}", flush=True)
            if source.recipe is not None:
                _make(source)
            corpus, _ = prepare_corpus(replace(self._preparation(source), policies=policies))
            print(describe(corpus), flush=True)

    def evaluation(self) -> HeldOutProblems | None:
        """Return the held-out problems of the environments, None without any; see `EvaluatedEnvironments`."""
        return self._evaluation if self.environments else None

    @cached_property
    def _evaluation(self) -> HeldOutProblems:
        tokenizer = self._corpus.tokenizer
        template = ChatTemplate(tokenizer, self._policies.conversation.special_tokens_in_content)
        return HeldOutProblems(Pool(self.environments), template, tokenizer)

    def default_weights(self) -> dict[str, float]:
        """Return the weights of the sources in a run without phases."""
        weights = {name: source.weight for name, source in self._sources.items()}
        return {name: float(self._rows(name)) if weight is None else weight for name, weight in weights.items()}

    @property
    def vocab_size(self) -> int:
        """V, the tokens of the tokenizer: the least vocabulary a model needs."""
        if self.missing and self._tokenizer is not None:
            return Tokenizer.load(_tokenizer_folder(Path(self._tokenizer))).vocab_size
        return self._corpus.vocab_size

    def chat_tokens(self) -> dict[str, int]:
        """Return the ids of the special tokens that the chat template writes, by name."""
        return ChatTemplate(self._corpus.tokenizer).written_tokens()

    def reserved_tokens(self) -> list[int]:
        """Return the ids of the special tokens without a use: neither in the template nor with a role."""
        tokenizer, used = self._corpus.tokenizer, self.chat_tokens().values()
        roles = special_names(tokenizer.folder).values()
        names = {index: token.content for index, token in tokenizer.added_tokens().items()}
        return [index for index in sorted(tokenizer.special_ids) if index not in used and names[index] not in roles]

    def _rows(self, name: str) -> int:
        return self.corpora[name].metadata["train"]["rows"]

    def _length_of_epochs(self, epochs: float) -> Progress:
        rows = sum(map(self._rows, self._sources))
        return self.after(math.ceil(round(epochs * rows, 6) / self.global_batch_size))

    def _preparation(self, source: ConversationSource) -> Preparation:
        assert source.is_made
        return Preparation(
            paths=source.conversations or [_made_file(source)],
            output=Path(source.path),
            recipe=source.recipe,
            sequence_length=self.sequence_length,
            tokenizer=None if self._tokenizer is None else _tokenizer_folder(Path(self._tokenizer)),
            validation_fraction=self._validation_fraction,
            policies=self._policies,
        )


def _make(source: ConversationSource) -> None:
    """Write the conversations of a recipe as JSONL, and compare those of an environment with held-out problems.

    Raises:
        UserError: the environment cannot draw or answer.
    """
    if source.environment is None:
        _write_rows(source, ({"messages": turns} for turns in docstring_conversations()))
        return
    assert source.count is not None
    with Pool({source.path: source.environment}, processes=len(os.sched_getaffinity(0))) as pool:
        drawn = pool.rows(source.path, _SEED, range(source.count))
        _write_rows(source, (_row(problem, solution) for problem, solution in drawn))
        problems = held_out_problems(pool, source.path, _HELD_OUT_PROBLEMS)
    with open(_made_file(source), encoding="utf-8") as file:
        shared = overlap((json.loads(line)["messages"] for line in file), problems)
    print(f"overlap with {len(problems)} held-out problems: {shared}", flush=True)
    assert not shared, "training problems are drawn from the other side"


def _tokenizer_folder(model: Path) -> Path:
    """Return the tokenizer's folder of a checkpoint, a run (its newest checkpoint) or a corpus; others as they are."""
    checkpoints = sorted(model.glob("checkpoints/step=*"))
    inside = (checkpoints[-1] if checkpoints else model) / "tokenizer"
    return inside if inside.is_dir() else model


def _made_file(source: ConversationSource) -> str:
    """Return where the conversations of a recipe are written: beside the corpus."""
    return f"{source.path.rstrip('/')}.jsonl"


def _write_rows(source: ConversationSource, rows: Iterator[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in itertools.islice(rows, source.count))
    write_blocks(Path(_made_file(source)), lines)


def _row(problem: Problem, solution: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [*problem.messages, solution]}
    return row | {"tools": problem.tools} if problem.tools else row


def _describe(source: ConversationSource) -> str:
    """Return what a source is prepared of, for people."""
    if source.environment is not None:
        arguments = ", ".join(f"{key} {value}" for key, value in source.environment.get("init_args", {}).items())
        return f"{source.count:,} problems of {source.environment['class_path'].rpartition('.')[2]} ({arguments})"
    return "the docstrings of the standard library" if source.docstrings else ", ".join(source.conversations or [])
