"""Our adapter gives what the harness's own `hf` model gives for the same folder."""

import importlib.machinery
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from app.evaluation.harness import HarnessModel, prefix_id, read_settings
from datamodules.conversations.template import ChatTemplate
from datamodules.tokenizer import Tokenizer
from modules.checkpoints.load import load_model
from modules.errors import UserError
from modules.generation.sampling import Sampling
from tests.app.models import TEXTS
from tests.modules.checkpoints.helpers import made_comparable

PEERS = Path(sys.prefix) / "peers"
NEEDED = ("accelerate", "psutil")

PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("", "import os"),
    ("import ", "sys"),
    ("for name in", " sys.argv:\n    print(name)\n"),
    ("<|im_start|>user\nadd<|im_end|>\n", "def"),
    (TEXTS[2] * 3, " self.x"),
    ("x", "y"),
]
DOCUMENTS = [*TEXTS, "a", TEXTS[1] * 3]
TALK = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add"}]


TOLERANCE = 1e-4


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(models):
    return models["first"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def ours(folder: Path, tokenizer: Tokenizer, **options) -> HarnessModel:
    network, prefix = load_model(folder).network, prefix_id(tokenizer, None)
    return HarnessModel(network, tokenizer, eos_ids=[tokenizer.eos_id], prefix_token=prefix, batch_size=3, **options)


@pytest.fixture(scope="module")
def hflm(folder, tmp_path_factory):
    """Returns the harness's model of a maximal length. Its `accelerate` is only for tests: taken from the peers."""
    missing = [
        name for name in NEEDED if importlib.machinery.PathFinder.find_spec(name, [*sys.path, str(PEERS)]) is None
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (`make test` does it)")
    alone = tmp_path_factory.mktemp("peers")
    for path in PEERS.iterdir():
        if path.name.startswith(NEEDED):
            (alone / path.name).symlink_to(path)
    import transformers

    sys.path.insert(0, str(alone))
    try:
        from lm_eval.models.huggingface import HFLM
    finally:
        sys.path.remove(str(alone))
    model = made_comparable(transformers.NemotronHForCausalLM.from_pretrained(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda length: HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, device="cpu", batch_size=1)


@pytest.mark.parametrize("length", [1000, 24])
def test_log_likelihoods_equal_those_of_hf(hflm, folder, tokenizer, length: int) -> None:
    mine, theirs = ours(folder, tokenizer, max_length=length), hflm(length)
    found = mine.loglikelihood(instances("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)


@pytest.mark.parametrize("length", [1000, 24])
def test_rolling_log_likelihoods_equal_those_of_hf(hflm, folder, tokenizer, length: int) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in DOCUMENTS])
    found = ours(folder, tokenizer, max_length=length).loglikelihood_rolling(requests)
    expected = hflm(length).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    if length == 1000:
        assert ours(folder, tokenizer).loglikelihood_rolling(requests) == pytest.approx(found, abs=TOLERANCE)


def test_completions_equal_those_of_hf(hflm, folder, tokenizer) -> None:
    settings = [
        {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        {"until": [], "max_gen_toks": 8, "temperature": 0.7, "do_sample": False},
        {"until": "o", "max_gen_toks": 20},
    ]
    requests = instances(
        "generate_until", [(context, chosen) for context, _ in PAIRS if context for chosen in settings]
    )
    found = ours(folder, tokenizer).generate_until(requests)
    assert found == hflm(1000).generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 3


def test_conversations_are_rendered_as_by_transformers(folder, tokenizer) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = ChatTemplate(tokenizer).source
    mine = ours(folder, tokenizer, template=ChatTemplate(tokenizer))
    rendered = mine.apply_chat_template(TALK[:1])
    assert rendered == theirs.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    begun = mine.apply_chat_template(TALK, add_generation_prompt=False)
    assert begun == theirs.apply_chat_template(TALK, tokenize=False, continue_final_message=True)
    ids = theirs.apply_chat_template(TALK[:1], add_generation_prompt=True)["input_ids"]
    assert mine.tok_encode(rendered) == ids


def test_sampling_settings_are_read() -> None:
    settings = {
        "until": ["a", ""],
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
    }
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=4, seed=3)
    assert read_settings(settings, 3) == (sampling, ("a",), 9)
    assert read_settings({"temperature": 0.8, "do_sample": False, "num_beams": 1}, 0) == (Sampling(), (), 256)
    with pytest.raises(UserError, match="repetition_penalty"):
        read_settings({"repetition_penalty": 1.2}, 0)


def test_repeated_requests_draw_anew_and_a_seed_repeats(folder, tokenizer) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = instances("generate_until", [("import", settings)] * 4)
    first, again = (ours(folder, tokenizer, seed=5).generate_until(requests) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1
    assert first != ours(folder, tokenizer, seed=6).generate_until(requests)


def test_the_prefix_token_is_bos_then_the_end_of_text_token_or_the_named_one(folder, tokenizer, tmp_path) -> None:
    assert prefix_id(tokenizer, None) == 1
    assert prefix_id(tokenizer, "</s>") == 2
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"bos_token"', '"former_bos"'))
    assert prefix_id(Tokenizer.load(tmp_path), None) == 2
    with pytest.raises(UserError, match="is 2 tokens"):
        prefix_id(tokenizer, "<s><s>")
