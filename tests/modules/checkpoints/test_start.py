"""`init_from`: a run starts from any MODEL, on one rank and on two, and refuses one that does not fit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modules.backbone.config import BackboneConfig
from modules.checkpoints import start
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.names import public_names
from modules.checkpoints.source import open_model
from modules.checkpoints.start import check_fits, start_from
from modules.errors import UserError
from tests.modules.checkpoints.helpers import public_tensors, write_fit_folder, write_shards
from tests.modules.checkpoints.quantized_folders import config, make_source, mixed, write_quantized_folder
from tests.modules.helpers import build, make_module, make_network, tiny_config

ROOT = Path(__file__).parents[3]
FREE = {"initializer_range", "rescale_prenorm_residual", "chunk_size"}
FREE |= {"time_step_min", "time_step_max", "time_step_floor"}

RANK_PROGRAM = """
import json, sys, pathlib, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from app.strategies.sharded import AXES, ShardedStrategy
from modules.backbone.model import Network
from modules.checkpoints.start import start_from
from tests.modules.helpers import tiny_config
rank, folder, models = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
strategy = ShardedStrategy()
strategy._device_mesh = init_device_mesh("cpu", (1, 2, 1, 1), mesh_dim_names=AXES)
with torch.device("meta"):
    network = Network(tiny_config(n_routed_experts=7))
strategy.shard(network)
network.to_empty(device="cpu")
network.tie_weights()
for number, model in enumerate(models):
    start_from(network, pathlib.Path(model), None)
    state = network.state_dict()
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    if rank == 0:
        torch.save(whole, f"{folder}/out{number}")
if rank == 0:
    print(json.dumps({name: t.to_local().shape[0] for name, t in state.items() if hasattr(t, "to_local")}))
