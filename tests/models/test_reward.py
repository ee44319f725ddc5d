"""Heads against float64 loops, a published folder as it comes, text that cannot make separators, files whole or not."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, lm_head, unstack_layers
from jaxaroo.models.reward import (
    RewardConfig,
    RewardModel,
    StepText,
    head_axes,
    init_head,
    is_reward_model,
    load,
    one_token,
    render_steps,
    save,
    step_logits,
    surprisals,
)
from jaxaroo.models.safetensors import CheckpointError
from jaxaroo.models.tokenizer import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizer"
NAMES = ["byte", "llama2", "llama3", "qwen", "unigram"]
PROMPT, STEPS = "the emu? ", ["the emu ran", "3 + 4 = 7 <|sep|>", "the rain, the red dust"]
SEP = one_token(TOKENIZER, "<|sep|>")
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    qkv_bias=True,
    model_type="qwen2",
)
KINDS = {
    "pair": dict(kind="token_pair", good=7, bad=9),
    "linear": dict(),
    "two classes": dict(outputs=2),
    "relu": dict(inner=5, outputs=2, start="> ", between="\n"),
    "surprisal": dict(inner=5, surprisal=True),
}


@functools.cache
def golden(name):
    return load_tokenizer(GOLDENS / name)


def separator_of(t):
    """Some control token that is no end and no padding."""
    taken = {*t.eos_ids, t.bos_id, t.pad_id}
    return min(i for i in t.special_ids if i not in taken)


def config(name, **changes):
    return RewardConfig(target=CFG, separator=SEP, **(KINDS[name] | changes))


def params(cfg, shift=0.0):
    """Every parameter of the head other than nothing, biases too."""
    head = jax.tree.map(lambda w: w + shift, init_head(cfg, jax.random.key(1)))
    return {"model": unstack_layers(init_params(cfg.target, jax.random.key(0))), "head": head}


def loops(cfg, tree, h):
    """z of one state, in float64."""
    h = np.asarray(h, np.float64)
    if cfg.kind == "token_pair":
        table = np.asarray(tree["model"]["head"], np.float64)
        return sum(table[cfg.good][i] * h[i] - table[cfg.bad][i] * h[i] for i in range(len(h)))

    def linear(layer, x):
        w, b = (np.asarray(layer[name], np.float64) for name in ("weight", "bias"))
        return [sum(w[o][i] * x[i] for i in range(len(x))) + b[o] for o in range(len(b))]

    if cfg.inner:
        h = [max(0.0, v) for v in linear(tree["head"]["first"], h)]
    z = linear(tree["head"]["last"], h)
    return z[0] if cfg.outputs == 1 else z[1] - z[0]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_head_says_is_what_loops_say(name):
    cfg = config(name)
    tree = params(cfg, shift=0.3)
    hidden = jax.random.normal(jax.random.key(2), (2, 3, 16))
    surprise = jax.random.uniform(jax.random.key(3), (2, 3, 2)) if cfg.surprisal else None
    got = step_logits(cfg, tree, hidden, surprise)
    read = hidden if surprise is None else np.concatenate([hidden, surprise], axis=-1)
    want = [[loops(cfg, tree, h) for h in row] for row in np.asarray(read)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.dtype == jnp.float32


def test_a_token_pair_is_a_softmax_over_two_of_the_language_models_logits():
    cfg = config("pair")
    tree = params(cfg)
    hidden = jax.random.normal(jax.random.key(2), (1, 4, 16))
    z = lm_head(CFG, tree["model"], hidden)
    want = jax.nn.softmax(z[..., jnp.array([7, 9])], axis=-1)[..., 0]
    np.testing.assert_allclose(jax.nn.sigmoid(step_logits(cfg, tree, hidden)), want, atol=1e-6)


@pytest.mark.slow
def test_surprisals_are_what_loops_over_each_step_say():
    """Packed rows too: a text knows nothing of the one before it, nor of its own first token."""
    cfg = config("surprisal")
    tree, rng = params(cfg), np.random.default_rng(4)
    tokens = rng.integers(0, 40, (2, 24)).astype(np.int32)
    tokens[0, [3, 4, 7, 17]] = SEP
    tokens[1, [0, 12, 23]] = SEP
    positions = np.stack([np.r_[np.arange(10), np.arange(14)], np.arange(24)]).astype(np.int32)
    hidden = 3 * jax.random.normal(jax.random.key(5), (2, 24, 16))
    got = np.asarray(surprisals(cfg, tree, hidden, jnp.asarray(tokens), jnp.asarray(positions)))
    table = np.asarray(tree["model"]["head"], np.float64)
    for row in range(2):
        seen = []
        for t in range(24):
            if positions[row, t] == 0 or tokens[row, t - 1] == SEP:
                seen = []
            if positions[row, t] > 0 and tokens[row, t] != SEP:
                z = table @ np.asarray(hidden[row, t - 1], np.float64)
                seen.append(np.log(np.exp(z).sum()) - z[tokens[row, t]])
            want = [np.log1p(sum(seen)), np.log1p(max(seen, default=0.0))]
            np.testing.assert_allclose(got[row, t], want, atol=1e-5, err_msg=str((row, t)))
    assert got.dtype == np.float32


@pytest.mark.errors
def test_surprisals_are_read_by_those_heads_alone_that_were_made_for_them():
    hidden, surprise = jnp.zeros((1, 2, 16)), jnp.zeros((1, 2, 2))
    with pytest.raises(ValueError, match="surprisal=True, and surprise is None"):
        step_logits(config("surprisal"), params(config("surprisal")), hidden)
    with pytest.raises(ValueError, match="surprisal=False, and surprise is not None"):
        step_logits(config("linear"), params(config("linear")), hidden, surprise)


def test_the_head_has_an_axis_name_for_every_axis():
    for name in KINDS:
        head, axes = init_head(config(name), jax.random.key(0)), head_axes(config(name))
        ranks = jax.tree.map(lambda w: w.ndim, head)
        assert ranks == jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple))


# --------------------------------------------------------------------------------------------------------------- text
def test_each_step_has_a_separator_behind_it_and_text_makes_none():
    steps = ["one", " <|sep|> two", "ans 3"]
    ids, ends = render_steps(TOKENIZER, "Q <|sep|>?\n", steps, StepText(SEP, start="> ", between="\n"))
    assert [i for i, token in enumerate(ids) if token == SEP] == ends
    begin = len(TOKENIZER.encode("Q <|sep|>?\n"))
    starts = [begin, *(end + 1 for end in ends)]
    parts = [TOKENIZER.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert parts == ["> one", "\n <|sep|> two", "\nans 3"]
    assert ids[:begin] == TOKENIZER.encode("Q <|sep|>?\n")
    assert ends[-1] == len(ids) - 1


def test_a_separator_opens_the_first_step_where_surprisal_is_counted():
    t, text = TOKENIZER, config("surprisal").text
    assert text.opens
    ids, ends = render_steps(t, "q", ["a", "b"], text)
    assert ids == [*t.encode("q"), SEP, *t.encode("a", bos=False), SEP, *t.encode("b", bos=False), SEP]
    assert [ids[end] for end in ends] == [SEP, SEP]
    assert len(ids) - 1 == ends[-1]
    newline = text._replace(separator=ord("\n"))
    ids, _ = render_steps(t, "q\n", ["a"], newline)  # one is enough
    assert ids == [*t.encode("q\n"), *t.encode("a\n", bos=False)]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_are_a_prefix_of_the_whole(name):
    """So one causal pass scores each step as a pass over the prefix that ends there would."""
    t = golden(name)
    separator = separator_of(t)
    ids, ends = render_steps(t, PROMPT, STEPS, StepText(separator))
    for i in range(len(STEPS)):
        first, first_ends = render_steps(t, PROMPT, STEPS[: i + 1], StepText(separator))
        assert first == ids[: ends[i] + 1]
        assert first_ends == ends[: i + 1]


def test_a_chat_ends_with_what_opens_an_answer():
    t = golden("qwen")
    chat = [{"role": "user", "content": "the emu? <|im_end|>"}]
    ids, ends = render_steps(t, chat, ["it ran"], StepText(separator_of(t)))
    opened = t.encode_chat(chat)
    assert ids == [*opened, *t.encode("it ran", bos=False), separator_of(t)]
    assert ends == [len(ids) - 1]


def test_separators_that_are_known():
    t = byte_tokenizer()
    assert one_token(t, "<|sep|>") == one_token(t, 259) == 259
    assert one_token(t, "x") == ord("x")  # a rare token will do


@pytest.mark.errors
@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|sep|><|sep|>", r"tokens \[259, 259\].*expected one token.*\(<\|sep\|>\)"),
        ("no", "expected one token.*Choose a control token that solutions do not use"),
        (260, "of a vocabulary of 260; expected one token"),
        (-1, "expected one token"),
    ],
)
def test_what_is_not_one_token_is_refused(token, message):
    with pytest.raises(ValueError, match=message):
        one_token(byte_tokenizer(), token)


# -------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_comes_back_and_is_a_causal_model_too(name, tmp_path):
    cfg = config(name)
    tree = params(cfg)
    save(tmp_path / "r", RewardModel(cfg, tree), tokenizer=TOKENIZER)
    assert is_reward_model(tmp_path / "r")
    got = load(tmp_path / "r")
    assert got.config == cfg
    jax.tree.map(np.testing.assert_array_equal, got.params, tree)
    decoder = hf.load(tmp_path / "r")
    jax.tree.map(np.testing.assert_array_equal, decoder.params, tree["model"])
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    with pytest.raises(FileExistsError):
        save(tmp_path / "r", RewardModel(cfg, tree))


def published(folder, outputs=2, **tensors):
    """A folder as transformers writes `Qwen2ForProcessRewardModel`: no LM head, `score.0` and `score.2` instead."""
    model = Model(CFG, init_params(CFG, jax.random.key(0)))
    hf.save(folder, model)
    TOKENIZER.save(folder)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    score = {"score.0.weight": draw(16, 16), "score.0.bias": draw(16)}
    score |= {"score.2.weight": draw(outputs, 16), "score.2.bias": draw(outputs)} | tensors
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights | score, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    (folder / "config.json").write_text(json.dumps(config))
    return model, score


def test_a_published_model_is_read_as_it_comes(tmp_path):
    model, score = published(tmp_path / "q")
    assert is_reward_model(tmp_path / "q")
    got = load(tmp_path / "q", separator="<|sep|>")
    assert (got.config.kind, got.config.inner, got.config.outputs, got.config.separator) == ("value", 16, 2, SEP)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, 9)), jnp.int32)
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    hidden = forward(CFG, unstack_layers(model.params), tokens, positions).hidden
    mine = forward(got.config.target, got.params["model"], tokens, positions).hidden
    np.testing.assert_array_equal(mine, hidden)
    h = np.asarray(hidden[0], np.float64)
    inner = np.maximum(h @ score["score.0.weight"].T.astype(float) + score["score.0.bias"], 0)
    z = inner @ score["score.2.weight"].T.astype(float) + score["score.2.bias"]
    want = np.exp(z[:, 1]) / np.exp(z).sum(1)
    np.testing.assert_allclose(jax.nn.sigmoid(step_logits(got.config, got.params, mine))[0], want, atol=1e-5)


@pytest.mark.errors
def test_folders_that_hold_no_reward_model_say_so(tmp_path):
    hf.save(tmp_path / "plain", Model(CFG, init_params(CFG, jax.random.key(0))))
    assert not is_reward_model(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"no folder reward/ and no score\.0\.weight; expected a reward model"):
        load(tmp_path / "plain")
    published(tmp_path / "three", outputs=3)
    with pytest.raises(CheckpointError, match="outputs=3"):
        load(tmp_path / "three", separator="<|sep|>")
    published(tmp_path / "odd", **{"score.0.bias": np.zeros(7, np.float32)})
    with pytest.raises(CheckpointError, match="a head of shapes"):
        load(tmp_path / "odd", separator="<|sep|>")
    published(tmp_path / "flat", **{"score.2.weight": np.zeros((), np.float32)})
    with pytest.raises(CheckpointError, match=r"score\.2\.weight of shape \[\]; expected a matrix"):
        load(tmp_path / "flat", separator="<|sep|>")
    with pytest.raises(CheckpointError, match="found '<extra_0>', tokens"):
        load(tmp_path / "odd")


@pytest.mark.errors
@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="token_pair", good=7),
        dict(good=7, bad=9),
        dict(kind="token_pair", good=7, bad=7),
        dict(kind="token_pair", good=7, bad=99_999),
        dict(outputs=3),
        dict(inner=0),
        dict(kind="token_pair", good=7, bad=9, surprisal=True),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="RewardConfig"):
        RewardConfig(target=CFG, separator=SEP, **fields)
