"""Pages that are made from the project itself: every command, every public name, every results file, every notebook."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "cli": "The command",
    "train": "Training",
    "infer": "Inference",
    "models": "Models",
    "jaxlib_ext": "Operations",
    "sharding": "Meshes, processes and plans",
}
GROUPS = {  # of commands: the first word, and what they have in common
    "train": "Training",
    "label": "Labels of steps",
    "data": "Rows of other layouts",
    "eval": "Evaluation",
    "": "All others",
}


def write(folder: Path) -> None:
    """Write all generated pages into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    made = {"cli.md": commands(), "python.md": names_index(), "benchmarks.md": benchmarks()}
    made |= {"layouts.md": layouts(), "plans.md": plans()}
    made |= {f"python-{floor}.md": names(floor) for floor in FLOORS}
    folder.mkdir(parents=True)
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, folder / notebook.name)


def commands() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    from jaxaroo.cli.main import COMMANDS

    text = "# Commands\n\nWhat `jaxaroo COMMAND --help` says.\n"
    first = lambda name: name.split()[0] if " " in name and name.split()[0] in GROUPS else ""
    for group, title in GROUPS.items():
        text += f"\n## {title}\n"
        for name in (n for n in COMMANDS if first(n) == group):
            text += f"\n### `jaxaroo {name}`\n\n```text\n{help_of(name)}\n```\n"
    return text


