"""A conversation with a model at the terminal."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from app.options import Device, Dtype, Model, StateDtype, read_text, short_state_dtype, write_text
from modules.errors import UserError

if TYPE_CHECKING:
    from datamodules.conversations.template import ChatTemplate, Message
    from datamodules.tokenizer import Tokenizer
    from modules.checkpoints.source import ModelFolder
    from modules.generation.session import Session

PRETRAINING = "modules.pretraining.Pretraining"
"""Stage that teaches no turns."""
HELP = "/exit ends (so does Ctrl-D), /reset forgets, /system TEXT sets the system message and forgets the rest"


def chat(
    model: Model,
    *,
    system: str | None = None,
    thinking: bool | None = None,
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
    (chat_template.jinja or tokenizer_config.json), by plain ChatML where it brings none and its tokenizer has
    <|im_start|> and <|im_end|>. Only what is new since the last turn is computed.

    Args:
        model: Folder that `fit` wrote (a checkpoint or a run), or Hugging Face folder.
        system: System message.
        thinking: Given to the template as `enable_thinking`; null leaves it to the template.
        max_new_tokens: Tokens of a reply at most.
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
    from datamodules.conversations.template import ChatTemplate
    from modules.generation.sampling import Sampling
    from modules.generation.session import Session

    where, source = choose_device(device), open_source(model)
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
    variables = {} if thinking is None else {"enable_thinking": thinking}
    talk = Conversation(session, template, tokenizer, variables, None if system is None else read_text(system))
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    for line in read_lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            talk.reset(rest.strip() if command == "/system" else talk.system)
        elif command.startswith("/"):
            print(f"{command} is no command; {HELP}", file=sys.stderr)
        elif command:
            with torch.inference_mode():
                talk.answer(line, max_new_tokens)


def never_taught(model: Model, source: "ModelFolder", template: "ChatTemplate") -> list[str]:
    """Return lines that say so if nothing shows that a model was taught to chat; else none."""
    run = source.facts.get("run", {}).get("model", {})
    pretrained = run.get("class_path") == PRETRAINING and not run.get("init_args", {}).get("init_from")
    if template.is_own and not pretrained:
        return []
    why = "it was pretrained on text alone" if pretrained else "it brings no chat template"
    return [
        f"note: {model} was never taught to chat ({why}): replies go on with the text like any other,",
        f"      in turns of plain ChatML; to go on with a text: python -m app generate {model} --prompt TEXT",
    ]


class Conversation:
    """The turns so far, and the session that answers.

    Args:
        session: the model's side.
        template: renders the turns.
        tokenizer: the model's tokenizer.
        variables: what else the template is told.
        system: system message, if any.
    """

    def __init__(
        self,
        session: "Session",
        template: "ChatTemplate",
        tokenizer: "Tokenizer",
        variables: dict[str, Any],
        system: str | None,
    ) -> None:
        self._session, self._template, self._tokenizer = session, template, tokenizer
        self._variables = variables
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget all turns; go on with this system message, or without one."""
        self.system = system
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._known = "", list[int]()  # rendered conversation up to the last reply, and its tokens

    def answer(self, text: str, max_new_tokens: int) -> None:
        """Take the user's turn, print the reply as it comes and remember it, as far as it came."""
        turns: list[Message] = [*self._messages, {"role": "user", "content": text}]
        rendered = self._template.render(turns, answer=True, **self._variables)
        tokens = self._encode(rendered)
        with interruptible() as interrupted:
            for piece in self._session.reply(tokens, max_new_tokens):
                write_text(piece)
                if interrupted:
                    break
        print(" [stopped]" if interrupted else "", flush=True)
        self._messages = [*turns, {"role": "assistant", "content": self._session.text}]
        self._known = rendered + self._session.text, self._session.tokens

    def _encode(self, rendered: str) -> list[int]:
        """Return the tokens of a conversation; the reply keeps the tokens that it was written in."""
        text, tokens = self._known
        if rendered.startswith(text):
            return tokens + self._tokenizer.encode(rendered[len(text) :], special_tokens=True)
        return self._tokenizer.encode(rendered, special_tokens=True)


def read_lines() -> Iterator[str]:
    """Yield the user's lines until there are no more; Ctrl-C at the prompt discards a line."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then edits lines and remembers them

        prompt = "> "
    while True:
        try:
            yield read_text(input(prompt))
        except EOFError:
            print(end="\n" if prompt else "")
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let the first Ctrl-C only fill the list that is given; the second one interrupts."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
