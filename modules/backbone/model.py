"""The network: embedding, layers, final norm, head, and the MTP block beside them.

Parameter names are those of the open checkpoints (`backbone.layers.{i}.mixer...`, `mtp.layers.{j}...`,
`lm_head.weight`), with the experts of a layer stacked in one tensor.
Shapes: B rows, T positions, D hidden, V vocabulary, M MTP depths.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.backbone.cache import Cache
from modules.backbone.config import BackboneConfig
from modules.backbone.latent_moe import Experts
from modules.backbone.layer import Layer, Observer
from modules.backbone.mtp import MTPBlock
from modules.backbone.normalization import RMSNorm
from modules.backbone.router import Router, Routing
from modules.errors import UserError
from modules.ops.documents import DocumentLayout
from modules.precision.linear import Embedding, FormattedModule, Head

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements of a tensor of logits: 4 MiB in fp32, which a CPU's cache holds, or 64 MiB on a GPU."""


class Output(NamedTuple):
    """Result of a forward pass."""

    hidden: Tensor
    """[B, T, D] after the final norm."""
    mtp_hidden: list[Tensor]
    """M tensors [B, T, D]: the normalised hidden state of each MTP depth."""
    router: list[Routing]
    """One `Routing` per router of `Network.routers()`, in that order; those of the MTP block have B x M rows, one for
    each row and depth."""


@dataclass(frozen=True)
class ShardingUnit:
    """Modules whose parameters a strategy gathers together."""

    modules: list[nn.Module]
    """The modules, run one after the other."""
    dtype: torch.dtype
    """Dtype their parameters are gathered in."""
    axes: tuple[str, ...] = ("shard", "expert", "context")
    """Mesh axes over which their rows are sharded (over `replicate` they are copies). Routed experts leave out
    `expert`: along it each rank has experts of its own."""


