"""Memory counted on the meta device against what torch's MemTracker counts over real steps on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from app.planning.memory import measure_step
from modules.optim.clipping import clip_gradients
from modules.pretraining import Pretraining
from tests.modules.helpers import BF16, FP32, document_ids, make_module, make_network, packed_batch, tiny_config

WIDE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "chunk_size": 32,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "moe_latent_size": 32,
}
CASES = {
    "all_letters": ({}, FP32, False, [[256]]),
    "all_letters_bf16": ({}, BF16, False, [[256]]),
    "checkpointed": ({}, FP32, True, [[256]]),
    "checkpointed_bf16": ({}, BF16, True, [[256], [256]]),
    "rows": ({}, FP32, False, [[64]] * 4),
    "documents": ({}, BF16, False, [[100, 28], [1, 60, 67], [128]]),
    "documents_checkpointed": ({}, FP32, True, [[100, 28], [1, 60, 67], [128]]),
    "odd_length": ({}, FP32, False, [[331]]),
    "mamba": ({"hybrid_override_pattern": "MMMM", "mtp_hybrid_override_pattern": "M"}, BF16, False, [[200]]),
    "attention": ({"hybrid_override_pattern": "****", "mtp_hybrid_override_pattern": "*"}, FP32, False, [[300]]),
    "mlp": ({"hybrid_override_pattern": "----", "mtp_hybrid_override_pattern": "-"}, FP32, True, [[100]]),
    "mixture": ({"hybrid_override_pattern": "EEEE", "mtp_hybrid_override_pattern": "E"}, BF16, True, [[100]]),
    "no_latent": ({"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0}, FP32, False, [[128]]),
    "unaligned_experts": ({"moe_latent_size": 30, "moe_intermediate_size": 41}, BF16, False, [[96]]),
    "tied": ({"tie_word_embeddings": True}, FP32, False, [[64]]),
    "large_vocabulary": ({"vocab_size": 30_000}, FP32, True, [[400]]),
    "short": ({}, FP32, False, [[8]]),
}


def stage(case: str) -> tuple[Pretraining, list[list[int]], tuple]:
    changes, recipe, checkpointed, documents = CASES[case]
    config = tiny_config(**WIDE | changes)
    module = make_module(config, precision=list(recipe), activation_checkpointing=checkpointed)
    return module, documents, recipe


def run_steps(module: Pretraining, documents: list[list[int]], recipe: tuple, accumulates: bool) -> list[int]:
    """Peaks of MemTracker over the first real step and over the first two, in bytes."""
    config = module.backbone_config
    network = make_network(config, recipe).train()
    if module.activation_checkpointing:
        network.checkpoint_activations()
    module.network = network
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)
    optimizer = module.configure_optimizers()
    batch = packed_batch(document_ids(*documents), config.vocab_size, module.mtp_depths)
    tracker, peaks = MemTracker(), []
    tracker.track_external(network, *vars(batch).values())
    with tracker:
        for _ in range(2):
            for micro_batch in range(1 + accumulates):
                loss = module.micro_batch_loss(batch).loss
                if micro_batch == 0:
                    optimizer.zero_grad()  # after the forward pass, as Lightning does
                loss.backward()
                del loss
                tracker.reset_mod_stats()
            clip_gradients(network.parameters(), 1.0)
            optimizer.step()
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    return peaks


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_mem_tracker_counts(case: str) -> None:
    module, documents, recipe = stage(case)
    planned = measure_step(module, documents)
    first, later = run_steps(module, documents, recipe, accumulates=False)
    print(case, planned.first_peak / first, planned.peak / later)
    assert planned.first_peak == pytest.approx(first, rel=0.02)
    assert planned.peak == pytest.approx(later, rel=0.02)


@pytest.mark.parametrize("case", ["all_letters", "checkpointed_bf16", "large_vocabulary"])
def test_accumulation_keeps_the_gradients(case: str) -> None:
    module, documents, recipe = stage(case)
    planned = measure_step(module, documents, accumulates=True)
    first, later = run_steps(module, documents, recipe, accumulates=True)
    print(case, planned.first_peak / first, planned.peak / later)
    assert planned.first_peak == pytest.approx(first, rel=0.02)
    assert planned.peak == pytest.approx(later, rel=0.02)
