"""Checkpoints of adapters alone, as MODELs: merged, beside their base, over quantised bases, in peft's format."""

import dataclasses
import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from modules.backbone.model import Network
from modules.checkpoints import folder
from modules.checkpoints.adapted import AdaptedSource, Base, fingerprint
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.export import export
from modules.checkpoints.load import load_model
from modules.checkpoints.peft import export_adapters
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.precision.lora import LoRAConfig, adapters
from modules.precision.quantized_product import QuantizedProduct
from tests.modules.adapted import LORA, adapt, make_adapted, merged
from tests.modules.checkpoints.helpers import MANIFEST, public_tensors, write_fit_folder, write_shards
from tests.modules.checkpoints.quantized_folders import config, make_source, mixed, write_quantized_folder
from tests.modules.helpers import BF16, assert_close, build, make_module, make_network, tiny_config

PEERS = Path(sys.prefix) / "peers"
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def write_adapters(target: Path, network: Network, base: Path, lora: LoRAConfig = LORA, **changes: Any) -> Path:
    """Write what the strategy writes of a run with adapters."""
    source, partial = open_model(base), folder.begin(target)
    tensors = {f"model.network.{name}": p for name, p in network.named_parameters() if ".adapter." in name}
    tensors |= {"model.skipped_steps": torch.zeros(())}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    arguments = {"backbone": vars(network.config), "init_from": str(base), "lora": dataclasses.asdict(lora)}
    run = {"model": {"class_path": "modules.pretraining.Pretraining", "init_args": arguments | changes}}
    (partial / "config.yaml").write_text(yaml.safe_dump(run))
    folder.publish(target, MANIFEST | {"base": Base(str(source.path.absolute()), fingerprint(source))._asdict()})
    return target


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base, and adapters over it."""
    path = tmp_path_factory.mktemp("adapted")
    network = make_network(tiny_config())
    write_fit_folder(path / "step=00000001", network)
    write_adapters(path / "step=00000002", adapt(network), path / "step=00000001")
    return path


@pytest.fixture
def copied(root, tmp_path) -> Path:
    """Those in a folder of their own, where the manifest still names the first one's base."""
    return shutil.copytree(root, tmp_path / "copy")


def test_it_reads_as_the_merged_model(root):
    source, network = open_model(root / "step=00000002"), make_adapted()
    assert isinstance(source, AdaptedSource)
    wanted = public_tensors(merged(network))
    assert source.tensors.keys() == wanted.keys()
    changed = 0
    for name, tensor in wanted.items():
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read(name, slice(1, 3)), source.read(name)[1:3])
        changed += not torch.equal(source.read(name), source.base.read(name))
    assert changed == sum(1 if adapter.A.ndim == 2 else 8 for _, adapter in adapters(network))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
@torch.no_grad()
def test_it_is_loaded_beside_its_base_or_merged(root, dtype):
    beside = load_model(root / "step=00000002", dtype).network
    assert len(list(adapters(beside))) == len(list(adapters(make_adapted())))
    one = load_model(root / "step=00000002", dtype, merge=True).network
    assert not list(adapters(one))
    wanted = merged(make_adapted())(TOKENS).hidden
    for network in (beside, one):
        found = network(TOKENS).hidden.float()
        if dtype == "bf16":  # where a token goes to other experts it differs by more
            assert (found - wanted).abs().median() < 0.05
        else:
            assert_close(found, wanted, 1e-5)


def test_export_writes_the_merged_model(root, tmp_path):
    export(open_model(root / "step=00000002"), tmp_path / "hf", max_shard_bytes=10**9, report=lambda line: None)
    source = open_model(root / "step=00000002")
    exported = open_model(tmp_path / "hf")
    assert exported.tensors == source.tensors
    for name in source.tensors:
        assert torch.equal(exported.read(name), source.read(name)), name


