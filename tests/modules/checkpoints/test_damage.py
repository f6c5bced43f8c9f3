"""Every damaged folder is refused in one line that names the file, the tensor where there is one, and the mend."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints import folder
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from modules.errors import UserError
from tests.modules.checkpoints.helpers import MANIFEST, public_tensors, write_fit_folder, write_shards
from tests.modules.helpers import make_network, tiny_config

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def network():
    return make_network(tiny_config())


@pytest.fixture
def sharded(network, tmp_path) -> Path:
    return write_shards(tmp_path / "model", public_tensors(network), to_hugging_face(network.config), shards=2)


@pytest.fixture
def single(network, tmp_path) -> Path:
    return write_shards(tmp_path / "model", public_tensors(network), to_hugging_face(network.config))


def message(path: Path) -> str:
    with pytest.raises(UserError, match=r".") as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text.replace(str(path), "")) < 300
    return text.replace(str(path), "PATH")


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_header(file: Path, change: Callable[[dict], object], pad: int = 0) -> None:
    """Change the header and leave the data as they are."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode() + b" " * pad
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def holder(folder: Path, name: str = HEAD) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


# -- weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.0])
def test_truncated_shard(sharded, kept):
    file = sharded / SECOND
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    text = message(sharded)
    assert f"PATH/{SECOND}" in text
    assert "copy or download the file again" in text


def test_pointer_instead_of_a_file(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert message(single).startswith("PATH/model.safetensors is cut short or no safetensors file")


def test_bytes_after_the_end(single):
    with (single / "model.safetensors").open("ab") as stream:
        stream.write(b"12345678")
    assert "file not fully covered" in of_header(message(single))


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda header: header[HEAD].update(shape=[64, 33]), "invalid shape, data type, or offset for tensor"),
        (lambda header: header[HEAD].update(dtype="F64"), "invalid shape, data type, or offset for tensor"),
        (lambda header: header[HEAD].update(data_offsets=[0, 8192]), "invalid offset for tensor `"),
        (lambda header: header[HEAD].update(data_offsets=[8, 4]), f"invalid offset for tensor `{HEAD}`"),
        (lambda header: header[HEAD].update(shape=[-64, -32]), "integer `-64`"),
        (lambda header: header[HEAD].update(data_offsets="all"), 'string "all"'),
        (lambda header: header[HEAD].pop("dtype"), "missing field `dtype`"),
        (lambda header: header.update({HEAD: 3}), "integer `3`"),
        (lambda header: header[HEAD].update(dtype=["F32"]), "invalid type: sequence"),
    ],
)
def test_header_that_lies(single, change, answer):
    edit_header(single / "model.safetensors", change)
    assert answer in of_header(message(single))


def of_header(text: str) -> str:
    """The library's words in the message on a header that it refuses."""
    before, after = "PATH/model.safetensors is cut short or no safetensors file (", "); copy or download the file again"
    assert text.startswith(before)
    assert text.endswith(after)
    return text[len(before) : -len(after)]


def test_header_that_is_a_list(single):
    (single / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "invalid type: sequence" in of_header(message(single))


def test_header_that_does_not_parse(single):
    file = single / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:24] = b"\xff\xff{{"
    file.write_bytes(content)
    assert "invalid UTF-8 in header" in of_header(message(single))
    file.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    assert "invalid JSON in header" in of_header(message(single))


def test_tensor_twice_in_a_header(single):
    file = single / "model.safetensors"
    content = file.read_bytes()
    name = b'"backbone.embeddings.weight"'
    assert len(name) > len(HEAD) + 2
    padded = f'"{HEAD}"'.encode() + b" " * (len(name) - len(HEAD) - 2)
    file.write_bytes(content.replace(name, padded, 1))
    assert "invalid offset for tensor" in of_header(message(single))


def test_wrong_shape(single):
    edit_tensors(single / "model.safetensors", lambda tensors: tensors.update({HEAD: torch.zeros(32, 64)}))
    text = message(single)
    assert f"PATH/model.safetensors: tensor {HEAD} has shape [32, 64], but config.json means [64, 32]" in text


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_wrong_dtype(single, dtype):
    edit_tensors(single / "model.safetensors", lambda tensors: tensors.update({HEAD: tensors[HEAD].to(dtype)}))
    assert f"PATH/model.safetensors: tensor {HEAD} has dtype" in message(single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(sharded, dtype, value):
    def spoil(tensors):
        tensors[HEAD] = tensors[HEAD].to(dtype)
        tensors[HEAD][3, 5] = value

    file = holder(sharded)
    edit_tensors(file, spoil)
    answer = f"PATH/{file.name}: tensor {HEAD} holds 1 values of 2048 that are NaN or infinite"
    assert message(sharded).startswith(answer)


def test_missing_tensor(single):
    name = "backbone.layers.1.mixer.experts.5.up_proj.weight"
    edit_tensors(single / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"1 tensor is missing in its weight files ({name})" in message(single)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("backbone.layers.0.mixer.in_proj.bias", "download the folder again"),
        ("backbone.layers.0.mixer.in_proj.weight_scale", "take the model in bf16"),
        ("model.embeddings.weight", "save it with save_original_format=True"),
        ("mtp.layers.9.norm.weight", "if it is an MTP block, set num_nextn_predict_layers to 1"),
    ],
)
def test_tensor_too_many(single, name, mend):
    edit_tensors(single / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(2)}))
    text = message(single)
    assert f"1 tensor is not part of the network that config.json describes ({name})" in text
    assert mend in text


