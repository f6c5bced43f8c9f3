"""The forward pass with a cache gives what the full forward pass gives, whatever the pieces it is fed."""

import pytest
import torch

from modules.backbone.model import Network
from modules.errors import UserError
from modules.generation import native
from modules.generation.runner import Runner
from modules.precision.linear import FormattedModule
from modules.precision.recipe import PrecisionConfig, PrecisionRule, assign_formats
from tests.modules.helpers import BF16, assert_close, make_network, tiny_config

CONFIGS = {
    "every mixer": {},
    "Mamba-2": {"hybrid_override_pattern": "MM", "num_nextn_predict_layers": 0},
    "Mamba-2 of one group, one tap": {"hybrid_override_pattern": "MM", "n_groups": 1, "conv_kernel": 1},
    "no bias in the convolution": {"hybrid_override_pattern": "M", "use_conv_bias": False},
    "attention": {"hybrid_override_pattern": "**"},
    "attention with a head each": {"hybrid_override_pattern": "**", "num_key_value_heads": 4},
    "groups of experts, no latent": {
        "hybrid_override_pattern": "EE",
        "n_group": 4,
        "topk_group": 2,
        "moe_latent_size": None,
        "moe_shared_expert_intermediate_size": 0,
    },
    "MLP, tied": {"hybrid_override_pattern": "M-*-", "tie_word_embeddings": True},
    "MTP with Mamba-2": {"mtp_hybrid_override_pattern": "M*-"},
}
LENGTHS = (45, 7, 1, 30)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def network(request) -> Network:
    return make_network(tiny_config(**request.param))


