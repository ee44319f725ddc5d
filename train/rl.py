"""Online policy gradients: the policy answers, its answers are rewarded, an update makes the better ones likelier.

A step, all of it a function of settings, step and weights, so that a run which was left goes on as if it had not been:

    problems(t)      `groups` of them
    sample           `samples` answers to each, by the weights as they are now, at `temperature`
    reward           a number for each answer, or none for one that cannot be rewarded, which is then left out
    advantages       what each answer or token was worth beside what was to be expected (`advantages/`)
    updates          `epochs` passes over the answers in `minibatches` parts, one step of the optimiser each
                     (`objectives/policy_gradient.py`)

With a single update the policy that sampled is the one that is trained, and the ratio between them is 1. With more,
what it said of its answers is computed by the trainer's own forward pass before the first of them, as is what the
frozen reference says, where `kl_weight` asks for one; under adapters that is the model without them. Both see the
logits that answers were sampled from, divided by `temperature`.

`ALGORITHMS` names what can be chosen. Published are the clips and the way tokens are added up; ours are RLOO's and
TEMPO's: RLOO sums over the tokens of an answer as its paper does, up to a constant, TEMPO has DAPO's. Of DAPO there are
the clips and the mean over tokens; groups that teach nothing are not asked anew.

How weights get to the sampler: one compiled program merges adapters, rounds to the type of the activations and cuts the
stacked layers apart, on the devices. So while answers are written there is a second copy of the layers; nothing passes
through the host. With several devices the copy is put together on all of them, and the first of each process samples.

Several processes share the problems of a step: each answers and rewards its own, all are told what the others have, and
each puts the rows of its devices on them. What was answered and what it is worth are those of one process. The first
process alone writes and evaluates.

out/rl.yaml            every setting
out/metrics.jsonl      one line a step;  out/evaluation.jsonl one line an evaluation, the first of them before step 1
out/checkpoints/       what is gone on from, by the same command;  out/damaged/ those that could not be read
out/reward.png         the curve
out/model/             the result, as a Hugging Face folder
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from ..models.decoder import Model, Params, Remat, unstack_layers
from ..models.lora import LoraConfig
from ..sharding.mesh import MeshConfig, exchange, gather, local_rows, make_mesh, put_batch
from . import checkpoint
from .advantages.constrained import step_multipliers
from .algorithms import ALGORITHMS, Estimated, RlOptions, counts, make_loss, make_scores, policy_config, trainable
from .algorithms import advantages as advantages_of
from .checkpoint import CheckpointConfig
from .config import build, read_settings, write_settings
from .data.arithmetic import ArithmeticConfig
from .data.pipeline import BatchConfig
from .ending import preempted, stop_signals, together, watched
from .loop import NotFiniteError
from .metrics import append_records, forget_after, read_records
from .objectives.policy_gradient import Rollout
from .optimizer import OptimizerConfig, make_optimizer, make_schedule
from .recipe import Origin, Trainable, whole_model
from .rollouts import Sampled, lay_out, problem_indices, split_rows, spread
from .run import RULES, Outcome, RunConfig, absolute_name, alone, begin_state, origin_of
from .state import TrainState
from .step import Step, make_train_step

Row = Mapping[str, Any]
Answers = Sequence[Sequence[Sampled]]  # of each problem


# ------------------------------------------------------------------------------------------------------------ settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """All settings of a run, whatever the algorithm.

    Attributes:
      model: folder of the policy to begin with.
      data: problems, rows with `question` and `answer` (GSM8K) or with `prompt` and `answer`; or builtin:arithmetic.
      out: the run's folder. What was left there is gone on with.
      steps: times that the policy is asked.
      groups: problems of a step.
      samples: answers to each of them.
      temperature: of the answers.
      max_new_tokens: tokens of an answer at most.
      max_length: tokens of a prompt and its answer at most.
      epochs: passes over the answers of a step.
      minibatches: updates of each pass, each from that share of the answers.
      micro_batches: parts that an update works through one after the other, to save memory.
      packing: several answers in a row of `max_length` tokens.
      test: file of problems that are never learned from, for evaluations; of the embedded task its test problems.
      tested: how many of them.
      evaluate_every: steps between evaluations, each a greedy answer to every test problem; 0 makes none.
      tokenizer: folder; the model's own when not given.
      seed: of problems, answers and randomness.
      dtype: of activations; float32 on CPU and bfloat16 elsewhere when not given. Weights are float32.
      remat: what the backward pass computes again instead of keeping.
      adapters: train all weights, or low-rank adapters to them.
      max_seqs: answers written at the same time.
      max_skipped: updates in a row with a loss that is not finite, before the run stops.
      hang_seconds: of several processes, without a step done, before one says where it stands and ends; 0 waits.
    """

    model: str
    data: str
    out: Path
    steps: int = 200
    groups: int = 16
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512
    max_length: int = 1024
    epochs: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    packing: bool = False
    test: str | None = None
    tested: int = 100
    evaluate_every: int = 0
    tokenizer: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Remat = "none"
    adapters: Literal["none", "lora"] = "none"
    max_seqs: int = 32
    max_skipped: int = 10
    hang_seconds: float = 1800.0
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()

    def __post_init__(self):
        least = {"evaluate_every": 0, "tested": 0}
        least |= dict.fromkeys(("steps", "groups", "samples", "max_new_tokens", "max_length", "epochs"), 1)
        least |= dict.fromkeys(("minibatches", "micro_batches", "max_seqs", "max_skipped"), 1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"RlConfig.{name}: found {getattr(self, name)}; expected at least {low}.")
        if not 0 <= self.hang_seconds < math.inf:
            raise ValueError(f"RlConfig.hang_seconds: found {self.hang_seconds}; expected 0 (never) or seconds.")
        if not 1e-3 <= self.temperature < math.inf:
            raise ValueError(
                f"RlConfig.temperature: found {self.temperature}; expected 0.001 or more: answers have to differ, and "
                "float32 to tell them apart."
            )
        if self.max_new_tokens >= self.max_length:
            found = f"max_new_tokens={self.max_new_tokens}, max_length={self.max_length}"
            raise ValueError(f"RlConfig: found {found}; expected room for a prompt. Raise max_length.")

    @property
    def updates(self) -> int:
        """Of the optimiser, each step."""
        return self.epochs * self.minibatches


class Rewarded(NamedTuple):
    """What answers were worth, and what else there is to tell of them in metrics.jsonl."""

    values: Sequence[Sequence[float | None]]  # None or NaN for an answer that cannot be judged
    metrics: Mapping[str, float] = MappingProxyType({})


# A reward has no side effects, and gives the same for the same answers.
Reward = Callable[[Sequence[Row], Answers], Sequence[Sequence[float | None]] | Rewarded]


class Online(NamedTuple):
    """What the loop is given: problems, a sampler, rewards. All depends on its arguments alone."""

    size: int | None  # how many problems there are; None for no end
    problem: Callable[[int], Row]  # (index) -> a problem, which JSON can hold
    sample: Callable[[Model, Sequence[Row], int, int], Answers]
    # (policy, layers as a tuple; some problems of a step; the step, from 0; place of the first of them in it)
    rewards: Sequence[Reward]  # one; for `constrained` one for each threshold
    measure: Callable[[Model], Mapping[str, float]] | None = None  # an evaluation


def read_origin(cfg: RlConfig) -> Origin:
    """Configuration and tokenizer of the model that a run begins with."""
    return origin_of(_as_run(resolve(cfg)))


def resolve(cfg: RlConfig) -> RlConfig:
    """The settings as they are written down: whole paths, and the type of activations."""
    named = {
        name: absolute_name(value) for name in ("model", "data", "test", "tokenizer") if (value := getattr(cfg, name))
    }
    dtype = cfg.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return dataclasses.replace(cfg, **named, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ the loop
def run_rl(cfg: RlConfig, options: RlOptions, online: Online, *, progress: bool = False) -> Outcome:
    """Begin a run, or go on with the one in its folder; of one that is done the model is written again.

    Args:
      cfg: its settings.
      options: the algorithm and its settings.
      online: problems, sampler and rewards.
      progress: show a bar.

    Raises:
      FileExistsError: if the folder holds something else, or another process writes there.
      ValueError: for settings that do not fit together, or that are not what the run was begun with.
      DamagedCheckpointError: if there are checkpoints and none can be read.
      NotFiniteError: if too many updates in a row had a loss that is not finite.
      LostProcessError: if another process of the run has ended.
    """
    cfg = resolve(cfg)
    _check(cfg, options, online)
    origin, run = origin_of(_as_run(cfg)), _as_run(cfg)
    what = trainable(origin, options, cfg.lora if cfg.adapters == "lora" else None)
    mesh, mine = make_mesh(cfg.mesh), _share(cfg.groups)
    writes, again = jax.process_index() == 0, f"the same command, jaxaroo train rl ... --out {cfg.out}"
    with contextlib.ExitStack() as stack:
        if writes:
            _open(cfg, options)
            stack.enter_context(alone(cfg.out))
        multihost_utils.sync_global_devices("run folder")
        updates = cfg.steps * cfg.updates
        tx = make_optimizer(cfg.optimizer, updates)
        manager = stack.enter_context(checkpoint.open_checkpoints(cfg.out / "checkpoints", cfg.checkpoint))
        with jax.set_mesh(mesh):
            like, create = begin_state(run, origin, what, tx, mesh)
            found = checkpoint.restore(manager, like)
            state = create() if found is None else found.state
        done = int(state.step) // cfg.updates
        if found is not None and found.data["problems"] != _digest(_problems(cfg, online, done - 1)):
            raise ValueError(
                f"train rl: the problems of {cfg.data} are not those that {cfg.out} was begun with; expected the same. "
                "Put them back, or choose another --out."
            )
        if writes:
            forget_after(cfg.out / "metrics.jsonl", done)
            forget_after(cfg.out / "evaluation.jsonl", done - (found is None))
        hand_over = _hand_over(origin, what, mesh)
        scores = make_scores(origin.config, what, temperature=cfg.temperature, rules=RULES, remat=cfg.remat)
        learn = _Learner(cfg, options, mesh, update_of(cfg, options, origin, what, tx, like), scores)
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(together(again))
        alive = stack.enter_context(watched(cfg.hang_seconds if jax.process_count() > 1 else 0, again))
        silent = None if progress and writes else True
        bar = stack.enter_context(tqdm(total=cfg.steps, initial=done, desc="rl", unit="step", disable=silent))
        if found is None and cfg.evaluate_every:
            _evaluate(cfg, online, hand_over(state), 0)
        while done < cfg.steps:
            began = time.perf_counter()
            problems = _problems(cfg, online, done)
            own = [list(each) for each in online.sample(hand_over(state), problems[mine], done, mine.start)]
            answers, rewards, told = _of_all(own, *_rewards(cfg, online, problems[mine], own))
            sampled = time.perf_counter()
            state, metrics = learn(state, [a for each in answers for a in each], rewards, done)
            done += 1
            metrics |= told | {"seconds": time.perf_counter() - began, "seconds/sampling": sampled - began}
            if writes:
                append_records(cfg.out / "metrics.jsonl", [{"step": done, **metrics}])
            alive()
            bar.update()
            bar.set_postfix({"reward": f"{metrics['reward']:.4f}", "length": f"{metrics['completion/mean_len']:.1f}"})
            if (row := metrics["skipped_in_a_row"]) >= cfg.max_skipped:
                raise NotFiniteError(
                    f"train rl: loss or gradient of {row:.0f} updates in a row, up to step {done}, was not finite; "
                    f"expected less than {cfg.max_skipped}. Every checkpoint has parameters from before them; try a "
                    "lower learning rate."
                )
            if cfg.evaluate_every and (done == cfg.steps or done % cfg.evaluate_every == 0):
                _evaluate(cfg, online, hand_over(state), done)
            leaving = stopped() is not None or preempted(done)
            if done == cfg.steps or done % cfg.checkpoint.every == 0 or leaving:
                with jax.set_mesh(mesh):
                    checkpoint.save(manager, state, {"rollouts": done, "problems": _digest(problems)})
            if leaving:
                break
        manager.wait_until_finished()
        if done >= cfg.steps:
            params = gather(jax.jit(what.result)(state.params, state.frozen))
            if writes:
                whole_model(origin, None).write(cfg.out / "model", params)
                title = f"{options.algorithm}: {Path(cfg.model).name} on {Path(cfg.data).name}"
                _plot(cfg.out / "reward.png", read_records(cfg.out / "metrics.jsonl"), title)
            multihost_utils.sync_global_devices("exported")
    return Outcome(done, done >= cfg.steps, stopped())


def update_of(cfg: RlConfig, options: RlOptions, origin: Origin, what: Trainable, tx: Any, like: TrainState) -> Step:
    """The jitted update of a run: on windows of type `Rollout`; `like` says where the state lies."""
    policy = policy_config(options, cfg.max_new_tokens)
    shared: Any = dict(temperature=cfg.temperature, rules=RULES, remat=cfg.remat)
    return make_train_step(
        make_loss(origin.config, policy, options, **shared),
        tx,
        counts,
        combine=what.combine,
        schedule=make_schedule(cfg.optimizer, cfg.steps * cfg.updates),
        shardings=jax.tree.map(lambda x: x.sharding, like),
    )


# ----------------------------------------------------------------------------------------------------------- private
_MAY_CHANGE = ("settings.out", "settings.mesh", "settings.hang_seconds")
_RENAMED = {
    r"clip_(low|high)": r"clip/\1",
    r"ratio_max": "ratio/max",
    r"ratio": "ratio/mean",
    r"branch_frac|mean_depth": r"tree/\g<0>",
    r"kl_(k\w+)": r"kl/\1",  # what is measured; the penalty keeps its name
    r"lambda_(\d+)": r"lambda/\1",
    r"constraint_(\d+_\w+)": r"constraint/\1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """What rl.yaml holds."""

    settings: RlConfig
    options: RlOptions


def _check(cfg: RlConfig, options: RlOptions, online: Online) -> None:
    """That settings fit together, before anything is made."""
    known = ALGORITHMS[options.algorithm]
    if known.groups and cfg.samples < 2:
        raise ValueError(
            f"train rl: samples={cfg.samples} with {options.algorithm}, which compares the answers to a problem; "
            "expected at least 2."
        )
    if known.heads(options) and cfg.packing:
        raise ValueError(f"train rl: packing with {options.algorithm}; expected an answer a row, for the value heads.")
    wanted = len(options.constrained.thresholds) if options.algorithm == "constrained" else 1
    if len(online.rewards) != wanted:
        raise ValueError(
            f"train rl: {len(online.rewards)} rewards with {options.algorithm}; expected {wanted}"
            f"{', one for each threshold' if options.algorithm == 'constrained' else ''}."
        )
    if online.size is not None and online.size < 1:
        raise ValueError(f"train rl: {cfg.data} holds no problems; expected at least one.")
    if cfg.evaluate_every and online.measure is None:
        raise ValueError(f"train rl: evaluate_every={cfg.evaluate_every} without test problems; give --test, or 0.")


def _as_run(cfg: RlConfig) -> RunConfig:
    """What `run.py` wants to know to load a model and make a state."""
    same = ("model", "data", "out", "steps", "tokenizer", "seed", "dtype", "remat", "adapters", "lora", "checkpoint")
    named: Any = {name: getattr(cfg, name) for name in (*same, "optimizer", "mesh", "arithmetic")}
    return RunConfig(**named, batch=BatchConfig(max_length=cfg.max_length))


def _open(cfg: RlConfig, options: RlOptions) -> None:
    """Make the folder, or see that what was left there was begun with the same settings."""
    out, path, stored = cfg.out, cfg.out / "rl.yaml", _Stored(settings=cfg, options=options)
    if path.is_file():
        then = _flat(dataclasses.asdict(build(_Stored, read_settings(_Stored, path))))
        now = _flat(dataclasses.asdict(stored))
        changed = [n for n in {**then, **now} if not n.startswith(_MAY_CHANGE) and then.get(n) != now.get(n)]
        if changed:
            spell = lambda name: "--" + name.partition(".")[2].replace("_", "-")
            listed = "; ".join(f"{spell(n)} was {then.get(n)!r} and is {now.get(n)!r}" for n in changed)
            raise ValueError(
                f"train rl: {out} was begun with other settings: {listed}. Give the same to go on, or choose another "
                "--out."
            )
        return
    if out.exists() and (not out.is_dir() or any(p.name not in (".lock", "rl.partial") for p in out.iterdir())):
        raise FileExistsError(f"train rl: {out} holds other files; expected a new or empty folder, or a run to go on.")
    out.mkdir(parents=True, exist_ok=True)
    write_settings(stored, path)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _problems(cfg: RlConfig, online: Online, step: int) -> list[Row]:
    return [online.problem(i) for i in problem_indices(cfg.seed, step, cfg.groups, online.size)]


def _share(groups: int) -> slice:
    """Which problems of a step this process answers."""
    count, index = jax.process_count(), jax.process_index()
    if groups % count:
        raise ValueError(f"train rl: groups={groups} over {count} processes; expected a multiple, one share each.")
    size = groups // count
    return slice(index * size, (index + 1) * size)


def _of_all(
    answers: list[list[Sampled]], rewards: np.ndarray, told: Mapping[str, float]
) -> tuple[list[list[Sampled]], np.ndarray, dict[str, float]]:
    """What each process has of a step, by the order of the problems; of what rewards tell the mean."""
    if jax.process_count() == 1:
        return answers, rewards, dict(told)
    plain = [[a._replace(prompt=[*a.prompt], answer=[*a.answer]) for a in each] for each in answers]
    every = exchange([plain, rewards.tolist(), dict(told)])
    found = [[Sampled(*a) for a in each] for one in every for each in one[0]]
    values = np.concatenate([np.asarray(one[1], np.float32) for one in every], axis=1)
    return found, values, {name: math.fsum(one[2][name] for one in every) / len(every) for name in told}


def _digest(problems: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(problems, sort_keys=True).encode()).hexdigest()


def _rewards(
    cfg: RlConfig, online: Online, problems: Sequence[Row], answers: Answers
) -> tuple[np.ndarray, dict[str, float]]:
    """[N, G, K], NaN where there is none; and what the rewards tell."""
    found, told = [], {}
    for reward in online.rewards:
        said = reward(problems, answers)
        values, metrics = said if isinstance(said, Rewarded) else (said, {})
        told |= metrics
        given = [[math.nan if r is None else float(r) for r in each] for each in values]
        shape, wanted = [len(each) for each in given], [cfg.samples] * len(problems)
        if shape != wanted or [len(each) for each in answers] != wanted:
            raise ValueError(
                f"train rl: rewards of {shape} answers to {len(answers)} problems of {[len(a) for a in answers]}; "
                f"expected {cfg.samples} for each of {len(problems)}."
            )
        found.append(given)
    values = np.asarray(found, np.float32)
    return np.where(np.isfinite(values), values, np.nan), told


def _hand_over(origin: Origin, what: Any, mesh: Any) -> Callable[[TrainState], Model]:
    """The policy as a sampler takes it."""

    whole = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=whole)
    def served(trained: Params, frozen: Params) -> Params:
        params = unstack_layers(what.result(trained, frozen))
        return jax.tree.map(lambda w: w.astype(origin.config.dtype), params)

    def hand_over(state: TrainState) -> Model:
        with jax.set_mesh(mesh):
            params = served(state.params, state.frozen)
        return Model(origin.config, jax.tree.map(lambda w: w.addressable_data(0), params))

    return hand_over


class _Learner:
    """From the answers of a step to a new state; what stays the same from step to step is kept here."""

    def __init__(self, cfg: RlConfig, options: RlOptions, mesh: Any, update: Any, scores: Any):
        ways = math.prod(mesh.shape[name] for name in RULES.batch or ())
        self.cfg, self.options, self.mesh, self.update, self.scores = cfg, options, mesh, update, scores
        self.multiple = cfg.minibatches * cfg.micro_batches * ways

    def __call__(
        self, state: TrainState, answers: list[Sampled], rewards: np.ndarray, step: int
    ) -> tuple[TrainState, dict[str, float]]:
        cfg, options = self.cfg, self.options
        known = ALGORITHMS[options.algorithm]
        kept = np.all(np.isfinite(rewards), axis=0).reshape(-1)
        sizes = dict(max_length=cfg.max_length, multiple=self.multiple, packing=cfg.packing)
        placed = lay_out(answers, kept, **sizes)  # type: ignore[arg-type]
        with jax.set_mesh(self.mesh):
            # 1. What policy, value heads and reference say before the first update.
            scored: dict[str, np.ndarray] = {}
            if cfg.updates > 1 or known.heads(options) or options.kl_weight:
                parts = split_rows(placed.batch, np.arange(len(placed.batch.mask)), 1, cfg.micro_batches)
                reference = options.kl_weight > 0
                said = self.scores(state.params, state.frozen, self._put(parts[0]), reference=reference)
                scored = {name: x.reshape(placed.batch.mask.shape) for name, x in gather(said).items()}
            # 2. What each token was worth.
            found: Estimated = advantages_of(
                options, answers, rewards, placed, scored, gather(state.carry), cfg.max_new_tokens
            )
            more = dict(found.more)
            if all(a.logprobs is not None for a in answers):
                more["sampled"] = spread([a.logprobs for a in answers], answers, placed)
            penalised = options.kl_weight > 0
            rollout = Rollout(
                placed.batch._replace(more=more or None),  # type: ignore[arg-type]
                found.advantages,  # type: ignore[arg-type]
                scored["logp"] if cfg.updates > 1 else None,  # type: ignore[arg-type]
                scored["reference"] if penalised else None,  # type: ignore[arg-type]
            )
            # 3. The updates.
            rows, measured = len(placed.batch.mask), []
            for epoch in range(cfg.epochs):
                order = np.arange(rows)
                if cfg.minibatches > 1:
                    order = np.random.default_rng([cfg.seed, step, epoch]).permutation(rows)
                for window in split_rows(rollout, order, cfg.minibatches, cfg.micro_batches):
                    state, metrics = self.update(state, self._put(window))
                    measured.append(metrics)
            # 4. What the rewards' multipliers make of it.
            told = dict(found.metrics)
            if options.algorithm == "constrained" and kept.any():
                mean: Any = rewards.reshape(len(rewards), -1)[:, kept].mean(axis=1)
                carry, more_told = _multipliers(mean, state.carry, options.constrained)
                carry = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), carry, state.carry)
                state, told = state._replace(carry=carry), told | {k: float(v) for k, v in more_told.items()}
        measures = told | _lengths(answers) | _over_updates(jax.device_get(measured))
        return state, {_spelled(name): value for name, value in measures.items()}

    def _put(self, window: Any) -> Any:
        """Every process has all rows, and puts those of its devices there."""
        rows = local_rows(self.mesh, RULES, jax.tree.leaves(window)[0].shape[1])
        return put_batch(self.mesh, RULES, jax.tree.map(lambda x: x[:, rows], window))


_multipliers = jax.jit(step_multipliers, static_argnames="cfg")


def _lengths(answers: Sequence[Sampled]) -> dict[str, float]:
    return {
        "completion/mean_len": sum(len(a.answer) for a in answers) / len(answers),
        "completion/truncated_frac": sum(not a.ended for a in answers) / len(answers),
    }


def _over_updates(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the updates; of the largest ratio the largest, of skips the last."""
    found = {}
    for name in measured[0].keys() - {"parts", "inputs"}:
        values = [float(m[name]) for m in measured]
        last = name in ("skipped_in_a_row", "learning_rate")
        value = max(values) if name == "ratio_max" else values[-1] if last else math.fsum(values) / len(values)
        found[name] = value
    return dict(sorted(found.items()))


def _spelled(name: str) -> str:
    """A metric's name in metrics.jsonl."""
    return next((re.sub(old, new, name) for old, new in _RENAMED.items() if re.fullmatch(old, name)), name)


def _evaluate(cfg: RlConfig, online: Online, policy: Model, step: int) -> None:
    """By the first process; the others have come so far for the weights."""
    assert online.measure is not None
    if jax.process_index() == 0:
        append_records(cfg.out / "evaluation.jsonl", [{"step": step, **online.measure(policy)}])


def _plot(path: Path, records: Sequence[Mapping[str, Any]], title: str) -> None:
    """A picture of the mean reward over steps, and of the length of answers."""
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    steps = [r["step"] for r in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="mean reward")
    axes.plot(steps, [r.get("reward") for r in records], color="tab:blue", label="reward")
    axes.grid(alpha=0.3)
    lengths = axes.twinx()
    lengths.set_ylabel("tokens of an answer")
    found = [r.get("completion/mean_len") for r in records]
    lengths.plot(steps, found, color="tab:gray", linestyle=":", label="length")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=axes.transAxes)
    figure.savefig(path, dpi=120)