def help_of(name: str) -> str:
    """What a command prints about itself."""
    from jaxaroo.cli.main import main

    kept = {key: os.environ.get(key) for key in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            main([*name.split(), "--help"])
    finally:
        for key, value in kept.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    if not (found := re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip()):
        raise ValueError(f"docs: `jaxaroo {name} --help` printed nothing.")
    return "\n".join(line.rstrip() for line in found.splitlines())


def names_index() -> str:
    """The package's own names, and where those of its floors are."""
    listed = "\n".join(f"python-{floor}" for floor in FLOORS)
    return (
        "# Python\n\nArrows point down only: `sharding <- jaxlib_ext <- models <- {train, infer} <- cli`. The names "
        "that most need stand at the top:\n\n```{eval-rst}\n.. automodule:: jaxaroo\n```\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )


def names(floor: str) -> str:
    """Every public name of a floor, module by module."""
    text = f"# {FLOORS[floor]}: `jaxaroo.{floor}`\n"
    for module in modules(floor):
        text += f"\n## `{module}`\n\n```{{eval-rst}}\n.. automodule:: jaxaroo.{module}\n   :members:\n```\n"
    return text


def modules(floor: str) -> list[str]:
    """Dotted names of its modules, folders first."""
    found = []
    for path in sorted((ROOT / floor).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


def layouts() -> str:
    """The table of what rows hold."""
    from jaxaroo.train.data.formats import LAYOUTS

    text = "| layout | columns | and perhaps |\n|---|---|---|\n"
    for name, (needed, optional) in LAYOUTS.items():
        ways = " or ".join(" ".join(f"`{column}`" for column in way.split()) for way in needed.split("|"))
        text += f"| `{name}` | {ways} | {' '.join(f'`{column}`' for column in optional.split())} |\n"
    return text


def benchmarks() -> str:
    """Every results file: what was asked, the command, the machine, the figures."""
    text = (
        "# Results files\n\nEvery figure in these pages stands in one of these files, beside the command, the machine, "
        "the versions and the commit it was measured with.\n"
    )
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        about = found.pop("environment", {})
        text += f"\n## {path.stem}\n\n{question(str(found.get('benchmark', path.stem)))}\n\n"
        text += f"`{about.get('command', '')}`, {about.get('date', '')[:10]}, commit `{about.get('commit', '')}`, on "
        text += f"{about.get('processor') or about.get('device')} ({about.get('cores')} cores; {about.get('device')}); "
        text += ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
        text += f". {{download}}`The whole file <../../benchmarks/results/{path.name}>`.\n\n"
        text += "| | |\n|---|---|\n"
        rows = list(figures(found))
        text += "".join(f"| {name} | {value} |\n" for name, value in rows[:40])
        text += f"| | and {len(rows) - 40} more |\n" if len(rows) > 40 else ""
    return text


def plans() -> str:
    """Tables of what steps of large models take, by model: memory a device, least time and what bounds it."""
    path = ROOT / "benchmarks" / "results" / "plans.json"
    known = json.loads(path.read_text(encoding="utf-8"))["plans"] if path.exists() else []
    text = ""
    for size in dict.fromkeys(row["request"]["model"].removeprefix("preset:") for row in known):
        of_size = [row for row in known if row["request"]["model"] == f"preset:{size}"]
        for decoding in (False, True):
            rows = [row for row in of_size if (row["request"]["what"] == "decode") == decoding]
            text += _table(f"{size}, {'decoding' if decoding else 'training'}", rows) if rows else ""
    return text


def question(name: str) -> str:
    """The first line of the benchmark that has this name, which is a question."""
    script = ROOT / "benchmarks" / f"{name.replace('-', '_')}.py"
    if not script.exists():
        return ""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").splitlines()[0]


def figures(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and numbers of nested results, one after the other."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
        return
    for key, inner in items:
        yield from figures(inner, f"{name}, {key}" if name else str(key))


def linked(text: str, root: Path) -> str:
    """Links to files beside `docs`, as links to what the site has of them."""

    def link(match: re.Match) -> str:
        label, target = match[1], match[2]
        path, anchor = target.partition("#")[0], target.partition("#")[2]
        parts = Path(path).with_suffix("").parts
        if path.startswith("benchmarks/results/"):
            return f"[{label}](/_generated/benchmarks.md#{Path(path).stem})"
        if path.startswith("notebooks/") and path.endswith(".ipynb"):
            return f"[{label}](/_generated/{Path(path).name})"
        if path.startswith("docs/"):
            return f"[{label}](/{path.removeprefix('docs/')}{'#' + anchor if anchor else ''})"
        if parts and parts[0] in FLOORS and path.endswith((".py", "/")):
            return f"{{py:mod}}`{label.strip('`')} <jaxaroo.{'.'.join(parts)}>`" if _module(root, parts) else label
        if (root / path).is_file():
            return f"{{download}}`{label.strip('`')} <../{path}>`"
        if (root / path).is_dir():
            return label
        raise ValueError(f"docs: {match[0]} points to {path}, which is not there.")

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)", link, text)


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose with `code` in it, not reStructuredText: what would be markup there is escaped, and what was
    laid out in columns stays as it is."""
    text = "\n".join(lines)
    if what == "module":
        as_it_is = lambda chunk: "::\n\n" + re.sub("(?m)^", "    ", chunk)
        text = "\n\n".join(as_it_is(c) if _aligned(c) else _escaped(c) for c in text.split("\n\n"))
    else:
        text = _escaped(text)
    lines[:] = text.split("\n")


# ----------------------------------------------------------------------------------------------------------- private
def _module(root: Path, parts: tuple[str, ...]) -> bool:
    path = root.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    """A row a kind of step, a column a pod."""
    asked = [row["request"] for row in rows]
    pods = {a["topology"]: f"`{a['topology']}`, `{a['mesh']}`, {a['batch']} x {a['seq']}" for a in asked}
    kinds = dict.fromkeys((a["what"], a["drafter"]) for a in asked)
    cells = {(a["what"], a["drafter"], a["topology"]): _cell(row) for a, row in zip(asked, rows, strict=True)}
    text = f"\n**{title}**\n\n| | {' | '.join(pods.values())} |\n|---|{'---|' * len(pods)}\n"
    for what, drafter in kinds:
        name = f"`{what}`" if drafter is None else f"`{what} --drafter {drafter}`"
        text += f"| {name} | {' | '.join(cells.get((what, drafter, pod), '') for pod in pods)} |\n"
    return text


def _cell(row: dict[str, Any]) -> str:
    if "total" not in row:
        return "refused"
    held = f"{row['total'] / 2**30:.2f} of {row['available'] / 2**30:.5g} GiB"
    if not row["fits"]:
        return f"{held}: does not fit"
    bound, share = row["bounds"]["bound_by"], row["bounds"]["most_utilisation"]
    seconds = row["bounds"]["seconds"]
    least = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"
    return f"{held}, {least} by {bound}" + (f", at most {100 * share:.0f} %" if share else "")


def _aligned(chunk: str) -> bool:
    """Whether a paragraph was laid out in columns: some lines are indented, or most have wide gaps."""
    lines = [line for line in chunk.splitlines() if line.strip()]
    gaps = sum(bool(re.search(r"\S {2,}\S", line)) for line in lines)
    return any(line[0].isspace() for line in lines) or (len(lines) > 1 and 2 * gaps > len(lines))


def _escaped(text: str) -> str:
    """With the stars, bars and underscores outside of code as themselves, and code that ends within a word."""
    cells = re.split(r"(`[^`]+`)", text)
    cells = [c if c.startswith("`") else re.sub(r"(?<![\\:])([*|_])(?=\S)", r"\\\1", c) for c in cells]
    after = [*cells[1:], ""]
    ends_inside = lambda cell, then: cell.startswith("`") and re.match(r"\w", then)
    return "".join(c + "\\ " if ends_inside(c, then) else c for c, then in zip(cells, after, strict=True))
