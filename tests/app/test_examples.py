"""The files of examples/ are what the commands of README take."""

import json

from app.rows_file import read_rows
from datamodules.text.preparation import Preparation, prepare_corpus
from tests.app.helpers import ROOT

EXAMPLES = ROOT / "examples"


def test_prompts_are_rows_of_generate():
    rows = read_rows(EXAMPLES / "prompts.jsonl")
    assert all(isinstance(row["prompt"], str) for row in rows.values())


def test_the_length_of_an_answer_gives_nothing_away():
    rows = [json.loads(line) for line in (EXAMPLES / "tasks" / "standard_library.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        lengths = [len(choice) for choice in row["choices"]]
        assert len(set(row["choices"])) == 4
        assert max(lengths) - min(lengths) <= 1


def test_the_task_is_loaded_with_its_data():
    from app.evaluation.tasks import load_tasks

    loaded = load_tasks(["standard_library"], EXAMPLES / "tasks", None, 0)
    (task,) = loaded["tasks"].values()
    document = task.test_docs()[0]
    assert task.doc_to_text(document).startswith("import os")
    assert task.doc_to_choice(document)[task.doc_to_target(document)] == "join(folder, name)"


def test_the_corpus_is_prepared(tmp_path):
    preparation = Preparation(paths=[str(EXAMPLES / "corpus")], output=tmp_path / "mine", vocab_size=400, workers=1)
    prepare_corpus(preparation)
    assert (tmp_path / "mine" / "corpus.json").is_file()
