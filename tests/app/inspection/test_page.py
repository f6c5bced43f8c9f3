"""The page, read back with html.parser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from app.inspection.page import write_page
from app.inspection.view import BatchView, build_view
from datamodules.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from tests.app.inspection.helpers import CHAT_START, EOS, NONE, asked, batch, ids, packed, talks, view_of

VOID = {"meta"}


class Page(HTMLParser):
    """Elements of a page: documents with their tokens, texts, the data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.documents: dict[str, list[tuple[str, str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.anchor = ""
        self.raw = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "div" and "doc" in (attributes.get("class") or "").split():
            self.anchor = attributes["id"] or ""
            self.documents[self.anchor] = []
        if tag == "i" and "pre" in self.open:
            self.documents[self.anchor].append((attributes.get("class") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        self.texts.setdefault(tag, []).append(data)
        if tag == "i" and "pre" in self.open:
            kind, text = self.documents[self.anchor][-1]
            self.documents[self.anchor][-1] = kind, text + data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])

    def column(self, row: int, name: str, depth: int = 0) -> list[str]:
        entry = self.data["rows"][str(row)]
        return (entry["ids"] if name == "ids" else entry["targets"][depth]).split(",")


def page_of(view: BatchView, folder: Path, troubles: list[str] | None = None) -> Page:
    file = folder / "deep" / "page.html"
    size = write_page(file, view, view.rows, ["Step 1", "more"], troubles or [])
    assert file.stat().st_size == size
    return Page(file.read_text(encoding="utf-8"))


def test_tokens_masks_and_borders(tmp_path: Path):
    page = page_of(view_of(*packed()), tmp_path)
    assert page.documents == {
        "r0d0": [("", "a"), ("", "b"), ("m s", "</s>")],
        "r0d1": [("", "c"), ("m s", "</s>")],
        "r0d2": [],
        "r1d0": [("", "a"), ("", "b"), ("", "c"), ("", "d"), ("", "e"), ("m", "f")],
    }
    starts = {a["id"]: a["data-start"] for tag, a in page.elements if tag == "div" and "data-start" in a}
    assert starts == {"r0d0": "0", "r0d1": "3", "r0d2": "5", "r1d0": "0"}
    assert page.texts["title"] == ["Step 1"]
    assert "padding: positions 5-5, 1 token" in page.texts["h3"]
    lengths = [a["style"] for tag, a in page.elements if tag == "a" and "style" in a]
    assert lengths == ["flex:3", "flex:2", "flex:1", "flex:6"]
    assert [a["class"] for tag, a in page.elements if tag == "a" and "style" in a] == ["c0", "c1", "pad", "c0"]


def test_what_a_model_is_taught_to_write(tmp_path: Path):
    page = page_of(view_of(talks(asked("why?", "so"), weights=[0.5])), tmp_path)
    assert [text for kind, text in page.documents["r0d0"] if "m" not in kind.split()] == ["s", "o", "<|im_end|>"]
    assert ("body", {"class": "conversations"}) in page.elements
    assert (
        "conversation 0: positions 0-11, 12 tokens, 3 with loss, weight 0.5, 100.00% of the step's loss"
        in (page.texts["h3"])
    )
    assert ("body", {"class": "documents"}) in page_of(view_of(*packed()), tmp_path).elements


LOSSES = [[0.5, 3.0, 0.0, 7.25, 0.0, 0.0], [20.0, float("nan"), 1.5, 0.0, 9.0, 0.0]]


def test_a_token_has_the_colour_of_its_loss(tmp_path: Path):
    """That is what the position before it lost: `</s>` of the first document came behind `b` at 3 nats, the median."""
    page = page_of(view_of(*packed(), losses=LOSSES), tmp_path)
    assert page.documents["r0d0"] == [("", "a"), ("", "b"), ("m s h0", "</s>")]
    assert page.documents["r0d1"] == [("", "c"), ("m s h0", "</s>")]
    assert page.documents["r1d0"] == [("", "a"), ("h5", "b"), ("h5", "c"), ("", "d"), ("", "e"), ("m h1", "f")]
    assert page.data["rows"]["1"]["losses"].split(",") == ["20.000", "nan", "1.500", "0.000", "9.000", "0.000"]
    assert "mean loss" in page.texts["th"]
    worst = [text for text in page.texts["code"] if " nats  row " in text]
    assert worst[:3] == [
        "   nan nats  row 1 position 1: 'c' after 'ab'",
        " 20.00 nats  row 1 position 0: 'b' after 'a'",
        "  9.00 nats  row 1 position 4: 'f' after 'abcde'",
    ]
    assert [a["data-at"] for tag, a in page.elements if tag == "a" and "data-at" in a][:3] == ["1", "0", "4"]


def test_a_page_without_losses_shows_none(tmp_path: Path):
    page = page_of(view_of(*packed()), tmp_path)
    assert "losses" not in page.data["rows"]["0"]
    assert not any(re.search(r"\bh\d", a.get("class") or "") for tag, a in page.elements if tag == "i")
    assert "mean loss" not in page.texts["th"]


def test_rows_are_linked_to_their_neighbours_and_the_index(tmp_path: Path):
    page = page_of(view_of(*packed(), *packed()), tmp_path)
    links = [a["href"] for tag, a in page.elements if tag == "a" and "style" not in a]
    index, rest = links[:4], links[4:]
    assert index == ["#r0", "#r1", "#r2", "#r3"]
    assert rest == ["#r1", "#index", "#r0", "#r2", "#index", "#r1", "#r3", "#index", "#r2", "#index"]
    assert {a["id"] for tag, a in page.elements if tag == "section"} == {"r0", "r1", "r2", "r3"}


def test_ids_and_targets(tmp_path: Path):
    page = page_of(view_of(*packed()), tmp_path)
    a, b, c = (str(index) for index in ids("abc"))
    assert page.column(0, "ids") == [a, b, "2", c, "2", "0"]
    assert page.column(0, "targets") == ["", "", "-", "", "-", "-"]
    assert page.column(0, "targets", 1) == ["", "-", "-", "-", "-", "-"]
    assert page.column(1, "targets", 1) == ["", "", "", "", "-", "-"]
    assert page.data["vocabulary"] == {a: "a", b: "b", c: "c", "2": "</s>", "0": "<unk>"} | {
        str(index): letter for index, letter in zip(ids("def"), "def", strict=True)
    }


def test_a_label_that_is_not_the_next_token_is_named(tmp_path: Path):
    first, second = packed()
    wrong = ids("z")[0]
    first.labels[0, 0] = wrong
    second.labels[0, 5] = wrong
    page = page_of(view_of(first, second), tmp_path)
    assert page.column(0, "targets")[0] == str(wrong)
    assert page.column(1, "targets")[5] == str(wrong)
    assert page.data["vocabulary"][str(wrong)] == "z"


def test_everything_from_a_corpus_is_escaped(tmp_path: Path):
    nasty = "</script><script>alert(1)</script>&amp;\"'<!--"
    tokens = [CHAT_START, *ids(nasty), EOS]
    view = view_of(batch([tokens], [[*tokens[1:], NONE]], [[0] * len(tokens)]))
    page = page_of(view, tmp_path, troubles=[nasty])
    assert "".join(text for kind, text in page.documents["r0d0"] if "s" not in kind.split()) == nasty
    assert nasty in page.texts["li"]
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert page.documents["r0d0"][0] == ("s", "<|im_start|>")


def test_a_token_that_ends_a_script_does_not_end_the_data(tmp_path: Path):
    tokenizer = Tokenizer.train([""], SMALLEST_VOCABULARY)
    tokenizer._inner.add_tokens(["</script>"])
    tokenizer = Tokenizer(tokenizer._inner, EOS, 0)
    index = tokenizer.vocab_size - 1
    one = batch([[index, EOS]], [[EOS, NONE]], [[0, 0]])
    page = page_of(build_view([one], tokenizer, tokenizer.vocab_size, [""], 0), tmp_path)
    assert page.data["vocabulary"][str(index)] == "</script>"
    assert page.documents["r0d0"][0] == ("", "</script>")


def test_line_breaks_and_bytes(tmp_path: Path):
    tokens = ids("a\n\té")
    view = view_of(batch([tokens], [[*tokens[1:], NONE]], [[0] * len(tokens)]))
    found = page_of(view, tmp_path).documents["r0d0"]
    assert found == [("", "a"), ("", "↵\n"), ("", "⇥\t"), ("b", "⟨C3⟩"), ("m b", "⟨A9⟩é")]


def test_the_page_needs_nothing_else(tmp_path: Path):
    page = page_of(view_of(*packed()), tmp_path)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    anchors = {attributes.get("id") for _, attributes in page.elements}
    assert {(a["href"] or "")[1:] for tag, a in page.elements if tag == "a"} <= anchors


def test_a_large_page_stays_small(tmp_path: Path):
    """About twenty bytes a token: a batch of 16 x 8192 tokens is under 3 MB."""
    rows, length = 2, 8192
    tokens = (ids("the quick brown fox\n") * length)[:length]
    labels = [*tokens[1:], NONE]
    view = view_of(batch([tokens] * rows, [labels] * rows, [[0] * length] * rows))
    file = tmp_path / "page.html"
    assert write_page(file, view, view.rows, ["large"], []) < 22 * rows * length


def test_the_same_view_gives_the_same_bytes(tmp_path: Path):
    for name in ("a.html", "b.html"):
        view = view_of(*packed())
        write_page(tmp_path / name, view, view.rows, ["Step 1"], [])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
