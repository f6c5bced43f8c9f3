"""The commands as a user starts them: what environments ask, and what a model makes of it."""

import json
from pathlib import Path

import pytest
import yaml

QUESTIONS = [{"prompt": f"What is {n} + 1?", "reference": 5 if n < 6 else n + 1} for n in range(10)]


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    path = "datamodules.environments.jsonl.Jsonl"
    arguments = {"path": str(problems), "checker": "number", "held_out_share": 1}
    file = tmp_path / "quiz.yaml"
    file.write_text(yaml.safe_dump({"environments": {"quiz": {"class_path": path, "init_args": arguments}}}))
    return file


def test_environments_are_shown_and_tested(program, quiz: Path):
    result = program.run("environments", f"{quiz},reasoning_gym/boxnet", "--problems", "4")
    assert result.code == 1
    assert "quiz: passed, 2 problems\n  for example 'What is" in result.output
    assert "reasoning_gym/boxnet: cannot be used: family: boxnet is broken in reasoning-gym" in result.output
    assert "1 of 2 environments passed" in result.output
    assert program.run("environments", quiz).code == 0


def test_an_untrained_model_is_worth_less_than_the_most_frequent_answer(program, models, quiz: Path, tmp_path: Path):
    output, details = tmp_path / "o.json", tmp_path / "d.jsonl"
    asked = ["--environments", quiz, "--samples", "3", "--max_new_tokens", "4", "--output", output]
    result = program.run("evaluate", models["first"], *asked, "--details", details)
    assert result.code == 0, result.output
    report = json.loads(output.read_text())
    found = report["results"]["quiz"]
    assert found["most_frequent"]["value"] == pytest.approx(0.6)
    assert found["most_frequent_answer"] == "5"
    assert (found["problems"], found["samples"], found["failures"]) == (10, 30, 0)
    assert found["accuracy"]["value"] == found["pass@1"]["value"] == 0
    assert {"pass@1", "pass@2", "pass@3"} <= found.keys()
    assert (report["config"]["temperature"], report["config"]["max_new_tokens"]) == (1.0, 4)
    assert "60.0% ± 16.3% ('5')" in result.output
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert len(rows) == 30
    assert {row["messages"][0]["content"] for row in rows} == {row["prompt"] for row in QUESTIONS}
    assert len({row["reply"] for row in rows if row["problem"] == 0}) > 1
    again = program.run("evaluate", models["first"], *asked, "--details", tmp_path / "again.jsonl")
    assert again.code == 0
    assert (tmp_path / "again.jsonl").read_bytes() == details.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--tasks: give either tasks of lm-evaluation-harness, or --environments"),
        (["--tasks", "a", "--environments", "b"], "--tasks: give either"),
        (["--environments", "b", "--limit", "3"], "--limit: is for --tasks; leave it out"),
        (["--tasks", "a", "--problems", "3"], "--problems: is for --environments; leave it out"),
        (["--environments", "b"], "there is no b; the MODEL's run names none"),
        (["--environments", "b", "--samples", "0"], "--samples: 0 must be at least 1"),
        (
            ["--environments", "reasoning_gym/lcm", "--samples", "2", "--temperature", "0"],
            "--samples: at temperature 0 all samples are the same",
        ),
        (["--environments", "reasoning_gym/lcd"], "environments.reasoning_gym/lcd: family: reasoning-gym has no lcd"),
    ],
)
def test_a_mistake_is_named(program, models, options: list[str], message: str):
    result = program.run("evaluate", models["first"], *options)
    assert (result.code, message in result.output) == (2, True), result.output
