"""What a Tab offers."""

import subprocess

import pytest

from app.completion import candidates
from tests.app.helpers import ROOT

RUN_FILE = str(ROOT / "configs" / "pretrain.yaml")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ge"], ["generate"]),
        (["help", "me"], ["merge"]),
        (["generate", "MODEL", "--draft"], ["--draft_tokens"]),
        (["generate", "MODEL", "--dtype", "b"], ["bf16", "bfloat16"]),
        (["generate", "MODEL", "--ignore_eos", ""], ["false", "true"]),
        (["export", "MODEL", "--format", "fp8"], ["fp8-compressed-tensors", "fp8-modelopt"]),
        (["generate", "MODEL", "--prompts", "x"], []),
        (["fit", "--config", "conf"], []),
        (["fit", "--trainer.max_"], ["--trainer.max_steps", "--trainer.max_time"]),
        (["fit", "--config", RUN_FILE, "--model.init_args.optimizer.b"], ["--model.init_args.optimizer.betas"]),
        (["fit", "--data.init_args.sour"], ["--data.init_args.sources"]),
        (["plan", "--dev"], ["--device", "--devices"]),
        (["nothing", "--x"], []),
    ],
)
def test_words_are_completed(words: list[str], found: list[str]):
    assert candidates(words) == found


@pytest.mark.parametrize("word", ["gener", "--"])
def test_nothing_is_offered_twice(word: str):
    found = candidates(["fit", word])
    assert len(found) == len(set(found))


def test_the_function_of_bash_asks_the_program(tmp_path):
    from app.completion import BASH

    program = tmp_path / "superbolt"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    call = f'COMP_WORDS=({program} fit --na); COMP_CWORD=2; _superbolt; echo "${{COMPREPLY[*]}}"'
    result = subprocess.run(["bash", "-c", f"{BASH}\n{call}"], capture_output=True, text=True, timeout=30)
    assert result.stdout == "completion words fit --na\n"
