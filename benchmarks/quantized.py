"""Decoding, prompts and scoring of quantised models against plain ones: third part of benchmarks/generation.py.

The same weights as fp32 and as bf16 folders and as `quantize` writes them, calibrated on random tokens (speed does not
depend on the scales). All sides continue the same prompts by the same number of tokens, greedily and at temperature 1,
and score rows of `SCORED` random tokens. "decode" is without the prompt; a ratio is that of the tokens per second to
the plain model in fp32, and in bf16, the median over neighbouring turns.
"""

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.__main__ import settle_process
from app.commands.quantize import quantize
from benchmarks.side import Side, timed
from modules.checkpoints.export import export
from modules.checkpoints.load import load_model
from modules.checkpoints.source import open_model
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from modules.generation.scoring import score

PLAIN = ("fp32", "bf16")
FORMATS: dict[str, dict[str, Any]] = {
    "nvfp4": {},
    "nvfp4-weight-only": {"format": "nvfp4-weight-only"},
    "fp8": {"format": "fp8"},
    "nvfp4 and fp8": {"rules": ["*.in_proj=fp8", "*.out_proj=fp8", "*.o_proj=fp8"]},
}
"""Options of `quantize`, by the name of the row."""
SCORED = (8, 512)
"""Rows to score and tokens of each."""
ASKED = 0.5
"""Ratio to the plain model asked for."""


class Turn(NamedTuple):
    """What a side is asked for."""

    prompts: int
    """How many of them."""
    tokens: int
    """New tokens of each; 0: score rows instead."""
    temperature: float


@contextlib.contextmanager
def folders(model: Path, vocabulary: int) -> Iterator[dict[str, Path]]:
    """Yield the folders of all sides by name, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as place:
        texts, made = Path(place) / "texts.jsonl", {name: Path(place) / name for name in (*PLAIN, *FORMATS)}
        ids = torch.randint(vocabulary, (40, 128), generator=torch.Generator().manual_seed(0)).tolist()
        texts.write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in ids))
        for dtype in PLAIN:
            export(open_model(model), made[dtype], dtype=dtype, max_shard_bytes=2**32, report=lambda _: None)
        for name, options in FORMATS.items():
            with contextlib.redirect_stdout(io.StringIO()):
                quantize(model, output=made[name], data=str(texts), **options)
        yield made


def serve(connection: Connection, folder: Path, prompts: list[list[int]], threads: int) -> None:
    """Continue prompts or score rows on request, and send the seconds: the main function of a side's process."""
    settle_process()
    torch.set_num_threads(threads)
    network = load_model(folder).network
    rows = torch.randint(network.config.vocab_size, SCORED, generator=torch.Generator().manual_seed(1)).tolist()

    @torch.inference_mode()
    def run(turn: Turn) -> None:
        if not turn.tokens:
            list(score(network, rows))
            return
        requests = [
            Request(tokens=prompt, max_new_tokens=turn.tokens, key=(number,))
            for number, prompt in enumerate(prompts[: turn.prompts])
        ]
        list(generate(network, requests, Sampling(temperature=turn.temperature), batch_size=turn.prompts))

    run(Turn(1, 2, 0.0))
    connection.send(None)
    while (turn := connection.recv()) is not None:
        connection.send(timed(lambda asked=turn: run(asked)))


def compare(
    name: str, model: Path, prompts: list[list[int]], batches: list[int], new_tokens: int, threads: int, rounds: int
) -> None:
    """Print the tables of one model.

    Args:
        name: of the model.
        model: folder of a plain MODEL.
        prompts: at least as many as the largest batch.
        batches: prompts at once.
        new_tokens: to add to each.
        threads: of each side.
        rounds: turns of each side.
    """
    with folders(model, open_model(model).config.vocab_size) as made:
        sides = [Side(side, serve, folder, prompts, threads) for side, folder in made.items()]
        for batch in batches:
            for temperature in (0.0, 1.0):
                whole, first = (Turn(batch, count, temperature) for count in (new_tokens + 1, 1))
                _take_turns(sides, [whole, first], rounds)
                print(
                    f"\n{name}, {threads} thread(s), batch {batch}, temperature {temperature:g}, {len(prompts[0])} + "
                    f"{new_tokens} tokens, median of {rounds} rounds\n"
                    f"{'':<20}{'tokens/s':>10}{'to fp32':>9}{'to bf16':>9}{'prompt ms':>11}{'to fp32':>9}{'to bf16':>9}"
                )
                seconds = {side.name: _differences(side, whole, first) for side in sides}
                prompt = {side.name: [wall for _, wall in side.times[first]] for side in sides}
                for side in sides:
                    speed = batch * new_tokens / statistics.median(seconds[side.name])
                    print(
                        f"{side.name:<20}{speed:10,.0f}{_ratios(seconds, side.name)}"
                        f"{statistics.median(prompt[side.name]) * 1e3:11.1f}{_ratios(prompt, side.name)}",
                        flush=True,
                    )
                least = min(_ratio(seconds, form, plain) for form in FORMATS for plain in PLAIN)
                verdict = "reached" if least >= ASKED else "missed"
                print(f"asked: {ASKED:g}x the speed of plain decoding; the slowest: {least:.2f}x: {verdict}")
        _take_turns(sides, [Turn(0, 0, 0.0)], rounds)
        scoring = {side.name: [wall for _, wall in side.times[Turn(0, 0, 0.0)]] for side in sides}
        count = SCORED[0] * (SCORED[1] - 1)
        print(f"\n{name}, {threads} thread(s), score of {SCORED[0]} x {SCORED[1]} tokens, median of {rounds} rounds")
        print(f"{'':<20}{'tokens/s':>10}{'to fp32':>9}{'to bf16':>9}")
        for side in sides:
            speed = count / statistics.median(scoring[side.name])
            print(f"{side.name:<20}{speed:10,.0f}{_ratios(scoring, side.name)}", flush=True)
        for side in sides:
            side.close()


def _take_turns(sides: list[Side], turns: list[Turn], rounds: int) -> None:
    for _ in range(rounds):
        for turn in turns:
            for side in sides:
                side.turn(turn)


def _differences(side: Side, whole: Turn, first: Turn) -> list[float]:
    """Return the wall seconds of each round that decoding took."""
    return [a[1] - b[1] for a, b in zip(side.times[whole], side.times[first], strict=True)]


def _ratio(seconds: dict[str, list[float]], name: str, plain: str) -> float:
    """Return how many times as fast as a plain side a side is."""
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[plain], strict=True))


def _ratios(seconds: dict[str, list[float]], name: str) -> str:
    return "".join(f"{_ratio(seconds, name, plain):8.2f}x" for plain in PLAIN)
