"""The speed that a run has logged, to plan with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.run_folder import RunFolder, flatten
from modules.checkpoints import folder
from modules.errors import UserError

SPEED = "training/tokens_per_second"
_WORK = (
    "model.class_path",
    "model.init_args.backbone",
    "model.init_args.precision",
    "model.init_args.mtp_depths",
    "data.init_args.sequence_length",
)
"""Keys that decide what a token costs."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed:
    """What a run has reached."""

    tokens_per_second: float
    """Of all its devices: the median of what it logged."""
    devices: int
    """Devices it ran on."""


def measured_speed(run: RunFolder, config: str) -> MeasuredSpeed | str:
    """Return the speed of a run that has been trained, or in a few words why none can be planned with.

    Args:
        run: folder of the run.
        config: the resolved configuration that is planned; a speed of other work per token is refused.
    """
    speed = _logged_speed(run.path)
    if speed is None:
        return f"{run.path} has not been trained"
    if not (run.path / folder.RUN_CONFIG).exists():
        return f"{run.path} has no {folder.RUN_CONFIG} that says what was trained"
    old, new = yaml.safe_load((run.path / folder.RUN_CONFIG).read_text(encoding="utf-8")), yaml.safe_load(config)
    if (changed := _changed(flatten(old), flatten(new))) is not None:
        return f"that of {run.path} was measured with another {changed}"
    devices = _devices(run, old["trainer"])
    if devices is None:
        return f"{run.path} does not say on how many devices its speed was measured"
    return MeasuredSpeed(tokens_per_second=speed, devices=devices)


def device_count(trainer: Any) -> int | None:
    """Return the devices in a machine that `trainer.devices` asks for, read as Lightning does; None: all there are.

    Args:
        trainer: the keys of the trainer.

    Raises:
        UserError: it asks for none.
    """
    given = trainer["devices"]
    try:
        if isinstance(given, str) and "," in given:
            given = [int(index) for index in given.split(",") if index]
        count = len(given) if isinstance(given, list) else -1 if given == "auto" else int(given)
    except ValueError:
        count = 0
    if count == 0 or count < -1:
        raise UserError(
            f"trainer.devices: {trainer['devices']!r} asks for no device; give a number, a list like 0,1 or auto"
        )
    return None if count == -1 else count


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return the first key of `_WORK` under which two flattened configurations differ."""
    for key in _WORK:
        before, after = (
            {name: tree[name] for name in tree if f"{name}.".startswith((f"{key}.", f"{key}["))} for tree in (old, new)
        )
        if before != after:
            return key
    return None


def _devices(run: RunFolder, trainer: dict[str, Any]) -> int | None:
    """Return the devices of a run: those of its newest checkpoint, or what its configuration says."""
    for checkpoint in folder.checkpoints(run.checkpoints):
        try:
            return folder.describe(checkpoint)["devices"]
        except (KeyError, ValueError):  # damaged
            continue
    count = device_count(trainer)
    return None if count is None else count * trainer["num_nodes"]


def _logged_speed(path: Path) -> float | None:
    """Return the median of a run's logged tokens per second (all its devices); None if it has logged none."""
    if not any(path.glob("events.out.tfevents.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    if SPEED not in events.Tags()["scalars"]:
        return None
    speeds = sorted(event.value for event in events.Scalars(SPEED))
    return speeds[len(speeds) // 2]
