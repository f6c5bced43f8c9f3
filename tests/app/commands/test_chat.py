"""`chat` as a user starts it: lines from a pipe, replies on stdout."""

import io
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
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


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
    """The model with a template that renders what was said as it stands."""
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

    def reply(self, tokens, max_new_tokens):
        pieces = real(self, tokens, max_new_tokens)
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


def replies(
    model: Path, network, talk: list[str], system: str | None = None, *, exact: bool = True, **variables
) -> str:
    """What the model says in a conversation that is rendered and computed anew each turn.

    Its replies stand there in the tokens it wrote (`exact`), or as the tokenizer would write them.
    """
    tokenizer = Tokenizer.load(model)
    template, said = ChatTemplate(tokenizer), []
    messages = [{"role": "system", "content": system}] if system else []
    for line in talk:
        messages.append({"role": "user", "content": line})
        rest, tokens = template.render(messages, answer=True, **variables), []
        for text, ids in said if exact else []:
            before, _, rest = rest.partition(text)
            tokens += tokenizer.encode(before, special_tokens=True) + ids
        tokens += tokenizer.encode(rest, special_tokens=True)
        request = Request(tokens=tokens, max_new_tokens=COUNT)
        (reply,) = generate(network, [request], Sampling(), eos_ids=(2, 11), decode=tokenizer.decode)
        said.append((reply.text, [token for token in reply.tokens if token not in (2, 11)]))
        messages.append({"role": "assistant", "content": reply.text})
    return "".join(f"{text}\n" for text, _ in said)


def test_a_conversation_is_that_of_the_rendered_turns(plain, network, monkeypatch, capsys, computed) -> None:
    talk = ["name?", "and </s> what?", "def"]
    assert chat(plain, [*talk, "", "/exit", "never read"], monkeypatch, capsys) == replies(plain, network, talk)
    whole = len(ChatTemplate(Tokenizer.load(plain)).encode([{"role": "user", "content": talk[0]}], answer=True))
    assert computed[0] == whole
    new = [
        len(Tokenizer.load(plain).encode(f"<|im_end|>\n<|im_start|>user\n{line}", special_tokens=True)) for line in talk
    ]
    assert max(computed[1:]) < max(new[1:]) + 20, "earlier turns stay in the cache"


def test_a_model_that_was_never_taught_to_chat_says_so(model, tmp_path, monkeypatch, capsys) -> None:
    def noted(folder: Path) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert main(["chat", str(folder)]) == 0
        return capsys.readouterr().err

    assert f"note: {model} was never taught to chat (it brings no chat template)" in noted(model)
    taught = shutil.copytree(model, tmp_path / "taught")
    (taught / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    assert "never taught" not in noted(taught)


def test_a_template_does_not_hide_that_a_run_saw_text_alone() -> None:
    template = SimpleNamespace(is_own=True)
    run = {"model": {"class_path": "modules.pretraining.Pretraining", "init_args": {"init_from": None}}}
    (line, _) = never_taught(Path("runs/mine"), SimpleNamespace(facts={"run": run}), template)
    assert line.startswith("note: runs/mine was never taught to chat (it was pretrained on text alone)")
    run["model"]["init_args"]["init_from"] = "an-instruct-model"
    assert never_taught(Path("runs/mine"), SimpleNamespace(facts={"run": run}), template) == []


def test_commands(model, network, monkeypatch, capsys) -> None:
    lines = ["name?", "/reset", "def", "/system be short", "def", "/unknown"]
    expected = replies(model, network, ["name?"]) + replies(model, network, ["def"])
    assert chat(model, lines, monkeypatch, capsys) == expected + replies(model, network, ["def"], "be short")
    assert chat(model, ["def", "/reset", "def"], monkeypatch, capsys, "--system", "be short") == 2 * replies(
        model, network, ["def"], "be short"
    )


def test_bytes_that_are_no_text_are_replaced(model, network, monkeypatch, capsys) -> None:
    expected = replies(model, network, ["a\ufffdb"], "\ufffd")
    assert chat(model, ["a\udcffb"], monkeypatch, capsys, "--system", "\udcff") == expected


@pytest.mark.parametrize("thinking", [None, True, False])
def test_thinking_reaches_the_template(model, network, monkeypatch, capsys, thinking: bool | None) -> None:
    file = model / "chat_template.jinja"
    file.write_text(THINKING)
    try:
        variables = {} if thinking is None else {"enable_thinking": thinking}
        options = () if thinking is None else ("--thinking", str(thinking).lower())
        talk, exact = ["name?", "def", "for"], thinking is not False  # then earlier turns are rendered differently
        expected = replies(model, network, talk, exact=exact, **variables)
        assert chat(model, talk, monkeypatch, capsys, *options) == expected
    finally:
        file.unlink()


def test_ctrl_c_stops_a_reply_and_keeps_it(plain, network, monkeypatch, capsys) -> None:
    real = Session.reply

    def reply(self, tokens, max_new_tokens):
        for number, piece in enumerate(real(self, tokens, max_new_tokens)):
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
