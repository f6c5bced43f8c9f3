"""Speculative decoding with the network's own MTP block: several tokens a forward pass, exactly the plain decoder's.

A round drafts k tokens with the MTP block, runs the network over the newest token and the drafts in one pass, and keeps
the drafts that the network agrees with, and one token more of the network's own (arXiv 2211.17192, 2302.01318):

* greedy: drafts are kept as long as they are the network's most likely tokens, so the output is that of plain greedy
  decoding. (A pass over several positions may add up in another order than a pass over one. Where the two most likely
  tokens are closer than rounding, some 1e-6 of a logit in fp32 and 1e-2 in bf16, either may come out.)
* sampled: a draft x drawn from q is kept with probability min(1, p(x) / q(x)), else a token is drawn from what
  max(p - q, 0) leaves, so every token is distributed as p, whatever q is. Drafts are drawn from q and not taken
  greedily: on the model of `make fit`, 76% of those are kept at temperature 0.8, 29% of the most likely ones.

The MTP block sees each position of the text once with the network's hidden state: the positions that a round has taken
over come first in the next one, and the last of them gives the first draft. Further drafts feed the block its own
state; they attend to the text and themselves and leave nothing behind. (With drafts that attend to earlier drafts, as
in vLLM, the share of kept ones was the same to 0.1% up to the fourth draft.)

Most of a draft's cost is the head, so drafts are looked for among part of the vocabulary (as in arXiv 2502.14856): the
lowest ids, for a BPE numbers its tokens as it merges them, frequent ones first. Of 8192 ids the first 2048 kept as many
greedy drafts as all (65.7% against 65.9%) and 69% against 76% of sampled ones, for a quarter of the product.

One row on a CPU runs its rounds in C (`modules.generation.native_round`): in Python, the way to the operations is more
than half of a round, and nothing would be gained. There a second position costs a third of a pass, so one draft is best
for that model: 1.2 times plain decoding greedily, 1.4 times at temperature 1 (benchmarks/generation.py).

Shapes: B rows, T positions, k drafts, D hidden, V vocabulary, N drafted vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation.decoding import Decoding, PlainDecoder, Row, Step
from modules.generation.native_round import NativeRounds
from modules.generation.runner import Runner
from modules.generation.sampling import distribution, draw
from modules.ops import native

DRAFTED_SHARE = 4
"""Drafts come from the first V / DRAFTED_SHARE ids ..."""
DRAFTED_LEAST = 2048
"""... and from no fewer than these, where V has as many."""


class Verdict(NamedTuple):
    """What becomes of drafts."""

    tokens: Tensor
    """int64 [B, k + 1]: the kept drafts, then the network's own token, then what has no meaning."""
    accepted: Tensor
    """int64 [B]: number of drafts kept, 0 to k."""


def verify_greedily(drafts: Tensor, logits: Tensor) -> Verdict:
    """Keep the drafts that are the network's most likely tokens, up to the first that is not.

    Args:
        drafts: int64 [B, k].
        logits: [B, k + 1, V], of the network after the newest token and after each draft.
    """
    tokens = native.largest(logits)
    return Verdict(tokens, (tokens[:, :-1] == drafts).cumprod(1).sum(1))


def verify_by_rejection(drafts: Tensor, proposals: Tensor, targets: Tensor, uniforms: list[list[float]]) -> Verdict:
    """Keep drafts so that all tokens are distributed as the network would draw them (arXiv 2211.17192, algorithm 1).

    Args:
        drafts: int64 [B, k], each drawn from its proposal.
        proposals: fp32 [B, k, N], the distribution that each draft was drawn from; that of ids from N on is 0.
        targets: fp32 [B, k + 1, V], the distribution that the network would draw from, see `verify_greedily`.
        uniforms: B lists of k + 1 numbers in [0, 1): one for each draft, the last for the network's own token.
    """
    length, drafted = proposals.shape[1:]
    chances = torch.tensor(uniforms, dtype=torch.float64, device=drafts.device)[:, :length]
    p, q = (table[:, :length].gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for table in (targets, proposals))
    accepted = (chances * q < p).cumprod(1).sum(1)
    row = torch.arange(len(drafts), device=drafts.device)
    left = targets[row, accepted]  # a copy
    rejected = proposals[row, accepted.clamp(max=length - 1)] * (accepted < length).unsqueeze(1)
    left[:, :drafted].sub_(rejected).clamp_(min=0)
    # Nothing is left where p and q differ by rounding only.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, targets[row, accepted])
    own = draw(left, [numbers[-1] for numbers in uniforms]).unsqueeze(1)
    return Verdict(torch.cat([drafts, own], dim=1).scatter_(1, accepted.unsqueeze(1), own), accepted)


