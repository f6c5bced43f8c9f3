"""Models on the disk for the tests of checkpoints, written without the code that is tested."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from modules.backbone.model import Network
from modules.checkpoints import folder

RUN = {
    "name": "small",
    "model": {
        "class_path": "modules.pretraining.Pretraining",
        "init_args": {
            "mtp_depths": 2,
            "optimizer": {"learning_rate": 0.005, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"warmup_tokens": 500, "decay_tokens": 4000, "minimum_ratio": 0.01},
            "precision": [{"pattern": "*", "format": "fp32"}],
            "seed": 7,
        },
    },
    "data": {"init_args": {"path": "somewhere/of/mine/corpus", "sequence_length": 128, "global_batch_size": 4}},
}


def public_tensors(network: Network) -> dict[str, Tensor]:
    """The network's tensors by the names on the disk: experts one by one, no tied head."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if ".mixer.experts." in name:
            before, kind = name.split(".experts.")
            for expert, matrix in enumerate(tensor):
                tensors[f"{before}.experts.{expert}.{kind}"] = matrix.clone()
        elif name != "lm_head.weight" or not network.config.tie_word_embeddings:
            tensors[name] = tensor.clone()
    return tensors


def write_fit_folder(
    path: Path, network: Network, step: int = 20, last_step: int = 40, tokenizer: bool = False
) -> Path:
    """A checkpoint as `fit` writes it."""
    partial = folder.begin(path)
    tensors = {f"model.network.{name}": tensor for name, tensor in network.state_dict().items()}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    run: dict[str, Any] = json.loads(json.dumps(RUN))
    run["model"]["init_args"]["backbone"] = dataclasses.asdict(network.config)
    (partial / "config.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    if tokenizer:
        write_tokenizer(partial / "tokenizer")
    manifest = {"step": step, "last_step": last_step, "finished": step == last_step, "tokens": step * 512}
    folder.publish(path, manifest | {"metrics": {"validation/loss": 4.25}, "devices": 1, "torch": "2.13.0"})
    return path


def write_hf_folder(
    path: Path, network: Network, dtype: torch.dtype = torch.float32, tokenizer: bool = False, **keys: Any
) -> Path:
    """A folder as transformers writes it: its own config.json (with `keys`), all but router biases in `dtype`."""
    from transformers import NemotronHConfig

    NemotronHConfig(**dataclasses.asdict(network.config), dtype=dtype).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NemotronHForCausalLM"]} | keys))
    tensors = public_tensors(network)
    kept = "e_score_correction_bias"
    stored = {name: tensor if name.endswith(kept) else tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    if tokenizer:
        write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    Tokenizer.train(["def main():\n    return 1\n"], 288).save(path)
    (path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors package."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
