"""Run by test_adapted.py in a process of its own: what peft makes of our folders over transformers' model, into a file.

peft and accelerate are in the folder of peers. `unguarded` takes away the check by which peft refuses Mamba-2's
`out_proj` in this family (for kernels that read its weight without calling it, which a CPU does not have).
"""

import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft.tuners import tuners_utils

from tests.modules.checkpoints.helpers import made_comparable

warnings.filterwarnings("error", message=".*adapter keys.*")  # missing or unexpected ones
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def logits(root: Path, adapters: str) -> torch.Tensor:
    """Logits of `tokens.pt` by peft's model."""
    base = made_comparable(transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32))
    model = peft.PeftModel.from_pretrained(base, root / adapters).eval()
    with torch.no_grad():
        return model(torch.load(root / "tokens.pt")).logits


def main(root: Path) -> None:
    """Read `plain` as it is, `all` refused and then unguarded."""
    found = {"plain": logits(root, "plain")}
    try:
        logits(root, "all")
    except ValueError as error:
        found["refusal"] = str(error)
    tuners_utils._check_lora_target_modules_mamba = lambda *_: None
    torch.save(found | {"all": logits(root, "all")}, root / "theirs.pt")


main(Path(sys.argv[1]))
