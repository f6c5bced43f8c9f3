"""A MODEL as the language model of lm-evaluation-harness.

It gives the numbers that the harness's own `hf` model gives for the exported weights: texts begin with BOS only where
the tokenizer says so, the names of special tokens in them become those tokens (chat templates need it), a context and
its continuation are encoded together and then split, a text without context follows the prefix token, and completions
are text without special tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from datamodules.conversations.template import ChatTemplate
from datamodules.progress import ProgressBar
from datamodules.tokenizer import Tokenizer, special_names
from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from modules.generation.scoring import BATCH_TOKENS, score

MAX_GEN_TOKS = 256
"""Tokens to generate where a task names no number: the harness's default."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
"""Generation settings of transformers that we do not have, with the values that change nothing."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


class HarnessModel(TemplateLM):
    """Scores and generates what tasks ask for.

    Args:
        network: the network, in evaluation mode.
        tokenizer: its tokenizer.
        eos_ids: tokens that end a completion.
        prefix_token: id that stands before a text without context.
        template: the chat template; None: chat templates are not used.
        batch_size: completions that are written together.
        batch_tokens: positions in a forward pass.
        max_length: tokens that the network may see at once; None: any number.
        seed: seed of sampled completions.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        prefix_token: int,
        template: ChatTemplate | None = None,
        batch_size: int = 16,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._network, self._tokenizer, self._template = network, tokenizer, template
        self._eos_ids = tuple(eos_ids)
        if template is not None and (end := template.turn_end()) is not None:
            self._eos_ids = tuple(dict.fromkeys([*self._eos_ids, end]))
        self._prefix_token = prefix_token
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._max_length, self._seed = max_length, seed
        self._beginning = tokenizer.encode_prompt("")

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context."""
        return self._prefix_token

    @property
    def tokenizer_name(self) -> str:
        """What names the tokenizer, for the harness's caches."""
        return self._tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without generation prompt the last turn stays open."""
        assert self._template is not None
        text = self._template.render(chat_history, answer=add_generation_prompt)
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, with BOS where the tokenizer puts one."""
        ids = self._tokenizer.encode(string, special_tokens=True)
        if add_special_tokens is False or ids[: len(self._beginning)] == self._beginning:
            return ids
        return self._beginning + ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each text, its first token after the prefix token included."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length or len(tokens) or 1, 1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += logprob
        return sums

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the completion of each context, up to a stop string."""
        groups: dict[tuple[Sampling, tuple[str, ...]], list[tuple[int, Request]]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, settings = cast("tuple[str, dict[str, Any]]", request.args)
            sampling, stop, count = read_settings(settings, self._seed)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if self._max_length is not None:
                tokens = tokens[-max(self._max_length - count, 1) :]
            groups[sampling, stop].append((number, Request(tokens=tokens, max_new_tokens=count, key=(number,))))
        texts = [""] * len(requests)
        with ProgressBar("generating", len(requests), unit="completions") as progress:
            for (sampling, stop), numbered in groups.items():
                completions = generate(
                    self._network,
                    [request for _, request in numbered],
                    sampling,
                    eos_ids=[*self._eos_ids, *self._special(stop).values()],
                    decode=self._decode,
                    stop=[text for text in stop if text not in self._special(stop)],
                    batch_size=self._batch_size,
                    prefill_tokens=self._batch_tokens,
                )
                for (number, _), completion in zip(numbered, completions, strict=True):
                    assert completion.text is not None
                    texts[number] = completion.text
                    progress.advance(1)
        return texts

    def _special(self, stop: Sequence[str]) -> dict[str, int]:
        """Return the ids of the stop strings that are special tokens: they are not part of the text."""
        ids = {text: self._tokenizer.encode(text, special_tokens=True) for text in stop}
        return {
            text: only[0] for text, only in ids.items() if len(only) == 1 and only[0] in self._tokenizer.special_ids
        }

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(index for index in ids if index not in self._tokenizer.special_ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        most = None if self._max_length is None else self._max_length + 1
        rows = [(context + continuation)[-most if most else 0 :] for context, continuation in pairs]
        found = [(0.0, True)] * len(rows)
        with ProgressBar("scoring", sum(map(len, rows)), unit="tokens") as progress:
            for index, scores in score(self._network, rows, batch_tokens=self._batch_tokens):
                start = max(len(rows[index]) - 1 - len(pairs[index][1]), 0)
                logprob, greedy = scores.logprobs[start:].double().sum(), scores.greedy[start:].all()
                found[index] = float(logprob), bool(greedy)
                progress.advance(len(rows[index]))
        return found


def read_settings(settings: dict[str, Any], seed: int) -> tuple[Sampling, tuple[str, ...], int]:
    """Read a task's generation_kwargs: sampling, stop strings, tokens to generate at most.

    Raises:
        UserError: a key is unknown to us and would change what is generated.
    """
    rest: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
    stop, count = rest.pop("until"), rest.pop("max_gen_toks")
    warm = rest.pop("do_sample")
    temperature = float(rest.pop("temperature", 1.0))
    sampling = Sampling(
        temperature=temperature if warm else 0.0,
        top_k=int(rest.pop("top_k", 0) or 0),
        top_p=float(rest.pop("top_p", 1.0) or 1.0),
        min_p=float(rest.pop("min_p", 0.0) or 0.0),
        seed=seed,
    )
    for key, value in rest.items():
        if NEUTRAL.get(key) != value:
            raise UserError(f"tasks: generation_kwargs.{key}: {value!r} is not supported; remove it from the task")
    return sampling, tuple(filter(None, stop)), count


def prefix_id(tokenizer: Tokenizer, name: str | None) -> int:
    """Return the id of the token before a text without context.

    Args:
        tokenizer: the tokenizer.
        name: the token's name; None: BOS, or the end-of-text token if there is no BOS.

    Raises:
        UserError: the name is not that of one token.
    """
    chosen = special_names(tokenizer.folder).get("bos_token") if name is None else name
    if chosen is None:
        return tokenizer.eos_id
    ids = tokenizer.encode(chosen, special_tokens=True)
    if len(ids) != 1:
        raise UserError(f"prefix_token: {chosen!r} is {len(ids)} tokens; name a single one, like </s>")
    return ids[0]
