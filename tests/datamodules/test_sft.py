import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.environments.draws import is_held_out
from datamodules.environments.pool import Pool
from datamodules.pretraining import PretrainingData
from datamodules.sft import UNKNOWN, ConversationOptions, ConversationSource, SFTData
from datamodules.text.corpus import Corpus
from datamodules.text.preparation import prepare_corpus
from datamodules.tokenizer import Tokenizer
from modules.batch import ChatTokens, ConversationBatch
from modules.errors import UserError
from tests.datamodules.conftest import of_conversations, write_jsonl
from tests.datamodules.conversations.test_source import stored

ADDITION = {"class_path": "tests.datamodules.addition.Addition"}


def make_data(**options: Any) -> SFTData:
    defaults = {"sequence_length": 256, "global_batch_size": 4, "micro_batch_size": 2, "total_tokens": 10 * 4 * 256}
    return SFTData(**(defaults | options))


def prepared(folder: Path) -> ConversationSource:
    return ConversationSource(path=str(folder))


def test_windows_are_of_conversations(conversations_folder):
    data = make_data(sources={"a": prepared(conversations_folder)})
    data.setup("fit")
    assert data.total.steps == 10
    windows = list(data.windows(0))
    assert [window.step for window in windows] == list(range(1, 11))
    for window in windows:
        assert len(window.micro_batches) == data.micro_batches == 2
        for batch in window.micro_batches:
            assert isinstance(batch, ConversationBatch)
            assert torch.equal(batch.labels >= 0, batch.loss_weights > 0)
    assert data.tokenizer_folder == conversations_folder / "tokenizer"
    held_out = list(data.val_dataloader())
    assert all(isinstance(batch, ConversationBatch) for batch in held_out)
    targets = sum(int((batch.labels >= 0).sum()) for batch in held_out)
    assert targets == Corpus(str(conversations_folder)).metadata["validation"]["supervised"]


def test_it_knows_the_tokens_that_turns_are_made_of(conversations_folder):
    data = make_data(sources={"a": prepared(conversations_folder)})
    data.setup("fit")
    assert isinstance(data, ChatTokens)
    turns, reserved = data.chat_tokens(), data.reserved_tokens()
    assert turns["<|im_start|>"] == 10
    assert set(turns) >= {"<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"}
    assert set(turns.values()).isdisjoint(reserved)
    assert {0, 2}.isdisjoint(reserved), "padding and the end of a text have a role"
    assert {3, 18, 31} <= set(reserved)


def test_two_ranks_have_the_rows_of_one(conversations_folder):
    def rows(ranks: int) -> list[list[tuple[int, ...]]]:
        found: list[list[tuple[int, ...]]] = [[] for _ in range(10)]
        for rank in range(ranks):
            data = make_data(sources={"a": prepared(conversations_folder)}, micro_batch_size=1)
            data.setup("fit")
            data.rank, data.ranks = rank, ranks
            for window in data.windows(0):
                for batch in window.micro_batches:
                    found[window.step - 1].append((*batch.labels.flatten().tolist(), *batch.tokens.flatten().tolist()))
        return [sorted(step) for step in found]

    assert rows(2) == rows(1)


def test_an_epoch_has_every_row_once(conversations_folder, tmp_path, tokenizer_folder, conversations):
    other = tmp_path / "other"
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(70)])
    prepare_corpus(of_conversations(source, other, tokenizer_folder))
    sources = {"a": prepared(conversations_folder), "b": prepared(other)}
    data = make_data(sources=sources, total_tokens=None, epochs=1, global_batch_size=1, micro_batch_size=1)
    data.setup("fit")
    numbers = {name: len(Corpus(source.path).rows("train")) for name, source in sources.items()}
    assert data.total.steps == sum(numbers.values())
    assert data.phases[0].sources == numbers
    assert {name: use.rows for name, use in data.consumed(data.total.steps).items()} == numbers
    drawn = [(int(draw.source[0]), int(draw.row[0])) for draw in map(data.mixture.draw, range(data.total.steps))]
    assert len(set(drawn)) == len(drawn)


def test_a_resumed_run_sees_the_rest(conversations_folder):
    def ready() -> SFTData:
        data = make_data(sources={"a": prepared(conversations_folder)})
        data.setup("fit")
        return data

    whole, states = [], []
    first = ready()
    for window in first.train_dataloader():
        whole.append(window)
        states.append(json.loads(json.dumps(first.state_dict())))
    resumed = ready()
    resumed.load_state_dict(states[5])
    rest = list(resumed.train_dataloader())
    assert [window.step for window in rest] == [7, 8, 9, 10]
    for ours, theirs in zip(rest, whole[6:], strict=True):
        for batch, expected in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert all(torch.equal(value, expected.tensors()[name]) for name, value in batch.tensors().items())
    with pytest.raises(UserError, match=r"^data\.global_batch_size: a step of this run has 1024 tokens, not 2048"):
        make_data(sources={"a": prepared(conversations_folder)}, global_batch_size=8).load_state_dict(states[5])


def test_rows_of_the_other_kind_are_refused(conversations_folder, corpus_folder):
    text = make_data(sources={"a": prepared(corpus_folder)}, sequence_length=64)
    with pytest.raises(UserError, match=r"^data.sources: .* holds plain text, and SFTData trains on conversations; "):
        text.setup("fit")
    talk = PretrainingData(path=str(conversations_folder), sequence_length=256)
    with pytest.raises(UserError, match=r"^data.sources: .* holds conversations, and PretrainingData trains on plain"):
        talk.setup("fit")


