"""Tokens per second of `generate` against transformers' `generate`, and of speculative decoding against plain.

    python -m benchmarks.generation [--model runs/pretrain] [--batch 1 16] [--threads 1 2] [--formats fp32 bf16]

Both sides load the same folder, exported from the model in the precision of the row, and continue the same prompts
greedily; end-of-text tokens end nothing. transformers runs as its users would have it run fast: eval mode, inference
mode, KV cache, no logits kept, no end-of-text criterion to test, its fastest experts implementations (all are tried),
and sleeping instead of spinning threads as ours; one more row has our setting of memory too (`app.__main__`).
The same is measured for a larger hybrid with random weights (that of benchmarks/training_step.py).
Each side lives in a process of its own and takes turns; a ratio is the median of the ratios of neighbouring turns.
"equal" is the share of our tokens before the first that differs from transformers'.
Second part: see benchmarks/speculative.py; third part, quantised models: see benchmarks/quantized.py.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from app.__main__ import settle_process
from benchmarks import quantized, speculative, training_step
from benchmarks.side import Side, timed
from datamodules.text.corpus import Corpus
from modules.checkpoints.export import export
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling

OURS, THEIRS, SETTLED = "ours", "transformers", "settled"
KEPT = "memory kept"
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
"""How transformers can compute experts; the first is its default."""
ASKED = {1: 5.0, 16: 4.0}
"""Ratio asked for at a batch size."""
TRIAL, CLOSE = 65, 1.15
"""New tokens by which implementations are tried, and times the fastest's seconds up to which others are measured."""
RANDOM = "random"
"""Name of the larger hybrid."""
PARTS = ("model", RANDOM, "speculative", "quantised")
Prompts = list[list[int]]
Generate = Callable[[int], list[list[int]]]
"""Continues the prompts by so many tokens."""


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/pretrain"), help="a MODEL (default: runs/pretrain)")
    parser.add_argument("--corpus", default="data/stdlib", help="held-out texts of the model (default: data/stdlib)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts at once (default: 1 16)")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of a prompt (default: 128)")
    parser.add_argument("--new_tokens", type=int, default=256, help="tokens to add (default: 256)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--formats", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    options = parser.parse_args()
    parts = options.parts or PARTS
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}", flush=True)
    held_out = [] if {*parts} <= {RANDOM, "quantised"} else openings(options.corpus, options.prompt_tokens)
    for part in parts:
        if part == "speculative":
            for threads in options.threads:
                speculative.compare(options.model, held_out, options.new_tokens, threads, options.rounds)
            continue
        if part == "quantised":
            for model in (options.model, None):
                with staged(model, "fp32") as folder:
                    name = f"{model or 'random weights'}, {parameters(folder) / 1e6:.1f}M weights"
                    prompts = random_prompts(max(options.batch), options.prompt_tokens)
                    for threads in options.threads:
                        given = prompts, options.batch, options.new_tokens, threads, options.rounds
                        quantized.compare(name, folder, *given)
            continue
        for threads in options.threads:
            for precision in options.formats:
                with staged(options.model if part == "model" else None, precision) as folder:
                    for batch in options.batch:
                        prompts = random_prompts(batch, options.prompt_tokens)
                        if part == "model":
                            prompts = [held_out[row % len(held_out)] for row in range(batch)]
                        name = str(options.model) if part == "model" else "random weights"
                        print(f"\n{name}, {parameters(folder) / 1e6:.1f}M weights")
                        compare(folder, prompts, options.new_tokens, precision, threads, options.rounds)


def openings(corpus: str, length: int) -> Prompts:
    """Return the beginnings of held-out files.

    Raises:
        SystemExit: none is long enough.
    """
    found = [tokens[:length] for tokens in Corpus(corpus).openings() if len(tokens) > length]
    if not found:
        raise SystemExit(f"--prompt_tokens: no held-out text of {corpus} has more than {length} tokens on file")
    return found


def random_prompts(rows: int, length: int) -> Prompts:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(training_step.CONFIG.vocab_size, (rows, length), generator=generator).tolist()


