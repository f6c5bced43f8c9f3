"""The precision recipe: which module computes in which format, as an ordered list of patterns.

The first rule whose pattern matches a module's name decides. Every module with a format must be matched, and every rule
must match something: a pattern with a typing error would otherwise change numbers silently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from modules.precision.formats import COMPUTE_DTYPE, Format
from modules.precision.linear import FormattedModule


@dataclass(frozen=True, kw_only=True)
class PrecisionRule:
    """One line of a recipe.

    Raises:
        ValueError: if the format is unknown.
    """

    pattern: str
    """Shell pattern over full module names (`*` also matches dots), e.g. `*.mixer.experts.*`."""
    format: Format
    """Number format of the matching modules."""

    def __post_init__(self) -> None:
        """Check the format."""
        if self.format not in COMPUTE_DTYPE:
            raise ValueError(
                f"model.precision: unknown format {self.format!r}; choose one of {', '.join(COMPUTE_DTYPE)}"
            )


def apply(recipe: Sequence[PrecisionRule], network: nn.Module) -> list[tuple[str, str, str]]:
    """Set the format of every module of `network` that has one. Call it before sharding and weight loading.

    Args:
        recipe: rules in order; the first match decides.
        network: a network built of `precision.linear` modules.

    Returns:
        One row (module name, format, deciding pattern) per module, in module order.

    Raises:
        ValueError: if a module matches no rule, or a rule matches no module.
    """
    table: list[tuple[str, str, str]] = []
    matched: set[str] = set()
    for name, module in network.named_modules():
        if not isinstance(module, FormattedModule):
            continue
        matching = [rule for rule in recipe if fnmatchcase(name, rule.pattern)]
        if not matching:
            raise ValueError(f"model.precision: no pattern matches {name}; end the list with pattern '*'")
        matched.update(rule.pattern for rule in matching)
        module.format = matching[0].format
        table.append((name, matching[0].format, matching[0].pattern))
    for rule in recipe:
        if rule.pattern not in matched:
            raise ValueError(f"model.precision: pattern {rule.pattern!r} matches no module; mend or remove it")
    return table


def summarize(table: Sequence[tuple[str, str, str]]) -> str:
    """Return the table of `apply` as text, one line per deciding pattern: pattern, format, number of modules."""
    groups: dict[tuple[str, str], int] = {}
    for _, chosen, pattern in table:
        groups[pattern, chosen] = groups.get((pattern, chosen), 0) + 1
    width = max(len(pattern) for pattern, _ in groups)
    return "\n".join(
        f"{pattern:<{width}}  {chosen:<5} {count:>5} modules" for (pattern, chosen), count in groups.items()
    )
