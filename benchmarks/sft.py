"""Fine-tuning: ours against trl's `SFTTrainer` on transformers' `NemotronHForCausalLM`, the same weights and data.

    python -m benchmarks.sft [--conversations 16] [--length 512] [--rounds 7] [--threads 1]

A step learns the same conversations on both sides, of very different lengths, so the same supervised tokens; figures
are supervised tokens per second. Ours packs them best-fit into rows and computes logits of supervised positions only.
trl pads each micro-batch to its longest conversation: its packing needs kernels that a CPU lacks (transformers' model
raises without them). Both train in fp32 with fused AdamW, clip gradients, and recompute no activations. The MTP block
is left out, which transformers drops, and the balance loss, which it has not. "ours, unpacked" takes a conversation a
row, padded as trl does: the losses of all sides must agree, before each of the first steps. Each side lives in a
process of its own and takes steps in turn, see `benchmarks.side`. trl and accelerate lie where `make test` puts peers.
"""

import argparse
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.__main__ import settle_process
from benchmarks.side import Side, timed
from benchmarks.training_step import CONFIG, OURS, Step, our_network, their_model
from modules.batch import IGNORED_LABEL, ConversationBatch, target_positions
from modules.objectives.next_token import conversation_weights, next_token_loss
from modules.optim.adamw import AdamW, OptimizerConfig, parameter_groups
from modules.optim.clipping import clip_gradients
from modules.precision.recipe import PrecisionConfig

UNPACKED, TRL = "ours, unpacked", "trl"
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)
"""Without weight decay: the two sides would spare other parameters from it."""
MICRO_BATCH = 8
"""Conversations that trl computes at a time, its default."""
MEDIAN, SPREAD, SUPERVISED = 110, 0.8, (0.2, 0.8)
"""Lengths are log-normal; an answer is this share of its conversation."""
COMPARED = 3
"""Steps whose losses are compared."""
Conversation = tuple[Tensor, int]
"""(token ids int64 [n], where the answer begins)."""


def draw_conversations(number: int, longest: int) -> list[Conversation]:
    """Return conversations of random tokens: a question, then a supervised answer to the end."""
    generator = torch.Generator().manual_seed(0)
    lengths = (MEDIAN * (SPREAD * torch.randn(number, generator=generator)).exp()).long().clamp(16, longest)
    shares = torch.empty(number).uniform_(*SUPERVISED, generator=generator)
    return [
        (torch.randint(2, CONFIG.vocab_size, (length,), generator=generator), round(length * (1 - share)))
        for length, share in zip(lengths.tolist(), shares.tolist(), strict=True)
    ]


def pack(conversations: list[Conversation], length: int) -> list[list[Conversation]]:
    """Return rows of whole conversations, by best-fit decreasing."""
    rows: list[list[Conversation]] = []
    for one in sorted(conversations, key=lambda one: -len(one[0])):
        left = [length - sum(len(tokens) for tokens, _ in row) for row in rows]
        fitting = [(space, place) for place, space in enumerate(left) if space >= len(one[0])]
        if fitting:
            rows[min(fitting)[1]].append(one)
        else:
            rows.append([one])
    return rows


def batch_of(rows: list[list[Conversation]], length: int) -> ConversationBatch:
    """Return rows of conversations as a batch."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    ids = torch.full_like(tokens, length, dtype=torch.int32)
    for place, row in enumerate(rows):
        start = 0
        for number, (text, answer) in enumerate(row):
            end = start + len(text)
            tokens[place, start:end], ids[place, start:end] = text, number
            labels[place, start + answer - 1 : end - 1] = text[answer:]
            start = end
    weights = (labels != IGNORED_LABEL).float()
    positions = target_positions(labels, ids, 0)
    return ConversationBatch(tokens=tokens, labels=labels, document_ids=ids, positions=positions, loss_weights=weights)


def micro_batches(side: str, conversations: list[Conversation], length: int) -> list[ConversationBatch]:
    """Return a step's micro-batches of one of our sides."""
    if side == OURS:
        rows = pack(conversations, length)
        return [batch_of(rows[start : start + 4], length) for start in range(0, len(rows), 4)]
    groups = [conversations[start : start + MICRO_BATCH] for start in range(0, len(conversations), MICRO_BATCH)]
    return [batch_of([[one] for one in group], max(len(tokens) for tokens, _ in group)) for group in groups]


