"""The report of `quantize`: what was done to which layers, how large the result is, and how well it predicts."""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from app.planning.text import align
from modules.checkpoints.layouts.modelopt import MODELOPT
from modules.checkpoints.names import TensorInfo
from modules.checkpoints.quantization import stored_tensors
from modules.checkpoints.safetensors import show_size, size_of
from modules.ptq.layers import BITS, Choice, Group, quantization_of
from modules.ptq.mixture import CANDIDATES
from modules.ptq.weights import FEW_TOKENS

REST = "embeddings, head, routers, norms, ..."
LISTED = 16
"""Most experts of a layer that are named on the screen; the file has all."""


def layer_table(
    groups: Sequence[Group], choices: Mapping[str, Choice], stored: Mapping[str, TensorInfo]
) -> list[dict[str, Any]]:
    """Return what became of each kind of layer, all else last: kind, format, quantized, layers, weights, bits.

    Args:
        groups: of the network's linear layers.
        choices: what became of each.
        stored: shape and dtype of each tensor that is not quantised, as written; of the others, what they would be.
    """
    kinds: dict[tuple[str, str, bool], list[float]] = {}

    def add(kind: str, choice: Choice, info: TensorInfo, layers: int, weights: int) -> None:
        quantization = quantization_of(choice)
        bits = 8.0 * info.dtype.itemsize if quantization is None else BITS[choice]
        label = str(info.dtype).removeprefix("torch.") if quantization is None else quantization.label
        row = kinds.setdefault((kind, label, quantization is not None), [0, 0, 0])
        row[:] = row[0] + layers, row[1] + weights, row[2] + weights * bits

    linear: set[str] = set()
    for group in groups:
        names = [name for layer in group.layers for name in layer.weights]
        linear.update(names)
        kind = re.sub(r"\.\d+\b", ".*", group.name)
        add(kind, choices[group.name], stored[names[0]], len(names), group.size)
    for name, info in stored.items():
        if name not in linear:
            add(REST, "bf16", info, 1, prod(info.shape))
    order = list(dict.fromkeys(kind for kind, *_ in kinds))
    return [
        {
            "kind": kind,
            "format": label,
            "quantized": quantized,
            "layers": int(layers),
            "weights": int(weights),
            "bits": bits / weights,
        }
        for (kind, label, quantized), (layers, weights, bits) in sorted(
            kinds.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def mean_bits(table: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the bits of a weight over some kinds of layers; None: there are none."""
    weights = sum(row["weights"] for row in table)
    return sum(row["bits"] * row["weights"] for row in table) / weights if weights else None


def expected_size(
    groups: Sequence[Group], choices: Mapping[str, Choice], stored: Mapping[str, TensorInfo], caches: int
) -> int:
    """Return the bytes of all tensors by the arithmetic of the formats.

    Args:
        groups: see `layer_table`.
        choices: see `layer_table`.
        stored: see `layer_table`.
        caches: attention layers whose keys and values have a scale each.
    """
    size = 2 * torch.float32.itemsize * caches
    quantized: set[str] = set()
    for group in groups:
        if (quantization := quantization_of(choices[group.name])) is None:
            continue
        for layer in group.layers:
            parts = stored_tensors(MODELOPT, quantization, layer.weights[0], layer.shape)
            size += len(layer.weights) * sum(size_of(info) for _, info in parts.values())
            quantized |= {*layer.weights}
    return size + sum(size_of(info) for name, info in stored.items() if name not in quantized)


def choice_lines(
    groups: Sequence[Group], losses: Mapping[str, Mapping[Choice, float]], choices: Mapping[str, Choice]
) -> list[str]:
    """Return the table of an automatic search: KL of each candidate of each group, and what was chosen."""
    header = ["group", "weights", *(f"KL {choice} ({BITS[choice]:g} bits)" for choice in CANDIDATES), "chosen", "bits"]
    rows = [
        [
            group.name,
            f"{group.size:,}",
            *(f"{losses[group.name][choice]:.2e}" for choice in CANDIDATES),
            choices[group.name],
            f"{BITS[choices[group.name]]:g}",
        ]
        for group in groups
        if group.name in losses
    ]
    return align([header, *rows], text_columns=(0, 2 + len(CANDIDATES)))


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report for a terminal."""
    header = ["layers", "format", "number", "weights", "bits"]
    rows = [
        [row["kind"], row["format"], f"{row['layers']:,}", f"{row['weights']:,}", f"{row['bits']:.2f}"]
        for row in report["layers"]
    ]
    bits, size = report["bits"], report["size"]
    of_quantized = "" if bits["quantized"] is None else f"{bits['quantized']:.3f} of the quantised layers, "
    budget = report["settings"].get("bits")
    of_linear = f"{bits['linear']:.3f} of the linear layers" + ("" if budget is None else f" (budget {budget:g})")
    deviation = size["files"] / size["arithmetic"] - 1
    return [
        *align([header, *rows], text_columns=(0, 1)),
        f"bits per weight: {of_quantized}{of_linear}, {bits['all']:.3f} of all",
        f"size: {show_size(size['before'])} before, {show_size(size['files'])} after; by the formats' arithmetic "
        f"{show_size(size['arithmetic'])} ({deviation:+.2%}: names and shapes in the files)",
        *_quality_lines(report),
        *_expert_lines(report["experts"]),
        "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items()),
    ]


def _quality_lines(report: Mapping[str, Any]) -> list[str]:
    quality, texts = report["quality"], report["settings"].get("texts")
    if quality is None:
        return ["quality: not measured, for there are no texts (--data)"]
    rows = [["", "before", "after", ""]]
    for key, label, digits in (("perplexity", "perplexity", 4), ("bits_per_byte", "bits per byte", 4)):
        before, after = quality["before"][key], quality["after"][key]
        if before is not None:
            rows.append([label, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after / before - 1:+.2%}"])
    return [
        f"held-out texts: {quality['rows']:,} rows, {quality['tokens']:,} tokens scored ({texts})",
        *align(rows),
        f"KL(original || quantised): {quality['kl']:.6f} nats per token; the same most likely token: "
        f"{quality['top1_agreement']:.2%}",
    ]


def _expert_lines(coverage: Sequence[Mapping[str, Any]]) -> list[str]:
    if not coverage:
        return []
    trouble = [row for row in coverage if row["unreached"] or row["few"]]
    experts, least = sum(len(row["tokens"]) for row in coverage), min(min(row["tokens"]) for row in coverage)
    if not trouble:
        return [f"experts: calibration reached all {experts:,}, each with {least:,} tokens or more"]
    lines = ["experts that calibration did not reach, or hardly: they take their layer's input scale"]
    for row in trouble:
        if row["unreached"]:
            lines.append(f"  {row['layer']}: no token: {_listed(row['unreached'])}")
        if row["few"]:
            lines.append(f"  {row['layer']}: fewer than {FEW_TOKENS} tokens: {_listed(row['few'])}")
    return lines


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:LISTED]))
    return shown if len(numbers) <= LISTED else f"{shown}, ... ({len(numbers):,} in all)"
