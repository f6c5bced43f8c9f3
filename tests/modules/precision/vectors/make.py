"""Makes reference.json: what other people's NVFP4 quantisers, run on a CPU, give for a few tensors.

    pip install --no-deps --target PEERS transformer-engine==2.20.2 nvidia-modelopt==0.47.0 omegaconf==2.4.0 \
        antlr4-python3-runtime==4.9.3 pulp==3.3.2 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 \
        typing-inspection==0.4.5 rich==15.0.0 nvidia-ml-py==13.615.71 scipy==1.17.1 ninja==1.13.2 regex==2026.11.19
    PYTHONPATH=PEERS python -m tests.modules.precision.vectors.make

Transformer Engine itself needs CUDA; its reference quantiser is plain torch and is loaded without the rest. Names in
the file: `INPUT`, the tensor; `INPUT/CASE/codes` (packed), `/scales` and `/amax` of each case.
"""

import base64
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "reference.json"
TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "te_rows": {},
    "te_tiles": {"quant_tile_shape": (16, 16)},
    "te_mae": {"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": "MAE"},
    "te_mse": {"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": "MSE"},
    "te_mae_tiles": {"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": "MAE", "quant_tile_shape": (16, 16)},
    "te_hadamard": {"with_rht": True},
}


def inputs() -> dict[str, Tensor]:
    """Return the tensors: usual ones, heavy tails, exact ties, blocks of zeros and of next to nothing."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(32, 64, generator=generator)

    tails = normal() / torch.rand(32, 64, generator=generator).clamp(min=1e-3)
    ties = torch.randint(-24, 25, (32, 64), generator=generator) / 4
    sparse = normal()
    sparse[:, 16:32] = 0
    sparse[4:8, 32:48] *= 1e-7
    sparse[9] *= 1e-39
    return {
        "normal": normal(),
        "normal_bf16": normal().bfloat16(),
        "tails": tails,
        "tails_bf16": tails.bfloat16(),
        "ties": ties,
        "sparse": sparse,
    }


def transformer_engine() -> tuple[Any, Any]:
    """Return the modules of Transformer Engine's reference quantiser, loaded under empty parents."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = next(iter(spec.submodule_search_locations))

    class Quantizer:
        def __init__(self, rowwise: bool = True, columnwise: bool = True) -> None:
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    def stub(name: str, folder: str | None = None, **attributes: object) -> types.ModuleType:
        module = sys.modules[name] = types.ModuleType(name)
        if folder is not None:
            module.__path__ = [root + folder]
        vars(module).update(attributes)
        return module

    recipes = "transformer_engine.pytorch.custom_recipes"
    stub("transformer_engine", "")
    stub("transformer_engine.pytorch", "/pytorch")
    storage = type("QuantizedTensorStorage", (), {})
    stub("transformer_engine.pytorch.quantized_tensor", Quantizer=Quantizer, QuantizedTensorStorage=storage)
    kinds = types.SimpleNamespace(FPROP=0, DGRAD=1, WGRAD=2)
    stub(recipes, "/pytorch/custom_recipes", gemm=stub(recipes + ".gemm", MMParams=object, GEMMType=kinds))
    return importlib.import_module(recipes + ".reference_nvfp4"), importlib.import_module(recipes + ".reference_utils")


def to_text(tensor: Tensor) -> list[Any]:
    """Return [dtype, shape, bytes in base64]."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(flat.numpy()).decode()]


def from_text(text: list[Any]) -> Tensor:
    """Undo `to_text`."""
    dtype, shape, content = text
    flat = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(shape)


def load() -> dict[str, Tensor]:
    """Return the tensors of the file by name."""
    return {name: from_text(text) for name, text in json.loads(FILE.read_text(encoding="utf-8")).items()}


def main() -> None:
    """Write the file."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor  # before Transformer Engine's parents are emptied

    reference, utils = transformer_engine()
    tensors: dict[str, Tensor] = {}
    for name, x in inputs().items():
        tensors[name] = x
        for case, options in TRANSFORMER_ENGINE.items():
            four = {"nvfp4_e4m3_max": 256} if "nvfp4_use_4over6" in options else {}
            quantizer = reference.NVFP4QuantizerRef(dtype=utils.Fp4Formats.E2M1, **options, **four)
            codes, scales, turned_codes, turned_scales, amax, turned_amax = quantizer._quantize(x)
            if case == "te_hadamard":  # the copy for weight gradients: transposed and rotated
                codes, scales, amax = turned_codes, turned_scales, turned_amax
            tensors |= {f"{name}/{case}/codes": codes, f"{name}/{case}/scales": scales, f"{name}/{case}/amax": amax}
        packed, scales, scale = NVFP4QTensor.quantize(x, 16)
        tensors |= {
            f"{name}/modelopt/codes": packed._quantized_data,
            f"{name}/modelopt/scales": scales,
            f"{name}/modelopt/amax": scale * 2688,
            f"{name}/modelopt/values": packed.dequantize(
                torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16}
            ),
        }
    lines = (f"{json.dumps(name)}: {json.dumps(to_text(tensor))}" for name, tensor in tensors.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
