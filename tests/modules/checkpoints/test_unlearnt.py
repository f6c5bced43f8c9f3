"""Which rows of chat tokens a base never learnt, told of a model that was really trained, and what they become."""

from pathlib import Path

import pytest
import torch

from modules.backbone.model import Network
from modules.checkpoints.config import to_hugging_face
from modules.checkpoints.names import EMBEDDING, HEAD
from modules.checkpoints.source import open_model
from modules.checkpoints.unlearnt import find_unlearnt, start_anew
from modules.optim.adamw import OptimizerConfig
from modules.precision.lora import LoRAConfig
from modules.sft import SFT
from tests.modules.checkpoints.helpers import public_tensors, write_fit_folder, write_shards
from tests.modules.helpers import ListData, build, fit, make_module, make_network, packed_batch, tiny_config
from tests.modules.helpers import document_ids as documents

TURNS = {"<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12}
"""Chat tokens; ids below 24 are in no text."""
SEEN = {"a": 30, "b": 31}
RESERVED = [*range(1, 10), *range(13, 24)]


@pytest.fixture(scope="module")
def base() -> Network:
    """A network trained on text of the ids 24 to 63, as a base model is, with weight decay."""
    batches = [packed_batch(documents([16], [7, 9]), 40, seed) for seed in range(80)]
    for batch in batches:
        batch.tokens += 24
        batch.labels[batch.labels >= 0] += 24
    optimizer = OptimizerConfig(learning_rate=2e-2, weight_decay=0.5)
    module = make_module(tiny_config(initializer_range=0.02), optimizer=optimizer)
    fit(module, ListData(batches))
    return module.built_network


def saved(network: Network, folder: Path, kind: str) -> Path:
    if kind == "fit":
        return write_fit_folder(folder / "step=00000001", network)
    tensors = {name: tensor.bfloat16() for name, tensor in public_tensors(network).items()}
    return write_shards(folder / "hf", tensors, to_hugging_face(network.config), shards=1)


def copy_of(network: Network) -> Network:
    other = make_network(network.config)
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize("kind", ["fit", "hugging face in bf16"])
def test_rows_of_a_trained_base(base, kind, tmp_path) -> None:
    source = open_model(saved(base, tmp_path, kind))
    assert find_unlearnt(source, TURNS | SEEN, RESERVED) == {EMBEDDING: [*TURNS], HEAD: [*TURNS]}


@pytest.mark.parametrize("reserved", [RESERVED, []])
def test_rows_of_zeros_are_told_without_anything_to_compare_with(base, reserved, tmp_path) -> None:
    network = copy_of(base)
    with torch.no_grad():
        network.lm_head.weight[31] = 0
        network.backbone.embeddings.weight[[11, 12]] = 0
    found = find_unlearnt(open_model(saved(network, tmp_path, "fit")), TURNS | SEEN, reserved)
    assert found[HEAD][-1:] == ["b"]
    assert found[EMBEDDING] == ([*TURNS] if reserved else ["<|im_end|>", "<think>"])


def test_what_was_learnt_is_never_taken_for_untouched(base, tmp_path) -> None:
    """A base that saw one of them; one that was never trained; one whose tokenizer has no reserved tokens."""
    network = copy_of(base)
    with torch.no_grad():
        network.backbone.embeddings.weight[10] = 1.1 * network.backbone.embeddings.weight[40]
    seen = find_unlearnt(open_model(saved(network, tmp_path / "seen", "fit")), TURNS, RESERVED)
    assert seen == {EMBEDDING: ["<|im_end|>", "<think>"], HEAD: ["<|im_end|>", "<think>"]}
    fresh = open_model(saved(make_network(tiny_config()), tmp_path / "fresh", "fit"))
    assert find_unlearnt(fresh, TURNS, RESERVED) == {}
    assert find_unlearnt(open_model(saved(base, tmp_path / "few", "fit")), TURNS, RESERVED[:4]) == {}


def test_new_rows_are_draws_of_the_learnt_ones(base, tmp_path) -> None:
    source = open_model(saved(base, tmp_path, "fit"))
    found = find_unlearnt(source, TURNS, RESERVED)
    networks = [copy_of(base) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        start_anew(network, source, TURNS, RESERVED, found, seed)
    first, again, other = (network.state_dict() for network in networks)
    ids = list(TURNS.values())
    for name, before in base.state_dict().items():
        changed = (
            [] if torch.equal(first[name], before) else (first[name] != before).any(1).nonzero().flatten().tolist()
        )
        assert changed == (ids if name in found else []), name
        assert torch.equal(again[name], first[name])
    learnt = base.state_dict()[EMBEDDING][24:]
    rows = first[EMBEDDING][ids]
    assert torch.pdist(rows).min() > 0.5 * torch.pdist(learnt).median(), "new tokens differ from each other"
    assert (rows.norm(dim=1) / learnt.norm(dim=1).median()).sub(1).abs().max() < 0.5
    assert not torch.equal(other[EMBEDDING][ids], rows)
    hidden = networks[0](torch.randint(24, 64, (4, 16)), torch.zeros(4, 16, dtype=torch.int32)).hidden
    old, new = (network.logits(hidden).log_softmax(-1)[..., ids].mean() for network in (base, networks[0]))
    assert new > old + 1, "what is to be said is no longer pushed below all that is said"
    assert new < 0, "and is none of the likely ones"


class ChatData(ListData):
    def chat_tokens(self) -> dict[str, int]:
        return TURNS

    def reserved_tokens(self) -> list[int]:
        return RESERVED


def test_a_run_names_them_and_a_resumed_one_leaves_them_alone(base, tmp_path) -> None:
    module = make_module(base.config, cls=SFT, init_from=saved(base, tmp_path, "fit"))
    built = build(module, data=ChatData)
    named = f"that were never learnt start anew: {' '.join(TURNS)}"
    assert module.initial_weights[-2:] == [f"rows of {name} {named}" for name in (EMBEDDING, HEAD)]
    assert not torch.equal(built.lm_head.weight[10], base.lm_head.weight[10])
    resumed = make_module(base.config, cls=SFT)  # the program takes init_from away
    build(resumed, data=ChatData)
    assert resumed.initial_weights == []


def test_under_adapters_they_stay_and_that_is_said(base, tmp_path) -> None:
    module = make_module(base.config, cls=SFT, init_from=saved(base, tmp_path, "fit"), lora=LoRAConfig())
    built = build(module, data=ChatData)
    assert torch.equal(built.lm_head.weight, base.lm_head.weight)
    assert module.initial_weights[-1].startswith(f"rows of {HEAD} that were never learnt stay so under adapters")
