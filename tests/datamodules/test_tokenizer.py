import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from datamodules.tokenizer import RESERVED_IDS, SPECIAL_TOKENS, Tokenizer
from modules.errors import UserError

TEXTS = [
    "def f(self):\n    return self.x1 + 2048\n\n\nclass A:\n\tpass\r\n",
    "naïve 日本語 😀👩‍👩‍👧 \u200b ﷽ e\u0301",
    "a literal </s> and <think> and <|im_end|> in a document",
    "   leading, trailing   \n \n    \n",
    "\x00\x01\x7f\ufeff\ufffd",
]


def random_texts() -> list[str]:
    generator = random.Random(3)
    ranges = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return [
        "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 60)))
        for _ in range(200)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3 + ["print(self.value) for x in range(10)\n        return None"] * 5, 380)


def test_every_text_comes_back_and_its_bytes_are_counted_exactly(tokenizer: Tokenizer):
    sizes, contents = tokenizer.token_bytes(), tokenizer.contents()
    for text in TEXTS + random_texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(contents[index] for index in ids) == text.encode()
        assert sizes[ids].sum() == len(text.encode())
        assert min(ids) >= RESERVED_IDS


def test_batch_encoding_equals_single_encoding(tokenizer: Tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_documents(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)


def test_special_tokens_have_nemotrons_ids_and_no_bytes(tokenizer: Tokenizer):
    for index, name in SPECIAL_TOKENS.items():
        assert tokenizer.encode(name, special_tokens=True) == [index]
        assert len(tokenizer.encode(name)) > 1
    assert tokenizer.decode([2, 10, 31]) == "</s><|im_start|><SPECIAL_31>"
    assert (tokenizer.token_bytes()[:RESERVED_IDS] == 0).all()
    assert (tokenizer.token_bytes()[RESERVED_IDS:] > 0).all()
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)


def test_digits_stay_single(tokenizer: Tokenizer):
    trained = Tokenizer.train(["2024 2024 2024 x2024"] * 50, 400)
    assert [trained.decode([i]) for i in trained.encode("2024")] == ["2", "0", "2", "4"]


def test_training_does_not_depend_on_threads():
    code = (
        "import random; from datamodules.tokenizer import Tokenizer; g = random.Random(0);"
        "word = lambda: g.choice('abcdefg') * g.randint(1, 4) + g.choice('xyz');"
        "texts = [' '.join(word() for _ in range(300)) for _ in range(60)];"
        "print(Tokenizer.train(texts, 600).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"RAYON_NUM_THREADS": n}, capture_output=True, check=True
        ).stdout
        for n in ("1", "4")
    }
    assert len(prints) == 1
    assert len(prints.pop().strip()) == 64


def test_the_folder_is_a_hugging_face_one(tokenizer: Tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (2, 1, 0)
    for text in TEXTS[:2] + random_texts():
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.encode("a</s>") == [*tokenizer.encode("a"), 2]
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_loaded_tokenizer_is_saved_with_its_configuration(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "b" / "tokenizer_config.json").read_bytes() == (
        tmp_path / "a" / "tokenizer_config.json"
    ).read_bytes()


def test_a_foreign_sentencepiece_like_tokenizer_counts_bytes(tmp_path):
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xE2>": 3, "\u2581he": 4, "\u2581": 5, "é": 6, "<img>": 7}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.add_tokens([tokenizers.AddedToken("<img>", special=False)])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    foreign = Tokenizer.load(tmp_path)
    assert foreign.token_bytes().tolist() == [0, 0, 0, 1, 3, 1, 2, 5]
    assert foreign.contents() == [b"<unk>", b"<s>", b"</s>", b"\xe2", b" he", b" ", "é".encode(), b"<img>"]
    assert foreign.special_ids == {0, 1, 2}
    assert (foreign.eos_id, foreign.pad_id) == (2, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{"}, "holds no tokenizer"),
        ({"tokenizer.json": None}, "names no eos_token"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, "tokenizer_config.json holds no JSON object"),
    ],
)
def test_bad_folders_are_named(files: dict, message: str, tmp_path):
    for name, content in files.items():
        text = content or tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str()
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a folder"):
        Tokenizer.load(tmp_path / "missing")


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": False}])
def test_prompts_begin_as_in_transformers(tokenizer: Tokenizer, post_processor: bool, config: dict, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if post_processor:
        inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        inner.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    ids = Tokenizer.load(tmp_path).encode_prompt("def f")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("def f").input_ids
    assert (ids[0] == 1) == post_processor
    assert Tokenizer.load(tmp_path).encode_prompt("</s>")[-1] != 2


def test_truncation_and_padding_of_the_file_never_cut_or_fill_a_document(tmp_path):
    """transformers saves with a tokenizer what its last call asked for."""
    plain = Tokenizer.train(["some text to train on " * 9], 300)
    plain.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded, text = Tokenizer.load(tmp_path), "some text that is longer than four tokens"
    assert loaded.encode(text) == plain.encode(text)
    assert loaded.encode_documents([text])[0].tolist() == plain.encode(text)
    assert loaded.fingerprint == plain.fingerprint
