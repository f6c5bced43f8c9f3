"""Models that commands are run on: written by transformers itself, with a tokenizer trained on a few lines."""

from pathlib import Path

from datamodules.tokenizer import Tokenizer
from tests.modules.checkpoints.helpers import their_model

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "import os\nimport sys\n\nfor name in sys.argv:\n    print(name)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
]


def write_models(folder: Path) -> dict[str, Path]:
    """Write two models with one tokenizer, and one with a smaller vocabulary."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = Tokenizer.train(TEXTS, 320)
    size = tokenizer.vocab_size + 5
    for name, seed, vocab_size in (("first", 0, size), ("second", 1, size), ("smaller", 0, size - 5)):
        their_model(transformers, seed=seed, vocab_size=vocab_size).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    return {path.name: path for path in folder.iterdir()}
