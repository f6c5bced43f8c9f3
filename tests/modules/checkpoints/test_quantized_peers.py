"""compressed-tensors, Model Optimizer and transformers read our quantised exports to the numbers that we read.

Needs the folder of peers that `make test` fills. They run in one process of their own, see quantized_peers.py.
"""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.checkpoints.card_quantized import LOST_EXPERTS
from modules.checkpoints.export import convert
from modules.checkpoints.load import load_model
from modules.checkpoints.quantization import LayerQuantization
from modules.checkpoints.source import ModelFolder, open_model
from modules.precision.linear import Linear
from modules.precision.quantized import QuantizedWeight, quantize_weight, tensor_scale
from tests.modules.checkpoints.quantized_folders import (
    W4A4,
    W4A16,
    choose,
    make_source,
    mixed,
    write_quantized,
    write_quantized_folder,
)

PEERS = Path(sys.prefix) / "peers"
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
"""As in quantized_peers.py."""
NEEDED = ("compressed_tensors", "modelopt", "loguru", "omegaconf", "psutil", "triton")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Our folders: a mixed model in both layouts, one of NVFP4 weights alone, one with experts in NVFP4 and others that
    are plain, and a dense one with quantised inputs."""
    root = tmp_path_factory.mktemp("peers")
    source = make_source(root / "bf16")
    write_quantized_folder(root / "modelopt", source, mixed)
    converted = {"layout": "compressed-tensors", "max_shard_bytes": 10**9, "report": lambda line: None}
    convert(open_model(root / "modelopt"), root / "compressed", **converted)
    write_quantized_folder(root / "weights", source, lambda name: W4A16, "compressed-tensors", kv=False)
    write_quantized_folder(root / "torn", source, torn, "compressed-tensors", kv=False)
    dense = make_source(root / "bf16 dense", hybrid_override_pattern="M*-", num_nextn_predict_layers=0)
    write_calibrated(root / "dense", dense)
    return root


def torn(name: str) -> LayerQuantization | None:
    return W4A16 if "layers.5.mixer.experts" in name or "latent" in name else None


def write_calibrated(path: Path, source: ModelFolder) -> None:
    """NVFP4 for weights and inputs, whose scales are those of the inputs that the network sees."""
    network, largest = load_model(source.path, dtype="fp32").network, {}
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: largest.update({name: inputs[0].abs().max()}))
    with torch.inference_mode():
        network(TOKENS)
    quantized = choose(source, lambda name: None if "head" in name else W4A4)

    def make(name: str) -> QuantizedWeight:
        scale = tensor_scale(largest[name.removesuffix(".weight")], "nvfp4")
        return quantize_weight(source.read(name), "nvfp4", input_scale=scale)

    options = {"layout": "compressed-tensors", "max_shard_bytes": 10**9, "report": lambda line: None}
    write_quantized(source, quantized, {}, make, path, **options)


@pytest.fixture(scope="module")
def results(folders) -> dict[str, Any]:
    """What the peers read."""
    paths = [*sys.path, str(PEERS)]
    missing = [name for name in NEEDED if importlib.machinery.PathFinder.find_spec(name, paths) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (`make test` does it)")
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[3], PEERS)))}
    script = Path(__file__).with_name("quantized_peers.py")
    subprocess.run([sys.executable, script, folders], env=os.environ | environment, check=True, timeout=600)
    return torch.load(folders / "results.pt")


def test_model_optimizer_reads_the_same_numbers(folders, results):
    source = open_model(folders / "modelopt")
    assert source.quantization is not None
    assert results["modelopt"].keys() == source.quantization.weights.keys()
    for name, theirs in results["modelopt"].items():
        assert theirs.dtype == torch.float32
        assert torch.equal(theirs, source.read(name)), name


def test_compressed_tensors_reads_the_same_numbers(folders, results):
    """In fp32 to the bit; its own output for NVFP4 is bf16, and ours rounded to it is the same."""
    source = open_model(folders / "compressed")
    assert source.quantization is not None
    seen = set()
    for key, theirs in results["compressed-tensors"].items():
        name, _, dtype = key.partition(" ")
        seen.add(name)
        assert theirs.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
        assert torch.equal(theirs, source.read(name).to(theirs.dtype)), key
    assert seen == source.quantization.weights.keys()


@pytest.mark.parametrize("name", ["compressed", "weights", "dense"])
def test_transformers_loads_the_same_weights(folders, results, name):
    """NVFP4 and plain weights to the bit in bf16; FP8 with its scale in bf16; routed experts as it misreads them."""
    source, loaded = open_model(folders / name), results[name]["weights"]
    assert source.quantization is not None
    seen = set()
    for key, theirs in loaded.items():
        public = key.replace("model.", "backbone.", 1)
        weights = [public]
        if theirs.ndim == 3 and ".experts." in public:
            before, _, last = public.rpartition(".")
            weights = [f"{before}.{expert}.{last}.weight" for expert in range(len(theirs))]
            theirs = torch.stack([theirs[e].float() * source.read_quantized(w).scale for e, w in enumerate(weights)])
            assert torch.equal(theirs.bfloat16(), torch.stack([source.read(w).bfloat16() for w in weights])), key
        elif public in source.tensors:
            layer, expected = source.quantization.weights.get(public), source.read(public)
            if layer is not None and layer.format == "fp8":
                torch.testing.assert_close(theirs.float(), expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(theirs, expected.to(theirs.dtype)), key
        seen.update(weights)
    assert seen >= {weight for weight in source.quantization.weights if not weight.startswith("mtp.")}


@pytest.mark.parametrize("name", ["compressed", "weights", "dense"])
def test_transformers_has_nothing_to_complain_about(results, name):
    """But scales of the inputs of routed experts, for which it has no place."""
    complaints = results[name]["complaints"]
    unexpected = complaints.pop("unexpected_keys")
    assert not any(complaints.values())
    assert [key for key in unexpected if not (".experts." in key and key.endswith(".input_global_scale"))] == []
    assert bool(unexpected) == (name == "compressed")


def test_transformers_drops_experts_beside_those_in_nvfp4(folders, results):
    """As note and card say, which show no code then."""
    missing = results["torn"]["complaints"]["missing_keys"]
    assert missing == [f"model.layers.1.mixer.experts.{kind}_proj" for kind in ("down", "up")]
    assert LOST_EXPERTS in (folders / "torn" / "README.md").read_text()
    assert "from_pretrained" not in (folders / "torn" / "README.md").read_text()


def test_transformers_computes_the_same_logits_of_quantised_weights(folders, results):
    """In bf16; with the global scales of routed experts that it drops (5.23), as the card shows to put them in."""
    network = load_model(folders / "weights", dtype="bf16").network
    with torch.inference_mode():
        expected = network.logits(network(TOKENS).hidden).float()
    assert relative(results["weights"]["mended"], expected) < 0.02
    assert relative(results["weights"]["logits"], expected) > 1, (
        "transformers applies the scales now: note and card are out of date"
    )


def test_transformers_computes_the_same_products_of_quantised_inputs(folders, results):
    """Layer by layer, for the inputs it saw; it finds block scales in bf16, so that a few fall on a neighbour (4%).

    Logits alone would say less: where one value of an input falls on the other side of a rounding, all after it moves.
    """
    pytest.importorskip("modules.precision.quantized_product")
    served, plain = (load_model(folders / "dense", dtype=dtype).network for dtype in ("auto", "bf16"))
    seen = 0
    for name, (inputs, theirs) in results["dense"]["layers"].items():
        if name == "lm_head":
            continue
        seen += 1
        module = name.replace("model.", "backbone.", 1)
        with torch.inference_mode():
            with_inputs, without = (network.get_submodule(module)(inputs) for network in (served, plain))
        assert relative(with_inputs, theirs) < 0.05, name
        assert relative(without, theirs) > 0.06, name
    assert seen == 8


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
