"""Zeros of gradients and decayed channels, on weights made by hand."""

import pytest
import torch
from torch import nn

from callbacks.step import curve_name
from callbacks.weights import (
    DECAYED,
    Weight,
    channel_squares,
    count_gradient,
    decayed_share,
    expert_states,
    gradient_metrics,
    product_weights,
    split_gradient,
)
from modules.ops.native.quantization import Options
from modules.precision.nvfp4 import quantize_dequantize
from tests.modules.helpers import make_network, tiny_config


def with_gradient(*shape: int, zeros: tuple = ()) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    for place in zeros:
        parameter.grad[place] = 0.0
    return parameter


def test_zeros_are_counted_where_there_were_tokens() -> None:
    plain = count_gradient(with_gradient(4, 6, zeros=[(0, 1), (3, slice(None))]), stack=False)
    assert plain.tolist() == [[17], [24]]
    assert split_gradient(plain, None).tolist() == [7, 24, 0]
    stack = count_gradient(with_gradient(3, 4, 6, zeros=[(0, 1, 2), 1]), stack=True)
    assert stack.tolist() == [[23, 0, 24], [24, 24, 24]]
    assert split_gradient(stack, torch.tensor([5, 0, 7])).tolist() == [1, 48, 24]
    assert split_gradient(stack, torch.tensor([5, 1, 7])).tolist() == [25, 72, 0]


def test_what_is_not_finite_is_no_zero() -> None:
    parameter = with_gradient(2, 3)
    parameter.grad[0] = torch.tensor([torch.nan, torch.inf, 0.0])
    assert count_gradient(parameter, stack=False)[0].item() == 5


def test_an_expert_with_rows_that_a_gradient_reached_should_have_one() -> None:
    stack = count_gradient(with_gradient(4, 2, 3, zeros=[0, 1, (2, 0)]), stack=True)
    assert expert_states(stack, torch.tensor([5, 0, 7, 0])).tolist() == [-1, 0, 1, 1]


def test_shares_of_all_weights_leave_out_experts_without_a_token() -> None:
    curves = gradient_metrics({"a": (1.0, 4.0, 0.0), "b": (8.0, 16.0, 80.0), "c": (0.0, 0.0, 100.0)})
    assert curves == pytest.approx(
        {
            "gradients/zero_share/a": 0.25,
            "gradients/zero_share/b": 0.5,
            "gradients/zero_share/worst": 0.5,
            "gradients/zero_share/mean": 0.375,
            "gradients/zero_share/all": 9 / 20,
            "gradients/zero_share/without_tokens": 180 / 200,
        }
    )


@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize("name", ["mixer.up_proj", "mixer.down_proj"])
def test_decayed_channels_are_rows_of_the_up_and_columns_of_the_down_projection(name: str, experts: int | None) -> None:
    inner, outer = 20, 8
    up = torch.full((experts or 1, inner, outer), 2.0)
    up[0, 3], up[0, 7], up[-1, 11] = 0.0, 2.0 * DECAYED * 0.99, 2.0 * DECAYED * 1.01
    if experts:
        up[1] = 0.0  # an expert that decayed as a whole
    data = up if "up" in name else up.transpose(1, 2)
    weight = Weight(name, nn.Parameter(data if experts else data[0]), 0 if experts else None)
    squares = channel_squares(weight)
    assert squares.shape == ((experts, inner) if experts else (inner,))
    assert decayed_share(squares).item() == pytest.approx((2 + (inner if experts else 0)) / (inner * (experts or 1)))


def test_a_weight_of_zeros_has_decayed() -> None:
    assert decayed_share(torch.zeros(8)).item() == 1.0


def test_nvfp4_leaves_nothing_of_a_decayed_channel_beside_others() -> None:
    """What the constant is derived from."""
    tile = torch.ones(16, 16)
    tile[3], tile[5] = DECAYED, DECAYED * 1.01
    left = quantize_dequantize(tile, Options(tiles=True))
    assert not left[3].any()
    assert left[5].all()


def test_the_weights_are_those_of_products_each_stack_with_its_router() -> None:
    network = make_network(tiny_config())
    network.backbone.layers[2].mixer.q_proj.weight.requires_grad_(False)
    found = {weight.name: weight for weight in product_weights(network)}
    by_hand = {
        name.removesuffix(".weight")
        for name, parameter in network.named_parameters()
        if name.endswith(("_proj.weight", "lm_head.weight")) and name != "backbone.layers.2.mixer.q_proj.weight"
    }
    assert set(found) == by_hand
    routers = {name: weight.router for name, weight in found.items() if weight.router is not None}
    assert routers == {
        f"{layer}.mixer.experts.{kind}_proj": number
        for number, layer in enumerate(("backbone.layers.1", "backbone.layers.5", "mtp.layers.1"))
        for kind in ("up", "down")
    }


def test_curves_are_named_as_layers_are_elsewhere() -> None:
    assert curve_name("backbone.layers.3.mixer.in_proj") == "layer_03.in_proj"
    assert curve_name("backbone.layers.12.mixer.experts.up_proj") == "layer_12.experts.up_proj"
    assert curve_name("mtp.layers.0.eh_proj") == "mtp_0.eh_proj"
    assert curve_name("lm_head") == "lm_head"
