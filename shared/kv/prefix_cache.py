"""PrefixCache: which sealed blocks are found again, by the prefix that they end.

A tree of nodes, one for each prefix (a chain of block hashes) of which some group caches the last
block, or that such a prefix begins with. A node's blocks, one a group, hold the same tokens.

    hit       the deepest prefix of a prompt that is valid in every group. A group whose tokens read
              everything needs all blocks before the hit; one with a window those in the window,
              whatever became of the ones before; one of states the copy that was kept at the hit,
              its checkpoint. Those are few: between them blocks are found that are no hit.
    listed    by the directory: prefixes of so many tokens, at which a hit ends; where there are
              states, at or soon behind which one does.
    evicted   a block that was taken for something else. Where some group reads everything, nothing
              behind it can be hit any more: all of that is lost with it. A windowed group's block
              goes alone.
    dropped   a block that is corrupt takes with it all that was computed from it: in every group,
              all blocks from its position on.

A node whose blocks are gone stays as long as others descend from it: by way of it they are lost
when a block before it is dropped, and are valid again when its blocks come back.

Bookkeeping only, as block_pool.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from baton.shared.kv.block_hash import stride_blocks
from baton.shared.kv.block_pool import NO_BLOCK, Block, BlockPool, DigestRow, check
from baton.shared.kv.cache_spec import CacheGroup


@dataclass(slots=True, eq=False)
class Node:
    """The prefix that ends with the block at `index`."""

    chain_hash: bytes
    index: int
    blocks: list[int]
    """By group: the block that is found here, or NO_BLOCK."""
    parent: Node | None
    """The prefix that is shorter by a block; None for a prompt's first."""
    children: set[Node] = field(default_factory=set)
    token_ids: tuple[int, ...] = ()
    """Of its last block; none as long as no block was found here."""
    is_listed: bool = False
    """A hit that ends here is valid, and counts at the prefix that the directory lists for it."""
    num_listed: int = 0
    """Of these, how many there are for which the directory lists this prefix."""

    @property
    def is_empty(self) -> bool:
        return all(block_id == NO_BLOCK for block_id in self.blocks)


@dataclass(slots=True)
class CacheChanges:
    """Hashes that the directory is to list, and no longer to list, in order of first mention."""

    added: dict[bytes, None] = field(default_factory=dict)
    removed: dict[bytes, None] = field(default_factory=dict)


