"""Nothing is lost, nothing leaks, and every position can be returned to; checked against plain lists of examples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import BUCKETS, BatchConfig, Batches, count_units
from jaxaroo.train.data.tokenise import Encoded

N = 57


class Rows:
    """Example i is 3 to 39 tokens of value i + 1, the last third of them scored."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"i": i, "weight": 0.5 if i == 3 else 1.0}


def encode(example):
    i = example["i"]
    length = 3 + (i * 7) % 37
    return Encoded(np.full(length, i + 1, np.int32), np.arange(length) >= length * 2 // 3, mismatch=i == 5)


def batches(seed=0, encode=encode, mine=None, fixed_length=False, **settings):
    cfg = BatchConfig(**{"size": 4, "max_length": 40, **settings})
    return Batches(Rows(), encode, cfg, seed=seed, shards=mine, fixed_length=fixed_length)


def found(batch):
    """The examples in a batch, read off its segments: {example: positions it fills}."""
    out = []
    for row in zip(*(np.asarray(leaf).reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(batch)), strict=True):
        tokens, targets, positions, segments, mask, weights, labels = row
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            i = int(tokens[at[0]]) - 1
            want = encode({"i": i})
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(tokens[at], want.ids[:-1])
            np.testing.assert_array_equal(targets[at], want.ids[1:])
            np.testing.assert_array_equal(positions[at], np.arange(len(at)))
            np.testing.assert_array_equal(mask[at], want.scored[1:])
            np.testing.assert_array_equal(weights[at], want.scored[1:] * (0.5 if i == 3 else 1.0))
            assert not labels[at].any()
            out.append(i)
        empty = segments == 0
        for leaf in row:
            assert not leaf[empty].any()
    return out


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_epoch_holds_every_example_once_and_whole(packing, shards):
    stream = batches(packing=packing, shards=shards)
    seen = [i for _ in range(80) for i in found(next(stream))]
    counts = np.bincount(seen, minlength=N)
    assert counts.min() >= len(seen) // N - 1
    assert counts.max() <= len(seen) // N + 2
    assert len(seen) > 3 * N
    assert stream.mismatched == {5}
    assert seen[:N] != sorted(seen[:N])  # shuffled
    other = batches(seed=1, packing=packing, shards=shards)
    assert set(seen[:20]) != set([i for _ in range(8) for i in found(next(other))][:20])


def test_without_shuffling_the_order_is_that_of_the_file():
    stream = batches(shuffle=False)
    assert sorted(i for _ in range(3) for i in found(next(stream)))[:8] == list(range(8))


def test_each_epoch_has_an_order_of_its_own():
    class Few(Rows):
        def __len__(self):
            return 32

    stream = Batches(Few(), encode, BatchConfig(size=1, max_length=40, packing=False), seed=0)
    parts = [frozenset(i for _ in range(8) for i in found(next(stream))) for _ in range(8)]
    assert frozenset.union(*parts[:4]) == frozenset.union(*parts[4:]) == set(range(32))
    assert set(parts[:4]).isdisjoint(parts[4:])


def test_rows_of_like_length_come_in_an_order_that_says_nothing():
    """Else every eight batches would go from short to long."""
    orders = []
    for seed in (0, 1):
        stream = batches(packing=False, max_length=1000, seed=seed)
        for _ in range(3):
            lengths = [(next(stream).segments > 0).sum() for _ in range(8)]
            orders.append(tuple(np.argsort(lengths, kind="stable")))
    assert len(set(orders)) == 6
    assert tuple(range(8)) not in orders


@pytest.mark.parametrize(("tokens", "bucket"), [(65, 64), (66, 128), (1025, 1000), (1100, 1000)])
def test_a_bucket_is_the_smallest_that_will_do(tokens, bucket):
    same = lambda example: Encoded(np.ones(tokens, np.int32), np.ones(tokens, bool))
    assert next(batches(encode=same, packing=False, max_length=1000)).tokens.shape == (1, 4, bucket)


def test_streams_of_one_batch_agree_on_a_length():
    for lengths in ([30, 100], [100, 30]):  # of the rows of the first stream, and of the second
        of = lambda example, lengths=lengths: np.ones(lengths[example["i"] % 2], np.int32)
        rows = lambda example, of=of: Encoded(of(example), of(example) > 0)
        batch = next(batches(encode=rows, packing=False, shards=2, shuffle=False, max_length=1000))
        assert (batch.segments > 0).sum(-1).tolist() == [[n - 1 for n in lengths for _ in range(2)]]
        assert batch.tokens.shape == (1, 4, 128)


def test_the_end_that_is_cut_is_the_one_asked_for():
    ids = lambda e: Encoded(np.arange(1, 51, dtype=np.int32), np.ones(50, bool))
    for how, first in (("keep_start", 1), ("keep_end", 11)):
        batch = next(batches(encode=ids, packing=False, truncation=how))
        np.testing.assert_array_equal(batch.tokens[0, 0, :39], np.arange(first, first + 39))


def test_packing_wastes_little_and_no_row_is_longer_than_asked():
    parts = [next(stream) for stream in [batches()] for _ in range(20)]
    assert {p.tokens.shape for p in parts} == {(1, 4, 40)}
    assert np.mean([(p.segments > 0).mean() for p in parts]) > 0.75
    assert max(p.segments.max() for p in parts) > 1


def test_unpacked_rows_are_of_like_length_in_few_shapes():
    stream, sorted_waste, waste = batches(packing=False, max_length=1000), [], []
    for _ in range(24):
        batch = next(stream)
        assert batch.tokens.shape[-1] in BUCKETS
        lengths = (batch.segments > 0).sum(-1).ravel()
        sorted_waste.append(1 - lengths.mean() / lengths.max())
    for i in range(24):
        lengths = [len(encode({"i": (4 * i + j) % N}).ids) for j in range(4)]
        waste.append(1 - np.mean(lengths) / max(lengths))
    assert np.mean(sorted_waste) < np.mean(waste) / 3
    assert next(batches(packing=False, max_length=1000, fixed_length=True)).tokens.shape == (1, 4, 1000)
    assert next(batches(packing=False, max_length=1000)).tokens.shape[-1] == 64


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_position_can_be_written_down_and_returned_to(packing, shards):
    stream, states, out = batches(packing=packing, shards=shards), [], []
    states.append(json.dumps(stream.get_state()))  # before the first
    for _ in range(45):
        out.append(next(stream))
        states.append(json.dumps(stream.get_state()))
    for k in (0, 1, 7, 8, 9, 30):
        again = batches(packing=packing, shards=shards)
        for _ in range(12):  # wherever it stands, another window of lengths for one
            next(again)
        again.set_state(json.loads(states[k]))
        assert json.dumps(again.get_state()) == states[k]
        for want in out[k : k + 11]:
            jax.tree.map(np.testing.assert_array_equal, next(again), want)


@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_hold_together_what_one_holds(packing):
    settings = dict(packing=packing, shards=2, micro_batches=2, size=8)
    one = batches(fixed_length=True, **settings)
    parts = [batches(mine=range(p, p + 1), fixed_length=True, **settings) for p in range(2)]
    for _ in range(5):
        whole, halves = next(one), [next(p) for p in parts]
        assert whole.tokens.shape == (2, 4, 40)
        for want, *got in zip(*map(jax.tree.leaves, (whole, *halves)), strict=True):
            np.testing.assert_array_equal(np.concatenate(got, axis=1), want)
    both = {name: state for p in parts for name, state in p.get_state().items()}
    assert both == one.get_state()


def test_micro_batches_cut_the_same_rows():
    one, four = next(batches(size=8)), next(batches(size=8, micro_batches=4))
    assert four.tokens.shape == (4, 2, 40)
    for a, b in zip(*map(jax.tree.leaves, (one, four)), strict=True):
        np.testing.assert_array_equal(a.reshape(8, 40), b.reshape(8, 40))


def test_examples_without_a_scored_token_are_dropped_and_counted():
    def some(example):
        encoded = encode(example)
        return encoded._replace(scored=np.zeros_like(encoded.scored)) if example["i"] % 3 == 0 else encoded

    stream = batches(encode=some, packing=False)
    seen = {i for _ in range(60) for i in _firsts(next(stream))}
    assert seen == {i for i in range(N) if i % 3}
    assert stream.dropped == {i for i in range(N) if i % 3 == 0}
    short = batches(max_length=3)  # the longest examples keep prompt tokens alone
    assert {len(encode({"i": i}).ids) for _ in range(20) for i in _firsts(next(short))} == {3, 4}


def _firsts(batch):
    return {int(t) - 1 for t in batch.tokens[..., 0].ravel()}


def test_if_nothing_is_left_the_search_ends():
    none = lambda example: Encoded(np.zeros(4, np.int32), np.zeros(4, bool))
    with pytest.raises(ValueError, match="none of the 57 examples, or of those of stream 0, keeps a completion token"):
        next(batches(encode=none))


def judged(example):
    """Labels on the scored tokens, each its own."""
    encoded = encode(example)
    labels = np.where(encoded.scored, np.arange(len(encoded.ids)) % 5 / 4, 0).astype(np.float32)
    return encoded._replace(labels=labels)


@pytest.mark.parametrize("packing", [True, False])
def test_labels_and_masks_stand_at_the_tokens_themselves(packing):
    """Every token is in the row, the last one too, for it has a label; rows without labels lie beside as ever.

    A sequence may have a weight of its own, which is then not that of its row.
    """
    own_weight = lambda example, e: e._replace(weight={3: 2.0, 5: 0.0, 7: 0.25}.get(example["i"]))
    mixed = lambda example: own_weight(example, judged(example)) if example["i"] % 2 else encode(example)
    stream, seen = batches(encode=mixed, packing=packing, max_length=64, micro_batches=2), set()
    for _ in range(40):
        batch = next(stream)
        assert batch.labels.dtype == np.float32
        for tokens, targets, positions, segments, mask, weights, labels in zip(
            *(leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(batch)), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                i = int(tokens[at[0]]) - 1
                want, weight = mixed({"i": i}), {3: 2.0, 5: 0.0, 7: 0.25}.get(i, 1.0)
                own = i % 2 == 1
                scored = want.scored if own else want.scored[1:]
                np.testing.assert_array_equal(tokens[at], want.ids if own else want.ids[:-1])
                np.testing.assert_array_equal(targets[at], [*want.ids[1:], 0] if own else want.ids[1:])
                np.testing.assert_array_equal(positions[at], np.arange(len(at)))
                np.testing.assert_array_equal(mask[at], scored)
                np.testing.assert_array_equal(weights[at], scored * weight)
                np.testing.assert_array_equal(labels[at], want.labels if own else np.zeros(len(at)))
                seen.add(i)
            assert not labels[segments == 0].any()
    assert len(seen) == N


def test_a_labelled_example_as_long_as_a_row_fits():
    whole = lambda e: Encoded(np.ones(50, np.int32), np.ones(50, bool), False, np.ones(50, np.float32))
    batch = next(batches(encode=whole))
    assert batch.tokens.shape == (1, 4, 40)
    assert (batch.labels.sum(-1) == 39).all()  # the first token has nothing before it


def test_counts_are_those_of_a_loop():
    batch = next(batches(size=8, micro_batches=2))
    got = {name: int(n) for name, n in count_units(jax.tree.map(jnp.asarray, batch)).items()}
    assert got["sequence"] == len(found(batch))
    assert got["token"] == sum(int(encode({"i": i}).scored[1:].sum()) for i in found(batch))
    assert got["input"] == sum(len(encode({"i": i}).ids) - 1 for i in found(batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "BatchConfig.size: found 0"),
        ({"size": 6, "micro_batches": 4}, "multiple of micro_batches x shards = 4 x 1"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"shards": 0}, "shards: found 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchConfig(**settings)


def test_streams_of_another_run_are_refused():
    for here, there in ((2, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"expected {here} of them"):
            batches(shards=here).set_state(batches(shards=there).get_state())


def test_a_stream_that_finds_nothing_ends_its_search():
    """Without shuffling the second of two streams meets the same dropped half of the rows again and again."""

    class Even(Rows):
        def __len__(self):
            return 8

    odd = lambda example: encode(example)._replace(scored=np.full(len(encode(example).ids), example["i"] % 2 == 0))
    stream = Batches(Even(), odd, BatchConfig(size=4, max_length=40, shards=2, shuffle=False), seed=0)
    with pytest.raises(ValueError, match="stream 1, keeps a completion token"):
        next(stream)


# -------------------------------------------------------------------------------------------------- several sequences
def pair(example):
    """Two sequences, the second shorter; tokens say which example and which of the two."""
    i = example["i"]
    lengths = (4 + i * 7 % 17, 3 + i * 5 % 11)
    made = []
    for side, length in enumerate(lengths):
        scored = np.arange(length) >= 2
        made.append(Encoded(np.full(length, 2 * i + side + 1, np.int32), scored, mismatch=i == 5 and side == 1))
    return tuple(made)


@pytest.mark.parametrize("packing", [True, False])
def test_the_sequences_of_an_example_are_neighbours_and_see_themselves_alone(packing):
    stream = Batches(Rows(), pair, BatchConfig(size=4, max_length=40, packing=packing), seed=0, parts=2)
    seen = []
    while len(seen) < 2 * N:
        batch = next(stream)
        assert batch.tokens.shape[-1] <= 64
        for row in zip(*(np.asarray(leaf).reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(batch)), strict=True):
            tokens, targets, positions, segments, mask, weights, _ = row
            assert (np.diff(segments[segments > 0]) >= 0).all()
            assert segments.max() % 2 == 0
            assert packing or segments.max() == 2
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                i, side = divmod(int(tokens[at[0]]) - 1, 2)
                want = pair({"i": i})[side]
                assert side == (segment - 1) % 2
                np.testing.assert_array_equal(tokens[at], want.ids[:-1])
                np.testing.assert_array_equal(targets[at], want.ids[1:])
                np.testing.assert_array_equal(positions[at], np.arange(len(at)))
                np.testing.assert_array_equal(mask[at], want.scored[1:])
                np.testing.assert_array_equal(weights[at], want.scored[1:] * (0.5 if i == 3 else 1.0))
                if side:
                    assert int(tokens[at[0] - 1]) == 2 * i + 1  # what it is compared with stands before it
                    seen.append(i)
            assert not any(leaf[segments == 0].any() for leaf in row)
    assert {*seen} == {*range(N)}
    assert stream.mismatched == {5}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("labelled", [False, True])
def test_what_sequences_begin_with_in_common_stands_in_a_row_once(packing, labelled):
    def encode(example):
        """A prompt of 5 tokens with three answers; of the third one scored token is in what is common."""
        i, made = example["i"], []
        for part, answer in enumerate(([1, 2, 3], [1, 2, 4, 4], [1, 2, 3, 5])):
            ids = np.array([*range(10, 15), *answer], np.int32)
            scored = np.arange(len(ids)) >= (6 if part == 2 else 7)
            labels = scored * np.float32(0.5) if labelled else None
            made.append(Encoded(ids, scored, labels=labels, more={"i": np.full(len(ids), i, np.float32)}))
        return tuple(made)

    cfg = BatchConfig(size=4, max_length=30, packing=packing, shuffle=False)
    batch = next(Batches(Rows(), encode, cfg, seed=0, parts=3, more=("i",)))
    leaves = {name: np.asarray(x)[0, 0] for name, x in batch._asdict().items() if name != "more"}
    whole = encode({"i": 0})
    at = 0
    for part, begin in enumerate((0, 7, 6) if labelled else (0, 6, 5)):
        n = len(whole[part].ids) - (not labelled)
        here = slice(at, at + n - begin)
        np.testing.assert_array_equal(leaves["segments"][here], part + 1)
        np.testing.assert_array_equal(leaves["positions"][here], np.arange(begin, n))
        np.testing.assert_array_equal(leaves["tokens"][here], whole[part].ids[begin:n])
        np.testing.assert_array_equal(leaves["mask"][here].sum(), whole[part].scored.sum())
        scored = whole[part].scored if labelled else whole[part].scored[1:]
        np.testing.assert_array_equal(leaves["mask"][here], scored[begin:])
        np.testing.assert_array_equal(leaves["labels"][here], 0.5 * labelled * scored[begin:])
        at = here.stop
    assert leaves["segments"][at] == (4 if packing else 0)
    assert int(count_units(batch)["sequence"]) == 3 * (8 if packing else 4)


def test_each_sequence_gets_its_share_of_a_row_and_none_may_lose_its_completion():
    def long(example):
        first, second = pair(example)
        late = Encoded(np.full(30, 9, np.int32), np.arange(30) >= 25)  # nothing is left of it within 20 tokens
        return first, (
            late if example["i"] == 7 else second._replace(ids=np.resize(second.ids, 30), scored=np.arange(30) > 3)
        )

    stream = Batches(Rows(), long, BatchConfig(size=4, max_length=40, packing=False), seed=0, parts=2)
    for _ in range(N):
        batch = next(stream)
        for row, segments in zip(
            batch.tokens.reshape(-1, batch.tokens.shape[-1]),
            batch.segments.reshape(-1, batch.segments.shape[-1]),
            strict=True,
        ):
            assert (segments == 2).sum() == 19  # 20 tokens, of which the last is a target alone
            assert 15 not in row
    assert stream.dropped == {7}


@pytest.mark.errors
def test_examples_of_another_number_of_sequences_are_refused():
    with pytest.raises(ValueError, match="an example of 1 sequences; expected 2"):
        next(Batches(Rows(), encode, BatchConfig(size=4, max_length=40), seed=0, parts=2))
    with pytest.raises(ValueError, match="max_length=3 for 2 sequences; expected 2 tokens each at least"):
        Batches(Rows(), pair, BatchConfig(size=4, max_length=3), seed=0, parts=2)


@pytest.mark.parametrize(("packing", "truncation"), [(True, "keep_start"), (False, "keep_start"), (True, "keep_end")])
def test_further_numbers_stand_at_the_targets_of_their_tokens(packing, truncation):
    """Cut as the tokens are, and zero where no token is."""
    of = lambda example: np.arange(3 + (example["i"] * 7) % 37, dtype=np.float32) + 1000 * (example["i"] + 1)
    noted = lambda example: encode(example)._replace(more={"note": of(example), "other": -of(example)})
    cfg = BatchConfig(size=4, max_length=30, packing=packing, truncation=truncation)
    stream, seen = Batches(Rows(), noted, cfg, seed=0, more=("note",)), 0
    for _ in range(10):
        batch = next(stream)
        assert batch.more.keys() == {"note"}
        rows = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments, batch.positions, batch.more["note"]))
        for tokens, segments, positions, note in zip(*rows, strict=True):
            begin = np.maximum(3 + (tokens - 1) * 7 % 37 - 30, 0) * (truncation == "keep_end")
            want = 1000.0 * tokens + begin + positions + 1  # a token's value is its example's number
            want = np.where(segments > 0, want, 0)
            np.testing.assert_array_equal(note, want)
            seen += segments.max()
    assert seen > 30
