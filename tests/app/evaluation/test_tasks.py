"""What is wrong with a task is told before a model is loaded."""

import datasets
import pytest

from app.evaluation.tasks import load_tasks
from modules.errors import UserError
from tests.app.evaluation.tasks import TASKS, write_tasks

METRIC = {"metric": "no_such_metric", "aggregation": "mean", "higher_is_better": True}
BROKEN = {
    "lost": {**TASKS["choices"], "dataset_kwargs": {"data_files": {"test": "lost.jsonl"}}},
    "metric": {**TASKS["choices"], "metric_list": [METRIC]},
    "unsafe": {**TASKS["written"], "unsafe_code": True},
}
CODE = """\
def results(doc, results):
    import no_such_package
    return {"acc": 1}


def none(documents):
    return documents.select([])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path / "tasks", TASKS | BROKEN)
    (folder / "code.py").write_text(CODE)
    text = (folder / "choices.yaml").read_text()
    (folder / "package.yaml").write_text(
        text.replace("tiny_choices", "tiny_package") + "process_results: !function code.results\n"
    )
    (folder / "nothing.yaml").write_text(
        text.replace("tiny_choices", "tiny_nothing") + "process_docs: !function code.none\n"
    )
    return folder


def test_tasks_of_a_folder_are_loaded_by_name_and_pattern(folder) -> None:
    loaded = load_tasks(["tiny_r*", "tiny_choices"], folder, None, 0)
    assert list(loaded["tasks"]) == ["tiny_rolling", "tiny_choices"]
    assert len(loaded["tasks"]["tiny_choices"].eval_docs) == 3


@pytest.mark.parametrize(("asked", "given"), [(None, 0), (2, 2)])
def test_examples_are_as_many_as_asked(folder, asked: int | None, given: int) -> None:
    task = load_tasks(["tiny_choices"], folder, asked, 0)["tasks"]["tiny_choices"]
    assert task.get_config("num_fewshot") == given


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_lost", r"tiny_lost cannot be loaded \(FileNotFoundError: "),
        ("tiny_metric", "tiny_metric has the metric no_such_metric, which is unknown"),
        ("tiny_package", "tiny_package needs a package that is not installed: .* no_such_package"),
        ("tiny_unsafe", "tiny_unsafe runs code that the model writes"),
        ("tiny_nothing", "tiny_nothing cannot be loaded "),
    ],
)
def test_a_task_that_could_not_end_is_refused(folder, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks([name], folder, None, 0)


def test_an_unknown_task_is_told_with_what_is_near_and_what_cannot_be_read(folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"there is no task, group or tag hellaswagg; did you mean .*hellaswag"):
        load_tasks(["hellaswagg"], folder, None, 0)
    (folder / "broken.yaml").write_text("task: [tiny_broken\n")
    with pytest.raises(UserError, match=r"tiny_broken.*; .*broken.yaml cannot be read \("):
        load_tasks(["tiny_broken"], folder, None, 0)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_tasks(["tiny_choices"], tmp_path / "nowhere", None, 0)