class PrefixCache:
    def __init__(
        self, groups: Sequence[CacheGroup], pools: Sequence[BlockPool], block_size: int
    ) -> None:
        """`pools`: by group, the pool that its blocks are of."""
        self._groups = tuple(groups)
        self._pools = tuple(pools)
        self._block_size = block_size
        self._stride = stride_blocks(block_size)
        numbers = range(len(self._groups))
        self._anchors = [n for n in numbers if self._groups[n].spec.reads_everything]
        """Groups that need every block before a hit."""
        self._windowed = [n for n in numbers if n not in self._anchors]
        self._has_states = not all(group.spec.grows for group in self._groups)
        self._nodes: dict[bytes, Node] = {}
        self._changes = CacheChanges()
        self._num_blocks = 0

    @property
    def num_cached(self) -> int:
        """Blocks that can be found."""
        return self._num_blocks

    # Finding

    def match(self, hashes: Sequence[bytes], token_ids: Sequence[int]) -> int:
        """Blocks of the deepest prefix of a prompt that is valid in every group.

        hashes: of the prompt's blocks that may be used. Token ids are compared too, so that a hash
        collision cannot serve another prompt's blocks.
        """
        return self.depth(self.walk(hashes, token_ids))

    def walk(self, hashes: Sequence[bytes], token_ids: Sequence[int]) -> list[Node]:
        """The deepest prefix that another prompt had, as far as is known here, block by block (of
        groups that read everything they are all there). Arguments as of `match`."""
        nodes: list[Node] = []
        tokens, block_size = tuple(token_ids), self._block_size
        first = 0
        for node in map(self._nodes.get, hashes):
            if node is None:
                break
            end = first + block_size
            # As `_may_have_tokens`: a prompt may have thousands of blocks.
            if node.token_ids and node.token_ids != tokens[first:end]:
                break
            if NO_BLOCK in node.blocks and not self._is_anchor(node):
                break
            nodes.append(node)
            first = end
        return nodes

    def depth(self, nodes: Sequence[Node]) -> int:
        """Blocks of the deepest hit among those of a `walk`."""
        node = nodes[-1] if nodes else None
        while node is not None:
            gap = self._gap(node)
            if gap is None:
                return node.index + 1
            # No hit between the two is valid either.
            node = gap.parent
        return 0

    def find(self, chain_hash: bytes, group: int, token_ids: Sequence[int]) -> int:
        """The block of one group that ends this prefix of `token_ids`, or NO_BLOCK."""
        [found] = self.find_each([chain_hash], group, token_ids)
        return found

    def find_each(self, hashes: Sequence[bytes], group: int, token_ids: Sequence[int]) -> list[int]:
        """By prefix of `token_ids`: the block of one group that ends it, or NO_BLOCK."""
        may_have_tokens = self._may_have_tokens
        return [
            node.blocks[group]
            if node is not None and may_have_tokens(node, token_ids)
            else NO_BLOCK
            for node in map(self._nodes.get, hashes)
        ]

    def _may_have_tokens(self, node: Node, token_ids: Sequence[int]) -> bool:
        """They are not known where nothing was found yet."""
        start = node.index * self._block_size
        known = node.token_ids
        return not known or known == tuple(token_ids[start : start + self._block_size])

    def _is_anchor(self, node: Node) -> bool:
        """Whether the groups that read everything have their blocks here."""
        for group in self._anchors:
            if node.blocks[group] == NO_BLOCK:
                return False
        return True

    def _gap(self, node: Node) -> Node | None:
        """The nearest prefix that lacks a block which a token behind the node reads in a windowed
        group; None: a hit that ends here is valid, for all other groups have all before it."""
        position = (node.index + 1) * self._block_size
        for group in self._windowed:
            first = self._first_needed(group, position)
            current: Node | None = node
            while current is not None and current.index >= first:
                if current.blocks[group] == NO_BLOCK:
                    return current
                current = current.parent
        return None

    def _first_needed(self, group: int, position: int) -> int:
        """Index in a prompt of the first block that a hit needs which ends at `position`."""
        return self._groups[group].spec.first_read(position) // self._block_size

    # Contents

    def seal(
        self,
        group: int,
        block_id: int,
        hashes: Sequence[bytes],
        index: int,
        token_ids: tuple[int, ...],
        digest: DigestRow | None,
        *,
        may_be_found: bool = True,
    ) -> bool:
        """The block at `index` of a sequence is full and final: it is found from now on, unless
        another one of its group is, a group that reads everything lacks the block before it, or
        `may_be_found` is False. Returns whether it is.

        hashes: of the sequence's blocks. token_ids: of this block. No sequence is moved over to
        another's block: tables change at their ends only.
        """
        block = self._pools[group].block(block_id)
        block.block_hash, block.digest, block.group = hashes[index], digest, group
        if not may_be_found:
            return False
        node = self._nodes.get(hashes[index]) or self._new_node(hashes, index)
        if node is None or node.blocks[group] != NO_BLOCK:
            return False
        node.blocks[group], node.token_ids = block_id, token_ids
        block.node = node
        self._num_blocks += 1
        for each in self._needing(node, group) if node.children else (node,):
            self._list_if_valid(each)
        return True

    def _new_node(self, hashes: Sequence[bytes], index: int) -> Node | None:
        """With all before it that are not there. None where a group that reads everything lacks the
        block before it."""
        parent = self._nodes.get(hashes[index - 1]) if index else None
        if self._anchors and index and not (parent and self._is_anchor(parent)):
            return None
        first = index
        while first and parent is None:
            first -= 1
            parent = self._nodes.get(hashes[first - 1]) if first else None
        for at in range(first, index + 1):
            node = Node(hashes[at], at, [NO_BLOCK] * len(self._groups), parent)
            self._nodes[node.chain_hash] = node
            if parent is not None:
                parent.children.add(node)
            parent = node
        return parent

    def drop(self, group: int, block_id: int) -> list[tuple[int, int]]:
        """What the block holds is wrong: in every group, nothing from its position on is found any
        more; whoever holds such blocks keeps them.

        Also when another block with its hash is the one that is found: descendants do not tell from
        which of the two they were computed. Returns (group, block id) of all that is lost.
        """
        block = self._pools[group].block(block_id)
        node = None if block.block_hash is None else self._nodes.get(block.block_hash)
        block.block_hash = None
        return [] if node is None else self._forget_run(node)

    def evicted(self, block_id: int, block: Block) -> None:
        """The block is about to be taken for something else."""
        node = block.node
        if node is None:
            return
        if self._groups[block.group].spec.reads_everything:
            self._forget_run(node)
            return
        self._lose(node, block.group)
        for each in self._needing(node, block.group):
            self._unlist(each)
        self._prune(node)

    def take_changes(self) -> CacheChanges:
        """What changed since the last call, for the directory."""
        changes, self._changes = self._changes, CacheChanges()
        return changes

    def _lose(self, node: Node, group: int) -> int:
        block_id, node.blocks[group] = node.blocks[group], NO_BLOCK
        pool = self._pools[group]
        block = pool.block(block_id)
        block.node = block.block_hash = None
        self._num_blocks -= 1
        pool.lost(block_id)
        return block_id

    def _forget_run(self, node: Node) -> list[tuple[int, int]]:
        """Nothing that ends here or descends from here is found any more; returns (group, block id)
        of all that was."""
        lost = []
        doomed = [node]
        while doomed:
            current = doomed.pop()
            doomed.extend(current.children)
            del self._nodes[current.chain_hash]
            for group, block_id in enumerate(current.blocks):
                if block_id != NO_BLOCK:
                    lost.append((group, self._lose(current, group)))
            self._unlist(current)
        if node.parent is not None:
            node.parent.children.discard(node)
            self._prune(node.parent)
        return lost

    def _prune(self, node: Node) -> None:
        """A node goes that has no blocks, and from which none descends that has some."""
        current: Node | None = node
        while current is not None and current.is_empty and not current.children:
            del self._nodes[current.chain_hash]
            self._unlist(current)
            if current.parent is not None:
                current.parent.children.discard(current)
            current = current.parent

    # The directory

    def _list_if_valid(self, node: Node) -> None:
        if node.is_listed or (listed := self._listed_for(node)) is None:
            return
        if self._is_anchor(node) and self._gap(node) is None:
            node.is_listed = True
            listed.num_listed += 1
            if listed.num_listed == 1:
                self._changes.removed.pop(listed.chain_hash, None)
                self._changes.added[listed.chain_hash] = None

    def _listed_for(self, node: Node) -> Node | None:
        """The prefix by which the directory knows of a hit that ends at this node. States are kept
        anywhere: they are listed at the last prefix before them that may be."""
        current: Node | None = node
        while current is not None and (current.index + 1) % self._stride:
            current = current.parent if self._has_states else None
        return current

    def _needing(self, node: Node, group: int) -> Iterator[Node]:
        """Those at which a hit ends that needs the block of `group` at this node."""
        reaching = [node]
        while reaching:
            current = reaching.pop()
            position = (current.index + 1) * self._block_size
            if self._first_needed(group, position) <= node.index:
                yield current
                reaching.extend(current.children)

    def _unlist(self, node: Node) -> None:
        listed = self._listed_for(node) if node.is_listed else None
        if listed is None:
            return
        node.is_listed = False
        listed.num_listed -= 1
        if listed.num_listed == 0:
            self._changes.added.pop(listed.chain_hash, None)
            self._changes.removed[listed.chain_hash] = None

    def check_integrity(self) -> None:
        """Raises AssertionError with what is wrong."""
        num_blocks = 0
        listed = Counter(self._listed_for(node) for node in self._nodes.values() if node.is_listed)
        for node in self._nodes.values():
            check(node.num_listed == listed[node], f"node {node.index}: {node.num_listed} listed")
        for chain_hash, node in self._nodes.items():
            what = f"node {node.index} {chain_hash.hex()[:8]}"
            check(node.chain_hash == chain_hash, f"{what}: found by a wrong hash")
            if node.is_empty:
                check(not self._anchors and bool(node.children), f"{what}: without blocks")
            else:
                check(len(node.token_ids) == self._block_size, f"{what}: not full")
            for group, block_id in enumerate(node.blocks):
                if block_id == NO_BLOCK:
                    continue
                num_blocks += 1
                block = self._pools[group].block(block_id)
                is_linked = block.node is node and block.group == group
                check(is_linked and block.block_hash == chain_hash, f"{what}: block {block_id}")
            parent = node.parent
            if parent is None:
                check(node.index == 0, f"{what}: found, its parent not")
                continue
            check(self._nodes.get(parent.chain_hash) is parent, f"{what}: orphan")
            check(node in parent.children, f"{what}: its parent does not know it")
            check(parent.index == node.index - 1, f"{what}: behind {parent.index}")
            is_behind = not self._anchors or self._is_anchor(parent)
            check(is_behind, f"{what}: found, a block before it not")
        check(num_blocks == self._num_blocks, f"{num_blocks} blocks found, not {self._num_blocks}")
        known = sum(len(node.children) for node in self._nodes.values())
        check(
            known == sum(node.parent is not None for node in self._nodes.values()),
            "parents and children disagree",
        )
