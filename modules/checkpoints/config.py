"""The configuration files of a folder: `config.json` to and from `BackboneConfig`, and what is said of generation.

Every field of transformers' `NemotronHConfig` is in exactly one of three tables: honoured, fixed (one value is what
this project computes, any other is refused by name), or ignored (it changes no number). Missing fields take
transformers' defaults, which are not ours. Both generations are read and written: layer strings
(`hybrid_override_pattern`) and layer lists (`layers_block_type`, also `layer_types`).
Source of fields and defaults: transformers 5.23, models/nemotron_h; the older names are those of the open checkpoints.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modules.backbone.config import BackboneConfig
from modules.checkpoints.folder import CONFIG, read_json
from modules.checkpoints.names import PLACEHOLDER_WIDTH
from modules.errors import UserError

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
_SIZES = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
}
DEFAULTS: dict[str, Any] = {
    field.name: _SIZES.get(field.name, field.default)
    for field in dataclasses.fields(BackboneConfig)
    if not field.name.endswith("pattern")
}
"""Fields that are honoured, with transformers' defaults: those of sizes are not ours, all others are."""

OLDER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
}
"""Other names of a field; where a file has two of them, they must agree."""

FIXED: dict[str, tuple[list[Any], str]] = {
    "use_bias": ([False], "Mamba projections have no bias here"),
    "mamba_proj_bias": ([False], "Mamba projections have no bias here"),
    "attention_bias": ([False], "attention projections have no bias here"),
    "mlp_bias": ([False], "MLP, expert and latent projections have no bias here"),
    "mlp_hidden_act": (["relu2"], "MLPs and experts compute the squared ReLU here"),
    "mamba_hidden_act": (["silu", "swish"], "the convolution's activation is SiLU here"),
    "time_step_limit": ([[0.0, float("inf")], None], "dt is not limited here"),
    "residual_in_fp32": ([False], "the residual stream has the embedding's dtype here"),
    "sliding_window": ([None], "attention sees all positions here"),
    "quantization_config": ([None], "quantised weights cannot be read; take the model in bf16"),
    "quantization": ([None], "quantised weights cannot be read; take the model in bf16"),
}
"""Fields that would change numbers: values that are computed here, and what that is."""

NOT_WRITTEN = ("time_step_limit", "quantization_config", "quantization")
"""Of these, what is left out of a config.json (JSON has no infinity, and readers disagree how to write one)."""

IGNORED = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version"),
    *("use_cache", "use_mamba_kernels", "num_logits_to_keep", "output_router_logits", "mamba_ssm_cache_dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings", "expand", "mamba_expand"),
    *("moe_shared_expert_overlap", "attention_dropout", "hidden_dropout", "rope_theta", "partial_rotary_factor"),
    *("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "num_hidden_layers", "n_shared_experts"),
}
"""Fields that change no number of the network (dropout: at inference; see `notes`)."""

LAYER_NAMES = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
LETTERS = {name: letter for letter, name in LAYER_NAMES.items()} | {
    "mamba": "M",
    "attention": "*",
    **{letter: letter for letter in LAYER_NAMES},
}
MAIN = ("hybrid_override_pattern", "layers_block_type", "layer_types")
MTP = ("mtp_hybrid_override_pattern", "mtp_layers_block_type", "mtp_layer_types")
DEFAULT_LAYERS, DEFAULT_MTP_LAYERS = "ME*-", "*E"
"""What transformers takes where a file says nothing of layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Special tokens of a model, and what else its folder says of generation."""

    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a completion; empty: none is known."""
    bos_token_id: int | None = None
    """Id that starts a text; None: none."""
    pad_token_id: int | None = None
    """Id that fills rows; None: none."""
    other: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The other keys of generation_config.json, as they are."""

    def token_ids(self) -> dict[str, int | list[int] | None]:
        """Return the ids by their keys in both files."""
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else [*self.eos_token_ids] or None
        return {"bos_token_id": self.bos_token_id, "eos_token_id": eos, "pad_token_id": self.pad_token_id}


