"""A MODEL as the language model of lm-evaluation-harness.

It gives the numbers that the harness's own `hf` model gives for the exported weights, where that one is right: texts are
tokenised without BOS (as `fit` and `generate` do; the names of special tokens become those tokens, which chat templates
need), context and continuation are encoded together and split, and a text without a context follows the prefix token.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from app.errors import UserError
from datamodules.progress import Progress
from modules.backbone.model import Network
from modules.generation.engine import Request, generate
from modules.generation.sampling import Sampling
from modules.generation.scoring import score

if TYPE_CHECKING:
    from datamodules.tokenizer import Tokenizer

MAX_GEN_TOKS = 256
"""Tokens to generate where a task names no number: the harness's default."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "length_penalty": 1.0}
"""Generation settings that transformers has and we have not, with the values that change nothing."""


class HarnessModel(TemplateLM):
    """Scores and generates what tasks ask for.

    Args:
        network: the network, in evaluation mode.
        tokenizer: its tokenizer.
    """
