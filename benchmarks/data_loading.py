"""One loader process of ours against plain Hugging Face `datasets` loops over the same rows.

    python -m benchmarks.data_loading [--path data/stdlib] [--rounds 9] [--step TOKENS_PER_SECOND] [--output FILE]

All sides read the packed rows of a prepared corpus (the default one is prepared first where it is missing) and build
the same micro-batches: tokens, labels, document ids, and the number of targets of the next token and each MTP depth.
Ours is the loader of `fit` without worker processes, in its weighted, shuffled order and with its checksums. Theirs are
the rows written by `Dataset.save_to_disk`, read in torch format as their documentation shows: by a DataLoader that
shuffles, and in order by `iter` (which a training run would not do). Labels and the like are built there row by row, as
one writes it. The rounds alternate, so that a busy machine slows all alike; a ratio is the median of the ratios of
neighbouring rounds. All sides must have counted the same targets and added up the same token ids, else there is no
table.

Beside it: what the training step of configs/pretrain.yaml consumes on this machine (all threads), or `--step` for what
was measured on another one, per device. The aim is a loader process at 50 times that or more.
"""

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; as `fit` does, see app/__main__.py

import numpy as np
import torch
from torch import Tensor

from datamodules.pretraining import PretrainingData
from modules.batch import IGNORED_LABEL, count_targets

CONFIG = "configs/pretrain.yaml"
AIM = 50
OURS, SHUFFLED, ORDERED = "ours", "datasets, DataLoader(shuffle=True)", "datasets, in order"
Micro = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens int64 [B, T], labels int64 [B, T], document ids int32 [B, T], counts int64 [1 + M]."""


class Round(NamedTuple):
    """One pass over the rows."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds of this process on all cores."""
    check: tuple[int, ...]
    """Targets by loss part, then the sum of all token ids."""


def run_round(batches: Iterator[Micro]) -> Round:
    """Consume batches and return what it took; the check is computed after the clock has stopped."""
    wall, processor = time.perf_counter(), time.process_time()
    kept = [(tokens.sum(), counts) for tokens, _, _, counts in batches]
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    total = sum(int(tokens) for tokens, _ in kept)
    return Round(wall, processor, (*torch.stack([counts for _, counts in kept]).sum(0).tolist(), total))


def our_batches(data: PretrainingData, depths: int) -> Iterator[Micro]:
    """Yield the micro-batches of `fit`'s loader."""
    for window in data.windows(0):
        for batch in window.micro_batches:
            counts = count_targets(batch.labels, batch.document_ids, depths)
            yield batch.tokens, batch.labels, batch.document_ids, counts


def save_rows(data: PretrainingData, folder: Path) -> Any:
    """Write the rows that `our_batches` reads as a dataset, in the order of the corpus, and return it opened."""
    import datasets

    datasets.disable_progress_bars()
    drawn = sorted(row for step in range(data.total.steps) for row in data.mixture.draw(step).row.tolist())
    reader = data._readers[0]

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for row in drawn:
            read = reader.read(row)
            yield {"tokens": read.tokens, "lengths": read.lengths}

    integers = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"tokens": integers, "lengths": integers})
    cache = str(folder / "cache")
    datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).save_to_disk(str(folder / "rows"))
    return datasets.load_from_disk(str(folder / "rows")).with_format("torch")


def collate(rows: list[dict[str, Tensor]], depths: int) -> Micro:
    """Return the micro-batch of some rows, the way one writes it."""
    tokens = torch.stack([row["tokens"] for row in rows]).long()
    document_ids = torch.empty_like(tokens, dtype=torch.int32)
    for number, row in enumerate(rows):
        lengths = torch.cat([row["lengths"], row["tokens"].new_tensor([tokens.shape[1] - row["lengths"].sum()])])
        numbers = torch.arange(len(lengths))
        numbers[-1] = tokens.shape[1]  # padding
        document_ids[number] = torch.repeat_interleave(numbers, lengths)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    inside = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] < tokens.shape[1])
    labels[:, :-1][inside] = tokens[:, 1:][inside]
    counts = []
    for shift in range(depths + 1):
        shifted = labels[:, shift:]
        same = document_ids[:, shift:] == document_ids[:, : document_ids.shape[1] - shift]
        counts.append(((shifted != IGNORED_LABEL) & same).sum())
    return tokens, labels, document_ids, torch.stack(counts)


def shuffled_batches(dataset: Any, size: int, depths: int) -> Iterator[Micro]:
    """Yield the micro-batches of a DataLoader over a dataset."""
    from torch.utils.data import DataLoader

    return iter(DataLoader(dataset, batch_size=size, shuffle=True, collate_fn=lambda rows: collate(rows, depths)))


def ordered_batches(dataset: Any, size: int, depths: int) -> Iterator[Micro]:
    """Yield the micro-batches of a dataset's own iteration."""
    for batch in dataset.iter(batch_size=size):
        columns = zip(batch["tokens"], batch["lengths"], strict=True)
        yield collate([{"tokens": tokens, "lengths": lengths} for tokens, lengths in columns], depths)


