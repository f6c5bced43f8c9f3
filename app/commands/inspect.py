"""What the model sees: the batch of a step, from the datamodule and loader that `fit` uses, decoded token by token.

Nothing is built but the datamodule (and the LightningModule around no network, which knows the MTP depths), so a batch
of the 120B run can be looked at on a laptop that has the corpus.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from app.options import InputFile, OutputFile, for_people
from modules.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from app.cli import RunCLI
    from app.inspection.saved import SavedBatch
    from app.inspection.view import BatchView, Row
    from datamodules.corpora import CorpusData
    from datamodules.tokenizer import Tokenizer
    from modules.batch import PackedBatch

JSONL = ".jsonl"
"""How the name of a file of rows as numbers ends."""
SHOWN_ROWS = 16
"""Rows on a page unless others are asked for."""
SHOWN_ROWS_TERMINAL = 4
"""Rows in the terminal unless others are asked for."""


def inspect(
    *arguments: str,
    step: int | None = None,
    rows: str | None = None,
    full: bool = False,
    output: OutputFile | None = None,
    batch: InputFile | None = None,
) -> None:
    """Show a batch as the model sees it: decoded text, document borders, labels, what has loss.

    It is the whole batch of a step as `fit` would train on it on one device: the same rows in the same order. Rows,
    documents and positions are numbered from 0, as in the tensors; steps and epochs from 1. Warnings name what is wrong
    with labels, borders, ids or counts. In conversations what the model is taught to write stands out; a mask that
    cannot be meant (empty, whole, without the end of a turn) is an error.

    Args:
        arguments: Run files and keys as `fit` takes them, for example --config configs/pretrain.yaml --name=mine; of a
            key that is given several times the last one counts.
        step: Optimiser step, from 1; null is 1.
        rows: Rows to show, for example 0,3-5, or all; null shows the first 4 in the terminal, the first 16 on a page.
            The summary and the warnings are always about all rows. A JSONL file holds all rows unless others are asked
            for.
        full: Whether to show every document and token in the terminal, not only their beginnings and ends.
        output: HTML file to write, a page that needs no network; or, with a name that ends with .jsonl, an object a
            row: token_ids, labels (of each position the token to predict, already shifted; -100: none), document_ids,
            loss_weights (with which weight the nats of a position enter the loss of the step), text and origin (where
            the row is from). Null shows the rows in the terminal.
        batch: File that the spike guard saved (runs/NAME/spikes/) to show instead of a step.

    Raises:
        UserError: a file, key or option is wrong; the message names it and the mend.

    Example:
        python -m app inspect --config configs/pretrain.yaml --step 384
    """
    if batch is not None and step is not None:
        raise UserError("--step: --batch shows the step it was saved at; leave one of the two out")
    from app.cli import parse_run
    from app.inspection import saved, terminal
    from app.inspection.checks import warnings
    from app.inspection.page import write_page
    from datamodules.text.files import write_file

    run = parse_run(list(arguments))
    loader = StepLoader(run)
    if batch is None:
        number = 1 if step is None else step
        micro_batches, origins, losses = loader.load(number), loader.origins(number), None
        title = [f"Step {number:,} of {loader.steps:,} of run {run.config.name}, on one device"]
    else:
        found = saved.load(batch)
        micro_batches, origins, losses = found.micro_batches, loader.origins_of(found), found.token_losses
        title = saved_title(found, batch)
    view = loader.view(micro_batches, origins, losses)
    errors, paper = loader.mask_errors(view), terminal.Paper.of_stdout()
    troubles = [*errors, *warnings(view)]
    as_numbers = output is not None and output.suffix == JSONL
    default = len(view.rows) if as_numbers else SHOWN_ROWS if output is not None else SHOWN_ROWS_TERMINAL
    chosen = [view.rows[row] for row in choose_rows(rows, len(view.rows), default)]
    lines = terminal.write_summary(view, title, troubles, paper)
    if output is None:
        lines += terminal.write_rows(view, chosen, full, paper)
    else:
        if as_numbers:
            content = "".join(json_lines(chosen, loader.tokenizer)).encode()
            write_file(output, content)
            size = len(content)
        else:
            size = write_page(output, view, chosen, title, troubles)
        lines += ["", f"{output}: {len(chosen):,} of {len(view.rows):,} rows, {size / 1e6:.2f} MB"]
    print("\n".join(lines), file=for_people(output))
    if errors:
        more = f" (and {len(errors) - 1:,} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; prepare these conversations again")


def json_lines(rows: "Sequence[Row]", tokenizer: "Tokenizer") -> Iterator[str]:
    """Yield rows as objects, a line each."""
    for row in rows:
        columns = {
            "token_ids": row.tokens,
            "labels": row.labels,
            "document_ids": row.document_ids,
            "loss_weights": row.loss_weights,
        }
        entry = {name: column.tolist() for name, column in columns.items()}
        text = tokenizer.decode(entry["token_ids"])
        yield json.dumps({**entry, "text": text, "origin": row.origin}, ensure_ascii=False) + "\n"


class StepLoader:
    """The batches of a run, step by step, as one device gets them.

    Args:
        run: the parsed run.

    Raises:
        UserError: model or data refuse a value, or a corpus is missing or damaged.
    """

    def __init__(self, run: "RunCLI") -> None:
        from datamodules.tokenizer import Tokenizer
        from modules.base import StageModule

        module = run.instantiate("model")
        if not isinstance(module, StageModule):
            raise UserError(f"model.class_path: {run.config.model.class_path} is none of the stages in modules/")
        self.module: StageModule = module
        self.data: CorpusData = run.instantiate("data")
        self.data.workers = 0  # the batches do not depend on them, and one step is read faster without
        self.data.prepare_data()
        self.data.setup("fit")
        self.tokenizer = Tokenizer.load(self.data.tokenizer_folder)
        self.steps = self.data.total.steps
        """Optimiser steps of the run."""
        if (most := run.config.trainer.max_steps) >= 0:
            self.steps = min(self.steps, most)

    def load(self, step: int) -> "list[PackedBatch]":
        """Return the micro-batches of an optimiser step.

        Args:
            step: its number, from 1.

        Raises:
            UserError: the run has no such step.
        """
        if not 1 <= step <= self.steps:
            raise UserError(f"--step: {step} is not in the run, which has steps 1 to {self.steps:,}")
        return list(next(self.data.windows(step - 1)).micro_batches)

    def origins(self, step: int) -> list[str]:
        """Return where each row of a step comes from, in the order of `load`."""
        names, draws = self.data.mixture.names, self.data.mixture.draw(step - 1)
        return [
            f"{names[source]} row {row:,}, epoch {epoch + 1}"
            for source, row, epoch in zip(draws.source, draws.row, draws.epoch, strict=True)
        ]

    def origins_of(self, saved: "SavedBatch") -> list[str]:
        """Return where the rows of a saved batch come from; empty where its step in this run has other rows."""
        known: dict[bytes, str] = {}
        if 1 <= saved.step <= self.steps:
            rows = [row for batch in self.load(saved.step) for row in batch.tokens]
            known = {row.numpy().tobytes(): origin for row, origin in zip(rows, self.origins(saved.step), strict=True)}
        rows = [row for batch in saved.micro_batches for row in batch.tokens]
        return [known.get(row.numpy().tobytes(), "") for row in rows]

    @cached_property
    def turn_end(self) -> int | None:
        """Token that ends an assistant's turn; None: the rows hold no conversations."""
        from datamodules.conversations.template import ChatTemplate

        return ChatTemplate(self.tokenizer).turn_end() if self.data.kind == "conversations" else None

    def view(
        self, micro_batches: "Sequence[PackedBatch]", origins: Sequence[str], losses: "Sequence[Tensor] | None"
    ) -> "BatchView":
        """Return the view of a window; see `build_view`."""
        from app.inspection.view import build_view

        return build_view(
            micro_batches,
            self.tokenizer,
            self.module.backbone_config.vocab_size,
            origins,
            self.module.mtp_depths,
            losses,
            self._loss_weights(micro_batches),
            [] if self.turn_end is None else [self.turn_end],
        )

    def _loss_weights(self, micro_batches: "Sequence[PackedBatch]") -> "list[Tensor] | None":
        """Return with which weight the nats of each position enter the loss of the step, fp32 [B, T] each."""
        from modules.language_modeling import LanguageModeling

        if not isinstance(self.module, LanguageModeling):
            return None
        counts = [self.module.count(batch) for batch in micro_batches]
        totals = {name: sum(count[name] for count in counts) for name in counts[0]}
        return [self.module.loss_weights(batch, totals)[0] for batch in micro_batches]

    def mask_errors(self, view: "BatchView") -> list[str]:
        """Return a line for each conversation with a mask that cannot be meant."""
        from app.inspection.checks import mask_errors

        if self.turn_end is None:
            return []
        masks = {corpus.metadata["options"]["mask"] for corpus in self.data.corpora.values()}
        return mask_errors(view, self.turn_end, generated=masks == {"generated"})


def saved_title(saved: "SavedBatch", file: Path) -> list[str]:
    """Return the lines that say what a saved batch is."""
    return [
        f"Step {saved.step:,}, rank {saved.rank}, saved by the spike guard",
        f"reason: {saved.reason.replace('_', ' ')}",
        f"loss {saved.loss:.4f} (all its parts), gradient norm {saved.gradient_norm:.4f} before clipping",
        f"file: {file}",
    ]


def choose_rows(text: str | None, rows: int, default: int) -> Sequence[int]:
    """Return the numbers of the rows to show.

    Args:
        text: like `0,3-5`, or `all`; None takes the first ones.
        rows: rows of the batch.
        default: how many for None.

    Raises:
        UserError: the text is something else, or names a row that is not there.
    """
    if text is None or text == "all":
        return range(rows if text else min(default, rows))
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--rows: {text!r} is no list of rows like 0,3-5; or say all")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= rows:
            raise UserError(f"--rows: {part.strip()} is not in the batch, which has rows 0 to {rows - 1:,}")
        chosen |= dict.fromkeys(numbers)
    return list(chosen)
