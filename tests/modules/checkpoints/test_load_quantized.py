"""Quantised folders in memory: served as they are, or dequantised; the peak; what the user is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.backbone.attention import Attention
from modules.backbone.config import BackboneConfig
from modules.backbone.model import Network
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.load import load_model
from modules.checkpoints.quantization import LayerQuantization
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.precision.linear import FormattedModule, GroupedLinear, Linear
from modules.precision.quantized import QuantizedWeight, quantize_weight, tensor_scale
from modules.precision.quantized_product import install
from modules.precision.scheme import PlainProduct
from tests.modules.checkpoints.helpers import public_tensors, write_shards
from tests.modules.checkpoints.quantized_folders import write_quantized
from tests.modules.checkpoints.test_load import LARGE, MEASURE
from tests.modules.helpers import build, dequantize_weight, make_module, make_network, tiny_config

ROOT = Path(__file__).parents[3]
W4A4, W4A16, W8A8 = (LayerQuantization(*kind) for kind in (("nvfp4", True), ("nvfp4", False), ("fp8", True)))
KV = {"backbone.layers.2.mixer": (2.0**-6, 2.0**-5), "mtp.layers.0.mixer": (2.0**-4, 2.0**-5)}
CONFIG = tiny_config(moe_intermediate_size=32)


def kinds_of(names: list[str]) -> dict[str, LayerQuantization]:
    """Mixed, as the published NVFP4 checkpoint is: experts in NVFP4, Mamba-2 in FP8, one layer weight-only."""
    kinds = dict.fromkeys((name for name in names if ".experts." in name), W4A4)
    kinds |= dict.fromkeys((name for name in names if name.endswith(("in_proj.weight", "out_proj.weight"))), W8A8)
    return kinds | dict.fromkeys((name for name in names if ".shared_experts.up_proj" in name), W4A16)


def input_scale(name: str, kind: LayerQuantization) -> torch.Tensor | None:
    amax = torch.tensor(3.0 if ".up_proj" in name else 5.0)
    return tensor_scale(amax, kind.format) if kind.inputs else None


def write(folder: Path, layout: str = "modelopt", kinds: dict | None = None) -> tuple[Path, dict[str, QuantizedWeight]]:
    """Write a quantised network; return its folder and its quantised weights."""
    tensors = {name: tensor.bfloat16() for name, tensor in public_tensors(make_network(CONFIG)).items()}
    source = open_model(write_shards(folder / "bf16", tensors, to_hugging_face(CONFIG)))
    kinds = kinds_of([*tensors]) if kinds is None else kinds
    weights = {
        name: quantize_weight(tensors[name], kind.format, input_scale=input_scale(name, kind))
        for name, kind in kinds.items()
    }
    options = {"layout": layout, "max_shard_bytes": 10**9, "report": lambda line: None}
    write_quantized(source, kinds, KV, weights.__getitem__, folder / "q", **options)
    return folder / "q", weights


@torch.inference_mode()
def hidden(network: Network) -> torch.Tensor:
    return network(torch.arange(40)[None] % 64).hidden


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_quantised_weights_are_served(tmp_path, layout) -> None:
    path, weights = write(tmp_path, layout)
    loaded = load_model(path)
    expected = load_model(tmp_path / "bf16").network
    for name, module in expected.named_modules():
        if isinstance(module, GroupedLinear):
            before, which = name.split(".experts.")
            install(module, [weights[f"{before}.experts.{expert}.{which}.weight"] for expert in range(8)])
        elif isinstance(module, Linear) and f"{name}.weight" in weights:
            install(module, [weights[f"{name}.weight"]])
        elif isinstance(module, Attention):
            module.kv_scales = KV[name]
    assert torch.equal(hidden(loaded.network), hidden(expected))
    assert not torch.equal(hidden(expected), hidden(load_model(tmp_path / "bf16").network))
    for (name, module), other in zip(loaded.network.named_modules(), expected.modules(), strict=True):
        if isinstance(module, FormattedModule):
            assert (module.format, type(module.product)) == (other.format, type(other.product)), name
            assert torch.equal(module.weight, other.weight), name
        if isinstance(module, Attention):
            assert module.kv_scales == KV[name]
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.note == (
        f"{path}: runs as it is served: FP8 weights and inputs, emulated (modules: 4); NVFP4 weights and inputs, "
        "emulated (modules: 6); NVFP4 weights, emulated (modules: 3); bf16 (the rest); keys and values in FP8"
    )
    assert load_model(tmp_path / "bf16").note is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_dtype_loads_plain_dequantised_weights(tmp_path, dtype) -> None:
    path, weights = write(tmp_path)
    loaded = load_model(path, dtype)
    for name, tensor in public_tensors(loaded.network).items():
        if name in weights:
            assert torch.equal(tensor, dequantize_weight(weights[name]).to(tensor.dtype)), name
    for module in loaded.network.modules():
        if isinstance(module, FormattedModule):
            assert isinstance(module.product, PlainProduct)
            assert module.format == dtype
        if isinstance(module, Attention):
            assert module.kv_scales is None
    assert hidden(loaded.network).isfinite().all()
    assert loaded.note == (
        f"{path}: runs with dequantised weights in {dtype}; inputs, keys and values are not quantised"
    )


def test_experts_of_a_layer_that_differ_are_not_served(tmp_path) -> None:
    names = [name for name in public_tensors(make_network(CONFIG)) if ".experts.0." not in name]
    path, _ = write(tmp_path, kinds=kinds_of(names))
    with pytest.raises(UserError, match=r"layers.1.mixer.experts.up_proj are quantised in more .*; --dtype bf16 runs"):
        load_model(path)
    assert hidden(load_model(path, "bf16").network).isfinite().all()


def test_a_run_starts_from_the_dequantised_weights(tmp_path) -> None:
    path, weights = write(tmp_path)
    module = make_module(CONFIG, init_from=path)
    network = build(module)
    for name, tensor in public_tensors(network).items():
        if name in weights:
            assert torch.equal(tensor, dequantize_weight(weights[name])), name
    formatted = [module for module in network.modules() if isinstance(module, FormattedModule)]
    assert all(isinstance(module.product, PlainProduct) for module in formatted)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_memory_is_the_model_and_one_stack_of_experts(tmp_path) -> None:
    """About 95 MiB of weights in memory; while the largest weight is decoded, some 8 bytes a number come on top."""
    config = BackboneConfig(**LARGE)
    with torch.device("meta"):
        network = Network(config)
    tensors = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in public_tensors(network).items()
    }
    source = open_model(write_shards(tmp_path / "bf16", tensors, to_hugging_face(config)))
    kinds = {name: W4A4 for name in tensors if ".experts." in name or name.endswith("_proj.weight")}
    scale = tensor_scale(torch.tensor(4.0), "nvfp4")

    by_shape: dict[torch.Size, QuantizedWeight] = {}
    for name in kinds:
        if (shape := tensors[name].shape) not in by_shape:
            by_shape[shape] = quantize_weight(tensors[name], "nvfp4", input_scale=scale)
    options = {"layout": "modelopt", "max_shard_bytes": 10**9, "report": lambda line: None}
    write_quantized(source, kinds, {}, lambda name: by_shape[tensors[name].shape], tmp_path / "q", **options)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "q")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    before, after, size = json.loads(result.stdout.splitlines()[-1])
    stack, decoding = 2 * 8 * 1024 * 1024, 8 * 4096 * 1024
    print(f"model {size / 2**20:.0f} MiB, peak {(after - before) / 2**20:.0f} MiB above the start")
    assert after - before < size + stack + decoding + 16 * 2**20
