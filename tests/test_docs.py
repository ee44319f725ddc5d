"""What the pages say can be typed: every command of theirs is read and checked, every piece of Python run."""

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
from pathlib import Path

import jax
import pytest

from jaxaroo.cli.main import main
from jaxaroo.models import hf, reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (
    "DIR SMALL POLICY COMPLETER STRONGER ACTOR CRITIC DRAFTER/model HEAD/model RUN/model ORM/model QAT/model "
    "SFT/model policy/model STAGE1/model runs/first/model"
)
SFT = [{"prompt": "What is 1 + 1?\n", "completion": "It is 2."}] * 2
STEPS = {"prompt": "p", "steps": ["a", "b"], "answer": "2", "outcome": 0}
FORGET = {"name": "n", "question": "q", "answer": "a"}
CODES = {"prompt": "p", "codes": ["x", "y"], "tests": ["t"], "passed": [[1], [0]]}
ROWS = {
    "train test sft a b special general feedback": SFT,
    "problems attempts questions question": [{"prompt": "What is 1 + 1?", "answer": "2"}] * 2,
    "solutions labels kept weak outcomes held-out scored": [STEPS | {"labels": [1, label]} for label in (0, 1)],
    "pairs": [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2,
    "unpaired labelled answers": [{"prompt": p, "completion": "c", "label": p == "p"} for p in "pq"],
    "ranked": [{"prompt": "p", "responses": [{"completion": c, "rating": i} for i, c in enumerate("ab")]}] * 2,
    "code_tests": [CODES] * 2,
    "unlearn": [FORGET | {"split": split} for split in ("forget", "retain")],
    "texts": [{"text": f"t {label}", "label": label} for label in (0, 1)],
}


def blocks(page, *languages):
    """What stands in the code blocks of these languages, a line that ends with a backslash joined to its next."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(r"\\\n\s*", " ", text) for language, text in found if language in languages]


def commands(page):
    lines = itertools.chain.from_iterable(text.splitlines() for text in blocks(page, "", "bash", "sh"))
    found = [line.strip() for line in lines if line.strip().startswith("jaxaroo ")]
    return [line.replace("$'\\n'", "'\n'") for line in found if "--tyro-" not in line]


COMMANDS = sorted({line for page in PAGES for line in commands(page)})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which everything that the pages name is there, small."""
    folder, tokenizer = tmp_path_factory.mktemp("home"), byte_tokenizer()
    sizes = dict(embed_dim=16, ffn_dim=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=1024)
    cfg = DecoderConfig(vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, **sizes)
    params = init_params(cfg, jax.random.key(0))
    hf.save(folder / "DIR", Model(cfg, params))
    tokenizer.save(folder / "DIR")
    for name in FOLDERS.split()[1:]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "DIR")
    head = reward.RewardConfig(target=cfg, separator=reward.one_token(tokenizer, "<|sep|>"))
    judge = reward.RewardModel(head, {"model": params, "head": reward.init_head(head, jax.random.key(1))})
    for name in ("PRM/model", "VALUE/model"):
        (folder / name).parent.mkdir()
        reward.save(folder / name, judge, like=folder / "DIR")
    for names, rows in ROWS.items():
        for name in names.split():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("notes.txt", "calibration.txt"):
        (folder / name).write_text("some words " * 50)
    return folder


@pytest.mark.slow
@pytest.mark.optimizer
def test_every_command_of_the_pages_can_be_typed(home, monkeypatch):
    monkeypatch.chdir(home)
    before = sorted(home.rglob("*"))
    assert len(COMMANDS) > 60
    for line in COMMANDS:
        args = shlex.split(line.partition(" > ")[0], comments=True)[1:]
        said, complained = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                status = main([*args, "--dry-run"])
        except SystemExit as e:
            status = e.code
        assert status == 0, f"{line}\n{complained.getvalue()}"
        assert said.getvalue(), line
    assert sorted(home.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_every_piece_of_python_runs(page, home, monkeypatch):
    monkeypatch.chdir(home)
    (link := home / "Qwen2.5-0.5B-Instruct").is_symlink() or link.symlink_to(home / "DIR")
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {})


def sentences():
    """All text that the sources hold, piece by piece, as Python joins it."""
    for floor in ("cli", "train", "infer", "models", "jaxlib_ext", "sharding"):
        for file in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_that_are_explained_are_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.+)`$", page, re.M)
    foreign = {"RESOURCE_EXHAUSTED"}  # of JAX
    every = "\0".join(sentences())
    assert len(explained) > 10
    assert [text for text in explained if text not in every and text not in foreign] == []
