"""Speculative decoding with the network's own MTP block: several tokens a forward pass, exactly the plain decoder's.

A round drafts k tokens with the MTP block, runs the network over the newest token and the drafts in one pass, and keeps
the drafts that the network agrees with, and one token more of the network's own (arXiv 2211.17192, 2302.01318):

* greedy: drafts are kept as long as they are the network's most likely token, so the output is that of plain greedy
  decoding. (A pass over several positions adds up in another order than a pass over one. Where the two most likely
  tokens are closer than rounding, 1e-6 of the logits in fp32 and 1e-2 in bf16, either may come out; both are then
  greedy outputs of the network as it is computed.)
* sampled: a draft x drawn from q is kept with probability min(1, p(x) / q(x)), else a token is drawn from what
  max(p - q, 0) leaves, so every token is distributed as p, whatever q is. Drafts are drawn from q rather than taken
  greedily: on the model of `make fit` 76% of those are kept at temperature 0.8, 29% of greedy ones.

The MTP block sees each position of the text once with the network's hidden state: the positions that a round has taken
over come first in the next one, and the last of them gives the first draft. Further drafts feed the block its own
state; they attend to the text and themselves and leave nothing behind. (That drafts attend to earlier drafts, as they
do in vLLM, changed the share of kept ones by less than 0.1% at any depth.)

Shapes: B rows, T positions, k drafts, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.generation.decoding import Decoding, PlainDecoder, Row, Step
from modules.generation.sampling import distribution, draw


class Verdict(NamedTuple):
    """What becomes of drafts."""

    tokens: Tensor
    """int64 [B, k + 1]: the kept drafts, the network's own token, and what has no meaning."""
    accepted: Tensor
    """int64 [B], 0 to k: number of drafts kept."""


def verify_greedily(drafts: Tensor, logits: Tensor) -> Verdict:
    """Keep the drafts that are the network's most likely tokens, up to the first that is not.

    Args:
        drafts: int64 [B, k].
        logits: [B, k + 1, V], of the network after the newest token and after each draft.
    """
    tokens = logits.argmax(-1)
    return Verdict(tokens, (tokens[:, :-1] == drafts).cumprod(1).sum(1))


def verify_by_rejection(drafts: Tensor, proposals: Tensor, targets: Tensor, uniforms: list[list[float]]) -> Verdict:
    """Keep drafts so that all tokens are distributed as the network would draw them (arXiv 2211.17192, algorithm 1).

    Args:
        drafts: int64 [B, k], each drawn from its proposal.
        proposals: fp32 [B, k, V], distribution that each draft was drawn from.
        targets: fp32 [B, k + 1, V], distribution that the network would draw from, see `verify_greedily`.
        uniforms: B lists of k + 1 numbers in [0, 1): one for each draft and one for the network's own token.
    """
    places = drafts.unsqueeze(-1)
    chances = torch.tensor(uniforms, dtype=torch.float64, device=drafts.device)[:, :-1]
    q, p = proposals.gather(-1, places).squeeze(-1), targets[:, :-1].gather(-1, places).squeeze(-1)
    accepted = (chances * q < p).cumprod(1).sum(1)
    row = torch.arange(len(drafts), device=drafts.device)
    target = targets[row, accepted]
    rejected = accepted < drafts.shape[1]
    proposal = proposals[row, accepted.clamp(max=drafts.shape[1] - 1)] * rejected.unsqueeze(1)
    left = (target - proposal).clamp_(min=0)
    # Nothing is left where p and q differ by rounding only.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, target)
    own = draw(left, [numbers[-1] for numbers in uniforms])
    tokens = torch.cat([drafts, own.unsqueeze(1)], 1).scatter(1, accepted.unsqueeze(1), own.unsqueeze(1))
    return Verdict(tokens, accepted)


