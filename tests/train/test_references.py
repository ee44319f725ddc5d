"""Oracle: each sequence alone through the model. What is written down is refused where anything has changed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP_SEQ
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.references import COLUMN, OtherReferenceError, Referenced, Source, model_digest

CFG = DecoderConfig(
    vocab_size=50, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=256
)
PARAMS = jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))
ROWS = [{"i": i} for i in range(11)]


def encode(row, shift=0):
    """Two sequences of 5 to 90 tokens, of which the last third is scored; longer ones are cut at 60."""
    rng = np.random.default_rng(row["i"])
    lengths = rng.integers(5, 90, 2)
    ids = [((rng.integers(0, 50, n) + shift) % 50).astype(np.int32) for n in lengths]
    return tuple(Encoded(x, np.arange(len(x)) >= len(x) // 3) for x in ids)


SOURCE = Source("abc", CFG, BatchConfig(size=8, max_length=120), 2, FSDP_TP_SEQ)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=4, fsdp=2))


@pytest.fixture(scope="module")
def filled(mesh, tmp_path_factory):
    path, calls = tmp_path_factory.mktemp("references") / "reference.npz", []
    rows = Referenced(ROWS, encode, SOURCE)
    with jax.set_mesh(mesh):
        rows.fill(path, lambda: calls.append(0) or PARAMS, mesh)
    assert calls == [0]
    return rows, path


@pytest.mark.slow
def test_sums_are_those_of_each_sequence_alone(filled):
    rows, _ = filled
    for i in range(len(ROWS)):
        for encoded, got in zip(encode(ROWS[i]), rows[i][COLUMN], strict=True):
            ids, scored = encoded.ids[:60], encoded.scored[:60]
            logp = jax.nn.log_softmax(logits(Model(CFG, PARAMS), jnp.asarray(ids)[None])[0])
            wanted = np.asarray(logp, np.float64)[np.arange(len(ids) - 1), ids[1:]][scored[1:]].sum()
            np.testing.assert_allclose(got, wanted, rtol=2e-5)
    assert rows[3]["i"] == 3


def test_rows_are_cut_from_the_end_that_the_batches_keep(filled, mesh, tmp_path):
    def last(row):
        cut = (Encoded(e.ids[-60:], e.scored[-60:]) for e in encode(row))
        return tuple(e._replace(scored=e.scored & (np.arange(len(e.ids)) > 0)) for e in cut)

    ending = dataclasses.replace(SOURCE, batch=dataclasses.replace(SOURCE.batch, truncation="keep_end"))
    found = []
    for name, of, source in (("a", encode, ending), ("b", last, SOURCE)):
        rows = Referenced(ROWS[:4], of, source)
        with jax.set_mesh(mesh):
            rows.fill(tmp_path / f"{name}.npz", lambda: PARAMS, mesh)
        found.append([rows[i][COLUMN] for i in range(4)])
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert found[0] != [filled[0][i][COLUMN] for i in range(4)]


def test_what_is_written_is_read_and_nothing_is_scored_again(filled, mesh):
    rows, path = filled
    again = Referenced(ROWS, encode, SOURCE)
    again.fill(path, lambda: pytest.fail("the model was asked for"), mesh)
    assert [again[i] for i in range(11)] == [rows[i] for i in range(11)]


def test_sums_that_steps_were_taken_against_are_scored_again_by_the_same_model_on_the_same_rows(filled, mesh, tmp_path):
    rows, path = filled
    with jax.set_mesh(mesh):
        again = Referenced(ROWS, encode, SOURCE)
        again.fill(tmp_path / "again.npz", lambda: PARAMS, mesh, kept=rows.fingerprint)
    assert again.fingerprint == rows.fingerprint
    assert again[3] == rows[3]
    others = {
        "model": Referenced(ROWS, encode, dataclasses.replace(SOURCE, model="xyz")),
        "a row": Referenced(ROWS, lambda row: encode(row, shift=row["i"] == 4), SOURCE),
        "fewer": Referenced(ROWS[:9], encode, SOURCE),
    }
    for name, other in others.items():
        with pytest.raises(
            OtherReferenceError, match="another model or of other rows; expected those that steps were taken against"
        ):
            other.fill(tmp_path / f"{name}.npz", lambda: pytest.fail("rows are scored"), mesh, kept=rows.fingerprint)
        assert not (tmp_path / f"{name}.npz").exists()
    with pytest.raises(
        OtherReferenceError, match="of another model or of other rows; expected those that steps were taken against"
    ):
        Referenced(ROWS, encode, SOURCE).fill(path, lambda: PARAMS, mesh, kept="of another run")


def test_a_row_that_has_changed_is_refused_when_it_is_read(filled, mesh):
    _, path = filled
    other = Referenced(ROWS, lambda row: encode(row, shift=row["i"] == 4), SOURCE)
    other.fill(path, lambda: PARAMS, mesh)
    assert other[3][COLUMN]
    with pytest.raises(OtherReferenceError, match="row 4 has other tokens than when the reference scored it"):
        other[4]
    fewer = Referenced(
        ROWS,
        lambda row: tuple(e._replace(scored=e.scored & (np.arange(len(e.ids)) > len(e.ids) // 2)) for e in encode(row)),
        SOURCE,
    )
    fewer.fill(path, lambda: PARAMS, mesh)
    with pytest.raises(OtherReferenceError, match="other tokens"):
        [fewer[i] for i in range(11)]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="xyz"), "another model 'abc' .is 'xyz' now"),
        (dict(config=dataclasses.replace(CFG, dtype="bfloat16")), "another dtype 'float32'"),
        (dict(batch=BatchConfig(size=8, max_length=100)), "another max_length 120"),
        (dict(batch=BatchConfig(size=8, max_length=120, truncation="keep_end")), "another truncation"),
        (dict(parts=1), "another sequences 2"),
    ],
)
def test_what_was_made_with_something_else_is_refused(filled, mesh, change, message):
    with pytest.raises(OtherReferenceError, match=message):
        Referenced(ROWS, encode, dataclasses.replace(SOURCE, **change)).fill(filled[1], lambda: PARAMS, mesh)


@pytest.mark.errors
def test_a_file_that_is_damaged_or_of_other_rows_is_refused(filled, mesh, tmp_path):
    rows, path = filled
    with pytest.raises(OtherReferenceError, match=r"another rows 11 \(is 10 now"):
        Referenced(ROWS[:10], encode, SOURCE).fill(path, lambda: PARAMS, mesh)
    cut = tmp_path / "reference.npz"
    for bytes_left in (0, 100, path.stat().st_size - 50):
        cut.write_bytes(path.read_bytes()[:bytes_left])
        with pytest.raises(OtherReferenceError, match="cannot be read"):
            Referenced(ROWS, encode, SOURCE).fill(cut, lambda: PARAMS, mesh)
    del rows


def test_a_write_that_is_cut_short_leaves_no_file(mesh, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"some")
        raise OSError("no space left")

    rows = Referenced(ROWS, encode, SOURCE)
    with monkeypatch.context() as changed:
        changed.setattr("jaxaroo.train.references._score", lambda sequences, *_: np.zeros(len(sequences)))
        changed.setattr(np, "savez", full)
        with pytest.raises(OSError, match="no space left"):
            rows.fill(tmp_path / "reference.npz", dict, mesh)
    assert not (tmp_path / "reference.npz").exists()


def test_a_digest_is_of_settings_and_weights(tmp_path):
    digests = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        hf.save(tmp_path / name, Model(CFG, jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(seed))))
        digests.append(model_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "b" / "config.json").write_text((tmp_path / "b" / "config.json").read_text() + " ")
    assert model_digest(tmp_path / "b") != digests[0]
