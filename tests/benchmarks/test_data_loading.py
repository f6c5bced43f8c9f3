"""The measurement itself: both sides build the same batches, and its command prints the ratios."""

import sys
from pathlib import Path

import torch

from benchmarks.data_loading import collate, main
from datamodules.loader import build_batch
from datamodules.text.corpus import Corpus
from modules.batch import count_targets


def test_the_simple_way_builds_the_same_batch(corpus_folder: Path):
    reader = Corpus(str(corpus_folder)).rows("train")
    rows = [reader.read(n) for n in range(len(reader))]
    ours = build_batch(rows)
    theirs = collate([{"tokens": torch.tensor(tokens), "lengths": torch.tensor(n)} for tokens, n in rows], 2)
    counts = count_targets(ours.labels, ours.document_ids, 2)
    for mine, other in zip((ours.tokens, ours.labels, ours.document_ids, counts), theirs, strict=True):
        assert torch.equal(mine, other)


def test_the_command_prints_and_writes_the_ratios(corpus_folder: Path, tmp_path, monkeypatch, capsys):
    options = ["--path", str(corpus_folder), "--sequence_length", "64", "--rounds", "2", "--rows", "60", "--step", "1"]
    monkeypatch.setattr(sys, "argv", ["data_loading", *options, "--output", str(tmp_path / "table.txt")])
    main()
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == printed
    assert "56 rows of 64 tokens" in printed
    assert printed.splitlines()[-1].endswith("x by wall (aim: at least 50x, reached)")
