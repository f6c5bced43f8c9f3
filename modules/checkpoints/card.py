"""The model card: what is known of a model, and how to load it. Nothing is said that its files do not say."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import yaml

from modules.backbone.config import MIXERS, BackboneConfig
from modules.checkpoints.card_quantized import Rows, Written, quantization_parts, table, use_lines
from modules.checkpoints.names import EMBEDDING, HEAD, MTP, STACKED, TensorInfo
from modules.checkpoints.source import ModelFolder
from modules.precision.formats import QUANTIZED

KEPT = ("license", "license_name", "license_link", "language", "base_model", "datasets")
"""Keys of a source's own card that stay true for its copy."""
METRICS = {
    "validation/loss": "nats per token, next token only, held-out rows",
    "validation/bits_per_byte": "bits per UTF-8 byte of held-out text",
}
UNLIMITED = 1e-30
"""`time_step_min` in config.json of models trained here. It shaped their initial weights only, but transformers (5.23)
raises every dt to it: 0.001 changes log-probabilities of the model that `make fit` trains by up to 0.4."""
_ARITHMETIC = ("stochastic_rounding", "hadamard", "two_dimensional_weights")
"""Keys of a precision recipe that are true as a rule."""


def write_card(
    source: ModelFolder, tensors: Mapping[str, TensorInfo], name: str, quantized: Written | None = None
) -> str:
    """Return the README.md of a model.

    Args:
        source: the model.
        tensors: shape and dtype of each tensor as written.
        name: of the folder, for the commands.
        quantized: how it is quantised; None: it is not.
    """
    parts = [
        _front_matter(source),
        f"# {name}",
        f"A language model of the Nemotron-H family ({_mixers(source.config)}), {_origin(source)}.",
        "## Architecture",
        table(_architecture(source.config)),
        "## Parameters",
        table([*parameter_rows(source.config, source.tensors), ("on the disk", _on_disk(tensors))]),
    ]
    if quantized is not None:
        logical = {name: tensors.get(name, info) for name, info in source.tensors.items()}
        logical |= {name: source.tensors[name] for name in quantized.quantization.weights}
        parts += quantization_parts(quantized, logical)
    if "merge" in source.facts:
        parts += ["## Merge", *_merge(source.facts["merge"])]
    if "run" in source.facts:
        title = "## Training of the first model" if "merge" in source.facts else "## Training"
        parts += [title, table(_training(source.facts["run"], source.facts.get("manifest", {})))]
    if metrics := source.facts.get("manifest", {}).get("metrics"):
        rows = [
            (f"{key} ({METRICS[key]})" if key in METRICS else key, f"{value:.4f}") for key, value in metrics.items()
        ]
        of = ", before it was quantised" if quantized is not None else ""
        parts += [
            "## Validation",
            f"The newest validation of the run when this checkpoint was saved{of}.",
            table(rows),
        ]
    return "\n\n".join([*parts, "## Use", _use(source, name, quantized)]) + "\n"


def label(source: ModelFolder) -> str:
    """Return what to call a model: run and step, or the folder's name."""
    manifest, run = source.facts.get("manifest"), source.facts.get("run")
    if manifest is None or run is None:
        return source.path.absolute().name
    return f"{run.get('name', 'run')}, step {manifest['step']:,}"


def parameter_rows(config: BackboneConfig, tensors: Mapping[str, TensorInfo]) -> Rows:
    """Return parameters and those one token uses, a tied matrix counted once.

    Router biases are no parameters (no gradient trains them) and are counted by themselves. One token uses K of E
    routed experts; the MTP block is left out of that, as it only drafts.
    """
    sizes = {name: prod(info.shape) for name, info in tensors.items()}
    biases = sum(size for name, size in sizes.items() if name.endswith("e_score_correction_bias"))
    weights = {name: size for name, size in sizes.items() if not name.endswith("e_score_correction_bias")}
    main = {name: size for name, size in weights.items() if not name.startswith(MTP)}
    routed = sum(size for name, size in main.items() if STACKED in name)
    active = sum(main.values()) - routed
    if routed:
        active += routed * config.num_experts_per_tok // config.n_routed_experts
    rows = [("total", f"{sum(main.values()):,}")]
    if len(main) < len(weights):
        rows.append(("total with the MTP block", f"{sum(weights.values()):,}"))
    rows.append(("active per token", f"{active:,}"))
    if HEAD in main:
        rows.append(("the same without the input embedding", f"{active - main[EMBEDDING]:,}"))
    if biases:
        rows.append(("router biases, beside these", f"{biases:,}"))
    return rows


