"""What an evaluation found: the harness's table, the samples behind each figure, and what looks like a failure."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, make_table

from datamodules.text.files import write_blocks, write_file

INVALID = "[invalid]"
"""What the harness's filters answer where they find nothing in a completion."""
SHOWN = 80
"""Characters of a completion that a note shows."""


def describe(results: dict[str, Any]) -> str:
    """Return the tables, the samples per task, and notes on what looks wrong."""
    lines = [make_table(results)]
    if results.get("groups"):
        lines.append(make_table(results, "groups"))
    for task, count in results["n-samples"].items():
        lines.append(f"{task}: {count['effective']:,} of {count['original']:,} samples")
    return "\n".join([*lines, *notes(results)])


def notes(results: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each figure that may be zero only because no answer had the form that was looked for."""
    for task, samples in results["samples"].items():
        generated = results["configs"][task].get("output_type") == "generate_until"
        for key, value in results["results"][task].items():
            metric, _, chosen = key.partition(",")
            mine = [sample for sample in samples if sample["filter"] == chosen and metric in sample["metrics"]]
            if not mine or not generated:
                continue
            empty = sum(_only(sample["filtered_resps"]) in (INVALID, "") for sample in mine)
            if empty:
                yield f"note: {task}: filter {chosen} found no answer in {empty:,} of {len(mine):,} completions"
            if value == 0 and results["higher_is_better"].get(task, {}).get(metric):
                first = mine[0]
                yield (
                    f"note: {task}: {metric} is 0 for all {len(mine):,} samples; the first completion is "
                    f"{_short(_only(first['resps']))}, the target {_short(first['target'])}"
                )


def write_results(file: Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write figures, tasks, settings and versions as JSON; the samples are left out."""
    kept = {key: value for key, value in results.items() if key != "samples"}
    report = {**kept, "config": settings, "environment": environment()}
    text = json.dumps(report, indent=2, ensure_ascii=False, default=handle_non_serializable)
    write_file(file, f"{text}\n".encode())


def write_samples(file: Path, results: dict[str, Any]) -> None:
    """Write a row for each sample: document, target, what the model was asked and answered, metrics."""
    rows = ({"task": task, **sample} for task, samples in results["samples"].items() for sample in samples)
    lines = (json.dumps(row, ensure_ascii=False, default=handle_non_serializable) for row in rows)
    write_blocks(file, (f"{line}\n".encode() for line in lines))


def environment() -> dict[str, str]:
    """Return the versions that decide figures."""
    names = ("superbolt", "lm-eval", "datasets", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _only(value: Any) -> Any:
    """Return what lists of one entry hold."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."
