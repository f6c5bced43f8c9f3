"""A small synthetic corpus: many documents of very different lengths, in many chunks."""

import random
from pathlib import Path

import pytest

from datamodules.text.preparation import Preparation, prepare_corpus

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
