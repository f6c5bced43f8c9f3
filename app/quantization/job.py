"""The steps of `quantize`: calibrate, search where asked, write, read again and compare."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from app.quantization.quality import compare
from app.quantization.report import choice_lines, expected_size, layer_table, mean_bits
from app.quantization.texts import Texts, missing_data
from app.scoring import Reader
from datamodules.progress import ProgressBar
from modules.backbone.model import Network
from modules.checkpoints.card import label
from modules.checkpoints.card_quantized import Written
from modules.checkpoints.export import finish, stored_as, write_quantized
from modules.checkpoints.folder import new_folder
from modules.checkpoints.load import load_model
from modules.checkpoints.quantization import Quantization
from modules.checkpoints.safetensors import size_of
from modules.checkpoints.source import ModelFolder
from modules.errors import UserError
from modules.precision.quantized import ScaleSearch
from modules.ptq.calibration import Calibration, calibrate
from modules.ptq.layers import (
    INPUTS,
    WIDTH,
    Choice,
    Rule,
    counted,
    decide,
    effective_bits,
    find_groups,
    quantization_of,
)
from modules.ptq.mixture import CANDIDATES, check_budget, mix
from modules.ptq.sensitivity import measure
from modules.ptq.weights import WeightMaker, expert_coverage, kv_scales


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What the user asks for."""

    default: Choice | None
    """Format of the layers that no pattern names; None: search."""
    bits: float
    """Budget of a search, mean bits per weight."""
    rules: Sequence[Rule]
    """Formats of layers by pattern."""
    exclude: Sequence[str]
    search: ScaleSearch
    """How the block scales of NVFP4 weights are found."""
    kv_cache: bool
    """Whether keys and values get FP8 scales."""
    search_tokens: int
    """Most tokens that a search measures on."""
    dtype: Literal["auto", "fp32", "bf16"]
    """Of the tensors that are not quantised."""
    batch_tokens: int
    """Most tokens in a forward pass."""


