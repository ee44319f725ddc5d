"""How failures are told."""


def test_an_interrupt_ends_with_130(run, speaking, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxaroo.models.hf.load_master", interrupted)
    status, _, err = run("generate", "--model", speaking, "--prompt", "a")
    assert (status, err.strip()) == (130, "jaxaroo: interrupted")
