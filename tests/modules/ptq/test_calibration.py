"""Maxima of inputs, keys and values against plain loops over texts run one by one."""

import pytest
import torch
import torch.nn.functional as F

from modules.errors import UserError
from modules.ptq.calibration import calibrate, pack
from modules.ptq.layers import find_groups
from tests.modules.helpers import BF16, make_network, tiny_config

ROWS = [
    torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (23, 5, 40, 2, 31)
]
TOKENS = sum(map(len, ROWS))


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config()).eval()


def names(network, mtp: bool = True) -> list[str]:
    modules = [layer.module for group in find_groups(network.config) for layer in group.layers]
    return [name for name in modules if mtp or not name.startswith("mtp.")]


def calibrated(network, modules=None, batch_tokens: int = 64):
    return calibrate(
        network,
        ROWS,
        names(network) if modules is None else modules,
        keys_and_values=modules is None,
        batch_tokens=batch_tokens,
        advance=lambda _: None,
    )


@torch.no_grad()
def by_hand(network) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """Inputs [n, I] of each module's calls, one text at a time; and the end rows of the calls with experts."""
    inputs: dict[str, list[torch.Tensor]] = {}
    ends: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name in names(network):

        def see(module, arguments, name=name):
            inputs.setdefault(name, []).append(arguments[0].flatten(0, -2))
            if len(arguments) > 1:
                ends.setdefault(name, []).append(arguments[1])

        hooks.append(network.get_submodule(name).register_forward_pre_hook(see))
    for row in ROWS:
        network(torch.tensor([row]), mtp_depths=1)
    for hook in hooks:
        hook.remove()
    return inputs, ends


def as_served(value: torch.Tensor) -> float:
    return float(value.bfloat16())


@pytest.mark.parametrize("batch_tokens", [17, 64, 8192])
def test_maxima_and_counts_are_those_of_the_texts_one_by_one(network, batch_tokens: int):
    """Texts that are cut lose what came before the cut, so only counts are the same then."""
    found = calibrated(network, batch_tokens=batch_tokens)
    inputs, ends = by_hand(network)
    assert found.inputs.keys() == inputs.keys()
    for name, calls in inputs.items():
        if name not in ends:
            if batch_tokens > 40:
                expected = as_served(max(call.abs().max() for call in calls))
                assert float(found.inputs[name]) == pytest.approx(expected, rel=2**-7), name
            continue
        experts = network.config.n_routed_experts
        tokens, maxima = [0] * experts, [0.0] * experts
        for call, end in zip(calls, ends[name], strict=True):
            start = 0
            for expert, stop in enumerate(end.tolist()):
                tokens[expert] += stop - start
                maxima[expert] = max([maxima[expert], *call[start:stop].abs().flatten().tolist()])
                start = stop
        assert found.tokens[name].sum() == TOKENS * network.config.num_experts_per_tok
        if batch_tokens > 40:
            assert found.tokens[name].tolist() == tokens
            expected = [as_served(torch.tensor(value)) for value in maxima]
            assert found.inputs[name].tolist() == pytest.approx(expected, rel=2**-7), name


@torch.no_grad()
def test_keys_and_values_are_those_of_attention(network):
    found = calibrated(network)
    assert found.keys.keys() == found.values.keys() == {"backbone.layers.2.mixer", "mtp.layers.0.mixer"}
    inputs, _ = by_hand(network)
    for name in found.keys:
        mixer = network.get_submodule(name)
        for projection, maxima in ((mixer.k_proj, found.keys), (mixer.v_proj, found.values)):
            states = [F.linear(call, projection.weight) for call in inputs[f"{name}.k_proj"]]
            expected = as_served(max(state.abs().max() for state in states))
            assert float(maxima[name]) == pytest.approx(expected, rel=2**-7)


def test_maxima_are_numbers_of_bf16(network):
    found = calibrated(network)
    for maxima in (found.inputs, found.keys, found.values):
        for amax in maxima.values():
            assert torch.equal(amax, amax.bfloat16().float())


def test_only_what_is_asked_for_is_looked_at_and_the_network_stays_as_it_is(network):
    found = calibrated(network, ["backbone.layers.0.mixer.in_proj"])
    assert found.inputs.keys() == {"backbone.layers.0.mixer.in_proj"}
    assert found.keys == found.values == found.tokens == {}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_a_network_in_bf16_is_calibrated_too():
    found = calibrated(make_network(tiny_config(), BF16).eval())
    assert all(amax.dtype == torch.float32 for amax in found.inputs.values())


def test_texts_are_packed_in_order_without_padding_and_long_ones_are_cut():
    packed = list(pack(ROWS, 32))
    assert [batch.tokens.numel() for batch in packed] == [28, 32, 10, 31]
    assert [batch.document_ids.unique_consecutive().tolist() for batch in packed] == [[0, 1], [0], [0, 1], [0]]
    assert torch.cat([batch.tokens[0] for batch in packed]).tolist() == [token for row in ROWS for token in row]


def test_progress_counts_every_token(network):
    seen: list[int] = []
    calibrate(network, ROWS, names(network), keys_and_values=True, batch_tokens=32, advance=seen.append)
    assert sum(seen) == TOKENS


def test_numbers_that_are_not_finite_are_named():
    network = make_network(tiny_config()).eval()
    with torch.no_grad():
        network.get_parameter("backbone.layers.1.mixer.fc1_latent_proj.weight")[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"backbone\.layers\.1\.mixer\.experts\.up_proj gets numbers that are not"):
        calibrated(network)
