"""Fixtures for tests that start the program."""

from pathlib import Path

import pytest

from tests.app.helpers import RUN_FILE
from tests.app.models import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE + "\n", encoding="utf-8")
    return file
