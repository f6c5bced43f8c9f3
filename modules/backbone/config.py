"""The configuration of a backbone: one frozen dataclass, checked when it is made.

Field names follow the Hugging Face `nemotron_h` configuration where it has them, so that a published `config.json`
reads off directly. Dimensions of a mixer that the layer string does not use may stay at their default of 0.
"""

from dataclasses import dataclass

from modules.errors import UserError

MIXERS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "MLP"}
"""Letters of a layer string."""

_NEEDED = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size",),
}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a hybrid Mamba-2 / attention / LatentMoE network with MTP.

    Raises:
        UserError: if a field is out of range or two fields contradict each other; names the key and the mend.
    """

    vocab_size: int
    """Number of rows V of the embedding and of the output head; at least the tokenizer's vocabulary."""
    hidden_size: int
    """Width D of the residual stream."""
    hybrid_override_pattern: str
    """One letter per layer: M Mamba-2, E mixture of experts, * attention, - MLP."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding's weight."""
    layer_norm_epsilon: float = 1e-5
    """Added to the mean square inside every RMSNorm; > 0."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; > 0."""
    rescale_prenorm_residual: bool = True
    """Whether weights that write to the residual stream start smaller by 1/sqrt(number of layers)."""

    num_attention_heads: int = 0
    """Query heads of an attention layer."""
    num_key_value_heads: int = 0
    """Key and value heads; divides num_attention_heads (grouped-query attention)."""
    head_dim: int = 0
    """Channels of an attention head."""

    intermediate_size: int = 0
    """Hidden width of a dense MLP layer."""

    mamba_num_heads: int = 0
    """Heads H of a Mamba-2 mixer; its inner width is mamba_num_heads x mamba_head_dim."""
    mamba_head_dim: int = 0
    """Channels P of a Mamba-2 head."""
    ssm_state_size: int = 0
    """State channels N per head channel."""
    n_groups: int = 0
    """Groups G that share B and C and the gated norm; divides mamba_num_heads."""
    conv_kernel: int = 4
    """Taps of the causal convolution; >= 1."""
    use_conv_bias: bool = True
    """Whether the causal convolution has a bias."""
    chunk_size: int = 128
    """Positions per chunk of the SSD scan; changes speed and rounding only (64 is fastest on a CPU)."""
    time_step_min: float = 0.001
    """Smallest initial softplus(dt_bias); > 0."""
    time_step_max: float = 0.1
    """Largest initial softplus(dt_bias)."""
    time_step_floor: float = 1e-4
    """Lower bound put on the initial softplus(dt_bias)."""

    n_routed_experts: int = 0
    """Routed experts E of a mixture layer."""
    num_experts_per_tok: int = 0
    """Experts K that each token is sent to; at most the experts of the selectable groups."""
    moe_intermediate_size: int = 0
    """Hidden width F of a routed expert."""
    moe_latent_size: int | None = None
    """Width L the routed experts work in; null: the full hidden_size (a standard mixture)."""
    moe_shared_expert_intermediate_size: int = 0
    """Hidden width of the expert every token passes; 0: no shared expert."""
    routed_scaling_factor: float = 1.0
    """Factor on the routing weights."""
    n_group: int = 1
    """Groups the experts are split into for group-limited selection; divides n_routed_experts."""
    topk_group: int = 1
    """Groups a token may choose from; at most n_group."""
    norm_topk_prob: bool = True
    """Whether the chosen scores are normalised to sum 1 before the factor."""

    num_nextn_predict_layers: int = 0
    """Physical multi-token-prediction (MTP) blocks: 0, or 1 that is applied at every depth."""
    mtp_hybrid_override_pattern: str = "*E"
    """Layer string of the MTP block."""

    def __post_init__(self) -> None:
        """Check every field against its range and the fields it depends on."""
        for key in ("vocab_size", "hidden_size", "layer_norm_epsilon", "initializer_range"):
            self._check(key, getattr(self, key) > 0, "must be positive")
        depths = "one block shared by all depths; the number of depths is model.mtp_depths"
        self._check("num_nextn_predict_layers", self.num_nextn_predict_layers in (0, 1), f"must be 0 or 1 ({depths})")
        patterns = {"hybrid_override_pattern": self.hybrid_override_pattern}
        if self.num_nextn_predict_layers:
            patterns["mtp_hybrid_override_pattern"] = self.mtp_hybrid_override_pattern
        for key, pattern in patterns.items():
            known = bool(pattern) and set(pattern) <= set(MIXERS)
            self._check(key, known, f"must be one or more of the letters {''.join(MIXERS)}")
        letters = "".join(patterns.values())
        for letter in dict.fromkeys(letters):
            for key in _NEEDED[letter]:
                mend = f"must be positive for the {MIXERS[letter]} layers of the layer string"
                self._check(key, getattr(self, key) > 0, mend)
        if "M" in letters:
            self._check_mamba()
        if "*" in letters:
            groups, heads = self.num_key_value_heads, self.num_attention_heads
            self._check("num_key_value_heads", heads % groups == 0, f"must divide num_attention_heads ({heads})")
        if "E" in letters:
            self._check_moe()

    def _check_mamba(self) -> None:
        heads, most = self.mamba_num_heads, self.time_step_max
        self._check("n_groups", heads % self.n_groups == 0, f"must divide mamba_num_heads ({heads})")
        self._check("conv_kernel", self.conv_kernel >= 1, "must be at least 1")
        self._check("chunk_size", self.chunk_size >= 1, "must be at least 1")
        ordered = 0 < self.time_step_min <= most
        self._check("time_step_min", ordered, f"must be positive and at most time_step_max ({most})")
        self._check("time_step_floor", self.time_step_floor > 0, "must be positive")

    def _check_moe(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        divides = 1 <= groups <= experts and experts % groups == 0
        self._check("n_group", divides, f"must divide n_routed_experts ({experts})")
        self._check("topk_group", 1 <= self.topk_group <= groups, f"must be between 1 and n_group ({groups})")
        selectable = experts // groups * self.topk_group
        self._check(
            "num_experts_per_tok",
            self.num_experts_per_tok <= selectable,
            f"must be at most the {selectable} experts a token may choose from (n_routed_experts, n_group, topk_group)",
        )
        latent, shared = self.moe_latent_size, "moe_shared_expert_intermediate_size"
        self._check(
            "moe_latent_size", latent is None or latent > 0, "must be positive, or null for experts on the full width"
        )
        self._check(shared, getattr(self, shared) >= 0, "must be positive, or 0 for no shared expert")

    def _check(self, key: str, holds: bool, mend: str) -> None:
        if not holds:
            raise UserError(f"model.backbone.{key}: {getattr(self, key)!r} {mend}")

    @property
    def mamba_inner_size(self) -> int:
        """Inner width of a Mamba-2 mixer, H x P."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_size(self) -> int:
        """Channels of the causal convolution, H x P + 2 x G x N."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_size(self) -> int:
        """Width the routed experts read and write: L, or D without a latent."""
        return self.hidden_size if self.moe_latent_size is None else self.moe_latent_size
