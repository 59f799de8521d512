"""Token ids → text, one token at a time."""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenTable(Protocol):
    """What is known about each token id. Ids outside of the tokenizer are empty and not special."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; they need not be whole characters."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark for the model (end of turn and the like), not text."""


class Detokenizer:
    """Yields whole characters only: the bytes of a character that several tokens share wait for the last of them.

    Bytes that can't be UTF-8 become U+FFFD, as in any decoder; a character that never completes is left out.
    """

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes. Special tokens have none."""
        if self._tokens.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokens.token_bytes(token_id))
