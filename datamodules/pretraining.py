"""The data of pretraining: prepared corpora of text."""

from pathlib import Path

import torch
from torch import Tensor

from datamodules.corpora import CorpusData, CorpusRef, Phase, check_positive, check_prepared
from datamodules.text.preparation import Preparation, describe, prepare_corpus
from datamodules.text.sources import DEFAULT_CORPUS
from modules.errors import UserError

_ONLY = "corpus"
"""Name of the source that `path` is. It seeds the order of rows: a fixed one, so that a corpus can be moved."""


class PretrainingData(CorpusData):
    """Batches for pretraining.

    Args:
        path: The prepared corpus: a folder that `python -m app prepare` wrote, or a URL that LitData reads. A missing
            folder whose name is `stdlib` is prepared at the start from the Python standard library's sources.
        sources: Several corpora by name, `{name: {path: FOLDER}}`, instead of `path`.
        phases: How `sources` are mixed: an ordered list of `{sources: {name: weight}, until_tokens: N}`; null mixes all
            with equal weights.
        sequence_length: Tokens in a row; must be that of the prepared rows.
        global_batch_size: Rows in an optimiser step, over all devices.
        micro_batch_size: Rows that one device computes at a time; gradients of the micro-batches of a step are added.
        total_tokens: Length of the run in tokens (positions, padding included), rounded up to whole steps.
        validation_rows: Rows of each validation, taken evenly from the held-out rows; null takes all, 0 none.
        workers: Processes that read ahead on each device; 0 reads in the training process (enough on local disks).
        seed: Seed of the order of the rows.
    """

    kind = "text"

    def __init__(
        self,
        path: str = "data/stdlib",
        sources: dict[str, CorpusRef] | None = None,
        phases: list[Phase] | None = None,
        sequence_length: int = 512,
        global_batch_size: int = 16,
        micro_batch_size: int = 8,
        total_tokens: int = 4_000_000,
        validation_rows: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_positive(total_tokens=total_tokens)
        if sources is None and not path:
            raise UserError("data.path: no corpus is named; give the folder of one, data/stdlib is prepared by itself")
        sources = {_ONLY: CorpusRef(path=path)} if sources is None else sources
        super().__init__(
            sources, phases, sequence_length, global_batch_size, micro_batch_size, validation_rows, workers, seed
        )
        self.total = self.after(-(-total_tokens // self.after(1).tokens))

    def prepare(self, missing: list[str]) -> None:
        """Prepare the default corpus where it is missing; see `CorpusData`."""
        folders = [self.sources[name].path for name in missing]
        for folder in folders:
            if Path(folder).name != DEFAULT_CORPUS:
                check_prepared(folder)
        for folder in folders:
            print(f"{folder} is not there yet: preparing the Python standard library's sources", flush=True)
            preparation = Preparation(paths=[DEFAULT_CORPUS], output=Path(folder), sequence_length=self.sequence_length)
            corpus, _ = prepare_corpus(preparation)
            print(describe(corpus), flush=True)

    @property
    def vocab_size(self) -> int:
        """V, the tokens of the tokenizer: the least vocabulary a model needs."""
        to_prepare = any(Path(self.sources[name].path).name == DEFAULT_CORPUS for name in self.missing)
        return Preparation.vocab_size if to_prepare else self._corpus.vocab_size

    def token_bytes(self) -> Tensor:
        """Return int64 [V]: UTF-8 bytes each token stands for (0 for special tokens)."""
        return torch.from_numpy(self._corpus.tokenizer.token_bytes())

    def gzip_bits_per_byte(self) -> float | None:
        """Return what `gzip -9` needs for the held-out text (several sources: the mean by bytes); None without any."""
        splits = [corpus.metadata for corpus in self.corpora.values() if corpus.metadata["validation"]["bytes"]]
        total = sum(metadata["validation"]["bytes"] for metadata in splits)
        bits = sum(metadata["gzip_bits_per_byte"] * metadata["validation"]["bytes"] for metadata in splits)
        return bits / total if total else None

    @property
    def _key(self) -> str:
        return "data.init_args." + ("path" if list(self.sources) == [_ONLY] else "sources")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS or EOS; names of special tokens in it become those tokens."""
        return self._corpus.tokenizer.encode(text, special_tokens=True)

    def sample_prompts(self, n: int, length: int) -> list[list[int]]:
        """Return the beginnings of up to `n` held-out documents, exactly `length` token ids each.

        Args:
            n: wanted prompts; fewer come back where fewer held-out documents are long enough.
            length: tokens of a prompt, at most 256.
        """
        openings = [ids for corpus in self.corpora.values() for ids in corpus.openings()]
        return [ids[:length] for ids in openings if len(ids) > length][:n]
