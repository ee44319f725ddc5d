"""Oracles: likelihood by the decoder itself, bytes by counting, the master's own weights as floats."""

import json

import jax
import numpy as np
import pytest

from jaxaroo.infer.evaluate import Question
from jaxaroo.infer.widths import Rows, decode_speed, plot_widths, quality, weigh
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, unstack_layers
from jaxaroo.models.multi_precision import from_master, init_scales, switch_bits, to_master
from jaxaroo.models.tokenizer import byte_tokenizer

CFG = DecoderConfig(
    vocab_size=260, embed_dim=32, ffn_dim=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, max_positions=64
)


@pytest.fixture(scope="module")
def master():
    params = init_params(CFG, jax.random.key(0))
    return unstack_layers(to_master(params, init_scales(params)))


def at(master, bits):
    return Model(CFG, switch_bits(master, bits))


@pytest.mark.slow
def test_quality_is_that_of_the_floats_of_this_width(master):
    ids = [np.arange(5, 17), np.array([7, 7, 9, 250, 3])]
    got = quality(at(master, 2), byte_tokenizer(), Rows(ids, [4, 2], []))
    total = number = 0
    floats = Model(CFG, from_master(master, 2))
    for row, start in zip(ids, (4, 2), strict=True):
        z = np.asarray(logits(floats, row[None, :-1]), np.float64)[0]
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        total -= sum(logp[t - 1, row[t]] for t in range(start, len(row)))
        number += len(row) - start
    assert got.nats == pytest.approx(total / number, rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(total / number), rel=1e-5)
    assert (got.accuracy, got.interval) == (None, None)
    wide = quality(at(master, 8), byte_tokenizer(), Rows(ids, [4, 2], []))
    assert wide.nats != pytest.approx(got.nats, rel=1e-3)


@pytest.mark.slow
def test_answers_are_asked_for_where_there_are_questions(master):
    ids = [np.arange(5, 17)]
    got = quality(at(master, 4), byte_tokenizer(), Rows(ids, [4], [Question("1 + 1", "#### 2")]), max_new_tokens=4)
    assert got.accuracy in (0.0, 1.0)
    assert got.interval[0] <= got.accuracy <= got.interval[1]


@pytest.mark.parametrize("bits", [8, 4, (8, 2)])
def test_bytes_are_those_of_the_arrays(master, bits):
    found, each = weigh(at(master, bits)), (bits, bits) if isinstance(bits, int) else bits
    shapes = {"q": (128, 32), "k": (64, 32), "v": (64, 32), "o": (32, 128), "gate": (128, 32), "up": (128, 32)}
    shapes["down"] = (32, 128)
    packed = lambda n, k, b: n * (k if b == 8 else -(-k // 128) * 128) * b // 8 + 2 * n
    want = sum(packed(n, k, b) for b in each for n, k in shapes.values())
    floats = 4 * (2 * 260 * 32 + 32 + 2 * 2 * 32)
    assert found == (want + floats, want, sum(each) / 2)
    plain = Model(CFG, init_params(CFG, jax.random.key(0)))
    assert weigh(plain) == (sum(w.nbytes for w in jax.tree.leaves(plain.params)), 0, 0.0)


@pytest.mark.proof
def test_speed_is_measured_of_every_model(master):
    found = decode_speed({"8": at(master, 8), "2": at(master, 2)}, tokens=4, repeats=1)
    assert {*found} == {"8", "2"}
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in found.values())


def test_the_plot_is_drawn(tmp_path):
    kinds = ["width", "width", "plan", "single", "plain"]
    rows = [{"kind": k, "average_bits": i + 2.0, "nats": 0.1 * (i + 1)} for i, k in enumerate(kinds)]
    plot_widths(tmp_path / "bits.png", json.loads(json.dumps(rows)))
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
