"""What the network remembers of each row between forward passes: keys and values, convolution windows, SSM states.

A pass may take its tokens over at once, or hold them (`hold`), so that `Cache.advance` can take over the first few of
each row and forget the rest: rejected drafts. Keys and values of forgotten tokens stay where they are, behind the
row's length, until others replace them; an SSM state is not advanced before it is known how far.
Rows may differ in length. New tokens [B, T] are padded on the right, `counts` says how many of each row are real; what
padding leaves behind lies beyond a row's length, and dt = 0 keeps it out of the SSM states.
Shapes: B rows, T new positions, S positions so far and new, Q query heads, K key heads, P head dim, H Mamba heads,
N state, C convolution channels, k taps.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.backbone.config import BackboneConfig
from modules.errors import UserError
from modules.ops.attention import cached_attention
from modules.ops.chunked_scan import continued_scan
from modules.ops.recurrence import continued_convolution, read_scan, round_stochastically, step_scan, take_over

STATE_DTYPES = (torch.float32, torch.float16)
"""Dtypes an SSM state can be kept in; computation is fp32."""
_FEW = 32
"""Positions up to which the scan is read at once, not in chunks."""


@dataclass(frozen=True)
class CachePass:
    """One forward pass through a cache: what all its layers share."""

    starts: list[int]
    """Tokens each row has seen before."""
    length: int
    """T, new positions."""
    counts: list[int] | None
    """Valid new tokens of each row; None: all T."""
    hold: bool
    """Whether the states wait for `Cache.advance`."""
    device: torch.device
    """Where the cache lies."""

    @functools.cached_property
    def start(self) -> int | None:
        """Tokens that every row with new tokens has seen, and no row more; None if they differ."""
        starts = self.starts if self.counts is None else _where(self.starts, self.counts)
        return starts[0] if len(set(starts)) == 1 and starts[0] == max(self.starts) else None

    @functools.cached_property
    def positions(self) -> Tensor:
        """int64 [B, T]: where the new tokens lie in their rows."""
        offsets = torch.arange(self.length, device=self.device)
        return torch.tensor(self.starts, device=self.device).unsqueeze(1) + offsets

    @functools.cached_property
    def padding(self) -> Tensor | None:
        """Bool [B, T]: which new positions are padding; None if none is."""
        return padding(self.counts, self.length, self.device)


def padding(counts: list[int] | None, length: int, device: torch.device) -> Tensor | None:
    """Return bool [B, T]: the positions from `counts` on; None if there is none."""
    if counts is None or min(counts) == length:
        return None
    return torch.arange(length, device=device) >= torch.tensor(counts, device=device).unsqueeze(1)


class AttentionState:
    """Keys and values of one attention layer.

    Args:
        config: the backbone's configuration.
        rows: B.
        capacity: most positions of a row.
        dtype: dtype of keys and values.
        device: where they lie.
    """

    step: CachePass

    def __init__(
        self, config: BackboneConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = rows, config.num_key_value_heads, capacity, config.head_dim
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add keys and values [B, T, K, P] of the new positions; return the attention [B, T, Q, P] of `query`."""
        step = self.step
        for kept, new in ((self.keys, key), (self.values, value)):
            if step.start is not None:
                kept[:, :, step.start : step.start + step.length] = new.transpose(1, 2)
            else:
                rows = torch.arange(len(new), device=new.device).unsqueeze(1)
                kept[rows, :, step.positions] = new
        end = max(step.starts if step.start is None else [step.start]) + step.length
        starts = step.positions[:, :1] if step.start is None else step.start
        return cached_attention(query, self.keys[:, :, :end], self.values[:, :, :end], starts)

    def advance(self, counts: list[int]) -> None:
        """Take over held positions: keys and values are where they belong already."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows int64 [n]."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def join(self, other: "AttentionState", capacity: int) -> None:
        """Take another state's rows behind one's own; all have room for `capacity` positions then."""

        def joined(*kept: Tensor) -> Tensor:
            return torch.cat([F.pad(one, (0, 0, 0, capacity - one.shape[2])) for one in kept])

        self.keys, self.values = joined(self.keys, other.keys), joined(self.values, other.values)

    def size(self) -> int:
        """Return the bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class MambaState:
    """Convolution window and SSM state of one Mamba-2 layer.

    Args:
        config: the backbone's configuration.
        rows: B.
        dtype: dtype of the window.
        state_dtype: dtype the SSM state is kept in, one of `STATE_DTYPES`.
        device: where they lie.
        generator: of that device, for stochastic rounding; None: the global one.
    """

    step: CachePass

    def __init__(
        self,
        config: BackboneConfig,
        rows: int,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> None:
        self.window = torch.zeros(rows, config.conv_kernel - 1, config.mamba_conv_size, dtype=dtype, device=device)
        shape = rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        self.ssm = torch.zeros(shape, dtype=state_dtype, device=device)
        self.generator = generator
        self._held_window: Tensor | None = None
        self._held_scan: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def convolve(self, mixed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution [B, T, C] of the new positions `mixed` [B, T, C], see `continued_convolution`."""
        window = torch.cat([self.window, mixed], dim=1)
        if self.step.hold:
            self._held_window = window
        else:
            self.window = _last(window, self.step.counts, self.window.shape[1])
        return continued_convolution(window, weight, bias)

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int
    ) -> Tensor:
        """Run the scan over the new positions; the arguments are those of `modules.ops.ssd.ssd`."""
        dt = F.softplus(dt.float() + dt_bias)
        state = self.ssm.float()
        if self.step.hold:
            self._held_scan = x, dt, A, B
            return read_scan(x, dt, A, B, C, D, state)
        if self.step.padding is not None:
            dt = dt.masked_fill(self.step.padding.unsqueeze(-1), 0.0)
        if self.step.length == 1:
            y = step_scan(x, dt, A, B, C, D, state)
        elif self.step.length <= _FEW:
            y = read_scan(x, dt, A, B, C, D, state)
            take_over(x, dt, A, B, state)
        else:
            y, state = continued_scan(x, dt, A, B, C, D, state, chunk_size)
        self._store(state)
        return y

    def advance(self, counts: list[int]) -> None:
        """Take over the first `counts` [B] of the held positions."""
        assert self._held_window is not None
        assert self._held_scan is not None
        x, dt, A, B = self._held_scan
        behind = padding(counts, x.shape[1], x.device)
        state = self.ssm.float()
        take_over(x, dt if behind is None else dt.masked_fill(behind.unsqueeze(-1), 0.0), A, B, state)
        self._store(state)
        self.window = _last(self._held_window, counts, self.window.shape[1])
        self._held_window = self._held_scan = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows int64 [n]."""
        self.window, self.ssm = self.window[rows], self.ssm[rows]

    def join(self, other: "MambaState") -> None:
        """Take another state's rows behind one's own."""
        self.window, self.ssm = torch.cat([self.window, other.window]), torch.cat([self.ssm, other.ssm])

    def size(self) -> int:
        """Return the bytes of window and state."""
        return self.window.nbytes + self.ssm.nbytes

    def _store(self, state: Tensor) -> None:
        if self.ssm.dtype == torch.float32:
            self.ssm = state
        else:
            self.ssm = round_stochastically(state, self.ssm.dtype, self.generator)


LayerState = AttentionState | MambaState
"""What one layer remembers; mixtures and MLPs remember nothing."""


@dataclass(frozen=True)
class Snapshot:
    """A moment of a cache, see `Cache.snapshot`."""

    lengths: list[int]
    """Tokens that each row had seen."""
    mamba: list[tuple[Tensor, Tensor]]
    """(window, SSM state) of each Mamba-2 layer."""


class Cache:
    """The state of B rows in a stack of layers. Use it without gradients.

    Args:
        config: the backbone's configuration.
        layers: (letter, dtype of keys, values and windows) of each layer.
        rows: B.
        capacity: most tokens of a row, held ones included.
        state_dtype: dtype the SSM states are kept in: torch.float32, or torch.float16 with stochastic rounding.
        device: where it lies.
        generator: of that device, for stochastic rounding; None: the global one.

    Raises:
        UserError: if the state dtype is none of `STATE_DTYPES`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        layers: Sequence[tuple[str, torch.dtype]],
        *,
        rows: int,
        capacity: int,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise UserError(f"state_dtype: {state_dtype} must be one of {', '.join(map(str, STATE_DTYPES))}")
        self.capacity = capacity
        self.device = device
        self.lengths = [0] * rows
        """Tokens that each row has seen."""
        self.states: list[LayerState | None] = [
            AttentionState(config, rows, capacity, dtype, device)
            if letter == "*"
            else MambaState(config, rows, dtype, state_dtype, device, generator)
            if letter == "M"
            else None
            for letter, dtype in layers
        ]
        self.step = CachePass([0] * rows, 0, None, False, device)
        """The pass that has begun last."""

    def begin(self, length: int, counts: list[int] | None, hold: bool) -> None:
        """Prepare a forward pass of T = `length` new positions; what a pass before held is forgotten."""
        if counts is not None and min(counts) == length:
            counts = None
        step = CachePass(list(self.lengths), length, counts, hold, self.device)
        end = max(step.starts if step.start is None else [step.start]) + length
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        assert not (hold and counts), "held tokens are counted when they are taken over"
        self.step = step
        for state in self.states:
            if state is not None:
                state.step = step

    def end(self) -> None:
        """Count the tokens of the pass that has begun, unless it held them."""
        if not self.step.hold:
            self._count(self.step.counts or [self.step.length] * len(self.lengths))

    def advance(self, counts: list[int]) -> None:
        """Take over the first `counts` [B] tokens that the pass before held, and forget the rest."""
        self.count_held(counts)
        for state in self.states:
            if state is not None:
                state.advance(counts)

    def count_held(self, counts: list[int]) -> None:
        """Count the first `counts` [B] of the held tokens, whose states others advance."""
        assert self.step.hold
        assert all(0 <= count <= self.step.length for count in counts), (counts, self.step.length)
        self._count(counts)

    def snapshot(self) -> "Snapshot":
        """Return what `restore` needs to come back to here; keys and values are not copied."""
        mamba = [(s.window.clone(), s.ssm.clone()) for s in self.states if isinstance(s, MambaState)]
        return Snapshot(list(self.lengths), mamba)

    def restore(self, snapshot: "Snapshot") -> None:
        """Forget what the rows, still the same ones, have seen since `snapshot`."""
        self.lengths = list(snapshot.lengths)
        self._forget_held()
        mamba = [state for state in self.states if isinstance(state, MambaState)]
        for state, (window, ssm) in zip(mamba, snapshot.mamba, strict=True):
            state.window, state.ssm = window.clone(), ssm.clone()

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named more than once, and none at all."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for state in self.states:
            if state is not None:
                state.select(index)
        self.lengths = [self.lengths[row] for row in rows]
        self._forget_held()

    def join(self, other: "Cache") -> None:
        """Take the rows of another cache of the same layers behind one's own.

        Where there are rows already, the larger capacity becomes that of all.
        """
        self.capacity = max(self.capacity if self.lengths else 0, other.capacity)
        for state, more in zip(self.states, other.states, strict=True):
            if isinstance(state, AttentionState) and isinstance(more, AttentionState):
                state.join(more, self.capacity)
            elif isinstance(state, MambaState) and isinstance(more, MambaState):
                state.join(more)
        self.lengths += other.lengths
        self._forget_held()

    def size(self) -> tuple[int, int]:
        """Return the bytes of (keys and values, convolution windows and SSM states)."""
        sizes = [0, 0]
        for state in self.states:
            if state is not None:
                sizes[isinstance(state, MambaState)] += state.size()
        return sizes[0], sizes[1]

    def _count(self, counts: list[int]) -> None:
        self.lengths = [seen + new for seen, new in zip(self.lengths, counts, strict=True)]

    def _forget_held(self) -> None:
        """Let no `advance` follow: what it would take over is that of other rows or of another moment."""
        self.step = replace(self.step, hold=False)


def _where(values: list[int], counts: list[int]) -> list[int]:
    return [value for value, count in zip(values, counts, strict=True) if count]


def _last(window: Tensor, counts: list[int] | None, size: int) -> Tensor:
    """Return [B, size, C]: the last `size` positions of [B, size + T, C] when only `counts` of the T are real."""
    if counts is None or min(counts) == window.shape[1] - size:
        return window[:, window.shape[1] - size :].clone()  # a view would keep all T positions in memory
    places = torch.tensor(counts, device=window.device).unsqueeze(1) + torch.arange(size, device=window.device)
    return window.gather(1, places.unsqueeze(-1).expand(-1, -1, window.shape[2]))
