"""What a model card says of a quantised model: formats by kind of layer, bits, layout, how it was made, how it did."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from modules.checkpoints.names import MTP, STACKED, TensorInfo
from modules.checkpoints.quantization import (
    REPORT,
    Layout,
    Quantization,
    may_be_quantized,
    module_of,
    stored_tensors,
)
from modules.checkpoints.safetensors import show_size, size_of

Rows = list[tuple[str, str]]
SETTINGS = {
    "default": "format asked for",
    "bits": "bits per weight asked for",
    "rules": "formats by pattern",
    "exclude": "kept by pattern",
    "search": "block scales by",
    "calibration_tokens": "calibration tokens",
}
"""Settings in a report that the card repeats; those that may be paths of the machine are none of them."""
LAYOUTS = {
    "modelopt": "Model Optimizer's (`hf_quant_config.json`, and `quantization_config` in `config.json`)",
    "compressed-tensors": "compressed-tensors' (`quantization_config` in `config.json`)",
}


UNTRIED = "No engine has run this folder yet: {} its layout; whether this architecture runs in it is for you to try."
ENGINES = {
    "modelopt": UNTRIED.format("vLLM, SGLang and TensorRT-LLM document"),
    "compressed-tensors": UNTRIED.format("vLLM documents"),
}
"""What is known of engines, by layout."""


class Written(NamedTuple):
    """A quantised model as it is written."""

    quantization: Quantization
    layout: Layout
    plain: Sequence[str]
    """Modules that have a weight matrix and are not quantised."""
    tensors: Mapping[str, TensorInfo]
    """Shape and dtype of each tensor of the files."""
    report: Mapping[str, Any]
    """How it was quantised, see `REPORT`; empty: not known."""


def quantization_parts(written: Written, logical: Mapping[str, TensorInfo]) -> list[str]:
    """Return the paragraphs on the quantisation, and on how it was made and does as far as a report says so.

    Args:
        written: the model.
        logical: shape of each weight by public name, and as which dtype the plain ones are written.
    """
    parts = ["## Quantisation", table(_layer_rows(written.quantization, logical)), table(_size_rows(written, logical))]
    if rows := _report_rows(written.report):
        parts += [f"How it was quantised, and how well it predicts held-out text; `{REPORT}` says more.", table(rows)]
    return parts


def table(rows: Rows, head: tuple[str, str] = ("", "")) -> str:
    """Return a table of two columns."""
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])


def _layer_rows(quantization: Quantization, tensors: Mapping[str, TensorInfo]) -> Rows:
    """Return kinds of linear layers, and in which formats how many of them are."""
    kinds: dict[str, dict[str, int]] = {}
    for name, info in tensors.items():
        if may_be_quantized(name, info.shape):
            layer = quantization.weights.get(name)
            format = str(info.dtype).removeprefix("torch.") if layer is None else layer.label
            counts = kinds.setdefault(_kind(name), {})
            counts[format] = counts.get(format, 0) + 1
    return [
        (f"`{kind}`", ", ".join(f"{format} ({count:,})" for format, count in counts.items()))
        for kind, counts in kinds.items()
    ]


def _size_rows(written: Written, logical: Mapping[str, TensorInfo]) -> Rows:
    """Return bits per weight and the size of all tensors."""
    quantization, layout = written.quantization, written.layout
    weights = sum(prod(logical[name].shape) for name in quantization.weights)
    held = sum(
        size_of(info)
        for name, layer in quantization.weights.items()
        for _, info in stored_tensors(layout, layer, name, logical[name].shape).values()
        if prod(info.shape) > 1  # a scale of a whole tensor is no part of a weight's bits, as `quantize` counts them
    )
    kept = sum(size_of(info) for name, info in logical.items() if name not in quantization.weights)
    elements = sum(prod(info.shape) for info in logical.values())
    caches = len(quantization.kv_scales)
    rows = [
        ("layout", LAYOUTS[layout.name]),
        (
            "bits per weight of the quantised layers",
            f"{8 * held / weights:.3f}, with block scales" if weights else "",
        ),
        ("bits per weight of the model", f"{8 * (held + kept) / elements:.3f}"),
        ("size", show_size(sum(map(size_of, written.tensors.values())))),
        ("KV cache", f"FP8 with scales of {caches} layers" if caches else "not quantised"),
    ]
    return [row for row in rows if row[1]]


def _report_rows(report: Mapping[str, Any]) -> Rows:
    """Return what a quantization_report.json says of how the model was made, and how well it predicts."""
    settings, quality = _object(report.get("settings")), _object(report.get("quality"))
    rows = [(label, _shown(settings[key])) for key, label in SETTINGS.items() if settings.get(key)]
    before, after = _object(quality.get("before")), _object(quality.get("after"))
    for key in before:
        if isinstance(before[key], float) and isinstance(after.get(key), float):
            rows.append((f"{key.replace('_', ' ')} before and after", f"{before[key]:.4f}, {after[key]:.4f}"))
    if isinstance(quality.get("kl"), float):
        rows.append(("KL(original, quantised), nats per token", f"{quality['kl']:.6f}"))
    if isinstance(quality.get("top1_agreement"), float):
        rows.append(("same most likely token", f"{quality['top1_agreement']:.2%}"))
    return rows


def use_lines(written: Written, name: str, transformers: Sequence[str]) -> list[str]:
    """Return how to run the model with transformers and with engines.

    Args:
        written: the model.
        name: of its folder.
        transformers: how to load and run a model with transformers, if it reads it rightly.
    """
    misread = misreading(written.layout, written.quantization, written.plain)
    if written.layout.name == "modelopt":
        lines = ["transformers does not read this layout."]
    elif misread == LOST_SCALES:
        lines = ["With transformers (5.23), which leaves out the global scales of routed experts in NVFP4:"]
        lines += ["```python", *MENDED.format(name=name).splitlines(), "```"]
    elif misread is not None:
        lines = [f"{misread}."]
    else:
        lines = [*transformers]
    if written.layout.name == "compressed-tensors":
        lines = [f"{NEEDS}.", *lines]
    return [*lines, ENGINES[written.layout.name]]


def misreading(layout: Layout, quantization: Quantization, plain: Iterable[str]) -> str | None:
    """Return what transformers (5.23), which reads the layout, does wrongly with routed experts; None: nothing.

    Of all routed experts it takes the format from one group of the configuration. In FP8 it also takes plain ones.

    Args:
        layout: of the files.
        quantization: of the model.
        plain: names of what is not quantised.
    """
    formats: set[str] = {layer.format for name, layer in quantization.weights.items() if _is_routed(name)}
    if any(map(_is_routed, plain)):
        formats.add("plain")
    if layout.name != "compressed-tensors" or formats in (set(), {"plain"}, {"fp8"}, {"fp8", "plain"}):
        return None
    return LOST_SCALES if formats == {"nvfp4"} else LOST_EXPERTS


def _is_routed(name: str) -> bool:
    return STACKED in name and not name.startswith(MTP)  # transformers does not load an MTP block


NEEDS = (
    "transformers loads this layout with the package compressed-tensors beside it: pip install "
    "'compressed-tensors>=0.15' (tried: transformers 5.23 with compressed-tensors 0.20)"
)
LOST_SCALES = (
    "transformers (5.23) leaves out the global scales of routed experts in NVFP4, so its numbers are far off; the "
    "README.md written here shows how to put them in, or take --format hf"
)
LOST_EXPERTS = (
    "transformers (5.23) takes routed experts in NVFP4 only if all are, and starts what does not fit at random; for "
    "it, write the model with export --format hf"
)
MENDED = """\
from pathlib import Path
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
scales = {{}}
for file in Path("{name}").glob("*.safetensors"):
    with safe_open(file, "pt") as content:
        names = [name for name in content.keys() if name.endswith(".weight_global_scale")]
        scales |= {{name: content.get_tensor(name) for name in names}}
with torch.no_grad():
    for name, stack in model.named_parameters():
        experts, _, kind = name.replace("model.", "backbone.", 1).rpartition(".")
        for number, weight in enumerate(stack if experts.endswith(".mixer.experts") else ()):
            scale = scales.get(f"{{experts}}.{{number}}.{{kind}}.weight_global_scale")
            if scale is not None:
                weight.copy_(weight.float() / scale)
"""


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", module_of(name)))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
