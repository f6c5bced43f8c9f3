"""What the LightningModules of all stages share: building, sharding, optimising, skipping bad steps, logging.

A stage says how one micro-batch's loss is computed (`micro_batch_loss`); everything that must not differ between stages
lives here. A step is an optimiser step: one accumulation window on every rank.
Shapes: M MTP depths, E experts.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.backbone.router import Routing
from modules.batch import PackedBatch, TrainingData
from modules.checkpoints.start import start_from
from modules.errors import UserError
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.optim.schedule import ScheduleConfig
from modules.optim.spikes import SpikeGuardConfig, StepGuard
from modules.precision.recipe import Assignment, FormatSchedule, PrecisionConfig, assign_formats


class MicroBatchLoss(NamedTuple):
    """What a stage returns for one micro-batch."""

    loss: Tensor
    """fp32 scalar, differentiable; the losses of all micro-batches and ranks of a step add up to the step's loss."""
    metrics: Mapping[str, Tensor]
    """Detached scalars by name; summed over the micro-batches and ranks of a step, then logged."""
    router: list[Routing]
    """One `Routing` per router."""


class TrainingDivergedError(UserError):
    """Too many steps in a row were skipped: not finite, or spikes."""


class StageModule(LightningModule):
    """Base of all stages.

    Args:
        backbone: shape of the network (a mapping, or the path of a file in configs/model).
        precision: number format of each matrix product.
        optimizer: settings of AdamW.
        schedule: learning rate over tokens.
        seed: seed of the initial weights.
        init_from: a MODEL whose weights the run starts from (a folder that fit wrote, or a Hugging Face one); null:
            random weights. A run that goes on has its own checkpoint: the program sets this to None then.
        activation_checkpointing: recompute the layers' activations in the backward pass; saves memory, costs a forward.
        compile_layers: compile each layer but the mixtures with torch.compile (CUDA only; elsewhere it is an error).
        expert_bias_rate: change of each router bias per step, towards even load (Nemotron 3 Super: 1e-3).
        max_skipped_steps: stop after this many skipped steps in a row: not finite, or spikes.
        spike_guard: skip steps whose loss or gradient norm is a spike; null: only those that are not finite.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        seed: int = 0,
        init_from: Path | None = None,
        activation_checkpointing: bool = False,
        compile_layers: bool = False,
        expert_bias_rate: float = 1e-3,
        max_skipped_steps: int = 10,
        spike_guard: SpikeGuardConfig | None = None,
    ) -> None:
        super().__init__()
        self.backbone_config, self.precision = backbone, precision
        self.optimizer_config, self.schedule = optimizer, schedule
        self.seed, self.init_from = seed, init_from
        self.initial_weights: list[str] = []
        """Where the weights come from, in lines for the user; empty for random ones and for a run that goes on."""
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile_layers
        self.expert_bias_rate, self.max_skipped_steps = expert_bias_rate, max_skipped_steps
        if max_skipped_steps < 1:
            raise UserError(f"model.max_skipped_steps: {max_skipped_steps} must be at least 1")
        self.network: Network | None = None
        self.precision_table: list[Assignment] = []
        self.metrics: dict[str, Tensor] = {}
        """Values of the last finished step by TensorBoard name; read by callbacks, written at the logging interval."""
        self.skipped_steps: Tensor
        self.skipped_streak: Tensor
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_streak", torch.zeros((), dtype=torch.int64))
        self.step_guard = StepGuard(spike_guard)
        self.expert_counts: Tensor | None = None
        """int64 [routers, E]: choices of each expert in the last step, over all ranks; None without routers."""
        self._sums: dict[str, Tensor] = {}
        self._expert_counts: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ for the stages

    @abstractmethod
    def micro_batch_loss(self, batch: PackedBatch) -> MicroBatchLoss:
        """Compute the loss of one micro-batch."""

    @property
    def data(self) -> TrainingData:
        """The datamodule, by the protocol both sides know."""
        return cast(TrainingData, self.trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def built_network(self) -> Network:
        """The network, once `configure_model` has built it."""
        assert self.network is not None, "configure_model has not run"
        return self.network

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor` summed over all ranks."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    # ------------------------------------------------------------------------------------------------------ building

    def build_network(self, device_type: str = "cpu") -> Network:
        """Return a new network on the meta device with the precision recipe applied (see `precision_table`).

        Args:
            device_type: where it will compute, cpu or cuda.

        Raises:
            UserError: if the recipe does not fit the network or the device.
        """
        with torch.device("meta"):
            network = Network(self.backbone_config)
        self.precision_table = assign_formats(self.precision, network, device_type)
        if self.activation_checkpointing:
            network.checkpoint_activations()
        return network

    def configure_model(self) -> None:
        """Build, shard, materialise and initialise (or load) the network; does nothing the second time.

        Raises:
            UserError: if the recipe does not fit the network, an option the device, or init_from the backbone.
        """
        if self.network is not None:
            return
        strategy = self.trainer.strategy
        if self.data.vocab_size > self.backbone_config.vocab_size:
            raise UserError(
                f"model.backbone.vocab_size: {self.backbone_config.vocab_size} is less than the tokenizer's "
                f"{self.data.vocab_size}; raise it to at least that"
            )
        network = self.build_network(strategy.root_device.type)
        if self.compile_layers:
            if strategy.root_device.type != "cuda":
                raise UserError("model.compile_layers: only worth its start-up time on CUDA; set it to false")
            for layer in network.modules():
                # A compiled mixture with FSDP2's hooks inside computes garbage for its shapes (fp32, torch 2.13).
                if isinstance(layer, Layer) and layer.letter != "E":
                    layer.compile()
        strategy.shard(network)  # pyright: ignore[reportAttributeAccessIssue]
        network.to_empty(device=strategy.root_device)
        network.tie_weights()
        if self.init_from is None:
            initialize(network, self.seed)
        else:
            tokenizer = getattr(self.data, "tokenizer_folder", None)
            self.initial_weights = start_from(network, self.init_from, tokenizer)
        self.network = network

    def configure_optimizers(self) -> Optimizer:
        """Return the one optimiser."""
        groups = parameter_groups(self.built_network, self.optimizer_config.weight_decay)
        return AdamW(groups, self.optimizer_config)

    def on_fit_start(self) -> None:
        """Check that the schedule fits the run."""
        self.schedule.check_length(self.data.total_tokens)

    # ------------------------------------------------------------------------------------------------------ one step

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Set the formats of this step, and the random numbers of this micro-batch."""
        self._switch_formats(self.trainer.global_step)
        self._formats.reseed(torch.initial_seed(), self.global_rank, batch_idx)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, times the window's length to undo Lightning's division by it."""
        result = self.micro_batch_loss(batch)
        for name, value in {"training/loss": result.loss.detach(), **result.metrics}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if result.router:
            counts = torch.stack([routing.counts.sum(0) for routing in result.router])
            self._expert_counts = counts if self._expert_counts is None else self._expert_counts + counts
        return result.loss * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the learning rate of this step."""
        tokens = self.data.tokens_at(self.trainer.global_step + 1)
        factor = self.schedule.factor(tokens, self.data.total_tokens)
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_config.learning_rate * factor

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (the optimiser's own setting), and mark a step that is to be skipped."""
        norm = clip_gradients(self.built_network.parameters(), self.optimizer_config.gradient_clip_norm)
        sums = dict(zip(self._sums, self.all_reduce(torch.stack([*self._sums.values()])), strict=True))
        skip = self.step_guard.judge(sums["training/loss"], norm)
        cast(AdamW, optimizer).found_inf = skip.float()
        self.skipped_steps += skip
        self.skipped_streak.copy_(torch.where(skip, self.skipped_streak + 1, 0))
        self.metrics = {
            **sums,
            "training/gradient_norm": norm,
            "training/learning_rate": torch.tensor(optimizer.param_groups[0]["lr"]),
            "training/skipped_steps": self.skipped_steps.clone(),
            **self.step_guard.metrics(self.skipped_steps),
        }
        self._sums = {}
        self._update_expert_bias(skip)

    def on_train_batch_end(self, outputs: object, batch: PackedBatch, batch_idx: int) -> None:
        """Log the finished step and stop a run that only skips.

        Raises:
            TrainingDivergedError: after `max_skipped_steps` bad steps in a row (looked at on the logging interval).
        """
        step = self.trainer.global_step
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches or step % self._log_interval:
            return
        self.write_metrics(self.metrics)
        streak = int(self.skipped_streak)
        if streak >= self.max_skipped_steps:
            raise TrainingDivergedError(self.step_guard.streak_message(step, streak, self.max_skipped_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the guard, which may differ between runs of one architecture."""
        checkpoint["step_guard"] = self.step_guard.saved_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it (a checkpoint from before there was one starts with an empty window), and the formats."""
        if "step_guard" in checkpoint:
            self.step_guard.restore(checkpoint["step_guard"])
        if self.network is not None:
            self._switch_formats(checkpoint["global_step"])

    def write_metrics(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Write scalars to the logger at the number of finished steps (Lightning's own step lags by one)."""
        if self.trainer.logger is not None:
            values = torch.stack(
                [torch.as_tensor(value).float().to(self.device) for value in metrics.values()]
            ).tolist()
            self.trainer.logger.log_metrics(dict(zip(metrics, values, strict=True)), self.trainer.global_step)

    @cached_property
    def _formats(self) -> FormatSchedule:
        return FormatSchedule(self.precision, self.built_network)

    def _switch_formats(self, step: int) -> None:
        """Set the formats that hold after a number of finished steps, and say what changes."""
        for line in self._formats.switch(self.data.tokens_at(step)):
            rank_zero_info(line)

    @property
    def _log_interval(self) -> int:
        return self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]

    def _update_expert_bias(self, skip: Tensor) -> None:
        """Move each router's bias by the rate towards even load (arXiv 2408.15664), unless the step is skipped."""
        if self._expert_counts is None:
            return
        self.expert_counts = self.all_reduce(self._expert_counts)
        self._expert_counts = None
        counts = self.expert_counts.float()
        change = self.expert_bias_rate * torch.sign(counts.mean(1, keepdim=True) - counts)
        change = torch.where(skip, 0.0, change)
        for router, delta in zip(self.built_network.routers(), change, strict=True):
            router.e_score_correction_bias += delta
