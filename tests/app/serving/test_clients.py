"""Other people's clients: openai's, and lm-eval's two models for such servers.

openai is in the folder of peers, so what uses it runs in a process of its own (`python FILE URL`, see below).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.evaluation.harness import HarnessModel
from datamodules.tokenizer import Tokenizer
from modules.checkpoints.load import load_model
from tests.app.serving.helpers import NAME, Running

PEERS = Path(sys.prefix) / "peers"
QUESTIONS = ["def add(a, b):", "import os", "for name in sys.argv:\n"]


@pytest.fixture(scope="module")
def running(models):
    server = Running(models["first"], max_context=2048)
    yield server
    server.wait_until_idle()
    server.close()


@pytest.mark.skipif(not (PEERS / "openai").exists(), reason="`make test` installs openai")
def test_openai_client(running: Running) -> None:
    script = Path(__file__).with_name("openai_client.py")
    done = subprocess.run([sys.executable, script, running.url, str(PEERS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    text = running.complete("def", max_tokens=9, temperature=0)["choices"][0]["text"]
    assert found["completion"] == found["streamed"] == text
    message = running.chat([{"role": "user", "content": "hi"}], max_tokens=9, temperature=0, reasoning_effort="none")
    assert found["chat"] == found["chat_streamed"] == message["choices"][0]["message"]["content"]
    assert found["usage"] == message["usage"]
    assert found["logprobs"] == 9
    assert found["ids"] == message["usage"]["completion_tokens"]
    assert found["models"] == [NAME]
    assert found["errors"] == ["BadRequestError: temperature", "NotFoundError: model", "BadRequestError: prompt"]


@pytest.mark.parametrize("concurrent", [1, 4])
def test_lm_eval_local_completions(running: Running, models, concurrent: int) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions",
        model=NAME,
        tokenizer=str(models["first"]),
        num_concurrent=concurrent,
        batch_size=2,
        max_retries=1,
    )
    tokenizer, network = Tokenizer.load(models["first"]), load_model(models["first"]).network
    ours = HarnessModel(network, tokenizer, eos_ids=[2], prefix_token=1, max_length=2047)

    def ask(kind: str, arguments: list[tuple]) -> list:
        instances = [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]
        return [getattr(model, kind)(instances) for model in (theirs, ours)]

    pairs = [(question, rest) for question in QUESTIONS for rest in ("\n    return a", " x")]
    got, expected = ask("loglikelihood", pairs)
    for (found, greedy), (logprob, most_likely) in zip(got, expected, strict=True):
        assert found == pytest.approx(logprob, abs=1e-3)
        assert greedy == most_likely
    got, expected = ask("generate_until", [(one, {"until": ["\n"], "max_gen_toks": 12}) for one in QUESTIONS])
    assert got == expected
    got, expected = ask("loglikelihood_rolling", [(one,) for one in QUESTIONS])
    assert got == pytest.approx(expected, abs=1e-3)


def test_lm_eval_local_chat_completions(running: Running) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    theirs = LocalChatCompletion(
        base_url=f"{running.url}/v1/chat/completions", model=NAME, num_concurrent=2, max_retries=1, eos_string="</s>"
    )
    prompts = [theirs.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "reasoning_effort": "none"}
    instances = [Instance("generate_until", {}, (prompt, settings), n) for n, prompt in enumerate(prompts)]
    for question, text in zip(QUESTIONS, theirs.generate_until(instances), strict=True):
        asked = {"max_tokens": 12, "temperature": 0, "stop": ["\n\n", "</s>"], "reasoning_effort": "none"}
        message = running.chat([{"role": "user", "content": question}], **asked)["choices"][0]["message"]
        assert text == message["content"]
