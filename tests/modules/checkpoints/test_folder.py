"""A checkpoint folder is complete or not there, whatever happens while it is written."""

import errno
import json
from pathlib import Path

import pytest

from modules.checkpoints import folder
from modules.checkpoints.folder import new_folder
from modules.errors import UserError


def write(target: Path, **files: str) -> Path:
    partial = folder.begin(target)
    for name, text in files.items():
        (partial / name).write_text(text)
    folder.publish(target, {"step": 1})
    return target


def test_published_folder_holds_files_and_manifest(tmp_path):
    target = write(tmp_path / "step=00000001", a="one", b="two")
    assert (target / "a").read_text() == "one"
    assert folder.describe(target)["step"] == 1
    assert folder.damage(target) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step=00000001"]


def test_nothing_is_visible_before_the_end(tmp_path):
    folder.begin(tmp_path / "step=00000001")
    assert folder.checkpoints(tmp_path) == []


def test_a_second_save_replaces_the_first(tmp_path):
    target = write(tmp_path / "step=00000001", a="one", b="two")
    write(target, a="three")
    assert (target / "a").read_text() == "three"
    assert not (target / "b").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step=00000001"]


def test_an_interrupted_save_is_begun_anew(tmp_path):
    (folder.begin(tmp_path / "step=00000001") / "leftover").write_text("x")
    assert not (write(tmp_path / "step=00000001", a="one") / "leftover").exists()


def test_clean_deletes_what_was_interrupted_and_nothing_else(tmp_path):
    target = write(tmp_path / "step=00000001", a="one")
    folder.begin(tmp_path / "step=00000002")
    (tmp_path / "step=00000003.removed").mkdir()
    folder.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_newest_comes_first_and_other_names_are_ignored(tmp_path):
    for name in ("step=00000009", "step=00000010", "step=100000000", "step=5", "best"):
        (tmp_path / name).mkdir()
    assert [folder.step_of(path) for path in folder.checkpoints(tmp_path)] == [100000000, 10, 9]


@pytest.mark.parametrize(
    ("harm", "answer"),
    [
        (lambda target: (target / "a").unlink(), "a is missing"),
        (lambda target: (target / "a").write_text("o"), "a has 1 bytes instead of 3"),
        (lambda target: (target / "a").write_text("onf"), "a has changed"),
        (lambda target: (target / folder.MANIFEST).write_text("{"), "checkpoint.json cannot be read"),
        (lambda target: (target / folder.MANIFEST).unlink(), "checkpoint.json cannot be read"),
        (lambda target: (target / folder.MANIFEST).write_text(json.dumps({})), "checkpoint.json cannot be read"),
    ],
)
def test_damage_is_found(tmp_path, harm, answer):
    target = write(tmp_path / "step=00000001", a="one")
    harm(target)
    assert folder.damage(target) == answer


def test_a_name_without_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="not named like a checkpoint"):
        folder.step_of(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        folder.describe(tmp_path)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    with new_folder(tmp_path / "deep" / "model") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "model").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    assert (tmp_path / "deep" / "model" / "file").read_text() == "content"


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with new_folder(tmp_path / "model") as partial:
        (partial / "file").touch()
    assert (tmp_path / "model" / "file").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("bad"), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException):
    def fail() -> None:
        with new_folder(tmp_path / "model") as partial:
            (partial / "file").touch()
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "model")


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path, "holds files already"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=f" {message}"), new_folder(output):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def scored(parent: Path, step: int, loss: float, validated: bool = True) -> Path:
    target = folder.step_folder(parent, step)
    (folder.begin(target) / "a").write_text("x")
    folder.publish(target, {"step": step, "validated": validated, "metrics": {"validation/loss": loss}})
    return target


def test_the_best_are_those_with_the_lowest_metric_of_their_own_step(tmp_path):
    """One that was saved between two validations carries the metrics of another step; a damaged one counts no more."""
    found = [
        scored(tmp_path, step, loss, validated)
        for step, loss, validated in (
            (1, 3.0, True),
            (2, 1.0, False),
            (3, float("nan"), True),
            (4, 2.0, True),
            (5, 2.0, True),
            (6, 0.5, True),
        )
    ]
    (found[-1] / folder.MANIFEST).unlink()
    best = folder.best(found, "validation/loss")
    assert [folder.step_of(path) for path in best] == [5, 4, 1]
    assert folder.best(found, "validation/bits_per_byte") == []


def test_a_link_is_moved_in_one_step(tmp_path):
    for name in ("step=00000001", "step=00000002"):
        (tmp_path / name).mkdir()
        folder.link(tmp_path / folder.BEST, tmp_path / name)
        assert (tmp_path / folder.BEST).resolve() == tmp_path / name
    assert len(list(tmp_path.iterdir())) == 3
