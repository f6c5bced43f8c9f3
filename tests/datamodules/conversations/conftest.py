"""Tokenizer folders with the chat templates that conversations are compared with."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer
from tests.datamodules.conftest import make_document

THEIRS = Path(sys.prefix) / "peers/trl/chat_templates"


@pytest.fixture(scope="session")
def our_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small tokenizer of ours, without a template."""
    folder = tmp_path_factory.mktemp("tokenizers") / "ours"
    generator = random.Random(3)
    texts = [make_document(generator) + "\n\nassistant\nuser\nsystem\n\n\n" for _ in range(50)]
    Tokenizer.train(texts, 500).save(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(our_tokenizer: Path) -> Callable[[str | None], Path]:
    """Return the tokenizer's folder with one of trl's templates, by its name; None: without a template."""

    def folder_of(name: str | None) -> Path:
        if name is None:
            return our_tokenizer
        if not THEIRS.is_dir():
            pytest.skip("trl is not installed")
        folder = our_tokenizer.parent / name
        if not folder.exists():
            shutil.copytree(our_tokenizer, folder)
            shutil.copy(THEIRS / f"{name}.jinja", folder / "chat_template.jinja")
        return folder

    return folder_of


@pytest.fixture(scope="session")
def template_of(folder_of: Callable[[str | None], Path]) -> Callable[..., ChatTemplate]:
    """Return a chat template of one of trl's names, or ours."""
    made: dict[tuple[str | None, bool], ChatTemplate] = {}

    def template_of(name: str | None = None, special_tokens_in_content: bool = False) -> ChatTemplate:
        key = (name, special_tokens_in_content)
        if key not in made:
            made[key] = ChatTemplate(Tokenizer.load(folder_of(name)), special_tokens_in_content)
        return made[key]

    return template_of
