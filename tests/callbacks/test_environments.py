"""Evaluation in the loop: when it runs, what it records, and that it leaves training as it was."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks.checkpoint import Checkpoint
from callbacks.environments import Environments, line, measures
from modules.batch import Attempt, Judgement, PackedBatch, Problem, Prompt, Reply
from modules.checkpoints import folder
from modules.errors import UserError
from modules.generation.acceptance import Acceptance
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from tests.callbacks.helpers import Values, run
from tests.modules.helpers import ListData, document_ids, make_module, packed_batch, tiny_config

CONFIG = tiny_config(vocab_size=8)
END = 7
NAMES = ("even", "short")


def attempt(tokens: list[int], ended: bool, reward: float, failure: str | None = None) -> Attempt:
    return Attempt(
        problem=Problem(messages=[{"role": "user", "content": "ask"}], answer="0"),
        dialogue=[{"role": "assistant", "content": str(tokens)}],
        reply=str(tokens),
        judgement=Judgement(reward=reward, reason="counted", failure=failure),
        ended=ended,
    )


class Numbers:
    """Problems that are numbers; one environment pays for an even first token, the other fails at odd ones."""

    end_ids = (END,)

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool | None]] = []

    def prompts(self, problems: int) -> list[Prompt]:
        source = torch.Generator().manual_seed(3)
        rows = torch.randint(0, 7, (len(NAMES) * problems, 6), generator=source).tolist()
        return [Prompt(tokens=row, key=(number,)) for number, row in enumerate(rows)]

    def run(self, problems: int, complete, *, samples: int = 1, thinking: bool | None = None):
        self.calls.append((problems, thinking))
        random.random()
        return self.judged(problems, complete(self.prompts(problems)))

    def judged(self, problems: int, replies: Sequence[Reply]) -> dict[str, list[list[Attempt]]]:
        even = [[attempt(tokens, ended, float(tokens[0] % 2 == 0))] for tokens, ended in replies[:problems]]
        short = [
            [attempt(tokens, ended, 1.0, "ValueError: odd" if tokens[0] % 2 else None)]
            for tokens, ended in replies[problems:]
        ]
        return {"even": even, "short": short}


class NumberData(ListData):
    """Has those problems."""

    numbers: Numbers | None

    def evaluation(self) -> Numbers | None:
        return self.numbers


class Writer(Values):
    """Keeps texts too."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[tuple[str, int], str] = {}

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda name, text, step: self.texts.update({(name, step): text}))


def batch(seed: int) -> PackedBatch:
    return packed_batch(document_ids([16]), 8, seed)


def trained(callback: Environments, numbers: Numbers | None, depths: int = 1, **changes):
    module = make_module(tiny_config(vocab_size=8, **changes), mtp_depths=depths)
    data = NumberData([batch(seed) for seed in range(5)], vocab_size=8)
    data.numbers = numbers
    logger = Writer()
    points = run(module, data, callback, logger=logger)
    return module, points or logger.points, logger


def test_the_same_problems_are_answered_before_the_first_step_every_few_and_after_the_last(capsys):
    numbers = Numbers()
    callback = Environments(every_n_steps=2, problems=9, shown=1, max_new_tokens=5, thinking=False, draft_tokens=2)
    module, points, logger = trained(callback, numbers)
    assert numbers.calls == [(9, False)] * 4
    evaluated = {step: values for step, values in points.items() if "validation/exact_match" in values}
    assert sorted(evaluated) == [0, 2, 4, 5]
    found = list(
        generate(
            module.network.eval(),
            [Request(tokens=prompt.tokens, max_new_tokens=5, key=prompt.key) for prompt in numbers.prompts(9)],
            Sampling(temperature=0.0),
            eos_ids=[END],
            draft_tokens=2,
        )
    )
    replies = [(one.tokens, one.finish == "eos") for one in found]
    expected = sum(tokens[0] % 2 == 0 for tokens, _ in replies[:9]) / 9
    judged = [tokens[0] % 2 == 0 for tokens, _ in replies[9:]]
    assert evaluated[5]["validation/exact_match/even"] == pytest.approx(expected)
    assert evaluated[5].get("validation/exact_match/short", 1.0) == 1.0
    assert evaluated[5]["validation/judgement_failures"] == 9 - sum(judged)
    drafts = Acceptance.of([count for one in found for count in one.accepted], 2)
    assert evaluated[5]["validation/replies/acceptance_length"] == pytest.approx(drafts.length)
    assert "validation/replies/acceptance_length" in evaluated[0]
    assert {name for name, _ in logger.texts} == {"environments/even/0", "environments/short/0"}
    assert "assistant: " + str(replies[0][0]) in logger.texts["environments/even/0", 5]
    printed = capsys.readouterr().out
    assert printed.count("exact match after step") == 4
    assert "--- even: " in printed


