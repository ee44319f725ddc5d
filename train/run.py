"""A run: a folder that begins with settings and ends with a model, and can be left and gone back to at any time.

out/config.yaml      every setting
out/metrics.jsonl    one line a step;  out/evaluation.jsonl one line an evaluation;  out/goodput.jsonl one a save
out/checkpoints/     what `resume` goes on from;  out/damaged/ those that could not be read
out/loss.png         the curve
out/model/           the result, as a Hugging Face folder
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..models import hf
from ..models.decoder import DecoderConfig, Params, Remat, init_params, param_axes, param_shapes
from ..models.lora import LoraConfig
from ..models.presets import preset
from ..models.tokenizer import byte_tokenizer, load_tokenizer
from ..sharding.mesh import MeshConfig, exchange, gather, local_rows, make_mesh, put_batch
from ..sharding.rules import FSDP_TP_SEQ, shardings_like
from . import checkpoint, goodput, references
from .checkpoint import CheckpointConfig
from .config import build, read_settings, write_settings
from .data.arithmetic import ArithmeticConfig, ArithmeticExamples, arithmetic_tokenizer
from .data.formats import Layout, open_examples
from .data.pipeline import BatchConfig, Batches, Encode
from .data.tokenise import Encoded
from .ending import preempted, stop_signals, together, watched
from .labels.truth import ArithmeticSolutions, SolutionsConfig
from .loop import fit
from .metrics import append_records, board_writer, forget_after, plot_loss, read_records, recorder
from .optimizer import OptimizerConfig, make_schedule
from .preference import PreferenceOptions
from .qat import QatOptions
from .recipe import (
    RECIPES,
    AcceptanceOptions,
    DrafterOptions,
    EarlyExitOptions,
    JudgeOptions,
    Origin,
    Recipe,
    RewardOptions,
    SftOptions,
    Trainable,
)
from .state import TrainState, init_state
from .step import Step, make_train_step

log = logging.getLogger(__name__)
ARITHMETIC = "builtin:arithmetic"
RULES = FSDP_TP_SEQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    Attributes:
      model: folder of a Hugging Face checkpoint, or preset:NAME for fresh weights; for drafters the target.
      data: JSONL or Parquet file, folder of them or of a saved Hugging Face dataset, or builtin:arithmetic.
      out: the run's folder; new or empty.
      steps: updates to make.
      tokenizer: folder; the model's own, the embedded task's, or bytes when not given.
      split: which part of a saved Hugging Face dataset.
      on_bad_row: what to do about rows that are not as they should be.
      seed: of weights, data order and randomness.
      dtype: of activations; float32 on CPU and bfloat16 elsewhere when not given. Weights are float32.
      remat: what the backward pass computes again instead of keeping.
      adapters: train all weights, or low-rank adapters to them.
      ema: decay of a running mean of the weights, which is what is exported; 0 keeps none.
      log_every: steps between looks at the metrics.
      evaluate_every: steps between evaluations, of kinds that have one; 0 makes none.
      max_skipped: steps in a row with a loss that is not finite, before the run stops.
      hang_seconds: of several processes, without anything done, before one says where it stands and ends; 0 waits.
      tensorboard: write the metrics for TensorBoard too.
    """

    model: Annotated[str, tyro.conf.arg(aliases=("--target",))]
    data: str
    out: Path
    steps: int = 1000
    tokenizer: str | None = None
    split: str | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Remat = "none"
    adapters: Literal["none", "lora"] = "none"
    ema: float = 0.0
    log_every: int = 10
    evaluate_every: int = 0
    max_skipped: int = 10
    hang_seconds: float = 1800.0
    tensorboard: bool = False
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()

    def __post_init__(self):
        for name in ("steps", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig.{name}: found {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.hang_seconds < float("inf"):
            raise ValueError(f"RunConfig.hang_seconds: found {self.hang_seconds}; expected 0 (never) or seconds.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"RunConfig.ema: found {self.ema}; expected 0 (none) or a decay below 1.")


class Outcome(NamedTuple):
    """How a run was left."""

    step: int
    finished: bool
    signal: int | None  # what asked it to stop


# (target's settings, frozen parameters, trained parameters) -> measurements; `train` never imports `infer`. What is
# frozen is the target, or {"target": ..., "drafter": ...} for kinds that have a companion.
Evaluate = Callable[[DecoderConfig, Params, Params], Mapping[str, float]]


def start(
    kind: str, cfg: RunConfig, options: Any = None, *, evaluate: Evaluate | None = None, progress: bool = False
) -> Outcome:
    """Begin a run in a new folder and train to its end.

    Args:
      kind: a key of `RECIPES`.
      cfg: its settings.
      options: those of this kind alone; its defaults when not given.
      evaluate: measures what has been trained so far, every `evaluate_every` steps; on one process alone.
      progress: show a bar.

    Raises:
      FileExistsError: if the folder holds anything.
      ValueError: for settings, data or weights that cannot be used; nothing is left behind then. For a first step that
        `Recipe.check_start` refuses; then the folder is, without a checkpoint.
    """
    if cfg.out.exists() and (not cfg.out.is_dir() or any(p.name != ".lock" for p in cfg.out.iterdir())):
        what = "a run" if (cfg.out / "config.yaml").exists() else "other files"
        raise FileExistsError(
            f"train: {cfg.out} holds {what}; expected a new or empty folder. "
            f"Go on with `jaxaroo train resume {cfg.out}`, or choose another --out."
        )
    paths = {name: absolute_name(value) for name in ("model", "data", "tokenizer") if (value := getattr(cfg, name))}
    cfg = dataclasses.replace(cfg, **paths)
    options = RECIPES[kind].options() if options is None else options
    named = {name: absolute_name(value) for name in RECIPES[kind].paths if (value := getattr(options, name))}
    options = dataclasses.replace(options, **named)
    if cfg.dtype is None:  # written down, so that it stays what it is on another machine
        cfg = dataclasses.replace(cfg, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    return _train(kind, cfg, options, evaluate, progress, fresh=True)


def resume(
    out: Path, *, mesh: MeshConfig | None = None, evaluate: Evaluate | None = None, progress: bool = False
) -> Outcome:
    """Go on where a run was left, by whatever it was stopped.

    Args:
      out: the run's folder.
      mesh: of this machine, if it has other devices than the run began on.
      evaluate: as for `start`.
      progress: show a bar.

    Raises:
      FileNotFoundError: if that is no run's folder.
      DamagedCheckpointError: if none of its checkpoints can be read.
    """
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(
            f"train resume: found no {out / 'config.yaml'}; expected the --out folder of a run. Those of `train rl`, "
            "curry, ranked, value-rounds, resnet20 and ghostnet are gone on with by the command that began them."
        )
    kind, cfg, options = read_run(out)
    cfg = dataclasses.replace(cfg, out=out, **({"mesh": mesh} if mesh else {}))
    return _train(kind, cfg, options, evaluate, progress, fresh=False)


def begun(out: Path) -> bool:
    """Whether a folder holds a run. Of several processes all are told what the first one sees, before any writes."""
    found = (out / "config.yaml").is_file()
    if jax.process_count() > 1:
        found = bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))
    return found


def read_run(out: Path) -> tuple[str, RunConfig, Any]:
    """Kind, settings and options of the run in a folder."""
    stored = build(_Stored, read_settings(_Stored, out / "config.yaml"))
    options = getattr(stored, stored.kind.replace("-", "_"))
    return stored.kind, stored.settings, RECIPES[stored.kind].options() if options is None else options


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """No other process writes to this folder; the lock goes with the process, however that ends.

    Raises:
      FileExistsError: if another one does.
    """
    with (out / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise FileExistsError(f"train: another process is writing to {out}; expected to be alone there.") from e
        except (ImportError, OSError) as e:  # not every system and file system has locks
            log.warning("train: %s cannot be locked (%s); see that no other process writes there", out, e)
        yield


def origin_of(cfg: RunConfig) -> Origin:
    """Configuration and tokenizer of the model that a run begins with; no weights are read.

    Raises:
      ValueError: if tokenizer or settings do not fit the model.
    """
    name = cfg.model.removeprefix("preset:")
    folder = None if name != cfg.model else Path(cfg.model)
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(Path(cfg.tokenizer))
    elif folder is not None:
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = arithmetic_tokenizer() if cfg.data == ARITHMETIC else byte_tokenizer()
    if folder is not None:
        config = hf.read_config(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"train: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's table {config.vocab_size} "
                "rows; expected a row for every id. Use the model's own tokenizer."
            )
    else:
        config = dataclasses.replace(preset(name, vocab_size=tokenizer.vocab_size), eos_ids=tokenizer.eos_ids)
    if cfg.batch.max_length > config.max_positions:
        raise ValueError(
            f"train: max_length={cfg.batch.max_length}; expected at most the model's {config.max_positions} positions. "
            "Lower --batch.max-length."
        )
    return Origin(dataclasses.replace(config, dtype=cfg.dtype or "float32"), tokenizer, folder)


def state_shapes(cfg: RunConfig, origin: Origin, what: Trainable, tx: Any, mesh: Mesh) -> TrainState:
    """The state in the abstract: `ShapeDtypeStruct`s with their shardings; nothing is read or allocated.

    Args:
      cfg: seed, and whether there is a moving average.
      origin: what the run begins with.
      what: is trained.
      tx: the optimiser.
      mesh: where all of it goes.
    """
    shapes, placed = _base(origin, what, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))  # the devices may not be here
    like = jax.eval_shape(partial(_state_of, cfg, what, tx), shapes, key)
    trained = RULES.shardings(mesh, what.axes, like.params)
    one: Any = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    axes = param_axes(origin.config)
    shardings = TrainState(
        step=one,
        params=trained,
        frozen=placed if what.beside else {},
        opt_state=shardings_like(like.opt_state, like.params, trained),
        ema=trained if cfg.ema else {},
        key=one,
        skipped=one,
        skipped_in_a_row=one,
        carry=() if what.carry is None else RULES.shardings(mesh, what.carry.axes(axes), like.carry),
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)


def begin_state(
    cfg: RunConfig, origin: Origin, what: Trainable, tx: Any, mesh: Mesh
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The state in the abstract, its frozen parameters in fact; and how to make it, when no checkpoint holds it.

    Only one of the two is ever on the devices. Arguments are those of `state_shapes`.
    """
    like = state_shapes(cfg, origin, what, tx, mesh)
    key = jax.random.split(jax.random.key(cfg.seed))[1]

    def load() -> Params:
        model = _load_model(cfg, origin, mesh)
        return model if what.companion is None else {"target": model, "drafter": what.companion.load(mesh, RULES)}

    base = load() if what.beside else None
    shardings = jax.tree.map(lambda x: x.sharding, like)
    state_of = partial(_state_of, cfg, what, tx)
    make = jax.jit(state_of, out_shardings=shardings, donate_argnums=() if what.beside else 0)
    return like._replace(frozen=base or {}), lambda: make(load() if base is None else base, key)


def step_of(
    cfg: RunConfig, kind: str, options: Any, origin: Origin, what: Trainable, tx: Any, like: TrainState
) -> Step:
    """The jitted step of a run of this kind with its own options; `like` says where the state lies."""
    recipe = RECIPES[kind]
    return make_train_step(
        recipe.make_loss(origin, options, rules=RULES, remat=cfg.remat),
        tx,
        recipe.counts(options),
        combine=what.combine,
        ema_decay=cfg.ema,
        schedule=make_schedule(cfg.optimizer, cfg.steps),
        shardings=jax.tree.map(lambda x: x.sharding, like),
        turns=recipe.turns(origin, options, cfg.steps),
        advance=None if what.carry is None else what.carry.advance,
    )


def read_examples(cfg: RunConfig, layout: Layout, progress: bool) -> Any:
    """The rows of a run's data, checked.

    Args:
      cfg: names them, and says what to do about bad ones.
      layout: what a row has to hold.
      progress: show a bar.

    Raises:
      ValueError: for data that are not as they should be.
    """
    if cfg.data == ARITHMETIC:
        if layout == "steps":
            return ArithmeticSolutions(SolutionsConfig(problems=cfg.arithmetic, seed=cfg.seed))
        if layout != "sft":
            raise ValueError(
                f"train: data={cfg.data!r} has rows of layouts sft and steps; expected a file of layout {layout} "
                "(train/data/formats.py)."
            )
        return ArithmeticExamples(cfg.arithmetic)
    if cfg.data.startswith("builtin:"):
        raise ValueError(f"train: data={cfg.data!r}; expected {ARITHMETIC}, a file or a folder.")
    examples = open_examples(Path(cfg.data), layout, on_bad_row=cfg.on_bad_row, split=cfg.split, progress=progress)
    if examples.skipped:
        first = examples.skipped[0]
        log.warning("%d rows are left out, the first %s: %s", len(examples.skipped), first.where, first.message)
    return examples


def absolute_name(name: str) -> str:
    """A path as it is from everywhere; `preset:` and `builtin:` names are none."""
    return name if name.startswith(("preset:", "builtin:")) else str(Path(name).absolute())


# ----------------------------------------------------------------------------------------------------------- private
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """What config.yaml holds: the options of its own kind, and null for those of others."""

    kind: Literal["sft", "drafter", "early-exit", "acceptance", "judge", "prm", "orm", "value", "qat", "preference"]
    settings: RunConfig
    sft: SftOptions | None = None
    drafter: DrafterOptions | None = None
    early_exit: EarlyExitOptions | None = None
    acceptance: AcceptanceOptions | None = None
    judge: JudgeOptions | None = None
    prm: RewardOptions | None = None
    orm: RewardOptions | None = None
    value: RewardOptions | None = None
    qat: QatOptions | None = None
    preference: PreferenceOptions | None = None


def _train(kind: str, cfg: RunConfig, options: Any, evaluate: Evaluate | None, progress: bool, fresh: bool) -> Outcome:
    # 1. What to learn, and from what.
    began = time.time()
    recipe, origin = RECIPES[kind], origin_of(cfg)
    trainable = recipe.trainable(origin, options, cfg.lora if cfg.adapters == "lora" else None)
    examples = recipe.prepare(read_examples(cfg, recipe.layout(options), progress), options)
    encode = recipe.encoder(origin, options)
    mesh = make_mesh(cfg.mesh)
    scored, referenced = recipe.scored(origin, options), None
    mark = _mark_of(cfg, examples, scored or encode)
    if scored is not None:
        referenced = references.Referenced(examples, scored, _source(cfg, origin, recipe.parts(options)))
    batches = _batches(cfg, encode, recipe, options, referenced or examples, mesh)
    writer = board_writer() if cfg.tensorboard else None
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # 2. Where it begins: at step 0, or at the newest checkpoint that is whole.
        tx = recipe.optimizer(origin, options, cfg.optimizer, cfg.steps)
        like, create = begin_state(cfg, origin, trainable, tx, mesh)
        if jax.process_index() == 0:
            cfg.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(cfg.out))
            if fresh:
                stored: Any = {"kind": kind, "settings": cfg, kind.replace("-", "_"): options}
                write_settings(_Stored(**stored), cfg.out / "config.yaml")
        multihost_utils.sync_global_devices("run folder")
        manager = stack.enter_context(checkpoint.open_checkpoints(cfg.out / "checkpoints", cfg.checkpoint))
        found = checkpoint.restore(manager, like)
        if found is not None and found.data["mark"] != mark:
            raise ValueError(
                f"train resume: {cfg.data}, the tokenizer, the seed or the batch settings are not what they were when "
                f"{cfg.out} was left; expected the same, or the order of the samples would mean nothing. Put them "
                "back, or begin a new run."
            )
        if referenced is not None:
            load, kept = lambda: _load_model(cfg, origin, mesh), None if found is None else found.data.get("reference")
            shown = progress and jax.process_index() == 0
            referenced.fill(cfg.out / "reference.npz", load, mesh, kept=kept, progress=shown)
        if found is None:
            if not fresh:
                log.warning("train resume: no checkpoint yet in %s; beginning at step 0", cfg.out)
            state = create()
        else:
            state = found.state
            batches.set_state(found.data["streams"])
        # 3. The way from there.
        record = recorder(cfg.out, int(state.step), writer, stack) if jax.process_index() == 0 else lambda records: None
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(together(_again(cfg.out)))
        place = {"mark": mark, "reference": None if referenced is None else referenced.fingerprint}
        account = goodput.recorder(cfg.out / "goodput.jsonl", began, int(state.step))
        alive = stack.enter_context(watched(cfg.hang_seconds if jax.process_count() > 1 else 0, _again(cfg.out)))
        step = step_of(cfg, kind, options, origin, trainable, tx, like)
        state = fit(
            state,
            step,
            (put_batch(mesh, RULES, batch) for batch in batches),
            steps=cfg.steps,
            check_start=partial(recipe.check_start, origin, options),
            log=record,
            save=lambda state: checkpoint.save(
                manager, state, place | {"streams": _all_of(exchange(dict(batches.get_state())))}
            ),
            stop=lambda number: stopped() is not None or preempted(number),
            evaluate=_evaluator(cfg, origin, int(state.step), evaluate),
            evaluate_every=cfg.evaluate_every,
            log_every=cfg.log_every,
            save_every=cfg.checkpoint.every,
            max_skipped=cfg.max_skipped,
            alive=alive,
            account=account if jax.process_index() == 0 else lambda step, seconds: None,
            progress=progress and jax.process_index() == 0,
        )
        manager.wait_until_finished()
        _report(batches, examples)
        # 4. What comes of it.
        done = int(state.step)
        if done >= cfg.steps:
            _export(cfg, trainable, state)
    return Outcome(done, done >= cfg.steps, stopped())


def _again(out: Path) -> str:
    """The command that goes on."""
    return f"jaxaroo train resume {out}"


def _base(origin: Origin, what: Trainable, mesh: Mesh) -> tuple[Params, Params]:
    """Shapes of what a state is made of, and where they lie."""
    axes, shapes = param_axes(origin.config), param_shapes(origin.config)
    if what.companion is not None:
        axes = {"target": axes, "drafter": what.companion.axes}
        shapes = {"target": shapes, "drafter": what.companion.shapes}
    return shapes, RULES.shardings(mesh, axes, shapes)


def _state_of(cfg: RunConfig, what: Trainable, tx: Any, base: Params, key: jax.Array) -> TrainState:
    frozen, carry = base if what.beside else None, None if what.carry is None else what.carry.init(base)
    return init_state(what.init(base, key), tx, seed=cfg.seed, frozen=frozen, ema=cfg.ema > 0, carry=carry)


def _source(cfg: RunConfig, origin: Origin, parts: int) -> references.Source:
    """Of the reference that is the model this run begins with."""
    made = f"{cfg.model}, seed {cfg.seed}"
    model = made if origin.like is None else references.model_digest(origin.like)
    return references.Source(model, origin.config, cfg.batch, parts, RULES)


def _batches(cfg: RunConfig, encode: Encode, recipe: Recipe, options: Any, examples, mesh) -> Batches:
    """This process runs the streams that fill its rows."""
    micro = cfg.batch.size // cfg.batch.micro_batches
    mine, per_stream = local_rows(mesh, RULES, micro), micro // cfg.batch.shards
    if mine.start % per_stream or mine.stop % per_stream:
        raise ValueError(
            f"train: process {jax.process_index()} holds rows {mine.start} to {mine.stop - 1} of a micro-batch, and a "
            f"stream fills {per_stream}; expected whole streams. Make batch.shards a multiple of the processes."
        )
    return Batches(
        examples,
        encode,
        cfg.batch,
        seed=cfg.seed,
        parts=recipe.parts(options),
        more=recipe.more(options),
        shards=range(mine.start // per_stream, mine.stop // per_stream),
        fixed_length=jax.process_count() > 1,
    )


def _mark_of(cfg: RunConfig, examples: Sequence[Mapping[str, Any]], encode: Encode) -> str:
    """By which to know the order of the samples again: its settings, the number of rows, and tokens of some of them."""
    number, batch = len(examples), dataclasses.asdict(cfg.batch) | {"micro_batches": None}
    rows = []
    for i in sorted({i * (number - 1) // 15 for i in range(16)}):
        found = encode(examples[i])
        for encoded in (found,) if isinstance(found, Encoded) else found:
            labels = [] if encoded.labels is None else [encoded.labels.tolist()]
            rows.append([encoded.ids.tolist(), encoded.scored.tolist(), examples[i].get("weight"), *labels])
    return hashlib.sha256(json.dumps([cfg.seed, batch, number, rows]).encode()).hexdigest()


def _load_model(cfg: RunConfig, origin: Origin, mesh: Mesh) -> Params:
    """The float32 weights a run begins with, where the rules say."""
    if origin.like is not None:
        return hf.load(origin.like, dtype="float32", stacked=True, mesh=mesh, rules=RULES, progress=True).params
    placed = RULES.shardings(mesh, param_axes(origin.config), param_shapes(origin.config))
    weights = jax.random.split(jax.random.key(cfg.seed))[0]
    return jax.jit(partial(init_params, origin.config), out_shardings=placed)(weights)


def _evaluator(cfg: RunConfig, origin: Origin, begin: int, evaluate: Evaluate | None):
    """Measure a state and write it down; lines behind `begin` will be measured again."""
    if evaluate is None or not cfg.evaluate_every or jax.process_count() > 1:
        return lambda state: None
    path = cfg.out / "evaluation.jsonl"
    forget_after(path, begin)

    def measure(state: TrainState) -> None:
        found = evaluate(origin.config, state.frozen, state.ema if cfg.ema else state.params)
        append_records(path, [{"step": int(state.step), **found}])
        log.info("step %d: %s", int(state.step), found)

    return measure


def _all_of(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of several that have no name in common."""
    return {name: value for one in each for name, value in one.items()}


def _report(batches: Batches, examples: Sequence[Any]) -> None:
    if batches.dropped:
        log.warning(
            "%d of %d examples had no completion token left and were dropped", len(batches.dropped), len(examples)
        )
    if batches.mismatched:
        log.warning(
            "%d prompts were no token prefix of prompt and completion (see tokenise.py)", len(batches.mismatched)
        )


def _export(cfg: RunConfig, what: Trainable, state: TrainState) -> None:
    """The result in a folder, and the curve."""
    trained = state.ema if cfg.ema else state.params
    params = gather(jax.jit(what.result)(trained, state.frozen))
    if jax.process_index() == 0:
        what.write(cfg.out / "model", params)
        title = f"{Path(cfg.model).name} on {Path(cfg.data).name}"
        plot_loss(cfg.out / "loss.png", read_records(cfg.out / "metrics.jsonl"), title)
    multihost_utils.sync_global_devices("exported")
