"""Options that several commands have, and the one spelling that the rest of the program knows."""

from typing import Literal

Dtype = Literal["auto", "fp32", "float32", "bf16", "bfloat16"]
"""Format of matrix products or weights, as we call it or as torch does; auto: what the checkpoint has."""
StateDtype = Literal["fp32", "float32", "fp16", "float16"]
"""Format of the Mamba states between tokens."""
Device = Literal["auto", "cpu", "cuda"]
"""Where to compute; auto: a GPU if there is one."""


def short_dtype(name: Dtype) -> Literal["auto", "fp32", "bf16"]:
    """Return our name of a dtype."""
    if name == "float32":
        return "fp32"
    return "bf16" if name == "bfloat16" else name


def short_state_dtype(name: StateDtype) -> Literal["fp32", "fp16"]:
    """Return our name of a state's dtype."""
    return "fp16" if name in ("fp16", "float16") else "fp32"
