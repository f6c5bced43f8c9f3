"""What the LightningModules of all stages share: building, sharding, optimising, skipping bad steps, validation.

A stage says what a window's loss is divided by (`count`) and how one micro-batch's loss is computed
(`micro_batch_loss`); everything that must not differ between stages lives here. Lightning's batch is a `Window`, its
step an optimiser step: `training_step` reads from top to bottom.
Shapes: M MTP depths, E experts, V vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.backbone.config import BackboneConfig
from modules.backbone.initialization import initialize, initialize_adapters
from modules.backbone.layer import Layer
from modules.backbone.model import Network
from modules.backbone.router import Routing
from modules.batch import HeldOutText, PackedBatch, TrainingData, Window, target_positions
from modules.checkpoints import folder
from modules.checkpoints.adapted import BASE, Base, base_of, check_base, fingerprint
from modules.checkpoints.load import hold_quantized, quantized_names
from modules.checkpoints.source import ModelFolder
from modules.checkpoints.start import fill_from, open_fitting, start_from
from modules.checkpoints.training_source import TOKENIZER
from modules.errors import UserError
from modules.metrics import Metrics
from modules.objectives.next_token import next_token_loss, target_weights
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.optim.schedule import ScheduleConfig
from modules.optim.spikes import SpikeGuardConfig, StepGuard
from modules.precision.linear import FormattedModule, Head
from modules.precision.lora import LoRAConfig, attach, freeze_base, reseed
from modules.precision.recipe import Assignment, FormatSchedule, PrecisionConfig, assign_formats


class StageStrategy(Protocol):
    """What a stage asks of `trainer.strategy`, which lays it over devices."""

    root_device: torch.device
    """Where this rank computes."""

    def shard(self, network: nn.Module) -> None:
        """Lay a network over the devices, in place, before weights exist."""

    def sync_gradients(self, network: nn.Module, sync: bool) -> None:
        """Say whether the next backward passes add up gradients over ranks, or leave that to a later one."""

    def lend(self, head: Head) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Gather the head of a network for calls inside another one's; yields a map from hidden states to logits."""
        ...

    def all_reduce(self, tensor: Tensor, op: str = "sum", axes: Sequence[str] = ...) -> Tensor:
        """Return the sum ("sum") or maximum ("max") over the ranks along mesh axes; over all ranks unless given."""
        ...


VALIDATED = ("validation/loss", "validation/bits_per_byte")
"""Metrics of a validation, in the order in which they are told."""
EXACT_MATCH = "validation/exact_match"
"""Share of held-out problems that are answered right, mean over environments; below it, by the names of these."""


