"""Post-training quantisation: a MODEL in NVFP4, FP8, or a mixture of formats, as inference engines load it."""

from typing import Literal

from app.options import Device, Dtype, Model, OutputFolder, parse_size, short_dtype
from modules.errors import UserError

DEFAULT_BITS = 5.0
"""Budget of `--format auto` unless another is given."""


def quantize(
    model: Model,
    *,
    output: OutputFolder,
    format: Literal["nvfp4", "nvfp4-weight-only", "fp8", "auto"] = "nvfp4",
    effective_bits: float | None = None,
    rules: list[str] | None = None,
    exclude: list[str] | None = None,
    weights: Literal["max", "mse", "four_over_six"] = "max",
    kv_cache: Literal["auto", "fp8", "none"] = "auto",
    data: str | None = None,
    calibration_tokens: int = 131_072,
    search_tokens: int = 8192,
    evaluation_tokens: int = 32_768,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    batch_tokens: int = 8192,
    max_shard_size: str = "5GB",
) -> None:
    """Quantise a MODEL after its training, and report bits, size, KL and perplexity before and after.

    All linear layers are quantised but the head and the MTP block; embeddings, routers, norms and convolutions are kept
    too, as in Model Optimizer and the released checkpoints, and so are layers whose in-features are no multiple of 16.
    q, k and v of an attention layer have one format, and so have the routed experts of a layer: engines run them as
    one. The scale of a layer's inputs is that of the largest magnitude that calibration saw; inputs beyond it saturate.

    The output is a Hugging Face folder in Model Optimizer's layout; `score`, `generate`, `chat` and `evaluate` run it
    as it is served, and `export` gives other layouts. Before it appears under its name it is read again and compared
    with the original on texts that calibration did not see (what the MTP block drafts is not); the figures are printed
    and written into it as quantization_report.json.

    --format auto searches a mixture of nvfp4, fp8 and layers that are kept: for each group of layers and each format it
    measures the KL divergence of the next-token distributions when that group alone is quantised, and takes the mixture
    with the least sum of them whose mean bits per weight are within --effective_bits.

    Args:
        model: A folder that fit wrote (a checkpoint, or a run's folder for its newest one), or a Hugging Face folder.
        output: Folder to write; must not exist, or be empty.
        format: nvfp4 (weights and inputs, 4.5 bits with the block scales), nvfp4-weight-only, fp8 (weights and inputs,
            a scale for each tensor), or auto.
        effective_bits: Budget of auto: mean bits per weight over all linear layers but head, routers and, unless a rule
            names it, the MTP block; nvfp4 is 4.5, fp8 8, and layers that are kept count as 16, by whatever they are
            kept. null: 5.
        rules: PATTERN=FORMAT for layers that get another format than --format: nvfp4, nvfp4-weight-only, fp8 or bf16
            (kept). A shell pattern over module names, as in a precision recipe; may be given several times, the first
            that fits a layer decides. Reaches the MTP block only if it begins with mtp.
        exclude: Shell pattern over names of modules that are kept as they are; may be given several times; comes before
            the rules.
        weights: How the block scales of NVFP4 weights are found: of the largest magnitude (max), with the least squared
            error of all scales (mse), or the better of mapping the largest magnitude onto 6 or 4 (four_over_six).
        kv_cache: fp8 writes scales of keys and values, with which they are kept in FP8; none: they are not quantised.
            auto: fp8, as in Model Optimizer's default recipe, but none with --format nvfp4-weight-only, which can then
            do without --data.
        data: Texts to calibrate on and to judge by: a folder (or URL) that `prepare` wrote with the model's tokenizer,
            of which training rows and held-out rows are taken; or a JSONL file as `score` takes it, or a text file (cut
            into rows of 512 tokens), of which every 10th row is held out. null: the corpora of the run that wrote the
            model, if they are where the run had them.
        calibration_tokens: Most tokens to calibrate on, from rows spaced evenly over the data.
        search_tokens: Of those, most tokens that auto measures on.
        evaluation_tokens: Most held-out tokens to judge by.
        dtype: Dtype of the tensors that are not quantised: bf16 for all but the router biases, as in the open
            checkpoints; fp32; or auto, that of the MODEL.
        device: Where to compute; auto takes a GPU if there is one.
        batch_tokens: Tokens in one forward pass: bounds the memory. Longer texts go through in pieces.
        max_shard_size: Most bytes of tensors in a file, for example 5GB, 500MB or 2GiB.

    Raises:
        UserError: an option, pattern or file is wrong; the message names it and the mend.

    Example:
        python -m app quantize runs/pretrain --output tiny-nvfp4
    """
    from app.models import choose_device, open_source
    from app.quantization.job import Job, QuantizeRequest
    from app.quantization.report import report_lines
    from app.quantization.texts import read_texts
    from modules.ptq.layers import parse_rules

    for name, number in (
        ("calibration_tokens", calibration_tokens),
        ("search_tokens", search_tokens),
        ("evaluation_tokens", evaluation_tokens),
        ("batch_tokens", batch_tokens),
    ):
        if number < 2:
            raise UserError(f"--{name}: {number} must be at least 2")
    if effective_bits is not None and format != "auto":
        raise UserError(f"--effective_bits: only --format auto keeps to a budget, not {format}; leave it out")
    where, limit = choose_device(device), parse_size(max_shard_size)
    source = open_source(model)
    if source.quantization is not None:
        raise UserError(f"{source.path} is quantised already; give the model that it was made of")
    request = QuantizeRequest(
        default=None if format == "auto" else format,
        bits=DEFAULT_BITS if effective_bits is None else effective_bits,
        rules=parse_rules(rules or []),
        exclude=exclude or [],
        search=weights,
        kv_cache=kv_cache == "fp8" or (kv_cache == "auto" and format != "nvfp4-weight-only"),
        search_tokens=search_tokens,
        dtype=short_dtype(dtype),
        batch_tokens=batch_tokens,
    )
    job = Job(source, request, read_texts(source, data, calibration_tokens, evaluation_tokens), where)
    report = job.run(output, limit)
    print()
    for line in report_lines(report):
        print(line)
    print(output)
