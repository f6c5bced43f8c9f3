"""What is in memory after loading: dtypes, formats, the peak of memory; folders of fit and of Hugging Face alike."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from modules.backbone.config import BackboneConfig
from modules.checkpoints.config import make_config, to_hugging_face
from modules.checkpoints.load import load_model
from modules.checkpoints.merge import MergedSource
from modules.checkpoints.names import public_names, public_shapes
from modules.checkpoints.source import open_model
from modules.errors import UserError
from modules.precision.linear import FormattedModule
from tests.modules.checkpoints.helpers import public_tensors, write_fit_folder, write_shards
from tests.modules.checkpoints.quantized_folders import make_source, write_quantized_folder
from tests.modules.helpers import make_network, tiny_config

ROOT = Path(__file__).parents[3]
ISLANDS = ("norm.weight", "norm_f.weight", ".A_log", ".D", ".dt_bias", "conv1d.weight", "conv1d.bias", "gate.weight")
ISLANDS += ("e_score_correction_bias", "final_layernorm.weight")


def is_island(name: str) -> bool:
    return name.endswith(ISLANDS)


def write(folder: Path, network, dtype: torch.dtype, islands: torch.dtype | None = None) -> Path:
    tensors = {
        name: tensor.to(islands if islands and is_island(name) else dtype)
        for name, tensor in public_tensors(network).items()
    }
    return write_shards(folder, tensors, to_hugging_face(network.config, dtype))


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config())


def test_names_and_shapes_are_those_of_the_network(network):
    names, shapes = public_names(network.config), public_shapes(network.config)
    assert list(names) == list(shapes)
    assert {place.parameter for place in names.values()} == set(network.state_dict())
    assert len(set(names.values())) == len(names)
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 8 * 2 * 3, "8 experts of 2 matrices in 3 mixtures"
    assert experts[:9] == [
        *(f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight" for expert in range(8)),
        "backbone.layers.1.mixer.experts.0.down_proj.weight",
    ]


def test_super_has_the_published_number_of_tensors_and_elements():
    """NVIDIA's conversion card: 42,683 tensors, 123,611,033,088 elements, one shared MTP block among them."""
    config = make_config(yaml.safe_load((ROOT / "configs" / "model" / "super.yaml").read_text()), Path("super.yaml"))
    shapes = public_shapes(config)
    assert len(shapes) == 42_683
    assert sum(math.prod(shape) for shape in shapes.values()) == 123_611_033_088


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
def test_fp32_islands_and_formats(network, tmp_path, stored, asked):
    loaded = load_model(write(tmp_path, network, stored), asked)
    low = torch.bfloat16 if asked == "bf16" or (asked == "auto" and stored == torch.bfloat16) else torch.float32
    for name, tensor in loaded.network.state_dict().items():
        assert tensor.dtype == (torch.float32 if is_island(name) else low), name
    modules = [module for module in loaded.network.modules() if isinstance(module, FormattedModule)]
    assert {module.compute_dtype for module in modules} == {low}
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    for name, tensor in public_tensors(network).items():
        got = public_tensors(loaded.network)[name]
        assert torch.equal(got, tensor.to(stored).to(got.dtype)), name


def test_each_module_computes_in_the_dtype_of_its_own_tensor(network, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in public_tensors(network).items()}
    for name in ("lm_head.weight", "backbone.layers.1.mixer.experts.3.up_proj.weight"):
        tensors[name] = public_tensors(network)[name]
    loaded = load_model(write_shards(tmp_path, tensors, to_hugging_face(network.config))).network
    formats = {name: module.format for name, module in loaded.named_modules() if isinstance(module, FormattedModule)}
    fp32 = {name for name, chosen in formats.items() if chosen == "fp32"}
    assert fp32 == {"lm_head", "backbone.layers.1.mixer.experts.up_proj"}


def test_router_bias_that_bf16_cannot_hold(tmp_path):
    network = make_network(tiny_config())
    with torch.no_grad():
        network.routers()[0].e_score_correction_bias += 64.001
    folder = write(tmp_path, network, torch.bfloat16, islands=torch.float32)
    loaded = load_model(folder).network.routers()[0].e_score_correction_bias
    assert torch.equal(loaded, network.routers()[0].e_score_correction_bias)


def test_an_unknown_dtype_is_refused(network, tmp_path):
    with pytest.raises(UserError, match="dtype: 'fp8' must be one of auto, fp32"):
        load_model(write(tmp_path, network, torch.float32), "fp8")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "moe_latent_size": None}])
