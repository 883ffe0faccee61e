"""PrefixCache: which sealed blocks are found again, by the prefix that they end.

A tree of nodes, one for each prefix (a chain of block hashes) of which some group caches the last
block. A node's blocks, one a group, hold the same tokens.

    hit       the deepest prefix of a prompt that is valid in every group. A group whose tokens read
              everything needs all blocks before the hit; one with a window those in the window,
              whatever became of the ones before.
    evicted   a block that was taken for something else. Where some group reads everything, nothing
              behind it can be hit any more: all of that is lost with it. A windowed group's block
              goes alone.
    dropped   a block that is corrupt takes with it all that was computed from it: in every group,
              all blocks from its position on.

A node knows its nearest ancestor that is there, not always its parent: what descends from a dropped
block is found also where nodes between the two are gone.

Bookkeeping only, as block_pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from baton.shared.kv.block_hash import is_boundary
from baton.shared.kv.block_pool import NO_BLOCK, Block, BlockPool, DigestRow, check
from baton.shared.kv.cache_spec import CacheGroup


@dataclass(slots=True, eq=False)
class Node:
    """The prefix that ends with the block at `index`."""

    chain_hash: bytes
    index: int
    token_ids: tuple[int, ...]
    """Of its last block."""
    blocks: list[int]
    """By group: the block that is found here, or NO_BLOCK."""
    ancestor: Node | None
    """The nearest prefix of it that is there."""
    descendants: set[Node] = field(default_factory=set)
    """Those whose nearest ancestor this is."""
    is_listed: bool = False
    """By the directory: a hit that ends here is valid."""


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
        self._is_anchored = any(group.spec.reads_everything for group in groups)
        """Whether some group needs every block before a hit."""
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
        deepest = 0
        runs = [0] * len(self._groups)
        for index, chain_hash in enumerate(hashes):
            node = self._nodes.get(chain_hash)
            if node is not None and not self._has_tokens(node, token_ids):
                break
            for group, run in enumerate(runs):
                is_there = node is not None and node.blocks[group] != NO_BLOCK
                runs[group] = run + 1 if is_there else 0
            if self._is_anchored and node is None:
                break
            if self._covers(runs, index + 1):
                deepest = index + 1
        return deepest

    def find(self, chain_hash: bytes, group: int, token_ids: Sequence[int]) -> int:
        """The block of one group that ends this prefix of `token_ids`, or NO_BLOCK."""
        node = self._nodes.get(chain_hash)
        if node is None or not self._has_tokens(node, token_ids):
            return NO_BLOCK
        return node.blocks[group]

    def _has_tokens(self, node: Node, token_ids: Sequence[int]) -> bool:
        start = node.index * self._block_size
        return node.token_ids == tuple(token_ids[start : start + self._block_size])

    def _covers(self, runs: Sequence[int], depth: int) -> bool:
        """Whether a hit of `depth` blocks is valid; runs: by group, blocks that are there without
        a gap up to its end."""
        position = depth * self._block_size
        return all(
            run >= depth - group.first_block(position, self._block_size)
            for run, group in zip(runs, self._groups, strict=True)
        )

    # Contents

    def seal(
        self,
        group: int,
        block_id: int,
        hashes: Sequence[bytes],
        index: int,
        token_ids: tuple[int, ...],
        digest: DigestRow | None,
    ) -> None:
        """The block at `index` of a sequence is full and final: it is found from now on, unless
        another one of its group is, or a group that reads everything lacks the block before it.

        hashes: of the sequence's blocks. token_ids: of this block. No sequence is moved over to
        another's block: tables change at their ends only.
        """
        block = self._pools[group].block(block_id)
        block.block_hash, block.digest, block.group = hashes[index], digest, group
        node = self._nodes.get(hashes[index]) or self._new_node(hashes, index, token_ids)
        if node is None:
            return
        if node.blocks[group] == NO_BLOCK:
            node.blocks[group] = block_id
            block.node = node
            self._num_blocks += 1
        if is_boundary(index, self._block_size) and not node.is_listed:
            self._list_if_valid(node)

    def _new_node(
        self, hashes: Sequence[bytes], index: int, token_ids: tuple[int, ...]
    ) -> Node | None:
        ancestor = None
        for before in range(index - 1, -1, -1):
            ancestor = self._nodes.get(hashes[before])
            if ancestor is not None or self._is_anchored:
                break
        if self._is_anchored and index and not (ancestor and self._is_anchor(ancestor)):
            return None
        node = Node(hashes[index], index, token_ids, [NO_BLOCK] * len(self._groups), ancestor)
        self._nodes[node.chain_hash] = node
        if ancestor is not None:
            ancestor.descendants.add(node)
        return node

    def _is_anchor(self, node: Node) -> bool:
        """Whether the groups that read everything have their blocks here."""
        return all(
            block_id != NO_BLOCK or not group.spec.reads_everything
            for block_id, group in zip(node.blocks, self._groups, strict=True)
        )

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
        self._unlist_within_window(node, block.group)
        if all(each == NO_BLOCK for each in node.blocks):
            self._splice_out(node)

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
        if node.ancestor is not None:
            node.ancestor.descendants.discard(node)
        doomed = [node]
        while doomed:
            current = doomed.pop()
            doomed.extend(current.descendants)
            del self._nodes[current.chain_hash]
            for group, block_id in enumerate(current.blocks):
                if block_id != NO_BLOCK:
                    lost.append((group, self._lose(current, group)))
            self._unlist(current)
        return lost

    def _splice_out(self, node: Node) -> None:
        """A node without blocks goes; what descends from it hangs on its ancestor."""
        del self._nodes[node.chain_hash]
        for each in node.descendants:
            each.ancestor = node.ancestor
        if node.ancestor is not None:
            node.ancestor.descendants.discard(node)
            node.ancestor.descendants |= node.descendants

    # The directory

    def _list_if_valid(self, node: Node) -> None:
        depth, runs = node.index + 1, []
        for number, group in enumerate(self._groups):
            if group.spec.reads_everything:
                # All before it is there: else this node would not be.
                runs.append(depth if node.blocks[number] != NO_BLOCK else 0)
                continue
            wanted = depth - group.first_block(depth * self._block_size, self._block_size)
            runs.append(self._run_up_to(node, number, wanted))
        if self._covers(runs, depth):
            node.is_listed = True
            self._changes.removed.pop(node.chain_hash, None)
            self._changes.added[node.chain_hash] = None

    def _run_up_to(self, node: Node, group: int, most: int) -> int:
        """Blocks of a group that are there without a gap up to the node, counted up to `most`."""
        run, current, index = 0, node, node.index
        while run < most and current.index == index and current.blocks[group] != NO_BLOCK:
            run, index = run + 1, index - 1
            if current.ancestor is None:
                break
            current = current.ancestor
        return run

    def _unlist_within_window(self, node: Node, group: int) -> None:
        """Hits that needed the block of `group` at this node are valid no more."""
        reaching = [node]
        while reaching:
            current = reaching.pop()
            position = (current.index + 1) * self._block_size
            if self._groups[group].first_block(position, self._block_size) > node.index:
                continue
            self._unlist(current)
            reaching.extend(current.descendants)

    def _unlist(self, node: Node) -> None:
        if node.is_listed:
            node.is_listed = False
            self._changes.added.pop(node.chain_hash, None)
            self._changes.removed[node.chain_hash] = None

    def check_integrity(self) -> None:
        """Raises AssertionError with what is wrong."""
        num_blocks = 0
        for chain_hash, node in self._nodes.items():
            what = f"node {node.index} {chain_hash.hex()[:8]}"
            check(node.chain_hash == chain_hash, f"{what}: found by a wrong hash")
            check(len(node.token_ids) == self._block_size, f"{what}: not full")
            check(any(b != NO_BLOCK for b in node.blocks), f"{what}: without blocks")
            for group, block_id in enumerate(node.blocks):
                if block_id == NO_BLOCK:
                    continue
                num_blocks += 1
                block = self._pools[group].block(block_id)
                is_linked = block.node is node and block.group == group
                check(is_linked and block.block_hash == chain_hash, f"{what}: block {block_id}")
            if node.ancestor is None:
                check(not self._is_anchored or node.index == 0, f"{what}: found, its parent not")
                continue
            check(self._nodes.get(node.ancestor.chain_hash) is node.ancestor, f"{what}: orphan")
            check(node in node.ancestor.descendants, f"{what}: its ancestor does not know it")
            gap = node.index - node.ancestor.index
            check(gap == 1 or gap > 1 and not self._is_anchored, f"{what}: {gap} behind its parent")
        check(num_blocks == self._num_blocks, f"{num_blocks} blocks found, not {self._num_blocks}")
        known = sum(len(node.descendants) for node in self._nodes.values())
        check(
            known == sum(node.ancestor is not None for node in self._nodes.values()),
            "ancestors and descendants disagree",
        )

    def runs(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Index and blocks by group of every node, for tests."""
        for node in self._nodes.values():
            yield node.index, tuple(node.blocks)
