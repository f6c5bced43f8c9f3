"""The file of a skipped step holds the batches of that step and no other; few are kept."""

import math
import os
from pathlib import Path

import pytest
import torch

from callbacks.skipped_batches import SkippedBatches, skip_line
from modules.base import MicroBatchLoss
from modules.batch import IGNORED_LABEL, PackedBatch
from modules.errors import UserError
from modules.pretraining import Pretraining
from tests.modules.helpers import ListData, fit, make_module, row_batches


class NotFinite(Pretraining):
    """Loses its loss in the micro-batches of `bad`."""

    bad: frozenset[int] = frozenset()
    seen = 0

    def micro_batch_loss(self, batch: PackedBatch, totals) -> MicroBatchLoss:
        result = super().micro_batch_loss(batch, totals)
        self.seen += 1
        return result._replace(loss=result.loss * math.nan) if self.seen - 1 in self.bad else result


def run(folder: Path, bad: set[int], data: ListData, keep_last: int = 20, **trainer) -> None:
    module = make_module(cls=NotFinite, max_skipped_steps=100)
    module.bad = frozenset(bad)
    fit(module, data, callbacks=[SkippedBatches(keep_last)], default_root_dir=str(folder), **trainer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spikes").glob("*"))


@pytest.mark.parametrize("interval", [1, 3, 50])
def test_the_window_of_a_skipped_step_is_written_whole(tmp_path, capsys, interval) -> None:
    """Also where the logging interval lies behind the step, or behind the end of the run."""
    data = ListData(row_batches(8), window=2)
    run(tmp_path, {3}, data, log_every_n_steps=interval)  # in the second step
    assert names(tmp_path) == ["step=00000002.pt"]
    saved = torch.load(tmp_path / "spikes" / "step=00000002.pt", weights_only=True)
    assert list(saved) == ["step", "rank", "reason", "loss", "gradient_norm", "micro_batches"]
    assert (saved["step"], saved["rank"], saved["reason"]) == (2, 0, "not_finite")
    assert math.isnan(saved["loss"])
    assert isinstance(saved["gradient_norm"], float)
    assert len(saved["micro_batches"]) == 2
    for micro_batch, batch in zip(saved["micro_batches"], data.batches[2:4], strict=True):
        assert list(micro_batch) == ["tokens", "labels", "document_ids", "token_losses"]
        assert micro_batch["token_losses"].shape == batch.tokens.shape
        assert torch.equal(micro_batch["token_losses"] > 0, batch.labels != IGNORED_LABEL)
        for name, tensor in batch.tensors().items():
            assert torch.equal(micro_batch[name], tensor)
            assert micro_batch[name].dtype == tensor.dtype
    output = capsys.readouterr().out
    assert output.count(" skipped, ") == 1
    assert "step 2 skipped, not finite: loss nan, gradient norm nan\n" in output
    assert f"\n  its batch: {tmp_path}/spikes/step=00000002.pt\n" in output


def test_a_file_holds_no_more_than_its_batch(tmp_path) -> None:
    """A view would be saved with all that lies behind it."""
    rows = torch.zeros(1000, 16, dtype=torch.int64)
    batch = row_batches(1)[0]
    batch.tokens = rows[:1]
    run(tmp_path, {0}, ListData([batch]))
    assert (tmp_path / "spikes" / "step=00000001.pt").stat().st_size < 10_000


def test_nothing_skipped_leaves_no_folder(tmp_path, capsys) -> None:
    run(tmp_path, set(), ListData(row_batches(4)))
    assert not (tmp_path / "spikes").exists()
    assert " skipped, " not in capsys.readouterr().out


def test_the_newest_are_kept_by_when_they_were_written(tmp_path) -> None:
    """A run that went back to an earlier step must not delete what it writes now."""
    (tmp_path / "spikes").mkdir()
    for name in ("step=00000900.pt", "step=00000001-rank=1.pt", "notes.txt"):
        (tmp_path / "spikes" / name).write_bytes(b"old")
        os.utime(tmp_path / "spikes" / name, (1, 1))
    run(tmp_path, {0, 2, 4, 6}, ListData(row_batches(8)), keep_last=3, log_every_n_steps=4)
    assert names(tmp_path) == [
        "notes.txt",
        "step=00000001-rank=1.pt",
        "step=00000003.pt",
        "step=00000005.pt",
        "step=00000007.pt",
    ]


def test_batches_are_written_before_the_run_is_stopped(tmp_path) -> None:
    module = make_module(cls=NotFinite, max_skipped_steps=2)
    module.bad = frozenset({1, 2})
    with pytest.raises(UserError, match="in steps 2 to 3"):
        fit(module, ListData(row_batches(6)), callbacks=[SkippedBatches()], default_root_dir=str(tmp_path))
    assert names(tmp_path) == ["step=00000002.pt", "step=00000003.pt"]


def test_the_line_of_a_spike_says_how_far_out_it_lay() -> None:
    assert skip_line(7, "loss_spike", (9.125, 3.25), (8.71, -0.42)) == (
        "step 7 skipped, loss spike: loss 9.125 (+8.7 sigma), gradient norm 3.25 (-0.4 sigma)"
    )


def test_a_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*step=00000001\.pt'"):
        run(tmp_path, {0}, ListData(row_batches(2)))
    assert names(tmp_path) == []


def test_keeping_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"^skipped_batches\.keep_last is 0: "):
        SkippedBatches(keep_last=0)
