"""Which documents of a file are held out for validation, by a hash of their text."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """The training or the validation documents of a file that has both.

    The side of a document depends on its text alone. So equal documents are never on both sides,
    and a document keeps its side when others are added.

    Attributes:
        fraction: The share of documents that are held out for validation, in (0, 1).
        is_valid: Whether this is the side of the validation documents.
    """

    fraction: float
    is_valid: bool

    def keeps(self, text: str) -> bool:
        """Return whether a document is on this side."""
        # The first 8 bytes of the hash are uniform over the integers below 2**64.
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (int.from_bytes(digest) < self.fraction * 2**64) == self.is_valid
