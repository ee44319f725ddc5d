"""`jaxaroo quickstart`: two tiny models from nothing."""

import dataclasses
import sys
import time
from pathlib import Path


def quickstart(
    *, out: Path = Path("quickstart-out"), seconds: float = 60.0, steps: int = 1500, prompt: str = "There was movement"
) -> int:
    """Train two tiny models from nothing: one recites poems, one reasons in steps that can be checked.

    Args:
      out: folder for both; an earlier quick start's is replaced.
      seconds: how long the first learns three poems, byte by byte.
      steps: how long the second learns word problems, in updates.
      prompt: what the first continues.
    """
    if out.exists() and any(p.name not in ("checkpoint", "arithmetic") for p in out.iterdir()):
        raise FileExistsError(f"quickstart: {out} holds other files; expected a new folder. Choose another --out.")
    _recite(out / "checkpoint", seconds, prompt)
    _reason(out / "arithmetic", steps)
    print(
        f"""
more:
  jaxaroo generate --model {out / "checkpoint"} --prompt "And Clancy"
  jaxaroo eval answers --model {out / "arithmetic" / "model"} --data builtin:arithmetic --max-new-tokens 64
  README.md: a model that solves most of these problems, in five minutes""",
        file=sys.stderr,
    )
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _recite(folder: Path, seconds: float, prompt: str) -> None:
    """The loop in the small: a step, batches, an engine; no run folder."""
    import jax

    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..models.decoder import Model, init_params
    from ..models.hf import load, save
    from ..models.presets import preset
    from ..models.tokenizer import byte_tokenizer, load_tokenizer
    from ..train.data.pipeline import count_units
    from ..train.data.text import read_verse, windows
    from ..train.loop import fit
    from ..train.objectives import sft
    from ..train.optimizer import OptimizerConfig, make_optimizer
    from ..train.state import init_state
    from ..train.step import make_train_step

    tokenizer, steps, length = byte_tokenizer(), 400, 160
    sizes = dict(embed_dim=128, ffn_dim=384, num_layers=4, num_heads=4, max_positions=length)
    cfg = dataclasses.replace(preset("tiny", vocab_size=tokenizer.vocab_size), **sizes, eos_ids=tokenizer.eos_ids)
    tx = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=20, decay_to=0.0, weight_decay=1e-4), steps)
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    print(
        f"training {sum(p.size for p in jax.tree.leaves(params)):,} parameters on {jax.devices()[0]}", file=sys.stderr
    )
    assert tokenizer.bos_id is not None
    text = tokenizer.encode(read_verse(), bos=False)
    batches = windows(text, batch=12, length=length, seed=0, bos_id=tokenizer.bos_id)
    step, end, records = make_train_step(sft.make_loss(cfg), tx, count_units), time.monotonic() + seconds, []
    enough = lambda _: time.monotonic() > end
    state = fit(init_state(params, tx), step, batches, steps=steps, log=records.extend, stop=enough, progress=True)
    last = records[-1]
    print(f"loss {records[0]['loss']:.3f} -> {last['loss']:.3f} nats a byte in {last['step']} steps", file=sys.stderr)
    save(folder, Model(cfg, state.params), overwrite=True)
    tokenizer.save(folder)
    print(f"wrote {folder}; loading it again\n", file=sys.stderr)
    with Engine(load(folder), load_tokenizer(folder)) as engine:
        print(prompt, end="", flush=True)
        for delta in engine.generate(prompt, Sampling(max_tokens=128, temperature=0.5, seed=0), stream=True):
            print(delta.text, end="", flush=True)
    print(end="\n\n", flush=True)


def _reason(out: Path, steps: int) -> None:
    """A whole run, and what its model makes of a problem that it has not seen."""
    import shutil

    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer
    from ..train.data.arithmetic import ArithmeticConfig, check_lines, make_problem
    from ..train.data.pipeline import BatchConfig
    from ..train.optimizer import OptimizerConfig
    from ..train.run import RunConfig, start

    shutil.rmtree(out, ignore_errors=True)
    batch = BatchConfig(size=16, max_length=128, packing=False)
    rate = OptimizerConfig(learning_rate=2e-3, warmup_steps=min(50, steps))
    print("training on word problems", file=sys.stderr)
    cfg = RunConfig(model="preset:tiny", data="builtin:arithmetic", out=out, steps=steps, batch=batch, optimizer=rate)
    if not start("sft", cfg, progress=True).finished:
        raise KeyboardInterrupt
    problem = make_problem(ArithmeticConfig(), "test", 0)
    with Engine(load(out / "model"), load_tokenizer(out / "model")) as engine:
        [result] = engine.generate(f"{problem.question}\n", Sampling(max_tokens=64, temperature=0.0))
    lines = (result.outputs[0].text or "").splitlines()
    print(problem.question)
    for line, right in zip(lines, check_lines(problem, lines), strict=True):
        print(f"  {line:20} {'right' if right else 'wrong'}")
