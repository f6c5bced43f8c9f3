"""The recipe: the first match decides, nothing is left unmatched, and the table says what happened."""

import re

import pytest
import torch
from torch import nn

from modules.backbone.model import Network
from modules.errors import UserError
from modules.precision.linear import Embedding, FormattedModule, GroupedLinear, Head, Linear
from modules.precision.recipe import FormatSchedule, FormatSwitch, PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import tiny_config


def rules(*pairs: tuple[str, str], recipe: str | None = None, **options) -> PrecisionConfig:
    ordered = [PrecisionRule(pattern=pattern, format=chosen) for pattern, chosen in pairs]
    return PrecisionConfig(recipe=recipe, rules=ordered, **options)


@pytest.fixture
def network() -> Network:
    with torch.device("meta"):
        return Network(tiny_config(hybrid_override_pattern="ME*-"))


def test_the_first_match_decides(network: Network) -> None:
    table = assign_formats(
        rules(("*.experts.*", "fp32"), ("*.layers.1.*", "bf16"), ("lm_head", "bf16"), ("*", "fp32")), network
    )
    chosen = {name: (format_, pattern) for name, format_, pattern in table}
    assert chosen["backbone.layers.1.mixer.experts.up_proj"] == ("fp32", "*.experts.*")
    assert chosen["backbone.layers.1.mixer.shared_experts.up_proj"] == ("bf16", "*.layers.1.*")
    assert chosen["backbone.layers.1.mixer.fc1_latent_proj"] == ("bf16", "*.layers.1.*")
    assert chosen["mtp.layers.1.mixer.experts.up_proj"] == ("fp32", "*.experts.*")
    assert chosen["lm_head"] == ("bf16", "lm_head")
    assert chosen["backbone.embeddings"] == ("fp32", "*")
    for name, (format_, _) in chosen.items():
        module = network.get_submodule(name)
        assert module.format == format_
        assert module.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[format_]


def test_the_table_names_every_formatted_module_once_in_order(network: Network) -> None:
    table = assign_formats(rules(("*", "bf16")), network)
    expected = [name for name, module in network.named_modules() if isinstance(module, FormattedModule)]
    assert [name for name, *_ in table] == expected
    parameters = {f"{name}.weight" for name in expected}
    matrices = {name for name, parameter in network.named_parameters() if parameter.ndim >= 2}
    assert matrices - parameters == {name for name in matrices if "conv1d" in name or ".gate." in name}, (
        "every matrix but the routers' and the convolutions' has a format"
    )


def test_an_unmatched_module_is_an_error(network: Network) -> None:
    with pytest.raises(UserError, match=r"^model\.precision: no pattern matches backbone\.embeddings; end"):
        assign_formats(rules(("*.layers.*", "bf16"), ("lm_head", "bf16")), network)


def test_a_pattern_without_a_module_is_an_error(network: Network) -> None:
    with pytest.raises(UserError, match=r"^model\.precision: pattern '\*\.mixers\.\*' matches no module"):
        assign_formats(rules(("*.mixers.*", "fp32"), ("*", "bf16")), network)


def test_a_pattern_hidden_behind_earlier_ones_is_accepted(network: Network) -> None:
    """It names modules that exist; that an earlier rule takes them all is how overrides are written."""
    assign_formats(rules(("*", "bf16"), ("lm_head", "fp32")), network)
    assert network.lm_head.format == "bf16"


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.precision: unknown format 'fp12'; choose one of fp32, bf16, fp8, mxfp8, nvfp4$"
    ):
        PrecisionRule(pattern="*", format="fp12")


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_modules_equal_torchs_in_their_format(chosen: str) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator)
    modules = nn.ModuleDict({"linear": Linear(8, 16), "head": Head(8, 16), "experts": GroupedLinear(2, 8, 16)})
    modules["embedding"] = Embedding(7, 8)
    assign_formats(rules(("*", chosen)), modules)
    for parameter in modules.parameters():
        nn.init.normal_(parameter, generator=generator)
    weight = modules["linear"].weight
    assert torch.equal(modules["linear"](x), x.to(dtype) @ weight.to(dtype).T)
    logits = modules["head"](x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (x.to(dtype) @ modules["head"].weight.to(dtype).T).float())
    rows = modules["experts"](x, torch.tensor([3, 5], dtype=torch.int32))
    first, second = modules["experts"].weight.to(dtype)
    expected = torch.cat([x[:3].to(dtype) @ first.T, x[3:].to(dtype) @ second.T])
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, expected)
    tokens = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(modules["embedding"](tokens), modules["embedding"].weight[tokens].to(dtype))


