"""Sampling continuations by a full forward pass per token: simple, exact, for short samples of small models.

Shapes: B prompts, T positions, V vocabulary.
"""

import torch
from torch import Tensor

from modules.backbone.model import Network


@torch.no_grad()
def sample(
    network: Network,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Continue prompts.

    Args:
        network: the network; its mode (training or not) is left as it is.
        prompts: token ids of each prompt; at least one token each.
        max_new_tokens: tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token.
        generator: CPU generator of the draws, used in row order.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: if a prompt is empty or the temperature is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} must not be negative")
    if not all(prompts):
        raise ValueError("prompt: must hold at least one token")
    device = next(network.parameters()).device
    added: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        texts = [prompt + new for prompt, new in zip(prompts, added, strict=True)]
        # Rows end at different positions; what follows a row's end cannot influence it (the network is causal).
        width = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        hidden = network(tokens).hidden
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        logits = network.logits(hidden[torch.arange(len(texts), device=device), last])
        for new, token in zip(added, _choose(logits, temperature, generator), strict=True):
            new.append(token)
    return added


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.float().cpu() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).flatten().tolist()
