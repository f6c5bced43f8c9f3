"""A conversation with a model at the terminal."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from app.options import Device, Dtype, InputFile, Model, StateDtype, printable, read_text, short_state_dtype
from modules.errors import UserError

if TYPE_CHECKING:
    from datamodules.conversations.template import ChatTemplate
    from modules.checkpoints.source import ModelFolder

PRETRAINING, SFT = "modules.pretraining.Pretraining", "modules.sft.SFT"
"""Stages: one that teaches no turns, and one that teaches nothing else."""
HELP = "/exit ends (so does Ctrl-D), /reset forgets, /system TEXT sets the system message and forgets the rest"


def chat(
    model: Model,
    *,
    system: str | None = None,
    tools: InputFile | None = None,
    thinking: bool | None = None,
    low_effort: bool = False,
    thinking_budget: int | None = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float = 0.0,
    seed: int = 0,
    dtype: Dtype = "auto",
    state_dtype: StateDtype = "fp32",
    device: Device = "auto",
) -> None:
    """Talk with a model, a line a turn; replies come as they are written.

    /exit or Ctrl-D ends, /reset forgets the conversation, /system TEXT sets the system message and forgets the rest,
    Ctrl-C stops a reply. Lines may come from a pipe. The conversation is rendered by the model's chat template
    (chat_template.jinja or tokenizer_config.json), by ours, of the form of Nemotron's, where it brings none and its
    tokenizer has the special tokens for it. Names of special tokens in what is typed are text. Only what is new since
    the last turn is computed.

    Thoughts stand between <think> and </think>, dimmed on a terminal with colours (NO_COLOR is heeded); those of
    earlier turns are dropped as the template says. When the model calls a tool, the next line is the call's result.

    Args:
        model: Folder that `fit` wrote (a checkpoint or a run), or Hugging Face folder.
        system: System message.
        tools: JSON file with a list of tools that the model may call, in OpenAI's form. You are the one who runs them.
        thinking: Whether to think before an answer (the template's `enable_thinking`); null: as in the evaluations of
            the run that made the model, else as the template says.
        low_effort: Whether to think little (the template's `low_effort`).
        thinking_budget: Tokens that the template tells the model to think for (its `reasoning_budget`); null: none.
        max_new_tokens: Tokens of a reply at most, thoughts included.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely token; null takes the model's
            generation_config.json, else 0.7.
        top_k: Draw among the k most likely tokens only; 0: among all; null: as the model's generation_config.json says.
        top_p: Draw among the fewest most likely tokens that have this probability together; 1: among all; null: as the
            model's generation_config.json says.
        min_p: Leave out tokens less likely than this share of the most likely one's probability; 0: none.
        seed: Seed of the draws.
        dtype: Format of the matrix products: the checkpoint's own (auto; a quantised model runs as it is served, its
            inputs quantised too), fp32 or bf16 (quantised weights are then dequantised).
        state_dtype: Format of the Mamba states between tokens; fp16 is rounded stochastically.
        device: Where to compute; auto takes the GPU if there is one.

    Example:
        python -m app chat runs/pretrain
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens: {max_new_tokens} must be at least 1")
    import torch

    from app.models import choose_device, load_network, note_decoding, open_source, open_tokenizer
    from app.talk import Conversation, read_tools, show_call, template_variables
    from datamodules.conversations.template import ChatTemplate
    from modules.generation.sampling import Sampling
    from modules.generation.session import Session

    allowed = read_tools(tools)
    where, source = choose_device(device), open_source(model)
    variables = template_variables(source, thinking, low_effort, thinking_budget)
    tokenizer = open_tokenizer(source)
    own = source.generation.other
    sampling = Sampling(
        temperature=own.get("temperature", 0.7) if temperature is None else temperature,
        top_k=own.get("top_k", 0) if top_k is None else top_k,
        top_p=own.get("top_p", 1.0) if top_p is None else top_p,
        min_p=min_p,
        seed=seed,
    )
    template = ChatTemplate(tokenizer)
    for line in never_taught(model, source, template):
        print(line, file=sys.stderr)
    ends = [*source.generation.eos_token_ids, template.turn_end()]
    network = load_network(source, dtype, where)
    note_decoding(network)
    session = Session(
        network,
        sampling,
        [end for end in ends if end is not None],
        tokenizer.decode,
        torch.float16 if short_state_dtype(state_dtype) == "fp16" else torch.float32,
    )
    first = None if system is None else read_text(system)
    talk = Conversation(session, template, tokenizer, variables, allowed, first)
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    for line in read_lines(lambda: f"{show_call(talk.calls[0])} = " if talk.calls else "> "):
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            talk.reset(rest.strip() if command == "/system" else talk.system)
        elif command.startswith("/") and not talk.calls:
            print(f"{command} is no command; {HELP}", file=sys.stderr)
        elif command:
            with torch.inference_mode():
                talk.say(line, max_new_tokens)


def never_taught(model: Model, source: "ModelFolder", template: "ChatTemplate") -> list[str]:
    """Return lines that say so if nothing shows that a model was taught to chat; else none."""
    run = source.facts.get("run", {}).get("model", {})
    pretrained = run.get("class_path") == PRETRAINING and not run.get("init_args", {}).get("init_from")
    if run.get("class_path") == SFT or (template.is_own and not pretrained):
        return []
    why = "it was pretrained on text alone" if pretrained else "it brings no chat template"
    return [
        f"note: {model} was never taught to chat ({why}): replies go on with the text like any other,",
        f"      in turns of our own template; to go on with a text: python -m app generate {model} --prompt TEXT",
    ]


def read_lines(prompt: Callable[[], str]) -> Iterator[str]:
    """Yield the user's lines until there are no more, on a terminal behind a prompt; Ctrl-C there discards a line."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            yield read_text(input(printable(prompt()) if terminal else ""))
        except EOFError:
            print(end="\n" if terminal else "")
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
