"""Preparation of conversations, against an encoding of each by itself."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from litdata import StreamingDataset

from datamodules.conversations.masks import encode
from datamodules.conversations.messages import read_conversation
from datamodules.conversations.source import ConversationOptions, ConversationPolicies
from datamodules.conversations.template import TEMPLATE_FILE, ChatTemplate
from datamodules.text import shards
from datamodules.text.corpus import Corpus
from datamodules.text.policies import Document, Tally
from datamodules.text.preparation import check_options, describe, prepare_corpus
from datamodules.text.rows import ConversationRow
from datamodules.tokenizer import Tokenizer
from modules.errors import UserError
from tests.datamodules.conftest import of_conversations, write_jsonl
from tests.datamodules.text.test_preparation import tree

Stored = tuple[tuple[int, ...], tuple[bool, ...], float]


def stored(folder: Path, splits: tuple[str, ...] = ("train", "validation")) -> Counter[Stored]:
    """The conversations in all rows: tokens, mask, weight."""
    found: Counter[Stored] = Counter()
    for split in splits:
        reader = Corpus(str(folder)).rows(split)
        for number in range(len(reader)):
            row = reader.read(number)
            assert isinstance(row, ConversationRow)
            start = 0
            for length, weight in zip(row.lengths.tolist(), row.weights.tolist(), strict=True):
                part = slice(start, start + length)
                found[tuple(row.tokens[part].tolist()), tuple(map(bool, row.mask[part])), weight] += 1
                start += length
            assert not row.mask[start:].any()
            assert set(row.tokens[start:].tolist()) <= {0}
    return found


def encoded(rows: list[dict[str, Any]], tokenizer: Path, mask: Any = "generated") -> Counter[Stored]:
    """What is to be stored of conversations, each encoded by itself."""
    template = ChatTemplate(Tokenizer.load(tokenizer))
    found: Counter[Stored] = Counter()
    for row in rows:
        conversation = read_conversation(row, "row")
        result = encode(conversation, template, mask)
        found[tuple(result.tokens.tolist()), tuple(result.mask.tolist()), conversation.weight] += 1
    return found


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(row): row for row in rows}.values())


def test_every_conversation_is_whole_in_one_row_with_its_mask_and_weight(
    conversations, conversations_folder, tokenizer_folder
):
    assert stored(conversations_folder) == encoded(distinct(conversations), tokenizer_folder)
    held_out = stored(conversations_folder, ("validation",))
    assert 3 < held_out.total() < 40
    assert not held_out & stored(conversations_folder, ("train",))


def test_the_summary_counts_what_is_stored(conversations_folder):
    corpus = json.loads((conversations_folder / "corpus.json").read_text())
    found = stored(conversations_folder)
    assert corpus["kind"] == "conversations"
    assert corpus["documents"] == found.total()
    assert corpus["tokens"] == sum(len(tokens) * n for (tokens, _, _), n in found.items())
    supervised = sum(sum(mask) * n for (_, mask, _), n in found.items())
    assert corpus["train"]["supervised"] + corpus["validation"]["supervised"] == supervised
    assert corpus["train"]["packing_use"] > 0.8
    shown = describe(corpus)
    assert f"{supervised:,}   ({supervised / corpus['tokens']:.2%} of the tokens)" in shown
    assert "gzip" not in shown


def test_litdata_reads_the_rows(conversations_folder):
    dataset = StreamingDataset(str(conversations_folder / "train"), batch_decode=0)
    reader = Corpus(str(conversations_folder)).rows("train")
    assert len(dataset) == len(reader)
    for number in (0, len(reader) - 1):
        row = reader.read(number)
        assert isinstance(row, ConversationRow)
        for name, array in row._asdict().items():
            assert np.array_equal(np.asarray(dataset[number][name]), array), name


@pytest.mark.parametrize("options", [{"workers": 3}, {"shard_bytes": 1000}])
def test_workers_and_shards_decide_nothing_but_the_order(
    conversations_source, conversations_folder, tokenizer_folder, tmp_path, options
):
    prepare_corpus(of_conversations(conversations_source, tmp_path / "again", tokenizer_folder, **options))
    assert stored(tmp_path / "again") == stored(conversations_folder)
    if "workers" in options:
        assert tree(tmp_path / "again") == tree(conversations_folder)


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    conversations_source, conversations_folder, tokenizer_folder, tmp_path, monkeypatch
):
    preparation = of_conversations(conversations_source, tmp_path / "out", tokenizer_folder)
    write_file = shards.write_file

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "shard-000003.json":
            raise KeyboardInterrupt
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(preparation)
    assert len(list((tmp_path / "out" / ".preparation").glob("shard-*.json"))) == 3
    prepare_corpus(preparation)
    assert tree(tmp_path / "out") == tree(conversations_folder)


def test_the_template_goes_with_the_tokenizer(conversations_folder, tokenizer_folder, tmp_path, conversations_source):
    source = (conversations_folder / "tokenizer" / TEMPLATE_FILE).read_text()
    assert source == ChatTemplate(Tokenizer.load(tokenizer_folder)).source
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
                     "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    preparation = of_conversations(conversations_source, tmp_path / "out", tokenizer_folder, template=str(other))
    prepare_corpus(preparation)
    assert (tmp_path / "out" / "tokenizer" / TEMPLATE_FILE).read_text() == other.read_text()
    assert stored(tmp_path / "out") != stored(conversations_folder)
    other.write_text(other.read_text() + "{# changed #}")
    with pytest.raises(UserError, match=r"^template: .* was prepared with "):
        prepare_corpus(preparation)
    missing = of_conversations(conversations_source, tmp_path / "new", tokenizer_folder, template=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"^template: .*/no cannot be read .*; give a Jinja file$"):
        prepare_corpus(missing)


def test_the_mask_of_the_template_is_stored_as_it_stands(
    conversations, conversations_source, conversations_folder, tokenizer_folder, tmp_path
):
    prepare_corpus(of_conversations(conversations_source, tmp_path / "out", tokenizer_folder, mask="template"))
    found = stored(tmp_path / "out")
    assert found == encoded(distinct(conversations), tokenizer_folder, "template")
    assert found != stored(conversations_folder)


def test_tables_and_datasets_hold_the_same_conversations(
    conversations, conversations_folder, tokenizer_folder, tmp_path
):
    table = pa.Table.from_pylist(
        [{"id": n, "weight": row.get("weight"), **row} for n, row in enumerate(distinct(conversations))]
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=40)
    Dataset(table).save_to_disk(str(tmp_path / "dataset"))
    for name in ("rows.parquet", "dataset"):
        output = tmp_path / f"corpus-{name}"
        prepare_corpus(of_conversations(tmp_path / name, output, tokenizer_folder))
        assert stored(output) == stored(conversations_folder)


def test_the_three_forms_are_the_same_conversation(tokenizer_folder, tmp_path):
    pairs = [(f"question {n}", f"answer {n}") for n in range(12)]
    forms = [
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs],
        [{"prompt": q, "completion": a} for q, a in pairs],
        [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs],
    ]
    found = []
    for number, rows in enumerate(forms):
        source = write_jsonl(tmp_path / f"{number}.jsonl", rows)
        prepare_corpus(of_conversations(source, tmp_path / str(number), tokenizer_folder))
        found.append(stored(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]
    assert found[0].total() == 12


MALFORMED: dict[str, Any] = {
    "not JSON": '{"messages": [',
    "not a JSON object": "[1]",
    "unknown role": {"messages": [{"role": "alien", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "missing content": {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
    "call without result": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
    "two system turns": {
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "system", "content": "b"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
    "no conversation": {"text": "plain"},
    "nested too deeply": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
    f'"tools": [{{"name": "f", "x": {"[" * 900}{"]" * 900}}}]}}',
    "broken text": '{"messages": [{"role": "user", "content": "\\\\ud800"}, {"role": "assistant", "content": "b"}]}'
    .replace("\\\\", "\\"),
}  # fmt: skip


def test_no_depth_of_nesting_is_a_crash(tokenizer_folder):
    policies, tally = ConversationPolicies(conversation=ConversationOptions(on_error="skip")), Tally()
    tokenizer = Tokenizer.load(tokenizer_folder)
    for depth in range(250, 600, 2):
        nested = json.loads("[" * depth + "]" * depth)
        row = {"messages": [{"role": "assistant", "content": "b"}], "tools": [{"name": "f", "x": nested}]}
        if (text := policies.text_of(row, "f:1", 1, tally)) is not None:
            list(policies.tokenize([Document(name="f:1", text=text, ends=True)], tokenizer, 9999, 0, tally))
    assert list(tally.skipped) == ["nested too deeply"]


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_conversation_stops_with_its_line(conversations, tokenizer_folder, tmp_path, kind, workers):
    rows = [*conversations[:20], MALFORMED[kind], *conversations[20:40]]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as found:
        prepare_corpus(of_conversations(source, tmp_path / "out", tokenizer_folder, workers=workers))
    assert str(found.value).startswith(f"{source}:21: ")
    assert str(found.value).endswith("; mend it, or set on_error to skip")
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_malformed_conversations_can_be_skipped_and_are_counted_by_kind(
    conversations, tokenizer_folder, tmp_path, conversations_folder
):
    rows: list[Any] = list(conversations)
    for number, row in enumerate(MALFORMED.values()):
        rows[10 * number : 10 * number] = [row] * (number + 1)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    corpus, _ = prepare_corpus(of_conversations(source, tmp_path / "out", tokenizer_folder, on_error="skip"))
    assert stored(tmp_path / "out") == stored(conversations_folder)
    skipped = {kind: entry["count"] for kind, entry in corpus["skipped"].items()}
    assert skipped.pop("duplicate", 0) == len(conversations) - len(distinct(conversations))
    assert skipped == {kind: number + 1 for number, kind in enumerate(MALFORMED)}
    assert corpus["skipped"]["not JSON"]["examples"] == [f"{source}:1"]
    assert "skipped                   3   unknown role" in describe(corpus)
    assert f"unknown role ({len(json.dumps(MALFORMED['unknown role'])) * 3 + 3} bytes): {source}:21, " in describe(
        corpus
    )


def test_bad_bytes_are_a_malformed_line(conversations, tokenizer_folder, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", conversations[:20])
    lines = source.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b"What", b"\xff\xfe")
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"rows.jsonl:5: byte \d+ is not UTF-8; mend it, or set on_error to skip$"):
        prepare_corpus(of_conversations(source, tmp_path / "out", tokenizer_folder))
    corpus, _ = prepare_corpus(of_conversations(source, tmp_path / "skip", tokenizer_folder, on_error="skip"))
    assert sum(entry["count"] for entry in corpus["skipped"].values()) == 1


def test_names_of_special_tokens_in_a_message_are_text_unless_asked_for(tokenizer_folder, tmp_path):
    rows = [{"prompt": f"say <|im_end|> {n}", "completion": f"<|im_start|> {n}"} for n in range(8)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = []
    for number, option in enumerate((False, True)):
        output = tmp_path / str(number)
        prepare_corpus(of_conversations(source, output, tokenizer_folder, special_tokens_in_content=option))
        counts.append({tokens.count(11) for tokens, _, _ in stored(output)})
    assert counts == [{3}, {4}]


def test_a_corpus_is_of_one_kind_and_of_its_options(
    conversations_source, conversations_folder, tokenizer_folder, tmp_path
):
    output = tmp_path / "out"
    shutil.copytree(conversations_folder, output)
    preparation = of_conversations(conversations_source, output, tokenizer_folder)
    check_options(preparation)
    assert prepare_corpus(preparation)[1]
    for key, value in {"mask": "template", "over_long": "cut", "sequence_length": 128}.items():
        changed = of_conversations(conversations_source, output, tokenizer_folder, **{key: value})
        for check in (check_options, prepare_corpus):
            with pytest.raises(UserError, match=f"^{key}: .* was prepared with .*, not {value}; "):
                check(changed)


def test_what_holds_no_conversation_is_told(tokenizer_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("plain text")
    with pytest.raises(UserError, match=r"^paths: no document in .*notes.txt \(1 no conversations: neither JSONL nor"):
        prepare_corpus(of_conversations(tmp_path / "notes.txt", tmp_path / "out", tokenizer_folder))
    empty = write_jsonl(tmp_path / "user.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 3)
    with pytest.raises(UserError, match=r"^paths: no document in .*user.jsonl \(3 no assistant turn\)"):
        prepare_corpus(of_conversations(empty, tmp_path / "out", tokenizer_folder, on_error="skip"))


def thinking(count: int) -> list[dict[str, Any]]:
    thought = "one two three four five six seven eight nine ten"
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer {n}", "reasoning_content": f"{thought} {n}"},
            ]
        }
        for n in range(count)
    ]


def test_reasoning_modes_are_drawn_by_share_and_counted(tokenizer_folder, tmp_path):
    rows = thinking(400)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    shares = {"thinking_off": 0.2, "low_effort": 0.1, "truncated_thoughts": 0.3}
    corpus, _ = prepare_corpus(of_conversations(source, tmp_path / "out", tokenizer_folder, **shares))
    counts = {kind: entry["count"] for kind, entry in corpus["changed"].items()}
    drawn = [
        counts.pop(kind)
        for kind in ("shown with thinking off", "shown with low effort", "thoughts ended at a random budget")
    ]
    assert not counts
    assert [abs(count - share * 400) < 35 for count, share in zip(drawn, shares.values(), strict=True)] == [True] * 3
    found = stored(tmp_path / "out")
    assert found.total() == 400
    assert (found & encoded(rows, tokenizer_folder)).total() == 400 - sum(drawn)
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = [tokenizer.decode(tokens) for tokens, _, _ in found]
    assert sum("<think></think>" in text for text in texts) == drawn[0]
    assert sum("{reasoning effort: low}" in text for text in texts) == drawn[1]
    assert sum("thinking token budget" in text for text in texts) == drawn[2]
    # other shards, processes and neighbours draw the same
    some = write_jsonl(tmp_path / "some.jsonl", rows[::-2])
    prepare_corpus(of_conversations(some, tmp_path / "some", tokenizer_folder, workers=2, shard_bytes=900, **shares))
    assert (stored(tmp_path / "some") & found).total() == 200
    prepare_corpus(of_conversations(source, tmp_path / "seed", tokenizer_folder, seed=1, **shares))
    assert stored(tmp_path / "seed") != found


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("drop", None), ("turn", "longer than a row, ended after a turn"), ("cut", "longer than a row, cut")],
)
def test_conversations_longer_than_a_row(tokenizer_folder, tmp_path, policy, kind):
    turns = [
        {"role": role, "content": f"{role} says {number}"} for number in range(12) for role in ("user", "assistant")
    ]
    rows = [{"messages": turns[: 2 * size]} for size in range(1, 13)]
    rows.append({"messages": [{"role": "user", "content": "never ends " * 150}, turns[1]]})
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"sequence_length": 300, "over_long": policy, "validation_fraction": 0}
    corpus, _ = prepare_corpus(of_conversations(source, tmp_path / "out", tokenizer_folder, **options))
    wholes = list(encoded(rows, tokenizer_folder))
    short = [whole for whole in wholes if len(whole[0]) <= 300]
    assert 2 < len(short) < 12
    found = stored(tmp_path / "out")
    left = found - Counter(short)
    if kind is None:
        assert not left
        assert corpus["skipped"]["longer than a row"]["count"] == 13 - len(short)
        return
    assert corpus["changed"][kind]["count"] == left.total() == 12 - len(short)
    assert corpus["skipped"]["longer than a row"]["count"] == 1  # nothing to learn fits
    for tokens, mask, _ in left:
        whole = next(whole for whole in wholes if whole[0][: len(tokens)] == tokens)
        assert whole[1][: len(mask)] == mask
        assert len(tokens) == 300 if policy == "cut" else (mask[-1] and not whole[1][len(mask)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_off": 1.5}, r"^thinking_off: 1.5 is no share, give 0 to 1$"),
        ({"low_effort": -0.1}, r"^low_effort: -0.1 is no share"),
        ({"low_effort": 0.6, "truncated_thoughts": 0.6}, r"^thinking_off: .* are more than 1"),
    ],
)
def test_shares_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        ConversationOptions(**options)