def _on_disk(tensors: Mapping[str, TensorInfo]) -> str:
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in tensors.values()})
    return f"{len(tensors):,} tensors, {' and '.join(dtypes)}"


def _front_matter(source: ModelFolder) -> str:
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    about["tags"] = ["nemotron_h", *(["merge"] if "merge" in source.facts else [])]
    about |= {key: value for key, value in _own_front_matter(source.path / "README.md").items() if key in KEPT}
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _own_front_matter(file: Path) -> dict[str, Any]:
    """Return the YAML block at the start of a card; a card without one, or with another thing there, says nothing."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        about = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return about if isinstance(about, dict) else {}


def _origin(source: ModelFolder) -> str:
    if "merge" in source.facts:
        return f"an average of {len(source.facts['merge']['models'])} checkpoints made with Superbolt"
    if "manifest" in source.facts:
        return f"trained with Superbolt (run {label(source)})"
    return f"rewritten by Superbolt from the folder {label(source)}"


def _mixers(config: BackboneConfig) -> str:
    letters = config.hybrid_override_pattern
    counts = [f"{letters.count(letter)} {name}" for letter, name in MIXERS.items() if letter in letters]
    return " + ".join(counts) + " layers"


def _architecture(config: BackboneConfig) -> Rows:
    c, letters = config, config.hybrid_override_pattern
    used = letters + (c.mtp_hybrid_override_pattern if c.num_nextn_predict_layers else "")
    rows = [
        ("layers", f"{len(letters)}: `{letters}` (M Mamba-2, E mixture of experts, * attention, - MLP)"),
        ("hidden size", f"{c.hidden_size:,}"),
        ("vocabulary", f"{c.vocab_size:,}, embedding and head {'tied' if c.tie_word_embeddings else 'untied'}"),
    ]
    if "M" in used:
        heads = f"{c.mamba_num_heads} heads of {c.mamba_head_dim}, state {c.ssm_state_size}, {c.n_groups} groups"
        rows.append(("Mamba-2", f"{heads}, convolution {c.conv_kernel}"))
    if "*" in used:
        heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of {c.head_dim}"
        rows.append(("attention", f"{heads}, no positional encoding"))
    if "E" in used:
        width = "the hidden size" if c.moe_latent_size is None else f"latent size {c.moe_latent_size:,}"
        experts = f"{c.n_routed_experts}, {c.num_experts_per_tok} per token"
        shared = c.moe_shared_expert_intermediate_size
        rows += [
            ("routed experts", f"{experts}, {c.moe_intermediate_size:,} wide, on {width}"),
            ("shared expert", f"{shared:,} wide" if shared else "none"),
            ("router", f"sigmoid, factor {c.routed_scaling_factor:g}, {c.topk_group} of {c.n_group} groups"),
        ]
    if "-" in used:
        rows.append(("MLP", f"{c.intermediate_size:,} wide"))
    mtp = f"one block `{c.mtp_hybrid_override_pattern}` for every depth" if c.num_nextn_predict_layers else "none"
    return [*rows, ("multi-token prediction (MTP)", mtp)]


def _training(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> Rows:
    """Return the recipe that a run's resolved configuration holds; keys that it lacks are left out."""
    model, data = (run.get(key, {}).get("init_args", {}) for key in ("model", "data"))
    optimizer, schedule = model.get("optimizer", {}), model.get("schedule", {})
    rows: Rows = [("stage", run["model"]["class_path"].rpartition(".")[2])]
    if model.get("init_from"):
        rows.append(("started from", Path(str(model["init_from"])).name))
    if manifest:
        rows.append(("optimiser steps", f"{manifest['step']:,} of {manifest['last_step']:,}"))
        rows.append(("tokens (positions, padding included)", f"{manifest['tokens']:,}"))
    rows += [("data", text) for text in _data(data)]
    if "sequence_length" in data:
        rows.append(("batch", f"{data['global_batch_size']:,} rows of {data['sequence_length']:,} tokens"))
    if optimizer:
        rest = {key: value for key, value in optimizer.items() if key != "learning_rate"}
        settings = ", ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in rest.items())
        rows.append(("AdamW", f"peak learning rate {optimizer['learning_rate']:g}, {settings}"))
    if schedule:
        warmup, decay = schedule["warmup_tokens"], schedule["decay_tokens"]
        text = f"{warmup:,} tokens of linear warm-up, stable, {decay:,} tokens of minus-sqrt decay"
        rows.append(("schedule", f"{text} to {schedule['minimum_ratio']:g} of the peak"))
    if precision := model.get("precision"):
        rows.append(("compute formats", _formats(precision)))
    if "seed" in model:
        rows.append(("seed", f"{model['seed']}"))
    if manifest:
        rows.append(("devices, torch", f"{manifest['devices']}, {manifest['torch']}"))
    return rows


