"""Files of problems, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from datamodules.environments.jsonl import Jsonl
from modules.errors import UserError


def write(folder: Path, *rows: object) -> str:
    file = folder / "p.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


def test_prompts_and_messages_are_read_and_judged(tmp_path: Path):
    talk = [{"role": "system", "content": "Count."}, {"role": "user", "content": "a\u2028b"}]
    rows = {"prompt": "1 + 1?", "reference": 2}, "", {"messages": talk, "reference": "3", "more": 1}
    environment = Jsonl(write(tmp_path, *rows), "number")
    one, other = environment.problems
    assert [message["content"] for message in other.messages] == ["Count.", "a\u2028b"]
    assert one.answer == "2"
    assert [environment.judge(one, reply).reward for reply in ("2.0", "so\nAnswer: 2", "3", "")] == [1, 1, 0, 0]
    assert environment.problem(0, 3) == other


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "p.jsonl:2: no JSON"),
        ("[1]", "p.jsonl:2: needs `reference`"),
        ({"prompt": "a"}, "p.jsonl:2: needs `reference`"),
        ({"prompt": "a", "reference": " "}, "p.jsonl:2: needs `reference`"),
        ({"prompt": "a", "reference": True}, "p.jsonl:2: needs `reference`"),
        ({"reference": "a"}, "p.jsonl:2: needs either `prompt`"),
        ({"prompt": "a", "messages": [], "reference": "a"}, "p.jsonl:2: needs either `prompt`"),
        ({"messages": [{"role": "user"}], "reference": "a"}, "p.jsonl:2: turn 1 .user. has no content"),
        (
            {"messages": [{"role": "alien", "content": "a"}], "reference": "a"},
            "p.jsonl:2: turn 1 has the unknown role .alien",
        ),
        ("[" * 100_000, "p.jsonl:2: no JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, message: str):
    with pytest.raises(UserError, match=message):
        _ = Jsonl(write(tmp_path, {"prompt": "a", "reference": "b"}, row)).problems


@pytest.mark.parametrize("reference", ["five", "NaN", "1 2"])
def test_a_reference_that_no_answer_can_meet_is_named(tmp_path: Path, reference: str):
    environment = Jsonl(write(tmp_path, {"prompt": "a", "reference": reference}), "number")
    with pytest.raises(UserError, match=f"p.jsonl has the reference '{reference}'"):
        environment.problem(0, 0)


def test_wrong_settings_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="checker: fuzzy is none of exact, number, words, math"):
        Jsonl("p.jsonl", "fuzzy")
    with pytest.raises(UserError, match="held_out_share: 2 must be"):
        Jsonl("p.jsonl", held_out_share=2)
    with pytest.raises(UserError, match=r"path: .*cannot be read"):
        _ = Jsonl(str(tmp_path / "none.jsonl")).problems
    with pytest.raises(UserError, match="holds no problem"):
        _ = Jsonl(write(tmp_path, "")).problems
