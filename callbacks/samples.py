"""What the model writes by now: continuations of fixed prompts, as text in TensorBoard and on the console at the end.

A loss says little to a person; three lines of text show at once whether a model has learnt its language.
A model with an MTP block drafts while it writes, so the same pass shows what its drafts are worth: on the model's own
text and at the samples' temperature, as `generate` would find it. A model that has learnt no more than which tokens are
frequent keeps many drafts, and so does one that repeats itself.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.step import StepCallback, data, stage
from callbacks.text import quote
from modules.backbone.model import Network
from modules.batch import SamplePrompts
from modules.errors import UserError
from modules.generation.acceptance import Acceptance
from modules.generation.engine import Completion, Request, generate
from modules.generation.sampling import Sampling

LONGEST_PROMPT = 256
"""Tokens that a prepared corpus keeps of the beginnings of held-out documents."""
BRACKETS = "prompt \u27e6what the model writes\u27e7"
COUNTED_PROMPTS = 16
"""Prompts to continue where drafts are counted, shown or not: a share from 3 of them would be off by 5 points."""


class Samples(StepCallback):
    """Continues the data's sample prompts at each validation.

    Args:
        prompts: Number of prompts (>= 1), the beginnings of held-out documents.
        prompt_tokens: Length of a prompt in tokens, 1 to 256.
        max_new_tokens: Length of a continuation in tokens; 0 switches sampling off.
        temperature: Divides the logits; 0 takes the most likely token.
        draft_tokens: Tokens that the MTP block, where there is one, drafts for each verification; 0: none.
        seed: Seed of the draws; the same at each validation, so that texts differ by the model alone.
    """

    def __init__(
        self,
        prompts: int = 3,
        prompt_tokens: int = 32,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        draft_tokens: int = 3,
        seed: int = 0,
    ) -> None:
        for key, value, least in (
            ("prompts", prompts, 1),
            ("prompt_tokens", prompt_tokens, 1),
            ("max_new_tokens", max_new_tokens, 0),
            ("draft_tokens", draft_tokens, 0),
        ):
            if value < least:
                raise UserError(f"samples.{key} is {value}: it must be at least {least}")
        if prompt_tokens > LONGEST_PROMPT:
            raise UserError(f"samples.prompt_tokens is {prompt_tokens}: it must be at most {LONGEST_PROMPT}")
        if not temperature >= 0:
            raise UserError(f"samples.temperature is {temperature}: it must not be negative")
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.draft_tokens = draft_tokens
        self.seed = seed
        self.texts: list[tuple[str, str]] = []
        """(prompt, continuation) of the newest validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample and log; all ranks take part, as the weights are sharded."""
        source, network = data(trainer), stage(pl_module).built_network
        if not self.max_new_tokens or trainer.state.fn != "fit" or not isinstance(source, SamplePrompts):
            return
        draft_tokens = self.draft_tokens if network.mtp is not None else 0
        wanted = max(self.prompts, COUNTED_PROMPTS) if draft_tokens else self.prompts
        prompts = source.sample_prompts(wanted, self.prompt_tokens)
        if not prompts:
            return
        completions = self._complete(trainer, network, source, prompts, draft_tokens)
        self.texts = [
            (source.decode(prompt), completion.text or "")
            for prompt, completion in zip(prompts[: self.prompts], completions, strict=False)
        ]
        if draft_tokens:
            accepted = [count for completion in completions for count in completion.accepted]
            metrics = Acceptance.of(accepted, draft_tokens).metrics()
            stage(pl_module).metrics.record_all({f"validation/{name}": value for name, value in metrics.items()})
        if trainer.is_global_zero and trainer.logger is not None:
            writer = trainer.logger.experiment  # type: ignore[attr-defined]
            for index, (prompt, continuation) in enumerate(self.texts):
                writer.add_text(f"samples/{index}", markdown(prompt, continuation), trainer.global_step)

    def _complete(
        self, trainer: Trainer, network: Network, source: SamplePrompts, prompts: list[list[int]], draft_tokens: int
    ) -> list[Completion]:
        requests = [
            Request(tokens=prompt, max_new_tokens=self.max_new_tokens, key=(number,))
            for number, prompt in enumerate(prompts)
        ]
        completions = generate(
            network,
            requests,
            Sampling(temperature=self.temperature, seed=self.seed),
            decode=source.decode,
            draft_tokens=draft_tokens,
            agree=_take_first_process if trainer.world_size > 1 else None,
        )
        return list(completions)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the newest texts."""
        if trainer.is_global_zero:
            for number, (prompt, continuation) in enumerate(self.texts, start=1):
                print(f"--- sample {number} of {len(self.texts)}: {BRACKETS}", flush=True)
                print(quote(bracketed(prompt, continuation)), flush=True)


def _take_first_process(tokens: Tensor) -> None:
    """Give all processes the tokens of the first: rounding may differ between devices."""
    torch.distributed.broadcast(tokens, src=0)


def markdown(prompt: str, continuation: str) -> str:
    """Return a text for TensorBoard, which renders Markdown: code blocks keep line breaks and spaces."""
    indented = "\n".join("    " + line for line in bracketed(prompt, continuation).splitlines())
    return f"{BRACKETS}\n\n{indented}"


def bracketed(prompt: str, continuation: str) -> str:
    """Return a prompt and, in brackets, what the model goes on with."""
    return f"{prompt}\u27e6{continuation}\u27e7"