class SpeculativeDecoder(PlainDecoder):
    """Decodes with `draft_tokens` drafts a round; see `PlainDecoder`.

    What a row draws does not depend on the rows beside it: each round takes 2 k + 1 numbers of its stream.

    Raises:
        ValueError: if the network has no MTP block.
    """

    def __init__(self, network: Network, rows: int, capacity: int, decoding: Decoding) -> None:
        if network.mtp is None:
            raise ValueError("draft_tokens: this model has no MTP block to draft with; leave it at 0")
        # A round may run past the end of a row; what it writes there is cut off.
        capacity += decoding.draft_tokens
        super().__init__(network, rows, capacity, decoding)
        self.mtp_cache = network.new_mtp_cache(
            rows=rows, capacity=capacity, state_dtype=decoding.state_dtype, generator=self.generator
        )
        # The positions that the MTP block has not seen yet: hidden states [B, T, D], the tokens one ahead of them
        # int64 [B, T], and how many of the T each row has.
        self._hidden: Tensor | None = None
        self._ahead: Tensor | None = None
        self._counts: list[int] = []

    def select(self, rows: list[int]) -> None:
        """Keep these rows in this order; a row may come several times."""
        super().select(rows)
        self.mtp_cache.select(rows)
        index = torch.tensor(rows, device=self.device)
        assert self._hidden is not None, "rows are chosen among prompts"
        self._hidden = self._hidden[index]
        if self._ahead is not None:
            self._ahead, self._counts = self._ahead[index], [self._counts[row] for row in rows]

    def step(self, rows: list[Row]) -> Step:
        """Choose the next tokens of each row: one after the prompt, then 1 to k + 1."""
        if self._chosen is None:
            step = super().step(rows)
            assert self._chosen is not None
            self._ahead, self._counts = self._chosen.unsqueeze(1), [1] * len(rows)
            return step
        sampling, length = self.decoding.sampling, self.decoding.draft_tokens
        uniforms = [[row.random.random() for _ in range(0 if sampling.greedy else 2 * length + 1)] for row in rows]
        drafts, proposals = self._draft([numbers[:length] for numbers in uniforms])
        block = torch.cat([self._chosen.unsqueeze(1), drafts], dim=1)
        self._agree(block)
        hidden = self.network(block, cache=self.cache, hold=True).hidden
        logits = self.network.logits(hidden)
        if sampling.greedy:
            verdict = verify_greedily(block[:, 1:], logits)
        else:
            targets = distribution(logits, sampling)
            verdict = verify_by_rejection(
                block[:, 1:], torch.stack(proposals, 1), targets, [numbers[length:] for numbers in uniforms]
            )
        return self._take_over(rows, hidden, logits, verdict)

    def _passed(self, tokens: Tensor, hidden: Tensor, counts: list[int]) -> None:
        """Let the MTP block see a chunk of the prompts; the last position of each row waits for the token ahead."""
        assert self._ahead is None, "a prompt may follow a prompt, not a completion"
        if self._hidden is None:
            tokens, counts = tokens[:, 1:], [count - 1 for count in counts]
        else:
            hidden = torch.cat([self._hidden, hidden], dim=1)
        if max(counts):
            self.network.draft(tokens, hidden[:, :-1], self.mtp_cache, counts)
        self._hidden = _pick(hidden, counts)

    def _draft(self, uniforms: list[list[float]]) -> tuple[Tensor, list[Tensor]]:
        """Return drafts int64 [B, k] and the distributions [B, V] that they were drawn from, none of greedy ones."""
        assert self._hidden is not None
        assert self._ahead is not None
        network, sampling = self.network, self.decoding.sampling
        counts, width = self._counts, self._ahead.shape[1]
        whole = min(counts) == width
        hidden = network.draft(self._ahead, self._hidden, self.mtp_cache, None if whole else counts)
        hidden = hidden[:, -1:] if whole else _pick(hidden, [count - 1 for count in counts])
        drafts: list[Tensor] = []
        proposals: list[Tensor] = []
        for place in range(self.decoding.draft_tokens):
            if drafts:
                hidden = network.draft(drafts[-1].unsqueeze(1), hidden, self.mtp_cache, hold=True)
            logits = network.logits(hidden[:, 0])
            if sampling.greedy:
                drafts.append(logits.argmax(-1))
            else:
                proposals.append(distribution(logits, sampling))
                drafts.append(draw(proposals[-1], [numbers[place] for numbers in uniforms]))
        return torch.stack(drafts, dim=1), proposals

    def _take_over(self, rows: list[Row], hidden: Tensor, logits: Tensor, verdict: Verdict) -> Step:
        result = torch.cat([verdict.tokens, verdict.accepted.unsqueeze(1)], dim=1)
        self._agree(result)
        listed = result.tolist()
        counts = [1 + numbers[-1] for numbers in listed]
        self.cache.advance(counts)
        for row, count in zip(rows, counts, strict=True):
            row.accepted.append(count - 1)
        width = max(counts)
        self._ahead, self._hidden, self._counts = result[:, :width], hidden[:, :width], counts
        self._chosen = result[:, 0] if width == 1 else result.gather(1, result[:, -1:])[:, 0]
        logprobs: list[list[float]] = [[] for _ in rows]
        if self.decoding.logprobs:
            wide = logits.log_softmax(-1).gather(-1, result[:, :-1].unsqueeze(-1)).squeeze(-1).tolist()
            logprobs = [numbers[:count] for numbers, count in zip(wide, counts, strict=True)]
        return Step([numbers[:count] for numbers, count in zip(listed, counts, strict=True)], logprobs)


def _pick(tensor: Tensor, places: list[int]) -> Tensor:
    """Return [B, 1, D]: one position of each row of [B, T, D]."""
    index = torch.tensor(places, device=tensor.device)
    return tensor[torch.arange(len(places), device=tensor.device), index].unsqueeze(1)