class Job:
    """A quantisation, checked and ready to run.

    Args:
        source: the MODEL.
        request: what is asked for.
        texts: to calibrate on and to judge by; None: there are none.
        device: where to compute.

    Raises:
        UserError: a pattern or the budget is wrong, nothing would be quantised, or texts are needed.
    """

    def __init__(
        self, source: ModelFolder, request: QuantizeRequest, texts: Texts | None, device: torch.device
    ) -> None:
        self._source, self._request, self._texts, self._device = source, request, texts, device
        self._groups = find_groups(source.config)
        self._decisions = decide(self._groups, request.default, request.rules, request.exclude, source.config)
        found = [decision.choice for decision in self._decisions.values()]
        if all(choice == "bf16" for choice in found):
            raise UserError("nothing would be quantised: --exclude, --rules or the layers' widths keep every layer")
        self._searches = None in found
        if self._searches:
            check_budget(self._groups, self._decisions, request.bits)
        self._calibrates = request.kv_cache or self._searches or any(choice in INPUTS for choice in found)
        if self._calibrates and texts is None:
            raise missing_data(source)
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def run(self, output: Path, max_shard_bytes: int) -> dict[str, Any]:
        """Do it, saying on stdout how far it is; return the report, which is in the folder too.

        Args:
            output: folder to make; appears with the report in it, when all is done.
            max_shard_bytes: most bytes of tensors in a file.
        """
        self._say_what_is_kept()
        original = (
            None if self._texts is None else load_model(self._source.path, "auto", self._device, merge=True).network
        )
        self._lap("loading")
        calibration = None
        if self._calibrates:
            assert original is not None
            calibration = self._calibrate(original)
        maker = WeightMaker(self._source, self._groups, calibration, self._request.search)
        losses: dict[str, dict[Choice, float]] = {}
        choices: dict[str, Choice] = {
            name: decision.choice for name, decision in self._decisions.items() if decision.choice is not None
        }
        if self._searches:
            assert original is not None
            losses = self._measure(original, maker)
            choices = mix(self._groups, self._decisions, losses, self._request.bits)
            print("\n".join(["", *choice_lines(self._groups, losses, choices), ""]), flush=True)
        scales = {} if calibration is None else kv_scales(calibration)
        with new_folder(output) as folder:
            written = self._write(folder, max_shard_bytes, maker, choices, scales)
            self._lap("writing")
            report = self._describe(folder, choices, calibration, len(scales)) | {"search": losses}
            report["quality"] = None if original is None else self._compare(original, folder)
            report["seconds"] = self._seconds
            finish(self._source, folder, output, written.tensors, written._replace(report=report))
        return report

    def _say_what_is_kept(self) -> None:
        narrow = [group.name for group in self._groups if self._decisions[group.name].reason == WIDTH]
        if narrow:
            print(f"note: kept, for their in-features are no multiple of 16: {', '.join(narrow)}", flush=True)

    def _calibrate(self, original: Network) -> Calibration:
        assert self._texts is not None
        wanted = [
            layer.module
            for group in self._groups
            for layer in group.layers
            if self._decisions[group.name].choice in (None, *INPUTS)
        ]
        rows = self._texts.calibration
        with ProgressBar("calibrating", sum(map(len, rows)), unit="tokens") as progress:
            found = calibrate(
                original,
                rows,
                wanted,
                keys_and_values=self._request.kv_cache,
                batch_tokens=self._request.batch_tokens,
                advance=progress.advance,
            )
        self._lap("calibration")
        return found

    def _measure(self, original: Network, maker: WeightMaker) -> dict[str, dict[Choice, float]]:
        assert self._texts is not None
        rows, left = [], self._request.search_tokens
        for row in self._texts.calibration:
            if left > 1:
                rows.append(row[:left])
                left -= len(row)
        searched = [group for group in self._groups if self._decisions[group.name].choice is None]
        passes = 1 + len(searched) * len(CANDIDATES)
        total = sum(map(len, rows)) * passes
        with ProgressBar("measuring sensitivities", total, unit="tokens") as progress:
            losses = measure(
                original,
                searched,
                CANDIDATES,
                maker.make,
                rows,
                batch_tokens=self._request.batch_tokens,
                advance=progress.advance,
            )
        self._lap("search")
        return losses

    def _write(
        self,
        folder: Path,
        max_shard_bytes: int,
        maker: WeightMaker,
        choices: Mapping[str, Choice],
        scales: Mapping[str, tuple[float, float]],
    ) -> Written:
        formats: dict[str, Choice] = {
            name: choices[group.name] for group in self._groups for layer in group.layers for name in layer.weights
        }
        layers = {name: quantization_of(formats.get(name, "bf16")) for name in self._source.tensors}
        quantized = {name: layer for name, layer in layers.items() if layer is not None}
        return write_quantized(
            self._source,
            folder,
            Quantization(quantized, scales),
            (maker.make(name, formats[name]) for name in quantized),
            layout="modelopt",
            dtype=self._request.dtype,
            max_shard_bytes=max_shard_bytes,
            report=lambda line: print(line, flush=True),
        )

    def _describe(
        self, folder: Path, choices: Mapping[str, Choice], calibration: Calibration | None, caches: int
    ) -> dict[str, Any]:
        """Return the report but for what a search measured, quality and seconds."""
        stored = stored_as(self._source, self._request.dtype)
        table = layer_table(self._groups, choices, stored)
        coverage = [] if calibration is None else expert_coverage(self._groups, choices, calibration)
        return {
            "settings": self._settings(),
            "layers": table,
            "groups": {
                group.name: {"format": choices[group.name], "decided_by": self._decisions[group.name].reason}
                for group in self._groups
            },
            "bits": {
                "quantized": mean_bits([row for row in table if row["quantized"]]),
                "linear": effective_bits(counted(self._groups, self._decisions), choices),
                "all": mean_bits(table),
            },
            "size": {
                "before": sum(map(size_of, self._source.tensors.values())),
                "files": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                "arithmetic": expected_size(self._groups, choices, stored, caches),
            },
            "experts": [row._asdict() for row in coverage],
        }

    def _compare(self, original: Network, folder: Path) -> dict[str, Any]:
        assert self._texts is not None
        served = load_model(folder, "auto", self._device).network
        sizes = Reader(self._source).token_bytes()
        quality = compare(original, served, self._texts.held_out, sizes, self._request.batch_tokens)
        self._lap("comparison")
        return quality

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self._request) | {"model": label(self._source)}
        settings["rules"] = [f"{rule.pattern}={rule.choice}" for rule in self._request.rules]
        if not self._searches:
            del settings["bits"], settings["search_tokens"]
        if self._texts is not None:
            settings["texts"] = self._texts.origin
            settings["calibration_tokens"] = sum(map(len, self._texts.calibration))
        return settings

    def _lap(self, name: str) -> None:
        """Note how long a step took that ends now."""
        now = time.monotonic()
        self._seconds[name], self._since = round(now - self._since, 1), now
