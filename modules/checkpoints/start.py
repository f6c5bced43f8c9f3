"""`init_from`: a run that starts from a MODEL's weights instead of random ones.

The run's own `backbone` stays the authority; a MODEL that differs in anything that changes numbers is refused, because
training would go on from a network that nobody had.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.batch import TrainingData
from modules.checkpoints.load import load_quantized, load_weights
from modules.checkpoints.source import ModelFolder, open_model
from modules.errors import UserError

ALWAYS = ("vocab_size", "hidden_size", "hybrid_override_pattern", "tie_word_embeddings", "layer_norm_epsilon")
OF_LETTER = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias"),
    "E": (
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size"),
        *("moe_shared_expert_intermediate_size", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"),
    ),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size",),
}
"""Fields that change numbers where a layer string has the letter; the others concern random weights, or speed."""


def start_from(
    network: Network, path: Path, data: TrainingData | None, allow_other_tokenizer: bool = False
) -> list[str]:
    """Fill a run's network with the weights of the MODEL in a folder; see `fill_from`.

    Raises:
        UserError: it cannot be read, or does not fit the run's backbone or data; names the keys that differ.
    """
    return fill_from(network, open_fitting(network.config, path), data, allow_other_tokenizer)


def fill_from(
    network: Network,
    source: ModelFolder,
    data: TrainingData | None,
    allow_other_tokenizer: bool = False,
    quantized: Mapping[str, Sequence[str]] = {},
) -> list[str]:
    """Fill a run's network with the weights of a MODEL; each rank keeps what it holds.

    Args:
        network: materialised, sharded or not; masters stay in their own dtype (fp32).
        source: the MODEL, see `open_fitting`.
        data: what the run trains on; None: unknown.
        allow_other_tokenizer: whether the data's may be another tokenizer than the MODEL's.
        quantized: weights that stay quantised and frozen, see `hold_quantized`.

    Returns:
        Lines for the user: what was loaded, and what to look at.

    Raises:
        UserError: the MODEL cannot be read, or does not fit the run's data.
    """
    path = source.path
    lines = [str(path), *source.notes]
    if source.quantization is not None and quantized:
        lines.append(f"its quantised weights (modules: {len(quantized)}) stay so, multiplied as they are served")
        if source.quantization.kv_scales:
            lines.append("its keys and values are not quantised here, as FP8 ones have no gradient")
    elif source.quantization is not None:
        lines.append("its weights are quantised; the run starts from the numbers they mean")
    if source.config.num_nextn_predict_layers and network.mtp is None:
        lines.append("its MTP block is left out: model.backbone.num_nextn_predict_layers is 0")
    if data is not None and source.tokenizer_folder is None:
        lines.append("it brings no tokenizer: that the ids of the data mean the same text to it is not checked")
    elif data is not None and source.tokenizer_folder is not None:
        try:
            data.check_tokenizer(source.tokenizer_folder, path)
        except UserError as error:
            if not allow_other_tokenizer:
                raise UserError(f"{error}, or set model.init_args.allow_other_tokenizer to true") from None
            lines.append(f"warning: {error}")
    if data is not None and data.order and source.facts.get("manifest", {}).get("order") == data.order:
        lines.append(
            f"the data are those that {path} was trained on: the same rows come in the same order again; another "
            "data.init_args.seed changes the order"
        )
    load_weights(network, source, leave=quantized)
    load_quantized(network, source, quantized)
    return lines


def open_fitting(run: BackboneConfig, path: Path) -> ModelFolder:
    """Open the MODEL that a run starts from.

    Raises:
        UserError: it cannot be read, or does not fit the run's backbone; names the keys that differ.
    """
    try:
        source = open_model(path)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    check_fits(run, source.config, path)
    return source


def differing_fields(one: BackboneConfig, other: BackboneConfig) -> list[str]:
    """Return the fields that change numbers in which two networks differ, those of MTP blocks where both have one."""
    fields, letters = [*ALWAYS], {*one.hybrid_override_pattern, *other.hybrid_override_pattern}
    if one.num_nextn_predict_layers and other.num_nextn_predict_layers:
        fields.append("mtp_hybrid_override_pattern")
        letters |= {*one.mtp_hybrid_override_pattern, *other.mtp_hybrid_override_pattern}
    fields += [name for letter, names in OF_LETTER.items() if letter in letters for name in names]
    return [name for name in fields if getattr(one, name) != getattr(other, name)]


def check_fits(run: BackboneConfig, model: BackboneConfig, path: Path) -> None:
    """Check that a network can take over a MODEL's weights.

    Raises:
        UserError: a field that changes numbers differs, or the run has an MTP block and the MODEL has none.
    """
    if different := differing_fields(run, model):
        listed = ", ".join(f"{name} {getattr(run, name)!r} (there {getattr(model, name)!r})" for name in different)
        raise UserError(f"model.init_from: {path} is of another network; set model.backbone as it is there: {listed}")
    if run.num_nextn_predict_layers and not model.num_nextn_predict_layers:
        raise UserError(
            f"model.init_from: {path} has no MTP block (tensors mtp.*), but model.backbone.num_nextn_predict_layers is "
            "1; set it and model.mtp_depths to 0, or start from a model that has one"
        )