def test_training_goes_on_as_without_it():
    modules = []
    for numbers in (Numbers(), None):
        random.seed(3)
        torch.manual_seed(3)
        modules.append(trained(Environments(every_n_steps=2, problems=3, max_new_tokens=4), numbers)[0])
        modules[-1].drawn = random.random(), torch.rand(1).item()  # type: ignore[assignment]
    one, other = modules
    assert one.drawn == other.drawn
    assert one.network.training is other.network.training is True
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_without_environments_nothing_is_recorded():
    _, points, _ = trained(Environments(), None)
    assert not [name for values in points.values() for name in values if "exact_match" in name]


def test_a_model_without_an_mtp_block_drafts_nothing():
    callback = Environments(problems=2, max_new_tokens=3)
    _, points, _ = trained(callback, Numbers(), depths=0, num_nextn_predict_layers=0)
    assert "validation/exact_match" in points[5]
    assert not [name for values in points.values() for name in values if "acceptance" in name]


def test_where_nothing_was_judged_there_is_no_share():
    failed = [[attempt([1], True, 0.0, "took longer than 1 s")]]
    right = [[attempt([1], True, 1.0)], [attempt([1], True, 0.0)]]
    values = measures({"a": failed, "b": right})
    assert values == {
        "validation/exact_match/b": 0.5,
        "validation/exact_match": 0.5,
        "validation/judgement_failures": 1.0,
    }
    assert "validation/exact_match" not in measures({"a": failed})
    shown = line(7, values, ["took longer than 1 s"])
    assert shown == "exact match after step 7: 50.0% (b 50.0%); 1 not judged, for example took longer than 1 s"


@pytest.mark.parametrize(
    "wrong", [{"every_n_steps": 0}, {"problems": 0}, {"shown": -1}, {"max_new_tokens": 0}, {"draft_tokens": -1}]
)
def test_a_value_out_of_range_names_its_key(wrong: dict[str, int]):
    with pytest.raises(UserError, match=rf"environments\.{next(iter(wrong))} is"):
        Environments(**wrong)


def test_the_best_checkpoint_has_the_most_right_answers_of_its_own_step(tmp_path: Path):
    rows = [(1, 0.2, True), (2, 0.6, True), (3, 0.9, False), (4, 0.6, True), (5, 0.1, True)]
    for step, share, evaluated in rows:
        about = {"metrics": {"validation/exact_match": share}, "evaluated": evaluated, "validated": True}
        path = folder.step_folder(tmp_path, step)
        path.mkdir(parents=True)
        folder.write_json(path / folder.MANIFEST, about)
    parent = tmp_path / folder.CHECKPOINTS
    strategy = SimpleNamespace(remove_checkpoint=lambda path: (path / folder.MANIFEST).unlink() or path.rmdir())
    trainer = SimpleNamespace(global_step=5, is_global_zero=True, strategy=strategy)
    Checkpoint(keep_last=1, keep_best=2, best_metric="validation/exact_match")._remove_old(trainer, parent)
    assert sorted(path.name for path in parent.glob("step*")) == [f"step={step:08d}" for step in (2, 4, 5)]
    assert (parent / folder.BEST).resolve().name == "step=00000004"


def test_the_best_by_answers_needs_environments():
    checkpoint = Checkpoint(keep_best=1, best_metric="validation/exact_match")
    with pytest.raises(UserError, match=r"checkpoint\.best_metric: .* needs environments"):
        trained_with(checkpoint)
    with pytest.raises(UserError, match="validation/exact_match"):
        Checkpoint(best_metric="accuracy")


def trained_with(checkpoint: Checkpoint) -> None:
    data = NumberData([batch(0)], vocab_size=8)
    data.numbers = None
    run(make_module(CONFIG), data, checkpoint)
