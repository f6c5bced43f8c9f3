"""A small synthetic corpus: many documents of very different lengths, in many chunks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from datamodules.conversations.source import ConversationOptions, ConversationPolicies
from datamodules.text.preparation import Preparation, prepare_corpus
from datamodules.tokenizer import Tokenizer

WORDS = (
    "def return self value for in range len print if else None True αβγ naïve 日本 😀 0 17 204 x_1 </s> <think>".split()
)


def make_document(generator: random.Random) -> str:
    words = [generator.choice(WORDS) for _ in range(int(generator.lognormvariate(3.2, 1.3)) + 2)]
    return "".join(word + generator.choice([" ", " ", "\n", "\n    ", "\t"]) for word in words)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    generator = random.Random(7)
    return [make_document(generator) for _ in range(300)]


@pytest.fixture(scope="session")
def sources(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file a document, in subfolders."""
    folder = tmp_path_factory.mktemp("sources")
    for number, text in enumerate(documents):
        file = folder / f"part{number % 7}" / f"{number:04d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode())
    return folder


def small(sources: Path, output: Path, **options: object) -> Preparation:
    """Options that make many shards of the small corpus."""
    defaults = {
        "sequence_length": 64,
        "vocab_size": 400,
        "validation_fraction": 0.15,
        "shard_bytes": 4000,
        "workers": 1,
    }
    return Preparation(paths=[str(sources)], output=output, **(defaults | options))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def corpus_folder(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpora") / "small"
    prepare_corpus(small(sources, output))
    return output


def make_conversation(generator: random.Random) -> dict[str, Any]:
    """A row with one to three questions, sometimes a system turn, thoughts or a weight."""
    turns: list[dict[str, str]] = []
    if generator.random() < 0.3:
        turns.append({"role": "system", "content": "Be brief."})
    for _ in range(generator.randint(1, 3)):
        first, second = generator.randrange(1000), generator.randrange(1000)
        turns.append({"role": "user", "content": f"What is {first} + {second}? naïve 日本 </s>"})
        turns.append({"role": "assistant", "content": f"It is {first + second}."})
        if generator.random() < 0.4:
            turns[-1]["reasoning_content"] = f"I add {first} to {second}."
    return {"messages": turns} | ({"weight": 0.5} if generator.random() < 0.2 else {})


@pytest.fixture(scope="session")
def conversations() -> list[dict[str, Any]]:
    generator = random.Random(11)
    return [make_conversation(generator) for _ in range(150)]


@pytest.fixture(scope="session")
def tokenizer_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(documents, 400).save(folder)
    return folder


@pytest.fixture(scope="session")
def conversations_source(conversations: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several files."""
    folder = tmp_path_factory.mktemp("conversations")
    for number in range(10):
        write_jsonl(folder / f"{number}.jsonl", conversations[15 * number : 15 * number + 15])
    return folder


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """Write a line for each row; one that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def of_conversations(source: Path, output: Path, tokenizer: Path, **options: Any) -> Preparation:
    """Options that make many shards of few conversations; those of conversations are told from the others."""
    mine = {key: options.pop(key) for key in list(options) if key in ConversationOptions.__dataclass_fields__}
    defaults = {"sequence_length": 256, "validation_fraction": 0.1, "shard_bytes": 4000, "workers": 1}
    policies = ConversationPolicies(conversation=ConversationOptions(**mine))
    return Preparation(
        paths=[str(source)], output=output, tokenizer=tokenizer, policies=policies, **(defaults | options)
    )


@pytest.fixture(scope="session")
def conversations_folder(
    conversations_source: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("corpora") / "conversations"
    prepare_corpus(of_conversations(conversations_source, output, tokenizer_folder))
    return output
