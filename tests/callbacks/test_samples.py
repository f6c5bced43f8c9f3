"""Drafts that are counted while samples are written."""

import pytest
import torch

from callbacks.samples import COUNTED_PROMPTS, Samples
from callbacks.validation import Validation
from modules.batch import PackedBatch
from modules.generation.acceptance import Acceptance
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from tests.callbacks.helpers import run
from tests.modules.helpers import ListData, document_ids, make_module, packed_batch, tiny_config

CONFIG = tiny_config(vocab_size=6)


class PromptData(ListData):
    """Has 20 prompts, and letters for tokens."""

    def sample_prompts(self, count: int, length: int) -> list[list[int]]:
        source = torch.Generator().manual_seed(0)
        return torch.randint(0, 6, (20, length), generator=source).tolist()[:count]

    def decode(self, tokens: list[int]) -> str:
        return "".join("abcdef"[token] for token in tokens)


def batch(depths: int, seed: int = 0) -> PackedBatch:
    return packed_batch(document_ids([16]), 6, seed)


def trained(depths: int, samples: Samples, **changes):
    config = tiny_config(vocab_size=6, **changes)
    module = make_module(config, mtp_depths=depths)
    data = PromptData([batch(depths)], vocab_size=6, validation=[batch(depths, 1)])
    points = run(module, data, Validation(every_n_steps=1), samples)
    return module.network, data, {name: value for values in points.values() for name, value in values.items()}


def test_counts_the_drafts_of_many_prompts_and_shows_few() -> None:
    samples = Samples(prompts=2, prompt_tokens=5, max_new_tokens=12, temperature=0.8, draft_tokens=2, seed=4)
    network, data, logged = trained(1, samples)
    prompts = data.sample_prompts(COUNTED_PROMPTS, 5)
    work = [Request(tokens=prompt, max_new_tokens=12, key=(number,)) for number, prompt in enumerate(prompts)]
    found = list(generate(network, work, Sampling(temperature=0.8, seed=4), decode=data.decode, draft_tokens=2))
    expected = Acceptance.of([count for one in found for count in one.accepted], 2)
    assert expected.verifications > 60
    assert len(expected.metrics()) == 3
    for name, value in expected.metrics().items():
        assert logged[f"validation/{name}"] == pytest.approx(value)
    assert samples.texts == [
        (data.decode(prompt), one.text) for prompt, one in zip(prompts[:2], found[:2], strict=True)
    ]


@pytest.mark.parametrize(
    ("depths", "draft_tokens", "changes"),
    [(1, 0, {}), (0, 3, {"num_nextn_predict_layers": 0})],
    ids=["off", "no MTP block"],
)
def test_without_drafts_there_are_samples_only(depths: int, draft_tokens: int, changes: dict[str, int]) -> None:
    samples = Samples(prompts=2, prompt_tokens=5, max_new_tokens=6, draft_tokens=draft_tokens)
    _, _, logged = trained(depths, samples, **changes)
    assert [len(text) for _, text in samples.texts] == [6, 6]
    assert "validation/loss" in logged
    assert not [name for name in logged if "accept" in name]
