"""Replies as they are shown, and what a template is told, without a model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.talk import ReplyWriter, read_tools, show_call, template_variables
from modules.errors import UserError

TEXT = "hm, </thin> 2\n</think>\nfour <think>again</think> and < that"
DIMMED = re.compile(r"\x1b\[2m(.*?)\x1b\[0m", re.DOTALL)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("colour", [False, True])
def test_thoughts_are_dimmed_however_they_come(size: int, colour: bool, capsys: pytest.CaptureFixture[str]) -> None:
    writer = ReplyWriter(True, colour)
    for start in range(0, len(TEXT), size):
        writer.write(TEXT[start : start + size])
    writer.finish("\n")
    printed = capsys.readouterr().out
    assert re.sub(r"\x1b\[\dm", "", printed) == f"<think>\n{TEXT}\n"
    dimmed = "".join(DIMMED.findall(printed))
    assert dimmed == ("<think>\nhm, </thin> 2\n</think><think>again</think>" if colour else "")


def test_text_comes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    writer = ReplyWriter(False, True)
    writer.write("four <")
    assert capsys.readouterr().out == "four "
    writer.write("b>")
    assert capsys.readouterr().out == "<b>"


def model(**environments: bool) -> Any:
    return SimpleNamespace(facts={"run": {"environments": environments or None}})


def test_what_a_template_is_told() -> None:
    assert template_variables(model(), None, False, None) == {}
    assert template_variables(model(), False, False, None) == {"enable_thinking": False}
    told = {"enable_thinking": True, "low_effort": True, "reasoning_budget": 0}
    assert template_variables(model(), True, True, 0) == told
    for name, arguments in (("low_effort", (False, True, None)), ("thinking_budget", (False, False, 3))):
        with pytest.raises(UserError, match=f"^--{name}: there are no thoughts with --thinking false"):
            template_variables(model(), *arguments)
    with pytest.raises(UserError, match=r"^--thinking_budget: -1 must not be negative"):
        template_variables(model(), None, False, -1)


def test_a_model_thinks_as_in_the_evaluations_of_its_run() -> None:
    assert template_variables(model(thinking=False), None, False, None) == {"enable_thinking": False}
    assert template_variables(model(thinking=False), True, False, None) == {"enable_thinking": True}
    assert template_variables(SimpleNamespace(facts={"architectures": []}), None, False, None) == {}


def test_tools_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"type": "function", "function": {"name": "f"}}, {"name": "g"}]')
    assert [tool.get("function", tool)["name"] for tool in read_tools(file)] == ["f", "g"]
    assert read_tools(None) == []
    for text, reason in (
        ("[{", "is not valid JSON"),
        ("{}", "is no list of tools like"),
        ('["f"]', "is no list of tools like"),
        ('[{"function": {"name": 3}}]', "is no list of tools like"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"^--tools: {re.escape(str(file))} {reason}"):
            read_tools(file)


def test_a_call_is_a_line() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris\n", "days": 3, "where": {"x": [1]}}}}
    assert show_call(call) == "weather(city='Paris\\n', days=3, where={'x': [1]})"
