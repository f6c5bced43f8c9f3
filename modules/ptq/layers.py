"""Which linear layers there are to quantise, which of them must agree, and who decides their format.

Engines fuse layers: q, k and v of an attention layer are one product there, and the routed experts of a layer are one
kernel. So these share a format here, and one line decides for all of them. The names of groups are patterns that match
their layers.
Embeddings, head, routers, norms, convolutions and the MTP block are kept, as Model Optimizer and the released
checkpoints do.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, NamedTuple, get_args

import torch

from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.checkpoints.names import MTP, STACKED, public_names, public_shapes
from modules.checkpoints.quantization import LayerQuantization
from modules.errors import UserError
from modules.precision.blocks import BLOCK
from modules.precision.linear import GroupedLinear, Head, Linear

Choice = Literal["nvfp4", "nvfp4-weight-only", "fp8", "bf16"]
"""What becomes of a layer; bf16: it is kept."""
CHOICES: tuple[Choice, ...] = get_args(Choice)
BITS: dict[Choice, float] = {"nvfp4": 4.5, "nvfp4-weight-only": 4.5, "fp8": 8.0, "bf16": 16.0}
"""Bits of a weight with its share of a block scale. The scales of whole tensors, 64 bits a layer, are not counted."""
INPUTS: tuple[Choice, ...] = ("nvfp4", "fp8")
"""Choices that quantise inputs too."""
DEFAULT, WIDTH, KEPT = "--format", "width", "MTP block"
"""What stands for a pattern where no rule decided, in-features are no multiple of 16, or the MTP block was left out."""


def quantization_of(choice: Choice) -> LayerQuantization | None:
    """Return what files say of a layer; None: it is not quantised."""
    if choice == "bf16":
        return None
    return LayerQuantization("fp8" if choice == "fp8" else "nvfp4", choice in INPUTS)


class Rule(NamedTuple):
    """One line of a mixed format."""

    pattern: str
    """Shell pattern over module names (`*` also matches dots); it reaches the MTP block only if it begins with mtp."""
    choice: Choice
    """What becomes of the layers that match."""


class LinearGroup(NamedTuple):
    """A linear layer, or the stacked experts' layers of one kind."""

    module: str
    """Name of the module in the network."""
    weights: tuple[str, ...]
    """Public name of its weight, or of each expert's."""
    shape: tuple[int, int]
    """[O, I] of each of them."""


class Group(NamedTuple):
    """Layers that have one format."""

    name: str
    """Shell pattern that matches the module names of its layers, and no others."""
    layers: tuple[LinearGroup, ...]

    @property
    def size(self) -> int:
        """Return the number of weights."""
        return sum(len(layer.weights) * prod(layer.shape) for layer in self.layers)

    @property
    def fits_blocks(self) -> bool:
        """Whether hardware can multiply its layers in quantised formats: 16 numbers at a time."""
        return all(layer.shape[1] % BLOCK == 0 for layer in self.layers)


class Decision(NamedTuple):
    """What becomes of a group."""

    choice: Choice | None
    """None: to be searched."""
    reason: str
    """Pattern that decided, or one of `DEFAULT`, `WIDTH` and `KEPT`."""


def find_groups(config: BackboneConfig) -> list[Group]:
    """Return the groups of a network's linear layers, the MTP block's included, in the network's order."""
    with torch.device("meta"):
        network = Network(config)
    weights: dict[str, list[str]] = {}
    for name, place in public_names(config).items():
        weights.setdefault(place.parameter.removesuffix(".weight"), []).append(name)
    shapes = public_shapes(config)
    groups: dict[str, list[LinearGroup]] = {}
    for name, module in network.named_modules():
        if isinstance(module, Linear | GroupedLinear) and not isinstance(module, Head):
            rows, columns = shapes[weights[name][0]]
            groups.setdefault(_group_name(name), []).append(LinearGroup(name, tuple(weights[name]), (rows, columns)))
    return [Group(name, tuple(layers)) for name, layers in groups.items()]


