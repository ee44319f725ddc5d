"""Rows on disk -> checked examples: one reader for every layout, over JSON lines, Parquet and Hugging Face folders.

`LAYOUTS` is the table of columns. Every row is read and checked once, when a source is opened. What stays in memory is
where each good row lies (32 bytes a row), and of Parquet the decoded columns; Arrow files are memory-mapped. Published
data whose columns have other names pass through an adapter first, a function from dict to dict.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import reprlib
import weakref
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

Layout = Literal[
    "sft",
    "pairs",
    "unpaired",
    "ranked",
    "beliefs",
    "dispreferred",
    "rollout",
    "code_tests",
    "unlearn",
    "membership",
    "steps",
]
Row = dict[str, Any]
# Layout -> required columns (of several ways, the first that a row has), optional columns; each is `name:kind`. A
# `[kind]` is a list of one or more, `_KINDS` has the rest. A `text` is a string or a list of messages, in all rows one.
LAYOUTS: Mapping[Layout, tuple[str, str]] = {
    "sft": ("messages:chat | prompt:text completion:text", "weight:weight base_logps:nums"),
    "pairs": (
        "prompt:text chosen:text rejected:text",
        "score_chosen:num score_rejected:num margin:num win:share ref_chosen_logps:num ref_rejected_logps:num "
        "weight:weight",
    ),
    "unpaired": ("prompt:text completion:text label:bool", "ref_logps:num ref_kl_logps:num weight:weight"),
    "ranked": ("prompt:text responses:[response]", ""),
    "beliefs": (
        "prompt:text beliefs:[str] belief_probs:[share] belief_id:index chosen:text rejected:text",
        "rejected_belief_id:index context:words weight:weight",
    ),
    "dispreferred": (
        "prompt:text rejected:text self_samples:[text]",
        "ref_rejected_logps:num ref_self_logps:[num] weight:weight",
    ),
    "rollout": ("prompt:text", ""),
    "code_tests": ("prompt:text codes:[str] tests:[str] passed:[[bit]]", "entry_point:str"),
    "unlearn": (
        "name:str question:str answer:str split:forget",
        "original_answer:str refusal:str eval:bool weight:weight",
    ),
    "membership": ("text:str label:bit", "split:probe"),
    # A label is what a step is worth, 0 to 1, or -1, 0, 1 (`StepsConfig.scale` says which); null is not known. `soft`
    # is a second opinion, the share that `labels` was rounded from.
    "steps": ("prompt:text steps:[str] labels:[mark]", "soft:[mark] answer:str outcome:bit source:words weight:weight"),
}
_LINES = (".jsonl", ".json")
_SPLITS = {"train", "validation", "valid", "val", "dev", "eval", "test"}
_REPR = reprlib.Repr()
_REPR.maxlist, _REPR.maxstring = 20, 60
_brief = _REPR.repr  # whatever a file holds, a message stays short


class DataError(ValueError):
    """Data that cannot be read, or are not of the layout."""


class BadRow(NamedTuple):
    """A row that was left out."""

    where: str  # "file.jsonl:17", lines counted from 1; in Parquet and Arrow "file.parquet:row 16", rows from 0
    message: str  # what was found; expected what


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Random access to checked rows, from any number of threads; made by `open_examples`.

    A row is read from its file each time, as plain Python values in the columns of its layout. Columns that the layout
    does not know are kept; known ones that are null are left out.
    """

    layout: Layout
    skipped: tuple[BadRow, ...]
    files: tuple[Path, ...]
    _index: np.ndarray  # int64 [rows, 4]: which file, two numbers that find the row in it, its line or row number
    _readers: tuple[Callable[[int, int], Row], ...]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Row:
        """Example `i`; DataError if the file has changed since it was opened so that the row cannot be read."""
        file, place, size, _ = self._index[range(len(self))[i]].tolist()
        try:
            return _fit(self._readers[file](place, size), self.layout)
        except DataError as error:
            raise DataError(f"{self.where(i)}: {error}. The file has changed: open it again.") from error

    def where(self, i: int) -> str:
        """File and line (or row) of example `i`."""
        file, _, _, number = self._index[range(len(self))[i]].tolist()
        return _where(self.files[file], number)


