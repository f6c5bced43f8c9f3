"""Pretraining: next token and MTP over packed documents, a mean over all tokens of the step."""

from modules.language_modeling import LanguageModeling


class Pretraining(LanguageModeling):
    """Pretrain a network on packed text."""
