"""Write a MODEL as a Hugging Face folder, for transformers, vLLM and others."""

from pathlib import Path
from typing import Literal

from app.options import Dtype, short_dtype


def export(
    model: Path,
    *,
    output: Path,
    format: Literal["hf"] = "hf",
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
) -> None:
    """Write a MODEL as a Hugging Face folder, with tokenizer and model card.

    Weights are safetensors under the names of the open Nemotron-H checkpoints, the MTP block's included. Reading the
    folder again gives the same bits. It appears under its name when it is complete.

    Args:
        model: A folder that fit wrote (a checkpoint, or a run's folder for its newest one), or a Hugging Face folder.
        output: Folder to write; must not exist, or be empty.
        format: hf, the layout of transformers.
        dtype: auto keeps each tensor's dtype (fp32 for a checkpoint of fit); fp32 widens all; bf16 rounds all but the
            router biases, which stay fp32 as in the open checkpoints.
        max_shard_size: Most bytes of tensors in a file, for example 5GB, 500MB or 2GiB; a larger tensor gets a file of
            its own.

    Raises:
        ValueError: the model is damaged or of another family, or the output holds files; the message names the mend.
    """
    from modules.checkpoints.export import export as write
    from modules.checkpoints.source import open_model
    from modules.checkpoints.writer import check_new, parse_size, show_size

    limit = parse_size(max_shard_size)
    check_new(output)
    source = open_model(model)
    for note in source.notes:
        print(f"note: {note}")
    print(f"{source.path}: {len(source.tensors):,} tensors", flush=True)
    written = write(
        source, output, dtype=short_dtype(dtype), max_shard_bytes=limit, report=lambda line: print(line, flush=True)
    )
    print(f"{output}: {written.tensors:,} tensors, {len(written.files)} files, {show_size(written.size)}")