def step_speed(data: PretrainingData, seconds: float) -> float:
    """Return the tokens per second of training steps of CONFIG on this machine (without Lightning's part)."""
    from app.cli import parse_run
    from modules.backbone.initialization import initialize
    from modules.batch import PackedBatch
    from modules.objectives.next_token import next_token_loss
    from modules.optim.adamw import AdamW, parameter_groups
    from modules.optim.clipping import clip_gradients

    module: Any = parse_run(["--config", CONFIG]).instantiate("model")
    network = module.build_network().to_empty(device="cpu")
    network.tie_weights()
    initialize(network, 0)
    optimizer = AdamW(parameter_groups(network, module.optimizer_config.weight_decay), module.optimizer_config)
    took: list[float] = []
    for tokens, labels, document_ids, counts in itertools.cycle(our_batches(data, module.mtp_depths)):
        batch = PackedBatch(tokens=tokens, labels=labels, document_ids=document_ids)
        start = time.perf_counter()
        next_token_loss(network, batch, counts, module.mtp_depths, module.mtp_loss_factor).loss.backward()
        clip_gradients(network.parameters(), module.optimizer_config.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - start)
        if len(took) > 3 and sum(took) > seconds:
            return tokens.numel() / statistics.median(took[1:])
    raise AssertionError("a cycle does not end")


def table(rounds: dict[str, list[Round]], tokens: int, step: float, step_source: str) -> list[str]:
    """Return the lines that show the rounds of each side."""
    lines = [f"{'':36}{'wall s':>9}{'CPU s':>9}{'tokens/s':>14}{'tokens/CPU s':>14}"]
    for name, passes in rounds.items():
        wall = statistics.median(one.wall for one in passes)
        processor = statistics.median(one.processor for one in passes)
        lines.append(f"{name:36}{wall:9.3f}{processor:9.3f}{tokens / wall:14,.0f}{tokens / processor:14,.0f}")
    lines += [f"{'training step, ' + step_source:36}{'':18}{step:14,.0f}", ""]
    for name in (SHUFFLED, ORDERED):
        pairs = list(zip(rounds[name], rounds[OURS], strict=True))
        wall = statistics.median(theirs.wall / ours.wall for theirs, ours in pairs)
        processor = statistics.median(theirs.processor / ours.processor for theirs, ours in pairs)
        lines.append(f"ours / {name}: {wall:.1f}x by wall, {processor:.1f}x by CPU seconds")
    ratio = tokens / statistics.median(one.wall for one in rounds[OURS]) / step
    verdict = "reached" if ratio >= AIM else "MISSED"
    return [*lines, f"ours / training step: {ratio:,.0f}x by wall (aim: at least {AIM}x, {verdict})"]


def machine() -> str:
    """Return what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "litdata", "datasets", "pyarrow"))
    cores = f"{len(os.sched_getaffinity(0))} CPU cores ({cpu}, load average {os.getloadavg()[0]:.1f})"
    return f"{cores}, Python {platform.python_version()}, {packages}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", default="data/stdlib", help="prepared corpus (default: data/stdlib)")
    parser.add_argument("--sequence_length", type=int, default=512, help="T of the corpus (default: 512)")
    parser.add_argument("--rows", type=int, default=8192, help="rows of a round, at most those of the corpus")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="B (default: 8)")
    parser.add_argument("--depths", type=int, default=2, help="MTP depths to count targets for (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds, after one to warm up (default: 9)")
    parser.add_argument("--step", type=float, help=f"tokens/s a device consumes; unless given, {CONFIG} is measured")
    parser.add_argument("--output", type=Path, help="file that takes the table as well")
    options = parser.parse_args()

    size = options.micro_batch_size
    data = PretrainingData(options.path, sequence_length=options.sequence_length, micro_batch_size=size)
    data.prepare_data()
    rows = min(options.rows, len(data.corpora["corpus"].rows("train"))) // size * size
    tokens = rows * options.sequence_length
    arguments: dict[str, Any] = {"micro_batch_size": size, "global_batch_size": size, "total_tokens": tokens}
    data = PretrainingData(options.path, sequence_length=options.sequence_length, **arguments)

    step, step_source = options.step, "as given"
    if step is None:
        step, step_source = step_speed(data, seconds=20.0), f"{CONFIG}"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = save_rows(data, Path(folder))
        sides: dict[str, Callable[[], Iterator[Micro]]] = {
            OURS: lambda: our_batches(data, options.depths),
            SHUFFLED: lambda: shuffled_batches(dataset, size, options.depths),
            ORDERED: lambda: ordered_batches(dataset, size, options.depths),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, batches in sides.items():
                one = run_round(batches())
                if number:
                    rounds[name].append(one)
    checks = {one.check for passes in rounds.values() for one in passes}
    assert len(checks) == 1, f"the sides have not read the same: {checks}"
    lines = [
        machine(),
        f"{rows:,} rows of {options.sequence_length} tokens of {options.path}, micro-batches of {size}; medians of "
        f"{options.rounds} alternating rounds; one process, one thread each",
        "",
        *table(rounds, tokens, step, step_source),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