def from_hugging_face(raw: dict[str, Any], file: Path) -> BackboneConfig:
    """Return the configuration that a `config.json` describes.

    Args:
        raw: its content.
        file: where it was read, for messages.

    Raises:
        UserError: it is of another family, contradicts itself, or sets a field to something not computed here.
    """
    check_family(raw, file)
    fields = _rename(raw, file)
    for key, (allowed, why) in FIXED.items():
        if key in fields and fields[key] not in allowed:
            raise UserError(f"{file}: {key} {shown(fields[key])} is not supported: {why} ({allowed[0]!r})")
    known = {key: fields.get(key, default) for key, default in DEFAULTS.items()}
    if known["num_nextn_predict_layers"] not in (0, 1):
        raise UserError(
            f"{file}: num_nextn_predict_layers {shown(known['num_nextn_predict_layers'])} is not supported: one MTP "
            "block is applied at every depth here (0 or 1)"
        )
    if not known["moe_shared_expert_intermediate_size"]:
        known["moe_shared_expert_intermediate_size"] = known["intermediate_size"]  # as transformers does
    if raw.get("n_shared_experts", 1) in (0, None):
        known["moe_shared_expert_intermediate_size"] = 0
    if known["num_key_value_heads"] is None:
        known["num_key_value_heads"] = known["num_attention_heads"]
    layers = _layers(raw, MAIN, file) or DEFAULT_LAYERS
    stated = raw.get("num_hidden_layers")
    if stated is not None and stated != len(layers):
        raise UserError(
            f"{file}: num_hidden_layers is {shown(stated)}, but {len(layers)} layers are listed; correct the wrong one"
        )
    known["hybrid_override_pattern"] = layers
    if known["num_nextn_predict_layers"]:
        known["mtp_hybrid_override_pattern"] = _layers(raw, MTP, file) or DEFAULT_MTP_LAYERS
    return make_config(known, file)


def notes(raw: dict[str, Any], file: Path) -> list[str]:
    """Return a line for what the user should know of a `config.json`: unknown keys, dropout."""
    lines = []
    known = DEFAULTS.keys() | OLDER_NAMES.keys() | FIXED.keys() | IGNORED | {*MAIN, *MTP}
    if unknown := sorted(raw.keys() - known):
        lines.append(f"{file}: unknown keys are ignored: {', '.join(unknown)}")
    dropout = [key for key in ("attention_dropout", "hidden_dropout") if raw.get(key)]
    lines += [f"{file}: {key} {raw[key]} is ignored: there is no dropout in training here" for key in dropout]
    return lines


def to_hugging_face(
    config: BackboneConfig,
    dtype: torch.dtype = torch.bfloat16,
    generation: GenerationDefaults | None = None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a `config.json` for `config`, readable by old and new transformers and by inference engines.

    Args:
        config: the network's shape.
        dtype: dtype of most tensors, for readers that look here and not at the tensors.
        generation: special tokens; None: those of `kept`, else none.
        kept: a `config.json` whose other entries (such as max_position_embeddings) are taken over.
    """
    written = {key: getattr(config, key) for key in DEFAULTS}
    unused = [key for key, value in written.items() if value == 0 and type(value) is int and DEFAULTS[key]]
    written |= {key: DEFAULTS[key] for key in unused}  # sizes of layers that it has not: others may divide by them
    written["moe_shared_expert_intermediate_size"] = config.moe_shared_expert_intermediate_size or PLACEHOLDER_WIDTH
    main, mtp = config.hybrid_override_pattern, config.mtp_hybrid_override_pattern
    own = {"_name_or_path", "auto_map", "transformers_version", "mamba_expand", "mtp_layer_types", "layer_types"}
    dropped = own | DEFAULTS.keys() | OLDER_NAMES.keys() | FIXED.keys()
    fixed = {key: allowed[0] for key, (allowed, _) in FIXED.items() if key not in NOT_WRITTEN}
    return {
        "expand": 2,
        "mamba_ssm_cache_dtype": "float32",
        "use_cache": True,
        **{key: value for key, value in (kept or {}).items() if key not in dropped},
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **written,
        **fixed,
        "rms_norm_eps": config.layer_norm_epsilon,
        "norm_eps": config.layer_norm_epsilon,
        "num_hidden_layers": len(main),
        "hybrid_override_pattern": main,
        "layers_block_type": [LAYER_NAMES[letter] for letter in main],
        "mtp_hybrid_override_pattern": mtp,
        "mtp_layers_block_type": [LAYER_NAMES[letter] for letter in mtp],
        "n_shared_experts": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **(generation.token_ids() if generation is not None else {}),
    }


def read_defaults(folder: Path, config: dict[str, Any], tokenizer_folder: Path | None) -> GenerationDefaults:
    """Return the defaults of a folder: generation_config.json decides, then config.json, then the tokenizer.

    Args:
        folder: may hold a generation_config.json.
        config: the model's config.json; empty where there is none.
        tokenizer_folder: the tokenizer's files, if any.

    Raises:
        UserError: a file cannot be read, or an id is no id.
    """
    file = folder / GENERATION_CONFIG
    generation = read_json(file) if file.exists() else {}
    ids: dict[str, Any] = {}
    for kind in ("eos", "bos", "pad"):
        key = f"{kind}_token_id"
        sources = ((generation, file), (config, folder / CONFIG))
        found = next(((raw[key], path) for raw, path in sources if raw.get(key) is not None), None)
        if found is None and tokenizer_folder is not None:
            found = _tokenizer_id(tokenizer_folder, f"{kind}_token"), tokenizer_folder
        ids[kind] = _checked(key, *found) if found is not None else ()
    named = {"eos_token_id", "bos_token_id", "pad_token_id"}
    return GenerationDefaults(
        eos_token_ids=ids["eos"],
        bos_token_id=next(iter(ids["bos"]), None),
        pad_token_id=next(iter(ids["pad"]), None),
        other={key: value for key, value in generation.items() if key not in named},
    )


def _checked(key: str, value: Any, file: Path) -> tuple[int, ...]:
    """Return an id or a list of ids as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for entry in values:
        if type(entry) is not int or entry < 0:
            raise UserError(f"{file}: {key} {value!r} must be a token id or a list of them")
    return tuple(values)


def _tokenizer_id(folder: Path, kind: str) -> int | None:
    """Return the id of the token that tokenizer_config.json calls `kind` (e.g. eos_token), or None."""
    files = folder / TOKENIZER_CONFIG, folder / "tokenizer.json"
    if not all(file.exists() for file in files):
        return None
    token = read_json(files[0]).get(kind)
    text = token.get("content") if isinstance(token, dict) else token
    tokenizer = read_json(files[1])
    ids = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return ids.get(text)


def make_config(fields: Mapping[str, Any], file: Path) -> BackboneConfig:
    """Return a `BackboneConfig` of fields that were read from a file.

    Raises:
        UserError: a field is unknown, missing, of the wrong type or out of range; names file and key.
    """
    known = {field.name: field for field in dataclasses.fields(BackboneConfig)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise UserError(f"{file}: {unknown[0]} is no field of a backbone; it was written by another version")
    hints = typing.get_type_hints(BackboneConfig)
    values = {}
    for key, value in fields.items():
        values[key] = _typed(value, hints[key], key, file)
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing")
    try:
        return BackboneConfig(**values)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('model.backbone.')}") from None


def _typed(value: Any, hint: Any, key: str, file: Path) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) in (int, float):
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise UserError(f"{file}: {key} {shown(value)} must be finite")
        return float(value)
    if type(value) in kinds:
        return value
    wanted = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise UserError(f"{file}: {key} {shown(value)} must be {wanted}")