class MicroBatchLoss(NamedTuple):
    """What a stage returns for one micro-batch."""

    loss: Tensor
    """fp32 scalar, differentiable; the losses of all micro-batches and ranks of a step add up to the step's loss."""
    metrics: Mapping[str, Tensor]
    """Detached scalars by name; summed over the micro-batches and ranks of a step, then recorded."""
    router: list[Routing]
    token_losses: Tensor | None = None
    """fp32 [B, T], detached: what each position adds to the loss in nats, 0 where it has none; None: not told."""


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
        allow_other_tokenizer: start from init_from although its tokenizer is not that of the data, so that ids mean
            other text to its weights; false: an error.
        activation_checkpointing: recompute the layers' activations in the backward pass; saves memory, costs a forward.
        compile_layers: compile each layer but the mixtures with torch.compile (CUDA only; elsewhere it is an error).
        expert_bias_rate: change of each router bias per step, towards even load (Nemotron 3 Super: 1e-3).
        max_skipped_steps: stop after this many skipped steps in a row: not finite, or spikes.
        spike_guard: skip steps whose loss or gradient norm is a spike; null: only those that are not finite.
        mtp_depths: depths M that the MTP block is trained at; 0: it is not.
        lora: low-rank adapters that train instead of the weights, which are those of init_from and stay as they are, as
            do the router biases; quantised ones stay quantised. Checkpoints hold the adapters alone. null: all trains.

    Raises:
        UserError: if a value is out of range.
    """

    mtp_loss_factor = 0.0
    """Weight of all MTP losses together."""

    def __init__(
        self,
        backbone: BackboneConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        seed: int = 0,
        init_from: Path | None = None,
        allow_other_tokenizer: bool = False,
        activation_checkpointing: bool = False,
        compile_layers: bool = False,
        expert_bias_rate: float = 1e-3,
        max_skipped_steps: int = 10,
        spike_guard: SpikeGuardConfig | None = None,
        mtp_depths: int = 0,
        lora: LoRAConfig | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone_config, self.precision = backbone, precision
        self.optimizer_config, self.schedule = optimizer, schedule
        self.seed, self.init_from, self.allow_other_tokenizer = seed, init_from, allow_other_tokenizer
        self.resume_from: Path | None = None
        """Checkpoint that the program will load, set by it: Lightning tells no module."""
        self.initial_weights: list[str] = []
        """Where the weights come from, in lines for the user; empty for random ones and for a run that goes on."""
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile_layers
        self.expert_bias_rate, self.max_skipped_steps = expert_bias_rate, max_skipped_steps
        if max_skipped_steps < 1:
            raise UserError(f"model.max_skipped_steps: {max_skipped_steps} must be at least 1")
        self.mtp_depths, self.lora = mtp_depths, lora
        self.base: Base | None = None
        """What the adapters belong to, once `configure_model` has opened it; None: all trains."""
        self.network: Network | None = None
        self.precision_table: list[Assignment] = []
        self.metrics = Metrics()
        """What is recorded: by the step here, and by callbacks."""
        self.skipped_steps: Tensor
        self.skipped_streak: Tensor
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_streak", torch.zeros((), dtype=torch.int64))
        self.step_guard = StepGuard(spike_guard)
        self.expert_counts: Tensor | None = None
        """int64 [routers, E]: choices of each expert in the last step, over all ranks; None without routers."""
        self.token_losses: list[Tensor | None] = []
        """`MicroBatchLoss.token_losses` of the last step's micro-batches on this rank."""
        self._validation = torch.empty(0)

    # ------------------------------------------------------------------------------------------------ for the stages

    @abstractmethod
    def count(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Return what the loss of a step is divided by, int64 or floats by name, of one micro-batch of it."""

    @abstractmethod
    def micro_batch_loss(self, batch: PackedBatch, totals: Mapping[str, Tensor]) -> MicroBatchLoss:
        """Compute the loss of one micro-batch.

        Args:
            batch: the micro-batch.
            totals: the sums of what `count` returns over the micro-batches of the step and all ranks, fp32.
        """

    def target_weights(self, batch: PackedBatch, mtp_depths: int) -> Tensor:
        """Return what each target counts in a mean of nats: 1, unless a stage says otherwise.

        Args:
            batch: the micro-batch.
            mtp_depths: M.

        Returns:
            fp32 [1 + M, B, T]: of the next token, and of each MTP depth; 0 where there is no target.
        """
        return target_weights(batch, mtp_depths)

    def add_fields(self, batch: PackedBatch) -> PackedBatch:
        """Return rows of tokens that mean nothing as a batch of the stage, with the fields that it adds."""
        return batch

    @property
    def data(self) -> TrainingData:
        """The datamodule, by the protocol both sides know."""
        return cast(TrainingData, self.trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def strategy(self) -> StageStrategy:
        """The strategy, by the protocol both sides know."""
        return cast(StageStrategy, self.trainer.strategy)

    @property
    def built_network(self) -> Network:
        """The network, once `configure_model` has built it."""
        assert self.network is not None, "configure_model has not run"
        return self.network

    # ------------------------------------------------------------------------------------------------------ building

    def build_network(self, device_type: str = "cpu", capability: tuple[int, int] | None = None) -> Network:
        """Return a new network on the meta device with the precision recipe applied (see `precision_table`).

        Args:
            device_type: where it will compute, cpu or cuda.
            capability: compute capability of a GPU elsewhere, for which `plan` asks; None: this machine's.

        Raises:
            UserError: if the recipe does not fit the network or the device.
        """
        with torch.device("meta"):
            network = Network(self.backbone_config)
        self.precision_table = assign_formats(self.precision, network, device_type, capability)
        if self.lora is not None:
            attach(network, self.lora)
            freeze_base(network)
        if self.activation_checkpointing:
            network.checkpoint_activations()
        return network

    def lay_out(self, network: Network) -> Network:
        """Shard a network of the meta device and give it memory on this rank's; its weights have no values yet."""
        self.strategy.shard(network)
        network.to_empty(device=self.strategy.root_device)
        network.tie_weights()
        return network

    def mock_batch(self, rows: int, length: int) -> PackedBatch:
        """Return random tokens [rows, length], a document a row, a label at every position; the same on all ranks."""
        generator = torch.Generator().manual_seed(0)
        tokens, labels = torch.randint(self.data.vocab_size, (2, rows, length), generator=generator)
        ids = torch.zeros(rows, length, dtype=torch.int32)
        return self.add_fields(PackedBatch(tokens=tokens, labels=labels, document_ids=ids))

    def check_run(self, data: TrainingData, device_type: str) -> None:
        """Refuse what does not fit together before anything is written: no folder, no prepared corpus.

        Args:
            data: the datamodule of the run, not set up.
            device_type: where the network will compute, cpu or cuda.

        Raises:
            UserError: the data do not fit the network or the schedule, the recipe the network, an option the device,
                or init_from the backbone; or adapters have no init_from.
        """
        self.schedule.check_length(data.total.tokens)
        self._check_vocabulary(data)
        if self.compile_layers:
            _check_compiler(device_type)
        self.build_network(device_type)
        if self.lora is not None:
            self._open_base()
        elif self.init_from is not None:
            open_fitting(self.backbone_config, self.init_from)

    def configure_model(self) -> None:
        """Build, shard, materialise and initialise (or load) the network; does nothing the second time.

        Raises:
            UserError: if the recipe does not fit the network, an option the device, init_from the backbone, or the
                data's tokenizer the weights.
        """
        if self.network is not None:
            return
        device = self.strategy.root_device
        self._check_vocabulary(self.data)
        source = None if self.lora is None else self._open_base()
        network = self.build_network(device.type)
        quantized = {} if source is None else self._keep_quantized(network, source)
        if self.compile_layers:
            _check_compiler(device.type)
            for layer in network.modules():
                # A compiled mixture with FSDP2's hooks inside computes garbage for its shapes (fp32, torch 2.13).
                if isinstance(layer, Layer) and layer.letter != "E":
                    layer.compile()
        self.lay_out(network)
        if source is not None:
            data = self.data if self.resume_from is None else None  # a run that goes on has been checked
            self.initial_weights = fill_from(network, source, data, self.allow_other_tokenizer, quantized)
            initialize_adapters(network, self.seed)
        elif self.init_from is not None:
            self.initial_weights = start_from(network, self.init_from, self.data, self.allow_other_tokenizer)
        else:
            initialize(network, self.seed)
        self.network = network

    def _open_base(self) -> ModelFolder:
        """Open what the adapters belong to: `init_from`, which is the same MODEL still in a run that goes on.

        Raises:
            UserError: it is not given, does not fit the backbone, or is another one than before.
        """
        if self.init_from is None:
            raise UserError("model.init_args.lora: adapters need a base; name its MODEL in model.init_args.init_from")
        before = None if self.resume_from is None else base_of(self.resume_from)
        if before is None:
            source = open_fitting(self.backbone_config, self.init_from)
            self.base = self.base or Base(str(source.path.absolute()), fingerprint(source))
            return source
        path = Path(before.path)
        if self.init_from.resolve() not in path.resolve().parents:  # which a run's folder is, of a checkpoint
            path = self.init_from
        source = open_fitting(self.backbone_config, path)
        if self.base is None:
            check_base(source, before, cast(Path, self.resume_from))
        self.base = before
        return source

    def _keep_quantized(self, network: Network, source: ModelFolder) -> dict[str, list[str]]:
        """Let a network on the meta device hold what is quantised in its base as it is; return its names."""
        quantized = quantized_names(source, self.backbone_config)
        if quantized:
            hold_quantized(network, source, quantized)
            self.precision_table = [
                Assignment(row.name, cast(FormattedModule, network.get_submodule(row.name)).format, "init_from")
                if f"{row.name}.weight" in quantized
                else row
                for row in self.precision_table
            ]
        return quantized

    def _check_vocabulary(self, data: TrainingData) -> None:
        """Check that the ids of the data mean what they meant to the checkpoint, and that the network has them all."""
        if self.resume_from is not None and (self.resume_from / TOKENIZER).is_dir():
            data.check_tokenizer(self.resume_from / TOKENIZER, self.resume_from)
        if data.vocab_size > self.backbone_config.vocab_size:
            mend = "raise it to at least that"
            if self.init_from is not None:
                mend = f"prepare the data with --tokenizer {self.init_from} and another --output"
            raise UserError(
                f"model.backbone.vocab_size: {self.backbone_config.vocab_size} is less than the tokenizer's "
                f"{data.vocab_size}; {mend}"
            )

    def configure_optimizers(self) -> Optimizer:
        """Return the one optimiser."""
        groups = parameter_groups(self.built_network, self.optimizer_config.weight_decay)
        return AdamW(groups, self.optimizer_config)

    def on_fit_start(self) -> None:
        """Check that the schedule fits the run."""
        self.schedule.check_length(self.data.total.tokens)

    def on_train_start(self) -> None:
        """Check that the data stand where the run does: what saved them, restores them.

        Raises:
            UserError: they do not.
        """
        if self.data.progress.steps != self.trainer.global_step:
            raise UserError(
                f"data: the checkpoint is of step {self.trainer.global_step}, {type(self.data).__name__} stands at "
                f"{self.data.progress.steps}; keep data.class_path, or start a new run with model.init_args.init_from"
            )

    # ------------------------------------------------------------------------------------------------------ one step

    def on_before_batch_transfer(self, batch: Window | PackedBatch, dataloader_idx: int) -> Window | PackedBatch:
        """Find the targets of a window, or of a validation's batch, while they are on the host."""
        parts, depths = (batch.micro_batches, self.mtp_depths) if isinstance(batch, Window) else ([batch], 0)
        for part in parts:
            positions = target_positions(part.labels, part.document_ids, depths)
            if positions is not None and part.labels.is_pinned():
                positions = positions.pin_memory()  # or its copy to the device would be waited for
            part.positions = positions
        return batch

    def training_step(self, window: Window) -> None:
        """Take one optimiser step; what callbacks see before the optimiser's are clipped gradients."""
        optimizer, micro_batches = self.optimizers(), window.micro_batches
        assert isinstance(optimizer, LightningOptimizer)
        self.switch_formats(self.data.progress.tokens - window.tokens)
        totals = self.totals(micro_batches)
        router_counts: list[Tensor] = []
        self.token_losses = []
        for number, batch in enumerate(micro_batches):
            place = (window.step - 1) * self.data.micro_batches + number
            self._formats.reseed(torch.initial_seed(), self.global_rank, place)
            reseed(self.built_network, torch.initial_seed(), self.global_rank, place)
            self.strategy.sync_gradients(self.built_network, number == len(micro_batches) - 1)
            loss, metrics, router, token_losses = self.micro_batch_loss(batch, totals)
            self.token_losses.append(token_losses)
            for name, value in {"training/loss": loss.detach(), **metrics}.items():
                self.metrics.record(name, value, "sum")
            router_counts += [torch.stack([routing.counts.sum(0) for routing in router])] if router else []
            del router
            self.manual_backward(loss)
        norm = clip_gradients(self.built_network.parameters(), self.optimizer_config.gradient_clip_norm)
        values = self.metrics.end_step(self.strategy.all_reduce, norm.device)
        skip = self.step_guard.judge(values["training/loss"], norm)
        factor = self.schedule.factor(self.data.progress.tokens, self.data.total.tokens)
        rate = self.optimizer_config.learning_rate * factor
        for group in optimizer.param_groups:
            group["lr"] = rate
        cast(AdamW, optimizer.optimizer).found_inf = skip.float()
        optimizer.step()
        optimizer.zero_grad()
        self._update_expert_bias(router_counts, skip)
        self._record_step({**values, "training/gradient_norm": norm, "training/learning_rate": rate}, skip)

    def totals(self, micro_batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        """Return the sums of what `count` returns over micro-batches and all ranks, fp32, in one reduction."""
        counted = [self.count(batch) for batch in micro_batches]
        sums = {name: torch.stack([counts[name].double() for counts in counted]).sum(0) for name in counted[0]}
        whole = self.strategy.all_reduce(torch.cat([value.flatten() for value in sums.values()])).float()
        parts = whole.split([value.numel() for value in sums.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}

    def on_train_batch_end(self, outputs: object, batch: Window, batch_idx: int) -> None:
        """Stop a run that only skips.

        Raises:
            TrainingDivergedError: after `max_skipped_steps` bad steps in a row (looked at on the logging interval).
        """
        if not self._is_logged(batch.step):
            return
        streak = int(self.skipped_streak)
        if streak >= self.max_skipped_steps:
            self.write_metrics()
            raise TrainingDivergedError(self.step_guard.streak_message(batch.step, streak, self.max_skipped_steps))

    def write_metrics(self) -> None:
        """Write what was recorded and is not yet written to the loggers, at the number of finished steps."""
        values = self.metrics.take_unwritten()
        for logger in self.trainer.loggers if values else ():
            logger.log_metrics(values, self.trainer.global_step)

    def _update_expert_bias(self, counts: Sequence[Tensor], skip: Tensor) -> None:
        """Move each router's bias by the rate towards even load (arXiv 2408.15664), unless the step is skipped.

        Under adapters it stays what it is in their base.

        Args:
            counts: int64 [routers, E] of each micro-batch.
            skip: bool scalar.
        """
        if not counts:
            return
        self.expert_counts = self.strategy.all_reduce(torch.stack([*counts]).sum(0))
        if self.lora is not None:
            return
        load = self.expert_counts.float()
        change = self.expert_bias_rate * torch.sign(load.mean(1, keepdim=True) - load)
        change = torch.where(skip, 0.0, change)
        for router, delta in zip(self.built_network.routers(), change, strict=True):
            router.e_score_correction_bias += delta

    def _record_step(self, values: Mapping[str, Tensor | float], skip: Tensor) -> None:
        """Record what a step was like; it is written on the logging interval."""
        self.skipped_steps += skip
        self.skipped_streak.copy_(torch.where(skip, self.skipped_streak + 1, 0))
        recorded = {
            **values,
            "training/skipped_steps": self.skipped_steps.clone(),
            **self.step_guard.metrics(self.skipped_steps),
        }
        if self._is_logged(self.data.progress.steps):
            self.metrics.record_all(recorded)
        else:
            self.metrics.update(recorded)

    def _is_logged(self, step: int) -> bool:
        return step % self.trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def _formats(self) -> FormatSchedule:
        return FormatSchedule(self.precision, self.built_network)

    def switch_formats(self, tokens: int) -> None:
        """Set the formats that hold after a number of tokens, and say what changes."""
        for line in self._formats.switch(tokens):
            rank_zero_info(line)

    # ---------------------------------------------------------------------------------------------------- validation

    @cached_property
    def _token_bytes(self) -> Tensor:
        text = self.data.token_bytes() if isinstance(self.data, HeldOutText) else torch.zeros(self.data.vocab_size)
        return text.to(self.device)

    def on_validation_start(self) -> None:
        """Set the formats that hold now."""
        self.switch_formats(self.data.progress.tokens)

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._validation = torch.zeros(3, device=self.device, dtype=torch.float64)  # nats, targets, bytes

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add up nats, targets and the bytes the targets stand for, each target by what it counts."""
        weights, one = self.target_weights(batch, 0), torch.ones(1, device=self.device)
        nats = next_token_loss(self.built_network, batch, one, 0, 0.0, weights).nats[0]
        text_bytes = self._token_bytes[batch.labels.clamp(min=0)] * weights[0]
        self._validation += torch.stack([nats, weights.sum(), text_bytes.sum()])

    def on_validation_epoch_end(self) -> None:
        """Record `validation/loss` (nats per target) and, of text, `validation/bits_per_byte`.

        Raises:
            UserError: the rows have no target.
        """
        nats, targets, text_bytes = self.strategy.all_reduce(self._validation)
        if not targets:
            raise UserError(
                "data.init_args.validation_rows: the held-out rows have no token to predict; prepare with a larger "
                "validation_fraction, or set validation_rows to 0"
            )
        metrics = {"validation/loss": (nats / targets).float()}
        if isinstance(self.data, HeldOutText) and text_bytes:
            metrics["validation/bits_per_byte"] = (nats / math.log(2) / text_bytes).float()
        self.metrics.record_all(metrics)
        self.log_dict(metrics, logger=False, rank_zero_only=True)  # for what monitors Lightning's own metrics

    on_test_start, on_test_epoch_start = on_validation_start, on_validation_epoch_start
    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what is saved: all parameters and buffers; with adapters not those of the base, which has them."""
        state = super().state_dict(*args, **kwargs)
        if self.lora is None:
            return state
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in trained or not name.startswith("network.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the guard, which may differ between runs of one architecture, and the base of adapters."""
        checkpoint["step_guard"] = self.step_guard.saved_state()
        if self.base is not None:
            checkpoint.setdefault(folder.ABOUT, {})[BASE] = self.base._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it (a checkpoint from before there was one starts with an empty window)."""
        if "step_guard" in checkpoint:
            self.step_guard.restore(checkpoint["step_guard"])


def _check_compiler(device_type: str) -> None:
    if device_type != "cuda":
        raise UserError("model.compile_layers: only worth its start-up time on CUDA; set it to false")
