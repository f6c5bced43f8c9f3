"""Tokens, steps and learning rate of a run."""

from app.planning.text import align, with_prefix
from modules.base import StageModule
from modules.batch import TrainingData
from modules.optim.schedule import ScheduleConfig

_WIDTH, _HEIGHT = 64, 8


def run_lines(module: StageModule, data: TrainingData) -> list[str]:
    """Return the length of the run and its learning rate, in tokens (positions, padding included) and steps.

    Args:
        module: the LightningModule.
        data: the datamodule.

    Raises:
        UserError: if the schedule is longer than the run.
    """
    schedule, peak, total, step_tokens = (
        module.schedule,
        module.optimizer_config.learning_rate,
        data.total.tokens,
        data.total.tokens // data.total.steps,
    )
    schedule.check_length(total)
    stable = total - schedule.warmup_tokens - schedule.decay_tokens
    phases = [
        ("warm-up", schedule.warmup_tokens, f"0 to {peak:.3g}, linear"),
        ("stable", stable, f"{peak:.3g}"),
        ("decay", schedule.decay_tokens, f"{peak:.3g} to {peak * schedule.minimum_ratio:.3g}, minus-sqrt"),
        ("run", total, f"{step_tokens:,} tokens a step"),
    ]
    rows = [("phase", "tokens", "steps", "learning rate")]
    rows += [(name, f"{tokens:,}", f"{tokens / step_tokens:,.0f}", what) for name, tokens, what in phases if tokens]
    return [*align(rows, text_columns=(0, 3)), "", *plot(schedule, peak, total)]


def plot(schedule: ScheduleConfig, peak: float, total: int) -> list[str]:
    """Return the learning rate over tokens as lines of text: a mark per column at the rate in its middle.

    Args:
        schedule: the schedule.
        peak: learning rate at its highest.
        total: tokens of the run.
    """
    factors = [schedule.factor(round(total * (column + 0.5) / _WIDTH), total) for column in range(_WIDTH)]
    heights = [round(factor * (_HEIGHT - 1)) for factor in factors]
    top = f"{peak:.3g}"
    lines = []
    for height in reversed(range(_HEIGHT)):
        label = top if height == _HEIGHT - 1 else "0" if height == 0 else ""
        lines.append(f"  {label:>{len(top)}} |{''.join('*' if at == height else ' ' for at in heights)}".rstrip())
    middle, end = (with_prefix(tokens, "").strip() for tokens in (total / 2, total))
    axis = "0".ljust(_WIDTH // 2 - len(middle) // 2) + middle
    lines.append(f"  {'':>{len(top)}} +{'-' * _WIDTH}")
    lines.append(f"  {'':>{len(top)}}  {axis.ljust(_WIDTH - len(end))}{end} tokens")
    return lines
