"""Logits and gradients equal transformers' `NemotronHForCausalLM` for the same weights, in fp32."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.objectives.per_token import cross_entropy
from tests.modules.helpers import assert_close, assert_same_gradients, gradients, make_network, tiny_config

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3

NOT_IN_THEIRS = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern")
UNUSED_SHARED_SIZE = 4
"""Theirs cannot be without a shared expert; one with a zero output matrix is the same function."""

CASES: dict[str, dict] = {
    "latent": {},
    "standard mixture": {"moe_latent_size": None},
    "no shared expert": {"moe_shared_expert_intermediate_size": 0},
    "standard mixture, no shared expert": {"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0},
    "one group": {"n_groups": 1},
    "four groups": {"n_groups": 4},
    "top 1": {"num_experts_per_tok": 1, "hybrid_override_pattern": "EE"},
    "top 3": {"num_experts_per_tok": 3},
    "all experts": {"num_experts_per_tok": 8},
    "expert groups 4 choose 2": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "expert groups 2 choose 1": {"n_group": 2, "topk_group": 1},
    "expert groups 2 choose 2": {"n_group": 2, "topk_group": 2},
    "raw top-k weights": {"norm_topk_prob": False},
    "raw top 1 weight": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "convolution of 2": {"conv_kernel": 2},
    "convolution of 3, no bias": {"conv_kernel": 3, "use_conv_bias": False},
    "tied head": {"tie_word_embeddings": True},
    "odd widths": {
        "hidden_size": 30,
        "moe_intermediate_size": 13,
        "moe_latent_size": 11,
        "moe_shared_expert_intermediate_size": 7,
        "intermediate_size": 9,
        "head_dim": 5,
        "ssm_state_size": 3,
        "mamba_head_dim": 5,
        "vocab_size": 61,
    },
    "one key head": {"num_key_value_heads": 1, "head_dim": 16},
    "as many key heads as query heads": {"num_key_value_heads": 4, "head_dim": 4},
    "one chunk holds all": {"chunk_size": 64},
    "chunk of 1": {"chunk_size": 1},
    "only Mamba": {"hybrid_override_pattern": "MM"},
    "only attention": {"hybrid_override_pattern": "**"},
    "only MLP": {"hybrid_override_pattern": "--"},
    "large epsilon": {"layer_norm_epsilon": 0.1},
}


@pytest.fixture(scope="module")
def transformers_module():
    """transformers is slow to import: once, and without its advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def their_model(transformers_module, config: BackboneConfig):
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_THEIRS}
    fields["moe_shared_expert_intermediate_size"] = config.moe_shared_expert_intermediate_size or UNUSED_SHARED_SIZE
    model = transformers_module.NemotronHForCausalLM(transformers_module.NemotronHConfig(**fields))
    model.set_experts_implementation("eager")  # their grouped one takes no odd widths
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    return model


def their_name(name: str) -> str:
    name = name.replace("backbone.", "model.", 1)
    return name.removesuffix(".weight") if ".experts." in name else name


def load_ours_into_theirs(ours: Network, theirs) -> None:
    state = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    for name in missing:
        assert "shared_experts" in name
        if "down_proj" in name:
            torch.nn.init.zeros_(theirs.get_parameter(name))


def their_gradients(theirs, names: list[str]) -> dict[str, Tensor]:
    grads = gradients(theirs)
    return {name: grads[their_name(name)] for name in names}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_transformers(transformers_module, changes: dict) -> None:
    config = tiny_config(num_nextn_predict_layers=0, **changes)
    ours, theirs = make_network(config), their_model(transformers_module, config)
    load_ours_into_theirs(ours, theirs)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (2, 29), generator=generator)
    labels = torch.randint(0, config.vocab_size, (2, 29), generator=generator)

    expected = theirs(tokens, use_cache=False).logits
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    hidden = ours(tokens).hidden
    assert_close(ours.logits(hidden), expected, LOGITS_TOLERANCE, "logits")

    # The loss the training takes, with the gradient worked out chunk by chunk.
    token_weights = torch.full((labels.numel(),), 1 / labels.numel())
    inputs = {"labels": labels.flatten(), "token_weights": token_weights}
    loss, _ = ours.lm_head(hidden.flatten(0, 1), cross_entropy, **inputs)
    loss.backward()
    names = [name for name, _ in ours.named_parameters()]
    assert_same_gradients(gradients(ours), their_gradients(theirs, names), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 63])
def test_every_length_equals_transformers(transformers_module, length: int) -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    ours, theirs = make_network(config, seed=length), their_model(transformers_module, config)
    load_ours_into_theirs(ours, theirs)
    tokens = torch.randint(0, config.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        assert_close(ours.logits(ours(tokens).hidden), theirs(tokens, use_cache=False).logits, LOGITS_TOLERANCE)


def test_the_router_bias_of_the_cases_changes_the_choice() -> None:
    """Guards the cases above: with a bias that decided nothing they would not see it used wrongly."""
    network = make_network(tiny_config(num_nextn_predict_layers=0))
    tokens = torch.randint(0, 64, (2, 29), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        biased = network(tokens).router[0].counts
        network.routers()[0].e_score_correction_bias.zero_()
        assert not torch.equal(biased, network(tokens).router[0].counts)
