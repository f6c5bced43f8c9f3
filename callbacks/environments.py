"""What the model can do by now: held-out problems of the data's environments, answered by generating and judged.

A loss says how surprising the right answers are, not how often the model gives one. Each evaluation takes the same
problems and the most likely tokens, so that two points of a curve differ by the model alone. The replies are drafted by
the MTP block where there is one, which shows what its drafts are worth on what the model is trained to say: the first
evaluation, before the first step, is the "before" of both curves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.step import StepCallback, check_interval, data, is_due, stage
from callbacks.text import fold, quote
from modules.backbone.model import Network
from modules.base import EXACT_MATCH
from modules.batch import Attempt, EvaluatedEnvironments, Evaluation, Prompt, Reply
from modules.errors import UserError
from modules.generation.acceptance import Acceptance
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling

BATCH_SIZE = 32
"""Replies that are written together."""


class Environments(StepCallback):
    """Answers held-out problems before the first step, every so many steps, and after the last.

    Args:
        every_n_steps: Optimiser steps between evaluations (>= 1).
        problems: Problems of each environment (>= 1), the same each time.
        shown: Dialogues of each environment that are written to TensorBoard, 0 to problems.
        max_new_tokens: Tokens of a reply at most (>= 1); one that is cut is no answer.
        thinking: Whether the chat template is told to let the model think; null: the template decides.
        draft_tokens: Tokens that the MTP block, where there is one, drafts for each verification; 0: none.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        problems: int = 64,
        shown: int = 2,
        max_new_tokens: int = 128,
        thinking: bool | None = None,
        draft_tokens: int = 3,
    ) -> None:
        self.every_n_steps = check_interval(every_n_steps, "environments.every_n_steps")
        for key, value, least in (
            ("problems", problems, 1),
            ("shown", shown, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("draft_tokens", draft_tokens, 0),
        ):
            if value < least:
                raise UserError(f"environments.{key} is {value}: it must be at least {least}")
        self.problems, self.shown = problems, shown
        self.max_new_tokens, self.thinking, self.draft_tokens = max_new_tokens, thinking, draft_tokens
        self.evaluated_step = -1
        """The step whose model was evaluated last."""
        self.dialogues: dict[str, Attempt] = {}
        """Environment -> the newest attempt at its first problem."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the model that the run starts from; a resumed run has done so already."""
        if trainer.global_step == 0:
            stage(pl_module).switch_formats(data(trainer).progress.tokens)
            self._evaluate(trainer, pl_module)

    def on_step_closed(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate if it is due."""
        if is_due(self.every_n_steps, trainer):
            self._evaluate(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the newest dialogue of each environment."""
        for name, attempt in self.dialogues.items():
            print(f"--- {name}: {verdict(attempt)}", flush=True)
            print(quote(transcript(attempt)), flush=True)

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        source, network = data(trainer), stage(module).built_network
        evaluation = source.evaluation() if isinstance(source, EvaluatedEnvironments) else None
        if evaluation is None:
            return
        mode = network.training
        network.eval()
        with isolate_rng():
            found, drafts = self._attempts(trainer, network, evaluation)
        network.train(mode)
        values, failures = _share(trainer, (measures(found) | drafts, _failures(found)))
        stage(module).metrics.record_all(values)
        self.evaluated_step = trainer.global_step
        if trainer.is_global_zero:
            print(fold(line(trainer.global_step, values, failures)), flush=True)
            self.dialogues = {name: problems[0][0] for name, problems in found.items()}
            self._show(trainer, found)

    def _attempts(
        self, trainer: Trainer, network: Network, evaluation: Evaluation
    ) -> tuple[Mapping[str, list[list[Attempt]]], dict[str, float]]:
        """Return the attempts at all problems, on the first process, and what drafts were worth.

        The first process alone has environments; what is to be completed is told to the others, whose weights are
        needed too.
        """
        draft_tokens = self.draft_tokens if network.mtp is not None else 0
        accepted: list[int] = []

        def complete(prompts: Sequence[Prompt]) -> list[Reply]:
            return self._complete(trainer, network, evaluation, _share(trainer, prompts), draft_tokens, accepted)

        found: Mapping[str, list[list[Attempt]]] = {}
        if trainer.is_global_zero:
            found = evaluation.run(self.problems, complete, thinking=self.thinking)
            _share(trainer, None)
        else:
            while (prompts := _share(trainer, None)) is not None:
                self._complete(trainer, network, evaluation, prompts, draft_tokens, accepted)
        drafts = Acceptance.of(accepted, draft_tokens).metrics() if draft_tokens else {}
        return found, {f"validation/replies/{name}": value for name, value in drafts.items()}

    def _complete(
        self,
        trainer: Trainer,
        network: Network,
        evaluation: Evaluation,
        prompts: Sequence[Prompt],
        draft_tokens: int,
        accepted: list[int],
    ) -> list[Reply]:
        completions = generate(
            network,
            [Request(tokens=p.tokens, max_new_tokens=self.max_new_tokens, key=p.key) for p in prompts],
            Sampling(temperature=0.0),
            eos_ids=evaluation.end_ids,
            batch_size=BATCH_SIZE,
            draft_tokens=draft_tokens,
            agree=_take_first_process if trainer.world_size > 1 else None,
        )
        replies: list[Reply] = []
        for completion in completions:
            accepted += completion.accepted
            replies.append((completion.tokens, completion.finish == "eos"))
        return replies

    def _show(self, trainer: Trainer, found: Mapping[str, list[list[Attempt]]]) -> None:
        if trainer.logger is None:
            return
        writer = trainer.logger.experiment  # type: ignore[attr-defined]
        for name, problems in found.items():
            for number, (attempt,) in enumerate(problems[: self.shown]):
                indented = "\n".join("    " + row for row in transcript(attempt).splitlines())
                writer.add_text(
                    f"environments/{name}/{number}", f"{verdict(attempt)}\n\n{indented}", trainer.global_step
                )


def measures(found: Mapping[str, list[list[Attempt]]]) -> dict[str, float]:
    """Return the curves of an evaluation: `validation/exact_match/NAME`, their mean, and how many were not judged."""
    judged = {
        name: [a.judgement.reward for attempts in problems for a in attempts if a.judgement.failure is None]
        for name, problems in found.items()
    }
    means = {name: sum(rewards) / len(rewards) for name, rewards in judged.items() if rewards}
    values = {f"{EXACT_MATCH}/{name}": value for name, value in means.items()}
    if means:
        values[EXACT_MATCH] = sum(means.values()) / len(means)
    return values | {"validation/judgement_failures": float(len(_failures(found)))}


def line(step: int, values: Mapping[str, float], failures: Sequence[str]) -> str:
    """Return the console line of an evaluation after `step` steps."""
    parts = [f"{key.removeprefix(EXACT_MATCH + '/')} {v:.1%}" for key, v in values.items() if f"{EXACT_MATCH}/" in key]
    text = f"exact match after step {step}: {values.get(EXACT_MATCH, float('nan')):.1%} ({', '.join(parts)})"
    if (drafted := values.get("validation/replies/acceptance_length")) is not None:
        text += f"; drafts: {drafted:.2f} tokens a verification"
    if failures:
        text += f"; {len(failures)} not judged, for example {failures[0]}"
    return text


def transcript(attempt: Attempt) -> str:
    """Return a dialogue as text: the problem's turns, and the model's as it wrote its last one."""
    turns = [*attempt.problem.messages, *attempt.dialogue[:-1]]
    told = [f"{turn['role']}: {turn['content']}" for turn in turns]
    return "\n".join([*told, f"assistant: {attempt.reply}" + ("" if attempt.ended else " ...")])


def verdict(attempt: Attempt) -> str:
    """Return what became of an attempt in a few words."""
    judgement = attempt.judgement
    if judgement.failure is not None:
        return f"not judged ({judgement.failure})"
    return "right" if judgement.reward == 1 else f"wrong ({judgement.reason}); right is {attempt.problem.answer}"


def _failures(found: Mapping[str, list[list[Attempt]]]) -> list[str]:
    attempts = [attempt for problems in found.values() for attempts in problems for attempt in attempts]
    return [attempt.judgement.failure for attempt in attempts if attempt.judgement.failure is not None]


def _share(trainer: Trainer, value: Any) -> Any:
    """Return what the first process has, on all."""
    if trainer.world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _take_first_process(tokens: torch.Tensor) -> None:
    """Give all processes the tokens of the first: rounding may differ between devices."""
    torch.distributed.broadcast(tokens, src=0)
