from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.inspection import saved
from modules.batch import ConversationBatch
from modules.errors import UserError
from tests.app.inspection.helpers import asked, packed, talks


def content() -> dict[str, Any]:
    micro_batches = [batch.tensors() for batch in packed()]
    return {
        "step": 7,
        "rank": 1,
        "reason": "loss 9.1 is 12 sigma above the mean",
        "loss": 9.125,
        "gradient_norm": float("inf"),
        "micro_batches": micro_batches,
    }


def test_what_was_saved_is_read(tmp_path: Path):
    file = tmp_path / "batch.pt"
    torch.save(content(), file)
    found = saved.load(file)
    assert (found.step, found.rank, found.loss, found.gradient_norm) == (7, 1, 9.125, float("inf"))
    assert found.reason == "loss 9.1 is 12 sigma above the mean"
    for read, given in zip(found.micro_batches, packed(), strict=True):
        assert read.tensors().keys() == given.tensors().keys()
        assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in given.tensors().items())


def test_a_file_of_before_with_the_counts_of_its_window_is_read(tmp_path: Path):
    batches = [batch.tensors() | {"counts": torch.tensor([8, 5])} for batch in packed()]
    torch.save(content() | {"micro_batches": batches}, tmp_path / "batch.pt")
    assert torch.equal(saved.load(tmp_path / "batch.pt").micro_batches[1].tokens, packed()[1].tokens)


def test_the_losses_of_the_tokens_are_read(tmp_path: Path):
    batches = [batch.tensors() | {"token_losses": torch.rand(batch.tokens.shape)} for batch in packed()]
    torch.save(content() | {"micro_batches": batches}, tmp_path / "batch.pt")
    losses = saved.load(tmp_path / "batch.pt").token_losses
    assert losses is not None
    assert all(torch.equal(read, given["token_losses"]) for read, given in zip(losses, batches, strict=True))
    torch.save(content(), tmp_path / "batch.pt")
    assert saved.load(tmp_path / "batch.pt").token_losses is None


def test_weights_of_conversations_are_read(tmp_path: Path):
    given = talks(asked("why?", "so"), asked("q", "a"), weights=[2, 0.5])
    torch.save(content() | {"micro_batches": [given.tensors()]}, tmp_path / "batch.pt")
    (read,) = saved.load(tmp_path / "batch.pt").micro_batches
    assert isinstance(read, ConversationBatch)
    assert torch.equal(read.loss_weights, given.loss_weights)


def change(**fields: object) -> Callable[[], Any]:
    return lambda: content() | fields


def change_batch(**fields: object) -> Callable[[], Any]:
    return lambda: content() | {"micro_batches": [packed()[0].tensors() | fields, packed()[1].tensors()]}


def without(name: str) -> Callable[[], Any]:
    return lambda: {key: value for key, value in content().items() if key != name}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without("step"), "it has no 'step'"),
        (without("micro_batches"), "it has no 'micro_batches'"),
        (change(micro_batches=[{}]), "it has no 'tokens'"),
        (change(micro_batches=[]), "different sizes, or there is none"),
        (change(micro_batches=7), "not iterable"),
        (change(step="x"), "invalid literal"),
        (change_batch(tokens=torch.zeros(1, 6)), "tokens holds no integers"),
        (change_batch(labels=None), "labels holds no integers"),
        (change_batch(labels=torch.zeros(1, 5, dtype=torch.int64)), "not [rows, positions] alike"),
        (
            change_batch(**dict.fromkeys(("tokens", "labels", "document_ids"), torch.zeros(1, 5, dtype=torch.int64))),
            "different sizes",
        ),
        (lambda: [1, 2], "list indices"),
    ],
)
def test_something_else_costs_one_line(make: Callable[[], Any], reason: str, tmp_path: Path):
    file = tmp_path / "batch.pt"
    torch.save(make(), file)
    with pytest.raises(UserError) as error:
        saved.load(file)
    assert str(error.value).startswith(f"--batch: {file} is no batch that the spike guard saved, or is damaged (")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


UNREADABLE = (
    r"^--batch: .*batch\.pt is no batch that the spike guard saved, or is damaged "
    r"\(it is no complete file of torch\.save with tensors and plain values only\)$"
)


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_a_damaged_file_costs_one_line(keep: int, tmp_path: Path):
    file = tmp_path / "batch.pt"
    torch.save(content(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=UNREADABLE):
        saved.load(file)


def test_a_file_of_another_kind_costs_one_line_without_the_words_of_torch(tmp_path: Path):
    file = tmp_path / "batch.pt"
    file.write_text("# some text\n" * 100)
    with pytest.raises(UserError, match=UNREADABLE):
        saved.load(file)


class Bomb:
    """Calls something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_nothing_in_the_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "batch.pt"
    torch.save(content() | {"reason": Bomb()}, file)
    with pytest.raises(UserError, match=UNREADABLE):
        saved.load(file)
    assert "executed" not in capsys.readouterr().out
