"""The rules of the tree, read with `ast`; every rule is then seen to fail on a tree with one planted fault."""

import ast
import collections
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {  # what a floor may import beside itself
    "sharding": [],
    "jaxlib_ext": ["sharding"],
    "models": ["sharding", "jaxlib_ext"],
    "train": ["sharding", "jaxlib_ext", "models"],
    "infer": ["sharding", "jaxlib_ext", "models"],
    "cli": ["", "sharding", "jaxlib_ext", "models", "train", "infer"],  # "" is the root __init__.py
    "": ["models", "infer"],
}
NOT_SOURCE = {"tests", "benchmarks", "notebooks", "proofs", "docs", "build", "dist", "quickstart-out"}
REFUSED = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "torch", "transformers"}
VAGUE = re.compile(r"_?(utils?|helpers?|common|misc|managers?)")
UNTESTED = {}  # path -> why its tests are elsewhere


def python_files(root):
    top = [d for d in root.iterdir() if d.is_dir() and d.name[0] != "." and d.name not in {"build", "dist"}]
    top = [d for d in top if not (d / "pyvenv.cfg").exists()]  # somebody's virtual environment
    return sorted([*root.glob("*.py"), *(f for d in top for f in d.rglob("*.py"))])


def sources(root):
    """Every module of the package, as (path relative to the root, syntax tree)."""
    for file in python_files(root):
        path = file.relative_to(root)
        if path.parts[0] not in NOT_SOURCE:
            yield path, ast.parse(file.read_text())


