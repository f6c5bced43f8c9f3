"""Folders of both kinds, written without our own writers: by transformers, by the safetensors library, by torch."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.backbone.model import Network
from modules.checkpoints import folder
from modules.checkpoints.names import public_names

THEIRS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_latent_size": 16,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.15,
}
"""Keywords of transformers' configuration: every kind of layer, milliseconds to run."""


def their_model(transformers, seed: int = 0, **changes):
    """A random model of transformers whose vectors and router biases differ from their neutral start."""
    torch.manual_seed(seed)
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**{**THEIRS, **changes})).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor += 0.2 * torch.randn(tensor.shape)
    return made_comparable(model)


def made_comparable(model):
    """A model of transformers with the experts in plain loops and without its own bound on dt."""
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()


def public_tensors(network: Network) -> dict[str, Tensor]:
    """A network's tensors under their public names, by the rule of the file format: experts one by one."""
    state = network.state_dict()
    return {
        name: (state[parameter] if expert is None else state[parameter][expert]).contiguous()
        for name, (parameter, expert) in public_names(network.config).items()
    }


def write_shards(target: Path, tensors: dict[str, Tensor], raw: dict, shards: int = 1) -> Path:
    """Write config.json and the weights, in one file or in shards with an index."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, target / "model.safetensors")
        return target
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, target / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def read_shards(source: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}


MANIFEST = {"step": 1, "last_step": 1, "tokens": 64, "devices": 1, "torch": "2.13.0"}
"""What every manifest says."""


def write_fit_folder(target: Path, network: Network, **about) -> Path:
    """Write what the strategy writes of a network: its tensors, the run's configuration and a manifest."""
    partial = folder.begin(target)
    tensors = {f"model.network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {"model.skipped_steps": torch.zeros(()), "optimizer.network.lm_head.weight.exp_avg": torch.ones(3)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    run = {"model": {"class_path": "modules.pretraining.Pretraining", "init_args": {"backbone": vars(network.config)}}}
    (partial / "config.yaml").write_text(yaml.safe_dump(run))
    folder.publish(target, MANIFEST | about)
    return target