@pytest.fixture(params=["C code", "portable"], autouse=True)
def _inference(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    elif native.load()[0] is None:
        pytest.skip(native.load()[1])
    with torch.inference_mode():
        yield


def tokens_of(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=63)


def feed(runner: Runner, rows: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """Feed rows in pieces of the given sizes (the last one repeats); return each row's hidden states."""
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    start, sizes = 0, list(sizes)
    while start < max(map(len, rows)):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        pieces = [row[start : start + size] for row in rows]
        hidden = runner.run(padded(pieces), counts=[len(piece) for piece in pieces])
        for part, values, piece in zip(parts, hidden, pieces, strict=True):
            part.append(values[: len(piece)])
        start += size
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("sizes", [[1], [45], [3, 1, 20, 2], [1, 40], [33, 5]], ids=str)
def test_any_split_of_unequal_prompts_equals_the_full_pass(network, sizes):
    rows = tokens_of(*LENGTHS)
    runner = Runner(network, len(rows), max(LENGTHS))
    for row, hidden in zip(rows, feed(runner, rows, sizes), strict=True):
        assert_close(hidden, network(row[None]).hidden[0], 2e-5)
    assert runner.cache.lengths == list(LENGTHS)


def test_rows_of_unequal_length_go_on_together(network):
    rows = tokens_of(*LENGTHS)
    more = tokens_of(*[12] * 4, seed=1)
    runner = Runner(network, len(rows), max(LENGTHS) + 12)
    feed(runner, rows, [16])
    new = torch.stack(more)
    hidden = torch.cat([runner.run(new[:, part]) for part in map(slice, (0, 1, 2, 6), (1, 2, 6, 12))], 1)
    for row, after, values in zip(rows, more, hidden, strict=True):
        assert_close(values, network(torch.cat([row, after])[None]).hidden[0, len(row) :], 2e-5)


def test_held_tokens_are_taken_over_up_to_the_count_of_each_row(network):
    rows = tokens_of(*LENGTHS)
    drafts, after = torch.stack(tokens_of(*[5] * 4, seed=1)), torch.stack(tokens_of(*[2] * 4, seed=2))
    counts = [0, 5, 2, 1]
    runner = Runner(network, len(rows), max(LENGTHS) + 8)
    feed(runner, rows, [16])
    held = runner.run(drafts, hold=True)
    assert runner.cache.lengths == list(LENGTHS)
    runner.advance(counts)
    hidden = runner.run(after)
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        whole = torch.cat([row, drafts[index]])
        assert_close(held[index], network(whole[None]).hidden[0, len(row) :], 2e-5)
        whole = torch.cat([row, drafts[index, :count], after[index]])
        assert_close(hidden[index], network(whole[None]).hidden[0, -2:], 2e-5)


def test_held_tokens_that_nobody_takes_over_leave_no_trace(network):
    (row,) = tokens_of(20)
    runner = Runner(network, 1, 30)
    runner.run(row[None, :10])
    runner.run(torch.full((1, 6), 3), hold=True)
    hidden = runner.run(row[None, 10:])
    assert_close(hidden, network(row[None]).hidden[:, 10:], 2e-5)


def test_chosen_rows_go_on_alone_and_repeated(network):
    rows = tokens_of(*LENGTHS)
    runner = Runner(network, len(rows), max(LENGTHS) + 4)
    feed(runner, rows, [16])
    runner.cache.select([3, 1, 3])
    more = torch.stack(tokens_of(4, 4, 4, seed=1))
    hidden = runner.run(more)
    for values, row, after in zip(hidden, (rows[3], rows[1], rows[3]), more, strict=True):
        assert_close(values, network(torch.cat([row, after])[None]).hidden[0, len(row) :], 2e-5)


@pytest.mark.parametrize("counts", [[0, 3, 3, 0], [0, 0, 2, 0], [1, 0, 3, 0]], ids=str)
def test_a_row_without_new_tokens_stays_as_it_is(network, counts):
    rows = tokens_of(*LENGTHS)
    runner = Runner(network, len(rows), max(LENGTHS) + 8)
    feed(runner, rows, [16])
    more, after = tokens_of(*counts, seed=1), torch.stack(tokens_of(*[2] * 4, seed=2))
    runner.run(padded(more), counts=counts)
    hidden = runner.run(after)
    for values, *parts in zip(hidden, rows, more, after, strict=True):
        assert_close(values, network(torch.cat(parts)[None]).hidden[0, -2:], 2e-5)


def test_a_cache_outlives_a_move_of_the_weights(network):
    (row,) = tokens_of(20)
    runner = Runner(network, 1, 20)
    runner.run(row[None, :18])
    runner.run(row[None, 18:19])
    network.double().float()
    assert_close(runner.run(row[None, 19:]), network(row[None]).hidden[:, 19:], 2e-5)


def test_vectors_in_bf16_are_not_for_the_c_code():
    network = make_network(tiny_config(), BF16).bfloat16()
    assert Runner(network, 1, 8).native is None


def test_quantised_products_are_not_for_the_c_code():
    """Their weights may be bf16 and alike, but the products are others."""
    linears = [PrecisionRule(pattern="*", format="nvfp4")]
    network = make_network(tiny_config(hybrid_override_pattern="--"), BF16)
    for module in network.modules():
        if isinstance(module, FormattedModule):
            module.to(torch.bfloat16)
    assert (Runner(network, 1, 8).native is None) == (native.load()[0] is None)
    for layer in network.backbone.layers:
        assign_formats(PrecisionConfig(recipe=None, rules=linears), layer)
    assert Runner(network, 1, 8).native is None
    tokens = tokens_of(6)[0][None]
    runner = Runner(network, 1, 6)
    with torch.no_grad():
        assert_close(runner.run(tokens), network(tokens).hidden, 2e-2)


@pytest.mark.parametrize("change", ["select", "restore"])
def test_held_tokens_are_those_of_the_same_rows_and_moment(network, change):
    runner = Runner(network, 2, 8)
    snapshot = runner.cache.snapshot()
    runner.run(torch.zeros(2, 3, dtype=torch.int64), hold=True)
    runner.cache.select([1, 0]) if change == "select" else runner.cache.restore(snapshot)
    with pytest.raises(AssertionError):
        runner.advance([1, 1])


def test_no_state_keeps_the_positions_of_a_pass_in_memory(network):
    runner = Runner(network, 1, 512)
    runner.run(tokens_of(512)[0][None])
    tensors = [
        value for state in runner.cache.states if state for value in vars(state).values() if torch.is_tensor(value)
    ]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("mtp_pattern", ["*E", "ME", "M*-", "-"])
def test_drafting_equals_the_mtp_chain(mtp_pattern):
    network = make_network(tiny_config(mtp_hybrid_override_pattern=mtp_pattern))
    (row,) = tokens_of(30)
    output = network(row[None], mtp_depths=1)
    runner = Runner(network, 1, 30, mtp=True)
    parts = []
    for start, end in ((0, 13), (13, 14), (14, 29)):
        if start == 13:  # a draft that is taken back
            snapshot = runner.cache.snapshot()
            runner.run(row[None, :1], output.hidden[:, :1])
            runner.cache.restore(snapshot)
        ahead = row[None, start + 1 : end + 1]
        parts.append(runner.run(ahead, output.hidden[:, start:end]))
    assert_close(torch.cat(parts, 1), output.mtp_hidden[0][:, :29], 2e-5)


def test_bf16_stays_near_the_full_pass():
    network = make_network(tiny_config(), BF16)
    for module in network.modules():
        if isinstance(module, FormattedModule):
            module.weight.data = module.weight.bfloat16()
    rows = tokens_of(*LENGTHS)
    runner = Runner(network, len(rows), max(LENGTHS))
    assert (runner.native is not None) == (native.load()[0] is not None)
    for row, hidden in zip(rows, feed(runner, rows, [9, 1]), strict=True):
        assert_close(hidden, network(row[None]).hidden[0], 5e-2)


def test_fp16_states_are_smaller_and_near(network):
    rows = tokens_of(*LENGTHS)
    runner = Runner(
        network, len(rows), max(LENGTHS), state_dtype=torch.float16, generator=torch.Generator().manual_seed(0)
    )
    for row, hidden in zip(rows, feed(runner, rows, [7]), strict=True):
        assert_close(hidden, network(row[None]).hidden[0], 2e-2)


def test_a_dtype_no_state_can_have_is_refused():
    with pytest.raises(UserError, match="state_dtype"):
        make_network(tiny_config()).new_cache(1, 8, state_dtype=torch.bfloat16)
