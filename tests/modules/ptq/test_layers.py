"""Which layers are grouped, and who decides."""

import pytest

from modules.errors import UserError
from modules.ptq.layers import DEFAULT, KEPT, WIDTH, Rule, counted, decide, effective_bits, find_groups, parse_rules
from tests.modules.helpers import tiny_config

WIDE = {"hidden_size": 32, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}
"""All in-features are multiples of 16."""
CONFIG = tiny_config(**WIDE)
GROUPS = find_groups(CONFIG)


def decisions(default="nvfp4", rules=(), exclude=(), config=CONFIG):
    return decide(find_groups(config), default, [Rule(*rule) for rule in rules], exclude, config)


def choices(**options) -> dict[str, str | None]:
    return {name: decision.choice for name, decision in decisions(**options).items()}


def test_the_groups_are_what_engines_run_as_one():
    """The whole list for `ME*-ME` and the MTP block `*E`."""
    mixture = ["experts.*", "fc1_latent_proj", "fc2_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
    expected = ["0.mixer.in_proj", "0.mixer.out_proj", *(f"1.mixer.{name}" for name in mixture)]
    expected += ["2.mixer.[qkv]_proj", "2.mixer.o_proj", "3.mixer.up_proj", "3.mixer.down_proj"]
    expected += ["4.mixer.in_proj", "4.mixer.out_proj", *(f"5.mixer.{name}" for name in mixture)]
    mtp = ["0.mixer.[qkv]_proj", "0.mixer.o_proj", "0.eh_proj", *(f"1.mixer.{name}" for name in mixture)]
    assert [group.name for group in GROUPS] == [
        *(f"backbone.layers.{name}" for name in expected),
        *(f"mtp.layers.{name}" for name in mtp),
    ]


def test_a_group_knows_its_layers_and_weights():
    groups = {group.name: group for group in GROUPS}
    attention = groups["backbone.layers.2.mixer.[qkv]_proj"]
    assert [layer.weights for layer in attention.layers] == [
        (f"backbone.layers.2.mixer.{letter}_proj.weight",) for letter in "qkv"
    ]
    assert attention.size == 32 * (32 + 16 + 16)
    experts = groups["backbone.layers.1.mixer.experts.*"]
    assert [layer.module.rpartition(".")[2] for layer in experts.layers] == ["up_proj", "down_proj"]
    assert experts.layers[1].weights[7] == "backbone.layers.1.mixer.experts.7.down_proj.weight"
    assert [layer.shape for layer in experts.layers] == [(32, 16), (16, 32)]
    assert experts.size == 2 * 8 * 32 * 16


def test_all_but_the_mtp_block_are_quantised_by_default():
    for name, decision in decisions().items():
        assert decision.choice == ("bf16" if name.startswith("mtp.") else "nvfp4")
        assert decision.reason == (KEPT if name.startswith("mtp.") else DEFAULT)
    assert set(choices(default=None).values()) == {None, "bf16"}


def test_exclusions_come_before_rules_and_the_first_rule_decides():
    found = choices(
        rules=[("*.out_proj", "fp8"), ("*.layers.0.*", "bf16"), ("*.mixer.fc?_latent_proj", "nvfp4-weight-only")],
        exclude=["*.layers.1.*"],
    )
    assert found["backbone.layers.0.mixer.out_proj"] == "fp8"
    assert found["backbone.layers.0.mixer.in_proj"] == "bf16"
    assert found["backbone.layers.1.mixer.fc1_latent_proj"] == "bf16"
    assert found["backbone.layers.5.mixer.fc1_latent_proj"] == "nvfp4-weight-only"
    assert found["backbone.layers.4.mixer.in_proj"] == "nvfp4"


def test_a_rule_reaches_the_mtp_block_only_by_its_name():
    assert choices(rules=[("*", "fp8")])["mtp.layers.0.eh_proj"] == "bf16"
    assert choices(rules=[("mtp.*", "fp8")])["mtp.layers.0.eh_proj"] == "fp8"
    assert choices(rules=[("*", "fp8")])["backbone.layers.2.mixer.o_proj"] == "fp8"


def test_every_name_of_a_group_is_a_pattern_for_it():
    for group in GROUPS:
        found = choices(default="bf16", rules=[(group.name, "fp8")])
        assert [name for name, choice in found.items() if choice == "fp8"] == [group.name]


def test_layers_that_fill_no_blocks_are_kept_and_named():
    config = tiny_config(**{**WIDE, "moe_intermediate_size": 24})
    found = decisions(config=config)
    assert found["backbone.layers.1.mixer.experts.*"] == ("bf16", WIDTH)
    assert found["backbone.layers.1.mixer.fc1_latent_proj"].choice == "nvfp4"
    assert decisions(default=None, config=config)["backbone.layers.1.mixer.experts.*"] == ("bf16", WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["*.qproj"]}, r"--exclude: pattern '\*\.qproj' matches no module"),
        ({"rules": [("*.qproj", "fp8")]}, r"--rules: pattern '\*\.qproj' matches no module"),
        ({"rules": [("lm_head", "fp8")]}, "matches only modules that cannot be quantised"),
        ({"rules": [("*eh_proj", "fp8")]}, "only layers of the MTP block: begin it with mtp"),
        ({"rules": [("*.q_proj", "fp8")]}, r"engines run them as one.*'backbone\.layers\.2\.mixer\.\[qkv\]_proj'"),
        ({"exclude": ["*.experts.up_proj"]}, r"engines run them as one.*'backbone\.layers\.1\.mixer\.experts\.\*'"),
    ],
)
def test_patterns_that_do_nothing_or_split_a_group_are_refused(options, message: str):
    with pytest.raises(UserError, match=message):
        decisions(**options)


def test_what_is_kept_anyway_may_be_excluded():
    names = ["lm_head", "*embeddings", "*.gate", "*.conv1d", "*norm*", "mtp.*"]
    assert choices(exclude=names) == choices()


@pytest.mark.parametrize("text", ["*.q_proj", "=fp8", "*.q_proj=", "*.q_proj=int4"])
def test_a_rule_of_another_form_is_refused(text: str):
    with pytest.raises(UserError, match="must be PATTERN=FORMAT with one of nvfp4, nvfp4-weight-only, fp8, bf16"):
        parse_rules([text])


def test_rules_are_parsed_in_order():
    assert parse_rules(["a[0-9]=fp8", "*=nvfp4-weight-only"]) == [Rule("a[0-9]", "fp8"), Rule("*", "nvfp4-weight-only")]


def test_bits_are_averaged_over_weights_and_not_over_a_kept_mtp_block():
    found = decisions(rules=[("backbone.layers.1.mixer.experts.*", "bf16"), ("*.o_proj", "fp8")])
    members = counted(GROUPS, found)
    assert not any(group.name.startswith("mtp.") for group in members)
    sizes = {group.name: group.size for group in members}
    total = sum(sizes.values())
    kept, fp8 = sizes["backbone.layers.1.mixer.experts.*"], sizes["backbone.layers.2.mixer.o_proj"]
    expected = (16 * kept + 8 * fp8 + 4.5 * (total - kept - fp8)) / total
    assert effective_bits(members, {name: found[name].choice for name in sizes}) == pytest.approx(expected)
    assert counted(GROUPS, decisions(rules=[("mtp.*", "fp8")])) == GROUPS
