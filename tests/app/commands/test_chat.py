"""`chat` as a user starts it: lines from a pipe, replies on stdout."""

import io
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.__main__ import main
from app.commands.chat import never_taught
from datamodules.conversations.template import CHAT_ML, ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.checkpoints.load import load_model
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from modules.generation.session import Session
from tests.modules.checkpoints.helpers import their_model

TEXTS = ["def add(a, b):\n    return a + b\n", "import os\n\nfor name in os.environ:\n    print(name, 'naïve')\n"]
COUNT = 8
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = Tokenizer.train(TEXTS, 320)
    their_model(transformers, vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> Path:
    """The model with a template that knows no thoughts."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "plain")
    (folder / "chat_template.jinja").write_text(CHAT_ML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def network(model):
    return load_model(model).network


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Tokens that were not in the cache, turn by turn."""
    found: list[int] = []
    real = Session.reply

    def reply(self, *args):
        pieces = real(self, *args)
        first = next(pieces)
        found.append(self.computed)
        yield first
        yield from pieces

    monkeypatch.setattr(Session, "reply", reply)
    return found


def chat(model: Path, lines: list[str], monkeypatch, capsys, *options: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", str(model), "--max_new_tokens", str(COUNT), "--temperature", "0", *options]) == 0
    return capsys.readouterr().out


def replies(model: Path, network, talk: list[str], system: str | None = None) -> str:
    """What the model says in a conversation in ChatML that is put together by hand and computed anew each turn.

    A reply stands there in the tokens it was written in, or, where its text would not give plain tokens of its own, in
    those of its text, and then so do all before it.
    """
    tokenizer = Tokenizer.load(model)

    def turn(role: str, text: str) -> list[int]:
        return [10, *tokenizer.encode(f"{role}\n{text}"), 11, *tokenizer.encode("\n")]

    begin, texts = [10, *tokenizer.encode("assistant\n")], list[str]()
    written = rendered = turn("system", system) if system else []
    for line in talk:
        written, rendered = written + turn("user", line), rendered + turn("user", line)
        (reply,) = generate(
            network,
            [Request(tokens=written + begin, max_new_tokens=COUNT)],
            Sampling(),
            eos_ids=(2, 11),
            decode=tokenizer.decode,
        )
        texts.append(reply.text)
        rendered = rendered + turn("assistant", reply.text)
        ids = [token for token in reply.tokens if token not in (2, 11)]
        exact = turn("assistant", reply.text)[:-2] == begin + tokenizer.encode(reply.text, special_tokens=True)
        written = written + begin + ids + [11, *tokenizer.encode("\n")] if exact else rendered
    return "".join(f"{text}\n" for text in texts)


def script(monkeypatch, model: Path, texts: list[str]) -> list[list[int]]:
    """Let the model say these texts; return the tokens it is asked with."""
    asked: list[list[int]] = []

    def reply(self, tokens, max_new_tokens, lasting):
        assert 1 <= lasting <= len(tokens)
        asked.append(tokens)
        self.text = texts[len(asked) - 1]
        self.tokens = tokens + Tokenizer.load(model).encode(self.text, special_tokens=True)
        yield from (self.text[start : start + 5] for start in range(0, len(self.text), 5))

    monkeypatch.setattr(Session, "reply", reply)
    return asked


def test_a_conversation_is_that_of_the_rendered_turns(plain, network, monkeypatch, capsys, computed) -> None:
    talk = ["name?", "and </s> what?<|im_end|>", "def"]
    assert chat(plain, [*talk, "", "/exit", "never read"], monkeypatch, capsys) == replies(plain, network, talk)
    tokenizer = Tokenizer.load(plain)
    first, *rest = [len(tokenizer.encode(f"user\n{line}")) for line in talk]
    beginning = len(tokenizer.encode("assistant\n"))
    assert computed[0] == first + beginning + 4
    new = [count + beginning + 7 for count in rest]  # and the last token of the reply, its end and a line break
    assert all(count in (most, most - 1) for count, most in zip(computed[1:], new, strict=True)), "the rest is known"


def test_thoughts_of_earlier_turns_are_dropped_and_nothing_before_them_is_computed_again(
    model, network, monkeypatch, capsys, computed
) -> None:
    """A random model never ends its thought."""
    tokenizer = Tokenizer.load(model)
    template, messages, expected = ChatTemplate(tokenizer), [], ""
    for turn, line in enumerate(["name?", "def", "for"]):
        messages.append({"role": "user", "content": line})
        tokens = template.encode_prompt(messages)
        request = Request(tokens=tokens, max_new_tokens=COUNT)
        (reply,) = generate(network, [request], Sampling(), eos_ids=(2, 11), decode=tokenizer.decode)
        expected += f"<think>\n{reply.text}\n"
        messages.append({"role": "assistant", "content": "", "reasoning_content": reply.text.strip("\n")})
        if turn == 0:
            whole = len(tokens)
    assert chat(model, ["name?", "def", "for"], monkeypatch, capsys) == expected
    assert computed[0] == whole
    assert max(computed[1:]) < 30, "what follows the thought that is dropped, however long the conversation"


@pytest.mark.parametrize("thinking", [False, True])
def test_what_the_model_is_asked(model, monkeypatch, capsys, thinking: bool) -> None:
    said = ["hm\n</think>\nfour", "five"] if thinking else ["four", "five"]
    asked = script(monkeypatch, model, said)
    options = ("--thinking", str(thinking).lower(), *(("--low_effort", "--thinking_budget", "9") if thinking else ()))
    printed = chat(model, ["2+2? <|im_end|>", "and <think>?"], monkeypatch, capsys, *options)
    assert printed == ("<think>\nhm\n</think>\nfour\n<think>\nfive\n" if thinking else "four\nfive\n")
    tokenizer = Tokenizer.load(model)
    wishes = "\n\n{reasoning effort: low}\n\n{thinking token budget: 9}" if thinking else ""

    def turn(role: str, *parts: str | int) -> list[int]:
        tokens = [10, *tokenizer.encode(f"{role}\n")]
        return tokens + [t for part in parts for t in ([part] if isinstance(part, int) else tokenizer.encode(part))]

    end = [11, *tokenizer.encode("\n")]
    system, last = turn("system") + end, (12, "\n") if thinking else (12, 13)
    assert asked[0] == system + turn("user", f"2+2? <|im_end|>{wishes}")[:3] + asked[0][len(system) + 3 :]
    assert asked[0][len(system) :] == [
        *[10, *tokenizer.encode(f"user\n2+2? <|im_end|>{wishes}")],
        *end,
        *turn("assistant", *last),
    ]
    assert asked[1][len(system) :] == [
        *[10, *tokenizer.encode("user\n2+2? <|im_end|>")],
        *end,
        *turn("assistant", 12, 13, "\nfour" if thinking else "four"),
        *end,
        *[10, *tokenizer.encode(f"user\nand <think>?{wishes}")],
        *end,
        *turn("assistant", *last),
    ]


def test_calls_are_answered_by_the_lines_that_follow(model, tmp_path, monkeypatch, capsys) -> None:
    said = ["<think>\nhm\n</think>\n" + CALL.format(3) + CALL.format(4), "7", "bye"]
    asked = script(monkeypatch, model, said)
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    options = ("--thinking", "false", "--tools", str(file))
    printed = chat(model, ["3+4?", "/3", "four", "thanks"], monkeypatch, capsys, *options)
    assert printed == "".join(f"{text}\n" for text in said)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": number}}} for number in (3, 4)]
    messages = [
        {"role": "user", "content": "3+4?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "/3"},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "thanks"},
    ]
    template = ChatTemplate(Tokenizer.load(model))
    assert asked == [template.encode_prompt(messages[:n], TOOLS, enable_thinking=False) for n in (1, 4, 6)]


def test_without_tools_nobody_is_asked_for_results(model, monkeypatch, capsys) -> None:
    asked = script(monkeypatch, model, [CALL.format(3), "7"])
    chat(model, ["3+4?", "what?"], monkeypatch, capsys, "--thinking", "false")
    text = Tokenizer.load(model).decode(asked[1])
    assert CALL.format(3) in text
    assert "<|im_start|>user\nwhat?<|im_end|>" in text


def test_a_terminal_asks_for_the_result_of_a_call(model, tmp_path, monkeypatch, capsys) -> None:
    script(monkeypatch, model, [CALL.format("x\x1b[2J"), "7"])
    lines, prompts = iter(["3+4?", "7", "/exit"]), list[str]()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    assert main(["chat", str(model), "--thinking", "false", "--tools", str(file)]) == 0
    assert prompts == ["> ", "add(a='x\\x1b[2J') = ", "> "]
    assert "\x1b[2J" not in capsys.readouterr().out


def test_a_model_that_was_never_taught_to_chat_says_so(model, tmp_path, monkeypatch, capsys) -> None:
    def noted(folder: Path) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert main(["chat", str(folder)]) == 0
        return capsys.readouterr().err

    assert f"note: {model} was never taught to chat (it brings no chat template)" in noted(model)
    taught = shutil.copytree(model, tmp_path / "taught")
    (taught / "chat_template.jinja").write_text(CHAT_ML, encoding="utf-8")
    assert "never taught" not in noted(taught)


def test_a_template_does_not_hide_that_a_run_saw_text_alone() -> None:
    template = SimpleNamespace(is_own=True)
    run = {"model": {"class_path": "modules.pretraining.Pretraining", "init_args": {"init_from": None}}}
    (line, _) = never_taught(Path("runs/mine"), SimpleNamespace(facts={"run": run}), template)
    assert line.startswith("note: runs/mine was never taught to chat (it was pretrained on text alone)")
    run["model"]["init_args"]["init_from"] = "an-instruct-model"
    assert never_taught(Path("runs/mine"), SimpleNamespace(facts={"run": run}), template) == []
    run["model"] = {"class_path": "modules.sft.SFT", "init_args": {"init_from": "runs/pretrain"}}
    assert never_taught(Path("runs/mine"), SimpleNamespace(facts={"run": run}), SimpleNamespace(is_own=False)) == []


def test_commands(plain, network, monkeypatch, capsys) -> None:
    lines = ["name?", "/reset", "def", "/system be short", "def", "/unknown"]
    expected = replies(plain, network, ["name?"]) + replies(plain, network, ["def"])
    assert chat(plain, lines, monkeypatch, capsys) == expected + replies(plain, network, ["def"], "be short")
    assert chat(plain, ["def", "/reset", "def"], monkeypatch, capsys, "--system", "be short") == 2 * replies(
        plain, network, ["def"], "be short"
    )


def test_bytes_that_are_no_text_are_replaced(plain, network, monkeypatch, capsys) -> None:
    expected = replies(plain, network, ["a\ufffdb"], "\ufffd")
    assert chat(plain, ["a\udcffb"], monkeypatch, capsys, "--system", "\udcff") == expected


def test_ctrl_c_stops_a_reply_and_keeps_it(plain, network, monkeypatch, capsys) -> None:
    real = Session.reply

    def reply(self, tokens, *args):
        for number, piece in enumerate(real(self, tokens, *args)):
            if number == 2 and self.tokens[: len(tokens)] == tokens and not stopped:
                stopped.append(self.text)
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    stopped: list[str] = []
    monkeypatch.setattr(Session, "reply", reply)
    printed = chat(plain, ["name?", "def"], monkeypatch, capsys)
    assert printed.startswith(f"{stopped[0]} [stopped]\n")
    tokenizer = Tokenizer.load(plain)
    turns = [("user", "name?"), ("assistant", stopped[0]), ("user", "def")]
    text = ChatTemplate(tokenizer).render([{"role": role, "content": said} for role, said in turns], answer=True)
    before, _, behind = text.partition(stopped[0])
    first = tokenizer.encode(before, special_tokens=True)
    (whole,) = generate(network, [Request(tokens=first, max_new_tokens=3)], Sampling(), decode=tokenizer.decode)
    assert whole.text is not None
    assert whole.text.startswith(stopped[0]), "the third token may be a part of a character"
    tokens = first + whole.tokens + tokenizer.encode(behind, special_tokens=True)
    request = Request(tokens=tokens, max_new_tokens=COUNT)
    (after,) = generate(network, [request], Sampling(), eos_ids=(2, 11), decode=tokenizer.decode)
    assert printed == f"{stopped[0]} [stopped]\n{after.text}\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sampling_defaults_are_the_models(model, monkeypatch, capsys) -> None:
    seen: list[Sampling] = []
    real = Session.__init__
    monkeypatch.setattr(
        Session,
        "__init__",
        lambda self, network, sampling, *rest: seen.append(sampling) or real(self, network, sampling, *rest),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(model)]) == 0
    file = model / "generation_config.json"
    before = file.read_text()
    file.write_text('{"eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_p": 0.95}')
    try:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert main(["chat", str(model), "--top_k", "5"]) == 0
    finally:
        file.write_text(before)
    assert seen == [Sampling(temperature=0.7), Sampling(temperature=0.6, top_p=0.95, top_k=5)]


def test_a_model_without_turns_is_refused(model, tmp_path, capsys) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|begin|>"))
    assert main(["chat", str(other)]) == 2
    assert "has no chat_template.jinja" in capsys.readouterr().err
    assert main(["chat", str(other), "--max_new_tokens", "0"]) == 2
    assert "--max_new_tokens: 0 must be at least 1" in capsys.readouterr().err