# -- index ------------------------------------------------------------------------------------------------------------


BROKEN_INDEX = [
    *("[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000),
    *('{"weight_map": {"x": "../x"}}', '{"weight_map": {"x": ".."}}'),
]


def test_missing_index_entry(sharded):
    file = holder(sharded)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(HEAD))
    assert f"PATH/{INDEX}: it has no entry for tensor {HEAD}, which {file.name} holds" in message(sharded)


def test_index_that_names_the_wrong_shard(sharded):
    other = SECOND if holder(sharded).name == FIRST else FIRST
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({HEAD: other}))
    assert f"PATH/{INDEX}: it says that {other} holds tensor {HEAD}, which is not so" in message(sharded)


def test_index_that_names_a_tensor_of_no_shard(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"new": FIRST}))
    assert f"{FIRST} holds tensor new, which is not so" in message(sharded)


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    assert message(sharded).startswith(f"PATH/{SECOND} is missing, though {INDEX} names it; download it")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_shard_that_is_no_file(sharded, make):
    (sharded / SECOND).unlink()
    make(sharded / SECOND)
    assert message(sharded).startswith(f"PATH/{SECOND} is no file, though {INDEX} names it; download it")


def test_missing_index(sharded):
    (sharded / INDEX).unlink()
    assert f"neither model.safetensors nor {INDEX} is there; {FIRST} is there" in message(sharded)


def test_two_files_with_the_same_tensor(sharded):
    file = holder(sharded)
    other = sharded / (SECOND if file.name == FIRST else FIRST)
    edit_tensors(other, lambda tensors: tensors.update({HEAD: torch.zeros(64, 32)}))
    text = message(sharded)
    assert text.startswith(f"tensor {HEAD} is in two files, PATH/{FIRST} and PATH/{SECOND}")


def test_two_models_in_a_folder(sharded, network):
    save_file(public_tensors(network), sharded / "model.safetensors")
    assert "holds both model.safetensors and" in message(sharded)


@pytest.mark.parametrize("content", BROKEN_INDEX)
def test_index_that_is_none(sharded, content):
    (sharded / INDEX).write_text(content)
    assert message(sharded).startswith(f"PATH/{INDEX}")


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"hidden_size": 48},
        {"vocab_size": 65},
        {"moe_intermediate_size": 25},
        {"n_routed_experts": 9},
        {"n_routed_experts": 7},
        {"ssm_state_size": 9},
        {"conv_kernel": 3},
        {"use_conv_bias": False},
        {"moe_latent_size": None},
        {"num_key_value_heads": 4},
        {"intermediate_size": 49},
        {"moe_shared_expert_intermediate_size": 41},
        {"num_nextn_predict_layers": 0},
        {"n_routed_experts": 10**12},
        {"vocab_size": 10**18},
        {"mamba_head_dim": 10**18},
        {"hybrid_override_pattern": "M" * 100_000, "layers_block_type": None, "num_hidden_layers": None},
        {"hybrid_override_pattern": "M*E-E", "layers_block_type": ["moe"] * 100_000},
    ],
    ids=lambda lie: ",".join(lie) + str(lie)[-12:],
)
def test_configuration_that_lies_about_a_size(single, lie):
    edit_json(single / "config.json", lambda raw: raw.update(lie))
    text = message(single)
    assert "config.json" in text
    if not any(size in (10**12, 10**18) or len(str(size)) > 99 for size in lie.values()):
        assert "backbone." in text or "mtp." in text, "a tensor is named"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"version https://git-lfs", b"[" * 10**5])
def test_configuration_that_is_no_json(single, content):
    (single / "config.json").write_bytes(content)
    assert message(single).startswith("PATH/config.json ")


