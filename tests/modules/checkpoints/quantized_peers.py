"""Run by test_quantized_peers.py in a process of its own: what the peers read in our folders, into a file.

compressed-tensors and Model Optimizer are in the folder of peers. The latter imports pulp and scipy for parts that
reading NVFP4 does not need; empty modules stand in for them.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

STOOD_IN = ("pulp", "pynvml", "scipy")


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of the packages that are stood in for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in STOOD_IN:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def model_optimizer(folder: Path) -> dict[str, Tensor]:
    """fp32 weights by name: what Model Optimizer makes of the tensors of NVFP4 and FP8 layers."""
    sys.meta_path.append(_StandIns())
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    stored, found = load_file(folder / "model.safetensors"), {}
    for name, codes in stored.items():
        module = name.removesuffix(".weight")
        if codes.dtype == torch.uint8:
            tensor = NVFP4QTensor(torch.Size((len(codes), 2 * codes.shape[1])), torch.float32, codes)
            scales = {"scale": stored[f"{module}.weight_scale"], "double_scale": stored[f"{module}.weight_scale_2"]}
            found[name] = tensor.dequantize(block_sizes={-1: 16}, **scales)
        elif codes.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            tensor = FP8QTensor(codes.shape, torch.float32, codes)
            found[name] = tensor.dequantize(torch.float32, scale=stored[f"{module}.weight_scale"])
    return found


def compressed_tensors(folder: Path) -> dict[str, Tensor]:
    """Weights by name and dtype: its decompressors' output, and the same steps in fp32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored, found = load_file(folder / "model.safetensors"), {}
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings = QuantizationConfig.model_validate(raw)
    schemes = {scheme.format: scheme for scheme in settings.config_groups.values()}
    for name in stored:
        module, _, suffix = name.rpartition(".")
        parts = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.rpartition(".")[0] == module}
        if suffix == "weight_packed":
            scheme = schemes["nvfp4-pack-quantized"]
            found[f"{module}.weight bf16"] = _decompress(BaseCompressor, parts, scheme)
            codes = unpack_fp4_from_uint8(parts["weight_packed"], *_shape(parts["weight_packed"]), dtype=torch.float32)
            scales, largest = parts["weight_scale"].float(), parts["weight_global_scale"]
            found[f"{module}.weight fp32"] = dequantize(
                codes, scales, args=scheme.weights, global_scale=largest, dtype=torch.float32
            )
        elif suffix == "weight" and stored[name].dtype == torch.float8_e4m3fn:
            found[f"{name} fp32"] = _decompress(BaseCompressor, parts, schemes["float-quantized"])
    return found


def _decompress(compressors: Any, parts: dict[str, Tensor], scheme: Any) -> Tensor:
    return compressors.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]


def _shape(packed: Tensor) -> tuple[int, int]:
    return packed.shape[0], 2 * packed.shape[1]


def transformers_model(folder: Path, tokens: Tensor) -> dict[str, Any]:
    """What transformers loads: its complaints, all weights once decompressed, and logits in bf16.

    `mended` holds the logits of the model that the code in our model card loads, where transformers (5.23) reads routed
    experts wrongly, else the same; `layers` what each linear layer took and gave in that run.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        logits = _comparable(model)(tokens, use_cache=False).logits
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    card = (folder / "README.md").read_text()
    if "weight_global_scale" in card:
        os.chdir(folder.parent)  # as the reader of the card would
        code = next(block for block in card.split("```python") if "weight_global_scale" in block)
        loaded: dict[str, Any] = {}
        exec(code.partition("```")[0], loaded)
        model = _comparable(loaded["model"])
    with torch.inference_mode():
        model(tokens, use_cache=False)  # decompresses
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(partial(_keep, layers, name))
        mended = model(tokens, use_cache=False).logits
    complaints = {key: sorted(map(str, value)) for key, value in info.items()}
    return {"complaints": complaints, "weights": weights, "logits": logits, "mended": mended, "layers": layers}


def _comparable(model: Any) -> Any:
    """The model with experts in plain loops, and without its own bound on dt."""
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def _keep(layers: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, inputs: tuple[Tensor], out: Tensor) -> None:
    layers[name] = inputs[0].clone(), out.clone()


if __name__ == "__main__":
    folders = Path(sys.argv[1])
    results: dict[str, Any] = {
        "modelopt": model_optimizer(folders / "modelopt"),
        "compressed-tensors": compressed_tensors(folders / "compressed"),
    }
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    for name in ("compressed", "weights", "torn", "dense"):
        results[name] = transformers_model(folders / name, tokens)
    torch.save(results, folders / "results.pt")
