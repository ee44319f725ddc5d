"""A model that speaks, a run that was trained, and a way to call a command in this process."""

import json

import pytest

from jaxaroo.cli.main import main
from jaxaroo.models.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def speaking(tmp_path_factory):
    """A checkpoint that has a tokenizer: the golden's vocabulary is smaller than bytes, so a model of our own."""
    import jax

    from jaxaroo.models.decoder import DecoderConfig, Model, init_params
    from jaxaroo.models.hf import save

    tokenizer = byte_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        ffn_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=128,
        eos_ids=tokenizer.eos_ids,
    )
    folder = tmp_path_factory.mktemp("models") / "speaking"
    save(folder, Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of a few steps on a file of rows, with settings from a file and from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"question": f"what is {i} + 1 ?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.yaml").write_text("steps: 7\nlog_every: 2\nbatch:\n  size: 8\n  max_length: 64\n")
    base = ["train", "sft", "--model", "preset:tiny", "--data", str(folder / "rows.jsonl")]
    argv = [*base, "--config", str(folder / "settings.yaml"), "--out", str(folder / "run"), "--steps", "3"]
    with jax_numpy_promotion("standard"):
        assert main(argv) == 0
    return folder


def jax_numpy_promotion(mode):
    import jax

    return jax.numpy_dtype_promotion(mode)


@pytest.fixture
def run(capsys):
    """Call a command in this process: exit status, what it printed, what it complained of."""

    def call(*argv):
        try:
            status = main([str(a) for a in argv])
        except SystemExit as e:  # the parser's own
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