dist.destroy_process_group()
"""


def model_of(kind: str, folder: Path, network) -> Path:
    if kind == "fit":
        return write_fit_folder(folder / "step=00000001", network)
    tensors = {name: tensor.bfloat16() for name, tensor in public_tensors(network).items()}
    return write_shards(folder / "hf", tensors, to_hugging_face(network.config), shards=3)


@pytest.mark.parametrize("kind", ["fit", "hugging face in bf16"])
def test_a_run_starts_from_a_model(tmp_path, kind):
    network = make_network(tiny_config(), seed=5)
    module = make_module(init_from=model_of(kind, tmp_path, network))
    built = build(module)
    for name, tensor in network.state_dict().items():
        expected = tensor if kind == "fit" else tensor.bfloat16().float()
        assert torch.equal(built.state_dict()[name], expected), name
        assert built.state_dict()[name].dtype == torch.float32, "masters are fp32"
    assert all(parameter.requires_grad for parameter in built.parameters())
    assert built.training
    unknown = "it brings no tokenizer: that the ids of the data mean the same text to it is not checked"
    assert module.initial_weights == [str(module.init_from), unknown]


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"model\.init_from: .*gone does not exist"):
        build(make_module(init_from=tmp_path / "gone"))


def test_two_ranks_hold_their_halves(tmp_path):
    """Seven experts on two ranks: four and three, each taken from the whole."""
    network = make_network(tiny_config(n_routed_experts=7), seed=5)
    models = [str(model_of(kind, tmp_path, network)) for kind in ("fit", "hugging face in bf16")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path), *models],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for number, convert in enumerate([torch.Tensor.float, lambda tensor: tensor.bfloat16().float()]):
        whole = torch.load(tmp_path / f"out{number}", weights_only=True)
        assert whole.keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            assert torch.equal(whole[name], convert(tensor)), name
    rows = json.loads(outputs[0].splitlines()[-1])
    assert rows["backbone.layers.1.mixer.experts.up_proj.weight"] == 4
    assert rows["backbone.embeddings.weight"] == 32


def test_every_field_either_must_agree_or_is_free():
    used = {
        *start.ALWAYS,
        "num_nextn_predict_layers",
        "mtp_hybrid_override_pattern",
        *(name for names in start.OF_LETTER.values() for name in names),
    }
    assert used | FREE == {field.name for field in dataclasses.fields(BackboneConfig)}
    assert not used & FREE


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"hidden_size": 40}, "hidden_size 32 (there 40)"),
        ({"hybrid_override_pattern": "ME*-MM", "vocab_size": 65}, "vocab_size 64 (there 65), hybrid_override_pattern"),
        ({"routed_scaling_factor": 5.0}, "routed_scaling_factor 2.5 (there 5.0)"),
        ({"norm_topk_prob": False}, "norm_topk_prob True (there False)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings False (there True)"),
        ({"mtp_hybrid_override_pattern": "*-"}, "mtp_hybrid_override_pattern '*E' (there '*-')"),
        ({"num_nextn_predict_layers": 0}, "has no MTP block (tensors mtp.*)"),
    ],
)
def test_a_model_of_another_network_is_refused_with_the_keys(tmp_path, changes, answer):
    network = make_network(tiny_config(**changes))
    path = write_fit_folder(tmp_path / "step=00000001", network)
    with pytest.raises(UserError, match=r"model\.init_from: ") as caught:
        build(make_module(init_from=path))
    assert answer in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_the_layers_do_not_use_may_differ():
    run = tiny_config(hybrid_override_pattern="M*", num_nextn_predict_layers=0)
    check_fits(run, dataclasses.replace(run, intermediate_size=9, n_routed_experts=3, initializer_range=0.3), Path("x"))


def test_an_mtp_block_may_be_left_out(tmp_path):
    path = write_fit_folder(tmp_path / "step=00000001", make_network(tiny_config()))
    module = make_module(tiny_config(num_nextn_predict_layers=0), mtp_depths=0, init_from=path)
    assert build(module).mtp is None
    assert module.initial_weights[1] == "its MTP block is left out: model.backbone.num_nextn_predict_layers is 0"


def made_with(other_tokenizer: bool, seed: int) -> Any:
    """Data whose tokenizer is that of the MODEL, or not."""

    def check_tokenizer(folder: Path, model: Path) -> None:
        assert folder == model / "tokenizer"
        if other_tokenizer:
            raise UserError("data: another tokenizer; prepare again")

    return SimpleNamespace(check_tokenizer=check_tokenizer, order={"seed": seed})


@pytest.fixture
def trained(tmp_path) -> Path:
    """A MODEL with a tokenizer, trained on rows in the order of seed 3."""
    path = write_fit_folder(tmp_path / "step=00000001", make_network(tiny_config()))
    (path / "tokenizer").mkdir()
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"order": {"seed": 3}}))
    return path


def test_another_tokenizer_is_an_error_unless_asked_for(trained):
    network = make_network(tiny_config())
    with pytest.raises(UserError, match=r"^data: another .* again, or set model.init_args.allow_other_tokenizer to"):
        start_from(network, trained, made_with(True, 0))
    lines = start_from(network, trained, made_with(True, 0), allow_other_tokenizer=True)
    assert lines[-1] == "warning: data: another tokenizer; prepare again"
    assert start_from(network, trained, made_with(False, 0)) == lines[:-1]


def test_the_same_rows_in_the_same_order_are_told(trained):
    *_, line = start_from(make_network(tiny_config()), trained, made_with(False, 3))
    assert "the same rows come in the same order again; another data.init_args.seed changes" in line


def test_a_run_that_starts_from_a_quantised_model(tmp_path):
    """It starts from the numbers that the codes mean, in its own plain weights, and says so."""
    source = make_source(tmp_path / "bf16")
    path = write_quantized_folder(tmp_path / "q", source, mixed)
    network = make_network(config(), seed=5)
    lines = start_from(network, path, None)
    told = [line for line in lines if "quantised" in line]
    assert told == ["its weights are quantised; the run starts from the numbers they mean"]
    state, quantized = network.state_dict(), open_model(path)
    for name, place in public_names(config()).items():
        held = state[place.parameter] if place.expert is None else state[place.parameter][place.expert]
        assert torch.equal(held, quantized.read(name).float()), name
