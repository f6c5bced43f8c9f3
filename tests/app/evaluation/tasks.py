"""Small tasks of every kind, with their data beside them."""

import json
from pathlib import Path

import yaml

QUESTIONS = [
    {"question": "import os\nimport", "choices": ["sys", "os argv"], "answer": 0},
    {"question": "for name in", "choices": ["x", "sys.argv:"], "answer": 1},
    {"question": "def add(a, b):\n    return", "choices": ["a", "b", "print"], "answer": 2},
]
TEXTS = [{"text": "import os\nimport sys\n"}, {"text": "def add(a, b):"}, {"text": "x"}]
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["o"], "max_gen_toks": 7, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "extracted": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["o"], "max_gen_toks": 7, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "answer is ([0-9]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, tasks: dict[str, dict] = TASKS) -> Path:
    folder.mkdir(exist_ok=True)
    for name, task in tasks.items():
        data = "texts.jsonl" if name == "rolling" else "questions.jsonl"
        content = {"task": f"tiny_{name}", **COMMON, "dataset_kwargs": {"data_files": {"test": data}}, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for name, rows in (("texts", TEXTS), ("questions", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return folder
