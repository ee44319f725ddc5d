"""What does a step with drafts cost, and does the arithmetic of speculation hold?

    speedup = tau t_plain / (t_draft + t_verify + t_commit)

On the right are medians of parts called one by one; on the left two compiled loops, in turns in one process. Three
tables, on a target with fresh weights (of what a step costs they say the same as trained ones):

`verify`    a verifying pass over a chain of C nodes, beside a plain step: t_verify(C) / t_decode(1).
`told`      chains from a drafter that is told the answer and spoils each token with probability 1 - alpha: what any
            drafter of that acceptance would be worth if drafting were free. tau is beside E[tau] of 2211.17192.
`drafters`  each real drafter, with fresh weights: its drafts are worth little, but its share of the time is what it is
            when trained.

    python -m benchmarks.speculative                                   (from the repository root)
    python -m benchmarks.speculative --shape llama-8b --dtype bfloat16      (on an accelerator)
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.shapes import SHAPES
from jaxaroo.infer import decode as plain
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.controller import expected_tau, predicted_speedup
from jaxaroo.infer.speculative.drafters import eagle, jakiro, kangaroo, lookup
from jaxaroo.infer.speculative.loop import Context, Drafter, Speculation
from jaxaroo.infer.speculative.measure import time_parts
from jaxaroo.infer.speculative.tree import make_chain
from jaxaroo.models import eagle as eagle_net
from jaxaroo.models import jakiro as jakiro_net
from jaxaroo.models import kangaroo as kangaroo_net
from jaxaroo.models.decoder import Model, init_params, unstack_layers

PROMPT, NEW, CAPACITY = 64, 96, 384
GREEDY = Sampling(temperature=0.0, max_tokens=NEW, ignore_eos=True)


@functools.lru_cache
def told(drafts: int) -> Drafter:
    """Drafts what stands in `params["answer"]` [B, S], each token right with probability `params["alpha"]`."""

    def propose(target, params, state, context: Context):
        at = context.filled[:, None] + jnp.arange(drafts)[None]
        right = jnp.take_along_axis(params["answer"], at, axis=1, mode="clip")
        coin = lambda place: jax.random.uniform(jax.random.fold_in(jax.random.key(1), place))
        spoiled = jax.vmap(jax.vmap(coin))(at) >= params["alpha"]
        guess = jnp.where(spoiled, (right + 1) % params["vocab"], right)
        return make_chain(context.root, guess, jnp.ones(guess.shape, bool)), state, context.cache

    return lookup.make_drafter(drafts)._replace(name=f"told, {drafts}", propose=propose)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=SHAPES, default="llama-100m")
    args.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    args.add_argument("--drafts", type=int, nargs="+", default=[1, 3, 7])
    args.add_argument("--alpha", type=float, nargs="+", default=[1.0, 0.8, 0.5])
    args.add_argument("--nodes", type=int, nargs="+", default=[16, 32, 64], help="more sizes of a verifying pass")
    args.add_argument("--runs", type=int, default=5)
    args.add_argument("--name", default=None, help="of the results file")
    opts = args.parse_args()

    cfg = SHAPES[opts.shape]
    cfg = type(cfg)(**{**cfg.__dict__, "dtype": opts.dtype})
    cast = lambda tree: jax.tree.map(lambda w: w.astype(opts.dtype), tree)
    model = Model(cfg, unstack_layers(jax.jit(lambda k: cast(init_params(cfg, k)))(jax.random.key(0))))
    result: dict[str, Any] = {"benchmark": "speculative", "shape": opts.shape, "dtype": opts.dtype}
    result |= {"prompt": PROMPT, "new": NEW, "capacity": CAPACITY, "environment": record.environment()}
    prompt = np.random.default_rng(0).integers(3, cfg.vocab_size, PROMPT).tolist()
    _, answer = decode_plainly(model, prompt)

    result["told"], result["verify"] = [], []
    for drafts in opts.drafts:
        params = {"answer": jnp.asarray(answer), "alpha": jnp.float32(1), "vocab": jnp.int32(cfg.vocab_size)}
        parts = time_parts(model, _speculation(told(drafts), params), [prompt], GREEDY, capacity=CAPACITY)
        result["verify"].append({"nodes": drafts + 1, "seconds": parts["verify"], "plain": parts["plain"]})
        for alpha in opts.alpha:
            spec = _speculation(told(drafts), params | {"alpha": jnp.float32(alpha)})
            row = {"drafts": drafts, "alpha": alpha, "expected_tau": expected_tau(alpha, drafts)}
            result["told"].append(show(row | compare(model, spec, prompt, answer, opts.runs)))
    for nodes in opts.nodes:
        params = {"answer": jnp.asarray(answer), "alpha": jnp.float32(1), "vocab": jnp.int32(cfg.vocab_size)}
        spec = _speculation(told(nodes - 1), params)
        parts = time_parts(model, spec, [prompt], GREEDY, steps=8, capacity=CAPACITY + 64 * (nodes // 64))
        result["verify"].append({"nodes": nodes, "seconds": parts["verify"], "plain": parts["plain"]})
    for row in result["verify"]:
        row["over_plain"] = row["seconds"] / row["plain"]
        print(f"verify {row['nodes']:3d} nodes: {row['over_plain']:.2f} plain steps")
    result["drafters"] = []
    for name, spec in real_drafters(model, cast):
        row = {"drafter": name, "nodes": spec.drafter.nodes}
        row["parameters"] = sum(w.size for w in jax.tree.leaves(spec.drafter_params))
        result["drafters"].append(show(row | compare(model, spec, prompt, answer, opts.runs)))
    errors = [abs(r["predicted"] / r["speedup"] - 1) for r in result["told"] + result["drafters"]]
    result["prediction_error"] = {"median": statistics.median(errors), "most": max(errors)}
    print(
        f"predicted against measured: off by {max(errors):.1%} at most, {statistics.median(errors):.1%} in the median"
    )
    record.save(opts.name or f"speculative-{opts.shape}-{jax.default_backend()}", result)


def real_drafters(model: Model, cast: Callable[[Any], Any]) -> list[tuple[str, Speculation]]:
    """Every drafter, as it comes when a user names nothing else, with fresh weights."""
    cfg, key = model.config, jax.random.key(1)
    e, j, m = eagle_net.EagleConfig(target=cfg), jakiro_net.JakiroConfig(target=cfg), jakiro_net.JakiroConfig
    mixture, k = m(target=cfg, kind="mixture"), kangaroo_net.KangarooConfig(target=cfg, exit_layer=2)
    eagle_params, adapter = cast(eagle_net.init_params(e, key)), cast(kangaroo_net.init_params(k, key))
    small: Any = dict(nodes=16, beam=4, levels=4)
    return [
        ("lookup, 6", _speculation(lookup.make_drafter(6), ())),
        ("EAGLE-1, 26 nodes", _speculation(eagle.make_drafter(e, tree="static"), eagle_params)),
        ("EAGLE-2, 60 nodes", _speculation(eagle.make_drafter(e), eagle_params)),
        ("EAGLE-2, 16 nodes", _speculation(eagle.make_drafter(e, **small), eagle_params)),
        ("Jakiro, 60 nodes", _speculation(jakiro.make_drafter(j), cast(jakiro_net.init_params(j, key)))),
        ("Jakiro, 16 nodes", _speculation(jakiro.make_drafter(j, **small), cast(jakiro_net.init_params(j, key)))),
        (
            "Jakiro mixture, 16 nodes",
            _speculation(jakiro.make_drafter(mixture, **small), cast(jakiro_net.init_params(mixture, key))),
        ),
        ("Kangaroo, 6", _speculation(kangaroo.make_drafter(k, 6), {"adapter": adapter, "stop": ()})),
    ]


def compare(model: Model, spec: Speculation, prompt: list[int], answer: np.ndarray, runs: int) -> dict[str, Any]:
    """Plain and speculative decoding of the same answer in turns, and what the parts of a step predict."""
    plainly, drafted = [], []
    for turn in range(runs + 1):  # the first compiles
        seconds, text = decode_plainly(model, prompt)
        plainly.append(seconds / (NEW - 1))
        np.testing.assert_array_equal(text, answer)
        seconds, text, tau = decode_drafting(model, spec, prompt)
        drafted.append(seconds / (NEW - 1))
        if turn == 0:
            same = bool(np.array_equal(text, answer))
    parts = time_parts(model, spec, [prompt], GREEDY, capacity=CAPACITY)
    cost = [parts[name] for name in ("draft", "verify", "commit")]
    before, after = record.spread(plainly[1:]), record.spread(drafted[1:])
    return {
        "tau": tau,
        "same_tokens": same,
        "plain_seconds_per_token": before,
        "seconds_per_token": after,
        "speedup": before["median"] / after["median"],
        "predicted": predicted_speedup(tau, parts["plain"], *cost),
        "parts": parts,
        "shares": dict(zip(("draft", "verify", "commit"), (c / sum(cost) for c in cost), strict=True)),
    }


def decode_plainly(model: Model, prompt: list[int]) -> tuple[float, np.ndarray]:
    """Seconds of the decode loop, and the text."""
    tokens, rows = _asked(model, prompt)
    state = jax.block_until_ready(plain.prefill(model.config, model.params, tokens, rows, chunk=64))
    start = time.perf_counter()
    done = plain.decode(model.config, model.params, state, rows, np.zeros(1, bool), np.int32(NEW))
    jax.block_until_ready(done)
    return time.perf_counter() - start, np.array(done.tokens)


def decode_drafting(model: Model, spec: Speculation, prompt: list[int]) -> tuple[float, np.ndarray, float]:
    """Seconds of the decode loop, the text, and tokens a step."""
    tokens, rows = _asked(model, prompt)
    weights = loop.Weights(model.params, spec.drafter_params, ())
    state = jax.block_until_ready(loop.prefill(model.config, weights, spec.drafter, tokens, rows, chunk=64))
    start = time.perf_counter()
    args = weights, spec.drafter, spec.verifier, state, rows, np.zeros(1, bool), np.int32(NEW)
    done = jax.block_until_ready(loop.decode(model.config, *args))
    seconds, emitted = time.perf_counter() - start, np.array(done.tally.emitted[0])
    return seconds, np.array(done.rows.tokens), float(emitted @ np.arange(len(emitted)) / emitted.sum())


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row while the others are still being measured."""
    name = row.get("drafter") or f"told {row['drafts']}, alpha {row['alpha']:g}"
    shares = ", ".join(f"{k} {v:.0%}" for k, v in row["shares"].items())
    print(
        f"{name}: tau {row['tau']:.2f}, {row['speedup']:.2f}x, predicted {row['predicted']:.2f}x ({shares})", flush=True
    )
    return row


# ----------------------------------------------------------------------------------------------------------- private
def _speculation(drafter: Drafter, params: Any) -> Speculation:
    return Speculation(drafter, verify.coupled(), params)


def _asked(model: Model, prompt: list[int]) -> tuple[np.ndarray, plain.Rows]:
    tokens = np.zeros((1, CAPACITY), np.int32)
    tokens[0, :PROMPT] = prompt
    length = np.array([PROMPT], np.int32)
    settings = pack_sampling([(GREEDY, 0, 0)], 0, model.config.vocab_size)
    return tokens, plain.Rows(settings, length, length + NEW, np.full((1, 1), -1, np.int32))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