def _group_name(module: str) -> str:
    if STACKED in module:
        return module.partition(STACKED)[0] + STACKED + "*"
    return re.sub(r"\.[qkv]_proj$", ".[qkv]_proj", module)


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Return the rules of PATTERN=FORMAT texts.

    Raises:
        UserError: one is of another form, or the format is unknown.
    """
    rules = []
    for text in texts:
        pattern, equals, choice = text.rpartition("=")
        if not equals or not pattern or choice not in CHOICES:
            raise UserError(f"--rules: {text!r} must be PATTERN=FORMAT with one of {', '.join(CHOICES)}")
        rules.append(Rule(pattern, choice))
    return rules


def decide(
    groups: Sequence[Group],
    default: Choice | None,
    rules: Sequence[Rule],
    exclude: Sequence[str],
    config: BackboneConfig,
) -> dict[str, Decision]:
    """Decide what becomes of each group.

    Args:
        groups: of `find_groups`.
        default: for layers that no pattern matches, but for the MTP block; None: search.
        rules: in order; the first that matches a layer decides.
        exclude: patterns of layers to keep; they come before the rules.
        config: the network's, for names that are no linear layers.

    Returns:
        By name of the group.

    Raises:
        UserError: a pattern matches nothing, a rule nothing that can be quantised, or a group would be split.
    """
    modules = [layer.module for group in groups for layer in group.layers]
    others = _modules_with_weights(config)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in others):
            raise UserError(f"--exclude: pattern {pattern!r} matches no module; mend or remove it")
    for rule in rules:
        if not any(_reaches(rule.pattern, name) for name in modules):
            raise UserError(f"--rules: pattern {rule.pattern!r} {_why_not(rule.pattern, modules, others)}")
    first = [Rule(pattern, "bf16") for pattern in exclude]
    return {group.name: _decide(group, default, [*first, *rules]) for group in groups}


def _decide(group: Group, default: Choice | None, rules: Sequence[Rule]) -> Decision:
    usual = Decision("bf16", KEPT) if group.name.startswith(MTP) else Decision(default, DEFAULT)
    found = {
        layer.module: next((Decision(rule.choice, rule.pattern) for rule in rules if _matches(rule, layer)), usual)
        for layer in group.layers
    }
    first, *rest = found.items()
    for name, decision in rest:
        if decision.choice != first[1].choice:
            raise UserError(
                f"{first[0]} would be {first[1].choice or 'searched'} ({first[1].reason!r}) and {name} "
                f"{decision.choice or 'searched'} ({decision.reason!r}), but engines run them as one: give a pattern "
                f"that matches both, like {group.name!r}"
            )
    return first[1] if group.fits_blocks or first[1].choice == "bf16" else Decision("bf16", WIDTH)


def _matches(rule: Rule, layer: LinearGroup) -> bool:
    return _reaches(rule.pattern, layer.module)


def _reaches(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern) and (pattern.startswith("mtp") or not module.startswith(MTP))


def _why_not(pattern: str, modules: Sequence[str], others: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in modules):
        return "matches only layers of the MTP block: begin it with mtp"
    matched = [name for name in others if fnmatchcase(name, pattern)]
    if matched:
        return f"matches only modules that cannot be quantised ({matched[0]}); linear layers can, but for the head"
    return "matches no module; mend or remove it"


def _modules_with_weights(config: BackboneConfig) -> list[str]:
    with torch.device("meta"):
        network = Network(config)
    return [
        name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]


def counted(groups: Sequence[Group], decisions: Mapping[str, Decision]) -> list[Group]:
    """Return the groups that bits per weight are averaged over: all but the MTP block's where it is kept by default."""
    return [group for group in groups if decisions[group.name].reason != KEPT]


def effective_bits(groups: Sequence[Group], choices: Mapping[str, Choice]) -> float:
    """Return the mean bits per weight of groups."""
    return sum(group.size * BITS[choices[group.name]] for group in groups) / sum(group.size for group in groups)
