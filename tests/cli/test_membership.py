"""`jaxaroo eval membership`: figures that are worked out again, a proxy that is used again, and what is refused.

The texts of one kind have other letters than those of the other, in words that occur once. A model that was never
trained shows that to a probe, and a count of words does not see it: nothing of what is found is membership.
"""

import contextlib
import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxaroo.cli.main import main
from jaxaroo.cli.membership import LEARNED, proxy_rows
from jaxaroo.infer import membership as probing
from jaxaroo.infer.step_metrics import auroc
from jaxaroo.models import hf
from jaxaroo.models.tokenizer import byte_tokenizer, load_tokenizer
from jaxaroo.train import run as runs
from jaxaroo.train.data.formats import open_examples
from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.data.tokenise import encode_sft

SHORT = ("--proxy-epochs", 3, "--proxy-lr", 1e-2)


def texts(seed, counts):
    """Rows, members and others by turns: words of five letters from either half of the alphabet, and one of both."""
    rng, rows = np.random.default_rng(seed), []
    for split, n in counts.items():
        for i in range(n):
            letters = list("abcdefghijklm" if i % 2 else "nopqrstuvwxyz")
            words = ("".join(rng.choice(letters, size=5)) for _ in range(3 + i % 6))
            both = rng.choice(["up", "down", "left", "right"])
            rows.append({"text": " ".join([*words, both]), "label": i % 2, "split": split})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def audit(run, home, *more):
    return run("eval", "membership", "--model", home / "model", "--data", home / "rows.jsonl", *SHORT, *more)


