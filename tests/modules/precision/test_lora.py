"""Adapters against merged weights: results, gradients, what trains, how they are drawn and what dropout leaves out."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.backbone.initialization import initialize_adapters
from modules.backbone.model import Network
from modules.errors import UserError
from modules.objectives.next_token import next_token_loss
from modules.optim.adamw import parameter_groups
from modules.precision.linear import GroupedLinear, Linear
from modules.precision.lora import LoRAConfig, adapters, attach, freeze_base, reseed
from modules.precision.recipe import assign_formats
from modules.precision.table import adapter_lines
from tests.modules.adapted import make_adapted, merged
from tests.modules.helpers import BF16, assert_close, counts_of, document_ids, packed_batch, tiny_config

IDS = document_ids([16, 8], [24])


def loss_of(network: Network, seed: int = 0):
    batch = packed_batch(IDS, 64, seed)
    return next_token_loss(network, batch, counts_of(batch, 2), 2, 0.3).loss


def frozen(network: Network) -> Network:
    freeze_base(network)
    return network


def test_results_are_those_of_the_merged_weights():
    network = make_adapted()
    tokens = packed_batch(IDS, 64).tokens
    found, wanted = network(tokens, IDS, 2), merged(network)(tokens, IDS, 2)
    assert_close(found.hidden, wanted.hidden, 1e-5, "hidden")
    for own, other in zip(found.mtp_hidden, wanted.mtp_hidden, strict=True):
        assert_close(own, other, 1e-5, "hidden of the MTP block")
    assert len(list(adapters(network))) == sum(isinstance(m, Linear | GroupedLinear) for m in network.modules()) - 1


def test_gradients_are_those_of_the_merged_weights_and_of_nothing_else():
    """dA = scale B^T dW and dB = scale dW A^T of the gradient dW that the merged weight would have."""
    network = frozen(make_adapted())
    plain = merged(network).requires_grad_(True)
    loss_of(plain).backward()
    loss_of(network).backward()
    for name, adapter in adapters(network):
        grad = plain.get_submodule(name).weight.grad
        assert_close(adapter.A.grad, adapter.scale * adapter.B.mT @ grad, 1e-4, f"A of {name}", 1e-5)
        assert_close(adapter.B.grad, adapter.scale * grad @ adapter.A.mT, 1e-4, f"B of {name}", 1e-5)
    trained = {f"{name}.adapter.{matrix}" for name, _ in adapters(network) for matrix in "AB"}
    assert {name for name, parameter in network.named_parameters() if parameter.grad is not None} == trained
    held = {id(parameter) for group in parameter_groups(network, 0.1) for parameter in group["params"]}
    assert held == {id(network.get_parameter(name)) for name in trained}


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def test_no_tensor_of_the_size_of_the_experts_is_made():
    network = frozen(make_adapted())
    stacks = {tuple(module.weight.shape) for module in network.modules() if isinstance(module, GroupedLinear)}
    stacks |= {(experts, wide, out) for experts, out, wide in stacks}
    with _Sizes() as sizes:
        loss_of(network).backward()
    assert sizes.seen
    assert not sizes.seen & stacks
    with _Sizes() as sizes:
        loss_of(merged(network).requires_grad_(True)).backward()
    assert sizes.seen & stacks, "the gradient of weights that train would have been seen"


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_weight_is_kept_as_it_is_multiplied(tied):
    """In bf16 the base takes half the memory and computes the same bits; norms, routers and adapters stay fp32."""
    network = make_adapted(tie_word_embeddings=tied)
    assign_formats(BF16, network)
    tokens = packed_batch(IDS, 64).tokens
    before = network(tokens, IDS).hidden
    freeze_base(network)
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert dtypes["backbone.layers.0.mixer.in_proj.weight"] == torch.bfloat16
    assert dtypes["backbone.layers.1.mixer.experts.up_proj.weight"] == torch.bfloat16
    assert dtypes["backbone.layers.1.mixer.experts.up_proj.adapter.A"] == torch.float32
    assert dtypes["backbone.layers.1.mixer.gate.weight"] == dtypes["backbone.norm_f.weight"] == torch.float32
    assert dtypes["backbone.embeddings.weight"] == (torch.float32 if tied else torch.bfloat16)
    assert (network.lm_head.weight is network.backbone.embeddings.weight) == tied
    assert torch.equal(network(tokens, IDS).hidden, before)


@pytest.mark.parametrize("patterns", [["*.q_proj", "*.gate_proj"], ["lm_head"], ["*.gate"], ["*embeddings"]])
def test_a_pattern_that_matches_nothing_is_an_error(patterns):
    with torch.device("meta"):
        network = Network(tiny_config())
    with pytest.raises(
        UserError, match=r"model\.init_args\.lora\.patterns: .* matches no layer.*mixer\.q_proj"
    ) as error:
        attach(network, LoRAConfig(patterns=patterns))
    assert repr(patterns[-1]) in str(error.value)
    assert "backbone.layers.*.mixer.experts.up_proj" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("alpha", 0.0), ("alpha", float("inf")), ("dropout", 1.0), ("patterns", [])]
)
def test_values_out_of_range(key, value):
    with pytest.raises(UserError, match=rf"model\.init_args\.lora\.{key}"):
        LoRAConfig(**{key: value})


def test_patterns_choose_layers_and_the_table_says_which():
    network = make_adapted(LoRAConfig(rank=2, patterns=["*.mixer.[qv]_proj", "*.experts.up_proj"]))
    names = [name for name, _ in adapters(network)]
    assert names == [
        "backbone.layers.1.mixer.experts.up_proj",
        "backbone.layers.2.mixer.q_proj",
        "backbone.layers.2.mixer.v_proj",
        "backbone.layers.5.mixer.experts.up_proj",
        "mtp.layers.0.mixer.q_proj",
        "mtp.layers.0.mixer.v_proj",
        "mtp.layers.1.mixer.experts.up_proj",
    ]
    lines = adapter_lines(frozen(network))
    experts = next(line for line in lines if line.startswith("backbone.layers.*.mixer.experts.up_proj"))
    assert experts.split()[1:] == ["2", f"{2 * 8 * 24 * 16:,}", f"{2 * 8 * 2 * (24 + 16):,}", "20.8%"]
    own = 3 * 8 * 2 * (24 + 16) + 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16)
    whole = sum(parameter.numel() for parameter in merged(network).parameters())
    adapted = 3 * 8 * 24 * 16 + 2 * 32 * 32 + 2 * 16 * 32
    assert f"{adapted / whole:.1%} of the network's {whole:,} weights" in lines[-2]
    assert lines[-1] == f"trained: {own:,} weights of adapters, {own / whole:.1%} of as many"


def test_drawn_per_seed_and_name_and_expert():
    """Another layout, other adapters beside it or another order change no value; B starts at zero."""

    def drawn(seed: int, *patterns: str) -> dict[str, torch.Tensor]:
        network = Network(tiny_config())
        attach(network, LoRAConfig(rank=2, patterns=[*patterns]))
        initialize_adapters(network, seed)
        return {name: parameter.detach() for name, parameter in network.named_parameters() if ".adapter." in name}

    some, all_of_them, other = drawn(0, "*.experts.*"), drawn(0, "*_proj"), drawn(1, "*_proj")
    for name, values in some.items():
        assert torch.equal(values, all_of_them[name]), name
    for name, values in all_of_them.items():
        if name.endswith(".B"):
            assert not values.any()
        else:
            assert not torch.equal(values, other[name])
            assert values.abs().max() <= values.shape[-1] ** -0.5
    stack = all_of_them["backbone.layers.1.mixer.experts.up_proj.adapter.A"]
    assert len({tuple(expert.flatten().tolist()) for expert in stack}) == len(stack)


class TestDropout:
    def test_what_it_leaves_out(self):
        layer = Linear(1024, 1)
        torch.nn.init.zeros_(layer.weight)
        attach(torch.nn.ModuleDict({"x_proj": layer}), LoRAConfig(rank=1, alpha=1.0, dropout=0.25, patterns=["*"]))
        adapter = layer.adapter
        torch.nn.init.ones_(adapter.A)
        torch.nn.init.ones_(adapter.B)
        outs = []
        for seed in range(8):
            adapter.seed = seed
            outs.append(layer(torch.eye(1024)).flatten())
        dropped = torch.stack(outs)
        values = dropped.unique()
        assert_close(values, torch.tensor([0.0, 4 / 3]), 1e-6)
        assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.02)
        assert not torch.equal(dropped[0], dropped[1])
        layer.eval()
        assert torch.equal(layer(torch.eye(1024)).flatten(), torch.ones(1024))

    def test_a_micro_batch_has_its_own_and_a_recomputed_layer_the_same(self):
        lora = LoRAConfig(rank=3, dropout=0.3, patterns=["*_proj"])
        found = []
        for place, checkpointed in ((0, False), (0, True), (1, False)):
            network = frozen(make_adapted(lora))
            if checkpointed:
                network.checkpoint_activations()
            reseed(network, 7, 0, place)
            loss_of(network).backward()
            found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        first, again, other = found
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first if first[name].any())
