"""The tokenizer: train a small one, load any Hugging Face one, count bytes, decode.

Only the `tokenizers` package is imported here (0.05 s); transformers (3 s) is loaded only for a folder that has no
`tokenizer.json`. The trained tokenizer is a byte-level BPE: it maps every text to tokens and back without loss, so bits
per byte are exact. Two choices of its pre-tokenizer matter for code: digits are split singly (arithmetic generalises
better, and no vocabulary goes into numbers), and a line break takes the indentation after it but for the last blank
(which goes with the word), which gives 4% more bytes per token on Python than GPT-2's pattern.

Special tokens have the ids of Nemotron 3 where that family fixes a meaning (`<unk>` 0, `<s>` 1, `</s>` 2,
`<|im_start|>` 10, `<|im_end|>` 11); think and tool tags follow at 12 to 17, and all other ids below 32 are reserved as
`<SPECIAL_n>`, so that no later stage has to resize the embedding. Documents end with `</s>`; there is no BOS. `<unk>`,
which a byte-level BPE never produces, also serves as padding.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from modules.errors import UserError

SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
    14: "<tool_call>",
    15: "</tool_call>",
    16: "<tool_response>",
    17: "</tool_response>",
}
"""Special tokens with a meaning, by id; the other ids below `RESERVED_IDS` are `<SPECIAL_n>`."""
RESERVED_IDS = 32
SMALLEST_VOCABULARY = RESERVED_IDS + 256
"""Special tokens and the 256 bytes; every further token is a merge."""

_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the blank or the mark before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # marks
    r"|\s*[\r\n]+[ \t]*(?= )"  # line breaks and the indentation but for its last blank
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""GPT-2's alphabet of byte-level vocabularies: printable Latin-1 for itself, the other bytes from U+0100 on."""
_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer and the few things data code asks of it.

    Args:
        inner: the tokenizer proper.
        eos_id: id of the token that ends a document.
        pad_id: id that fills rows.
        folder: where it was loaded from, or None for one that was just trained.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos_id: int, pad_id: int, folder: Path | None = None) -> None:
        self._inner = inner
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.folder = folder
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE; the same texts give the same tokenizer, whatever the number of threads.

        Args:
            texts: the training texts.
            vocab_size: wanted number of tokens, special ones included, at least `SMALLEST_VOCABULARY`; a small text
                may give fewer.
        """
        assert vocab_size >= SMALLEST_VOCABULARY
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SPECIAL_TOKENS.get(n, f"<SPECIAL_{n}>") for n in range(RESERVED_IDS)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, eos_id=2, pad_id=0)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Load a Hugging Face tokenizer folder.

        Raises:
            UserError: if the folder holds no usable tokenizer, or one without an end-of-text token.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"tokenizer: {folder} is not a folder; give a MODEL, or a Hugging Face tokenizer folder")
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            raise UserError(f"tokenizer: {folder} holds no tokenizer.json; give a MODEL, or a tokenizer folder")
        try:
            if (folder / "tokenizer.json").is_file():
                inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                inner = _slow_tokenizer(folder)
        except Exception as error:  # the Rust parser raises plain Exception
            reason = str(error).splitlines()[0]
            raise UserError(f"tokenizer: {folder} holds no tokenizer that can be loaded ({reason})") from error
        names = special_names(folder)
        eos = inner.token_to_id(names.get("eos_token", "</s>"))
        if eos is None:
            raise UserError(f"tokenizer: {folder} names no eos_token in tokenizer_config.json; add it")
        pad = inner.token_to_id(names["pad_token"]) if "pad_token" in names else None
        inner.no_truncation()  # transformers saves what its last call asked for: documents would be cut in silence
        inner.no_padding()
        return cls(inner, eos, eos if pad is None else pad, folder)

    def save(self, folder: Path) -> None:
        """Write a folder that `Tokenizer.load` and transformers' `AutoTokenizer` read.

        A loaded tokenizer is copied with its configuration and chat template.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            for name in _FOLDER_FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
        else:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[1],
                "eos_token": SPECIAL_TOKENS[2],
                "unk_token": SPECIAL_TOKENS[0],
                "pad_token": SPECIAL_TOKENS[0],
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1_000_000,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if not (folder / "tokenizer.json").is_file():
            (folder / "tokenizer.json").write_text(self._inner.to_str(pretty=False))

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, without BOS or EOS.

        Args:
            text: any text.
            special_tokens: whether the name of a special token inside the text becomes that token. Off for documents:
                a file that spells `</s>` must not end there.
        """
        self._inner.encode_special_tokens = not special_tokens
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text that a model goes on with; for the arguments see `encode`.

        It begins with BOS where the post-processor of tokenizer.json puts one, as in transformers (which reads
        `add_bos_token` only for tokenizers without that file); nothing is put at its end.
        """
        return self._prompt_beginning + self.encode(text, special_tokens)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return int32 token ids of each text, special tokens in them taken as plain text."""
        self._inner.encode_special_tokens = True
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens by their names; broken UTF-8 shows as U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Return the tokens that are found in a text before it is split, special ones among them, by id."""
        return self._inner.get_added_tokens_decoder()

    def renamed(self, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        """Return a tokenizer that knows added tokens by other names, and else encodes every text alike.

        It has no post-processor, so that positions are exact.

        Args:
            names: the new name of each token by its old one.
        """
        content = json.loads(self._inner.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            renamed = {names.get(piece, piece): index for piece, index in vocabulary.items()}
        else:
            renamed = [[names.get(piece, piece), score] for piece, score in vocabulary]
        content["model"]["vocab"] = renamed
        content["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the tokenizer as text."""
        return hashlib.sha256(self._inner.to_str(pretty=False).encode()).hexdigest()

    @cached_property
    def _prompt_beginning(self) -> list[int]:
        processed = self._inner.encode("a", add_special_tokens=True)
        return processed.ids[: processed.special_tokens_mask.index(0)]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        added = self._inner.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def contents(self) -> list[bytes]:
        """Return what each of the V token ids stands for: UTF-8 text or a part of a character, b"" for an unused id.

        A special token stands for its name.

        Raises:
            UserError: if the tokenizer is neither a byte-level nor a sentencepiece-like one.
        """
        added = self._inner.get_added_tokens_decoder()
        kinds = set(_types(json.loads(self._inner.to_str())["decoder"]))
        contents = [b""] * self.vocab_size
        for piece, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index in added:
                contents[index] = added[index].content.encode()
            elif "ByteLevel" in kinds:
                contents[index] = bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            elif kinds & {"ByteFallback", "Metaspace"}:
                is_byte = len(piece) == 6 and piece.startswith("<0x")
                contents[index] = bytes.fromhex(piece[3:5]) if is_byte else piece.replace("\u2581", " ").encode()
            else:
                raise UserError(f"tokenizer: {self.folder} is not byte-level; its tokens stand for no exact bytes")
        return contents

    def token_bytes(self) -> np.ndarray:
        """Return int64 [V]: UTF-8 bytes each token stands for, 0 for special tokens and unused ids.

        Raises:
            UserError: if the tokenizer is neither a byte-level nor a sentencepiece-like one.
        """
        sizes = np.array([len(content) for content in self.contents()], dtype=np.int64)
        sizes[sorted(self.special_ids)] = 0
        return sizes


def _slow_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


def special_names(folder: Path | None) -> dict[str, str]:
    """Return the special tokens by role (`eos_token`, ...) as the folder's JSON files name them."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, value in _read_json(folder, file).items():
            content = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(content, str):
                names[role] = content
    return names


def _read_json(folder: Path | None, name: str) -> dict[str, Any]:
    """Return the object in a folder's file, nothing if it is missing.

    Raises:
        UserError: if it is damaged.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer: {folder / name} is not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer: {folder / name} holds no JSON object; copy it again")
    return content


def _types(node: object) -> Iterable[str]:
    """Yield every `type` in a part of tokenizer.json."""
    if isinstance(node, dict):
        if "type" in node:
            yield node["type"]
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)
