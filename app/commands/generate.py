"""Completions of prompts: one on the command line, or a file of them that is answered row by row."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from app.options import (
    STDOUT,
    Device,
    Dtype,
    InputFile,
    Model,
    OutputFile,
    StateDtype,
    for_people,
    read_text,
    short_dtype,
    short_state_dtype,
)
from modules.errors import UserError
from modules.generation.acceptance import Acceptance

if TYPE_CHECKING:
    from app.rows_file import Answers
    from app.talk import Turn
    from modules.generation.engine import Completion

Complete = Callable[..., "Iterator[Completion]"]
"""The engine's `generate` with everything set but where to begin and whom to tell."""


def generate(
    model: Model,
    *,
    prompt: str | None = None,
    user: str | None = None,
    prompts: InputFile | None = None,
    output: OutputFile = STDOUT,
    system: str | None = None,
    tools: InputFile | None = None,
    thinking: bool | None = None,
    low_effort: bool = False,
    thinking_budget: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    samples: int = 1,
    stop: list[str] | None = None,
    ignore_eos: bool = False,
    batch_size: int = 16,
    draft_tokens: int = 0,
    dtype: Dtype = "auto",
    state_dtype: StateDtype = "fp32",
    device: Device = "auto",
) -> None:
    """Let a model go on with prompts.

    With --prompts, each row of OUTPUT is the row of the file with `completion` (the new text, without end-of-text token
    and stop string), `completion_ids` (the new tokens, those that ended it included), `finish` (eos, stop or length)
    and `tokenizer` (the fingerprint of the tokenizer that the ids are of: a row whose ids another one wrote is refused,
    here and by `score`). Blank lines are passed over. The same command goes on after an interruption, and the result is
    the same to the byte; OUTPUT.run.json keeps the options. A prompt is plain text (names of special tokens in it are
    text, too; it begins with BOS if the tokenizer puts one) or a list of token ids, all that a model without a
    tokenizer takes. Statistics go to stderr.

    A question (--user), and rows with `messages` (and `tools`) in place of a prompt, are rendered by the model's chat
    template; the row of OUTPUT then has the turn as `message`, too: `content`, and `reasoning_content` and `tool_calls`
    where the model wrote such.

    Args:
        model: Folder that `fit` wrote (a checkpoint or a run), or Hugging Face folder.
        prompt: Text to go on with, or - for that of standard input; the completion goes to stdout, on a terminal as it
            comes.
        user: What a user asks, or - for the text of standard input; the reply goes to stdout like that of a prompt,
            thoughts between <think> and </think>.
        prompts: JSONL file of prompts, each row with `prompt`, `messages` or `prompt_ids`; - is standard input.
        output: JSONL file of the completions of --prompts, rows in the same order; - is standard output, where rows are
            written as they are done and nothing is kept to go on with.
        system: System message of --user.
        tools: JSON file with a list of tools that the model may call, in OpenAI's form, for --user and for rows without
            `tools` of their own.
        thinking: Whether to think before an answer (the template's `enable_thinking`); null: as in the evaluations of
            the run that made the model, else as the template says.
        low_effort: Whether to think little (the template's `low_effort`).
        thinking_budget: Tokens that the template tells the model to think for (its `reasoning_budget`); null: none.
        max_new_tokens: Tokens of a completion at most.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely token.
        top_k: Draw among the k most likely tokens only; 0: among all.
        top_p: Draw among the fewest most likely tokens that have this probability together; 1: among all.
        min_p: Leave out tokens less likely than this share of the most likely one's probability; 0: none.
        seed: Seed of the draws. What a row draws does not depend on the rows beside it.
        samples: Completions of each prompt; above 1, each is a row of OUTPUT with its number from 0 as `sample`.
        stop: Text that ends a completion; may be given several times.
        ignore_eos: Whether to go on after end-of-text tokens.
        batch_size: Completions that are written together.
        draft_tokens: Tokens that the model's MTP block drafts ahead for each verification; 0: none.
        dtype: Format of the matrix products: the checkpoint's own (auto; a quantised model runs as it is served, its
            inputs quantised too), fp32 or bf16 (quantised weights are then dequantised).
        state_dtype: Format of the Mamba states between tokens; fp16 is rounded stochastically.
        device: Where to compute; auto takes the GPU if there is one.

    Example:
        python -m app generate runs/pretrain --prompt 'def main('
    """
    if [prompt, user, prompts].count(None) != 2:
        raise UserError(
            "--prompt: give either a text as --prompt, or a question as --user, or a file as --prompts; - is standard "
            "input"
        )
    if user is None and system is not None:
        raise UserError("--system: goes with --user; the conversations of --prompts have their own")
    if prompts is None and output != STDOUT:
        raise UserError(f"--output: only the completions of --prompts go into a file; write > {output} instead")
    check_least(max_new_tokens=(max_new_tokens, 1), samples=(samples, 1), batch_size=(batch_size, 1))
    check_least(draft_tokens=(draft_tokens, 0))
    if stop is not None and not all(stop):
        raise UserError("--stop: a stop string is empty; leave it out")
    import torch

    from app.models import choose_device, load_network, note_decoding, open_source, open_tokenizer
    from app.rows_file import open_answers, read_rows, text_of
    from app.scoring import Reader
    from app.talk import Turn, read_tools, template_variables
    from modules.generation import engine
    from modules.generation.sampling import Sampling

    allowed = read_tools(tools)
    if prompts is None:
        rows = {"--prompt" if user is None else "--user": asked(prompt, user, system)}
    else:
        rows = read_rows(prompts)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    where, source = choose_device(device), open_source(model)
    variables = template_variables(source, thinking, low_effort, thinking_budget)
    tokenizer = None if source.tokenizer_folder is None else open_tokenizer(source)
    for text in stop or []:
        text_of({"stop": text}, "stop", "--stop")
    if stop and tokenizer is None:
        raise UserError(f"--stop: {model} brings no tokenizer, so there are no texts; leave it out")
    reader = Reader(source, allowed, variables)
    encoded = [reader.prompt(row, name) for name, row in rows.items()]
    talks = [not {"prompt", "prompt_ids"} & row.keys() for row in rows.values()]
    turns = [
        Turn.after(tokens, reader.tokenizer, row.get("tools", allowed)) if talk else None
        for talk, row, tokens in zip(talks, rows.values(), encoded, strict=True)
    ]
    for tokens, name in zip(encoded, rows, strict=True):
        if not tokens:
            raise UserError(f"{name}: the prompt is empty; give it at least one token")
    eos_ids = [] if ignore_eos else [*source.generation.eos_token_ids, *reader.turn_ends]
    requests = [
        engine.Request(tokens=tokens, max_new_tokens=max_new_tokens, key=(number, sample))
        for number, tokens in enumerate(encoded)
        for sample in range(samples)
    ]
    choices: dict[str, Any] = {"stop": stop or [], "batch_size": batch_size, "draft_tokens": draft_tokens}

    def prepare() -> Complete:
        network = load_network(source, dtype, where)
        note_decoding(network)
        return functools.partial(
            torch.inference_mode()(engine.generate),  # 5 to 20% faster than no_grad
            network,
            requests,
            sampling,
            eos_ids=eos_ids,
            decode=None if tokenizer is None else tokenizer.decode,
            state_dtype=torch.float16 if short_state_dtype(state_dtype) == "fp16" else torch.float32,
            **choices,
        )

    if prompts is None:
        print_completions(prepare(), turns[0], samples, draft_tokens)
        return
    settings = {
        "model": str(source.path.resolve()),
        **vars(sampling),
        **choices,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
        **variables,
        **({"tools": allowed} if allowed else {}),
        "ignore_eos": ignore_eos,
        "dtype": short_dtype(dtype),
        "state_dtype": short_state_dtype(state_dtype),
    }
    answers = open_answers(output, prompts, settings)
    if answers.count == len(requests):
        print(f"{output} is complete already; delete it to generate it again")
        return
    mark = {} if reader.fingerprint is None else {"tokenizer": reader.fingerprint}
    write_completions(prepare(), [{**row, **mark} for row in rows.values()], turns, samples, draft_tokens, answers)
    print(f"{output}: {answers.count:,} completions of {len(rows):,} prompts", file=for_people(output))