def formats(table) -> dict[str, str]:
    return {row.name.removeprefix("backbone.").replace(".mixer", ""): row.format for row in table}


def test_super_is_the_published_recipe() -> None:
    """arXiv 2604.12374, table 3."""
    with torch.device("meta"):
        network = Network(tiny_config(hybrid_override_pattern="ME*-M"))
    chosen = formats(assign_formats(PrecisionConfig(bf16_tail=0), network))
    mxfp8 = {"layers.0.out_proj", "layers.4.out_proj"}
    nvfp4 = {"layers.0.in_proj", "layers.4.in_proj", "layers.3.up_proj", "layers.3.down_proj"}
    nvfp4 |= {f"layers.1.{part}.{side}_proj" for part in ("experts", "shared_experts") for side in ("up", "down")}
    assert {name for name, chosen_format in chosen.items() if chosen_format == "mxfp8"} == mxfp8
    assert {name for name, chosen_format in chosen.items() if chosen_format == "nvfp4"} == nvfp4
    rest = {name: chosen_format for name, chosen_format in chosen.items() if name not in mxfp8 | nvfp4}
    assert set(rest.values()) == {"bf16"}
    assert {"lm_head", "embeddings", "layers.2.q_proj", "layers.1.fc1_latent_proj"} <= rest.keys()
    assert any(name.startswith("mtp.") for name in rest)


def test_super_fits_networks_without_some_kinds_of_layers() -> None:
    with torch.device("meta"):
        network = Network(tiny_config(hybrid_override_pattern="--", num_nextn_predict_layers=0))
    assert "nvfp4" in formats(assign_formats(PrecisionConfig(), network)).values()


@pytest.mark.parametrize(("layers", "share", "first"), [(88, 0.15, 74), (7, 0.15, 5), (20, 0.15, 17), (4, 1.0, 0)])
def test_the_tail_is_the_last_layers_rounded_up(layers: int, share: float, first: int) -> None:
    """14 of Super's 88 layers, as its public recipe has it."""
    with torch.device("meta"):
        network = Network(tiny_config(hybrid_override_pattern="-" * layers, num_nextn_predict_layers=0))
    table = assign_formats(
        rules(("lm_head", "fp32"), ("*embeddings", "fp32"), ("*", "nvfp4"), bf16_tail=share), network
    )
    found = {int(row.name.split(".")[2]) for row in table if row.pattern == "bf16_tail"}
    assert found == set(range(first, layers))
    assert all(row.format == "bf16" for row in table if row.pattern == "bf16_tail")


def test_the_tail_leaves_what_is_not_quantised_and_mtp_alone(network: Network) -> None:
    rows = assign_formats(
        rules(("lm_head", "fp32"), ("*embeddings", "fp32"), ("*mtp*", "nvfp4"), ("*", "fp32"), bf16_tail=1), network
    )
    assert {row.format for row in rows if row.name.startswith("mtp.")} == {"nvfp4"}
    assert {row.format for row in rows if row.name.startswith("backbone.")} == {"fp32"}


