"""What dtype each computation runs in, read off the operations themselves while the network runs.

Matrix products run in their module's format; the residual stream has the embedding's; norms, routing, step sizes,
decays and every stored tensor stay fp32.
"""

import dataclasses
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.backbone.latent_moe import Experts
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.backbone.normalization import GatedGroupRMSNorm, RMSNorm
from modules.backbone.router import Router
from modules.objectives.next_token import next_token_loss
from modules.precision.linear import FormattedModule
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import (
    BF16,
    FP32,
    counts_of,
    document_ids,
    make_network,
    packed_batch,
    relative_error,
    tiny_config,
)

MIXED = PrecisionConfig(
    recipe="bf16",
    rules=[
        PrecisionRule(pattern="backbone.embeddings", format="fp32"),
        PrecisionRule(pattern="lm_head", format="fp32"),
        PrecisionRule(pattern="*.layers.0.mixer.*", format="fp32"),
        PrecisionRule(pattern="*.shared_experts.up_proj", format="fp32"),
    ],
)
RECIPES = {"fp32": FP32, "bf16": BF16, "mixed": MIXED}

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "multiply_rows")
CASTS = ("_to_copy", "copy_")


class Recorder(TorchDispatchMode):
    """Notes, per module, the operations run inside it with the dtypes of their floating operands and results."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.stack = ["outside"]
        self.operations: dict[str, list[tuple[str, list[torch.dtype], list[torch.dtype]]]] = defaultdict(list)
        self.results: dict[str, torch.dtype] = {}
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda _, __, name=name: self.stack.append(name))
            module.register_forward_hook(lambda _, __, out, name=name: self.leave(name, out))

    def leave(self, name: str, out: object) -> None:
        assert self.stack.pop() == name
        first = tree_leaves(out)[0]
        if isinstance(first, Tensor):
            self.results[name] = first.dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operation = func.__name__.split(".")[0]
        self.operations[self.stack[-1]].append((operation, floating(args), floating(result)))
        return result


def floating(tree: object) -> list[torch.dtype]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf.dtype for leaf in leaves if leaf.is_floating_point() and leaf.ndim > 0]


def run(recipe) -> tuple[Network, Recorder, Tensor]:
    network = make_network(tiny_config(), recipe)
    batch = packed_batch(document_ids([5, 11], [16]), 64)
    recorder = Recorder(network)
    with recorder:
        loss = next_token_loss(network, batch, counts_of(batch, 1), 1, 0.3).loss
    loss.backward()
    return network, recorder, loss


def modules_of(network: Network, kind: type | tuple) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]
    assert found
    return found


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_products_run_in_their_modules_format(recipe) -> None:
    network, recorder, _ = run(recipe)
    for name, module in modules_of(network, FormattedModule):
        products = [record for record in recorder.operations[name] if record[0] in PRODUCTS]
        expected = torch.bfloat16 if module.format == "bf16" else torch.float32
        if name != "backbone.embeddings":
            assert products, f"{name} multiplied nothing"
        for operation, operands, _ in products:
            assert set(operands) == {expected}, f"{operation} in {name}"


@pytest.mark.parametrize(
    ("recipe", "expected"), [(FP32, torch.float32), (BF16, torch.bfloat16), (MIXED, torch.float32)]
)
def test_the_residual_stream_has_the_embeddings_dtype(recipe, expected: torch.dtype) -> None:
    network, recorder, _ = run(recipe)
    for name, _ in modules_of(network, Layer):
        assert recorder.results[name] == expected, name
    for name in ("backbone.embeddings", "backbone.norm_f", "mtp"):
        assert recorder.results[name] == expected, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_norms_and_routers_compute_in_fp32(recipe) -> None:
    network, recorder, _ = run(recipe)
    for name, _ in modules_of(network, (RMSNorm, GatedGroupRMSNorm, Router)):
        computed = [
            (operation, results)
            for operation, _, results in recorder.operations[name]
            if operation not in CASTS and results and operation not in ("view", "_unsafe_view", "detach", "alias")
        ]
        assert computed, name
        for operation, results in computed:
            assert set(results) == {torch.float32}, f"{operation} in {name}"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_step_sizes_and_decays_are_fp32(recipe) -> None:
    network, recorder, _ = run(recipe)
    mixers = [name for name, layer in modules_of(network, Layer) if layer.letter == "M"]
    for name in mixers:
        records = recorder.operations[f"{name}.mixer"]
        sensitive = [record for record in records if record[0].strip("_") in ("softplus", "exp", "exp2", "cumsum")]
        assert {"softplus", "exp"} <= {operation.strip("_") for operation, *_ in sensitive}
        for operation, operands, results in sensitive:
            exact = {torch.float32, torch.float64} if operation == "cumsum" else {torch.float32}
            assert set(operands) == set(results) <= exact, f"{operation} in {name}"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_what_is_stored_is_fp32(recipe) -> None:
    network, _, loss = run(recipe)
    assert loss.dtype == torch.float32
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32, name
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("recipe", [BF16, MIXED], ids=["bf16", "mixed"])
def test_lower_formats_are_near_fp32_and_not_equal(recipe) -> None:
    config = tiny_config(hybrid_override_pattern="M*-M")  # no routers: a flipped choice is no rounding error
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(recipe, rules=[rule for rule in recipe.rules if "shared" not in rule.pattern])
    with torch.no_grad():
        full, low = (make_network(config, rules) for rules in (FP32, recipe))
        error = relative_error(low.logits(low(tokens).hidden), full.logits(full(tokens).hidden))
    assert 1e-4 < error < 5e-2
    assert low.logits(low(tokens).hidden).dtype == torch.float32


def test_sharding_units_cover_each_parameter_once_in_the_dtype_it_computes_in() -> None:
    """What a strategy gathers: outer units hold what is left of them after the inner ones."""
    network = make_network(tiny_config(), MIXED)
    owner: dict[int, torch.dtype] = {}
    for unit in network.sharding_units():
        for module in unit.modules:
            for parameter in module.parameters():
                owner.setdefault(id(parameter), unit.dtype)
    assert network.sharding_units()[-1].modules == [network]
    for name, module in network.named_modules():
        expected = module.compute_dtype if isinstance(module, FormattedModule) else torch.float32
        for parameter in module.parameters(recurse=False):
            assert owner[id(parameter)] == expected, name


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "super"])
def test_routed_experts_are_a_unit_of_their_own_in_every_format(recipe: str) -> None:
    """Along the axis of the experts each rank has its own: nothing else may be laid out with them."""
    with torch.device("meta"):
        network = Network(tiny_config())
    assign_formats(PrecisionConfig(recipe=recipe), network)
    routed = {part for module in network.modules() if isinstance(module, Experts) for part in module.children()}
    found = [unit for unit in network.sharding_units() if routed.intersection(unit.modules)]
    assert {part for unit in found for part in unit.modules} == routed
    assert {unit.axes for unit in found} == {("shard", "context")}
