"""The cached forward pass of decoding and short prompts in one call of C code (decoding.c), where it applies.

It applies to weights on a CPU that lie in memory as they are multiplied, in any mixture of fp32, bf16 and the formats
of quantised checkpoints, with fp32 SSM states. A quantised layer is a bf16 one whose inputs are rounded on the way in,
and whose results are scaled on the way out, from the same memory as in the portable pass: two bytes a weight. All else
(prompts that are long or of unequal length, GPUs, sharded networks, networks in training, whose weights are rounded in
each pass) takes the portable pass, whose results are the same but for rounding.
Shapes: B rows, T new positions, D hidden.
"""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from modules.backbone.attention import Attention
from modules.backbone.cache import AttentionState, Cache, MambaState
from modules.backbone.config import BackboneConfig
from modules.backbone.dispatch import LocalDispatcher
from modules.backbone.latent_moe import LatentMoE
from modules.backbone.layer import Layer
from modules.backbone.mamba import Mamba2
from modules.backbone.mlp import MLP
from modules.backbone.model import Network
from modules.backbone.mtp import MTPBlock
from modules.ops.native import COMPILE, MOST_ROWS, LinearArguments, Rounding, describe_linear, quantization
from modules.ops.native.library import load_library
from modules.precision.adapter import Adapter
from modules.precision.linear import FormattedModule, GroupedLinear, Linear

SOURCE = Path(__file__).parent / "decoding.c"
_MOST_POSITIONS = 128
"""New positions of a row up to which this pass is used; longer ones are worth the portable scan in chunks."""


Kept = list["ctypes.Array[LinearArguments]"]
"""Descriptions that others point to."""


