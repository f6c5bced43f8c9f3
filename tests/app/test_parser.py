"""Values of the command line that reach keys deep inside a run file."""

import pytest

from app.cli import RunCLI
from modules.errors import UserError
from tests.app.helpers import ROOT


class Parsed(RunCLI):
    """Parses, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Leave the configuration as it is."""


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.init_args.precision.recipe", "precision.recipe"),
        ("model.optimizer.gradient_clip_norm", "optimizer.gradient_clip_norm"),
        ("model.init_args.spike_guard", "spike_guard"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_null_is_null_however_deep_the_key_lies(key: str, path: str, joined: bool) -> None:
    file = ROOT / "configs" / "pretrain_nvfp4.yaml"
    given = [f"--{key}=null"] if joined else [f"--{key}", "null"]
    plain, changed = (Parsed(["--config", str(file), *extra]).config.model.init_args for extra in ([], given))
    assert plain[path] is not None
    assert changed[path] is None


def test_a_wrong_value_deep_in_a_run_file_is_answered_with_the_right_ones() -> None:
    file = ROOT / "configs" / "pretrain_nvfp4.yaml"
    with pytest.raises(UserError, match=r"precision\.recipe: expected one of super, bf16, fp32 or null, got foo$"):
        Parsed(["--config", str(file), "--model.init_args.precision.recipe", "foo"])


def test_a_key_before_the_run_file_that_it_belongs_to_is_known() -> None:
    file = ROOT / "configs" / "pretrain_nvfp4.yaml"
    with pytest.raises(UserError, match=r"^data\.init_args\.micro_batch_size: give it after --config$"):
        Parsed(["--data.micro_batch_size", "4", "--config", str(file)])
