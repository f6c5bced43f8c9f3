"""What counts as a user's mistake, and what as a defect."""

import errno

import pytest

from app.errors import mistake, shorten
from app.run_folder import RunFolder
from modules.errors import UserError, writing


def caught(function) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raiser(error: Exception):
    def function():
        raise error

    return function


def test_what_we_refuse_is_a_mistake():
    from callbacks.step import check_interval

    error = caught(lambda: check_interval(0, "console.every_n_steps"))
    assert mistake(error) == "console.every_n_steps is 0: it counts optimiser steps and must be at least 1"


def test_any_other_value_error_is_a_defect_even_of_our_own_code():
    from datamodules.text.mixture import integer_shares

    assert mistake(caught(lambda: int("x"))) is None
    assert mistake(caught(lambda: list(zip([1], [], strict=True)))) is None
    error = caught(lambda: integer_shares(["no number"]))
    assert isinstance(error, ValueError)
    assert mistake(error) is None


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), TypeError("x"), ConnectionResetError(104, "x")])
def test_other_errors_are_defects(error):
    assert mistake(caught(raiser(error))) is None


def test_files_and_disks_are_the_users():
    assert mistake(caught(lambda: open("/nowhere/x"))) == "/nowhere/x: No such file or directory"
    full = mistake(OSError(errno.ENOSPC, "No space left on device", "a/file"))
    assert full is not None
    assert full.startswith("a/file: No space left on device; make room")


def test_a_user_error_is_one_wherever_it_comes_from():
    assert mistake(caught(raiser(UserError("a: b\n  c")))) == "a: b c"


def worker(kind: str) -> str:
    return (
        f"Caught {kind.rpartition('.')[2]} in DataLoader worker process 1.\n"
        "Original Traceback (most recent call last):\n"
        f'  File "/somewhere/torch/worker.py", line 1, in f\n{kind}: chunk 3 is damaged'
    )


def test_errors_of_loader_workers_are_judged_like_those_of_the_main_process():
    assert mistake(caught(raiser(UserError(worker("modules.errors.UserError"))))) == "chunk 3 is damaged"
    assert mistake(caught(raiser(OSError(worker("FileNotFoundError"))))) == "chunk 3 is damaged"
    assert mistake(caught(raiser(ValueError(worker("ValueError"))))) is None
    assert mistake(caught(raiser(RuntimeError(worker("RuntimeError"))))) is None


def test_keys_of_model_and_data_are_named_in_full():
    known = "model.mtp_depths: 0 does not fit model.backbone.vocab_size; see data.init_args.seed, data.path"
    full = "model.init_args.mtp_depths: 0 does not fit model.init_args.backbone.vocab_size; see data.init_args.seed, "
    assert mistake(UserError(known)) == full + "data.init_args.path"
    files = "model.safetensors is damaged; model.class_path: x; /a/data.path; my.data.path"
    assert mistake(UserError(files)) == files


def test_long_messages_are_cut():
    assert len(shorten("word " * 1000)) <= 600


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", " a", "a\\b"])
def test_names_of_runs_are_folder_names(tmp_path, name):
    with pytest.raises(UserError, match="is no folder name"):
        RunFolder(tmp_path, name)


def test_a_full_disk_is_found_behind_what_a_library_makes_of_it():
    """torch's file format fails over its own bookkeeping; safetensors and tokenizers have no OSError."""

    def hidden():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    for function in (hidden, raiser(RuntimeError("I/O error: No space left on device (os error 28)"))):

        def named(function=function):
            with writing("a/file"):
                function()

        for failing, answer in ((named, "a/file: No space left"), (function, "No space left")):
            message = mistake(caught(failing))
            assert message is not None
            assert answer in message
            assert message.endswith(
                "; make room, then start the same command again: what was written before is complete"
            )


def test_what_is_no_error_of_the_system_passes_as_it_is():
    error = KeyError("x")
    with pytest.raises(KeyError), writing("a/file"):
        raise error
    with pytest.raises(PermissionError, match="a/file"), writing("a/file"):
        raise PermissionError(errno.EACCES, "Permission denied")
