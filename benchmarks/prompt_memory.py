"""Peak memory of `generate` and `score` for long prompts: all but keys and values must not grow with the prompt.

    python -m benchmarks.prompt_memory [--model runs/pretrain] [--lengths 8192 65536]

Each command runs as a user runs it, in a process of its own whose largest resident set the system reports. "KV" is what
keys and values of the attention layers take. The ratio is that of the peaks without KV; "above" is what a command takes
beyond the same command with a prompt of a few tokens: Python, torch and the weights are no excuse there.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from datamodules.tokenizer import Tokenizer
from modules.checkpoints.source import ModelFolder, open_model

SHORT, ADDED = 16, 8
"""Tokens of the prompt that "above" is counted from, and tokens added to each prompt."""
ASKED = 1.5
"""Ratio asked for, of the longest prompt to the shortest of --lengths."""
TEXT = "def f{n}(value_{n}: int) -> str:\n    return str(value_{n} + {n})\n\n"
"""What prompts are made of."""
MIB = 2**20


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/pretrain"), help="a MODEL (default: runs/pretrain)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536], help="tokens (default: 8192 65536)")
    options = parser.parse_args()
    source = open_model(options.model)
    if source.tokenizer_folder is None:
        raise SystemExit(f"--model: {options.model} brings no tokenizer")
    tokenizer = Tokenizer.load(source.tokenizer_folder)
    weights = sum(math.prod(info.shape) * info.dtype.itemsize for info in source.tensors.values())
    print(f"{options.model}, {weights / MIB:.0f} MiB of weights on the disk")
    print(f"{'':<10}{'tokens':>8}{'peak MiB':>10}{'KV MiB':>8}{'above MiB':>11}{'ratio':>8}{'ratio above':>13}")
    with tempfile.TemporaryDirectory() as folder:
        for command in ("generate", "score"):
            least = peak(command, options.model, text_of(SHORT, tokenizer), Path(folder))
            rows: list[tuple[int, int]] = []
            ratios = (1.0, 1.0)
            for length in sorted(options.lengths):
                text = text_of(length, tokenizer)
                tokens = len(tokenizer.encode(text))
                kept = keys_and_values(source, tokens + (ADDED if command == "generate" else 0))
                rows.append((peak(command, options.model, text, Path(folder)) - kept, kept))
                (first, _), (rest, _) = rows[0], rows[-1]
                ratios = rest / first, (rest - least) / (first - least)
                print(
                    f"{command:<10}{tokens:8,}{(rest + kept) / MIB:10.1f}{kept / MIB:8.1f}"
                    f"{(rest - least) / MIB:11.1f}{ratios[0]:7.2f}x{ratios[1]:12.2f}x",
                    flush=True,
                )
            worst = max(ratios)
            print(f"asked of {command}: at most {ASKED}x: {'reached' if worst <= ASKED else 'missed'} ({worst:.2f}x)")


def text_of(length: int, tokenizer: Tokenizer) -> str:
    """Return a text of at least `length` tokens, hardly more."""
    parts: list[str] = []
    count = 0
    while count < length:
        parts.append(TEXT.format(n=len(parts)))
        count += len(tokenizer.encode(parts[-1]))
    return "".join(parts)


def keys_and_values(source: ModelFolder, tokens: int) -> int:
    """Return the bytes of keys and values of one row: both, of each attention layer, in the dtype of its weights."""
    config = source.config
    name = next((name for name in source.tensors if name.endswith("k_proj.weight")), None)
    size = source.tensors[name].dtype.itemsize if name else 0
    layers = config.hybrid_override_pattern.count("*")
    return 2 * layers * config.num_key_value_heads * config.head_dim * tokens * size


def peak(command: str, model: Path, text: str, folder: Path) -> int:
    """Return the bytes of memory that a command takes for a text.

    Raises:
        SystemExit: it fails.
    """
    rows, output = folder / "input.jsonl", folder / "output.jsonl"
    output.unlink(missing_ok=True)
    rows.write_text(json.dumps({"prompt" if command == "generate" else "text": text}) + "\n", encoding="utf-8")
    given = ["--prompts", rows, "--max_new_tokens", str(ADDED)] if command == "generate" else ["--input", rows]
    line = [sys.executable, "-m", "app", command, model, *given, "--output", output]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed: {message.strip()}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
