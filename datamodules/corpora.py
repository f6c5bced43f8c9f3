"""What the data of all stages that train on prepared corpora share: mixed by weight, cut into batches.

One "epoch" is the whole run, so that Lightning's epoch machinery has nothing to do; sources that are smaller than their
share repeat with a new shuffle each time. The number of devices, micro-batches and workers never changes which rows a
step trains on.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import StageData
from datamodules.loader import RankShare, ValidationLoader, Windows
from datamodules.text.corpus import Corpus, RowReader
from datamodules.text.files import is_remote
from datamodules.text.mixture import Consumption, Mixture, MixturePhase
from datamodules.text.preparation import CORPUS_FILE, prepare_command
from datamodules.text.rows import Kind
from datamodules.tokenizer import Tokenizer
from modules.batch import Progress, Window
from modules.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CorpusRef:
    """A prepared corpus in a mixture."""

    path: str
    """Folder that `prepare` wrote, or a URL that LitData reads (`s3://...`)."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run with constant weights."""

    sources: dict[str, float]
    """Weight of each source, > 0; only their ratios count."""
    until_tokens: int | None = None
    """Tokens of the run after which the next phase begins (rounded up to whole steps); null in the last phase."""


class CorpusData(StageData):
    """Batches from prepared corpora.

    Args:
        sources: the corpora by name.
        phases: how they are mixed; None: all the time by `default_weights`.
        sequence_length: T, tokens in a row.
        global_batch_size: rows in an optimiser step, over all devices.
        micro_batch_size: B, rows that one device computes at a time.
        validation_rows: rows of each validation; None takes all.
        workers: processes that read ahead.
        seed: seed of the order of the rows.
    """

    kind: ClassVar[Kind]
    """What the rows of the corpora must hold."""
    _key = "data.init_args.sources"

    def __init__(
        self,
        sources: Mapping[str, CorpusRef],
        phases: list[Phase] | None,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        validation_rows: int | None,
        workers: int,
        seed: int,
    ) -> None:
        super().__init__(sequence_length, micro_batch_size)
        self.prepare_data_per_node = False  # one preparation in all; a shared folder is assumed
        check_positive(
            sequence_length=sequence_length, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        )
        if validation_rows is not None and validation_rows < 0:
            raise UserError(f"data.validation_rows: {validation_rows} is negative; give null for all rows, 0 for none")
        if workers < 0:
            raise UserError(f"data.workers: {workers} is negative")
        _check_phases(phases, sources)
        self.sources = sources
        self._phases = phases
        self.global_batch_size = global_batch_size
        self.validation_rows = validation_rows
        self.workers = workers
        self.seed = seed

    def after(self, steps: int) -> Progress:
        """Return the progress after a number of optimiser steps, all of the same size."""
        rows = steps * self.global_batch_size
        return Progress(steps=steps, tokens=rows * self.sequence_length, samples=rows)

    @abstractmethod
    def prepare(self, missing: list[str]) -> None:
        """Prepare corpora that are not there (on rank zero).

        Args:
            missing: names of all sources on this machine whose corpora are not there, or not complete.

        Raises:
            UserError: one cannot be.
        """

    def default_weights(self) -> dict[str, float]:
        """Return the weights of the sources in a run without phases: equal ones."""
        return dict.fromkeys(self.sources, 1.0)

    def prepare_data(self) -> None:
        """Prepare what is missing (on rank zero).

        Raises:
            UserError: it cannot be, or micro-batches do not fit: nothing is prepared for such a run.
        """
        if missing := self.missing:
            _check_division(self.global_batch_size, self.micro_batch_size, 1)
            self.prepare(missing)

    @property
    def missing(self) -> list[str]:
        """Names of the sources on this machine whose corpora are not there, or not complete."""
        return [name for name, source in self.sources.items() if not _is_prepared(source.path)]

    def setup(self, stage: str) -> None:
        """Open and check the corpora and find this rank's part of a batch.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            UserError: if a corpus is missing or damaged, or sizes do not fit; the message names key or file.
        """
        _ = self.corpora, self.mixture, self._validation_readers
        super().setup(stage)
        if stage == "fit":
            _check_division(self.global_batch_size, self.micro_batch_size, self.ranks)
        self.micro_batches = self.global_batch_size // (self.micro_batch_size * self.ranks)

    def windows(self, first: int) -> Iterator[Window]:
        """Yield this rank's windows after the first `first` steps."""
        windows = Windows(self.mixture, self._readers, self._share)
        return windows.load(first, self.total.steps, self.workers)

    @property
    def _share(self) -> RankShare:
        return RankShare(rank=self.rank, ranks=self.ranks, micro_batch_size=self.micro_batch_size)

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the loader of this rank's validation rows (an empty list for `validation_rows: 0`)."""
        readers = self._validation_readers
        if self.validation_rows == 0:
            return []
        return ValidationLoader(readers, _choose_rows(readers, self.validation_rows), self._share)

    def test_dataloader(self) -> ValidationLoader | list[Any]:
        """Return the validation rows: the held-out text is one."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return how far the run is, and of what."""
        fingerprints = self.order["fingerprints"]
        return {**super().state_dict(), "tokens_per_step": self.after(1).tokens, "fingerprints": fingerprints}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, and check that a resumed run counts in the same steps.

        Raises:
            UserError: if a step has another number of tokens than before.
        """
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        if fitting and state_dict["tokens_per_step"] != self.after(1).tokens:
            raise UserError(
                f"data.global_batch_size: a step of this run has {state_dict['tokens_per_step']} tokens, not "
                f"{self.after(1).tokens}; keep global_batch_size x sequence_length, or start a new run"
            )
        if state_dict["fingerprints"] != self.state_dict()["fingerprints"]:
            rank_zero_info("note: the text of a corpus changed since the checkpoint; the run goes on with the new one")
        self.progress = (
            Progress(**state_dict["progress"]) if "progress" in state_dict else self.after(state_dict["steps"])
        )

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """The corpora by name, checked against the options."""
        corpora: dict[str, Corpus] = {}
        for name, source in self.sources.items():
            check_prepared(source.path)
            corpus = corpora[name] = Corpus(source.path)
            if corpus.kind != self.kind:
                held = {"text": "plain text", "conversations": "conversations"}
                raise UserError(
                    f"data.sources: {source.path} holds {held[corpus.kind]}, and {type(self).__name__} trains on "
                    f"{held[self.kind]}; give a corpus prepared with --kind {self.kind}"
                )
            if corpus.sequence_length != self.sequence_length:
                raise UserError(
                    f"data.sequence_length: {source.path} has rows of {corpus.sequence_length} tokens, not "
                    f"{self.sequence_length}; set it to {corpus.sequence_length}, or prepare again with "
                    f"--sequence_length {self.sequence_length} and another --output"
                )
            first = next(iter(corpora.values()))
            if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise UserError(
                    f"data.sources: {source.path} and {first.path} have different tokenizers; prepare one again with "
                    f"--tokenizer {first.tokenizer_folder}"
                )
        return corpora

    @property
    def phases(self) -> list[Phase]:
        """How the sources are mixed."""
        return [Phase(sources=self.default_weights())] if self._phases is None else self._phases

    @cached_property
    def mixture(self) -> Mixture:
        """Which rows each step takes."""
        chunk_rows = {name: reader.chunk_rows for name, reader in zip(self.corpora, self._readers, strict=True)}
        phases = []
        for number, phase in enumerate(self.phases):
            end = self.total.steps
            if phase.until_tokens is not None and number < len(self.phases) - 1:
                end = -(-phase.until_tokens // self.after(1).tokens)
            phases.append(MixturePhase(end_step=end, weights=phase.sources))
        return Mixture(chunk_rows, phases, self.global_batch_size, self.seed)

    def consumed(self, step: int) -> dict[str, Consumption]:
        """Return rows and epochs that the first `step` optimiser steps take from each source."""
        return self.mixture.consumed(step)

    def asked(self, step: int) -> dict[str, float]:
        """Return the share of rows that the weights of the phases ask of each source in the first `step` steps."""
        return self.mixture.asked(step)

    @cached_property
    def _readers(self) -> list[RowReader]:
        return [corpus.rows("train") for corpus in self.corpora.values()]

    @cached_property
    def _validation_readers(self) -> list[RowReader]:
        readers = [corpus.rows("validation") for corpus in self.corpora.values()]
        if self.validation_rows != 0 and not any(map(len, readers)):
            raise UserError(
                "data.validation_rows: no corpus has held-out rows; prepare with a validation_fraction above 0, "
                "or set validation_rows to 0"
            )
        return readers

    @property
    def _corpus(self) -> Corpus:
        return next(iter(self.corpora.values()))

    @property
    def tokenizer_folder(self) -> Path:
        """The Hugging Face tokenizer folder (goes into checkpoints)."""
        return self._corpus.tokenizer_folder

    def check_tokenizer(self, folder: Path, model: Path) -> None:
        """Check that token ids mean the same text to these data and to a model; see `TrainingData`."""
        if Tokenizer.load(folder).fingerprint != self._corpus.tokenizer.fingerprint:
            raise UserError(
                f"{self._key}: {self._corpus.path} has another tokenizer than {model}, to which ids mean "
                f"other text; prepare the text with --tokenizer {model} and another --output"
            )

    @property
    def order(self) -> dict[str, Any]:
        """What decides which rows come, and in which order."""
        return {
            "fingerprints": {name: corpus.metadata["fingerprint"] for name, corpus in self.corpora.items()},
            "phases": [asdict(phase) for phase in self.phases],
            "tokenizer": self._corpus.tokenizer.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }

    def decode(self, ids: list[int] | Tensor) -> str:
        """Return the text of token ids."""
        return self._corpus.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else ids)


def _is_prepared(path: str) -> bool:
    return is_remote(path) or (Path(path) / CORPUS_FILE).is_file()


def check_prepared(path: str) -> None:
    """Check that a corpus is there.

    Raises:
        UserError: it is not; says how to make it.
    """
    if not _is_prepared(path):
        raise UserError(f"data.path: {path} is no prepared corpus; make it with: {prepare_command(path)}")


def _check_division(rows: int, micro_batch_size: int, ranks: int) -> None:
    """Check that the rows of a step divide among devices in micro-batches of one size."""
    per_pass = micro_batch_size * ranks
    if rows % per_pass:
        fitting = [size for size in range(micro_batch_size, 0, -1) if rows % (size * ranks) == 0]
        mend = f"set data.init_args.micro_batch_size to {fitting[0]}, or " if fitting else "set "
        devices = "1 device" if ranks == 1 else f"{ranks} devices"
        raise UserError(
            f"data.init_args.global_batch_size: {rows} rows a step do not divide among {devices} with "
            f"data.init_args.micro_batch_size {micro_batch_size}; {mend}data.init_args.global_batch_size to a multiple "
            f"of {per_pass}"
        )


def check_positive(**values: float) -> None:
    """Check keys of the data that must be above 0."""
    for key, value in values.items():
        if value < 1:
            raise UserError(f"data.{key}: {value} is not positive")


def _check_phases(phases: list[Phase] | None, sources: Mapping[str, CorpusRef]) -> None:
    """Check names, weights and order of the phases."""
    if not sources:
        raise UserError("data.sources: give at least one source")
    if phases is None:
        return
    before = 0
    for number, phase in enumerate(phases):
        key = f"data.phases[{number}]"
        for name, weight in phase.sources.items():
            if name not in sources:
                raise UserError(f"{key}.sources: '{name}' is not in data.sources ({', '.join(sources)})")
            if not 0 < weight < math.inf:
                raise UserError(f"{key}.sources.{name}: the weight {weight} is not positive; leave the source out")
        if not phase.sources:
            raise UserError(f"{key}.sources: give at least one source")
        last = number == len(phases) - 1
        if last != (phase.until_tokens is None):
            raise UserError(f"{key}.until_tokens: every phase but the last needs it, the last must not have it")
        if phase.until_tokens is not None and phase.until_tokens <= before:
            raise UserError(f"{key}.until_tokens: {phase.until_tokens} is not after {before}")
        before = phase.until_tokens or before
    if not phases:
        raise UserError("data.phases: give at least one phase or leave it out")


def _choose_rows(readers: list[RowReader], wanted: int | None) -> list[tuple[int, int]]:
    """Return (reader, row) of the validation rows: evenly from all sources, evenly spaced in each."""
    rows: list[tuple[int, int]] = []
    for number, reader in enumerate(readers):
        share = len(reader)
        if wanted is not None:
            share = min(share, -(-(wanted - len(rows)) // (len(readers) - number)))
        rows.extend((number, place * len(reader) // share) for place in range(share))
    return rows
