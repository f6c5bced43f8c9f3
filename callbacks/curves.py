"""Names of curves that tell of modules, and the curves that sum many modules up."""

import re
from collections.abc import Callable, Iterable, Mapping


def curve_name(module: str) -> str:
    """Return the name of a module in curves: `backbone.layers.3.mixer.in_proj` is `layer_03.in_proj`."""
    found = re.fullmatch(r"(backbone|mtp)\.layers\.(\d+)\.(?:mixer\.)?(.+)", module)
    if found is None:
        return module
    block, number, rest = found.groups()
    return f"layer_{int(number):02d}.{rest}" if block == "backbone" else f"mtp_{number}.{rest}"


def summary(name: str, values: Mapping[str, float], worst: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Return the curves `NAME/worst` and `NAME/mean` of values by module, of which there is one at least."""
    return {f"{name}/worst": worst(values.values()), f"{name}/mean": sum(values.values()) / len(values)}


def with_summary(name: str, values: Mapping[str, float], worst: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Return those, and `NAME/MODULE`; nothing where there is no value."""
    if not values:
        return {}
    return summary(name, values, worst) | {f"{name}/{module}": value for module, value in values.items()}