def asked(prompt: str | None, user: str | None, system: str | None) -> dict[str, Any]:
    """Return the row of a prompt or question of the command line, - being the text of standard input."""
    text = user if prompt is None else prompt
    assert text is not None
    text = read_text(sys.stdin.read()).removesuffix("\n") if text == "-" else text
    if prompt is not None:
        return {"prompt": text}
    texts = {"system": None if system is None else read_text(system), "user": read_text(text)}
    return {"messages": [{"role": role, "content": said} for role, said in texts.items() if said is not None]}


def print_completions(complete: Complete, turn: "Turn | None", samples: int, draft_tokens: int) -> None:
    """Print the completions of one prompt, on a terminal as they come; several are numbered."""
    from app.inspection.terminal import Paper
    from app.talk import ReplyWriter

    thinking, colour = (False, False) if turn is None else (turn.thinking, Paper.of_stdout().colour)
    writers = [ReplyWriter(thinking, colour) for _ in range(samples)]
    streams = sys.stdout.isatty() and samples == 1
    statistics = Statistics(draft_tokens)
    on_text = (lambda _, text: writers[0].write(text)) if streams else None
    for sample, completion in enumerate(complete(on_text=on_text)):
        statistics.add(completion)
        if samples > 1:
            print(f"--- sample {sample} ({completion.finish})")
        if not streams:
            writers[sample].write(completion.text or "")
        writers[sample].finish("\n")
    print(statistics, file=sys.stderr)


