"""Environments by name, and a MODEL that answers their held-out problems."""

import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from app.evaluation.attempts import Estimate, details, figures, most_frequent, table
from app.evaluation.report import environment
from app.options import STDOUT, for_people
from app.run_keys import MISSING, find, read_yaml
from datamodules.conversations.template import ChatTemplate
from datamodules.environments.evaluation import HeldOutProblems
from datamodules.environments.pool import Definition, Pool
from datamodules.progress import ProgressBar
from datamodules.text.files import write_blocks, write_file
from datamodules.tokenizer import Tokenizer
from modules.backbone.model import Network
from modules.batch import Prompt, Reply
from modules.errors import UserError
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling

DEFINED = "data.init_args.environments"
FAMILY = "reasoning_gym/"
SUFFIXES = (".yaml", ".yml")


def find_environments(names: str, run: Mapping[str, Any]) -> dict[str, Definition]:
    """Find what environments are called.

    Args:
        names: separated by commas: of environments of a run file (* and ? stand for any characters),
            `reasoning_gym/FAMILY`, or a YAML file with `environments`, or a run file, for all of its.
        run: the run file of the MODEL, may be empty.

    Raises:
        UserError: there is none of that name.
    """
    own = find(run, DEFINED)
    known: dict[str, Definition] = own if isinstance(own, dict) else {}
    found: dict[str, Definition] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name.endswith(SUFFIXES):
            found |= _of_file(Path(name))
        elif name.startswith(FAMILY):
            found |= _families(name.removeprefix(FAMILY))
        elif chosen := {other: known[other] for other in known if fnmatchcase(other, name)}:
            found |= chosen
        else:
            has = f"the MODEL's run has {', '.join(known)}" if known else "the MODEL's run names none"
            raise UserError(
                f"--environments: there is no {name}; {has}; others are {FAMILY}FAMILY or a YAML file with environments"
            )
    if not found:
        raise UserError("--environments: name at least one")
    return found


def _of_file(file: Path) -> dict[str, Definition]:
    tree = read_yaml(file, "--environments")
    for key in (DEFINED, "environments"):
        if isinstance(found := find(tree, key), dict) and find(found, "every_n_steps") is MISSING:
            return found
    raise UserError(f"--environments: {file} has no environments: {{NAME: {{class_path, init_args}}}}")


def _families(pattern: str) -> dict[str, Definition]:
    names = [pattern]
    if set("*?[") & set(pattern):
        from datamodules.environments.reasoning_gym import families

        names = [family for family in families() if fnmatchcase(family, pattern)]
    path = "datamodules.environments.reasoning_gym.ReasoningGym"
    return {FAMILY + name: {"class_path": path, "init_args": {"family": name}} for name in names}


def evaluate_environments(
    network: Network,
    tokenizer: Tokenizer,
    definitions: Mapping[str, Definition],
    settings: Mapping[str, Any],
    *,
    eos_ids: Sequence[int],
    batch_tokens: int,
    output: Path | None,
    samples_output: Path | None,
) -> None:
    """Let a network answer held-out problems, print a table and write files.

    Args:
        network: the network, in evaluation mode.
        tokenizer: its tokenizer.
        definitions: the environments.
        settings: `problems`, `samples`, `temperature`, `max_new_tokens`, `thinking`, `batch_size`, `seed`, and all that
            is to be told beside the figures.
        eos_ids: tokens that end a completion, beside the end of a turn.
        batch_tokens: positions in a forward pass.
        output: JSON file to write.
        samples_output: JSONL file to write.

    Raises:
        UserError: an environment cannot be made, or has no held-out problem.
    """
    people = for_people(STDOUT if STDOUT in (output, samples_output) else None)
    print(", ".join(f"{name}: {value}" for name, value in settings.items() if name != "environments"), file=people)
    with Pool(definitions) as pool:
        held_out = HeldOutProblems(pool, ChatTemplate(tokenizer), tokenizer)

        @torch.inference_mode()
        def complete(prompts: Sequence[Prompt]) -> list[Reply]:
            completions = generate(
                network,
                [Request(tokens=p.tokens, max_new_tokens=settings["max_new_tokens"], key=p.key) for p in prompts],
                Sampling(temperature=settings["temperature"], seed=settings["seed"]),
                eos_ids=[*held_out.end_ids, *eos_ids],
                batch_size=settings["batch_size"],
                prefill_tokens=batch_tokens,
            )
            replies: list[Reply] = []
            with ProgressBar("generating", len(prompts), unit="replies") as progress:
                for completion in completions:
                    replies.append((completion.tokens, completion.finish == "eos"))
                    progress.advance(1)
            return replies

        attempts = held_out.run(
            settings["problems"], complete, samples=settings["samples"], thinking=settings["thinking"]
        )
        found = {name: figures(problems, settings["samples"]) for name, problems in attempts.items()}
        for name, problems in attempts.items():
            asked = [part[0].problem for part in problems]
            found[name]["most_frequent_answer"], found[name]["most_frequent"] = most_frequent(pool, name, asked)
    print("\n".join(table(found)), file=people)
    if output is not None:
        plain = {name: {key: _plain(value) for key, value in one.items()} for name, one in found.items()}
        report = {"results": plain, "config": dict(settings), "environment": environment()}
        write_file(output, f"{json.dumps(report, indent=2, ensure_ascii=False)}\n".encode())
    if samples_output is not None:
        rows = (row for name, problems in attempts.items() for row in details(name, problems))
        write_blocks(samples_output, (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows))


def _plain(value: Any) -> Any:
    """Return an estimate as JSON, nan as null."""
    if not isinstance(value, Estimate):
        return value
    numbers = {"value": value.value, "standard_error": value.error}
    return {key: None if math.isnan(number) else number for key, number in numbers.items()}