def _formats(precision: Any) -> str:
    """Return the recipe of a run in words; runs of before there were named recipes hold the list of rules alone."""
    if isinstance(precision, list):
        precision = {"rules": precision}
    parts = [f"`{rule['pattern']}` {rule['format']}" for rule in precision["rules"]]
    if recipe := precision.get("recipe"):
        parts.append(f"recipe {recipe}")
    if recipe == "super" or any(rule["format"] in QUANTIZED for rule in precision["rules"]):
        parts.append(f"last {precision['bf16_tail']:.0%} of the layers at least bf16")
        parts += [name.replace("_", " ") + " off" for name in _ARITHMETIC if not precision[name]]
    parts += [
        f"{switch['products']} products of `{switch['pattern']}` in {switch['format']} after "
        f"{switch['at_tokens']:,} tokens"
        for switch in precision.get("switches", [])
    ]
    return ", ".join(parts)


def _data(data: Mapping[str, Any]) -> Iterable[str]:
    """Yield the corpora by name: folders' paths and stores' URLs are the user's own."""
    if data.get("sources"):
        yield ", ".join(data["sources"])
    elif data.get("path"):
        yield Path(data["path"]).name


def _merge(merge: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs on a merge; `merge` is what `modules.checkpoints.merge` says of it."""
    rows = [(model["label"], f"{model['weight']:.6f}") for model in merge["models"]]
    return [
        f"{merge['method']} All tensors are averaged in fp32, router biases, `A_log`, `D` and `dt_bias` like the "
        "others, and rounded once to the dtype they have in the first model.",
        table(rows, ("model", "weight")),
    ]


def _use(source: ModelFolder, name: str, quantized: Written | None) -> str:
    has_tokenizer = source.tokenizer_folder is not None
    lines = _transformers(name, has_tokenizer)
    if quantized is not None:
        lines = use_lines(quantized, name, lines)
    if source.tokenizer_folder is not None:
        chat = any((source.tokenizer_folder / file).exists() for file in ("chat_template.jinja", "chat_template.json"))
        lines += ["With Superbolt:", "```", f'python -m app generate {name} --prompt "import "']
        lines += [*([f"python -m app chat {name}"] if chat else []), "```"]
    if source.config.num_nextn_predict_layers:
        lines.append("transformers leaves the MTP block (`mtp.*`) out; Superbolt drafts with it.")
    least = source.config.time_step_min
    if "M" in source.config.hybrid_override_pattern and "run" not in source.facts and least > UNLIMITED:
        lines.append(
            f"transformers raises Mamba's time steps to at least `time_step_min` ({least:g}), Superbolt does not; "
            '`layer.mixer.time_step_limit = (0.0, float("inf"))` on its Mamba layers gives equal numbers.'
        )
    return "\n".join(lines if has_tokenizer else [*lines, "The model came without a tokenizer."])


def _transformers(name: str, has_tokenizer: bool) -> list[str]:
    load = f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")'
    if not has_tokenizer:
        return ["```python", "from transformers import AutoModelForCausalLM", "", load, "```"]
    return [
        "With transformers (5.17 or later):",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        load,
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        'inputs = tokenizer("import ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
    ]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_show, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
