"""The view of a batch as text: coloured on a terminal, with marks that need no colour elsewhere."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

from app.inspection.tokens import Token
from app.inspection.view import BatchView, Document, Row, caption, heading, summary
from modules.batch import IGNORED_LABEL

MARKS = "«» special token, ⟦⟧ no loss, ⟨⟩ bytes of a character or hidden characters, ↵ line break, ⇥ tabulator"
SHOWN_DOCUMENTS = 3
"""Documents of a row that are shown unless all are asked for."""
HEAD_TOKENS, TAIL_TOKENS = 80, 40
"""Tokens at the beginning and end of a document's text that are shown unless all are asked for."""
TABLE_ENDS = 2
"""First and last tokens of a document whose targets are listed unless all are asked for."""

BOLD, DIM, RED, GREEN, YELLOW, MAGENTA, CYAN = "1", "2", "31", "32", "33", "1;35", "36"
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
    lines = ["", paper.paint(MARKS, DIM)]
    for row in rows:
        lines += ["", paper.paint(f"row {row.number}", BOLD) + f"  {heading(row)}"]
        tokens, targets = row.shown(view.vocabulary), row.targets(view.depths)
        shown = row.documents if full else row.documents[:SHOWN_DOCUMENTS]
        for number, document in enumerate(shown):
            lines += _document(document, number, row, view, tokens, targets, full, paper)
        if left := len(row.documents) - len(shown):
            lines += ["", f"  {left} more (--full true)"]
    if left := len(view.rows) - len(rows):
        lines += ["", f"{left:,} of the {len(view.rows):,} rows are not shown (--rows 0-{len(view.rows) - 1}, or all)"]
    return lines


def _document(
    document: Document,
    number: int,
    row: Row,
    view: BatchView,
    tokens: list[Token],
    targets: list[list[int]],
    full: bool,
    paper: Paper,
) -> list[str]:
    lines = ["", "  " + paper.paint(caption(document, number), CYAN)]
    if document.padding:
        return lines
    positions = range(document.start, document.end)
    head, tail = positions, positions[:0]
    if not full and document.length > HEAD_TOKENS + TAIL_TOKENS:
        head, tail = positions[:HEAD_TOKENS], positions[-TAIL_TOKENS:]
    lines += _text(head, tokens, targets[0], full, paper)
    if tail:
        lines += [
            "  " + paper.paint(f"... {document.length - len(head) - len(tail):,} tokens ...", DIM),
            *_text(tail, tokens, targets[0], full, paper),
        ]
    if full or document.length <= 2 * TABLE_ENDS:
        listed: list[int | None] = list(positions)
    else:
        listed = [*positions[:TABLE_ENDS], None, *positions[-TABLE_ENDS:]]
    return lines + _table(listed, row, view, tokens, targets, paper)


def _text(positions: range, tokens: list[Token], labels: list[int], breaks: bool, paper: Paper) -> list[str]:
    """Return the running text of tokens, wrapped; line breaks of the text break lines only if `breaks`."""
    pieces: list[tuple[str, str]] = []
    masked = False
    for position, alternate in zip(positions, cycle(("", CYAN))):
        token, now_masked = tokens[position], labels[position] == IGNORED_LABEL
        text = (
            (token.text.replace("\t", "   ") if breaks else token.line)
            if token.kind != "special"
            else f"«{token.text}»"
        )
        opening = "⟦" if now_masked and not masked else ""
        if masked and not now_masked:
            pieces.append(("⟧", DIM))
        style = DIM if now_masked else _STYLES.get(token.kind, alternate)
        pieces.append((opening + text, style))
        masked = now_masked
    if masked:
        pieces.append(("⟧", DIM))
    return _wrap(pieces, paper)


def _wrap(pieces: Iterable[tuple[str, str]], paper: Paper) -> list[str]:
    """Return styled pieces of text as lines of at most the paper's width, indented."""
    lines, line, used = [], "", 0
    room = paper.width - 4
    for text, style in pieces:
        part = ""
        for character in text:
            size = cells(character)
            if character == "\n" or used + size > room:
                lines.append(line + paper.paint(part, style))
                line, part, used = "", "", 0
            if character != "\n":
                part += character
                used += size
        line += paper.paint(part, style)
    return ["    " + text for text in [*lines, line]]


def _table(
    positions: list[int | None],
    row: Row,
    view: BatchView,
    tokens: list[Token],
    targets: list[list[int]],
    paper: Paper,
) -> list[str]:
    """Return a line per position: id, text and the target of each loss part; None leaves a gap."""
    names = ["label", *(f"MTP {depth}" for depth in range(1, view.depths + 1))]
    width = max(12, min(24, (paper.width - 40) // len(names)))
    lines = [paper.paint(f"    {'position':>8} {'id':>7}  {'token':<16} {'loss':<4}", DIM)]
    lines[0] += paper.paint("".join(f" {name:<{width}}" for name in names).rstrip(), DIM)
    for position in positions:
        if position is None:
            lines.append(paper.paint(f"    {'...':>8}", DIM))
            continue
        token, has_loss = tokens[position], targets[0][position] != IGNORED_LABEL
        cell = _fit(_quote(token), 16)
        line = f"    {position:>8} {int(row.tokens[position]):>7}  {cell} {'yes' if has_loss else 'no':<4}"
        line += "".join(f" {_fit(_target(part[position], view), width)}" for part in targets)
        lines.append(paper.paint(line.rstrip(), "" if has_loss else DIM))
    return lines


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
