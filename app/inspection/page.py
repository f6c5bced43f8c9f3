"""The view of a batch as one HTML file that needs nothing else: no network, no other file.

A batch of 131,072 tokens must not choke a browser or a mail box, so a token is one short element with its text; ids and
targets stand once per row as lists of numbers that the page's script looks up by the token's place, and rows outside
the window are not laid out. All that comes from a corpus is escaped, and the page's policy forbids every connection.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from app.inspection.tokens import Token
from app.inspection.view import BatchView, Document, Row, caption, heading, largest_losses, loss_line, summary
from datamodules.text.files import write_file
from modules.batch import IGNORED_LABEL

TEMPLATE = Path(__file__).with_name("page.html")
HUES = 6
"""Colours of documents, classes c0 to c5 of the template."""
HEAT = (0.5, 0.75, 0.9, 0.95, 0.98, 0.995)
"""Shares of a batch's losses above which a token has one of the colours h0 to h5 of the template: an untrained model
is wrong everywhere, what leapt is what stands out of the batch."""
WORST = 20
"""Largest losses that are listed, where they are known."""
_CLASSES = {"text": "", "special": "s", "bytes": "b", "unknown": "u"}


def write_page(file: Path, view: BatchView, rows: Sequence[Row], title: Sequence[str], troubles: Sequence[str]) -> int:
    """Write the page; the same view gives the same bytes.

    Args:
        file: where to.
        view: the batch.
        rows: those of its rows to show.
        title: what the batch is, and further lines about it.
        troubles: warnings.

    Returns:
        Bytes written.
    """
    steps = _heat_steps(view)
    parts = [_head(view, rows, title, troubles), _index(rows)]
    numbers = [None, *(row.number for row in rows), None]
    for row, before, after in zip(rows, numbers[:-2], numbers[2:], strict=True):
        parts.append(_section(row, view, steps, before, after))
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    texts = {"title": _escape(title[0]), "body": "\n".join(parts), "heat": _heat_legend(steps)}
    texts["kind"] = "conversations" if view.conversations else "documents"
    content = template.substitute(texts, data=_data(view, rows)).encode()
    write_file(file, content)
    return len(content)


def _head(view: BatchView, rows: Sequence[Row], title: Sequence[str], troubles: Sequence[str]) -> str:
    lines = [f"<h1>{_escape(title[0])}</h1>", *(f"<p>{_escape(line)}</p>" for line in title[1:])]
    cells = [f"<tr><th>{_escape(what)}</th><td>{_escape(value)}</td></tr>" for what, value in summary(view)]
    lines.append(f"<table>{''.join(cells)}</table>")
    if troubles:
        lines.append(f'<ul class="warnings">{"".join(f"<li>{_escape(line)}</li>" for line in troubles)}</ul>')
    else:
        lines.append('<p class="fine">no warnings</p>')
    if worst := largest_losses(view, WORST):
        shown = {row.number for row in rows}
        entries = "".join(f"<li>{_place(view, place, shown)}</li>" for place in worst)
        lines.append(f"<h2>Largest losses of the next token</h2><ol class=worst>{entries}</ol>")
    if len(rows) < len(view.rows):
        lines.append(f"<p>{len(rows):,} of the {len(view.rows):,} rows are on this page (option --rows).</p>")
    return "\n".join(lines)


def _place(view: BatchView, place: tuple[Row, int, float], shown: set[int]) -> str:
    """Return a large loss, as a link where its row is on the page."""
    row, position, _ = place
    text = f"<code>{_escape(loss_line(view, *place))}</code>"
    return f'<a href="#r{row.number}" data-at="{position}">{text}</a>' if row.number in shown else text


def _index(rows: Sequence[Row]) -> str:
    """Return the list of the rows, each with what is to be known before one looks at it."""
    lines = []
    for row in rows:
        losses = [loss for loss in row.own_losses() if loss is not None]
        mean = f"<td>{sum(losses) / len(losses):.2f}</td>" if losses else ""
        facts = (len(row.documents) - sum(d.padding for d in row.documents), sum(d.with_loss for d in row.documents))
        cells = "".join(f"<td>{fact:,}</td>" for fact in facts)
        link = f'<a href="#r{row.number}">row {row.number}</a>'
        lines.append(f"<tr><th>{link}</th><td>{_escape(row.origin)}</td>{cells}{mean}</tr>")
    known = "<th>mean loss</th>" if any(row.losses is not None for row in rows) else ""
    head = f"<tr><th></th><th>from</th><th>{rows[0].documents[0].noun}s</th><th>with loss</th>{known}</tr>"
    return f'<h2 id="index">Rows</h2><div class="wide"><table class="index">{head}{"".join(lines)}</table></div>'


def _section(row: Row, view: BatchView, steps: Sequence[float], before: int | None, after: int | None) -> str:
    """Return a row: its heading, links to the rows beside it, a bar of its documents by length, the documents."""
    tokens = row.shown(view.vocabulary)
    ways = [
        f'<a href="#r{number}">{text}</a>' if number is not None else f"<span>{text}</span>"
        for number, text in ((before, "← previous"), (after, "next →"))
    ]
    bar, blocks = [], []
    for number, document in enumerate(row.documents):
        kind, anchor, text = _kind(document, number), f"r{row.number}d{number}", _escape(caption(document, number))
        bar.append(f'<a class="{kind}" href="#{anchor}" title="{text}" style="flex:{document.length}"></a>')
        content = "" if document.padding else f"<pre>{_tokens(document, row, tokens, steps)}</pre>"
        blocks.append(
            f'<div class="doc {kind}" id="{anchor}" data-start="{document.start}" data-name="{number}">'
            f"<h3>{text}</h3>{content}</div>"
        )
    return "\n".join(
        [
            f'<section data-row="{row.number}" id="r{row.number}">',
            f'<nav><b>Row {row.number}</b>{ways[0]}{ways[1]}<a href="#index">all rows</a></nav>',
            f"<p>{_escape(heading(row))}</p>",
            f'<div class="bar">{"".join(bar)}</div>',
            *blocks,
            "</section>",
        ]
    )


def _tokens(document: Document, row: Row, tokens: list[Token], steps: Sequence[float]) -> str:
    """Return an element per token; attributes only where it is no common text with loss."""
    part = slice(document.start, document.end)
    supervised, losses = row.supervised[part].tolist(), row.own_losses()[part]
    elements = []
    for token, has_loss, loss in zip(tokens[part], supervised, losses, strict=True):
        marks = [
            "" if has_loss else "m",
            _CLASSES[token.kind],
            "" if loss is None else _heat(loss, steps),
        ]
        classes = " ".join(filter(None, marks))
        attribute = f' class="{classes}"' if classes else ""
        elements.append(f"<i{attribute}>{_escape(token.text)}</i>")
    return "".join(elements)


def _heat(loss: float, steps: Sequence[float]) -> str:
    """Return the class of a loss; what is not a number is the worst."""
    degree = len(steps) if math.isnan(loss) else sum(loss >= least for least in steps)
    return f"h{degree - 1}" if degree else ""


def _heat_steps(view: BatchView) -> list[float]:
    """Return the nats from which tokens have the colours; empty where no loss is known."""
    losses = [loss for row in view.rows for loss in row.own_losses() if loss is not None and math.isfinite(loss)]
    if not losses:
        return [math.inf] * len(HEAT) if any(row.losses is not None for row in view.rows) else []
    return np.quantile(losses, HEAT).tolist()


def _heat_legend(steps: Sequence[float]) -> str:
    """Return the line of the legend about losses, where they are known."""
    if not steps:
        return ""
    shown = "".join(f'<i class="h{degree}"> {least:.1f} </i>' for degree, least in enumerate(steps))
    return f"<p>{shown} the loss of a token itself, in nats, from; the steps hold half, a quarter, ... 0.5% of all</p>"


def _kind(document: Document, number: int) -> str:
    return "pad" if document.padding else f"c{number % HUES}"


def _data(view: BatchView, rows: Sequence[Row]) -> str:
    """Return the page's numbers as JSON: the texts of the labels, and of each row ids, targets and known losses.

    A target that is the token 1 + depth positions later is the empty text, none is `-`.
    """
    used: set[int] = set()
    entries = {}
    for row in rows:
        ids, targets = row.tokens.tolist(), row.targets(view.depths)
        used.update(ids, *targets)
        entries[row.number] = {
            "ids": ",".join(map(str, ids)),
            "targets": [_column(part, ids[depth + 1 :]) for depth, part in enumerate(targets)],
        }
        if row.losses is not None:
            entries[row.number]["losses"] = ",".join(f"{loss:.3f}" for loss in row.losses.tolist())
    used.discard(IGNORED_LABEL)
    vocabulary = {index: view.vocabulary.show([index])[0].line for index in sorted(used)}
    text = json.dumps({"vocabulary": vocabulary, "rows": entries}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # else a text like </script> would end the element


def _column(targets: list[int], following: list[int]) -> str:
    """Return the targets of a loss part as text; `following[t]` is the token that position t should predict."""
    expected = [*following, *[IGNORED_LABEL] * (len(targets) - len(following))]
    return ",".join(
        "-" if target == IGNORED_LABEL else "" if target == usual else str(target)
        for target, usual in zip(targets, expected, strict=True)
    )


def _escape(text: str) -> str:
    return html.escape(text)