def test_a_folder_of_fit(tmp_path, changes):
    network = make_network(tiny_config(**changes))
    path = write_fit_folder(tmp_path / "runs" / "x" / "checkpoints" / "step=00000001", network, tokens=7)
    (path / "tokenizer").mkdir()
    loaded = load_model(tmp_path / "runs" / "x")
    assert loaded.source.config == network.config
    assert loaded.source.path == path
    assert loaded.source.tokenizer_folder == path / "tokenizer"
    assert loaded.source.facts["manifest"]["tokens"] == 7
    assert loaded.source.facts["run"]["model"]["init_args"]["backbone"]["vocab_size"] == 64
    expected = public_tensors(network)
    assert list(loaded.source.tensors) == list(expected)
    assert ("lm_head.weight" in expected) != network.config.tie_word_embeddings
    for name, tensor in expected.items():
        read = loaded.source.read(name)
        assert torch.equal(read, tensor), name
        assert loaded.source.tensors[name] == (tuple(read.shape), read.dtype)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.network(tokens).hidden, network(tokens).hidden)


def test_experts_of_a_folder_of_fit_in_any_order(network, tmp_path):
    source = open_model(write_fit_folder(tmp_path / "step=00000001", network))
    expected = public_tensors(network)
    for name in sorted(expected, reverse=True):
        assert torch.equal(source.read(name), expected[name])


@pytest.mark.parametrize("kind", ["plain", "modelopt", "compressed-tensors", "fit", "merge"])
def test_rows_are_those_of_the_whole_tensor(tmp_path, kind):
    if kind in ("modelopt", "compressed-tensors"):
        source = open_model(write_quantized_folder(tmp_path / "q", make_source(tmp_path / "bf16"), layout=kind))
    elif kind == "fit":
        source = open_model(write_fit_folder(tmp_path / "step=00000001", make_network(tiny_config())))
    else:
        source = make_source(tmp_path / "bf16")
        source = MergedSource([source, source], [1, 2], "A test.") if kind == "merge" else source
    for name in source.tensors:
        whole = source.read(name)
        for rows in (slice(0), slice(1, 3), slice(len(whole) - 1, len(whole))):
            assert torch.equal(source.read(name, rows), whole[rows]), (name, rows)


@pytest.mark.parametrize("layout", [None, "modelopt"])
def test_rows_of_other_ranks_are_not_read(tmp_path, layout):
    """Row 5 is broken: to whom reads the first five all is well."""
    path = tmp_path / "bf16"
    source, name = make_source(path), "backbone.layers.0.mixer.in_proj.weight"
    if layout is not None:
        path = write_quantized_folder(tmp_path / "q", source, layout=layout)
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(torch.uint8)[5] = 0x7F
    if layout is None:
        tensors[name][5] = float("nan")
    save_file(tensors, path / "model.safetensors")
    broken = open_model(path)
    assert broken.read(name, slice(0, 5)).isfinite().all()
    with pytest.raises(UserError, match=f"tensor {re.escape(name)} holds"):
        broken.read(name, slice(0, 6))


LARGE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "hybrid_override_pattern": "M*E-",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 4096,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
}
MEASURE = """
import json, pathlib, re, sys
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
def peak():  # of this program alone: the peak that getrusage gives began in the process it was started from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
open_model(pathlib.Path(sys.argv[1])).read("backbone.norm_f.weight")
before = peak()
network = load_model(sys.argv[1]).network
print(json.dumps([before, peak(), sum(t.numel() * t.element_size() for t in network.state_dict().values())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("kind", "copies"), [("hugging face", 1), ("fit", 2)])
def test_the_peak_of_memory_is_the_model_and_one_tensor(tmp_path, kind, copies):
    """About 200 MiB of weights, fp32 in file and memory; torch's own reader holds a tensor twice while it copies it."""
    with torch.device("meta"):
        from modules.backbone.model import Network

        network = Network(BackboneConfig(**LARGE))
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(0.5)
    if kind == "fit":
        folder = write_fit_folder(tmp_path / "step=00000001", network)
    else:
        folder = write_shards(tmp_path, public_tensors(network), to_hugging_face(network.config), shards=4)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    before, after, size = json.loads(result.stdout.splitlines()[-1])
    largest = max(tensor.numel() * 4 for tensor in network.state_dict().values())
    assert size > 180 * 2**20
    print(f"{kind}: model {size / 2**20:.0f} MiB, peak {(after - before) / 2**20:.0f} MiB above the start")
    assert after - before < size + copies * largest + 24 * 2**20