def test_rows_of_two_templates_are_refused(conversations_source, conversations_folder, tokenizer_folder, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text((conversations_folder / "tokenizer" / "chat_template.jinja").read_text() + "{# mine #}")
    prepare_corpus(of_conversations(conversations_source, tmp_path / "b", tokenizer_folder, template=str(template)))
    data = make_data(sources={"a": prepared(conversations_folder), "b": prepared(tmp_path / "b")})
    with pytest.raises(
        UserError, match=r"^data.sources: .*/b and .* were rendered by different chat templates; prepare"
    ):
        data.setup("fit")


def recipes(folder: Path, conversations_source: Path) -> dict[str, ConversationSource]:
    return {
        "files": ConversationSource(path=str(folder / "files"), conversations=[str(conversations_source)]),
        "sums": ConversationSource(path=str(folder / "sums"), environment=ADDITION, count=80),
        "docs": ConversationSource(path=str(folder / "docs"), docstrings=True, count=50),
    }


def test_missing_sources_are_prepared_and_checked_from_then_on(
    conversations_source, conversations_folder, tokenizer_folder, tmp_path, capsys
):
    options = {"tokenizer": str(tokenizer_folder), "validation_fraction": 0.1, "total_tokens": None, "epochs": 2}
    sources = recipes(tmp_path, conversations_source)
    data = make_data(sources=sources, **options)
    assert data.total is UNKNOWN
    assert data.vocab_size == Tokenizer.load(tokenizer_folder).vocab_size
    data.prepare_data()
    shown = capsys.readouterr().out
    assert "overlap with 500 held-out problems: 0" in shown
    assert shown.count("fingerprint") == 3
    data.setup("fit")
    assert data.total.samples >= 2 * sum(len(Corpus(source.path).rows("train")) for source in sources.values())
    assert stored(tmp_path / "files") == stored(conversations_folder)
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    for row in rows:
        asked, said = row["messages"]
        first, second = asked["content"].removesuffix(" =").split(" + ")
        assert int(first) + int(second) == int(said["content"])
        assert not is_held_out(asked["content"])
    assert Corpus(str(tmp_path / "docs")).metadata["documents"] == 50

    make_data(sources=sources, **options).prepare_data()
    assert capsys.readouterr().out == ""
    changed = sources | {"sums": replace(sources["sums"], count=81)}
    with pytest.raises(UserError, match=r"^data.init_args.sources.sums: recipe: .* was prepared with .*80.*, not .*81"):
        make_data(sources=changed, **options).prepare_data()
    masked = options | {"policies": ConversationOptions(mask="template")}
    with pytest.raises(
        UserError, match=r"^data.init_args.sources.files: mask: .* prepared with generated, not template"
    ):
        make_data(sources=sources, **masked).prepare_data()


def test_held_out_problems_are_taken_out_of_files(tokenizer_folder, tmp_path, capsys):
    with Pool({"sums": ADDITION}) as pool:
        asked = [problem.messages for problem in pool.problems("sums", 0, range(20), held_out=True)]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "?"}]} for turns in asked]
    rows += [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(30)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source = ConversationSource(path=str(tmp_path / "out"), conversations=[str(tmp_path / "rows.jsonl")])
    data = make_data(sources={"a": source}, tokenizer=str(tokenizer_folder), environments={"sums": ADDITION})
    data.prepare_data()
    metadata = Corpus(str(tmp_path / "out")).metadata
    assert metadata["documents"] == 30
    assert metadata["skipped"]["asks a held-out problem"]["count"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, r"^data.total_tokens: give the length of the run by it or by data.epochs, one of both"),
        ({"total_tokens": None}, r"^data.total_tokens: give"),
        ({"total_tokens": None, "epochs": 0}, r"^data.epochs: 0 is not positive"),
        ({"sources": {}}, r"^data.sources: give at least one source"),
        (
            {"sources": {"a": ConversationSource(path="x", environment=ADDITION)}},
            r"^data.init_args.sources.a.count: an",
        ),
        ({"sources": {"a": ConversationSource(path="x", count=3)}}, r"^data.init_args.sources.a.count: 3 must"),
        (
            {"sources": {"a": ConversationSource(path="x", docstrings=True, conversations=["y"])}},
            r"^data.init_args.sources.a: give one of conversations, environment and docstrings",
        ),
        ({"sources": {"a": ConversationSource(path="x", weight=0)}}, r"^data.init_args.sources.a.weight: 0 is not"),
        (
            {"sources": {"a": ConversationSource(path="x", weight=1), "b": ConversationSource(path="y")}},
            r"^data.sources: give all of them a weight, or none: b has none",
        ),
    ],
)
def test_mistakes_name_the_key(options, message):
    with pytest.raises(UserError, match=message):
        make_data(**({"sources": {"a": ConversationSource(path="x")}} | options))


def test_a_missing_source_says_how_to_make_it(tmp_path, conversations_source):
    nothing = make_data(sources={"a": ConversationSource(path=str(tmp_path / "a"))})
    with pytest.raises(UserError, match=r"/a is no prepared corpus; make it with: python -m app prepare FILES"):
        nothing.prepare_data()
    without = make_data(sources=recipes(tmp_path, conversations_source))
    with pytest.raises(UserError, match=r"^data.init_args.tokenizer: .* is not there yet, and is prepared with"):
        without.prepare_data()
