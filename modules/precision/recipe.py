"""The precision recipe: which module computes in which format, by ordered patterns.

The first rule whose pattern matches a module's name decides, and the last layers are kept out of the quantised formats.
Every module with a format must be matched, and every rule of the user must match something: a pattern with a typing
error would otherwise change numbers silently.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args

from torch import nn

from modules.errors import UserError
from modules.precision.adapter import seed_of
from modules.precision.backends import BackendName, choose
from modules.precision.formats import COMPUTE_DTYPE, QUANTIZED, Format
from modules.precision.linear import FormattedModule, GroupedLinear, Head, Linear
from modules.precision.scheme import Arithmetic, PlainProduct, Products, Scheme

RecipeName = Literal["super", "bf16", "fp32"]
Part = Literal["all", "forward", "backward"]
TAIL = "bf16_tail"
"""What stands for a pattern in the table where the tail decided."""


def _check_format(chosen: str, known: Sequence[str] | dict) -> None:
    if chosen not in known:
        raise UserError(f"model.precision: unknown format {chosen!r}; choose one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class PrecisionRule:
    """One line of a recipe.

    Raises:
        UserError: if the format is unknown.
    """

    pattern: str
    """Shell pattern over full module names (`*` also matches dots), e.g. `*.mixer.experts.*`."""
    format: Format
    """Number format of the matching modules."""

    def __post_init__(self) -> None:
        """Check the format."""
        _check_format(self.format, COMPUTE_DTYPE)


@dataclass(frozen=True, kw_only=True)
class FormatSwitch:
    """A change of the quantised products during a run.

    Raises:
        UserError: if the format is unknown or fp32, or a value is out of range.
    """

    at_tokens: int
    """Tokens (>= 0) after which the change holds, e.g. those at which the learning rate starts to decay."""
    format: Format = "bf16"
    """Format that the products change to: bf16 or a quantised one."""
    products: Part = "all"
    """Which products change: those of the forward pass, of the backward pass (both gradients), or all. A backward pass
    in bf16 behind a quantised forward pass takes inputs and weight as the forward pass rounded them, as
    quantisation-aware training does."""
    pattern: str = "*"
    """Shell pattern over module names; of those, modules that the recipe gives a quantised format change."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_format(self.format, ("bf16", *QUANTIZED))
        if self.at_tokens < 0:
            raise UserError(f"model.precision.switches: at_tokens {self.at_tokens} must not be negative")
        if self.products not in get_args(Part):
            raise UserError(f"model.precision.switches: products {self.products!r}: say all, forward or backward")

    def change(self, products: Products) -> Products:
        """Return the formats of a module's products after the change."""
        if self.products == "forward":
            return products._replace(fprop=self.format)
        backward = products._replace(dgrad=self.format, wgrad=self.format)
        return backward if self.products == "backward" else backward._replace(fprop=self.format)