def open_examples(
    path: str | os.PathLike[str],
    layout: Layout | Literal["auto"] = "auto",
    *,
    on_bad_row: Literal["fail", "skip"] = "fail",
    split: str | None = None,
    progress: bool = False,
) -> Examples:
    """Open a data set, reading and checking every row once.

    Args:
      path: a file of JSON lines (.jsonl, .json) or Parquet; a folder of such files, read in the order of their names;
        or a folder that `datasets.save_to_disk` wrote.
      layout: what the rows are; "auto" tells by the columns of the first row that can be read.
      on_bad_row: "fail" raises one error for all malformed rows, "skip" leaves them out and lists them in `skipped`.
      split: of a DatasetDict ("train" if not given), or of a folder's files those that are named after it.
      progress: show a bar on a terminal.

    Raises:
      DataError: if the source cannot be read, the layout cannot be told, a row is malformed or none is good.
    """
    _choose("layout", layout, ["auto", *LAYOUTS])
    _choose("on_bad_row", on_bad_row, ["fail", "skip"])
    files, fixed = _find(Path(path), split), None if layout == "auto" else layout
    bad, bad_rows, chats, index, readers = [], 0, set(), array("q"), []
    with contextlib.ExitStack() as opened:
        for f, file in enumerate(files):
            read, places = (_open_lines if file.suffix in _LINES else _open_arrow)(file, opened)
            readers.append(read)
            for number, place, size in tqdm(places, file.name, unit=" rows", disable=None if progress else True):
                row, where = None, _where(file, number)
                try:
                    row = read(place, size)
                    fixed = fixed or _infer(row)
                    chats |= _check(_fit(row, fixed), fixed, chats)
                    index.extend((f, place, size, number))
                except DataError as error:
                    if fixed is None and row is not None:  # it can be read, and is of no layout
                        raise DataError(f"{where}: {error}") from None
                    bad_rows += 1
                    if on_bad_row == "skip" or bad_rows <= 10:
                        bad.append(BadRow(where, str(error)))
        rows = len(index) // 4
        if not rows and not bad_rows:
            raise DataError(f"{path}: no rows; expected at least one. Write some, or name another file.")
        if fixed is None or not rows or (bad_rows and on_bad_row == "fail"):
            listed = "".join(f"\n  {where}: {message}" for where, message in bad[:10])
            more = f"\n  and {bad_rows - 10} more" if bad_rows > 10 else ""
            remedy = "Correct them" + (', or leave them out with on_bad_row="skip".' if rows else ".")
            found = f"{bad_rows} of {rows + bad_rows} rows are malformed; expected {fixed or 'readable'} rows"
            raise DataError(f"{path}: {found}.{listed}{more}\n{remedy}")
        table = np.frombuffer(index, np.int64).reshape(-1, 4)
        examples = Examples(fixed, tuple(bad), tuple(files), table, tuple(readers))
        weakref.finalize(examples, opened.pop_all().close).atexit = False
    return examples


