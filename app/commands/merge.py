"""Average models into one: by given weights, or so that the average stands for a decay of the learning rate."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.options import Model, OutputFolder, parse_size
from modules.errors import UserError

if TYPE_CHECKING:
    from modules.checkpoints.source import ModelFolder


def merge(
    models: list[Model],
    *,
    output: OutputFolder,
    weights: list[float] | None = None,
    decay: Literal["minus_sqrt"] | None = None,
    minimum_ratio: float = 0.01,
    steps: list[int] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Average models of one architecture into a Hugging Face folder.

    Without --weights and --decay all count the same. Tensors are averaged in fp32, router biases too, and written in
    the dtype they have in the first model, whose tokenizer and settings the folder gets.

    --decay minus_sqrt is for checkpoints of one run from its phase of constant learning rate, in the order they were
    saved: it weighs them so that the average stands for a decay from the first to the last, as if each update between
    them had been made at the learning rate of that decay.

    Args:
        models: Folders that fit wrote (checkpoints, or runs for their newest) or Hugging Face folders.
        output: Folder to write; must not exist, or be empty.
        weights: Weights, one per MODEL in their order: --weights 0.7 0.3 after the MODELs; divided by their sum.
        decay: minus_sqrt gives the weights of a minus-sqrt decay in place of --weights.
        minimum_ratio: Learning rate at the end of that decay, as a share of the peak.
        steps: Optimiser steps the MODELs were saved at, one per MODEL, for --decay; checkpoints of fit know theirs.
        max_shard_size: Most bytes of tensors in a file, for example 5GB, 500MB or 2GiB.

    Raises:
        UserError: options contradict each other, or models cannot be averaged; the message names the mend.

    Example:
        python -m app merge runs/pretrain/checkpoints/step=* --output merged --decay minus_sqrt
    """
    from app.models import check_same_tokenizer, say_notes
    from modules.checkpoints.export import export
    from modules.checkpoints.merge import MergedSource
    from modules.checkpoints.safetensors import show_size
    from modules.checkpoints.source import open_model

    if weights is not None and decay is not None:
        raise UserError("--weights: --decay gives the weights; leave one of the two out")
    if decay is None and steps is not None:
        raise UserError("--steps: only --decay needs them; leave them out, or add --decay minus_sqrt")
    limit = parse_size(max_shard_size)
    sources = [open_model(path) for path in models]
    for other in sources[1:]:
        check_same_tokenizer(sources[0], other, "models")
    method = "By the weights given, divided by their sum." if weights else "By equal weights."
    if decay is not None:
        weights, method = _decay_weights(sources, models, steps, minimum_ratio)
    merged = MergedSource(sources, weights or [1.0] * len(sources), method)
    for source in sources:
        say_notes(source)
    for note in merged.notes:
        print(f"note: {note}")
    for model in merged.facts["merge"]["models"]:
        print(f"{model['weight']:.6f}  {model['label']}", flush=True)
    written = export(merged, output, max_shard_bytes=limit, report=lambda line: print(line, flush=True))
    print(f"{output}: {written.tensors:,} tensors, {len(written.files)} files, {show_size(written.size)}")


def _decay_weights(
    sources: "Sequence[ModelFolder]", models: list[Path], steps: list[int] | None, minimum_ratio: float
) -> tuple[list[float], str]:
    """Return the weights of a minus-sqrt decay and a sentence on them; print what speaks against it."""
    from modules.checkpoints.merge import decay_weights
    from modules.optim.schedule import ScheduleConfig

    known = _steps(sources, models) if steps is None else steps
    if len(known) != len(models):
        raise UserError(f"--steps: {len(known)} given for {len(models)} MODELs; give one for each, in their order")
    if len(known) < 2 or any(after <= before for before, after in pairwise(known)):
        listed = ", ".join(map(str, known))
        raise UserError(f"--decay: the MODELs are of steps {listed}; give two or more, each later than the one before")
    for source, step in zip(sources, known, strict=True):
        if trouble := _not_constant(source):
            print(f"note: {source.path}, step {step:,}: {trouble}; --decay assumes a constant learning rate")
    length = known[-1] - known[0]
    schedule = ScheduleConfig(decay_tokens=length, minimum_ratio=minimum_ratio)
    method = (
        f"Weighted so that the average stands for a minus-sqrt decay of the learning rate to {minimum_ratio:g} of its "
        f"peak over the {length:,} steps from {known[0]:,} to {known[-1]:,} (arXiv 2507.17634)."
    )
    return decay_weights(known, schedule.factor), method


def _steps(sources: "Sequence[ModelFolder]", models: list[Path]) -> list[int]:
    """Return the optimiser step of each model, as its manifest says."""
    steps = [source.facts.get("manifest", {}).get("step") for source in sources]
    for path, step in zip(models, steps, strict=True):
        if step is None:
            raise UserError(f"{path} does not say at which step it was saved; give --steps, one for each MODEL")
    return steps


def _not_constant(source: "ModelFolder") -> str | None:
    """Return why the learning rate was not constant when a checkpoint of fit was saved, or None."""
    from modules.optim.schedule import ScheduleConfig

    run, manifest = source.facts.get("run"), source.facts.get("manifest")
    settings = None if run is None else run["model"]["init_args"].get("schedule")
    if settings is None or manifest is None:
        return None
    schedule = ScheduleConfig(**settings)
    total_tokens = manifest["tokens"] * manifest["last_step"] // manifest["step"]
    factor = schedule.factor(manifest["tokens"], total_tokens)
    return None if factor == 1 else f"the learning rate was at {factor:.2g} of its peak"