class LayerArguments(ctypes.Structure):
    """`layer` of decoding.c."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("products", LinearArguments * 6),
        ("tables", ctypes.c_void_p * 6),
        ("sizes", ctypes.c_int64 * 6),
        ("factor", ctypes.c_float),
        ("states", ctypes.c_void_p * 2),
        ("kept", Rounding * 2),
        ("held", ctypes.c_void_p * 2),
    )


class PassArguments(ctypes.Structure):
    """`pass` of decoding.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "rows", "length", "hold")),
        *((name, ctypes.c_int64) for name in ("capacity", "threads", "layers", "bf16")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("starts", "embedding", "final", "enorm", "hnorm")),
        ("join", LinearArguments),
    )


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return (the library or None, "active" or the reason there is none)."""
    library, status = load_library(SOURCE, COMPILE)
    if library is not None and quantization.load()[0] is None:
        return None, quantization.load()[1]
    if library is not None:
        pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        library.superbolt_forward.argtypes = [*[pointer] * 6, whole]
        given = [*[pointer] * 3, whole]
        library.superbolt_draft.argtypes = [*given, pointer, whole, pointer, whole, number, *[pointer] * 4, whole]
        library.superbolt_verify.argtypes = [*given, whole, number, *[pointer] * 6, whole]
        library.superbolt_verify.restype = whole
        library.superbolt_advance.argtypes = [pointer, pointer, pointer]
        library.superbolt_advance.restype = None
    return library, status


class NativeLayers:
    """Layers on a cache, with the embedding before and the norm behind them, described to the C code.

    It runs as long as the weights stay where they are: a network that was moved goes on with the portable pass.

    Args:
        network: the network.
        cache: the cache of these layers.
        layers: the network's layers or those of its MTP block; `NativeLayers.fits` holds for them and what is around.
        around: the norm behind them; of an MTP block also `enorm`, `hnorm` and `eh_proj`.
    """

    def __init__(self, network: Network, cache: Cache, layers: list[Layer], around: list[nn.Module]) -> None:
        self.config, self.cache = network.config, cache
        self.library = cast(ctypes.CDLL, load()[0])
        self.embedding = network.backbone.embeddings
        self.dtype = self.embedding.compute_dtype
        outer = [self.embedding.weight, *(cast(Tensor, module.weight) for module in around)]
        inner = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        parts = [part for one in (*layers, *around) for part in one.modules()]
        products = [part.product for part in parts if isinstance(part, FormattedModule)]
        kept_scales = [_inverse_kv_scales(layer) for layer in layers]
        # Kept as they are now, so that weights that were moved cannot lie where these lay.
        self._tensors = [tensor.detach() for tensor in (*outer, *inner)], products, kept_scales
        self._adapters: Kept = []
        """What `linear.adapter` of decoding.c points to."""
        described = [
            _describe(layer, self.config, self.embedding, scales, self._adapters)
            for layer, scales in zip(layers, kept_scales, strict=True)
        ]
        self.arguments = (LayerArguments * len(layers))(*described)
        self.given = PassArguments(
            hidden=self.config.hidden_size,
            bf16=self.dtype == torch.bfloat16,
            layers=len(layers),
            epsilon=self.config.layer_norm_epsilon,
        )
        for name, weight in zip(("embedding", "final", "enorm", "hnorm"), outer, strict=False):
            setattr(self.given, name, weight.data_ptr())
        if len(around) > 1:
            self.given.join = _describe_product(cast(Linear, around[-1]), self.embedding, self._adapters)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._enough = (0, 0, 0)
        self._held: list[Tensor] = []
        self.starts = (ctypes.c_int64 * 0)()
        """Positions before those of a pass, by row."""

    @classmethod
    def describe(cls, network: Network, cache: Cache, state_dtype: torch.dtype, mtp: bool) -> "NativeLayers | None":
        """Return the network's layers or those of its MTP block; None: the C code is not for them."""
        block = network.mtp if mtp else network.backbone
        assert block is not None, "the network has an MTP block"
        layers = [cast(Layer, layer) for layer in block.layers]
        around: list[nn.Module] = [network.backbone.norm_f]
        if isinstance(block, MTPBlock):
            around = [layers[-1].get_submodule("final_layernorm")]
            around += [layers[0].get_submodule(name) for name in ("enorm", "hnorm", "eh_proj")]
        if not cls.fits([*layers, network.backbone.embeddings, *around], state_dtype):
            return None
        return cls(network, cache, layers, around)

    @staticmethod
    def fits(modules: Iterable[nn.Module], state_dtype: torch.dtype) -> bool:
        """Return whether the C code can run these modules: layers, embedding, norms, join."""
        parts = [part for module in modules for part in module.modules()]
        formatted = [part for part in parts if isinstance(part, FormattedModule)]
        return (
            state_dtype == torch.float32
            and all(part.product.operands is not None for part in formatted)
            and all(part.weight.dtype == part.compute_dtype for part in formatted)
            and all(
                part.adapter.A.dtype == part.adapter.B.dtype == part.compute_dtype
                for part in parts
                if isinstance(part, Linear | GroupedLinear) and part.adapter is not None
            )
            and all(
                type(parameter) is nn.Parameter
                and parameter.device.type == "cpu"
                and parameter.is_contiguous()
                and (parameter.dtype == torch.float32 or isinstance(part, FormattedModule | Adapter))
                for part in parts
                for parameter in part.parameters(recurse=False)
            )
            and all(type(part.dispatcher) is LocalDispatcher for part in parts if isinstance(part, LatentMoE))
            and load()[0] is not None
        )

    def takes(self, rows: int, length: int) -> bool:
        """Return whether a pass of B rows and T new positions is one for this code."""
        return (
            length <= _MOST_POSITIONS
            and rows * length <= MOST_ROWS
            and not torch.is_grad_enabled()
            and self.embedding.weight.data_ptr() == self.given.embedding
        )

    def run(self, tokens: Tensor, hidden: Tensor | None, hold: bool, whole: bool) -> Tensor:
        """Run embedding, layers and norm.

        Args:
            tokens: int64 [B, T].
            hidden: [B, T, D] of the positions, for an MTP block.
            hold: leave the cache as it is until `advance` says how many tokens it takes over.
            whole: see `MTPBlock`.

        Returns:
            [B, T, D] in the dtype of the residual stream.
        """
        tokens = tokens.contiguous()
        rows, length = tokens.shape
        assert rows == len(self.cache.lengths), f"{rows} rows of tokens in a cache of {len(self.cache.lengths)}"
        self.cache.begin(length, None, hold)
        self.prepare(length, hold)
        if not whole:
            self.given.layers = max(n for n, state in enumerate([True, *self.cache.states]) if state)
        memory = self.scratch(rows, length)
        out = torch.empty(rows, length, self.config.hidden_size, dtype=self.dtype)
        if hidden is not None:
            assert hidden.dtype == self.dtype, f"hidden states in {hidden.dtype}, layers in {self.dtype}"
            hidden = hidden.contiguous()
        failed = self.library.superbolt_forward(
            ctypes.byref(self.given),
            self.arguments,
            tokens.data_ptr(),
            None if hidden is None else hidden.data_ptr(),
            out.data_ptr(),
            memory.data_ptr(),
            len(memory),
        )
        assert not failed, "the C code has enough memory"
        self.cache.end()
        return out

    def prepare(self, length: int, hold: bool) -> None:
        """Describe a pass of T positions that may be held to the C code."""
        rows, given = len(self.cache.lengths), self.given
        self.starts = (ctypes.c_int64 * rows)(*self.cache.lengths)
        given.rows, given.length, given.hold, given.capacity = rows, length, hold, self.cache.capacity
        given.layers = len(self.arguments)
        given.threads, given.starts = torch.get_num_threads(), ctypes.addressof(self.starts)
        self._held = []
        config = self.config
        for described, state in zip(self.arguments, self.cache.states, strict=True):
            if isinstance(state, AttentionState):
                described.states[0], described.states[1] = state.keys.data_ptr(), state.values.data_ptr()
            elif isinstance(state, MambaState):
                state.window = state.window.contiguous()
                described.states[0], described.states[1] = state.window.data_ptr(), state.ssm.data_ptr()
                if hold:
                    kept = config.mamba_inner_size + config.n_groups * config.ssm_state_size + config.mamba_num_heads
                    for place, size in enumerate((config.mamba_conv_size, kept)):
                        self._held.append(torch.empty(rows, length, size))
                        described.held[place] = self._held[-1].data_ptr()

    def advance(self, counts: list[int]) -> None:
        """Take over the first `counts` [B] of the positions that the pass before held."""
        self.cache.count_held(counts)
        self.library.superbolt_advance(
            ctypes.byref(self.given), self.arguments, (ctypes.c_int64 * len(counts))(*counts)
        )
        self._held = []

    def scratch(self, rows: int, length: int) -> Tensor:
        """Return memory that is enough for any layer: what decoding.c takes, added up, each block rounded up."""
        if (rows, length, self.cache.capacity) == self._enough:
            return self._memory
        config, count = self.config, rows * length
        inner, channels = config.mamba_inner_size, config.mamba_conv_size
        mamba = count * (2 * inner + channels + config.mamba_num_heads)
        mamba += (2 * config.conv_kernel + 1) * channels + config.mamba_num_heads + inner * config.ssm_state_size
        attention = 2 * count * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        attention += 4 * rows * config.num_key_value_heads * self.cache.capacity
        mixture = count * (2 * config.n_routed_experts + 3 * config.expert_size + config.moe_intermediate_size)
        mixture += 2 * config.n_routed_experts + count * (
            config.hidden_size + config.moe_shared_expert_intermediate_size
        )
        join = 3 * count * config.hidden_size
        most = 3 * count * config.hidden_size + max(mamba, attention, mixture, join, count * config.intermediate_size)
        size = 4 * (most + 16 * 32)
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._enough = rows, length, self.cache.capacity
        return self._memory


