"""What a run file asks for, without a device: does it fit, how long does it take, what does it cost; then the tables.

The file is parsed by fit's own parser, the network is built on the meta device and a step of it really runs there, so
the 120B model takes seconds on a laptop and a plan can never describe another model than the one `fit` would train.
"""

from typing import Literal

from modules.errors import UserError


def plan(
    *arguments: str,
    device: str | None = None,
    devices: int | None = None,
    accelerator: Literal["cpu", "gpu"] | None = None,
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    json: bool = False,
) -> None:
    """Say whether a run fits its devices, how long it takes and what it costs; no device and no data needed.

    Then come the tables: parameters, the format of each layer, FLOPs, memory, learning rate.

    Args:
        arguments: Run files and keys as `fit` takes them, for example --config configs/pretrain.yaml --name=mine; of a
            key that is given several times the last one counts.
        device: Kind of the devices: H100, H200, B200, GB200, GB300, A100, L40S, or `this` for what this machine has,
            which is taken unless given. Formats are judged for it, as if the optional packages were installed there.
        devices: Devices in all; those of the run file (trainer.devices x num_nodes) unless given.
        accelerator: What to take of this machine, cpu or gpu; as the run file says (auto: a GPU if there is one) unless
            given.
        tokens_per_second: Speed of one device; what the run has logged on this machine unless given.
        mfu: Share of the peak that training reaches, 0 to 1, as `fit` prints it; assumed unless given.
        peak_tflops: Peak of one device in 10^12 FLOP/s; that of its data sheet, or measured, unless given.
        json: Whether to print everything as one JSON object instead of text.

    Raises:
        UserError: a file, key or option is wrong; the message names it and the mend.

    Example:
        python -m app plan --config configs/pretrain.yaml
    """
    from app.cli import parse_run
    from app.planning.report import Options, Report
    from modules.base import StageModule
    from modules.batch import UNKNOWN_LENGTH

    options = Options(
        device=device,
        devices=devices,
        accelerator=accelerator,
        tokens_per_second=tokens_per_second,
        mfu=mfu,
        peak_tflops=peak_tflops,
    )
    run = parse_run(list(arguments))
    module, data = run.instantiate("model"), run.instantiate("data")
    if data.total == UNKNOWN_LENGTH:
        raise UserError(
            "data.init_args.epochs: how long an epoch is shows when the sources are prepared; plan with "
            "--data.init_args.epochs null --data.init_args.total_tokens N"
        )
    if not isinstance(module, StageModule):
        raise UserError(f"model.class_path: {run.config.model.class_path} is none of the stages in modules/")
    report = Report(run, module, data, options)
    print(report.as_json() if json else report.as_text())
