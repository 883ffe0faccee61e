"""Text of the demo model: gathers and splits documents, trains the tokenizer, writes streams.

The text root is a folder into which Debian packages were unpacked (`dpkg -x`): bible-kjv,
bible-kjv-text, python3.11-doc, libpython3.11-minimal, libpython3.11-stdlib. models/demo/README.md
gives the commands.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

log = logging.getLogger("demo_model")

VOCAB_SIZE = 4096
BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END)

SOURCES = ("kjv", "pydocs", "stdlib")
HELD_OUT_ONE_IN = 20
NUM_CHATS = 6000

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The tables in encodings, entities and topics are data, or repeat the documentation.
STDLIB_SKIP = re.compile(
    r"^(encodings|test|pydoc_data)/|^html/entities\.py$|^_sysconfigdata|/site-packages/"
)
# Names and addresses of people are not for a model to learn.
RST_AUTHOR = re.compile(r"^\.\. (section|module)author::.*\n", re.MULTILINE)

BOOKS = """Ge Genesis|Exo Exodus|Lev Leviticus|Num Numbers|Deu Deuteronomy|Josh Joshua|Jdgs Judges
Ruth Ruth|1Sm 1 Samuel|2Sm 2 Samuel|1Ki 1 Kings|2Ki 2 Kings|1Chr 1 Chronicles|2Chr 2 Chronicles
Ezra Ezra|Neh Nehemiah|Est Esther|Job Job|Psa Psalm|Ps Psalm|Prv Proverbs|Eccl Ecclesiastes
SSol Song of Solomon|Isa Isaiah|Jer Jeremiah|Lam Lamentations|Eze Ezekiel|Dan Daniel|Hos Hosea
Joel Joel|Amos Amos|Obad Obadiah|Jonah Jonah|Mic Micah|Nahum Nahum|Hab Habakkuk|Zep Zephaniah
Hag Haggai|Zec Zechariah|Mal Malachi|Mat Matthew|Mark Mark|Luke Luke|John John|Acts Acts|Rom Romans
1Cor 1 Corinthians|2Cor 2 Corinthians|Gal Galatians|Eph Ephesians|Phi Philippians|Col Colossians
1Th 1 Thessalonians|2Th 2 Thessalonians|1Tim 1 Timothy|2Tim 2 Timothy|Titus Titus|Phmn Philemon
Heb Hebrews|Jas James|1Pet 1 Peter|2Pet 2 Peter|1Jn 1 John|2Jn 2 John|3Jn 3 John|Jude Jude
Rev Revelation"""
BOOK_NAMES = dict(entry.split(" ", 1) for entry in re.split(r"[|\n]", BOOKS))
VERSE = re.compile(r"^([1-3]?[A-Z][A-Za-z]*)(\d+):(\d+) (.*)$")


@dataclass(frozen=True)
class Document:
    """One KJV chapter, one documentation page or one Python module."""

    source: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def gather_documents(text_root: Path) -> list[Document]:
    """All documents in a fixed order, chapters in the order of the book.

    Raises:
        FileNotFoundError: a package is not unpacked under `text_root`.
        ValueError: the verses have a form that this reader does not know.
    """
    documents = [*_read_kjv(text_root), *_read_pydocs(text_root), *_read_stdlib(text_root)]
    missing = set(SOURCES) - {document.source for document in documents}
    if missing:
        raise FileNotFoundError(f"{text_root} has no text of: {', '.join(sorted(missing))}")
    return documents


def _read_kjv(text_root: Path) -> list[Document]:
    reader = text_root / "usr/bin/bible"
    if not reader.is_file():
        raise FileNotFoundError(f"{reader} is missing: unpack bible-kjv and bible-kjv-text")
    command = [str(reader), "-f", "-p", str(text_root / "usr/lib"), "Ge1:1-Rev22:21"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters: dict[str, list[str]] = defaultdict(list)
    for line in output.splitlines():
        match = VERSE.match(line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        book, chapter, _, verse = match.groups()
        chapters[f"{BOOK_NAMES[book]} {chapter}"].append(verse)
    return [
        Document("kjv", name, f"{name}\n\n" + "\n".join(verses) + "\n")
        for name, verses in chapters.items()
    ]


def _read_pydocs(text_root: Path) -> Iterable[Document]:
    root = text_root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        text = RST_AUTHOR.sub("", path.read_text(encoding="utf-8"))
        yield Document("pydocs", path.relative_to(root).as_posix(), text)


def _read_stdlib(text_root: Path) -> Iterable[Document]:
    root = text_root / "usr/lib/python3.11"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if text.strip() and not STDLIB_SKIP.search(name):
            yield Document("stdlib", name, text)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; every byte has a token, so that any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def chat_text(messages: Sequence[tuple[str, str]]) -> str:
    """What CHAT_TEMPLATE renders for (role, content) pairs without a generation prompt."""
    return BOS + "".join(f"<|{role}|>{content}{END}" for role, content in messages)


def make_chats(documents: Sequence[Document], num_chats: int, seed: int) -> list[str]:
    """Conversations in which the assistant continues the user's passage, by whole lines."""
    rng = random.Random(seed)
    by_source = {
        source: [[line for line in d.text.split("\n") if line.strip()] for d in group]
        for source in SOURCES
        if (group := [d for d in documents if d.source == source])
    }
    chats = []
    for _ in range(num_chats):
        lines = rng.choice(by_source[rng.choice(list(by_source))])
        cursor = rng.randrange(len(lines))
        messages = [("system", "Continue the text.")] if rng.random() < 0.2 else []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            for role, most in (("user", 4), ("assistant", 12)):
                step = rng.randint(1, most)
                passage = "\n".join(lines[cursor : cursor + step])
                if passage:
                    messages.append((role, passage))
                cursor += step
        if messages[-1][0] == "assistant":
            chats.append(chat_text(messages))
    return chats


def write_streams(text_root: Path, out: Path, seed: int) -> None:
    """Writes tokenizer.json, {train,heldout}_{source}.npy (uint16, [num_tokens]) and meta.json."""
    out.mkdir(parents=True, exist_ok=True)
    documents = gather_documents(text_root)
    train = [d for d in documents if not d.held_out]
    log.info("%d documents, %d of them held out", len(documents), len(documents) - len(train))
    tokenizer = train_tokenizer(d.text for d in train)
    tokenizer.save(str(out / "tokenizer.json"))
    log.info("tokenizer: %d tokens", tokenizer.get_vocab_size())

    texts: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        part = "heldout" if document.held_out else "train"
        texts[f"{part}_{document.source}"].append(document.text)
    meta = {}
    for stream, parts in texts.items():
        size = _write_stream(tokenizer, out / f"{stream}.npy", [f"{BOS}{t}{EOS}" for t in parts])
        num_bytes = sum(len(t.encode()) for t in parts)
        meta[stream] = {"documents": len(parts), "bytes": num_bytes, "tokens": size}
    chats = make_chats(train, NUM_CHATS, seed)
    size = _write_stream(tokenizer, out / "train_chat.npy", [c + EOS for c in chats])
    num_bytes = sum(len(c.encode()) for c in chats)
    meta["train_chat"] = {"documents": len(chats), "bytes": num_bytes, "tokens": size}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for stream, counts in meta.items():
        log.info("%-16s %s", stream, counts)


def _write_stream(tokenizer: Tokenizer, path: Path, texts: list[str]) -> int:
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    stream = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encodings])
    np.save(path, stream, allow_pickle=False)
    return len(stream)