def gsm8k(row: Row) -> Row:
    """A question and its worked answer (GSM8K) as prompt and completion; `question` and `answer` stay."""
    _need(row, "question:str answer:str")
    return {**row, "prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def ultrafeedback(row: Row) -> Row:
    """UltraFeedback's `instruction` and `completions` as layout `ranked`; the rating is `overall_score`."""
    _need(row, "instruction:text completions:[object]")
    names = {"completion": "response", "rating": "overall_score", "source": "model"}
    responses = [{new: c[old] for new, old in names.items() if old in c} for c in row["completions"]]
    return {**row, "prompt": row["instruction"], "responses": responses}


def hh_rlhf(row: Row) -> Row:
    """Two whole dialogues without a `prompt` as layout `pairs`; the prompt is what both begin with.

    Of strings it ends behind the last "Assistant:" that opens a paragraph there, if there is one (HH-RLHF); of lists
    of messages it is the messages they share.
    """
    _need(row, "chosen:text rejected:text")
    chosen, rejected, turn = row["chosen"], row["rejected"], "\n\nAssistant:"
    if type(chosen) is not type(rejected):
        raise DataError(_MIXED.format("the row"))
    same, most = 0, min(len(chosen), len(rejected))
    while same < most:  # by halves: to compare slices is far faster than to compare characters
        middle = (same + most + 1) // 2
        same, most = (middle, most) if chosen[:middle] == rejected[:middle] else (same, middle - 1)
    if isinstance(chosen, str) and (at := chosen.rfind(turn, 0, same)) >= 0:
        same = at + len(turn)
    return {**row, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def gdpo(row: Row) -> Row:
    """The fields of the released GDPO data as layout `beliefs`.

    Belief k has `probabilities[k]`, and ids count from 0. A row tells the texts of two beliefs at most, those of its
    choices; every other belief, and all where the data have ids alone (movie reviews), has its id for a text. `chosen`
    and `rejected` are the bare responses: the objective writes id and belief before them.
    """
    given = {name: value for name, value in row.items() if value is not None}
    _need(
        given,
        "probabilities:[share] accept_choice_id:id accept_response:text reject_response:text",
        "reject_choice_id:id",
    )
    texts, ids = [str(k) for k in range(len(row["probabilities"]))], {}
    for side, name in {"reject": "rejected_belief_id", "accept": "belief_id"}.items():  # the accepted text counts
        if f"{side}_choice_id" in given:
            ids[name] = k = int(row[f"{side}_choice_id"])
            texts[k : k + 1] = [row.get(f"{side}_choice") or str(k)][: len(texts) - k]
    responses = {"chosen": row["accept_response"], "rejected": row["reject_response"]}
    return {**row, **responses, **ids, "beliefs": texts, "belief_probs": row["probabilities"]}


def pairs_to_unpaired(row: Row) -> list[Row]:
    """One pair as two rows of layout `unpaired`, the chosen one first; other columns stay in both."""
    _need(row, "prompt:text chosen:text rejected:text")
    rest, rows = dict(row), []
    answers = {side: (rest.pop(side), rest.pop(f"ref_{side}_logps", None)) for side in ("chosen", "rejected")}
    for side, (text, logps) in answers.items():
        known = {} if logps is None else {"ref_logps": logps}
        rows.append({**rest, "completion": text, "label": side == "chosen", **known})
    return rows


def stepwise(row: Row) -> Row:
    """TRL's stepwise supervision, `completions` with a truth value each, as layout `steps`."""
    _need(row, "prompt:text completions:[str]")
    labels = row["labels"]
    marks = [int(v) if type(v) is bool else v for v in labels] if type(labels) is list else labels
    return {**row, "steps": row["completions"], "labels": marks}


def math_shepherd(row: Row) -> Row:
    """Math-Shepherd's two texts as layout `steps`: in `input` each step ends with a tag, in `label` with + or -."""
    _need(row, "input:str label:str")
    text, marked, tag = row["input"], row["label"], "\u043a\u0438"
    *parts, rest = text.split(tag)
    begin, at, labels = text.find("Step 1:"), 0, []
    for part in parts:
        at += len(part)
        labels.append({"+": 1, "-": 0}.get(marked[at : at + 1]))
        if marked[at - len(part) : at] != part or labels[-1] is None:
            found = _brief(marked[max(0, at - 20) : at + 20])
            raise DataError(f"`label` has {found}; expected the text of `input`, with + or - for every {tag!r}")
        at += 1
    if not parts or rest.strip() or not 0 < begin < len(parts[0]):
        expected = f"a question, then `Step 1:` and steps that end with {tag!r}"
        raise DataError(f"`input` is {_brief(text)}; expected {expected}")
    steps = [parts[0][begin:].strip(), *(part.strip() for part in parts[1:])]
    return {**row, "prompt": text[:begin].strip(), "steps": steps, "labels": labels}


def prm800k(row: Row) -> Row:
    """A solution of PRM800K as layout `steps`, with the ratings -1, 0, 1 for labels.

    Of several candidates for a step it is the chosen one; where none was, what a human wrote instead, which is good;
    else the first candidate, which is how solutions end whose error was found.
    """
    _need(row, "question:object label:object")
    question, label = row["question"], row["label"]
    fault = _object_fault("question.", {"problem": "str"}, {"ground_truth_answer": "str"}, question, [])
    if fault := fault or _object_fault("label.", {"steps": "[object]"}, {}, label, []):
        raise DataError(fault)
    steps, labels = [], []
    for i, step in enumerate(label["steps"]):
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is None and human is not None:
            steps.append(human.get("text") if type(human) is dict else human)
            labels.append(1)
            continue
        _need(step, "completions:[object]")
        if type(chosen or 0) is not int or not 0 <= (chosen or 0) < len(step["completions"]):
            most = len(step["completions"]) - 1
            raise DataError(f"`label.steps[{i}].chosen_completion` is {_brief(chosen)}; expected null, or 0 to {most}")
        steps.append(step["completions"][chosen or 0].get("text"))
        labels.append(step["completions"][chosen or 0].get("rating"))
    answer = {"answer": question["ground_truth_answer"]} if question.get("ground_truth_answer") else {}
    return {**row, "prompt": question["problem"], "steps": steps, "labels": labels, **answer}


def processbench(row: Row) -> Row:
    """A solution of ProcessBench as layout `steps`: `label` is its first wrong step, -1 if it has none."""
    _need(row, "problem:str steps:[str]")
    wrong, R = row["label"], len(row["steps"])
    if type(wrong) is not int or not -1 <= wrong < R:
        raise DataError(f"`label` is {_brief(wrong)}; expected the index of one of {R} steps, or -1")
    labels = [1] * R if wrong < 0 else [1] * wrong + [0] + [None] * (R - wrong - 1)
    return {**row, "prompt": row["problem"], "labels": labels}


# ----------------------------------------------------------------------------------------------------------- private
_ADAPTERS: tuple[tuple[Layout, Callable[[Row], Row], set[str]], ...] = (  # and the columns that call for them
    ("sft", gsm8k, {"question", "answer"}),
    ("rollout", gsm8k, {"question", "answer"}),
    ("ranked", ultrafeedback, {"instruction", "completions"}),
    ("pairs", hh_rlhf, {"chosen", "rejected"}),
    ("beliefs", gdpo, {"prompt", "accept_choice_id", "accept_response", "reject_response", "probabilities"}),
    ("steps", stepwise, {"prompt", "completions", "labels"}),
    ("steps", math_shepherd, {"input", "label", "task"}),
    ("steps", prm800k, {"labeler", "question", "label"}),
    ("steps", processbench, {"problem", "steps", "label"}),
)
_REWARDS = {"answer", "answers", "tests"}  # beside any other, `prompt` hides misspelt columns
_MIXED = "{} holds both strings and lists of messages; expected one of the two throughout"
_is_num = lambda v: type(v) in (int, float) and -1e300 < v < 1e300  # math.isfinite fails for a large int
_is_str = lambda v: type(v) is str and v != ""
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "str": (_is_str, "a string that is not empty"),
    "text": (_is_str, "a string that is not empty, or a list of messages"),
    "words": (lambda v: type(v) is str, "a string"),
    "bool": (lambda v: type(v) is bool, "true or false"),
    "bit": (lambda v: type(v) in (int, bool) and v in (0, 1), "0 or 1"),
    "num": (_is_num, "a finite number"),
    "nums": (_is_num, "a finite number, or a list of them"),
    "weight": (lambda v: _is_num(v) and v >= 0, "a finite number >= 0"),
    "share": (lambda v: _is_num(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "mark": (lambda v: v is None or (_is_num(v) and (v == -1 or 0 <= v <= 1)), "null, -1 or a number from 0 to 1"),
    "index": (lambda v: type(v) is int and v >= 0, "an integer >= 0"),
    "id": (lambda v: type(v) in (int, str) and re.fullmatch("[0-9]{1,9}", str(v)) is not None, "an integer >= 0"),
    "forget": (lambda v: v in ("forget", "retain"), "`forget` or `retain`"),
    "probe": (lambda v: type(v) is str and v.removeprefix("probe_") in ("train", "dev", "test"), "train, dev or test"),
}
_OBJECTS = {
    "object": ("", ""),
    "message": ("role:str content:words", ""),
    "response": ("completion:text rating:num", "source:words ref_logps:num"),
}
_columns = lambda spec: dict(column.split(":", 1) for column in spec.split())
_Forms = Mapping[Layout, list[dict[str, str]]]
_FORMS: _Forms = {layout: [_columns(f) for f in needed.split("|")] for layout, (needed, _) in LAYOUTS.items()}
_MORE = {layout: _columns(more) for layout, (_, more) in LAYOUTS.items()}
_KNOWN = {layout: {name for form in forms for name in form} | {*_MORE[layout]} for layout, forms in _FORMS.items()}
_PARTS = {kind: (_columns(needed), _columns(more)) for kind, (needed, more) in _OBJECTS.items()}


def _infer(row: Row) -> Layout:
    """The layout that the row has the columns of, unless it has those of another that needs these and more."""
    columns = {name for name, value in row.items() if value is not None}
    fits: dict[Layout, set[str]] = {}
    for layout, forms in _FORMS.items():
        ways = [{*form} for form in forms if form.keys() <= columns and layout != "rollout"]
        if ways:
            fits[layout] = ways[0]
        elif layout != "rollout" and (found := _adapter(layout, columns)):
            fits[layout] = found[1]
    if not fits and "prompt" in columns and (columns & _REWARDS or columns <= {"prompt", "id"}):
        return "rollout"
    best: list[Layout] = [name for name in fits if not any(fits[name] < more for more in fits.values())]
    if len(best) == 1:
        return best[0]
    known = set().union(*_KNOWN.values())
    near = ((name, difflib.get_close_matches(name, known, 1)) for name in sorted(columns - known))
    hints = "".join(f" Is {_brief(name)} meant to be {match[0]!r}?" for name, match in near if match)
    wanted = "".join(f"\n  {name}: {' | '.join(', '.join(form) for form in forms)}" for name, forms in _FORMS.items())
    found = f"columns {_brief(sorted(columns))} fit {' and '.join(best) or 'no layout'}"
    raise DataError(f"{found}; expected those of one.{hints} Rename columns, or say which layout it is:{wanted}")


def _adapter(layout: Layout, columns: Collection[str]) -> tuple[Callable[[Row], Row], set[str]] | None:
    """The adapter that these columns call for, and which of them; those of `unlearn` are no GSM8K."""
    for name, adapter, wanted in _ADAPTERS:
        other = adapter is gsm8k and not (_KNOWN["unlearn"] - wanted - {"weight"}).isdisjoint(columns)
        if name == layout and wanted <= {*columns} and not other:
            return adapter, wanted
    return None


def _fit(row: Row, layout: Layout) -> Row:
    """The row in the columns of the layout, adapted if it has others, without the known ones that are null."""
    row = {name: value for name, value in row.items() if value is not None or name not in _KNOWN[layout]}
    ready = any(form.keys() <= row.keys() for form in _FORMS[layout])
    found = None if ready else _adapter(layout, row)
    return found[0](row) if found else row


def _check(row: Row, layout: Layout, chats: set[bool]) -> set[bool]:
    """Refuse a malformed row; else whether its texts, if any, are lists of messages, as `chats` of those before."""
    form = next((form for form in _FORMS[layout] if form.keys() <= row.keys()), _FORMS[layout][-1])
    texts: list[Any] = []
    fault = _object_fault("", form, _MORE[layout], row, texts) or _mismatch(row, layout)
    kinds = {type(text) is list for text in texts}
    if not fault and len(kinds | chats) > 1:
        fault = _MIXED.format("the row" if len(kinds) > 1 else "with it, the data set")
    if fault:
        raise DataError(fault)
    return kinds


def _need(row: Row, required: str, optional: str = "") -> None:
    if fault := _object_fault("", _columns(required), _columns(optional), row, []):
        raise DataError(fault)


def _object_fault(at: str, required: Mapping, optional: Mapping, value: Any, texts: list) -> str | None:
    """What is wrong with an object; all texts in it are added to `texts`."""
    if type(value) is not dict:
        return f"`{at[:-1]}` is {_brief(value)}; expected an object"
    for name in (name for name in required if name not in value):
        near = "".join(f" (is {n!r} meant?)" for n in difflib.get_close_matches(name, value, 1))
        return f"no `{at}{name}` among columns {_brief([*value])}; expected {', '.join(required)}{near}"
    kinds = ((name, kind) for name, kind in (*required.items(), *optional.items()) if name in value)
    return next((fault for name, kind in kinds if (fault := _fault(f"{at}{name}", kind, value[name], texts))), None)


def _fault(at: str, kind: str, value: Any, texts: list) -> str | None:
    """What is wrong with a value of a kind, at a place in its row."""
    if kind in ("text", "chat"):
        texts.append(value)
    kind = {"text": "chat", "nums": "[num]"}.get(kind, kind) if type(value) is list else kind
    if kind in _OBJECTS:
        return _object_fault(f"{at}.", *_PARTS[kind], value, texts)
    if kind in _KINDS:
        test, expected = _KINDS[kind]
        return None if test(value) else f"`{at}` is {_brief(value)}; expected {expected}"
    item, fewest = "message" if kind == "chat" else kind[1:-1], 2 if kind == "[response]" else 1
    if type(value) is not list or len(value) < fewest:
        return f"`{at}` is {_brief(value)}; expected a list of {fewest} {item} or more"
    fault = next((fault for i, v in enumerate(value) if (fault := _fault(f"{at}[{i}]", item, v, texts))), None)
    if not fault and kind == "chat" and not any(message["content"] for message in value):
        return f"`{at}` is {_brief(value)}; expected a message that has content"
    return fault


def _mismatch(row: Row, layout: Layout) -> str | None:
    """Columns that are right alone and wrong together."""
    if layout == "sft" and "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        if "assistant" not in roles[1:]:
            return f"`messages` has roles {_brief(roles)}; expected one of `assistant` behind another"
    if layout == "beliefs":
        shares, n = row["belief_probs"], len(row["beliefs"])
        if len(shares) != n or abs(sum(shares) - 1) > 1e-3:
            return f"`belief_probs` is {_brief(shares)}, sum {sum(shares):g}; expected {n} numbers that sum to 1"
        for name in ("belief_id", "rejected_belief_id"):
            if row.get(name, 0) >= n:
                return f"`{name}` is {row[name]}; expected less than {n}, the number of beliefs"
    if layout == "code_tests":
        found, wanted = [len(bits) for bits in row["passed"]], [len(row["tests"])] * len(row["codes"])
        if found != wanted:
            return f"`passed` has rows of {_brief(found)}; expected codes x tests, {_brief(wanted)}"
    for name in ("labels", "soft") if layout == "steps" else ():
        if (number := len(row.get(name, row["steps"]))) != len(row["steps"]):
            return f"`{name}` has {number} values; expected {len(row['steps'])}, one for every step"
    if layout == "dispreferred" and len(row.get("ref_self_logps", row["self_samples"])) != len(row["self_samples"]):
        return f"`ref_self_logps` has {len(row['ref_self_logps'])} numbers; expected {len(row['self_samples'])}"
    for both in (("score_chosen", "score_rejected"), ("ref_chosen_logps", "ref_rejected_logps")):
        if layout == "pairs" and len(row.keys() & {*both}) == 1:
            return f"one of `{both[0]}` and `{both[1]}`; expected both or neither"
    return None


def _choose(what: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        near = "".join(f" Is {name!r} meant?" for name in difflib.get_close_matches(str(value), choices, 1))
        raise DataError(f"{what}: {_brief(value)}; expected one of {', '.join(choices)}.{near or ' Choose one.'}")


def _where(file: Path, number: int) -> str:
    return f"{file.name}:{'' if file.suffix in _LINES else 'row '}{number}"


def _find(path: Path, split: str | None) -> list[Path]:
    """The files of a source, in order."""
    if (path / "dataset_dict.json").exists():
        splits, name = _json(path / "dataset_dict.json").get("splits"), split or "train"
        _choose(f"{path}: split", name, [*filter(_is_str, splits)] if type(splits) is list else [])
        path, split = _inside(path, name), None
    saved = (path / "state.json").exists()
    if split is not None and (saved or path.is_file()):
        raise DataError(f"{path}: one data set, and split={split!r}; expected a folder of several. Leave `split` out.")
    if saved:
        return _find_arrow(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".parquet") and f.name[0] != ".")
        heads = [re.split("[-_.]", f.name)[0] for f in files]
        if split is not None:
            _choose(f"{path}: split", split, sorted({*heads}))
            files = [f for f, head in zip(files, heads, strict=True) if head == split]
        elif len(splits := sorted(_SPLITS & {*heads})) > 1:
            raise DataError(f"{path}: files of {' and '.join(splits)}; expected one split. Say split={splits[-1]!r}.")
        if len({f.suffix for f in files}) != 1:
            found = "both .jsonl and .parquet" if files else "no .jsonl, .parquet or state.json (of save_to_disk)"
            raise DataError(f"{path}: {found}; expected files of one format. Name a file, or another folder.")
        return files
    if path.is_file() and path.suffix in (*_LINES, ".parquet"):
        return [path]
    found = f"a file of type {path.suffix!r}" if path.exists() else "no such file or folder"
    remedy = "Unpack or convert it." if path.exists() else "Correct the path."
    raise DataError(f"{path}: {found}; expected .jsonl, .json, .parquet or a folder. {remedy}")


def _find_arrow(folder: Path) -> list[Path]:
    """The files of a folder that `save_to_disk` wrote."""
    state, remedy = _json(folder / "state.json"), "Save it again: dataset.flatten_indices().save_to_disk(folder)."
    for key in (key for key in state if key.startswith("_indices") and state[key]):
        raise DataError(f"{folder}: state.json has {_brief(key)}, a choice of rows; expected all of them. {remedy}")
    files = state.get("_data_files")
    names = [f.get("filename") for f in files if type(f) is dict] if type(files) is list else []
    if not names or not all(type(name) is str and name.endswith(".arrow") for name in names):
        raise DataError(f"{folder}: state.json lists {_brief(files)}; expected .arrow files. {remedy}")
    return [_inside(folder, str(name)) for name in names]


def _inside(folder: Path, name: str) -> Path:
    """What the folder itself holds under a name."""
    real = os.path.realpath(folder / name) if "\0" not in name else ""
    if os.path.dirname(real) != os.path.realpath(folder) or not os.path.exists(real):
        found = f"{folder}: names {_brief(name)}; expected what lies in this folder, no way out of it"
        raise DataError(f"{found}. Do not use this data set, or copy all of it.")
    return folder / name


def _json(path: Path) -> Row:
    try:
        return _parse(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}. Save the data set again.") from error


def _parse(raw: bytes) -> Row:
    """One JSON object; or DataError, with what it is instead."""
    try:
        value = json.loads(raw.decode())
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        fault = f"not {'UTF-8' if isinstance(error, UnicodeError) else 'JSON'} ({str(error)[-100:]})"
    else:
        if type(value) is dict:
            return value
        fault = _brief(value)
    hint = " (`jq -c .[]` makes lines of a list)" if raw.lstrip()[:1] == b"[" else ""
    raise DataError(f"{fault}; expected one JSON object a line{hint}")


def _open_lines(path: Path, opened: contextlib.ExitStack):
    """How to read a line, and an iterator over (line number, offset and size in bytes) of those that are not blank."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a readable file. Allow it.") from error
    opened.callback(os.close, fd)

    def places() -> Iterator[tuple[int, int, int]]:
        end = 0
        with open(fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, end - len(line), len(line)

    return lambda offset, size: _parse(os.pread(fd, size, offset)), places()


def _open_arrow(path: Path, _opened: contextlib.ExitStack):
    """How to read a row, and an iterator over (row number, batch, row in the batch)."""
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError as error:
        found = "Parquet or Arrow, and no pyarrow; expected it to be installed"
        raise DataError(f'{path}: {found}. Run: pip install "jaxaroo[arrow]"') from error
    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path, memory_map=True) as file:
                table = file.read()
        else:
            table = ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected {path.suffix[1:]}. Write it again.") from error
    batches = table.to_batches(max_chunksize=1024)

    def read(batch: int, i: int) -> Row:
        try:
            row = batches[batch].slice(i, 1)
            row.validate(full=True)
            return row.to_pylist()[0]
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"cannot be read ({error}); expected plain values") from error

    places = ((b, i) for b, batch in enumerate(batches) for i in range(batch.num_rows))
    return read, ((number, *place) for number, place in enumerate(places))
