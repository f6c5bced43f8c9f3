"""The adapters of a checkpoint as a folder in the file format of peft, for its `PeftModel.from_pretrained`.

The names are those of transformers' model. A linear layer is a target module. Stacked experts, one parameter [E, O, I]
there, are a target parameter, of which peft stacks A as [E r, I] and B as [O, r E], experts running fastest; wrappers
of two parameters of a module lie in each other, in their order. Mamba-2's `out_proj` is a linear layer like others in
the file, but peft itself (0.21) refuses it in every model of this family.
"""

from pathlib import Path

from torch import Tensor

from modules.checkpoints.adapted import AdaptedSource
from modules.checkpoints.folder import new_folder, write_json
from modules.checkpoints.names import MTP, TensorInfo
from modules.checkpoints.safetensors import write_file
from modules.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def export_adapters(source: AdaptedSource, output: Path) -> list[str]:
    """Write the adapters of a checkpoint, in fp32.

    Args:
        source: the checkpoint.
        output: folder to make; appears when it is complete.

    Returns:
        Lines for the user: what the format cannot hold.

    Raises:
        UserError: the output holds files already, or all adapters are of the MTP block.
        OSError: the disk is full; nothing is left behind.
    """
    layers = [name for name in source.layers if not name.startswith(MTP)]
    if not layers:
        raise UserError(
            f"{source.path}: all its adapters are of the MTP block, which transformers' model does not have"
        )
    stacked = [name for name in layers if ".experts." in name]
    tensors: dict[str, Tensor] = {}
    for name in layers:
        A, B = source.read_adapter(name).values()
        if A.ndim == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        place = f"base_model.model.{_place(name, layers)}"
        tensors |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
    lora = source.lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.base.path),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if stacked else lora.dropout,
        "bias": "none",
        "target_modules": [_theirs(name) for name in layers if name not in stacked],
        "target_parameters": [_theirs(name) for name in stacked] or None,
        "inference_mode": True,
    }
    with new_folder(output) as folder:
        write_json(folder / ADAPTER_CONFIG, settings)
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_file(folder / WEIGHTS, infos, iter(tensors.values()))
    lines = []
    if left_out := len(source.layers) - len(layers):
        lines.append(f"the adapters of the MTP block (layers: {left_out}) are left out: transformers' model has none")
    if stacked and lora.dropout:
        lines.append(f"lora_dropout is 0 there, not {lora.dropout}: peft has none for stacked experts")
    if any(name.endswith(".out_proj") for name in layers):
        lines.append(
            "peft (0.21) refuses Mamba-2's out_proj, and with it this folder, which other readers may not; for peft "
            "train with model.init_args.lora.patterns that leave *.mixer.out_proj out, or merge by --format hf"
        )
    return lines


def _theirs(name: str) -> str:
    return name.replace("backbone.", "model.", 1)


def _place(name: str, layers: list[str]) -> str:
    """Return where peft keeps the matrices of a layer."""
    if ".experts." not in name:
        return _theirs(name)
    experts, _, last = name.rpartition(".")
    inner = last == "up_proj" and f"{experts}.down_proj" in layers
    return _theirs(experts) + (".base_layer" if inner else "")