class SpeculativeDecoder(PlainDecoder):
    """Decodes with `draft_tokens` drafts a round; see `PlainDecoder`.

    What a row draws does not depend on the rows beside it: each round takes 2 k + 1 numbers of its stream. They are
    other numbers than those of the plain decoder, so a seed gives other samples, of the same distribution.

    Raises:
        UserError: if the network has no MTP block.
    """

    def __init__(self, network: Network, rows: int, capacity: int, decoding: Decoding) -> None:
        if network.mtp is None:
            raise UserError("draft_tokens: this model has no MTP block to draft with; leave it at 0")
        # A round may run past the end of a row; what it writes there is cut off.
        capacity += decoding.draft_tokens
        super().__init__(network, rows, capacity, decoding)
        self.mtp_runner = Runner(network, rows, capacity, decoding.state_dtype, self.generator, mtp=True)
        vocab_size = network.config.vocab_size
        self._drafted = min(vocab_size, max(DRAFTED_LEAST, vocab_size // DRAFTED_SHARE))
        # The positions that the MTP block has not seen yet: hidden states [B, T, D], the tokens one ahead of them
        # int64 [B, T], and how many of the T each row has. After a prompt its last position waits for its token.
        self._hidden: Tensor | None = None
        self._ahead: Tensor | None = None
        self._counts: list[int] = []
        self._native = self._native_rounds()

    def _native_rounds(self) -> NativeRounds | None:
        """Return the C code for the rounds of one row; None: it does not apply."""
        decoding, sampling, head = self.decoding, self.decoding.sampling, self.network.lm_head
        layers, mtp_layers, length = self.runner.native, self.mtp_runner.native, decoding.draft_tokens
        portable = not (sampling.greedy or sampling.whole) or decoding.logprobs or decoding.agree is not None
        if portable or not layers or not mtp_layers or not NativeRounds.fits(head, layers, mtp_layers, length):
            return None
        temperature = 0.0 if sampling.greedy else sampling.temperature
        return NativeRounds(head, layers, mtp_layers, length, self._drafted, temperature)

    def select(self, rows: list[int]) -> None:
        """Keep these rows in this order; a row may come several times."""
        if self._native is not None and self._native.seen:
            self._leave_native(self._native)
        super().select(rows)
        self.mtp_runner.cache.select(rows)
        index = torch.tensor(rows, device=self.device)
        assert self._hidden is not None, "rows have a prompt"
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
        numbers_of_round = 0 if sampling.greedy else 2 * length + 1
        uniforms = [[row.random.random() for _ in range(numbers_of_round)] for row in rows]
        if self._native is not None and len(rows) == 1:
            return self._run_native(self._native, rows[0], uniforms[0])
        drafts, proposals = self._draft(uniforms)
        block = torch.cat([self._chosen.unsqueeze(1), *drafts], dim=1)
        self._agree(block)
        hidden = self.runner.run(block, hold=True)
        logits = self.network.logits(hidden)
        if sampling.greedy:
            verdict = verify_greedily(block[:, 1:], logits)
        else:
            targets = distribution(logits, sampling)
            left = [numbers[length:] for numbers in uniforms]
            verdict = verify_by_rejection(block[:, 1:], torch.cat(proposals, dim=1), targets, left)
        return self._take_over(rows, hidden, logits, verdict)

    def _run_native(self, rounds: NativeRounds, row: Row, uniforms: list[float]) -> Step:
        if not rounds.seen:
            assert self._hidden is not None
            assert self._ahead is not None
            seen = self._counts[0]
            rounds.begin(self._ahead[0, :seen].tolist(), self._hidden[0, :seen])
        length = self.decoding.draft_tokens
        rounds.draft(uniforms[:length])
        row.accepted.append(rounds.verify(uniforms[length:]))
        return Step([rounds.tokens], [[]])

    def _leave_native(self, rounds: NativeRounds) -> None:
        """Go on in Python with what the newest round left."""
        self._ahead = torch.tensor([rounds.tokens])
        self._hidden = rounds.states.unsqueeze(0).clone()
        self._counts, self._chosen = [rounds.seen], self._ahead[:, -1]
        rounds.seen = 0

    def _passed(self, tokens: Tensor, hidden: Tensor, counts: list[int]) -> None:
        """Let the MTP block see a chunk of the prompts; the last position of each row waits for the token ahead."""
        assert self._ahead is None, "a prompt may follow a prompt, not a completion"
        if self._hidden is None:
            tokens, counts = tokens[:, 1:], [count - 1 for count in counts]
        else:
            hidden = torch.cat([self._hidden, hidden], dim=1)
        if max(counts):
            self.mtp_runner.run(tokens, hidden[:, :-1], counts, whole=False)
        self._hidden = _pick(hidden, counts)

    def _draft(self, uniforms: list[list[float]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return k drafts int64 [B, 1] and the distributions [B, 1, N] they were drawn from, none of greedy ones."""
        network, sampling = self.network, self.decoding.sampling
        drafts: list[Tensor] = []
        proposals: list[Tensor] = []
        hidden = self._catch_up()
        for place in range(self.decoding.draft_tokens):
            if drafts:
                hidden = self.mtp_runner.run(drafts[-1], hidden, hold=True)
            logits = network.logits(hidden, self._drafted)
            if sampling.greedy:
                drafts.append(native.largest(logits))
            else:
                proposals.append(distribution(logits, sampling))
                drafts.append(draw(proposals[-1][:, 0], [numbers[place] for numbers in uniforms]).unsqueeze(1))
        return drafts, proposals

    def _catch_up(self) -> Tensor:
        """Let the MTP block see what it has not; return its state [B, 1, D] at the last position of each row."""
        assert self._hidden is not None
        assert self._ahead is not None
        if min(self._counts) == self._ahead.shape[1]:
            return self.mtp_runner.run(self._ahead, self._hidden)[:, -1:]
        hidden = self.mtp_runner.run(self._ahead, self._hidden, hold=True)
        self.mtp_runner.advance(self._counts)
        return _pick(hidden, [count - 1 for count in self._counts])

    def _take_over(self, rows: list[Row], hidden: Tensor, logits: Tensor, verdict: Verdict) -> Step:
        result = torch.cat([verdict.tokens, verdict.accepted.unsqueeze(1)], dim=1)
        self._agree(result)
        listed = result.tolist()
        counts = [numbers[-1] + 1 for numbers in listed]
        self.runner.advance(counts)
        for row, count in zip(rows, counts, strict=True):
            row.accepted.append(count - 1)
        width = max(counts)
        self._ahead, self._hidden, self._counts = result[:, :width], hidden[:, :width], counts
        whole = min(counts) == width
        self._chosen = result[:, width - 1] if whole else result.gather(1, result[:, -1:]).squeeze(1)
        logprobs: list[list[float]] = [[] for _ in rows]
        if self.decoding.logprobs:
            table = logits.log_softmax(-1).gather(-1, result[:, :-1].unsqueeze(-1)).squeeze(-1).tolist()
            logprobs = [numbers[:count] for numbers, count in zip(table, counts, strict=True)]
        return Step([numbers[:count] for numbers, count in zip(listed, counts, strict=True)], logprobs)


def _pick(tensor: Tensor, places: list[int]) -> Tensor:
    """Return [B, 1, D]: one position of each row of [B, T, D]."""
    index = torch.tensor(places, device=tensor.device)
    return tensor[torch.arange(len(places), device=tensor.device), index].unsqueeze(1)
