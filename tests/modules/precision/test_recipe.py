"""The recipe: the first match decides, nothing is left unmatched, and the table says what happened."""

import pytest
import torch
from torch import nn

from modules.backbone.model import Network
from modules.precision.linear import Embedding, FormattedModule, GroupedLinear, Head, Linear
from modules.precision.recipe import PrecisionRule, apply, summarize
from tests.modules.helpers import tiny_config


def rules(*pairs: tuple[str, str]) -> list[PrecisionRule]:
    return [PrecisionRule(pattern=pattern, format=chosen) for pattern, chosen in pairs]


@pytest.fixture
def network() -> Network:
    with torch.device("meta"):
        return Network(tiny_config(hybrid_override_pattern="ME*-"))


def test_the_first_match_decides(network: Network) -> None:
    table = apply(rules(("*.experts.*", "fp32"), ("*.layers.1.*", "bf16"), ("lm_head", "bf16"), ("*", "fp32")), network)
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
    table = apply(rules(("*", "bf16")), network)
    expected = [name for name, module in network.named_modules() if isinstance(module, FormattedModule)]
    assert [name for name, *_ in table] == expected
    parameters = {f"{name}.weight" for name in expected}
    matrices = {name for name, parameter in network.named_parameters() if parameter.ndim >= 2}
    assert matrices - parameters == {name for name in matrices if "conv1d" in name or ".gate." in name}, (
        "every matrix but the routers' and the convolutions' has a format"
    )


def test_an_unmatched_module_is_an_error(network: Network) -> None:
    with pytest.raises(ValueError, match=r"^model\.precision: no pattern matches backbone\.embeddings; end"):
        apply(rules(("*.layers.*", "bf16"), ("lm_head", "bf16")), network)


def test_a_pattern_without_a_module_is_an_error(network: Network) -> None:
    with pytest.raises(ValueError, match=r"^model\.precision: pattern '\*\.mixers\.\*' matches no module"):
        apply(rules(("*.mixers.*", "fp32"), ("*", "bf16")), network)


def test_a_pattern_hidden_behind_earlier_ones_is_accepted(network: Network) -> None:
    """It names modules that exist; that an earlier rule takes them all is how overrides are written."""
    apply(rules(("*", "bf16"), ("lm_head", "fp32")), network)
    assert network.lm_head.format == "bf16"


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^model\.precision: unknown format 'fp12'; choose one of fp32, bf16$"):
        PrecisionRule(pattern="*", format="fp12")


def test_the_summary_counts_modules_by_pattern(network: Network) -> None:
    table = apply(rules(("*.experts.*", "fp32"), ("lm_head", "fp32"), ("*", "bf16")), network)
    lines = {line.split()[0]: line.split()[1:] for line in summarize(table).splitlines()}
    assert lines["*.experts.*"] == ["fp32", "4", "modules"]
    assert lines["lm_head"] == ["fp32", "1", "modules"]
    assert lines["*"] == ["bf16", str(len(table) - 5), "modules"]


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_modules_equal_torchs_in_their_format(chosen: str) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator)
    modules = nn.ModuleDict({"linear": Linear(8, 16), "head": Head(8, 16), "experts": GroupedLinear(2, 8, 16)})
    modules["embedding"] = Embedding(7, 8)
    apply(rules(("*", chosen)), modules)
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
