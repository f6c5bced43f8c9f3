"""Benchmarks of lm-evaluation-harness, and problems of environments, on a MODEL."""

import os
import sys
from pathlib import Path
from typing import Any, cast

from app.options import STDOUT, Device, Dtype, InputFolder, Model, OutputFile, for_people, short_dtype
from modules.errors import UserError


def evaluate(
    model: Model,
    *,
    tasks: str | None = None,
    environments: str | None = None,
    problems: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    thinking: bool | None = None,
    tasks_path: InputFolder | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    prefix_token: str | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    batch_tokens: int = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: int = 1234,
    output: OutputFile | None = None,
    details: OutputFile | None = None,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness, or on held-out problems of environments.

    Environments (--environments) ask, and judge what the model says: printed is the share of right answers, with
    several samples pass@k (that one of k is right, estimated without bias), each ± one standard error over the
    problems, beside what always giving the most frequent answer would be worth. Held out means that no training data
    made from the environment holds the problem. A reply that is cut at its longest is no answer; one that could not be
    judged (its checker raised or took too long) is counted apart.

    Tasks (--tasks) of the harness download their data from the Hugging Face Hub (HF_DATASETS_OFFLINE=1 takes it from
    the cache only). Own tasks are YAML files of the harness's form in --tasks_path, with data beside them, for example
    `dataset_path: json` and `dataset_kwargs: {data_files: {test: questions.jsonl}}`: no network is needed. A task file
    can name Python functions, which are run: use only those you would run as a program.

    Texts begin with BOS only where the tokenizer says so. A text without context (rolling perplexity, an empty prompt)
    follows one prefix token, as in the harness: BOS, or the end-of-text token if there is no BOS. A model of `fit` has
    seen neither at the beginning of a document: its guess of the first token is nearly uniform, so that each text costs
    about log2(vocabulary) bits more than in `score`, which does not count first tokens.

    Args:
        model: MODEL: a folder that fit wrote (checkpoint or run) or a Hugging Face folder.
        tasks: Names of tasks, groups or tags, separated by commas; * and ? stand for any characters.
        environments: Names of environments, separated by commas: those of the run that made the MODEL (* and ? stand
            for any characters), reasoning_gym/FAMILY, or a YAML file with environments.
        problems: Held-out problems of each environment; null: 100.
        samples: Replies to each problem; null: 1.
        temperature: Divides the logits before a token of a reply is drawn; 0 takes the most likely token, and so does
            null with one sample; null with several is 1.
        max_new_tokens: Tokens of a reply at most; null: as in the run that made the MODEL, else 512.
        thinking: Whether the chat template is told to let the model think; null: as in the run that made the MODEL,
            else what the template does by itself.
        tasks_path: Folder of own tasks. Data files that they name are relative to it.
        limit: Documents of each task, the first ones; null: all.
        num_fewshot: Solved examples before each question; a task that says 0 keeps 0. null: what the task says.
        apply_chat_template: Whether to put questions as turns of a conversation, examples too.
        system_instruction: System turn (or text) before each question.
        prefix_token: Token before a text without context, by its name, for example </s>; null: see above.
        max_length: Tokens that the model may see at once: longer texts are cut into windows, longer contexts at their
            left. null: any number, for the network has no limit.
        batch_size: Completions that are written together.
        batch_tokens: Tokens in one forward pass, padding included: bounds the memory.
        dtype: Format of the matrix products: auto is that of each weight in the checkpoint, and runs a quantised model
            as it is served, its inputs quantised too; fp32 and bf16 run it with dequantised weights.
        device: Where to compute; auto takes a GPU if there is one.
        seed: Seed of sampled completions and of the choice of examples; problems of environments are always the same.
        output: JSON file to write: figures, tasks, settings and versions; - is standard output.
        details: JSONL file to write: a row for each sample, with what the model was asked and answered; - is standard
            output.

    Raises:
        UserError: a task, file or option is wrong; the message names it and the mend.

    Example:
        python -m app evaluate runs/pretrain --tasks standard_library --tasks_path examples/tasks
    """
    for name, number in (
        ("limit", limit),
        ("max_length", max_length),
        ("batch_size", batch_size),
        ("batch_tokens", batch_tokens),
        ("problems", problems),
        ("samples", samples),
        ("max_new_tokens", max_new_tokens),
    ):
        if number is not None and number < 1:
            raise UserError(f"--{name}: {number} must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num_fewshot: {num_fewshot} must be at least 0")
    if (tasks is None) == (environments is None):
        raise UserError("--tasks: give either tasks of lm-evaluation-harness, or --environments")
    of_tasks: dict[str, Any] = {
        "tasks_path": tasks_path,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
        "system_instruction": system_instruction,
        "prefix_token": prefix_token,
        "max_length": max_length,
    }
    of_environments: dict[str, Any] = {
        "problems": problems,
        "samples": samples,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "thinking": thinking,
    }
    for name, value in (of_tasks if tasks is None else of_environments).items():
        if value is not None:
            raise UserError(f"--{name}: is for --{'tasks' if tasks is None else 'environments'}; leave it out")
    if environments is not None:
        _environments(
            model, environments, of_environments, batch_size, batch_tokens, dtype, device, seed, output, details
        )
        return
    assert tasks is not None
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the harness and of datasets
    import random

    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate as run

    from app.evaluation.harness import HarnessModel, prefix_id
    from app.evaluation.report import describe, write_results, write_samples
    from app.evaluation.tasks import load_tasks
    from app.models import choose_device, load_network, open_source, open_tokenizer
    from datamodules.conversations.template import ChatTemplate

    where, source = choose_device(device), open_source(model)
    tokenizer = open_tokenizer(source)
    template = ChatTemplate(tokenizer) if apply_chat_template else None
    prefix = prefix_id(tokenizer, prefix_token)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks: name at least one task")
    loaded = load_tasks(names, tasks_path, num_fewshot, seed)
    lm = HarnessModel(
        load_network(source, dtype, where),
        tokenizer,
        eos_ids=source.generation.eos_token_ids or [tokenizer.eos_id],
        prefix_token=prefix,
        template=template,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        max_length=max_length,
        seed=seed,
    )
    random.seed(0)  # of Python, numpy and torch as the harness's own program: tasks may draw from them
    np.random.seed(1234)
    torch.manual_seed(1234)
    found = run(
        lm,
        task_dict=loaded,
        limit=limit,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        system_instruction=system_instruction,
    )
    results = cast("dict[str, Any]", found)
    settings = {
        "model": str(source.path),
        "tasks": names,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "prefix_token": tokenizer.decode([prefix]),
        "max_length": max_length,
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "dtype": short_dtype(dtype),
        "device": str(where),
        "seed": seed,
    }
    people = for_people(STDOUT if STDOUT in (output, details) else None)
    print(", ".join(f"{name}: {value}" for name, value in settings.items() if name != "tasks"), file=people)
    print(describe(results), file=people)
    if output is not None:
        write_results(output, results, settings)
    if details is not None:
        write_samples(details, results)


def _environments(
    model: Path,
    names: str,
    asked: dict[str, Any],
    batch_size: int,
    batch_tokens: int,
    dtype: Dtype,
    device: Device,
    seed: int,
    output: Path | None,
    details: Path | None,
) -> None:
    from app.evaluation.environments import evaluate_environments, find_environments
    from app.models import choose_device, load_network, note_decoding, open_source, open_tokenizer

    where, source = choose_device(device), open_source(model)
    run = source.facts.get("run", {})
    definitions = find_environments(names, run)
    in_run = run.get("environments") or {}
    samples = asked["samples"] or 1
    temperature = asked["temperature"] if asked["temperature"] is not None else float(samples > 1)
    if samples > 1 and temperature == 0:
        raise UserError("--samples: at temperature 0 all samples are the same; give a --temperature above 0")
    settings = {
        "model": str(source.path),
        "environments": {name: dict(definition) for name, definition in definitions.items()},
        "problems": asked["problems"] or 100,
        "samples": samples,
        "temperature": temperature,
        "max_new_tokens": asked["max_new_tokens"] or in_run.get("max_new_tokens") or 512,
        "thinking": in_run.get("thinking") if asked["thinking"] is None else asked["thinking"],
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "dtype": short_dtype(dtype),
        "device": str(where),
        "seed": seed,
    }
    tokenizer = open_tokenizer(source)
    network = load_network(source, dtype, where)
    note_decoding(network)
    evaluate_environments(
        network,
        tokenizer,
        definitions,
        settings,
        eos_ids=source.generation.eos_token_ids,
        batch_tokens=batch_tokens,
        output=output,
        samples_output=details,
    )