def our_step(batches: list[ConversationBatch]) -> Step:
    """Return a function that trains one step and returns the loss before it."""
    network = our_network(PrecisionConfig(recipe="fp32"), CONFIG)
    optimizer = AdamW(parameter_groups(network, OPTIMIZER.weight_decay), OPTIMIZER)

    def step() -> Tensor:
        weights = [conversation_weights(batch, 0, "tokens") for batch in batches]
        totals, losses = torch.stack([weight.sum() for weight in weights]).sum().view(1), []
        for batch, weight in zip(batches, weights, strict=True):
            loss = next_token_loss(network, batch, totals, 0, 0.0, weight).loss
            loss.backward()
            losses.append(loss.detach())
        clip_gradients(network.parameters(), OPTIMIZER.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    return step


def serve_trl(connection: Connection, conversations: list[Conversation]) -> None:
    """Let trl train, and take a step of it on request."""
    sys.path.append(str(Path(sys.prefix) / "peers"))
    import datasets
    import tokenizers
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    datasets.disable_progress_bars()

    class Turns(transformers.TrainerCallback):
        """Stops after each step until the next is asked for."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.started = (0.0, 0.0)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))
                if len(self.losses) == COMPARED:
                    connection.send(self.losses)
                elif len(self.losses) > COMPARED:
                    cpu, wall = self.started
                    connection.send((time.process_time() - cpu, time.perf_counter() - wall))
                if len(self.losses) >= COMPARED:
                    control.should_training_stop = connection.recv() is None
                    self.started = time.process_time(), time.perf_counter()

    rows = []
    for tokens, answer in conversations:
        labels = tokens.clone()
        labels[:answer] = IGNORED_LABEL
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=len(conversations) // MICRO_BATCH,
            max_steps=10**6,
            learning_rate=OPTIMIZER.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=OPTIMIZER.weight_decay,
            adam_beta1=OPTIMIZER.betas[0],
            adam_beta2=OPTIMIZER.betas[1],
            adam_epsilon=OPTIMIZER.epsilon,
            max_grad_norm=OPTIMIZER.gradient_clip_norm or 0.0,
            optim="adamw_torch_fused",
            max_length=None,
            packing=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=their_model(),
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
            ),
            callbacks=[Turns()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def serve(connection: Connection, side: str, number: int, length: int, threads: int) -> None:
    """Take steps on request: the main function of a side's process."""
    settle_process()
    torch.set_num_threads(threads)
    conversations = draw_conversations(number, length)
    if side == TRL:
        return serve_trl(connection, conversations)
    step = our_step(micro_batches(side, conversations, length))
    connection.send([float(step()) for _ in range(COMPARED)])
    while connection.recv() is not None:
        connection.send(timed(step))
    return None


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16, help="of a step, a multiple of 8 (default: 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, and of the longest (default: 512)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side (default: 1)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    conversations = draw_conversations(options.conversations, options.length)
    supervised = sum(len(tokens) - answer for tokens, answer in conversations)
    print(
        f"torch {torch.__version__}; a step of {len(conversations)} conversations, "
        f"{sum(len(tokens) for tokens, _ in conversations):,} tokens, {supervised:,} supervised; "
        f"{options.threads} thread(s), median of {options.rounds} rounds"
    )
    arguments = options.conversations, options.length, options.threads
    sides = [Side(name, serve, name, *arguments) for name in (OURS, UNPACKED, TRL)]
    for _ in range(options.rounds):
        for side in sides:
            side.turn("step")
    print(f"{'':<16}{'CPU s':>8}{'tokens/CPU s':>14}{'tokens/s':>10}{'ours: CPU':>11}{'wall':>7}  first losses")
    for side in sides:
        cpu, wall = (side.median("step", column) for column in range(2))
        ratios = [side.ratio(sides[0], "step", column) for column in range(2)]
        losses = ", ".join(f"{loss:.5f}" for loss in side.ready)
        print(
            f"{side.name:<16}{cpu:8.3f}{supervised / cpu:14,.0f}{supervised / wall:10,.0f}"
            f"{ratios[0]:10.2f}x{ratios[1]:6.2f}x  {losses}",
            flush=True,
        )
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
