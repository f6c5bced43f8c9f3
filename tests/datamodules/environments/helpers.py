"""Definitions as a run file has them."""

from typing import Any


def rogue(name: str = "Rogue", **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"tests.datamodules.environments.rogues.{name}", "init_args": init_args}


def family(name: str, **parameters: Any) -> dict[str, Any]:
    path = "datamodules.environments.reasoning_gym.ReasoningGym"
    return {"class_path": path, "init_args": {"family": name, "parameters": parameters}}