RECIPES: dict[str, tuple[PrecisionRule, ...]] = {
    "fp32": (PrecisionRule(pattern="*", format="fp32"),),
    "bf16": (PrecisionRule(pattern="*", format="bf16"),),
    # Nemotron 3 Super (arXiv 2604.12374, table 3); with the bf16 tail, which every recipe has.
    "super": (
        PrecisionRule(pattern="*embeddings", format="bf16"),
        PrecisionRule(pattern="lm_head", format="bf16"),
        PrecisionRule(pattern="mtp.*", format="bf16"),
        PrecisionRule(pattern="*.mixer.[qkvo]_proj", format="bf16"),
        PrecisionRule(pattern="*.mixer.fc[12]_latent_proj", format="bf16"),
        PrecisionRule(pattern="*.mixer.out_proj", format="mxfp8"),
        PrecisionRule(pattern="*", format="nvfp4"),
    ),
}
"""Named recipes. Their rules may match nothing: a network need not have every kind of layer."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number format of each matrix product, and the arithmetic of the quantised ones.

    Raises:
        UserError: if a value is out of range.
    """

    recipe: RecipeName | None = "super"
    """Rules by name: `super` (published for Nemotron 3 Super: NVFP4; Mamba-2 out_proj in MXFP8; attention and latent
    projections, MTP, embeddings and head in bf16), `bf16` or `fp32` throughout; null: `rules` alone."""
    rules: list[PrecisionRule] = field(default_factory=list)
    """Ordered rules that come before those of `recipe`; the first pattern that fits a module's name decides."""
    bf16_tail: float = 0.15
    """Share of the layers, 0 to 1, the last ones (rounded up), that compute in bf16 where a rule says a quantised
    format. MTP has no part in it."""
    backend: BackendName = "auto"
    """What computes the quantised products: `emulated` (any device), `transformer_engine`, `torchao`; `auto`: the best
    that runs here."""
    stochastic_rounding: bool = True
    """Whether gradients are rounded to NVFP4 at random, without bias, or to the nearest."""
    hadamard: bool = True
    """Whether both operands of the weight gradient are rotated by a 16 x 16 Hadamard matrix before NVFP4."""
    two_dimensional_weights: bool = True
    """Whether NVFP4 scales of weights cover 16 x 16 values, so that forward and backward pass see the same weights, or
    1 x 16 along the sum of each product."""
    switches: list[FormatSwitch] = field(default_factory=list)
    """Changes of format during the run, by tokens; later ones go on from what earlier ones left."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.recipe is None and not self.rules:
            raise UserError("model.precision: neither recipe nor rules are given; name a recipe, e.g. bf16")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise UserError(f"model.precision.recipe: unknown {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        if self.backend not in get_args(BackendName):
            raise UserError(
                f"model.precision.backend: unknown {self.backend!r}; choose one of {', '.join(get_args(BackendName))}"
            )
        if not 0 <= self.bf16_tail <= 1:
            raise UserError(f"model.precision.bf16_tail: {self.bf16_tail} is a share of the layers, 0 to 1")
        tokens = [switch.at_tokens for switch in self.switches]
        if tokens != sorted(tokens):
            raise UserError(f"model.precision.switches: at_tokens {tokens} must not fall")


class Assignment(NamedTuple):
    """What the recipe decided for a module."""

    name: str
    format: Format
    pattern: str
    """Pattern of the rule that decided, or `TAIL`."""


def assign_formats(
    config: PrecisionConfig,
    network: nn.Module,
    device_type: str = "cpu",
    capability: tuple[int, int] | None = None,
) -> list[Assignment]:
    """Set the format of every module of `network` that has one. Call it before sharding and weight loading.

    Args:
        config: the recipe.
        network: a network built of `precision.linear` modules.
        device_type: where it will compute, cpu or cuda.
        capability: see `Backend.refusal`.

    Returns:
        One row per module, in module order.

    Raises:
        UserError: if a module matches no rule, a rule of the user or a switch no module, a module cannot compute in
            its format, or the backend does not run here.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, FormattedModule)}
    rules = [*config.rules, *(RECIPES[config.recipe] if config.recipe else ())]
    tail = _tail([*modules], config.bf16_tail)
    table = [_assign(name, rules, name in tail) for name in modules]
    for rule in config.rules:
        if not any(fnmatchcase(name, rule.pattern) for name in modules):
            raise UserError(f"model.precision: pattern {rule.pattern!r} matches no module; mend or remove it")
    quantized = {row.name: modules[row.name] for row in table if row.format in QUANTIZED}
    for switch in config.switches:
        if not any(fnmatchcase(name, switch.pattern) for name in quantized):
            raise UserError(
                f"model.precision.switches: pattern {switch.pattern!r} matches no module in a quantised format"
            )
    arithmetic = Arithmetic(config.stochastic_rounding, config.hadamard, config.two_dimensional_weights)
    for row in table:
        module = modules[row.name]
        module.format, module.product = row.format, PlainProduct()
        if row.format in QUANTIZED:
            if isinstance(module, Head) or not isinstance(module, Linear | GroupedLinear):
                raise UserError(
                    f"model.precision: {row.name} computes in fp32 or bf16 only, not in {row.format} as pattern "
                    f"{row.pattern!r} says; put a rule for it before that one"
                )
            products = Products.all_in(row.format)
            periods = [products for _, products in _periods(config.switches, row.name, products)]
            shape = module.weight.shape
            chosen = choose(config.backend, row.name, periods, arithmetic, shape, device_type, capability)
            module.product = Scheme(products, arithmetic, *chosen)
    return table


