"""Content address of a block: the one definition of the chained hash.

Every input is tagged and length-prefixed, so that no two unequal contexts share a pre-image.
The root covers everything that changes the bytes of a block besides its tokens; each block's
hash covers its parent's, so equal hashes mean equal prefixes.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_SCHEMA = b"baton.block.v2"
PREFIX_STRIDE_TOKENS = 256
"""The directory lists the hash at every multiple of this many tokens."""


_TAG = struct.Struct("<4sQ")
_BLOCKS_A_RUN = 16
_MOST_RUNS = 4096
"""Of a million tokens in blocks of 16, ten megabytes; in blocks of 128, the largest, forty."""


def _tagged(tag: bytes, value: bytes) -> bytes:
    return _TAG.pack(tag, len(value)) + value


def root_hash(capability_hash: str, *, adapter: str = "", salt: bytes = b"") -> bytes:
    """Parent of a prompt's first block, in every cache group: a hash names tokens, not bytes.

    `capability_hash` covers model digest, cache dtype, layout and determinism class; `salt`
    comes from the authenticated identity.
    """
    fields = [
        _tagged(b"schm", _SCHEMA),
        _tagged(b"capa", capability_hash.encode()),
        _tagged(b"adap", adapter.encode()),
        _tagged(b"salt", salt),
    ]
    return hashlib.sha256(b"".join(fields)).digest()


def block_hash(parent: bytes, token_ids: Iterable[int]) -> bytes:
    tokens = array("I", token_ids).tobytes()
    return hashlib.sha256(_tagged(b"prnt", parent) + _tagged(b"toks", tokens)).digest()


def chain_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of the full blocks of `token_ids`, whose first token follows `parent`."""
    # As block_hash, with all that is alike made once: a prompt may have thousands of blocks.
    tokens, sha256 = array("I", token_ids), hashlib.sha256
    num_bytes = block_size * tokens.itemsize
    data, tag_of_tokens = tokens.tobytes(), _TAG.pack(b"toks", num_bytes)
    assert len(parent) == sha256().digest_size
    tag_of_parent = _TAG.pack(b"prnt", len(parent))
    hashes = []
    for start in range(0, len(data) - num_bytes + 1, num_bytes):
        tagged = tag_of_parent + parent + tag_of_tokens
        parent = sha256(tagged + data[start : start + num_bytes]).digest()
        hashes.append(parent)
    return hashes


class KnownHashes:
    """`chain_hashes`, looked up where the same tokens stood behind the same parent before: a prompt
    that goes on from another has most of its blocks in common with it.

    What was looked up last is kept; tokens are compared, all of them.
    """

    def __init__(self, most_runs: int = _MOST_RUNS) -> None:
        self._most_runs = most_runs
        self._runs: OrderedDict[tuple[int, bytes, bytes], list[bytes]] = OrderedDict()
        """Block size, parent, and tokens of so many blocks → their hashes."""

    def chain(self, parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """As `chain_hashes`."""
        hashes: list[bytes] = []
        num_tokens, runs = _BLOCKS_A_RUN * block_size, self._runs
        end = len(token_ids) - len(token_ids) % num_tokens
        tokens = array("I", token_ids[:end])
        data, num_bytes = tokens.tobytes(), num_tokens * tokens.itemsize
        for number, start in enumerate(range(0, len(data), num_bytes)):
            key = (block_size, parent, data[start : start + num_bytes])
            run = runs.get(key)
            if run is None:
                first = number * num_tokens
                run = chain_hashes(parent, tokens[first : first + num_tokens], block_size)
                runs[key] = run
                if len(runs) > self._most_runs:
                    runs.popitem(last=False)
            else:
                runs.move_to_end(key)
            hashes += run
            parent = run[-1]
        return hashes + chain_hashes(parent, token_ids[end:], block_size)


def stride_blocks(block_size: int) -> int:
    """Blocks from one hash that the directory lists to the next."""
    return max(1, PREFIX_STRIDE_TOKENS // block_size)


def is_boundary(index: int, block_size: int) -> bool:
    """Whether the directory lists the hash of the block at `index` of a prompt."""
    return (index + 1) % stride_blocks(block_size) == 0


def boundary_hashes(
    root: bytes, token_ids: Sequence[int], block_size: int, known: KnownHashes | None = None
) -> list[bytes]:
    """Those hashes of a prompt's blocks that the directory lists, in order."""
    stride, chain = stride_blocks(block_size), chain_hashes if known is None else known.chain
    return chain(root, token_ids, block_size)[stride - 1 :: stride]