def write_completions(
    complete: Complete,
    rows: list[dict[str, Any]],
    turns: "list[Turn | None]",
    samples: int,
    draft_tokens: int,
    answers: "Answers",
) -> None:
    """Answer the rows that are not answered yet."""
    from datamodules.progress import ProgressBar

    statistics, total = Statistics(draft_tokens), len(rows) * samples
    with ProgressBar("generating", total, answers.count, unit="completions") as progress:
        for number, completion in enumerate(complete(first=answers.count), answers.count):
            statistics.add(completion)
            answer: dict[str, Any] = {
                "completion": completion.text,
                "completion_ids": completion.tokens,
                "finish": completion.finish,
            }
            if (turn := turns[number // samples]) is not None:
                answer["message"] = turn.read(completion.text or "")
            mark = {"sample": number % samples} if samples > 1 else {}
            answers.append([{**rows[number // samples], **mark, **answer}])
            progress.advance(1)
    answers.finish({"completions": total})
    print(statistics, file=sys.stderr)


class Statistics:
    """Tokens, time and drafts of a command.

    Args:
        draft_tokens: tokens drafted for each verification; 0: none.
    """

    def __init__(self, draft_tokens: int) -> None:
        self._draft_tokens = draft_tokens
        self._start = time.perf_counter()
        self._tokens = 0
        self._accepted: list[int] = []

    def add(self, completion: "Completion") -> None:
        """Count a completion."""
        self._tokens += len(completion.tokens)
        self._accepted += completion.accepted

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._start
        line = f"{self._tokens:,} tokens in {seconds:.2f} s ({self._tokens / seconds:,.0f} tokens/s)"
        if self._draft_tokens:
            line = "\n".join([line, *Acceptance.of(self._accepted, self._draft_tokens).lines()])
        return line


def check_least(**options: tuple[int, int]) -> None:
    """Check options, each with its value and the least allowed.

    Raises:
        UserError: a value is below.
    """
    for name, (value, least) in options.items():
        if value < least:
            raise UserError(f"--{name}: {value} must be at least {least}")
