"""README and docs/: links lead somewhere, commands and names are there, and pages stay short."""

from __future__ import annotations

import contextlib
import io
import itertools
import queue
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from baton.loadtest.__main__ import run as run_load
from baton.services.gateway.metrics import GatewayMetrics
from baton.services.gateway.process import parse_args as gateway_args
from baton.services.launcher.__main__ import main as baton
from baton.services.worker.metrics import EngineMetrics, WorkerCollector
from baton.services.worker.process import parse_args as worker_args
from baton.shared.rpc.flags import variable_name

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
LINKED = [
    *PAGES,
    *(ROOT / each for each in ("clients/python/README.md", "benchmarks/README.md")),
    *(ROOT / "models").rglob("README.md"),
]
LONGEST_README = 150
WIDEST = 100

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`]+)`")
_PARAGRAPHS = re.compile(r"\n\s*\n|\n(?= *(?:[-|#*] |\d+\. ))")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_MODULE = re.compile(r"python3? -m ((?:baton|benchmarks|tests)[\w.]*)")
_NAME = r"[A-Za-z_][\w.]*"
_PATH = r"(?:[\w-]+/)*\w+\.(?:py|proto)\b"
_FOLDERS = "baton benchmarks clients deploy kernels loadtest models services shared tests".split()
_NOT_OURS = {
    *("--build", "--env", "--disable-pip-version-check", "--data-binary"),  # docker, pip, curl
    *("--strict", "--fix"),
}
_NO_METRICS = {"baton_client", "baton_paged"}  # a package, a function
_SOURCES = {".py", ".sh", ".yaml"}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(without_blocks(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set[Path](), [README]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            links = (link.partition("#")[0] for link in _LINK.findall(without_blocks(page)))
            left += [(page.parent / each).resolve() for each in links if each.endswith(".md")]
    assert set(DOCS) <= reached


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_lines_are_no_wider_than_code(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        is_table = line.lstrip().startswith("|")
        assert is_table or len(line) <= WIDEST, f"{relative(page)}:{number}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_are_there(page: Path) -> None:
    for words in commands(page):
        check_command(words)
    for module in _MODULE.findall(" ".join(page.read_text(encoding="utf-8").split())):
        assert source_of(module).is_file(), module
    for code in inline_codes(page):
        if re.match(r"(?:baton|python3? -m) [a-z]", code):
            check_command(shlex.split(code))
        for flag in _FLAG.findall(code):
            assert flag in all_flags(), f"{flag} in `{code}`"
        for target in re.findall(r"^(?:[A-Z_]+=\S+ )?make ([a-z][a-z0-9-]*)", code):
            assert target in make_targets(), code


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_of_code_are_there(page: Path) -> None:
    """`ClassName`, `function_of_ours` and file.py are in some file of ours; `function` (file.py) is
    in that one."""
    text = _LINK.sub("]", without_blocks(page))
    for name in re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*\w+\.(?:py|proto|sh|yaml))\b", text):
        assert is_file_of_ours(name), name
    flat = " ".join(text.split())
    for code, name in re.findall(rf"`({_NAME})`,? \(?({_PATH})", flat):
        assert is_in(code, [name]), f"{code} ({name})"
    for row in re.findall(r"^\|(.*\.py) \|$", text, re.MULTILINE):
        cells, _, files = row.rpartition(" | ")
        if "test_" in files:
            continue  # of other projects' reports
        for code in re.findall(rf"`({_NAME})`", cells):
            assert is_in(code, re.findall(_PATH, files)), f"{code} ({files})"
    for code in inline_codes(page):
        if re.fullmatch(r"_?[A-Z][a-z]+[A-Z]\w*(?:\._?\w+)?|_?[a-z]+(?:_[a-z]+)+", code):
            known = words_of_code() | metrics()
            assert code in known or known.issuperset(code.split(".")), code


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_metrics_are_told_and_variables_read(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:vllm:|baton_)[a-z_]+[a-z](?![\w*])", text):
        assert name in metrics() or name in _NO_METRICS, name
    for name in re.findall(r"\bBATON_[A-Z_]+[A-Z]\b", text):
        assert name in variables(), name


def test_each_word_has_one_meaning() -> None:
    rows = re.findall(r"^\| (\*\*.*?) \|", (ROOT / "docs/glossary.md").read_text(), re.M)
    words = [word for row in rows for word in re.findall(r"\*\*(.+?)\*\*", row)]
    assert len(words) > 60 and len(set(words)) == len(words)


def check_command(words: list[str]) -> None:
    """Of what is ours: its target, module or subcommand, and its flags."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        for word in rest:
            name, is_variable, _ = word.partition("=")
            assert name in (make_variables() if is_variable else make_targets()), words
    elif program == "baton":
        assert set(flags) <= help_flags(rest[0]), words
    elif program.startswith("python") and rest[:1] == ["-m"]:
        known = {"baton.services.gateway": "gateway", "baton.services.worker": "worker"}
        if rest[1] in known:
            assert set(flags) <= {"--help", *help_flags(known[rest[1]])}, words
        elif rest[1].partition(".")[0] in _FOLDERS:
            # Its own flags, or those that it shares with its neighbours.
            beside = source_of(rest[1]).parent.glob("*.py")
            source = "".join(path.read_text(encoding="utf-8") for path in beside)
            assert all(f'"{flag}"' in source for flag in flags), words
    elif program.startswith("python") and rest:
        assert (ROOT / rest[0]).is_file(), words
    elif "/" in program and not program.startswith("/"):
        assert (ROOT / program).is_file(), words


@cache
def help_flags(command: str) -> frozenset[str]:
    """The flags that --help of a subcommand or a role names."""
    parsers = {"load": run_load, "gateway": gateway_args, "worker": worker_args}
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        if command in parsers:
            parsers[command](["--help"])
        else:
            baton([command, "--help"])
    assert ended.value.code == 0
    return frozenset(_FLAG.findall(out.getvalue()))


@cache
def all_flags() -> frozenset[str]:
    commands = "up generate chat models fetch status health load gateway worker".split()
    ours = itertools.chain.from_iterable(help_flags(each) for each in commands)
    others = itertools.chain.from_iterable(
        re.findall(r'"(--[a-z][a-z0-9-]+)"', path.read_text(encoding="utf-8"))
        for folder in ("benchmarks", "tests", "deploy", "loadtest")
        for path in (ROOT / folder).rglob("*.py")
    )
    return frozenset([*ours, *others, *_NOT_OURS])


@cache
def metrics() -> frozenset[str]:
    """Names in what gateways and workers answer to GET /metrics; of histograms without endings."""
    registry = GatewayMetrics("demo").registry
    about = {"model_name": "demo", "worker_id": "decode-0"}
    registry.register(
        WorkerCollector(
            queue.SimpleQueue(),
            EngineMetrics(registry),
            about=about,
            path_rates=dict,
            is_directory_reachable=lambda: True,
            is_draining=lambda: False,
        )
    )
    return frozenset(
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
    )


@cache
def variables() -> frozenset[str]:
    flags = itertools.chain.from_iterable(map(help_flags, ("up", "gateway", "worker")))
    texts = [
        path.read_text(encoding="utf-8") for path in files_of_ours() if path.suffix in _SOURCES
    ]
    texts.append((ROOT / "Makefile").read_text(encoding="utf-8"))
    literal = itertools.chain.from_iterable(re.findall(r"BATON_[A-Z_]+", each) for each in texts)
    return frozenset([*map(variable_name, flags), *literal])


@cache
def make_targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^\.PHONY: (\S+)", text, re.MULTILINE))


@cache
def make_variables() -> frozenset[str]:
    text = "".join(
        (ROOT / each).read_text(encoding="utf-8")
        for each in ("Makefile", "compose.yaml", "compose.gpu.yaml", "deploy/compose.sh")
    )
    return frozenset(re.findall(r"\$[({]([A-Z_]+)", text))


@cache
def words_of_code() -> frozenset[str]:
    found = set[str]()
    for path in files_of_ours():
        if path.suffix in (".py", ".proto", ".jinja"):
            found |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(found)


@cache
def files_of_ours() -> tuple[Path, ...]:
    folders = [ROOT / each for each in (*_FOLDERS[1:], "protos", "examples")]
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return (*found, *ROOT.glob("*.yaml"))


def is_file_of_ours(name: str) -> bool:
    return any(str(path).endswith(f"/{name}") for path in files_of_ours())


def is_in(code: str, names: list[str]) -> bool:
    """Whether a file of one of these names has all words of `Class.method`."""
    ends = tuple(f"/{name}" for name in names)
    found = (path for path in files_of_ours() if str(path).endswith(ends))
    words = set(code.split("."))
    return any(words <= set(re.findall(r"\w+", path.read_text("utf-8"))) for path in found)


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    as_package = path / "__main__.py"
    return as_package if as_package.is_file() else path.with_suffix(".py")


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of its headings, as GitHub makes them."""
    found: list[str] = []
    for line in without_blocks(page).splitlines():
        if re.match("#+ ", line):
            title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip()).lower()
            slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            count = sum(
                re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found
            )
            found.append(f"{slug}-{count}" if count else slug)
    return frozenset(found)


def inline_codes(page: Path) -> Iterator[str]:
    """What stands in backticks, also over the end of a line."""
    for paragraph in _PARAGRAPHS.split(without_blocks(page)):
        yield from _INLINE.findall(" ".join(paragraph.split()))


def without_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """Of its blocks of shell: without what stands before (variables) and behind (pipes, `&`)."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, re.MULTILINE)
    shell = "".join(block for language, block in blocks if not language)
    for line in shell.replace("\\\n", " ").splitlines():
        if not re.match(r"(?:[A-Z_]+=\S* )*(?:make|python3?|\.venv/bin/\w+|\S+\.sh)\b", line):
            continue
        with contextlib.suppress(ValueError):
            words = shlex.split(line, comments=True)
            own = itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words)
            yield list(itertools.takewhile(lambda word: word not in ("|", "&", "&&"), own))