class FormatSchedule:
    """Carries out the format switches of a run, and seeds its random rounding.

    Args:
        config: the recipe that `assign_formats` was called with.
        network: the network.
    """

    def __init__(self, config: PrecisionConfig, network: nn.Module) -> None:
        self._schemes = quantized_schemes(network)
        self._periods = {name: _periods(config.switches, name, s.planned) for name, s in self._schemes.items()}
        self._arithmetics = {scheme.arithmetic for scheme in self._schemes.values()}

    def switch(self, tokens: int) -> list[str]:
        """Set the formats that hold after a number of tokens; return lines for the user on what changed."""
        before = {name: scheme.products for name, scheme in self._schemes.items()}
        for name, scheme in self._schemes.items():
            periods = reversed(self._periods[name])
            scheme.products = next(products for start, products in periods if tokens >= start)
        changes = Counter(
            (before[name], scheme.products) for name, scheme in self._schemes.items() if scheme.products != before[name]
        )
        return [
            f"from {tokens:,} tokens on: {_describe(new)} instead of {_describe(old)} (modules: {count})"
            for (old, new), count in changes.items()
        ]

    def reseed(self, *numbers: int) -> None:
        """Begin the random numbers anew, with a seed made of these (the run's, the rank's, the micro-batch's)."""
        for arithmetic in self._arithmetics:
            arithmetic.reseed(seed_of(*numbers))


def quantized_schemes(network: nn.Module) -> dict[str, Scheme]:
    """Return the schemes of the modules to which the recipe gave a quantised format, by module name."""
    return {
        name: module.product
        for name, module in network.named_modules()
        if isinstance(module, FormattedModule) and isinstance(module.product, Scheme)
    }


def _periods(switches: Sequence[FormatSwitch], name: str, planned: Products) -> list[tuple[int, Products]]:
    """Return (tokens from which they hold, formats of a module's products), one after the other."""
    periods = [(0, planned)]
    for switch in switches:
        if fnmatchcase(name, switch.pattern):
            periods.append((switch.at_tokens, switch.change(periods[-1][1])))
    return periods


def _describe(products: Products) -> str:
    if len(set(products)) == 1:
        return products.fprop
    return ", ".join(f"{chosen} {product}" for product, chosen in products._asdict().items())


def _assign(name: str, rules: Sequence[PrecisionRule], in_tail: bool) -> Assignment:
    rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
    if rule is None:
        raise UserError(f"model.precision: no pattern matches {name}; end the rules with pattern '*'")
    if in_tail and rule.format in QUANTIZED:
        return Assignment(name, "bf16", TAIL)
    return Assignment(name, rule.format, rule.pattern)


def _tail(names: Sequence[str], share: float) -> set[str]:
    """Return the modules of the last layers: `layers.{i}` anywhere in a name but in the MTP block's."""
    found = {name: re.match(r"(?!mtp\.)(?:.*\.)?layers\.(\d+)\.", name) for name in names}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    count = max(layers.values(), default=-1) + 1
    first = count - math.ceil(round(share * count, 6))  # 0.15 x 20 is a little more than 3
    return {name for name, layer in layers.items() if layer >= first}
