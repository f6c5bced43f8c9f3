"""One training step of ours against transformers' `NemotronHForCausalLM`: the same weights, rows and precision.

    python -m benchmarks.training_step [--length 512] [--rows 4] [--rounds 9] [--threads 1 2] [--formats fp32 bf16]

A step is forward, loss, backward, clipping and fused AdamW, with fp32 master weights on both sides; "bf16" is our bf16
recipe against transformers under autocast, and against transformers with weights and optimiser in bf16 (which trains
worse and saves the casts). Steps alternate, so that a busy machine slows all alike; the ratio is the median of the
ratios of neighbouring steps. Then: the step's matrix products over what large products reach on this machine, the
operations that cost most, and the peak memory of each side, measured in processes of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize
from modules.backbone.model import Network
from modules.batch import PackedBatch, count_targets, next_token_labels
from modules.objectives.next_token import next_token_loss
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.precision.recipe import PrecisionRule, apply

CONFIG = BackboneConfig(
    vocab_size=8192,
    hidden_size=256,
    hybrid_override_pattern="MEMEM*EME",
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=1,
    chunk_size=64,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=192,
    moe_latent_size=128,
    moe_shared_expert_intermediate_size=384,
    routed_scaling_factor=2.5,
)
"""A hybrid of 14 million parameters with the proportions of the published family."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
OURS, AUTOCAST, PURE = "ours", "transformers", "transformers, bf16 weights"
Step = Callable[[], Tensor]


def our_network(precision: str) -> Network:
    """Return our network with its initial weights, every matrix product in `precision`."""
    network = Network(CONFIG)
    apply([PrecisionRule(pattern="*", format=precision)], network)  # type: ignore[arg-type]
    initialize(network, seed=0)
    return network


def our_step(precision: str, tokens: Tensor) -> Step:
    """Return a function that trains one step and returns the loss before it."""
    network = our_network(precision)
    optimizer = AdamW(parameter_groups(network, OPTIMIZER.weight_decay), OPTIMIZER)
    ids = torch.zeros_like(tokens, dtype=torch.int32)
    labels = next_token_labels(tokens, ids)
    batch = PackedBatch(tokens=tokens, labels=labels, document_ids=ids, counts=count_targets(labels, ids, 0))

    def step() -> Tensor:
        loss = next_token_loss(network, batch, batch.counts, 0, 0.0).loss
        loss.backward()
        clip_gradients(network.parameters(), OPTIMIZER.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def their_model() -> Any:  # noqa: ANN401 (transformers is untyped)
    """Return transformers' model with the weights of `our_network`."""
    import transformers

    transformers.logging.set_verbosity_error()
    fields = {
        name: value for name, value in dataclasses.asdict(CONFIG).items() if not name.startswith(("num_next", "mtp_"))
    }
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**fields))
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    state = {
        name.replace("backbone.", "model.", 1): tensor for name, tensor in our_network("fp32").state_dict().items()
    }
    state = {name.removesuffix(".weight") if ".experts." in name else name: value for name, value in state.items()}
    model.load_state_dict(state)
    return model.train()


def their_step(precision: str, tokens: Tensor, pure: bool = False) -> Step:
    """Return a function that trains one step as a user of transformers writes it, and returns the loss before it."""
    model = their_model()
    if pure:
        model = model.bfloat16()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    free = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": free, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": OPTIMIZER.learning_rate, "betas": OPTIMIZER.betas, "eps": OPTIMIZER.epsilon}
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    autocast = precision == "bf16" and not pure

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
