"""Environments by name."""

from pathlib import Path

import pytest
import yaml

from app.evaluation.environments import find_environments
from modules.errors import UserError

ONE, OTHER = {"class_path": "a.One", "init_args": {"x": 1}}, {"class_path": "a.Other"}
RUN = {"data": {"init_args": {"environments": {"one": ONE, "other": OTHER}}}, "environments": {"every_n_steps": 5}}


def test_names_are_those_of_the_run_of_a_family_or_of_a_file(tmp_path: Path):
    file, run = tmp_path / "mine.yaml", tmp_path / "run.yml"
    file.write_text(yaml.safe_dump({"environments": {"third": ONE}}))
    run.write_text(yaml.safe_dump(RUN))
    assert find_environments("one", RUN) == {"one": ONE}
    assert find_environments("o*, ", RUN) == {"one": ONE, "other": OTHER}
    assert find_environments(f"{file},other", RUN) == {"third": ONE, "other": OTHER}
    assert find_environments(str(run), {}) == {"one": ONE, "other": OTHER}
    (name, family), *_ = find_environments("reasoning_gym/chain_sum", {}).items()
    assert name == "reasoning_gym/chain_sum"
    assert family["init_args"] == {"family": "chain_sum"}
    assert list(find_environments("reasoning_gym/*_sum", {})) == [
        "reasoning_gym/chain_sum",
        "reasoning_gym/decimal_chain_sum",
    ]


@pytest.mark.parametrize(
    ("names", "run", "message"),
    [
        ("two", RUN, "there is no two; the MODEL's run has one, other"),
        ("two", {}, "there is no two; the MODEL's run names none"),
        (" , ", RUN, "name at least one"),
        ("reasoning_gym/q*q", RUN, "name at least one"),
        ("none.yaml", RUN, r"none\.yaml: there is no such file"),
    ],
)
def test_a_name_of_nothing_is_told(names: str, run: dict, message: str):
    with pytest.raises(UserError, match=message):
        find_environments(names, run)


def test_a_file_without_environments_is_told(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"environments": {"every_n_steps": 5}}))
    with pytest.raises(UserError, match="has no environments"):
        find_environments(str(file), RUN)
