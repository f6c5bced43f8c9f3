"""Rows of chat tokens that a base model never learnt, which fine-tuning starts anew.

A base model has the tokens that turns are made of in its vocabulary, but often in none of its text. Their rows hold an
accident: zeros, initial values that weight decay has shrunk, or in the head what pushed all unseen tokens down, far
below anything that is ever sampled. They cannot be told by their size alone, since no two families start alike. But a
tokenizer has more tokens that no text ever had, reserved ones; a row that was never learnt looks as those do: it is as
near to their middle as they are, and the rows that were learnt are far from it. Where that does not tell the two apart
clearly, only rows of zeros count: a row that was learnt is never touched.

A new row is a draw of the rows that were learnt, their mean plus noise. The mean keeps the logit of a new token among
the others' (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021; transformers'
`mean_resizing` does it too). In the embedding the noise is as large as theirs, so that the new tokens differ from each
other and are as long as any; in the head a tenth of that.
Shapes: V vocabulary, D hidden.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.backbone.initialization import local_part, local_rows
from modules.backbone.model import Network
from modules.checkpoints.names import EMBEDDING, HEAD
from modules.checkpoints.source import ModelFolder
from modules.precision.adapter import seed_of

NOISE = {EMBEDDING: 1.0, HEAD: 0.1}
"""Standard deviation of what is added to the mean, over that of the rows that were learnt."""
NOTHING = 0.01
"""A row whose norm is less than this share of the median row's was never learnt."""
REFERENCES = 8
"""Reserved tokens that a comparison takes."""
DEVIATIONS = 8.0
"""Standard deviations above the middle distance of the reserved rows that still count as theirs."""
APART = 1.5
"""How many times as far as that the learnt rows must be, in the middle."""
Found = dict[str, list[str]]
"""Name of the tensor -> tokens whose row there was never learnt."""


def find_unlearnt(source: ModelFolder, tokens: Mapping[str, int], reserved: Sequence[int]) -> Found:
    """Return which rows of chat tokens a MODEL never learnt.

    Args:
        source: the MODEL.
        tokens: ids of the chat tokens by name.
        reserved: ids of tokens that are in no text.

    Returns:
        Name of the tensor -> names of the tokens, in their order; tensors without one are left out.
    """
    found = {}
    seen = torch.ones(0, dtype=torch.bool)
    for name in tensors(source):
        rows = source.read(name).float()
        nothing, unlike = _judge(rows, reserved)
        if name == HEAD:  # a token that was read was in the text: that it was never written there says nothing
            unlike |= seen
        seen = unlike & ~nothing
        found[name] = [token for token, index in tokens.items() if not seen[index]]
    return {name: names for name, names in found.items() if names}


@torch.no_grad()
def start_anew(
    network: Network, source: ModelFolder, tokens: Mapping[str, int], reserved: Sequence[int], found: Found, seed: int
) -> None:
    """Fill the rows of a network that `find_unlearnt` names, which was filled from the same MODEL.

    Args:
        network: sharded along dimension 0 or not; each rank draws all new rows and keeps those it holds.
        source: the MODEL.
        tokens: see `find_unlearnt`.
        reserved: see there.
        found: what it returned.
        seed: the run's; a row depends on it, on the tensor and on the token's id.
    """
    for name, names in found.items():
        rows = source.read(name).float()
        nothing, unlike = _judge(rows, reserved)
        learnt = unlike & ~nothing
        learnt[[tokens[token] for token in names]] = False
        spread, mean = torch.std_mean(rows[learnt], dim=0)
        parameter = network.get_parameter(name)
        local, held = local_part(parameter), local_rows(parameter)
        for token in names:
            generator = torch.Generator().manual_seed(seed_of(seed, name, tokens[token]))
            row = mean + NOISE[name] * spread * torch.randn(mean.shape, generator=generator)
            if tokens[token] in held:
                local[held.index(tokens[token])].copy_(row)


def tensors(source: ModelFolder) -> list[str]:
    """Return the tensors that have a row for each token."""
    return [EMBEDDING] if source.config.tie_word_embeddings else [EMBEDDING, HEAD]


def _judge(rows: Tensor, reserved: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return bool [V]: the rows of [V, D] that hold nothing, and those that are unlike the reserved ones."""
    norms = rows.norm(dim=1)
    nothing, unlike = norms <= NOTHING * norms.median(), torch.ones(len(rows), dtype=torch.bool)
    if len(reserved) < REFERENCES:
        return nothing, unlike
    distances = (rows - rows[[*reserved]].median(dim=0).values).norm(dim=1)
    own = distances[[*reserved]]
    middle = own.median()
    limit = middle + DEVIATIONS * 1.4826 * (own - middle).abs().median()  # robust: some may be in use after all
    far = distances > limit
    if far.any() and distances[far].median() > APART * limit:
        unlike = far
    return nothing, unlike