def _inverse_kv_scales(layer: Layer) -> list[Tensor]:
    """Return S, fp32 [1], of keys and of values that are kept in FP8; nothing of others."""
    scales = layer.mixer.kv_scales if isinstance(layer.mixer, Attention) else None
    return [torch.tensor([1 / scale]) for scale in scales or ()]


def _describe_product(module: Linear | GroupedLinear, source: FormattedModule, adapters: Kept) -> LinearArguments:
    """Return a module as the C code knows it, with the results of `source` as its inputs; `adapters` keeps its own."""
    assert module.product.operands is not None
    described = describe_linear(module.weight, module.product.operands, source.compute_dtype)
    if module.adapter is not None:
        down = describe_linear(module.adapter.A, source=source.compute_dtype)
        adapters.append((LinearArguments * 2)(down, describe_linear(module.adapter.B)))
        described.adapter, described.scale = ctypes.addressof(adapters[-1]), module.adapter.scale
    return described


def _describe(
    layer: Layer,
    config: BackboneConfig,
    stream: FormattedModule,
    kept_scales: list[Tensor],
    adapters: Kept,
) -> LayerArguments:
    """Return a layer as the C code knows it; the order of products, tables and sizes is the one in decoding.c."""
    mixer = layer.mixer
    products: list[tuple[Linear | GroupedLinear | None, FormattedModule]] = []  # with the module its inputs come from
    tables: list[Tensor | None] = []
    sizes: list[int] = []
    if isinstance(mixer, Mamba2):
        products = [(mixer.in_proj, stream), (mixer.out_proj, mixer.in_proj)]
        tables = [mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.D, mixer.dt_bias, mixer.norm.weight]
        sizes = [config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size]
        sizes.append(config.conv_kernel)
    elif isinstance(mixer, Attention):
        products = [(module, stream) for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        products.append((mixer.o_proj, mixer.k_proj))
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.head_dim]
    elif isinstance(mixer, MLP):
        products = [(mixer.up_proj, stream), (mixer.down_proj, mixer.up_proj)]
    else:
        shared, experts = mixer.shared_experts, mixer.experts
        products = [(mixer.fc1_latent_proj, stream), (mixer.fc2_latent_proj, experts.down_proj)]
        products += (
            [(None, stream)] * 2 if shared is None else [(shared.up_proj, stream), (shared.down_proj, shared.up_proj)]
        )
        products += [(experts.up_proj, mixer.fc1_latent_proj or stream), (experts.down_proj, experts.up_proj)]
        tables = [mixer.gate.weight, mixer.gate.e_score_correction_bias]
        sizes = [config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group]
        sizes.append(config.norm_topk_prob)
    arguments = LayerArguments(
        kind=ord(layer.letter), norm=layer.norm.weight.data_ptr(), factor=config.routed_scaling_factor
    )
    for place, (module, source) in enumerate(products):
        if module is not None:
            arguments.products[place] = _describe_product(module, source, adapters)
    for place, scale in enumerate(kept_scales):
        arguments.kept[place] = Rounding.to("fp8", scale)
    for place, table in enumerate(tables):
        arguments.tables[place] = None if table is None else table.data_ptr()
    for place, size in enumerate(sizes):
        arguments.sizes[place] = size
    return arguments
