"""Training in NVFP4: it learns, it repeats and resumes bit by bit, and formats switch when they should."""

import pytest
import torch

from modules.batch import Progress
from modules.precision.recipe import FormatSwitch, PrecisionConfig
from tests.modules.helpers import (
    BF16,
    Collector,
    ListData,
    fit,
    make_module,
    network_state,
    row_batches,
    tiny_config,
)

NVFP4 = PrecisionConfig(bf16_tail=0)
TOKENS = 16
"""Of a micro-batch."""


def train(recipe: PrecisionConfig, batches: int = 6, window: int = 2, seed: int = 1, **changes):
    torch.manual_seed(seed)
    module, collector = make_module(precision=recipe, **changes), Collector()
    fit(module, ListData(row_batches(batches), window=window), callbacks=[collector])
    return module, collector.steps


def same(first, second) -> bool:
    states = network_state(first), network_state(second)
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_run_repeats_bit_by_bit_and_another_seed_rounds_otherwise() -> None:
    runs = [train(NVFP4, seed=seed)[0] for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_every_micro_batch_draws_anew() -> None:
    """The same rows twice in a step: with the same random numbers their gradients would only add up."""
    twice = [row_batches(1)[0]] * 2
    torch.manual_seed(1)
    module, seen = make_module(precision=NVFP4), []
    weights = "backbone.layers.0.mixer.in_proj.weight"

    class Gradients(Collector):
        def on_after_backward(self, trainer, pl_module) -> None:
            seen.append(pl_module.built_network.get_parameter(weights).grad.clone())

    fit(module, ListData(twice, window=2), callbacks=[Gradients()])
    assert not torch.allclose(seen[1], 2 * seen[0], rtol=1e-3, atol=0)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, checkpointed = (train(NVFP4, activation_checkpointing=value)[0] for value in (False, True))
    assert same(plain, checkpointed)


def test_nvfp4_learns_nearly_as_well_as_bf16() -> None:
    config = tiny_config(hybrid_override_pattern="M-*-", hidden_size=64, intermediate_size=96)
    batch = row_batches(1)[0]
    last = {}
    for name, recipe in (("bf16", BF16), ("nvfp4", NVFP4)):
        module, collector = make_module(config, precision=recipe), Collector()
        fit(module, ListData([batch] * 40), callbacks=[collector])
        last[name] = collector.steps[-1]["training/next_token_loss"]
        assert last[name] < 0.5 * collector.steps[0]["training/next_token_loss"]
    assert last["nvfp4"] == pytest.approx(last["bf16"], rel=0.15)


def test_formats_switch_at_their_tokens() -> None:
    """Equal until the switch, other numbers from the very step on; all in bf16 from there is not what bf16 is."""
    switched = PrecisionConfig(bf16_tail=0, switches=[FormatSwitch(at_tokens=2 * 2 * TOKENS, products="forward")])
    _, plain = train(NVFP4, batches=8)
    module, other = train(switched, batches=8)
    equal = [first == second for first, second in zip(plain, other, strict=True)]
    assert equal[:2] == [True, True]
    assert not equal[2]
    scheme = module.built_network.get_submodule("backbone.layers.0.mixer.in_proj").product
    assert tuple(scheme.products) == ("bf16", "nvfp4", "nvfp4")


def test_after_a_switch_to_bf16_a_step_is_a_bf16_step() -> None:
    _, plain = train(BF16, batches=2, window=1)
    _, switched = train(PrecisionConfig(bf16_tail=0, switches=[FormatSwitch(at_tokens=0)]), batches=2, window=1)
    assert plain == switched


def test_a_loaded_checkpoint_has_the_formats_of_its_tokens() -> None:
    """`validate` loads a checkpoint and trains nothing."""
    switched = PrecisionConfig(bf16_tail=0, switches=[FormatSwitch(at_tokens=TOKENS)])
    module, _ = train(switched, batches=2, window=1)
    scheme = module.built_network.get_submodule("backbone.layers.0.mixer.in_proj").product
    for step, chosen in ((0, "nvfp4"), (1, "bf16")):
        module.data.progress = Progress(steps=step, tokens=step * TOKENS, samples=step)
        module.on_validation_start()
        assert scheme.products.fprop == chosen