def imports(path, tree):
    """(line, "" for an absolute import or the floor reached, dotted name) of everything a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, None, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, None, node.module
        elif isinstance(node, ast.ImportFrom):
            up = len(path.parts) - node.level
            for alias in node.names:
                dotted = [*path.parts[: max(up, 0)], *(node.module or "").split("."), alias.name]
                dotted = [part for part in dotted if part]
                yield node.lineno, "outside" if up < 0 else dotted[0] if dotted[0] in BELOW else "", ".".join(dotted)


def floors(root):
    for path, tree in sources(root):
        floor = path.with_suffix("").parts[0].replace("__init__", "")
        for line, reached, name in imports(path, tree):
            where = f"{path}:{line} imports {name}"
            if reached is None and name.split(".")[0] in {"jaxaroo", *BELOW}:
                yield f"{where}; inside the package, imports are relative"
            elif reached is None and name.split(".")[0] in REFUSED:
                yield f"{where}; the package does without it"
            elif reached is not None and reached != floor and reached not in BELOW.get(floor, []):
                yield f"{where}; {floor or 'the root'} may import only {BELOW.get(floor)}"
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{path}:{node.value.lineno} allows pickles"
            if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and path != Path("__init__.py"):
                yield f"{path}:{node.lineno} imports by name, which no rule here can see"


def sizes_and_names(root):
    for file in python_files(root):
        path = file.relative_to(root)
        if (lines := len(file.read_text().splitlines())) > 600:
            yield f"{path}: {lines} lines; 600 is the most"
        yield from (f"{path}: {p} says nothing" for p in path.with_suffix("").parts if VAGUE.fullmatch(p.lower()))


def one_spelling_of_a_name(root):
    """A paper has one name in every folder, and one objective."""
    spellings = collections.defaultdict(set)
    objectives = collections.defaultdict(list)
    for path, _ in sources(root):
        if path.stem != "__init__":
            spellings[path.stem.lower().replace("_", "")].add(path.stem)
            if "objectives" in path.parts:
                objectives[path.stem].append(path)
    yield from (f"one name, several spellings: {sorted(s)}" for s in spellings.values() if len(s) > 1)
    yield from (f"one objective, several files: {sorted(map(str, p))}" for p in objectives.values() if len(p) > 1)


def mirrored_tests(root):
    for path, tree in sources(root):
        public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
        test = root / "tests" / path.parent / f"test_{path.name}"
        if public and str(path) not in UNTESTED and not (test.is_file() and "def test_" in test.read_text()):
            yield f"{path} has {public[0]} and no tests in {test.relative_to(root)}"


def packages(root):
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(["jaxaroo", *path.parent.parts]): path.parent for path, _ in sources(root)}
    yield from (f"pyproject.toml: packages lacks {name}" for name in sorted({*found} - {*listed}))
    yield from (f"pyproject.toml: packages lists {name}; no such folder" for name in sorted({*listed} - {*found}))
    for folder in found.values():
        init = root / folder / "__init__.py"
        tree = ast.parse(init.read_text()) if init.is_file() else ast.Module([], [])
        if not ast.get_docstring(tree):
            yield f"{folder}: expected an __init__.py whose docstring lists the files"
        if folder != Path() and len(tree.body) > 1:
            yield f"{folder}/__init__.py: expected a docstring and nothing else"


RULES = [floors, sizes_and_names, one_spelling_of_a_name, mirrored_tests, packages]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_the_tree_obeys(rule):
    assert not (faults := list(rule(ROOT))), "\n".join(faults)


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        (floors, "sharding/a.py", "from ..models import b"),
        (floors, "sharding/a.py", "from .. import models"),
        (floors, "models/b.py", "def f():\n    from ..train.c import x"),
        (floors, "models/b.py", "from .. import load"),
        (floors, "models/b.py", "from ... import load"),
        (floors, "train/c.py", "from ..infer.d import x"),
        (floors, "infer/d.py", "from ..train import c"),
        (floors, "infer/d.py", "from ..cli.main import main"),
        (floors, "infer/d.py", "from jaxaroo.models.b import x"),
        (floors, "infer/d.py", "import models.b"),
        (floors, "train/c.py", "import importlib\nimportlib.import_module('jaxaroo.infer.d')"),
        (floors, "__init__.py", "'Doc.'\nfrom .train.c import x"),
        (floors, "other/e.py", "from ..models.b import x"),
        *((floors, "models/b.py", f"def f():\n    import {name}") for name in sorted(REFUSED)),
        (floors, "models/b.py", "from torch.nn import Module"),
        (floors, "models/b.py", "np.load(path, allow_pickle=True)"),
        (sizes_and_names, "models/b.py", "x = 0\n" * 601),
        (sizes_and_names, "tests/models/test_b.py", "def test_b(): pass\n" * 601),
        *((sizes_and_names, f"models/{name}.py", "") for name in ["utils", "helpers", "common", "misc", "manager"]),
        (sizes_and_names, "models/utils/f.py", ""),
        (one_spelling_of_a_name, "train/double_round.py", ""),
        (one_spelling_of_a_name, "train/objectives/more/dpo.py", ""),
        (mirrored_tests, "train/g.py", "def f(): pass"),
        (mirrored_tests, "tests/models/test_b.py", "no_tests = 0"),
        (packages, "train/new/h.py", ""),
        (packages, "models/__init__.py", ""),
        (packages, "models/__init__.py", "'Doc.'\nfrom . import b"),
        (packages, "pyproject.toml", "[tool.setuptools]\npackages = ['jaxaroo']"),
    ],
)
def test_every_rule_sees_its_fault(rule, file, text, tmp_path):
    names = ["jaxaroo", *(f"jaxaroo.{n}" for n in ["sharding", "models", "train", "train.objectives", "infer", "cli"])]
    tree = {f"{n}.__init__".replace("jaxaroo.", "").replace(".", "/") + ".py": "'Doc.'" for n in names}
    tree |= {
        "pyproject.toml": f"[tool.setuptools]\npackages = {names}",
        "sharding/a.py": "",
        "models/b.py": "import jax\nfrom ..sharding.a import x\nfrom ..sharding import a\ndef f(): pass",
        "tests/models/test_b.py": "import torch\nimport jaxaroo.models.b\ndef test_b(): pass",
        "train/objectives/dpo.py": "from ...models import b\nfrom .. import state",
        "infer/doubleround.py": "from ..models.b import x",
        "cli/__init__.py": "'Doc.'",
        "cli/main.py": "from ..train.state import f\nfrom ..infer.doubleround import g\nfrom .. import __version__",
    }
    for change in ({}, {file: text}):
        for name, content in (tree | change).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        assert bool(list(rule(tmp_path))) == bool(change)
