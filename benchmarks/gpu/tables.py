"""Renders what the benchmarks of this folder wrote as Markdown, for documents.

python -m benchmarks.gpu.tables FILE ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, nargs="+", help="JSON of engine, kernels or features")
    for path in parser.parse_args(argv).file:
        try:
            result = json.loads(path.read_text())
            text = render(result, path.name)
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"{path}: {error!r}")
        print(text)


def render(result: Mapping[str, Any], name: str) -> str:
    """What kind of result it is, is seen by what it has.

    Raises:
        KeyError, ValueError: it is none of these.
    """
    environment = result["environment"]
    machine = f"{environment.get('gpu', 'no GPU')}, torch {environment['torch']}"
    if "triton" in environment:
        machine += f", triton {environment['triton']}"
    lines = [f"`{name}`: {machine}, {environment.get('commit', 'no commit')}", ""]
    if "runs" in result:
        lines += _engine(result["runs"])
    elif "results" in result:
        lines += _kernels(result["results"])
    elif "points" in result:
        lines += _features(result)
    else:
        raise ValueError("is no result of engine, kernels or features")
    return "\n".join(lines) + "\n"


def _engine(runs: Mapping[str, Any]) -> list[str]:
    """A row a shape, a column a point."""
    names = list(dict.fromkeys(point for run in runs.values() for point in run["points"]))
    rows = []
    for shape, run in runs.items():
        cells = [shape]
        for name in names:
            point = run["points"].get(name)
            cells.append("" if point is None else _against_floor(point))
        rows.append(cells)
    ceilings = [
        f"- {shape}: copy {run['ceilings']['copy_tb_per_s']:.2f} TB/s, product "
        f"{run['ceilings']['matmul_tflop_per_s']:.0f} TFLOP/s, token budget {run['token_budget']}, "
        f"idle {_range(_all(run, 'idle_us'), 'µs')}, experts hit {_range(_all(run, 'experts_hit'))}"
        for shape, run in runs.items()
    ]
    return [*_table(["ms (floor, share)", *names], rows), "", *ceilings]


def _against_floor(point: Mapping[str, float]) -> str:
    share = point["floor_ms"] / point["ms"]
    return f"{point['ms']:.2f} ({point['floor_ms']:.2f}, {share:.0%})"


def _all(run: Mapping[str, Any], key: str) -> list[float]:
    return [point[key] for point in run["points"].values() if key in point]


def _range(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return "–"
    return f"{min(values):.1f} to {max(values):.1f} {unit}".strip()


def _kernels(results: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = []
    for each in results:
        if "error" in each:
            rows.append([each["kernel"], f"failed: {each['error'][:80]}", "", "", ""])
            continue
        share = f"{1 / each['times_floor']:.0%}" if "times_floor" in each else ""
        library = ""
        if "library" in each:
            library = f"{each['library_us']:.1f} {each['library']} (× {each['times_library']:.2f})"
        row = [each["kernel"], each["shape"], f"{each['us']:.1f}"]
        rows.append([*row, f"{each['floor_us']:.1f} {share}".strip(), library])
    return _table(["kernel", "shape", "µs", "floor, share", "library (ours / it)"], rows)


def _features(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            str(each["batch"]),
            each["rows ask for"],
            f"{each['ms']:.3f}",
            f"{each['more_ms']:+.3f}",
            f"{each['hidden']:.0%}" if "hidden" in each else "",
            f"{each['peak_mib']:.0f}" if "peak_mib" in each else "",
        ]
        for each in result["points"]
    ]
    header = ["batch", "rows ask for", "ms", "more", "of masks hidden", "peak MiB"]
    resident = [f"- {mib:.1f} MiB: {name}" for name, mib in result["resident_mib"].items()]
    title = f"{result['shape']}, contexts from {result['context']} on."
    return [title, "", *_table(header, rows), "", *resident]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
