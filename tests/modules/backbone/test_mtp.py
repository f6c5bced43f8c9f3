"""The MTP chain equals a second statement of it, made of transformers' layers and plain torch.

Depth k at position i: h_k = norm(block(eh_proj[enorm(emb(t_{i+k})); hnorm(h_{k-1})])), h_0 after the final norm, the
same block at every depth. The reference keeps only the positions that have a token k ahead.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from modules.backbone.model import Network
from modules.errors import UserError
from tests.modules.helpers import assert_close, assert_same_gradients, gradients, make_network, tiny_config


@pytest.fixture(scope="module")
def transformers_module():
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def their_layers(transformers_module, network: Network, prefix: str, pattern: str, norm: str):
    """Their model without head, with the weights of our layers under `prefix` and the norm named `norm`."""
    fields = dataclasses.asdict(network.config) | {"hybrid_override_pattern": pattern}
    del fields["num_nextn_predict_layers"], fields["mtp_hybrid_override_pattern"]
    model = transformers_module.NemotronHModel(transformers_module.NemotronHConfig(**fields))
    state = {}
    for name, tensor in network.state_dict().items():
        if name.startswith(prefix) and any(f".{part}." in name for part in ("mixer", "norm")):
            name = name.removeprefix(prefix)
            state[name.removesuffix(".weight") if ".experts." in name else name] = tensor
    state["norm_f.weight"] = network.state_dict()[norm]
    state["embeddings.weight"] = network.backbone.embeddings.weight.detach()
    model.load_state_dict(state)
    for layer in model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def chain(transformers_module, network: Network, tokens: Tensor, depths: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """States of depths 1 to M at the positions that have them, and the reference's own gradient leaves by our names."""
    config = network.config
    last = len(config.mtp_hybrid_override_pattern) - 1
    backbone = their_layers(
        transformers_module, network, "backbone.", config.hybrid_override_pattern, "backbone.norm_f.weight"
    )
    block = their_layers(
        transformers_module,
        network,
        "mtp.",
        config.mtp_hybrid_override_pattern,
        f"mtp.layers.{last}.final_layernorm.weight",
    )
    names = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    own = {f"mtp.layers.0.{name}": network.state_dict()[f"mtp.layers.0.{name}"].clone() for name in names}
    enorm, hnorm, eh_proj = (tensor.requires_grad_() for tensor in own.values())
    hidden = backbone(tokens, use_cache=False).last_hidden_state
    states = []
    for depth in range(1, depths + 1):
        ahead = backbone.embeddings(tokens[:, depth:])
        before = hidden[:, : ahead.shape[1]]
        parts = rms_norm(ahead, enorm, config.layer_norm_epsilon), rms_norm(before, hnorm, config.layer_norm_epsilon)
        x = torch.cat(parts, dim=-1) @ eh_proj.T
        hidden = block(inputs_embeds=x, use_cache=False).last_hidden_state
        states.append(hidden)
    leaves = own
    for prefix, model in (("backbone.", backbone), ("mtp.", block)):
        for name, parameter in model.named_parameters():
            leaves[prefix + name + (".weight" if ".experts." in name else "")] = parameter
    leaves[f"mtp.layers.{last}.final_layernorm.weight"] = leaves.pop("mtp.norm_f.weight")
    del leaves["mtp.embeddings.weight"]
    return states, leaves


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["*E", "-", "ME*"])
def test_states_and_gradients_equal_a_second_statement(transformers_module, pattern: str, depths: int) -> None:
    config = tiny_config(hybrid_override_pattern="ME*", mtp_hybrid_override_pattern=pattern)
    network = make_network(config, seed=depths)
    tokens = torch.randint(0, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(depths))
    expected, leaves = chain(transformers_module, network, tokens, depths)
    actual = [state[:, :-k] for k, state in enumerate(network(tokens, mtp_depths=depths).mtp_hidden, 1)]
    assert len(actual) == depths
    for depth, (state, reference) in enumerate(zip(actual, expected, strict=True), start=1):
        assert_close(state, reference, 1e-4, f"depth {depth}")

    probes = [torch.randn(state.shape, generator=torch.Generator().manual_seed(8)) for state in expected]
    sum((state * probe).sum() for state, probe in zip(actual, probes, strict=True)).backward()
    sum((state * probe).sum() for state, probe in zip(expected, probes, strict=True)).backward()
    ours = {name: gradient for name, gradient in gradients(network).items() if name != "lm_head.weight"}
    theirs = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    assert_same_gradients(ours, theirs, 1e-3)


def test_the_main_path_does_not_depend_on_mtp() -> None:
    network = make_network(tiny_config())
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, with_mtp = network(tokens), network(tokens, mtp_depths=3)
    assert torch.equal(alone.hidden, with_mtp.hidden)
    assert alone.mtp_hidden == []


def test_every_depth_is_routed_on_its_own() -> None:
    network = make_network(tiny_config())
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routings = [network(tokens, mtp_depths=depths).router for depths in range(4)]
    assert [len(routing) for routing in routings] == [2, 3, 3, 3]
    assert len(network.routers()) == 3
    for depths in (1, 2, 3):
        counts, probabilities = routings[depths][-1].counts, routings[depths][-1].probabilities
        assert counts.shape[0] == 2 * depths, "a row for each row and depth"
        assert (counts.sum(1) == 9 * 2).all()
        assert_close(probabilities.sum(-1), torch.ones(2 * depths, 9), 1e-5)
        assert torch.equal(counts[: 2 * depths - 2], routings[depths - 1][-1].counts[:] if depths > 1 else counts[:0])
        assert torch.equal(routings[depths][0].counts, routings[0][0].counts), "the backbone's are counted once"


def test_more_depths_than_tokens() -> None:
    network = make_network(tiny_config())
    output = network(torch.tensor([[3, 4]]), torch.zeros(1, 2, dtype=torch.int32), mtp_depths=3)
    assert all(state.isfinite().all() for state in output.mtp_hidden)


def test_depths_without_a_block_are_a_users_mistake() -> None:
    network = make_network(tiny_config(num_nextn_predict_layers=0))
    with pytest.raises(UserError, match="num_nextn_predict_layers"):
        network(torch.tensor([[3, 4]]), mtp_depths=1)