def test_generation_config_that_is_wrong(single):
    (single / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert "PATH/generation_config.json: eos_token_id '</s>' must be a token id" in message(single)


def republish(path: Path, name: str, content: bytes) -> None:
    """Write a checkpoint of fit again with another content of a file, and a manifest that agrees."""
    partial = folder.begin(path)
    for file in path.iterdir():
        if file.name != "checkpoint.json":
            (partial / file.name).write_bytes(content if file.name == name else file.read_bytes())
    folder.publish(path, MANIFEST)


# -- other folders ----------------------------------------------------------------------------------------------------


def test_no_model_at_all(tmp_path):
    assert "does not exist" in message(tmp_path / "nowhere")
    assert "PATH is no MODEL" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is there; download the safetensors weights" in message(tmp_path)
    assert "is a file" in message(tmp_path / "config.json")


def test_damaged_checkpoint_of_fit(network, tmp_path):
    path = write_fit_folder(tmp_path / "run" / "checkpoints" / "step=00000001", network)
    file = path / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "PATH is damaged: __0_0.distcp has" in message(path)
    assert "has no complete checkpoint" in message(tmp_path / "run")
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert "PATH is damaged: __0_0.distcp has changed" in message(path)
    (path / ".metadata").unlink()
    assert "PATH is damaged: .metadata is missing" in message(path)
    (path / "checkpoint.json").unlink()
    (path / ".metadata").touch()
    assert "PATH is damaged: checkpoint.json cannot be read" in message(path)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"files": [1]}', '{"files": {"config.yaml": 5}}', "[" * 10**5])
def test_manifest_that_is_none(network, tmp_path, content):
    path = write_fit_folder(tmp_path / "step=00000001", network)
    (path / "checkpoint.json").write_text(content)
    assert message(path).startswith("PATH is damaged: checkpoint.json cannot be read")


@pytest.mark.parametrize("change", [{"step": "1"}, {"tokens": None}, {"metrics": [1]}, {"metrics": {"loss": "low"}}])
def test_manifest_with_a_wrong_value(network, tmp_path, change):
    path = write_fit_folder(tmp_path / "step=00000001", network)
    edit_json(path / "checkpoint.json", lambda manifest: manifest.update(change))
    assert message(path).startswith(f"PATH/checkpoint.json: {next(iter(change))} is missing or of the wrong type")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_checkpoint_of_fit_that_was_saved_damaged(network, tmp_path, name):
    """The manifest agrees with the files, so that what reads them has to notice."""
    path = write_fit_folder(tmp_path / "step=00000001", network)
    content = (path / name).read_bytes()
    for damaged in (b"", content[: len(content) // 9], bytes(byte ^ 0xFF for byte in content)):
        republish(path, name, damaged)
        text = message(path)
        assert f"PATH/{name} is damaged" in text if name == ".metadata" else "cannot be read" in text


def test_newest_undamaged_checkpoint_of_a_run(network, tmp_path):
    run = tmp_path / "run"
    assert "is no MODEL" in message(tmp_path)
    older = write_fit_folder(run / "checkpoints" / "step=00000001", network)
    newer = write_fit_folder(run / "checkpoints" / "step=00000002", network)
    assert (open_model(run).path, open_model(run).notes) == (newer, [])
    folder.link(run / "checkpoints" / "best", older)
    assert open_model(run / "checkpoints" / "best").path == older
    (newer / "config.yaml").unlink()
    assert open_model(run).path == older
    assert open_model(run).notes == [
        f"warning: {newer} is damaged and passed over: config.yaml is missing; {older.name} is taken"
    ]


def test_checkpoint_of_fit_with_nan(tmp_path):
    network = make_network(tiny_config())
    with torch.no_grad():
        network.backbone.layers[1].mixer.experts.up_proj.weight[3, 0, 0] = float("nan")
    path = write_fit_folder(tmp_path / "step=00000001", network)
    assert "PATH: tensor backbone.layers.1.mixer.experts.up_proj.weight holds 1 values" in message(path)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda text: text.replace("hidden_size: 32", "hidden_size: 40"), "has shape"),
        (lambda text: text.replace("num_nextn_predict_layers: 1", "num_nextn_predict_layers: 0"), "mtp."),
        (lambda text: text.replace("hidden_size: 32", "hidden_sizes: 32"), "hidden_sizes is no field"),
        (lambda text: text.replace("backbone:", "spine:"), "model.init_args.backbone is missing"),
        (lambda text: "a: [", "is not valid YAML"),
        (lambda text: "3", "is no configuration of a run"),
        (lambda text: "\udcff", "is not valid YAML"),
        (lambda text: text.replace("hidden_size: 32", f"hidden_size: {10**30}"), "beyond any file"),
        (lambda text: text.replace("n_routed_experts: 8", f"n_routed_experts: {10**12}"), "n_routed_experts is"),
    ],
)
def test_checkpoint_of_fit_whose_configuration_is_of_another(network, tmp_path, change, answer):
    path = write_fit_folder(tmp_path / "step=00000001", network)
    text = (path / "config.yaml").read_text()
    republish(path, "config.yaml", change(text).encode(errors="surrogateescape"))
    assert answer in message(path)
