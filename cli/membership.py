"""`jaxaroo eval membership`: were these texts in the training data of this model?"""

import contextlib
import dataclasses
import json as jsonlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .output import UsageError, dumps, write_rows, write_whole

LEARNED = "Here"  # is given, and all that follows in a wrapped text is learned: at this border no tokenizer merges
LISTS = 8  # batches that training sorts by length and deals at random, see train/data/pipeline.py


def eval_membership(
    *,
    model: Path,
    data: Path,
    out: Path | None = None,
    proxy_epochs: int = 2,
    proxy_lr: float = 1e-3,
    proxy_batch: int = 100,
    choose_on: Literal["original", "proxy"] = "original",
    max_length: int = 512,
    batch: int = 16,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """How well a probe of hidden states tells texts that a model was trained on from others.

    A copy of the model, the proxy, is fine-tuned on the members of probe_train, and a probe learns to see what it has
    learned; the probe then judges the model itself. Beside it stand simpler ways, and one that looks at words alone.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: rows of layout `membership`: `text`, `label` (1 is a member) and `split` (probe_train, dev or test). Without
        splits 10, 20 and 70 % are dealt at random.
      out: folder for the proxy, the report and the scores; what was begun there is gone on with. Nothing is kept when
        not given.
      proxy_epochs: how often the proxy learns each member.
      proxy_lr: its learning rate, which is constant; results hang on it.
      proxy_batch: texts in one update at most. If there are more, all updates are smaller, so that each text is learned
        as often as every other.
      choose_on: whose states of the dev texts choose the layer.
      max_length: tokens of a text, with the question around it; more are cut off.
      batch: texts in one forward pass.
      dtype: of activations; float32 on CPU and bfloat16 elsewhere when not given.
      seed: of the splits and the proxy.
      json: print one JSON object.
    """
    import jax

    from ..infer.membership import chance_error, tpr_at_fpr
    from ..infer.step_metrics import auroc
    from ..models import hf
    from ..models.tokenizer import load_tokenizer

    least = {"--proxy-epochs": proxy_epochs, "--proxy-batch": proxy_batch, "--batch": batch}
    if wrong := next((name for name, value in least.items() if value < 1), None):
        raise UsageError(f"eval membership: {wrong} {least[wrong]}; expected at least 1.")
    config, tokenizer = hf.read_config(model), load_tokenizer(model)
    most = min(max_length, config.max_positions - 1)  # one is left for the end that the proxy learns
    parts, cut = _read(data, tokenizer, most, seed)
    train, test = parts["probe_train"], parts["test"]
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with _folder(out) as folder:
        members = [text for text, label in zip(train.wrapped, train.labels, strict=True) if label]
        rows, batches, size = proxy_rows(members, proxy_epochs, proxy_batch, jax.device_count())
        settings = _settings(model, folder, (batches * proxy_epochs, size, most + 1), proxy_lr, dtype, seed)
        outcome = _learn(settings, rows, progress=not json)
        if not outcome.finished:
            more = "" if out is None else "; go on with the same command"
            print(f"stopped at step {outcome.step} of the proxy{more}", file=sys.stderr)
            return 128 + (outcome.signal or 15)
        load = lambda folder: hf.load(folder, dtype=dtype)
        found = _ask(load, settings.out / "model", model, tokenizer, parts, choose_on, most, batch, not json)
        report = {
            "texts": {name: {"members": sum(p.labels), "others": p.labels.count(0)} for name, p in parts.items()},
            "max_length": most,
            "cut": cut,  # texts
            "layer": found.layer,
            "layers": config.num_layers,
            "dev_auroc": found.by_layer,
            "chosen_on": choose_on,
            "test": {
                name: {"auroc": auroc(values, test.labels), "tpr_at_5_fpr": tpr_at_fpr(values, test.labels, 0.05)}
                for name, values in found.scores.items()
            },
            "chance_error": chance_error(test.labels),
            "proxy": {"steps": settings.steps, "batch": size, "epochs": proxy_epochs, "learning_rate": proxy_lr},
        }
        if out is not None:
            _save(out, report, test, found.scores)
    print(dumps(report) if json else "\n".join(_table(report)))
    shift = max(report["test"][name]["auroc"] for name in ("words_dev", "words_probe_train"))
    if shift - 0.5 > 2 * report["chance_error"]:
        print(
            f"warning: words alone rank members above others (AUC {shift:.4f}): the texts differ, whatever the model "
            "has seen, and figures that are no higher prove nothing",
            file=sys.stderr,
        )
    return 0


def proxy_rows(
    members: Sequence[str], epochs: int, most: int, devices: int = 1
) -> tuple[list[dict[str, Any]], int, int]:
    """What the proxy learns from, laid out for training whose batches have as many streams as rows.

    Each stream then has one row a batch, and reads the rows of the file that stand a batch apart, in turn, `LISTS` of
    them at a time in random order. So each text is learned `epochs` times if a batch holds all texts, or if the updates
    fill whole lists. Rows that only fill up a batch have no weight.

    Args:
      members: wrapped texts.
      epochs: how often each is learned.
      most: texts in a batch.
      devices: that share a batch.

    Returns:
      Rows of layout `sft`, batches in an epoch, and rows in a batch.
    """
    batches = -(-len(members) // most)
    while batches > 1 and batches * epochs % LISTS:
        batches += 1
    size = -(-len(members) // (batches * devices)) * devices
    empty = {"prompt": LEARNED, "completion": " is", "weight": 0.0}
    rows = []
    for i in range(batches):
        part = [{"prompt": LEARNED, "completion": text.removeprefix(LEARNED)} for text in members[i::batches]]
        rows += part + [empty] * (size - len(part))
    return rows, batches, size


# ----------------------------------------------------------------------------------------------------------- private
class _Part(NamedTuple):
    """The texts of one split."""

    rows: list[int]  # of the data
    texts: list[str]
    wrapped: list[str]
    labels: list[int]


def _read(data: Path, tokenizer: Any, most: int, seed: int) -> tuple[dict[str, _Part], int]:
    """Every split, with at least two texts of either kind; and how many texts were cut."""
    from ..infer.membership import SPLITS, split_texts, wrap_within
    from ..train.data.formats import open_examples

    examples = open_examples(data, "membership", progress=True)
    rows = [examples[i] for i in range(len(examples))]
    labels = [int(row["label"]) for row in rows]
    named = [str(row.get("split", "")).removeprefix("probe_") for row in rows]
    if "" in named and any(named):
        raise ValueError(
            f"{examples.where(named.index(''))}: no `split`; expected one in every row or in none. Add it, or leave "
            "out all."
        )
    dealt = ["probe_train" if name == "train" else name for name in named] if any(named) else []
    dealt = dealt or split_texts(labels, seed=seed)
    parts, cut, home = {name: _Part([], [], [], []) for name in SPLITS}, 0, {}
    for i, (row, name) in enumerate(zip(rows, dealt, strict=True)):
        first = home.setdefault(row["text"], i)
        if labels[first] != labels[i]:
            raise ValueError(
                f"{examples.where(i)}: the text has label {labels[i]}, and {labels[first]} in {examples.where(first)}; "
                "expected one label for a text. Leave one out."
            )
        if dealt[first] != name:
            raise ValueError(
                f"{examples.where(i)}: the text of {name} stands in {dealt[first]} too ({examples.where(first)}); "
                "expected different texts. Leave one out."
            )
        if name == "test" and (size := len(tokenizer.encode(row["text"]))) < 2:
            raise ValueError(
                f"{examples.where(i)}: {row['text']!r:.60} has {size} token; expected two or more, to see how likely "
                "one is behind another. Leave it out."
            )
        wrapped, short = wrap_within(tokenizer, row["text"], most)
        cut += short
        part: Any = parts[name]  # type: ignore[index]
        for column, value in zip(part, (i, row["text"], wrapped, labels[i]), strict=True):
            column.append(value)
    for name, part in parts.items():
        members, others = sum(part.labels), part.labels.count(0)
        if min(members, others) < 2:
            raise ValueError(
                f"eval membership: {name} holds {members} members and {others} others; expected two of either at "
                "least. Give more texts, or other splits."
            )
    return parts, cut


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="jaxaroo-") as folder:
        yield Path(folder)


def _settings(
    model: Path, folder: Path, sizes: tuple[int, int, int], learning_rate: float, dtype: Any, seed: int
) -> Any:
    """Of the proxy's run: steps, rows of a batch, tokens of a row."""
    from ..train.checkpoint import CheckpointConfig
    from ..train.data.pipeline import BatchConfig
    from ..train.optimizer import OptimizerConfig
    from ..train.run import RunConfig

    steps, size, length = sizes
    return RunConfig(
        model=str(model.absolute()),
        data=str(folder / "proxy.jsonl"),
        out=folder / "proxy",
        steps=steps,
        seed=seed,
        dtype=dtype,
        remat="full",  # many whole texts in one update
        log_every=1,
        batch=BatchConfig(size=size, max_length=length, packing=False, shuffle=False, shards=size),
        optimizer=OptimizerConfig(learning_rate=learning_rate, schedule="constant"),
        checkpoint=CheckpointConfig(keep=1),
    )


def _learn(settings: Any, rows: list[dict[str, Any]], progress: bool) -> Any:
    """Begin the proxy's run, go on with it, or take what it has made already."""
    from ..train.run import Outcome, read_run, resume, start

    path, text = Path(settings.data), "".join(dumps(row) + "\n" for row in rows)
    if not (settings.out / "config.yaml").is_file():
        write_whole(path, text)
        return start("sft", settings, progress=progress)
    kind, then, _ = read_run(settings.out)
    old, new = (_flat(dataclasses.asdict(each)) for each in (then, settings))
    differ = [f"{name} was {old[name]!r} and is {new[name]!r}" for name in new if old[name] != new[name]]
    if kind != "sft":
        differ = [f"it is a run of `train {kind}`"]
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        differ.append("it learned from other texts")
    if differ:
        raise ValueError(
            f"eval membership: {settings.out} holds another proxy: {'; '.join(differ)}. Give the same settings and "
            "texts to use it, or choose another --out."
        )
    if (settings.out / "model").is_dir():
        print(f"using the proxy in {settings.out}", file=sys.stderr)
        return Outcome(settings.steps, True, None)
    return resume(settings.out, progress=progress)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What makes a proxy, by dotted names; where it lies does not."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in ("out", "data"):
            found[prefix + name] = value
    return found


class _Found(NamedTuple):
    """What models and words say of the test texts."""

    layer: int
    by_layer: list[float]  # AUC on dev
    scores: dict[str, Any]  # of each test text, float64


def _ask(
    load: Callable[[Path], Any],
    proxy: Path,
    model: Path,
    tokenizer: Any,
    parts: dict[str, _Part],
    choose_on: str,
    max_length: int,
    batch: int,
    progress: bool,
) -> _Found:
    """Train and choose the probe, and score the test texts; one model is in memory at a time."""
    import numpy as np

    from ..infer import membership as probing

    train, dev, test = (parts[name] for name in probing.SPLITS)
    how: Any = {"batch": batch, "progress": progress}
    look = lambda of, part, **more: probing.standardise(
        probing.last_activations(of, tokenizer, part.wrapped, **how, **more)
    )
    learned = load(proxy)
    probe = probing.fit_probe(look(learned, train), train.labels)
    seen = look(learned, dev) if choose_on == "proxy" else None
    del learned
    original = load(model)
    seen = look(original, dev) if seen is None else seen
    best, by_layer = probing.choose_layer(probing.probe_scores(seen, probe), dev.labels)
    at_best = look(original, test, layers=(best + 1,))
    logps = probing.token_logps(original, tokenizer, test.texts, max_length=max_length, **how)
    scores = {
        "probe": probing.probe_scores(at_best, probe[best : best + 1])[:, 0],
        "words_dev": probing.bag_of_words(dev.texts, dev.labels, test.texts),
        "words_probe_train": probing.bag_of_words(train.texts, train.labels, test.texts),
        "loss": np.array([probing.mean_logp(each) for each in logps]),
        "min_20": np.array([probing.min_k(each, 20) for each in logps]),
    }
    return _Found(best + 1, by_layer, scores)


def _save(out: Path, report: dict[str, Any], test: _Part, scores: dict[str, Any]) -> None:
    write_whole(out / "membership.json", jsonlib.dumps(report, indent=2) + "\n")
    columns = {"row": test.rows, "label": test.labels, **{name: values.tolist() for name, values in scores.items()}}
    lines = (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))
    write_rows(out / "scores.jsonl", lines)
    print(f"wrote {out / 'membership.json'} and {out / 'scores.jsonl'}", file=sys.stderr)


def _table(report: dict[str, Any]) -> Iterator[str]:
    names = {"words_dev": "words, from dev", "words_probe_train": "words, from probe_train", "min_20": "min-20 %"}
    yield f"{'':23}     AUC  TPR at 5 % FPR"
    for name, found in report["test"].items():
        yield f"{names.get(name, name):23}  {found['auroc']:.4f}  {found['tpr_at_5_fpr']:14.4f}"
    counts = [f"{n['members']} + {n['others']} in {name}" for name, n in report["texts"].items()]
    yield f"chance: 0.5 +- {report['chance_error']:.4f}; members + others: {', '.join(counts)}"
    if report["cut"]:
        yield f"{report['cut']} texts were cut at {report['max_length']} tokens"
    each = " ".join(f"{i}:{value:.4f}" for i, value in enumerate(report["dev_auroc"], 1))
    yield f"layer {report['layer']} of {report['layers']}, by AUC on dev in the {report['chosen_on']}: {each}"
