"""The small corpus of the data tests."""

from tests.datamodules.conftest import corpus_folder, documents, sources

__all__ = ["corpus_folder", "documents", "sources"]