@contextlib.contextmanager
def staged(model: Path | None, precision: str) -> Iterator[Path]:
    """Yield a Hugging Face folder of a MODEL (None: the random hybrid) in a precision, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as place:
        source = model
        if source is None:
            source = Path(place) / "fp32"
            training_step.their_model().save_pretrained(source)
        folder = Path(place) / "model"
        export(open_model(source), folder, dtype=precision, max_shard_bytes=2**32, report=lambda _: None)  # type: ignore[arg-type]
        yield folder


def parameters(folder: Path) -> int:
    """Return the number of weights of a MODEL (router biases included), without those of its MTP block."""
    tensors = open_model(folder).tensors
    return sum(math.prod(info.shape) for name, info in tensors.items() if not name.startswith("mtp."))


def ours(folder: Path, prompts: Prompts) -> Generate:
    """Return our way to continue prompts."""
    network = load_model(folder).network

    @torch.inference_mode()
    def run(tokens: int) -> list[list[int]]:
        requests = [Request(tokens=prompt, max_new_tokens=tokens) for prompt in prompts]
        return [completion.tokens for completion in generate(network, requests, Sampling(), batch_size=len(prompts))]

    return run


def theirs(folder: Path, prompts: Prompts, implementation: str) -> Generate:
    """Return transformers' way to continue prompts."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.NemotronHForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.set_experts_implementation(implementation)
    model.generation_config.eos_token_id = None
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))  # its own limit is no part of the published models
    ids = torch.tensor(prompts)

    def run(tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            rows = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return rows[:, ids.shape[1] :].tolist()

    return run


def serve(connection: Connection, side: str, folder: Path, prompts: Prompts, threads: int, implementation: str) -> None:
    """Continue the prompts on request: the main function of a side's process.

    It sends the tokens of a run for a negative request, and the seconds that a run takes for a positive one.
    """
    if side in (OURS, SETTLED):
        settle_process()
    torch.set_num_threads(threads)
    run = ours(folder, prompts) if side == OURS else theirs(folder, prompts, implementation)
    run(2)
    connection.send(None)
    while (tokens := connection.recv()) is not None:
        connection.send(timed(lambda count=tokens: run(count)) if tokens > 0 else run(-tokens))


def fast_implementations(folder: Path, prompts: Prompts, new_tokens: int, threads: int) -> dict[str, float]:
    """Return the seconds that transformers' fastest experts implementations would take, those close to the fastest.

    A trial of a few tokens tells slow ones; close ones are all measured.
    """
    sides = {name: Side(name, serve, THEIRS, folder, prompts, threads, name) for name in IMPLEMENTATIONS}
    trial = min(TRIAL, new_tokens)
    for _ in range(2):
        for side in sides.values():
            side.turn(1)
            side.turn(trial)
    seconds = {}
    for name, side in sides.items():
        prompt, whole = (min(cpu for cpu, _ in side.times[tokens]) for tokens in (1, trial))
        seconds[name] = prompt + (whole - prompt) * (new_tokens - 1) / max(trial - 1, 1)
        side.close()
    print("trial of transformers' experts, CPU s: " + ", ".join(f"{name} {cpu:.2f}" for name, cpu in seconds.items()))
    return {name: cpu for name, cpu in seconds.items() if cpu <= CLOSE * min(seconds.values())}


def agreement(mine: list[list[int]], other: list[list[int]]) -> float:
    """Return the share of tokens before the first that differs, over all rows."""
    before = 0
    for row, others in zip(mine, other, strict=True):
        differences = [place for place, pair in enumerate(zip(row, others, strict=True)) if pair[0] != pair[1]]
        before += differences[0] if differences else len(row)
    return before / sum(map(len, mine))


def check_first_tokens(mine: list[list[int]], other: list[list[int]], precision: str) -> None:
    """Stop where the sides do not compute the same model.

    In fp32 every first token must agree. In bf16 two likely tokens can have the same logit: half of them must.

    Raises:
        SystemExit: they do not.
    """
    equal = sum(row[0] == others[0] for row, others in zip(mine, other, strict=True))
    if equal < (len(mine) if precision == "fp32" else len(mine) / 2):
        raise SystemExit(f"the sides differ: {equal} of {len(mine)} first tokens are equal; nothing to compare")


def compare(folder: Path, prompts: Prompts, new_tokens: int, precision: str, threads: int, rounds: int) -> None:
    """Print the table of one model, precision, batch and number of threads."""
    print(
        f"{precision}, {threads} thread(s), batch {len(prompts)}, {len(prompts[0])} + {new_tokens} tokens, "
        f"median of {rounds} rounds"
    )
    seconds = fast_implementations(folder, prompts, new_tokens, threads)
    fastest = min(seconds, key=lambda name: seconds[name])
    kinds = [(OURS, OURS, fastest), *[(f"{THEIRS}, {name}", THEIRS, name) for name in seconds]]
    kinds.append((f"{THEIRS}, {fastest}, {KEPT}", SETTLED, fastest))
    sides = [Side(title, serve, side, folder, prompts, threads, name) for title, side, name in kinds]
    written = [side.ask(-new_tokens) for side in sides]
    check_first_tokens(written[0], written[1], precision)
    for _ in range(rounds):
        for tokens in (new_tokens, 1):
            for side in sides:
                side.turn(tokens)
    batch = len(prompts)
    print(
        f"{'':<38}{'CPU s':>8}{'wall s':>8}{'tokens/s':>10}{'CPU ratio':>11}{'wall ratio':>12}"
        f"{'prompt ms':>11}{'ms/step':>9}{'equal':>8}"
    )
    for side, tokens in zip(sides, written, strict=True):
        cpu, wall = (side.median(new_tokens, column) for column in range(2))
        ratios = [side.ratio(sides[0], new_tokens, column) for column in range(2)]
        prompt = side.median(1, 1)
        step = statistics.median(a[1] - b[1] for a, b in zip(side.times[new_tokens], side.times[1], strict=True))
        print(
            f"{side.name:<38}{cpu:8.3f}{wall:8.3f}{batch * new_tokens / wall:10,.0f}"
            f"{ratios[0]:10.2f}x{ratios[1]:11.2f}x"
            f"{prompt * 1e3:11.1f}{step / max(new_tokens - 1, 1) * 1e3:9.3f}{agreement(written[0], tokens):8.1%}",
            flush=True,
        )
    if batch in ASKED:
        cpu, wall = (min(side.ratio(sides[0], new_tokens, column) for side in sides[1:]) for column in range(2))
        verdict = "reached" if wall >= ASKED[batch] else "missed"
        print(
            f"asked: {ASKED[batch]:.0f}x; the fastest row of theirs: {cpu:.2f}x by CPU, {wall:.2f}x by wall: {verdict}"
        )
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