def test_rules_come_before_the_named_recipe(network: Network) -> None:
    chosen = formats(assign_formats(rules(("*.q_proj", "nvfp4"), recipe="super", bf16_tail=0), network))
    assert chosen["layers.2.q_proj"] == "nvfp4"
    assert chosen["layers.2.k_proj"] == "bf16"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PrecisionConfig(recipe=None), "model.precision: neither recipe nor rules are given"),
        (
            lambda: PrecisionConfig(recipe="ultra"),
            "model.precision.recipe: unknown 'ultra'; choose one of fp32, bf16, super",
        ),
        (
            lambda: PrecisionConfig(backend="cuda"),
            "model.precision.backend: unknown 'cuda'; choose one of auto, emulated",
        ),
        (lambda: PrecisionConfig(bf16_tail=15), "model.precision.bf16_tail: 15 is a share of the layers, 0 to 1"),
        (lambda: FormatSwitch(at_tokens=-1), "model.precision.switches: at_tokens -1 must not be negative"),
        (
            lambda: FormatSwitch(at_tokens=1, format="fp32"),
            "model.precision: unknown format 'fp32'; choose one of bf16",
        ),
        (lambda: FormatSwitch(at_tokens=1, products="fprop"), "model.precision.switches: products 'fprop'"),
        (
            lambda: PrecisionConfig(switches=[FormatSwitch(at_tokens=2), FormatSwitch(at_tokens=1)]),
            "model.precision.switches: at_tokens [2, 1] must not fall",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(config, message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        config()


def test_embedding_and_head_are_not_quantised(network: Network) -> None:
    with pytest.raises(
        ValueError, match=r"^model\.precision: backbone\.embeddings computes in fp32 or bf16 only, not in fp8"
    ):
        assign_formats(rules(("*", "fp8")), network)
    with pytest.raises(UserError, match=r"^model\.precision: lm_head computes in fp32 or bf16 only"):
        assign_formats(rules(("*embeddings", "bf16"), ("*", "fp8")), network)


def test_a_switch_that_concerns_no_quantised_module_is_an_error(network: Network) -> None:
    switches = [FormatSwitch(at_tokens=5, pattern="*.q_proj")]
    with pytest.raises(
        ValueError, match=r"^model\.precision\.switches: pattern '\*\.q_proj' matches no module in a quant"
    ):
        assign_formats(PrecisionConfig(switches=switches), network)


def test_switches_change_the_products_they_name_and_add_up(network: Network) -> None:
    switches = [
        FormatSwitch(at_tokens=100, products="forward"),
        FormatSwitch(at_tokens=200, format="mxfp8", products="backward", pattern="*experts*"),
        FormatSwitch(at_tokens=300),
    ]
    config = PrecisionConfig(switches=switches, bf16_tail=0)
    assign_formats(config, network)
    schedule = FormatSchedule(config, network)
    expert = network.get_submodule("backbone.layers.1.mixer.experts.up_proj")
    mamba = network.get_submodule("backbone.layers.0.mixer.in_proj")
    found = {}
    for tokens in (0, 99, 100, 250, 300, 50):  # 50: a run that goes on from an earlier checkpoint
        lines = schedule.switch(tokens)
        found[tokens] = (*expert.product.products, *mamba.product.products), len(lines)
    assert found == {
        0: (("nvfp4",) * 6, 0),
        99: (("nvfp4",) * 6, 0),
        100: (("bf16", "nvfp4", "nvfp4") * 2, 2),
        250: (("bf16", "mxfp8", "mxfp8", "bf16", "nvfp4", "nvfp4"), 1),
        300: (("bf16",) * 6, 2),
        50: (("nvfp4",) * 6, 2),
    }
    assert mamba.compute_dtype == torch.bfloat16
    assert mamba.format == "nvfp4"


def test_a_switch_says_what_it_does(network: Network) -> None:
    config = PrecisionConfig(switches=[FormatSwitch(at_tokens=100, products="forward")], bf16_tail=0)
    assign_formats(config, network)
    lines = FormatSchedule(config, network).switch(1_000)
    assert "from 1,000 tokens on: bf16 fprop, mxfp8 dgrad, mxfp8 wgrad instead of mxfp8 (modules: 1)" in lines
