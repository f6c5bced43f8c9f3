"""Held-out problems put to a model, whoever completes its turns: a callback while it trains, or `evaluate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from datamodules.conversations.replies import THINK, read_reply, thinks
from datamodules.conversations.template import ChatTemplate
from datamodules.environments.pool import Pool
from datamodules.tokenizer import Tokenizer
from modules.batch import Attempt, Judgement, Message, Problem, Prompt, Reply

MAX_TURNS = 8
"""Turns of a model in a dialogue: one that calls tools for ever must end, too."""
SEED = 0
"""Of the held-out problems: points of a curve, and models, are compared on the same ones."""
CUT = Judgement(reward=0.0, reason="cut before its end")
"""Of a reply that reached its longest: an answer cut short can look like another one."""


def held_out_problems(pool: Pool, name: str, number: int) -> list[Problem]:
    """Return the first held-out problems of an environment, the same in every run; of a list no more than there are.

    Raises:
        UserError: there is none.
    """
    most = pool.available(name, held_out=True)
    return pool.problems(name, SEED, range(min(number, most or number)), held_out=True)


@dataclass
class _Dialogue:
    key: tuple[int, ...]
    problem: Problem
    turns: list[Message] = field(default_factory=list)
    said: str = ""
    """The model's last turn as text, thoughts included."""
    ended: bool = True
    judgement: Judgement | None = None
    """What it is worth, where the answer need not be looked at."""

    @property
    def messages(self) -> list[Message]:
        return [*self.problem.messages, *self.turns]


class HeldOutProblems:
    """The held-out problems of environments, as an `Evaluation`.

    Args:
        pool: the environments.
        template: chat template of the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, pool: Pool, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._pool, self._template, self._tokenizer = pool, template, tokenizer
        end = template.turn_end()
        self.end_ids = [tokenizer.eos_id] if end is None else [end, tokenizer.eos_id]
        self._problems: dict[tuple[str, int], list[Problem]] = {}

    def problems(self, name: str, number: int) -> list[Problem]:
        """Return `number` held-out problems of an environment, of a list no more than there are.

        Raises:
            UserError: there is none.
        """
        if (name, number) not in self._problems:
            self._problems[name, number] = held_out_problems(self._pool, name, number)
        return self._problems[name, number]

    def run(
        self,
        problems: int,
        complete: Callable[[Sequence[Prompt]], Sequence[Reply]],
        *,
        samples: int = 1,
        thinking: bool | None = None,
    ) -> Mapping[str, list[list[Attempt]]]:
        """Let held-out problems be answered, and judge the answers; see `Evaluation`."""
        variables = {} if thinking is None else {"enable_thinking": thinking}
        dialogues = {
            name: [
                _Dialogue((place, number, sample), problem)
                for number, problem in enumerate(self.problems(name, problems))
                for sample in range(samples)
            ]
            for place, name in enumerate(self._pool.definitions)
        }
        active = {name: list(rows) for name, rows in dialogues.items()}
        for turn in range(MAX_TURNS):
            rows = [row for part in active.values() for row in part]
            if not rows:
                break
            prompts = [self._template.encode_prompt(r.messages, r.problem.tools or None, **variables) for r in rows]
            replies = complete([Prompt(tokens=p, key=(*r.key, turn)) for p, r in zip(prompts, rows, strict=True)])
            for row, prompt, reply in zip(rows, prompts, replies, strict=True):
                self._add(row, prompt, reply)
            active = {name: self._go_on(name, part) for name, part in active.items()}
        return {name: self._judged(name, rows, samples) for name, rows in dialogues.items()}

    def _add(self, row: _Dialogue, prompt: list[int], reply: Reply) -> None:
        tokens, row.ended = reply
        row.judgement = None if row.ended else CUT
        while tokens and tokens[-1] in self.end_ids:
            tokens = tokens[:-1]
        text, opened = self._tokenizer.decode(tokens), thinks(self._tokenizer.decode(prompt[-8:]))
        row.turns.append(read_reply(text, opened, row.problem.tools))
        row.said = f"{THINK}\n{text}" if opened else text

    def _go_on(self, name: str, rows: list[_Dialogue]) -> list[_Dialogue]:
        """Return the dialogues in which the environment has something to say, with what it says."""
        rows = [row for row in rows if row.ended]
        if not rows or not self._pool.is_conversational(name):
            return []
        follow = self._pool.respond(name, [(row.problem, row.messages) for row in rows])
        for row, turns in zip(rows, follow, strict=True):
            if isinstance(turns, Judgement):
                row.judgement = turns
            else:
                row.turns += turns
        return [row for row, turns in zip(rows, follow, strict=True) if turns and row.judgement is None]

    def _judged(self, name: str, rows: list[_Dialogue], samples: int) -> list[list[Attempt]]:
        whole = [row for row in rows if row.judgement is None]
        found = iter(self._pool.judge(name, [(row.problem, row.said) for row in whole]))
        attempts = [
            Attempt(
                problem=row.problem,
                dialogue=row.turns,
                reply=row.said,
                judgement=row.judgement or next(found),
                ended=row.ended,
            )
            for row in rows
        ]
        return [attempts[start : start + samples] for start in range(0, len(attempts), samples)]