def test_a_bf16_base_is_merged_and_rounded_once(tmp_path):
    network = make_network(tiny_config()).bfloat16().float()
    tensors = {name: tensor.bfloat16() for name, tensor in public_tensors(network).items()}
    base = write_shards(tmp_path / "hf", tensors, to_hugging_face(network.config))
    source = open_model(write_adapters(tmp_path / "step=00000001", adapt(network), base))
    for name, tensor in public_tensors(merged(network)).items():
        assert source.read(name).dtype == torch.bfloat16
        assert (source.read(name) != tensor.bfloat16()).float().mean() < 0.001, "those that rounding twice moves"


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@torch.no_grad()
def test_a_quantised_base_stays_so_and_is_merged_as_the_numbers_it_means(tmp_path, layout):
    base = write_quantized_folder(tmp_path / "base", make_source(tmp_path / "bf16"), mixed, layout)
    path = base if isinstance(base, Path) else tmp_path / "base"
    quantized = open_model(path)
    network = adapt(make_network(config()))
    source = open_model(write_adapters(tmp_path / "step=00000001", network, path))
    assert isinstance(source, AdaptedSource)
    assert quantized.quantization is not None
    own = dict(adapters(network))
    for name in quantized.quantization.weights:
        layer, _, expert = name.removesuffix(".weight").partition(".experts.")
        number, _, last = expert.partition(".")
        adapter = own[f"{layer}.experts.{last}" if expert else layer]
        A, B = (matrix[int(number)] if expert else matrix for matrix in (adapter.A, adapter.B))
        wanted = quantized.read(name).double() + adapter.scale * (B.double() @ A.double())
        assert source.read(name).dtype == torch.float32
        assert_close(source.read(name).double(), wanted, 1e-6, name)
    beside = load_model(tmp_path / "step=00000001").network
    products = [module.product for module in beside.modules() if hasattr(module, "product")]
    assert any(isinstance(product, QuantizedProduct) for product in products)
    for _, adapter in adapters(beside):
        adapter.B.zero_()
    assert torch.equal(beside(TOKENS).hidden, load_model(path).network(TOKENS).hidden)


def test_a_run_over_a_quantised_base_computes_what_is_served(tmp_path):
    """In `fit` the base is as `load_model` has it (but for FP8 keys), and gradients come to the adapters below it."""
    write_quantized_folder(tmp_path / "base", make_source(tmp_path / "bf16"), mixed, kv=False)
    module = make_module(config(), init_from=tmp_path / "base", lora=LORA, precision=BF16)
    network = build(module)
    served = load_model(tmp_path / "base").network
    assert torch.equal(network(TOKENS).hidden, served(TOKENS).hidden), "B is zero yet"
    rows = {row.name: row for row in module.precision_table}
    assert rows["backbone.layers.1.mixer.experts.up_proj"].format == "nvfp4"
    assert rows["backbone.layers.1.mixer.experts.up_proj"].pattern == "init_from"
    assert any("stay so" in line for line in module.initial_weights)
    network(TOKENS, mtp_depths=2).mtp_hidden[1].square().mean().backward()
    for name, adapter in adapters(network):
        assert adapter.B.grad is not None, name
        assert adapter.B.grad.any(), name
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        f"{name}.adapter.{matrix}" for name, _ in adapters(network) for matrix in "AB"
    }


def test_what_a_run_saves(root):
    module = make_module(init_from=root / "step=00000001", lora=LORA)
    network = build(module)
    saved = {name for name in module.state_dict() if name.startswith("network.")}
    assert saved == {f"network.{name}.adapter.{matrix}" for name, _ in adapters(network) for matrix in "AB"}
    assert "skipped_steps" in module.state_dict()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    base = open_model(root / "step=00000001")
    assert checkpoint["about"] == {"base": {"path": str(base.path), "fingerprint": fingerprint(base)}}


def test_adapters_need_a_base():
    with pytest.raises(UserError, match=r"model\.init_args\.lora: adapters need a base.*model\.init_args\.init_from"):
        build(make_module(lora=LORA))


def test_another_base_is_an_error(root, copied):
    other = make_network(tiny_config(), seed=1)
    shutil.rmtree(copied / "step=00000001")
    write_fit_folder(copied / "step=00000001", other)
    module = make_module(init_from=copied / "step=00000001", lora=LORA)
    module.resume_from = copied / "step=00000002"
    with pytest.raises(UserError, match=r"is not the base that the adapters in .*step=00000002 were trained over"):
        build(module)
    same = make_module(init_from=root / "step=00000001", lora=LORA)
    same.resume_from = root / "step=00000002"
    build(same)


def test_a_base_is_looked_for_where_it_was_and_where_the_run_file_says(root, copied, monkeypatch):
    manifest = copied / "step=00000002" / folder.MANIFEST
    manifest.write_text(manifest.read_text().replace(str(root), "/nowhere"))
    run = copied / "step=00000002" / "config.yaml"
    text = run.read_text()
    assert open_model(copied / "step=00000002").path == copied / "step=00000002", "at init_from"
    gone = yaml.safe_load(text)
    gone["model"]["init_args"]["init_from"] = None
    replace(copied / "step=00000002", yaml.safe_dump(gone))
    with pytest.raises(UserError, match=r"holds adapters alone, and their base /nowhere.* is not there"):
        open_model(copied / "step=00000002")