@pytest.fixture(scope="module")
def home(speaking, tmp_path_factory):
    """A model, rows, and the command's folder."""
    home = tmp_path_factory.mktemp("membership")
    shutil.copytree(speaking, home / "model")
    write(home / "rows.jsonl", texts(0, {"probe_train": 18, "dev": 12, "test": 40}))
    base = ["eval", "membership", "--model", home / "model", "--data", home / "rows.jsonl"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([str(arg) for arg in (*base, *SHORT, "--out", home / "out", "--json")]) == 0
    return home


def part(home, split):
    rows = [row for row in rows_of(home / "rows.jsonl") if row["split"] == split]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def states(home, model, split):
    folder = home / "out" / "proxy" / "model" if model == "proxy" else home / "model"
    wrapped = [probing.wrap(text) for text in part(home, split)[0]]
    return probing.standardise(probing.last_activations(hf.load(folder), load_tokenizer(folder), wrapped))


@pytest.mark.optimizer
@pytest.mark.proof
def test_the_report_is_worked_out_again_from_both_models(run, home):
    report = json.loads((home / "out" / "membership.json").read_text())
    probe = probing.fit_probe(states(home, "proxy", "probe_train"), part(home, "probe_train")[1])
    labels, models = part(home, "test")[1], {"original": None, "proxy": None}
    for where in models:
        status, out, err = audit(run, home, "--out", home / "out", "--choose-on", where, "--json")
        assert (status, f"using the proxy in {home / 'out' / 'proxy'}" in err, "warning" in err) == (0, True, False)
        models[where] = found = json.loads(out)
        scores = probing.probe_scores(states(home, where, "dev"), probe)
        by_layer = [auroc(column, part(home, "dev")[1]) for column in scores.T]
        assert found["dev_auroc"] == by_layer
        assert (found["layer"], found["layers"]) == (1 + by_layer.index(max(by_layer)), 2)
    assert models["original"] == report
    assert models["original"]["dev_auroc"] != models["proxy"]["dev_auroc"]

    audit(run, home, "--out", home / "out")
    scores = rows_of(home / "out" / "scores.jsonl")
    assert [row["row"] for row in scores] == list(range(30, 70))
    assert [row["label"] for row in scores] == labels
    column = lambda name: [row[name] for row in scores]
    judged = probing.probe_scores(states(home, "original", "test"), probe)[:, report["layer"] - 1]
    np.testing.assert_allclose(column("probe"), judged, rtol=1e-3, atol=1e-3)
    logps = probing.token_logps(hf.load(home / "model"), byte_tokenizer(), part(home, "test")[0])
    np.testing.assert_allclose(column("loss"), [np.mean(each) for each in logps], rtol=1e-5)
    least = [np.mean(np.sort(each)[: len(each) // 5]) for each in logps]
    np.testing.assert_allclose(column("min_20"), least, rtol=1e-5)
    for split in ("dev", "probe_train"):
        judged = probing.bag_of_words(*part(home, split), part(home, "test")[0])
        assert np.ptp(judged) > 0.1
        np.testing.assert_allclose(column(f"words_{split}"), judged)
    for name, found in report["test"].items():
        assert found["auroc"] == auroc(column(name), labels)
        assert found["tpr_at_5_fpr"] == probing.tpr_at_fpr(column(name), labels)
    assert report["texts"]["dev"] == {"members": 6, "others": 6}
    assert (report["cut"], report["chance_error"]) == (0, probing.chance_error(labels))
    assert report["test"]["probe"]["auroc"] > 0.95  # letters are in the states of any model
    assert abs(report["test"]["words_dev"]["auroc"] - 0.5) < 2 * report["chance_error"]  # and words know nothing


def test_a_folder_may_be_moved_and_splits_have_other_names_too(run, home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "moved")
    rows = [row | {"split": row["split"].removeprefix("probe_")} for row in rows_of(home / "rows.jsonl")]
    rows = [row | {"split": "probe_dev"} if row["split"] == "dev" else row for row in rows]
    data = write(tmp_path / "rows.jsonl", rows)
    base = ("eval", "membership", "--model", home / "model", "--data", data, *SHORT, "--out", tmp_path / "moved")
    with jax.numpy_dtype_promotion("standard"):
        status, out, err = run(*base, "--json")
    assert (status, "using the proxy" in err) == (0, True)
    assert json.loads(out) == json.loads((home / "out" / "membership.json").read_text())


def test_the_proxy_learned_the_members_of_probe_train_and_no_other_text(home):
    rows = rows_of(home / "out" / "proxy.jsonl")
    learned = [row["prompt"] + row["completion"] for row in rows if row.get("weight", 1)]
    members = [text for text, label in zip(*part(home, "probe_train"), strict=True) if label]
    assert learned == [probing.wrap(text) for text in members]
    kind, cfg, _ = runs.read_run(home / "out" / "proxy")
    assert (kind, cfg.steps, cfg.optimizer.schedule, cfg.optimizer.learning_rate) == ("sft", 3, "constant", 1e-2)
    assert learned_in(cfg.data, cfg.batch, cfg.steps, cfg.seed) == dict.fromkeys(learned, 3)
    said = [
        np.mean([probing.mean_logp(each) for each in probing.token_logps(hf.load(folder), byte_tokenizer(), learned)])
        for folder in (home / "model", home / "out" / "proxy" / "model")
    ]
    assert said[1] > said[0] + 0.3


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_proxy_that_was_stopped_goes_on_and_becomes_the_same(run, home, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def asked():
        yield lambda: signal.SIGTERM

    with monkeypatch.context() as patched:
        patched.setattr(runs, "stop_signals", asked)
        status, out, err = audit(run, home, "--out", tmp_path / "out")
    assert (status, out) == (143, "")
    assert "stopped at step 1 of the proxy; go on with the same command" in err
    status, out, _ = audit(run, home, "--out", tmp_path / "out", "--json")
    report = json.loads((home / "out" / "membership.json").read_text())
    assert (status, json.loads(out)) == (0, report)
    weights = Path("proxy") / "model" / "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (home / "out" / weights).read_bytes()


@pytest.mark.optimizer
def test_without_a_folder_nothing_is_kept_and_a_shift_of_words_is_warned_of(run, home, tmp_path, monkeypatch):
    kept = []

    def learn(settings, rows, progress):
        kept.append(settings.out)
        shutil.copytree(home / "model", settings.out / "model")
        return runs.Outcome(1, True, None)

    monkeypatch.setattr("jaxaroo.cli.membership._learn", learn)
    rows = [
        {"text": f"{row['text']} {'then' if row['label'] else 'now'}"} | {"label": row["label"]}
        for row in texts(1, {"": 80})
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    status, out, err = run("eval", "membership", "--model", home / "model", "--data", data, "--max-length", 100)
    assert (status, kept[0].parent.exists()) == (0, False)
    lines = out.splitlines()
    assert lines[0].split() == ["AUC", "TPR", "at", "5", "%", "FPR"]
    assert lines[2].split() == ["words,", "from", "dev", "1.0000", "1.0000"]
    assert [line.split()[0] for line in lines[1:6]] == ["probe", "words,", "words,", "loss", "min-20"]
    assert "4 + 4 in probe_train, 8 + 8 in dev, 28 + 28 in test" in lines[6]
    frame = len(probing.wrap("")) + 1  # and BOS
    assert lines[7] == f"{sum(len(row['text']) + frame > 100 for row in rows)} texts were cut at 100 tokens"
    assert lines[8].startswith("layer ")
    assert "warning: words alone rank members above others (AUC 1.0000): the texts differ" in err


def learned_in(data, settings, steps, seed, every=True):
    """How often training reads each text with a weight; `every` batch has to have one."""
    tokenizer = byte_tokenizer()
    stream = Batches(open_examples(Path(data), "sft"), lambda row: encode_sft(tokenizer, row), settings, seed=seed)
    learned = Counter()
    for _ in range(steps):
        batch = next(stream)
        assert batch.weights.any() or not every
        for tokens, targets, weights in zip(batch.tokens[0], batch.targets[0], batch.weights[0], strict=True):
            if weights.any():
                assert tokenizer.decode(targets[weights > 0].tolist()).startswith(" is a statement:")
                learned[tokenizer.decode([*tokens[:1].tolist(), *targets[targets > 0].tolist()])] += 1
    return learned


@pytest.mark.parametrize(
    ("members", "epochs", "most", "devices", "batches", "size"),
    [(5, 2, 8, 1, 1, 5), (5, 2, 8, 4, 1, 8), (9, 2, 4, 1, 4, 3), (9, 4, 5, 2, 2, 6), (3, 1, 1, 1, 8, 1)],
)
def test_every_member_is_learned_as_often_as_was_asked(tmp_path, members, epochs, most, devices, batches, size):
    wrapped = [probing.wrap("x" * (3 * i + 1)) for i in range(members)]  # of different lengths
    rows, *found = proxy_rows(wrapped, epochs, most, devices)
    assert (found, len(rows)) == ([batches, size], batches * size)
    settings = BatchConfig(size=size, max_length=128, packing=False, shuffle=False, shards=size)
    data = write(tmp_path / "rows.jsonl", rows)
    learned = learned_in(data, settings, batches * epochs, 7, every=members >= batches)
    assert learned == dict.fromkeys(wrapped, epochs)
    assert all(text.startswith(LEARNED) for text in wrapped)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "options", "status", "message"),
    [
        (lambda rows: rows, ("--proxy-epochs", 0), 2, "--proxy-epochs 0; expected at least 1"),
        (lambda rows: rows, ("--proxy-lr", 0), 1, "learning_rate: found 0.0; expected a positive number"),
        (lambda rows: rows, ("--max-length", 50), 1, "max_length=50; expected more than"),
        (
            lambda rows: [row | {"label": int(i > 0)} for i, row in enumerate(rows)],
            (),
            1,
            "probe_train holds 17 members and 1 others; expected two of either",
        ),
        (
            lambda rows: [r for r in rows if r["split"] != "dev"],
            (),
            1,
            "dev holds 0 members and 0 others; expected",
        ),
        (lambda rows: [rows[0], {"text": "a", "label": 1}], (), 1, "rows.jsonl:2: no `split`; expected one in every"),
        (
            lambda rows: [*rows, rows[3] | {"split": "test"}],
            (),
            1,
            "rows.jsonl:71: the text of test stands in probe_train too",
        ),
        (
            lambda rows: [*rows, rows[3] | {"label": 0}],
            (),
            1,
            "rows.jsonl:71: the text has label 0, and 1 in rows.jsonl:4; expected one label",
        ),
        (lambda rows: [{"text": "a", "label": 2}], (), 1, "expected 0 or 1"),
        (
            lambda rows: [{k: row[k] for k in ("text", "label")} for row in rows[:8]],
            (),
            1,
            "probe_train holds 0 members",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(
    run, home, tmp_path, change, options, status, message
):
    data = write(tmp_path / "rows.jsonl", change(rows_of(home / "rows.jsonl")))
    base = ("eval", "membership", "--model", home / "model", "--data", data, "--out", tmp_path / "out")
    found = run(*base, *options)
    assert (found[0], found[1], message in found[2]) == (status, "", True), found
    assert not (tmp_path / "out" / "proxy").exists()


@pytest.mark.errors
def test_a_text_of_one_token_is_refused_before_anything_is_trained(run, home, tmp_path):
    """Where no token stands in front of a text; of others than the test texts nothing is asked that needs two."""
    shutil.copytree(home / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    rows = [{"text": text, "label": 1, "split": split} for text, split in (("a", "dev"), ("bc", "test"), ("d", "test"))]
    data = write(tmp_path / "rows.jsonl", [*rows_of(home / "rows.jsonl"), *rows])
    base = ("eval", "membership", "--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out")
    status, _, err = run(*base, *SHORT)
    assert (status, "rows.jsonl:73: 'd' has 1 token; expected two or more" in err) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.errors
def test_other_models_texts_and_settings_are_named(run, home, tmp_path):
    status, _, err = run("eval", "membership", "--model", tmp_path / "none", "--data", home / "rows.jsonl")
    assert (status, str(tmp_path / "none") in err) == (1, True)
    status, _, err = run("eval", "membership", "--model", home / "model", "--data", tmp_path / "none.jsonl")
    assert (status, "none.jsonl" in err) == (1, True)
    before = (home / "out" / "proxy.jsonl").read_bytes()
    status, _, err = audit(run, home, "--out", home / "out", "--proxy-lr", 0.5, "--seed", 3)
    assert (status, "holds another proxy: seed was 0 and is 3; optimizer.learning_rate was 0.01 and is 0.5" in err) == (
        1,
        True,
    )
    shutil.copytree(home / "out", tmp_path / "out")
    path = tmp_path / "out" / "proxy" / "config.yaml"
    path.write_text(path.read_text().replace("kind: sft", "kind: orm"))
    status, _, err = audit(run, home, "--out", tmp_path / "out")
    assert (status, "holds another proxy: it is a run of `train orm`" in err) == (1, True)
    rows = rows_of(home / "rows.jsonl")
    rows[1]["text"] += "!"
    data = write(tmp_path / "rows.jsonl", rows)
    base = ("eval", "membership", "--model", home / "model", "--data", data, *SHORT, "--out", home / "out")
    status, _, err = run(*base)
    assert (status, "holds another proxy: it learned from other texts. Give the same settings" in err) == (1, True)
    assert (home / "out" / "proxy.jsonl").read_bytes() == before