class Backbone(nn.Module):
    """Embedding, layers and final norm.

    Args:
        config: the configuration.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, letter) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class Network(nn.Module):
    """A hybrid Mamba-2 / attention / LatentMoE language model with MTP.

    Weights are uninitialised: build on the meta device, apply a precision recipe, shard, then `initialize` or load.

    Args:
        config: the configuration.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.mtp = MTPBlock(config) if config.num_nextn_predict_layers else None
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.observer: Observer | None = None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where the configuration says so.

        `to_empty` gives every module a tensor of its own: call this after it.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        mtp_depths: int = 0,
        boundaries: Tensor | None = None,
        cache: Cache | None = None,
        counts: list[int] | None = None,
        hold: bool = False,
    ) -> Output:
        """Run the network.

        Args:
            tokens: int64 [B, T].
            document_ids: int32 [B, T], see `PackedBatch`; None: each row is one document.
            mtp_depths: number M of MTP depths to compute.
            boundaries: int32 [n + 1], see `PackedBatch`; None: worked out from `document_ids`.
            cache: what the rows hold so far, see `new_cache`: the tokens go on from there; no documents, MTP depths,
                `Routing` or gradients then.
            counts: [B] tokens of each row that are real (padding is on the right), with a cache; None: all.
            hold: leave the cache as it is until `Cache.advance` says how many tokens it takes over.

        Returns:
            `Output`; the head is applied by the loss or by `logits`.

        Raises:
            UserError: if MTP depths are asked of a network without an MTP block.
        """
        if cache is not None:
            return self._continue(tokens, cache, counts, hold)
        documents = None if document_ids is None else DocumentLayout(document_ids, boundaries)
        x = self.backbone.embeddings(tokens)
        routings: list[Routing] = []
        for layer in self.backbone.layers:
            x, routing = layer(x, documents)
            if self.observer is not None:
                self.observer(layer, x, routing)
            if routing is not None:
                routings.append(routing)
        hidden = self.backbone.norm_f(x)
        mtp_hidden, mtp_routings = self._run_mtp(hidden, tokens, documents, mtp_depths)
        return Output(hidden, mtp_hidden, routings + mtp_routings)

    def draft(
        self,
        tokens: Tensor,
        hidden: Tensor,
        cache: Cache,
        counts: list[int] | None = None,
        hold: bool = False,
        whole: bool = True,
    ) -> Tensor:
        """Apply the MTP block once, going on from what `cache` holds.

        Args:
            tokens: int64 [B, T], the token one ahead of each position.
            hidden: [B, T, D], normalised hidden states of the network, or of this method for the position before.
            cache: see `new_cache`.
            counts: as in `forward`.
            hold: as in `forward`.
            whole: see `MTPBlock`; False for a prompt, where only the cache is wanted: half the work.

        Returns:
            [B, T, D], normalised; `logits` of it predict the token two ahead of each position.
        """
        assert self.mtp is not None, "the network has an MTP block"
        cache.begin(tokens.shape[1], counts, hold)
        drafted, _ = self.mtp(self.backbone.embeddings(tokens), hidden, None, cache, whole)
        cache.end()
        return drafted

    def new_cache(
        self,
        rows: int,
        capacity: int,
        state_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        mtp: bool = False,
    ) -> Cache:
        """Return an empty cache for B rows of at most `capacity` tokens; see `Cache`. With `mtp`, of the MTP block."""
        block = self.mtp if mtp else self.backbone
        assert block is not None, "the network has an MTP block"
        return Cache(
            self.config,
            [(layer.letter, layer.state_dtype) for layer in cast(list[Layer], block.layers)],
            rows=rows,
            capacity=capacity,
            state_dtype=state_dtype,
            device=self.backbone.embeddings.weight.device,
            generator=generator,
        )

    def logits(self, hidden: Tensor, vocabulary: int | None = None) -> Tensor:
        """Map hidden states [..., D] to fp32 logits [..., V], or to those of the `vocabulary` lowest ids."""
        return self.lm_head(hidden, vocabulary=vocabulary)

    def split_for_logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Cut [N, D], or anything of N positions, into pieces whose logits fit into memory and cache."""
        return hidden.split(max(LOGITS_AT_ONCE[hidden.device.type] // self.config.vocab_size, 1))

    def routers(self) -> list[Router]:
        """Return the routers in layer order, the MTP block's last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def observe(self, observer: Observer | None) -> None:
        """Show each layer's result to `observer` from now on, the MTP block's at every depth; None: to nobody.

        No forward hooks: on a compiled layer they run inside the compiled code, where later changes go unnoticed.
        """
        self.observer = observer
        if self.mtp is not None:
            self.mtp.observer = observer

    def sharding_units(self) -> list[ShardingUnit]:
        """Return what a strategy should gather together, inner before outer, the network itself last.

        The matrix products of a layer form one unit per format, gathered in that format's dtype, the routed experts
        others; what is left of the layer (norms, router, `A_log D dt_bias`, convolution, products in fp32) forms an
        fp32 unit.
        """
        blocks = [*self.backbone.layers] + ([self.mtp] if self.mtp is not None else [])
        units = []
        for block in blocks:
            units += [*_format_units(block), ShardingUnit([block], torch.float32)]
        embeddings, head = self.backbone.embeddings, self.lm_head
        if self.config.tie_word_embeddings:
            units.append(ShardingUnit([embeddings, head], torch.float32))
        else:
            units += [ShardingUnit([embeddings], embeddings.compute_dtype), ShardingUnit([head], head.compute_dtype)]
        return [*units, ShardingUnit([self], torch.float32)]

    def checkpoint_activations(self) -> None:
        """Recompute the activations of every layer in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Layer):
                module.checkpointed = True

    def _continue(self, tokens: Tensor, cache: Cache, counts: list[int] | None, hold: bool) -> Output:
        cache.begin(tokens.shape[1], counts, hold)
        x = self.backbone.embeddings(tokens)
        for layer, state in zip(self.backbone.layers, cache.states, strict=True):
            x, _ = layer(x, None, state, True)
        hidden = self.backbone.norm_f(x)
        cache.end()
        return Output(hidden, [], [])

    def _run_mtp(
        self, hidden: Tensor, tokens: Tensor, documents: DocumentLayout | None, depths: int
    ) -> tuple[list[Tensor], list[Routing]]:
        if depths == 0:
            return [], []
        if self.mtp is None:
            raise UserError(
                "model.mtp_depths: the network has no MTP block; set model.backbone.num_nextn_predict_layers to 1"
            )
        states, routings = [], []
        for depth in range(1, depths + 1):
            embedded = self.backbone.embeddings(_ahead(tokens, documents, depth))
            hidden, routing = self.mtp(embedded, hidden, documents)
            states.append(hidden)
            routings.append(routing)
        merged = [
            Routing(
                torch.cat([routing.probabilities for routing in layer]),
                torch.cat([routing.counts for routing in layer]),
            )
            for layer in zip(*routings, strict=True)
        ]
        return states, merged


def _ahead(tokens: Tensor, documents: DocumentLayout | None, depth: int) -> Tensor:
    """Return the token `depth` positions ahead in the same document, id 0 where there is none (no loss falls there)."""
    ahead = F.pad(tokens[:, depth:], (0, min(depth, tokens.shape[1])))
    if documents is None:
        return ahead
    same = F.pad(documents.ids[:, depth:] == documents.ids[:, :-depth], (0, min(depth, tokens.shape[1])))
    return torch.where(same, ahead, 0)


def _format_units(block: nn.Module) -> list[ShardingUnit]:
    routed = {part for module in block.modules() if isinstance(module, Experts) for part in module.children()}
    groups: dict[tuple[torch.dtype, bool], list[nn.Module]] = {}
    for module in block.modules():
        if isinstance(module, FormattedModule) and (module in routed or module.compute_dtype != torch.float32):
            groups.setdefault((module.compute_dtype, module in routed), []).append(module)
    return [
        ShardingUnit(modules, dtype, ("shard", "context")) if experts else ShardingUnit(modules, dtype)
        for (dtype, experts), modules in groups.items()
    ]