def replace(checkpoint: Path, text: str) -> None:
    """Write another configuration into a checkpoint, and its sums into the manifest."""
    about = {key: value for key, value in folder.describe(checkpoint).items() if key != "files"}
    partial = folder.partial_of(checkpoint)
    shutil.copytree(checkpoint, partial)
    (partial / folder.MANIFEST).unlink()
    (partial / "config.yaml").write_text(text)
    folder.publish(checkpoint, about)


def test_one_changed_number_of_a_base_is_noticed(root, copied):
    network = make_network(tiny_config())
    before = fingerprint(open_model(root / "step=00000001"))
    with torch.no_grad():
        network.get_parameter("backbone.layers.5.mixer.experts.down_proj.weight")[7, -1, -1] += 1e-3
    assert before == fingerprint(open_model(copied / "step=00000001"))
    write_fit_folder(copied / "step=00000001", network)
    assert before != fingerprint(open_model(copied / "step=00000001"))


def test_adapters_that_are_not_those_of_the_configuration(copied):
    run = yaml.safe_load((copied / "step=00000002" / "config.yaml").read_text())
    run["model"]["init_args"]["lora"]["rank"] = 4
    replace(copied / "step=00000002", yaml.safe_dump(run))
    with pytest.raises(UserError, match=r"its adapters are not those that config\.yaml describes"):
        open_model(copied / "step=00000002")


PLAIN = LoRAConfig(
    rank=3, alpha=6.0, patterns=["*.mixer.[qkvo]_proj", "*.in_proj", "*latent*", "*.up_proj", "*.down_proj"]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base as a Hugging Face folder, adapters on all layers, and on those that peft takes in this family."""
    path = tmp_path_factory.mktemp("peft")
    network = make_network(tiny_config(num_nextn_predict_layers=0))
    write_fit_folder(path / "step=00000001", network)
    export(open_model(path / "step=00000001"), path / "base", max_shard_bytes=10**9, report=lambda line: None)
    for number, (name, lora) in enumerate({"all": LORA, "plain": PLAIN}.items(), 2):
        adapted = adapt(make_network(network.config), lora)
        source = open_model(write_adapters(path / f"step=0000000{number}", adapted, path / "base", lora))
        assert isinstance(source, AdaptedSource)
        lines = export_adapters(source, path / name)
        assert [("refuses Mamba-2's out_proj" in line) for line in lines] == ([True] if name == "all" else [])
    torch.save(TOKENS, path / "tokens.pt")
    return path


@pytest.fixture(scope="module")
def theirs(made) -> dict[str, Any]:
    """What peft computes."""
    paths = [*sys.path, str(PEERS)]
    if missing := [n for n in ("peft", "accelerate") if importlib.machinery.PathFinder.find_spec(n, paths) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (`make test` does it)")
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[3], PEERS)))}
    script = Path(__file__).with_name("peft_peer.py")
    subprocess.run([sys.executable, script, made], env=os.environ | environment, check=True, timeout=600)
    return torch.load(made / "theirs.pt")


class TestPeft:
    @pytest.mark.parametrize(("name", "step"), [("plain", 3), ("all", 2)])
    @torch.no_grad()
    def test_logits_agree(self, made, theirs, name, step):
        network = load_model(made / f"step=0000000{step}").network
        assert_close(network.logits(network(TOKENS).hidden), theirs[name], 1e-5)
        base = load_model(made / "base").network
        assert (base.logits(base(TOKENS).hidden) - theirs[name]).abs().max() > 0.1, "the adapters matter"

    def test_what_it_refuses(self, theirs):
        assert "out_proj" in theirs["refusal"]

    def test_what_the_format_cannot_hold(self, root, tmp_path):
        lora = LoRAConfig(rank=2, dropout=0.1, patterns=["*.mixer.q_proj", "*.experts.up_proj"])
        network = adapt(make_network(tiny_config()), lora)
        source = open_model(write_adapters(tmp_path / "step=00000003", network, root / "step=00000001", lora))
        assert isinstance(source, AdaptedSource)
        left_out, dropout = export_adapters(source, tmp_path / "peft")
        assert left_out == "the adapters of the MTP block (layers: 2) are left out: transformers' model has none"
        assert dropout == "lora_dropout is 0 there, not 0.1: peft has none for stacked experts"
