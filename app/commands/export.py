"""Write a MODEL as a Hugging Face folder, for transformers, vLLM and others."""

from typing import Literal

from app.options import Dtype, Model, OutputFolder, parse_size, short_dtype


def export(
    model: Model,
    *,
    output: OutputFolder,
    format: Literal[
        "hf",
        "nvfp4-modelopt",
        "nvfp4-compressed-tensors",
        "fp8-modelopt",
        "fp8-compressed-tensors",
        "mixed-modelopt",
        "mixed-compressed-tensors",
        "peft",
    ] = "hf",
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
) -> None:
    """Write a MODEL as a Hugging Face folder, with tokenizer and model card.

    Weights are safetensors under the names of the open Nemotron-H checkpoints, the MTP block's included. Reading the
    folder again gives the same bits. It appears under its name when it is complete.

    A MODEL of adapters (model.init_args.lora) is written merged with its base, or by --format peft as it is, for peft's
    PeftModel.from_pretrained over transformers' model of the base.

    A quantised MODEL keeps its codes and scales in the formats other than hf: these are layouts of files. The command
    quantize makes such a model.

    Args:
        model: A folder that fit wrote (a checkpoint, or a run's folder for its newest one), or a Hugging Face folder.
        output: Folder to write; must not exist, or be empty.
        format: hf, the layout of transformers, with plain weights (a quantised MODEL's as the numbers they mean). Or,
            of a quantised MODEL: nvfp4, fp8, or mixed (both), as it is quantised, in the layout of Model Optimizer
            (vLLM, SGLang, TensorRT-LLM) or of compressed-tensors (vLLM, transformers). Or, of adapters: peft, without
            their base.
        dtype: Of all that is not quantised. auto keeps each tensor's dtype (fp32 for a checkpoint of fit, and for what
            was quantised); fp32 widens all; bf16 rounds all but the router biases, which stay fp32 as in the open
            checkpoints.
        max_shard_size: Most bytes of tensors in a file, for example 5GB, 500MB or 2GiB; a larger tensor gets a file of
            its own.

    Raises:
        UserError: the model is damaged or of another family, the format does not fit it, or the output holds files;
            the message names the mend.

    Example:
        python -m app export runs/pretrain --output tiny-hf
    """
    from app.models import open_tokenizer, say_notes
    from modules.checkpoints.adapted import AdaptedSource
    from modules.checkpoints.export import convert
    from modules.checkpoints.export import export as write
    from modules.checkpoints.layouts.detect import fitting_layout
    from modules.checkpoints.peft import export_adapters
    from modules.checkpoints.safetensors import show_size
    from modules.checkpoints.source import open_model
    from modules.errors import UserError

    limit = parse_size(max_shard_size)
    source = open_model(model)
    if format == "peft":
        if not isinstance(source, AdaptedSource):
            raise UserError(f"--format peft: {source.path} is a whole model, no adapters; take --format hf")
        for line in export_adapters(source, output):
            print(f"note: {line}", flush=True)
        print(f"{output}: {len(source.layers)} adapted layers; their base is {source.base.path}")
        return
    if source.tokenizer_folder is not None:
        open_tokenizer(source)  # nobody could use a damaged one
    layout = fitting_layout(format, source.quantization, source.path)
    say_notes(source)
    print(f"{source.path}: {len(source.tensors):,} tensors", flush=True)
    chosen, report = short_dtype(dtype), lambda line: print(line, flush=True)
    if layout is not None:
        written = convert(source, output, layout=layout, dtype=chosen, max_shard_bytes=limit, report=report)
    else:
        if source.quantization is not None:
            rounded = "rounded to bf16, as you ask" if chosen == "bf16" else "in fp32, which holds them exactly"
            print(f"note: quantised weights are written as the numbers they mean, {rounded}", flush=True)
        written = write(source, output, dtype=chosen, max_shard_bytes=limit, report=report)
    print(f"{output}: {written.tensors:,} tensors, {len(written.files)} files, {show_size(written.size)}")
