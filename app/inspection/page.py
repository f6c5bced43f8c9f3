"""The view of a batch as one HTML file that needs nothing else: no network, no other file.

A batch of 131,072 tokens must not choke a browser or a mail box, so a token is one short element with its text; ids and
targets stand once per row as lists of numbers that the page's script looks up by the token's place, and rows outside
the window are not laid out. All that comes from a corpus is escaped, and the page's policy forbids every connection.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from app.inspection.tokens import Token
from app.inspection.view import BatchView, Document, Row, caption, heading, summary
from datamodules.text.files import write_file
from modules.batch import IGNORED_LABEL

TEMPLATE = Path(__file__).with_name("page.html")
HUES = 6
"""Colours of documents, classes c0 to c5 of the template."""
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
    parts = [_head(view, rows, title, troubles)]
    parts += [_section(row, view) for row in rows]
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    content = template.substitute(title=_escape(title[0]), body="\n".join(parts), data=_data(view, rows)).encode()
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
    if len(rows) < len(view.rows):
        lines.append(f"<p>{len(rows):,} of the {len(view.rows):,} rows are on this page (option --rows).</p>")
    return "\n".join(lines)


def _section(row: Row, view: BatchView) -> str:
    """Return a row: its heading, a bar of its documents by length, the documents."""
    tokens = row.shown(view.vocabulary)
    bar, blocks = [], []
    for number, document in enumerate(row.documents):
        kind, anchor, text = _kind(document, number), f"r{row.number}d{number}", _escape(caption(document, number))
        bar.append(f'<a class="{kind}" href="#{anchor}" title="{text}" style="flex:{document.length}"></a>')
        content = "" if document.padding else f"<pre>{_tokens(document, row, tokens)}</pre>"
        blocks.append(
            f'<div class="doc {kind}" id="{anchor}" data-start="{document.start}" data-name="{number}">'
            f"<h3>{text}</h3>{content}</div>"
        )
    return "\n".join(
        [
            f'<section data-row="{row.number}">',
            f"<h2>Row {row.number}</h2><p>{_escape(heading(row))}</p>",
            f'<div class="bar">{"".join(bar)}</div>',
            *blocks,
            "</section>",
        ]
    )


def _tokens(document: Document, row: Row, tokens: list[Token]) -> str:
    """Return an element per token; attributes only where it is no common text with loss."""
    labels = row.labels[document.start : document.end].tolist()
    elements = []
    for token, label in zip(tokens[document.start : document.end], labels, strict=True):
        classes = ("m " if label == IGNORED_LABEL else "") + _CLASSES[token.kind]
        attribute = f' class="{classes.strip()}"' if classes.strip() else ""
        elements.append(f"<i{attribute}>{_escape(token.text)}</i>")
    return "".join(elements)


def _kind(document: Document, number: int) -> str:
    return "pad" if document.padding else f"c{number % HUES}"


def _data(view: BatchView, rows: Sequence[Row]) -> str:
    """Return the page's numbers as JSON: the texts of the labels, and of each row ids and targets.

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
