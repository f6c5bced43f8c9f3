"""The index of a checkpoint cannot run code."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from modules.checkpoints.training_source import SafeReader
from modules.errors import UserError


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_of_torch_is_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=SafeReader(tmp_path), no_dist=True)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_an_index_that_brings_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"is damaged or no index.*refers to .*mkdir"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps({"a": 1})[:-1]])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="is damaged or no index"):
        SafeReader(tmp_path).read_metadata()
