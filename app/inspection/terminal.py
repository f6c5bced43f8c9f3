"""The view of a batch as text: coloured on a terminal, with marks that need no colour elsewhere."""

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from app.inspection.tokens import Token
from app.inspection.view import (
    BatchView,
    Document,
    Row,
    caption,
    heading,
    largest_losses,
    loss_line,
    summary,
)
from modules.batch import IGNORED_LABEL

MARKS = "«» special token  ⟨⟩ bytes of a character, or a hidden one  ↵ line break  ⇥ tabulator"
LOSS_MARKS = {False: "⟦⟧ no loss", True: "⟦⟧ no loss, the rest is what the model is taught to write"}
"""What the brackets say, by whether the rows are conversations."""
SHOWN_DOCUMENTS = 3
"""Documents of a row that are shown unless all are asked for."""
HEAD_TOKENS, TAIL_TOKENS = 80, 40
"""Tokens at the beginning and end of a document's text that are shown unless all are asked for."""
CONTEXT_TOKENS = 24
"""Tokens at both ends of a stretch of a conversation that has no loss, in their place."""
WORST = 10
"""Largest losses that are listed, where they are known."""
TABLE_ENDS = 2
"""First and last tokens of a document whose targets are listed unless all are asked for."""

BOLD, DIM, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = "1", "2", "31", "32", "33", "1;34", "1;35", "36"
BRIGHT_GREEN = "92"
_STYLES = {"special": MAGENTA, "bytes": YELLOW, "unknown": RED}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the text is written on."""

    width: int
    """Columns."""
    colour: bool
    """Whether escape sequences are understood and wanted."""

    @classmethod
    def of_stdout(cls) -> "Paper":
        """Return the width of the terminal (100 without one) and whether to use colour (`NO_COLOR` forbids it)."""
        terminal = sys.stdout.isatty()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        columns = shutil.get_terminal_size((100, 24)).columns if terminal else 100
        return cls(width=max(60, min(columns, 140)), colour=terminal and not plain)

    def paint(self, text: str, style: str) -> str:
        """Return text in a style (parameters of an SGR sequence), or as it is without colour."""
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour and style and text else text


def write_summary(view: BatchView, title: Sequence[str], troubles: Sequence[str], paper: Paper) -> list[str]:
    """Return the lines above the rows: title, numbers, warnings."""
    lines = [paper.paint(title[0], BOLD), *title[1:], ""]
    facts = summary(view)
    width = max(len(what) for what, _ in facts)
    lines += [f"  {what:<{width}}  {value}" for what, value in facts]
    lines.append("")
    if worst := largest_losses(view, WORST):
        lines += ["largest losses:", *(f"  {loss_line(view, *place)}"[: paper.width] for place in worst), ""]
    lines += [paper.paint(f"warning: {trouble}", RED) for trouble in troubles]
    return lines if troubles else [*lines, paper.paint("no warnings", GREEN)]


def write_rows(view: BatchView, rows: Sequence[Row], full: bool, paper: Paper) -> list[str]:
    """Return the lines of rows.

    Args:
        view: the batch.
        rows: those of its rows to show.
        full: whether to show every document and token.
        paper: where it is written.
    """
    lines = ["", paper.paint(f"{LOSS_MARKS[view.conversations]}  {MARKS}", DIM)]
    for row in rows:
        lines += _RowWriter(row, view, full, paper).write()
    if left := len(view.rows) - len(rows):
        lines += ["", f"{left:,} of the {len(view.rows):,} rows are not shown (--rows 0-{len(view.rows) - 1}, or all)"]
    return lines


class _RowWriter:
    """Writes one row."""

    def __init__(self, row: Row, view: BatchView, full: bool, paper: Paper) -> None:
        self.row, self.view, self.full, self.paper = row, view, full, paper
        self.tokens = row.shown(view.vocabulary)
        self.targets = row.targets(view.depths)

    def write(self) -> list[str]:
        """Return the lines of the row."""
        documents = self.row.documents
        shown = documents if self.full else documents[:SHOWN_DOCUMENTS]
        title = f"row {self.row.number}"
        first, *rest = textwrap.wrap(f"{title}  {heading(self.row)}", self.paper.width, subsequent_indent="  ")
        lines = ["", self.paper.paint(title, BOLD) + first.removeprefix(title), *rest]
        for number, document in enumerate(shown):
            lines += ["", "  " + self.paper.paint(caption(document, number), BLUE)]
            lines += [] if document.padding else self._text(document)
            lines += [] if document.padding or not (self.full or document.weight is None) else self._table(document)
        if left := documents[len(shown) :]:
            positions = sum(document.length for document in left)
            lines += ["", f"  and {len(left)} more with {positions:,} positions (--full true shows all)"]
        return lines

    def _text(self, document: Document) -> list[str]:
        """Return the text of a document, middles left out unless all is asked for: its own, or those of its turns."""
        if self.full:
            return self._flow(range(document.start, document.end))
        lines, shown = list[str](), document.start
        for start, end, tail in self._middles(document):
            gap = f"... {end - start:,} tokens{' without loss' if tail == CONTEXT_TOKENS else ''} ..."
            lines += [*self._flow(range(shown, start)), "  " + self.paper.paint(gap, DIM)]
            shown = end
        return lines + self._flow(range(shown, document.end))

    def _middles(self, document: Document) -> Iterator[tuple[int, int, int]]:
        """Yield what is left out as (start, end, tokens shown behind it).

        Of a text that is its middle; of a conversation the middles of stretches of equal loss, of those that are only
        read more.
        """
        edges = [document.start, document.end]
        if document.weight is not None:
            part = self.row.supervised[document.start : document.end].int()
            edges[1:1] = (document.start + 1 + torch.nonzero(part.diff()).flatten()).tolist()
        for start, end in pairwise(edges):
            only_read = document.weight is not None and not self.row.supervised[start]
            head, tail = (CONTEXT_TOKENS, CONTEXT_TOKENS) if only_read else (HEAD_TOKENS, TAIL_TOKENS)
            if end - start > head + tail:
                yield start + head, end - tail, tail

    def _flow(self, positions: range) -> list[str]:
        """Return the running text of tokens, wrapped, with its own line breaks."""
        pieces: list[tuple[str, str]] = []
        masked = False
        supervised = self.row.supervised.tolist()
        plain = (GREEN, BRIGHT_GREEN) if self.view.conversations else ("", CYAN)
        for position in positions:
            token, now_masked = self.tokens[position], not supervised[position]
            if now_masked != masked:
                pieces.append(("⟦" if now_masked else "⟧", DIM))
            text = token.text.replace("\t", "   ")
            style = DIM if now_masked else _STYLES.get(token.kind, plain[position % 2])
            pieces.append((f"«{text}»" if token.kind == "special" else text, style))
            masked = now_masked
        return _wrap([*pieces, ("⟧" if masked else "", DIM)], self.paper)

    def _table(self, document: Document) -> list[str]:
        """Return a line per position with id, text and the target of each loss part."""
        names = ["label", *(f"MTP {depth}" for depth in range(1, self.view.depths + 1))]
        width = max(12, min(24, (self.paper.width - 40) // len(names)))
        head = f"    {'position':>8} {'id':>7}  {'token':<16} loss" + "".join(f" {name:<{width}}" for name in names)
        lines = [self.paper.paint(head.rstrip(), DIM)]
        positions = range(document.start, document.end)
        if self.full or document.length <= 2 * TABLE_ENDS:
            return lines + [self._line(position, width) for position in positions]
        lines += [self._line(position, width) for position in positions[:TABLE_ENDS]]
        lines.append(self.paper.paint(f"    {'...':>8}", DIM))
        return lines + [self._line(position, width) for position in positions[-TABLE_ENDS:]]

    def _line(self, position: int, width: int) -> str:
        token, has_loss = self.tokens[position], self.targets[0][position] != IGNORED_LABEL
        index, cell = int(self.row.tokens[position]), _fit(_quote(token), 16)
        line = f"    {position:>8} {index:>7}  {cell} {'yes' if has_loss else 'no':<4}"
        line += "".join(f" {_fit(_target(part[position], self.view), width)}" for part in self.targets)
        return self.paper.paint(line.rstrip(), "" if has_loss else DIM)


def _wrap(pieces: Iterable[tuple[str, str]], paper: Paper) -> list[str]:
    """Return styled pieces of text as lines of at most the paper's width, indented."""
    lines, line, used = [], "", 0
    for text, style in pieces:
        part = ""
        for character in text:
            size = cells(character)
            if character == "\n" or used + size > paper.width - 4:
                lines.append(line + paper.paint(part, style))
                line, part, used = "", "", 0
            if character != "\n":
                part, used = part + character, used + size
        line += paper.paint(part, style)
    return ["    " + text for text in ([*lines, line] if line else lines)]


def _target(label: int, view: BatchView) -> str:
    return "-" if label == IGNORED_LABEL else f"{label} {_quote(view.vocabulary.show([label])[0])}"


def _quote(token: Token) -> str:
    if token.kind == "special":
        return f"«{token.line}»"
    return f"'{token.line}'" if token.kind == "text" else token.line


def _fit(text: str, width: int) -> str:
    """Return text cut or filled up to a number of columns."""
    if sum(map(cells, text)) > width:
        while sum(map(cells, text)) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - sum(map(cells, text)))


def cells(character: str) -> int:
    """Return the columns that a character takes on a terminal."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
