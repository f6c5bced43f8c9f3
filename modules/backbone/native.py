"""The cached forward pass of a few positions in one call of C code (`modules/ops/native`), where it applies.

It applies to plain weights on a CPU, all in one format, with fp32 SSM states. Everything else (prompts, GPUs, sharded
networks, mixed formats) takes the portable pass, whose results are the same but for rounding.
Shapes: B rows, T new positions, D hidden.
"""

import ctypes
from collections.abc import Iterable

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
from modules.ops import native
from modules.precision.linear import FormattedModule

_MOST_POSITIONS = 16
"""New positions of a row up to which this pass is used; longer ones are worth the portable scan in chunks."""


class NativeLayers:
    """Layers and the norm behind them, described to the C code. It is valid as long as the weights stay where they are.

    Args:
        config: the backbone's configuration.
        layers: the layers; `NativeLayers.fits` holds.
        final: weight [D] of the norm behind them.
    """

    def __init__(self, config: BackboneConfig, layers: list[Layer], final: Tensor) -> None:
        self.config = config
        self.final = final
        self.dtype = _dtype_of(layers)
        self.arguments = (native.LayerArguments * len(layers))(*[_describe(layer, config) for layer in layers])
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._held: list[Tensor] = []

    @staticmethod
    def fits(layers: Iterable[nn.Module], state_dtype: torch.dtype) -> bool:
        """Return whether the C code can run these layers."""
        modules = [module for layer in layers for module in layer.modules()]
        formatted = [module for module in modules if isinstance(module, FormattedModule)]
        return (
            state_dtype == torch.float32
            and len({module.format for module in formatted}) == 1
            and all(module.weight.dtype == module.compute_dtype for module in formatted)
            and all(
                type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
                for module in modules
                for parameter in module.parameters(recurse=False)
            )
            and all(type(module.dispatcher) is LocalDispatcher for module in modules if isinstance(module, LatentMoE))
            and native.load()[0] is not None
        )

    def takes(self, rows: int, length: int) -> bool:
        """Return whether a pass of B rows and T new positions is one for this code."""
        return length <= _MOST_POSITIONS and rows * length <= native.MOST_ROWS and not torch.is_grad_enabled()

    def run(self, x: Tensor, cache: Cache) -> Tensor:
        """Run the layers and the norm behind them.

        Args:
            x: [B, T, D], the residual stream.
            cache: its pass has begun.

        Returns:
            [B, T, D] in the dtype of `x`.
        """
        library, _ = native.load()
        assert library is not None
        out = x.float() if x.dtype != torch.float32 else x.clone()
        rows, length, _ = x.shape
        starts = (ctypes.c_int64 * rows)(*cache.lengths)
        given = self._pass(rows, length, cache.step.hold, cache.capacity, starts)
        self._point_to_states(cache, rows, length)
        memory = self._scratch(rows, length, cache.capacity)
        failed = library.superbolt_layers(
            ctypes.byref(given), self.arguments, self.final.data_ptr(), out.data_ptr(), memory.data_ptr(), len(memory)
        )
        assert not failed, "the C code has enough memory"
        return out.to(x.dtype)

    def join(self, embedded: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, weight: Tensor) -> Tensor:
        """Return what the MTP block starts from, [B, T, D]: the product of both normalised inputs with `eh_proj`."""
        library, _ = native.load()
        assert library is not None
        rows, length, _ = embedded.shape
        out = torch.empty(embedded.shape)
        first, second = embedded.float().contiguous(), hidden.float().contiguous()
        memory = self._scratch(rows, length, 0)
        failed = library.superbolt_join(
            ctypes.byref(self._pass(rows, length, False, 0, None)),
            first.data_ptr(),
            second.data_ptr(),
            enorm.data_ptr(),
            hnorm.data_ptr(),
            ctypes.byref(_linear(weight)),
            out.data_ptr(),
            memory.data_ptr(),
            len(memory),
        )
        assert not failed, "the C code has enough memory"
        return out.to(embedded.dtype)

    def advance(self, counts: list[int], length: int) -> None:
        """Take over the first `counts` [B] of the T positions that the pass before held."""
        library, _ = native.load()
        assert library is not None
        given = self._pass(len(counts), length, True, 0, None)
        library.superbolt_advance(ctypes.byref(given), self.arguments, (ctypes.c_int64 * len(counts))(*counts))
        self._held = []

    def _pass(
        self, rows: int, length: int, hold: bool, capacity: int, starts: ctypes.Array | None
    ) -> native.PassArguments:
        return native.PassArguments(
            hidden=self.config.hidden_size,
            rows=rows,
            length=length,
            bf16=self.dtype == torch.bfloat16,
            hold=hold,
            capacity=capacity,
            threads=torch.get_num_threads(),
            layers=len(self.arguments),
            epsilon=self.config.layer_norm_epsilon,
            starts=None if starts is None else ctypes.addressof(starts),
        )

    def _point_to_states(self, cache: Cache, rows: int, length: int) -> None:
        self._held = []
        config = self.config
        kept = config.mamba_inner_size + config.n_groups * config.ssm_state_size + config.mamba_num_heads
        for described, state in zip(self.arguments, cache.states, strict=True):
            if isinstance(state, AttentionState):
                described.states[:] = state.keys.data_ptr(), state.values.data_ptr()
            elif isinstance(state, MambaState):
                state.window = state.window.contiguous()
                described.states[:] = state.window.data_ptr(), state.ssm.data_ptr()
                if cache.step.hold:
                    held = [torch.empty(rows, length, size) for size in (config.mamba_conv_size, kept)]
                    described.held[:] = held[0].data_ptr(), held[1].data_ptr()
                    self._held += held

    def _scratch(self, rows: int, length: int, capacity: int) -> Tensor:
        """Return memory that is enough for any layer: what decoding.c takes, added up, each block rounded up."""
        config, count = self.config, rows * length
        inner, channels = config.mamba_inner_size, config.mamba_conv_size
        mamba = count * (2 * inner + channels + config.mamba_num_heads)
        mamba += (2 * config.conv_kernel + 1) * channels + config.mamba_num_heads + inner * config.ssm_state_size
        attention = 2 * count * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        attention += 4 * rows * config.num_key_value_heads * capacity
        mixture = count * (2 * config.n_routed_experts + 3 * config.expert_size + config.moe_intermediate_size)
        mixture += 2 * config.n_routed_experts + count * (
            config.hidden_size + config.moe_shared_expert_intermediate_size
        )
        most = 2 * count * config.hidden_size + max(mamba, attention, mixture, count * config.intermediate_size)
        size = 4 * (most + 16 * 32)
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory


def _dtype_of(layers: Iterable[nn.Module]) -> torch.dtype:
    modules = (module for layer in layers for module in layer.modules())
    return next(module.compute_dtype for module in modules if isinstance(module, FormattedModule))


def _linear(weight: Tensor) -> native.LinearArguments:
    return native.LinearArguments(weight.data_ptr(), *weight.shape[-2:])


def _describe(layer: Layer, config: BackboneConfig) -> native.LayerArguments:
    """Return a layer as the C code knows it; the order of products, tables and sizes is the one in decoding.c."""
    mixer = layer.mixer
    products: list[Tensor | None] = []
    tables: list[Tensor | None] = []
    sizes: list[int] = []
    if isinstance(mixer, Mamba2):
        products = [mixer.in_proj.weight, mixer.out_proj.weight]
        tables = [mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.D, mixer.dt_bias, mixer.norm.weight]
        sizes = [config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size]
        sizes.append(config.conv_kernel)
    elif isinstance(mixer, Attention):
        products = [module.weight for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)]
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.head_dim]
    elif isinstance(mixer, MLP):
        products = [mixer.up_proj.weight, mixer.down_proj.weight]
    else:
        shared = mixer.shared_experts
        optional = [mixer.fc1_latent_proj, mixer.fc2_latent_proj]
        optional += [None, None] if shared is None else [shared.up_proj, shared.down_proj]
        products = [None if module is None else module.weight for module in optional]
        products += [mixer.experts.up_proj.weight, mixer.experts.down_proj.weight]
        tables = [mixer.gate.weight, mixer.gate.e_score_correction_bias]
        sizes = [config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group]
        sizes.append(config.norm_topk_prob)
    arguments = native.LayerArguments(
        kind=ord(layer.letter), norm=layer.norm.weight.data_ptr(), factor=config.routed_scaling_factor
    )
    for place, weight in enumerate(products):
        if weight is not None:
            arguments.products[place] = _linear(weight)
    for place, table in enumerate(tables):
        arguments.tables[place] = None if table is None else table.data_ptr()
    for place, size in enumerate(sizes):
        arguments.sizes[place] = size
    return arguments
