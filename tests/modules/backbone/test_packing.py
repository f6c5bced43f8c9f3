"""A packed row equals its documents run alone: states, routing, loss, counts and gradients."""

import pytest
import torch
from torch import Tensor

from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.backbone.router import Routing
from modules.batch import PackedBatch
from modules.objectives.next_token import next_token_loss
from modules.ops.documents import DocumentLayout
from tests.modules.helpers import (
    assert_close,
    assert_same_gradients,
    counts_of,
    document_ids,
    gradients,
    make_network,
    packed_batch,
    perturb,
    spans,
    tiny_config,
)

TOLERANCE = 1e-5
DEPTHS = 2
ROWS = {
    "on chunk borders": ([8, 16], [24]),
    "off chunk borders": ([5, 12, 7], [3, 21]),
    "very short": ([1, 1, 2, 3, 1, 16], [1] * 24),
    "single document": ([24], [24]),
}


def make_layer(letter: str) -> Layer:
    """One layer with weights that make every part of the mixer matter."""
    network = make_network(tiny_config(hybrid_override_pattern=letter, num_nextn_predict_layers=0))
    perturb(network, seed=4)
    return network.backbone.layers[0]


def run_alone(layer: Layer, x: Tensor, ids: Tensor) -> tuple[Tensor, list[tuple[int, slice, Routing]]]:
    out, routings = torch.empty_like(x), []
    for row, part in spans(ids):
        out[row, part], routing = (
            item[0] if isinstance(item, Tensor) else item for item in layer(x[row : row + 1, part], None)
        )
        if routing is not None:
            routings.append((row, part, routing))
    return out, routings


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("letter", ["M", "E", "*", "-"])
def test_every_mixer(letter: str, rows: tuple[list[int], list[int]]) -> None:
    layer, ids = make_layer(letter), document_ids(*rows)
    generator = torch.Generator().manual_seed(2)
    x, probe = (torch.randn(2, 24, 32, generator=generator) for _ in range(2))
    results = []
    for packed in (True, False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(leaf, DocumentLayout(ids))[0] if packed else run_alone(layer, leaf, ids)[0]
        (out * probe).sum().backward()
        results.append((out, leaf.grad, gradients(layer)))
    (packed_out, packed_input, packed_grads), (out, input_grad, grads) = results
    assert_close(packed_out, out, TOLERANCE, "output")
    assert_close(packed_input, input_grad, TOLERANCE, "gradient of the input")
    assert_same_gradients(packed_grads, grads, TOLERANCE)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_routing(rows: tuple[list[int], list[int]]) -> None:
    layer, ids = make_layer("E"), document_ids(*rows)
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
    routing = layer(x, DocumentLayout(ids))[1]
    counts = torch.zeros_like(routing.counts)
    for row, part, alone in run_alone(layer, x, ids)[1]:
        counts[row] += alone.counts[0]
        assert_close(routing.probabilities[row, part], alone.probabilities[0], TOLERANCE)
    assert torch.equal(routing.counts, counts)


def pieces(batch: PackedBatch) -> list[tuple[int, slice, PackedBatch]]:
    """Each document as a batch of its own, with the labels of the packed row."""
    found = []
    for row, part in spans(batch.document_ids):
        tokens, labels = batch.tokens[row : row + 1, part], batch.labels[row : row + 1, part]
        ids = torch.zeros_like(tokens, dtype=torch.int32)
        found.append((row, part, PackedBatch(tokens=tokens, labels=labels, document_ids=ids)))
    return found


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_whole_network_with_mtp(rows: tuple[list[int], list[int]]) -> None:
    network = make_network(tiny_config())
    batch = packed_batch(document_ids(*rows), 64)
    with torch.no_grad():
        packed = network(batch.tokens, batch.document_ids, DEPTHS)
        counts = [torch.zeros_like(routing.counts) for routing in packed.router]
        for row, part, piece in pieces(batch):
            alone = network(piece.tokens, None, DEPTHS)
            assert_close(packed.hidden[row, part], alone.hidden[0], TOLERANCE, "hidden")
            for depth in range(1, DEPTHS + 1):
                # Only where the document has a token that far ahead; elsewhere no loss falls.
                length = part.stop - part.start - depth
                if length > 0:
                    states = packed.mtp_hidden[depth - 1][row, part][:length], alone.mtp_hidden[depth - 1][0][:length]
                    assert_close(*states, TOLERANCE, f"depth {depth}")
            for total, routing in zip(counts, alone.router, strict=True):
                for depth, alone_counts in enumerate(routing.counts):  # the MTP block has one row for each depth
                    total[depth * len(batch.tokens) + row] += alone_counts
    for routing, total in zip(packed.router, counts, strict=True):
        assert torch.equal(routing.counts, total)


def loss_of(network: Network, batches: list[PackedBatch]) -> tuple[float, Tensor, dict[str, Tensor]]:
    network.zero_grad()
    counts = torch.stack([counts_of(batch, DEPTHS) for batch in batches]).sum(0)
    parts = [next_token_loss(network, batch, counts, DEPTHS, 0.3) for batch in batches]
    total = torch.stack([part.loss for part in parts]).sum()
    total.backward()
    return total.item(), torch.stack([part.nats for part in parts]).sum(0), gradients(network)


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_loss_and_all_gradients(rows: tuple[list[int], list[int]], masked: float) -> None:
    network = make_network(tiny_config())
    batch = packed_batch(document_ids(*rows), 64, masked=masked)
    loss, nats, grads = loss_of(network, [batch])
    alone_loss, alone_nats, alone_grads = loss_of(network, [piece for *_, piece in pieces(batch)])
    assert loss == pytest.approx(alone_loss, rel=TOLERANCE)
    assert_close(nats, alone_nats, TOLERANCE, "nats")
    assert_same_gradients(grads, alone_grads, TOLERANCE)


def test_what_follows_cannot_be_seen() -> None:
    """Changing a later document, or a later token of the same one, changes nothing before it."""
    network = make_network(tiny_config())
    ids = document_ids([9, 6, 9])
    tokens = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 64
    with torch.no_grad():
        before, after = network(tokens, ids).hidden, network(changed, ids).hidden
    assert_close(after[:, :12], before[:, :12], 1e-6)
    assert (after[:, 12] - before[:, 12]).abs().max() > 1e-2