def shown(value: Any) -> str:
    """Return a value from a file for a message: one line of moderate length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def check_family(raw: dict[str, Any], file: Path) -> None:
    """Raise a ValueError if a `config.json` is not of a Nemotron-H language model."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or ["NemotronHForCausalLM"]
    if kind != "nemotron_h" or not isinstance(architectures, list) or "NemotronHForCausalLM" not in architectures:
        raise UserError(
            f"{file}: model_type {shown(kind)}, architectures {shown(architectures)}: only language models of the "
            "Nemotron-H family ('nemotron_h', NemotronHForCausalLM) can be loaded"
        )


def _rename(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return `raw` under today's names, with time_step_limit as a list of floats."""
    fields = {key: value for key, value in raw.items() if key not in OLDER_NAMES}
    for old, new in OLDER_NAMES.items():
        if old not in raw:
            continue
        if new == "layer_norm_epsilon":  # transformers reads no other name of it, other engines do
            fields.setdefault(new, DEFAULTS[new])
        if new in fields and _plain(fields[new]) != _plain(raw[old]):
            raise UserError(
                f"{file}: {old} {shown(raw[old])} contradicts {new} {shown(fields[new])}; remove the wrong one"
            )
        fields[new] = raw[old]
    if "time_step_limit" in fields:
        fields["time_step_limit"] = _plain(fields["time_step_limit"])
    return fields


def _plain(value: Any) -> Any:
    """Return a JSON value with transformers' way of writing infinity undone."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if value in ({"__float__": "Infinity"}, {"__float__": "-Infinity"}):
        return float(value["__float__"])
    return value


def _layers(raw: dict[str, Any], keys: tuple[str, ...], file: Path) -> str | None:
    """Return the layer string that the first of `keys` gives; all that are given must agree."""
    found: dict[str, str] = {}
    for key in keys:
        value = raw.get(key)
        if value is None:
            continue
        if isinstance(value, list):
            if unknown := [name for name in value if not isinstance(name, str) or name not in LETTERS]:
                raise UserError(f"{file}: {key} names a layer {shown(unknown[0])}; known are {', '.join(LETTERS)}")
            value = "".join(LETTERS[name] for name in value)
        if not isinstance(value, str):
            raise UserError(f"{file}: {key} {shown(value)} must be a layer string or a list of layer names")
        found[key] = value
    for key, value in found.items():
        first = next(iter(found))
        if value != found[first]:
            both = f"{shown(value)} and {shown(found[first])}"
            raise UserError(f"{file}: {key} contradicts {first} ({both}); remove the wrong one")
    return next(iter(found.values()), None)
