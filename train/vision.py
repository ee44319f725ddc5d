"""Runs of the vision models on CIFAR-10: folders that begin with settings and end with models, and can be left.

resnet20   a float network first, then the same at all widths together (Double Rounding, 2502.01199, section 4)
ghostnet   GhostNetV3 with its branches, taught by a ResNet if there is one, and folded at the end (2404.11202)

out/vision.yaml            every setting;  images.sha256 by which to know the images again
out/float, out/joint       of resnet20, one a phase; of ghostnet out/ghost
    metrics.jsonl          one line a step;  evaluation.jsonl one line an evaluation: right of all, at each width
    checkpoints/           what the same command goes on from
    curves.png             loss and evaluations
    model/                 the result, written last: then the phase is done; of ghostnet beside it branches/

Joint training makes one update a width. Kernels have one Adam state for all of them, as in the paper. Norms and the
scales of inputs are of one width alone and the scales of kernels of all, at rates of their own (`precision/alrs.py`):
these have a state a width, or the moments of one turn would move what only another one trains.
"""

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ..models import ghostnet, resnet
from ..models.decoder import Params
from ..models.ghostnet import GhostNetConfig
from ..models.resnet import ResNetConfig
from . import checkpoint
from .checkpoint import CheckpointConfig
from .config import build, read_settings, write_settings
from .data.images import AugmentConfig, ImageBatch, Images, TrainingBatches, in_order, read_cifar10
from .ending import stop_signals
from .loop import fit
from .metrics import append_records, forget_after, read_records
from .objectives.classify import count_images, float_loss, ghost_loss, joint_loss
from .optimizer import OptimizerConfig, make_optimizer, make_schedule
from .precision.alrs import mean_clipped, per_width, width_rate
from .precision.distill import DistillConfig
from .run import Outcome, alone
from .state import TrainState, init_state
from .statistics import with_statistics
from .step import Step, Turns, make_train_step

log = logging.getLogger(__name__)
Kind = Literal["resnet20", "ghostnet"]


# ----------------------------------------------------------------------------------------------------------- settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Settings that both kinds have.

    Attributes:
      data: folder of CIFAR-10 in its binary version.
      out: the run's folder. What was left there is gone on with.
      seed: of weights, order and augmentation.
      batch_size: images of a step.
      test_batch: images at a time in evaluations.
      log_every: steps between looks at the metrics.
      evaluate_every: steps between evaluations on the test images; 0 makes one at the end alone.
      max_skipped: steps in a row with a loss that is not finite, before the run stops.
    """

    data: Path
    out: Path
    seed: int = 0
    batch_size: int = 128
    test_batch: int = 500
    log_every: int = 50
    evaluate_every: int = 1000
    max_skipped: int = 10
    augment: AugmentConfig = AugmentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=1000)

    def __post_init__(self):
        least = dict.fromkeys(("batch_size", "test_batch", "log_every", "max_skipped"), 1) | {"evaluate_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"VisionConfig.{name}: found {getattr(self, name)}; expected at least {low}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetOptions:
    """Those of ResNet-20.

    Attributes:
      start: folder of a float network to begin with, such as the out/float/model of another run; when not given, one is
        trained first.
      network: sizes, and the widths that are trained together.
      float_epochs: of the float network.
      float_optimizer: He et al.'s. Their weight decay of 1e-4 is inside the gradient, which the momentum sums up ten
        times; here it is outside, so it is 1e-3.
      epochs: of joint training.
      optimizer: of kernels, norms and the last layer in it.
      scale_rate: learning rate of scales, the peak; the schedule is that of `optimizer`.
      alrs: how the rate of the kernels' scales depends on the width (`precision/alrs.py`); or off.
      kd: who teaches: nobody, the network itself at its highest width, or the float network.
      kappa: what the teacher counts; the rest is the labels.
      temperature: of both in that comparison.
    """

    start: Path | None = None
    network: ResNetConfig = ResNetConfig(bits=(8, 6, 4, 2))
    float_epochs: float = 200.0
    float_optimizer: OptimizerConfig = OptimizerConfig(
        name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-3, decay_to=0.0, clip_norm=None
    )
    epochs: float = 200.0
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, weight_decay=5e-5, decay_to=0.0, clip_norm=None)
    scale_rate: float = 5e-4
    alrs: Literal["relative", "printed", "eta_only", "off"] = "relative"
    kd: Literal["none", "inplace", "fp"] = "none"
    kappa: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("float_epochs", "epochs", "scale_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"ResNetOptions.{name}: found {getattr(self, name)}; expected a positive number.")
        _ = self.network.quant, self.distill  # have their own checks

    @property
    def distill(self) -> DistillConfig | None:
        """Who teaches and how much; None for nobody."""
        cfg = DistillConfig(kappa=self.kappa, temperature=self.temperature)
        return None if self.kd == "none" else dataclasses.replace(cfg, teacher=self.kd)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostOptions:
    """Those of GhostNetV3. The paper's recipe of the optimiser is not known; this one is ours.

    Attributes:
      teacher: folder of a ResNet that `resnet20` wrote, float or of several widths; nobody teaches when not given.
      network: its sizes.
      epochs: of training.
      optimizer: of everything.
      smoothing: what labels leave to all classes together.
      ema: decay of a running mean of the weights, which is then what is measured and folded; 0 keeps none.
    """

    teacher: Path | None = None
    network: GhostNetConfig = GhostNetConfig()
    epochs: float = 300.0
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-3, weight_decay=0.05, warmup_steps=1000, decay_to=0.0, clip_norm=None
    )
    smoothing: float = 0.1
    ema: float = 0.0

    def __post_init__(self):
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"GhostOptions.epochs: found {self.epochs}; expected a positive number.")
        for name in ("smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GhostOptions.{name}: found {getattr(self, name)}; expected 0 to below 1.")
        if self.network.folded:
            raise ValueError("GhostOptions.network: found a folded one; expected branches to train.")


# ----------------------------------------------------------------------------------------------------- joint training
class JointState(NamedTuple):
    """Of the optimiser."""

    weights: Any
    norms: Any  # every leaf `[W, ...]`, as of scales
    scales: Any
    made: Any  # updates, int32


def joint_optimizer(options: ResNetOptions, steps: int) -> optax.GradientTransformationExtraArgs:
    """For `{"model", "scales"}`: `update(grads, state, params, turn=bits)`, one program for all widths.

    Args:
      options: of the run.
      steps: of the whole run, each with an update a width.
    """
    cfg, widths = options.optimizer, options.network.bits
    turns = len(widths)
    in_updates = dataclasses.replace(cfg, warmup_steps=cfg.warmup_steps * turns)
    weights = make_optimizer(in_updates, steps * turns)
    rate_at = make_schedule(in_updates, steps * turns)
    direction = per_width(optax.scale_by_adam(cfg.b1, 0.999 if cfg.b2 is None else cfg.b2, cfg.eps), widths)

    def init(params: Any) -> Any:
        parts = _by_group(params)
        return JointState(
            weights.init(parts["weights"]),
            direction.init(parts["norms"]),
            direction.init({"rho": parts["rho"], "act": parts["act"]}),
            jnp.zeros((), jnp.int32),
        )

    def update(updates: Any, state: Any, params: Any = None, *, turn: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        parts = _by_group(updates)
        moved: Any
        u: Any
        moved, new_weights = weights.update(parts["weights"], state.weights, _by_group(params)["weights"])
        u_norms, new_norms = direction.update(parts["norms"], state.norms, None, bits=turn)
        both = {"rho": parts["rho"], "act": parts["act"]}
        u, new_scales = direction.update(both, state.scales, None, bits=turn)
        peak: Any = rate_at(state.made)
        rate = peak * (options.scale_rate / cfg.learning_rate)
        tied = rate
        if options.alrs != "off":
            tied = width_rate(rate, mean_clipped(parts["rho"]), widths[0] - turn, options.alrs)
        times = lambda r, tree: jax.tree.map(lambda x: -r * x, tree)
        found = {**moved, **times(peak, u_norms), **times(tied, u["rho"]), **times(rate, u["act"])}
        new = JointState(new_weights, new_norms, new_scales, optax.safe_increment(state.made))
        return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], updates), new

    return optax.GradientTransformationExtraArgs(init, update)


# ---------------------------------------------------------------------------------------------------------------- runs
def run(kind: Kind, cfg: VisionConfig, options: Any, *, progress: bool = False) -> Outcome:
    """Begin, or go on where the folder was left, by whatever it was stopped.

    Args:
      kind: of network.
      cfg: settings.
      options: those of the kind.
      progress: show bars.

    Returns:
      How the last phase was left.

    Raises:
      FileExistsError: if the folder holds something else, or another process writes there.
      FileNotFoundError: if the data are not there.
      ValueError: for settings that are not those that the folder was begun with, and for data that cannot be used.
    """
    train, test = read_cifar10(cfg.data, "train"), read_cifar10(cfg.data, "test")
    classes, most = options.network.classes, max(int(images.labels.max()) for images in (train, test))
    if most >= classes:  # its likelihood would be NaN, and the step skipped
        raise ValueError(
            f"train {kind}: {cfg.data} has label {most}; expected below {classes}, the classes of the network. Give "
            "--network.classes."
        )
    absolute = {
        f.name: v.absolute() for f in dataclasses.fields(options) if isinstance(v := getattr(options, f.name), Path)
    }
    options = dataclasses.replace(options, **absolute)
    phases = {"resnet20": _resnet_phases, "ghostnet": _ghost_phases}[kind](cfg, options, train, test)
    _open(kind, cfg, options)
    outcome = Outcome(0, False, None)
    with alone(cfg.out), stop_signals() as stopped:
        for phase in phases:
            outcome = _go(cfg, phase, train, stopped, progress)
            if not outcome.finished:
                break
    return outcome


# ----------------------------------------------------------------------------------------------------------- private
_MAY_CHANGE = re.compile(r"settings\.(out|data|test_batch|log_every|checkpoint\..*)")  # without another result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """What vision.yaml holds: the options of its own kind, and null for those of the other."""

    kind: Kind
    settings: VisionConfig
    resnet20: ResNetOptions | None = None
    ghostnet: GhostOptions | None = None


class _Phase(NamedTuple):
    """One training in a run."""

    name: str  # of its folder
    steps: int
    state: Callable[[], TrainState]
    step: Step
    measure: Callable[[TrainState], Mapping[str, float]]
    write: Callable[[Path, TrainState], None]


def _open(kind: Kind, cfg: VisionConfig, options: Any) -> None:
    """Make the folder, or see that what was left there was begun with the same settings."""
    path, stored = cfg.out / "vision.yaml", _Stored(kind=kind, settings=cfg, **{kind: options})
    if path.is_file():
        then = _flat(dataclasses.asdict(build(_Stored, read_settings(_Stored, path))))
        now = _flat(dataclasses.asdict(stored))
        names = [n for n in {**then, **now} if then.get(n) != now.get(n) and not _MAY_CHANGE.fullmatch(n)]
        if names:
            spell = lambda name: "--" + name.split(".", 1)[-1].replace("_", "-")
            listed = "; ".join(f"{spell(n)} was {then.get(n)!r} and is {now.get(n)!r}" for n in names)
            raise ValueError(
                f"train {kind}: {cfg.out} was begun with other settings: {listed}. Give the same to go on, or choose "
                "another --out."
            )
    elif cfg.out.exists() and (not cfg.out.is_dir() or any(p.name != "vision.partial" for p in cfg.out.iterdir())):
        raise FileExistsError(f"train {kind}: {cfg.out} holds other files; expected a new or empty folder, or a run.")
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_settings(stored, path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: str(tree) if isinstance(tree, Path) else tree}
    return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _go(cfg: VisionConfig, phase: _Phase, train: Images, stopped: Callable[[], int | None], progress: bool) -> Outcome:
    """One phase from where it was left to its end."""
    folder = cfg.out / phase.name
    if (folder / "model" / "config.json").is_file():
        return Outcome(phase.steps, True, None)
    mark, written = _mark(cfg, train), cfg.out / "images.sha256"
    if written.is_file() and written.read_text().strip() not in ("", mark):  # by an earlier phase
        raise _other_images(cfg)
    written.write_text(mark + "\n")
    folder.mkdir(exist_ok=True)
    with checkpoint.open_checkpoints(folder / "checkpoints", cfg.checkpoint) as manager:
        state = phase.state()
        if (found := checkpoint.restore(manager, state)) is not None:
            state = found.state
            if found.data["mark"] != mark:
                raise _other_images(cfg)
        begin = int(state.step)
        for name in ("metrics.jsonl", "evaluation.jsonl"):
            forget_after(folder / name, begin)

        def evaluate(state: TrainState) -> None:
            found = {"step": int(state.step), **phase.measure(state)}
            append_records(folder / "evaluation.jsonl", [found])
            log.info("%s: %s", phase.name, found)

        state = fit(
            state,
            phase.step,
            TrainingBatches(train, cfg.batch_size, cfg.seed, cfg.augment).after(begin),
            steps=phase.steps,
            log=lambda records: append_records(folder / "metrics.jsonl", records),
            save=lambda state: checkpoint.save(manager, state, {"mark": mark}),
            stop=lambda step: stopped() is not None,
            evaluate=evaluate,
            evaluate_every=cfg.evaluate_every or phase.steps,
            log_every=cfg.log_every,
            save_every=cfg.checkpoint.every,
            max_skipped=cfg.max_skipped,
            progress=progress,
        )
        manager.wait_until_finished()
    done = int(state.step)
    if done >= phase.steps:
        _plot(folder, f"{phase.name} on {cfg.data.name}")
        phase.write(folder / "model", state)
    return Outcome(done, done >= phase.steps, stopped())


def _other_images(cfg: VisionConfig) -> ValueError:
    return ValueError(
        f"train: {cfg.data} holds other images than when {cfg.out} was left; expected the same, or the order of the "
        "samples would mean nothing. Put them back, or begin a new run."
    )


def _resnet_phases(cfg: VisionConfig, options: ResNetOptions, train: Images, test: Images) -> list[_Phase]:
    """The float one if need be, then the joint one, which reads what the first left."""
    if options.start is not None:
        _check_same(options.start, options.network)
        return [_joint_phase(cfg, options, options.start, train, test)]
    joint = _joint_phase(cfg, options, cfg.out / "float" / "model", train, test)
    return [_float_phase(cfg, options, train, test), joint]


def _float_phase(cfg: VisionConfig, options: ResNetOptions, train: Images, test: Images) -> _Phase:
    network = dataclasses.replace(options.network, bits=())
    steps = _steps(options.float_epochs, train, cfg)
    tx = with_statistics(make_optimizer(options.float_optimizer, steps))

    def begin() -> TrainState:
        params, stats = resnet.init(network, jax.random.key(cfg.seed))
        return init_state({"model": params, "stats": stats}, tx, seed=cfg.seed)

    def write(folder: Path, state: TrainState) -> None:
        stored = resnet.to_stored(network, state.params["model"], state.params["stats"])
        resnet.save(folder, network, stored, overwrite=True)

    count = _right(lambda params, images, _: resnet.forward(network, params["model"], params["stats"], images).logits)
    schedule = make_schedule(options.float_optimizer, steps)
    return _Phase(
        "float",
        steps,
        begin,
        make_train_step(float_loss(network), tx, count_images, schedule=schedule),
        lambda state: {"top1": _top1(partial(count, state.params), test, cfg.test_batch, 0)},
        write,
    )


def _joint_phase(cfg: VisionConfig, options: ResNetOptions, start: Path, train: Images, test: Images) -> _Phase:
    network, widths = options.network, options.network.bits
    steps = _steps(options.epochs, train, cfg)
    tx = with_statistics(joint_optimizer(options, steps))

    def begin() -> TrainState:
        stored = resnet.load(start)[1]
        params, stats = resnet.widen(network, stored["params"], stored["stats"])
        first = TrainingBatches(train, cfg.batch_size, cfg.seed, cfg.augment).batch(0)
        scales = resnet.init_scales(network, params, stats, jnp.asarray(first.images))
        whole = {"model": params, "scales": scales, "stats": stats}
        teacher = {"teacher": jax.tree.map(jnp.copy, stored)}  # no buffer may be given up twice
        return init_state(whole, tx, seed=cfg.seed, frozen=teacher if options.kd == "fp" else None)

    def write(folder: Path, state: TrainState) -> None:
        stored = resnet.to_stored(network, state.params["model"], state.params["stats"], state.params["scales"])
        resnet.save(folder, network, stored, overwrite=True)

    def at(params: Params, images: Array, bits: Array) -> Array:
        low = resnet.at_width(network, params["model"], params["scales"], bits)
        return resnet.forward(network, low, params["stats"], images, bits, params["scales"]).logits

    count = _right(at)
    step = make_train_step(
        joint_loss(network, options.distill),
        tx,
        count_images,
        combine=lambda params, frozen: {**params, **frozen},
        schedule=make_schedule(options.optimizer, steps),
        turns=Turns(tuple(map(str, widths)), lambda step, key: jnp.asarray(widths, jnp.int32)),
    )
    of_width = lambda state, b: _top1(partial(count, state.params), test, cfg.test_batch, b)
    return _Phase("joint", steps, begin, step, lambda state: {f"top1_{b}": of_width(state, b) for b in widths}, write)


def _ghost_phases(cfg: VisionConfig, options: GhostOptions, train: Images, test: Images) -> list[_Phase]:
    """One, whose result is folded."""
    network, steps = options.network, _steps(options.epochs, train, cfg)
    of_teacher, stored = (None, {}) if options.teacher is None else resnet.load(options.teacher)
    if of_teacher is not None and of_teacher.classes != network.classes:
        raise ValueError(
            f"train ghostnet: {options.teacher} tells {of_teacher.classes} classes; expected {network.classes}. Give "
            "them with --network.classes."
        )
    tx = with_statistics(make_optimizer(options.optimizer, steps))

    def begin() -> TrainState:
        params, stats = ghostnet.init(network, jax.random.key(cfg.seed))
        teacher = {"teacher": jax.tree.map(jnp.copy, stored)} if stored else None
        ema = options.ema > 0
        return init_state({"model": params, "stats": stats}, tx, seed=cfg.seed, frozen=teacher, ema=ema)

    best = lambda state: state.ema if options.ema else state.params

    def write(folder: Path, state: TrainState) -> None:
        params, stats = best(state)["model"], best(state)["stats"]
        ghostnet.save(folder.with_name("branches"), network, params, stats, overwrite=True)
        folded, kernels = ghostnet.fold(network, params, stats)
        ghostnet.save(folder, folded, kernels, {}, overwrite=True)

    count = _right(lambda params, images, _: ghostnet.forward(network, params["model"], params["stats"], images).logits)
    step = make_train_step(
        ghost_loss(network, options.smoothing, of_teacher),
        tx,
        count_images,
        combine=lambda params, frozen: {**params, **frozen},
        ema_decay=options.ema,
        schedule=make_schedule(options.optimizer, steps),
    )
    measure = lambda state: {"top1": _top1(partial(count, best(state)), test, cfg.test_batch, 0)}
    return [_Phase("ghost", steps, begin, step, measure, write)]


def _check_same(folder: Path, wanted: ResNetConfig) -> None:
    found = resnet.load(folder)[0]
    sizes = lambda cfg: (cfg.blocks, cfg.channels, cfg.classes)
    if found.bits or sizes(found) != sizes(wanted):
        raise ValueError(
            f"train resnet20: {folder} is a network of blocks, channels and classes {sizes(found)} with widths "
            f"{found.bits}; expected {sizes(wanted)} and a float one. Give its sizes with --network."
        )


def _steps(epochs: float, train: Images, cfg: VisionConfig) -> int:
    return max(1, math.ceil(epochs * len(train.labels) / cfg.batch_size))


def _right(logits: Callable[[Params, Array, Any], Array]) -> Callable[..., Array]:
    """How many of a batch are right: (params, batch, bits) -> a number, one program for all widths."""

    @jax.jit
    def count(params: Params, batch: ImageBatch, bits: Array) -> Array:
        chosen = jnp.argmax(logits(params, batch.images, bits), -1)
        return jnp.sum((chosen == batch.labels) & batch.mask, dtype=jnp.int32)

    return count


def _top1(count: Callable[..., Array], test: Images, size: int, bits: int) -> float:
    """Share of the test images that are right."""
    found = [count(batch, jnp.int32(bits)) for batch in in_order(test, min(size, len(test.labels)))]
    return int(sum(map(int, found))) / len(test.labels)


def _mark(cfg: VisionConfig, train: Images) -> str:
    """By which to know the images again."""
    some = train.pixels[:: max(1, len(train.labels) // 64)]
    return hashlib.sha256(b"|".join([train.labels.tobytes(), some.tobytes(), str(cfg.seed).encode()])).hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)


def _by_group(tree: Params) -> dict[str, dict[str, Array]]:
    """Group -> path -> leaf: weights, norms (with an axis of widths), scales of kernels and of inputs."""
    parts: dict[str, dict[str, Array]] = {"weights": {}, "norms": {}, "rho": {}, "act": {}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        last = path[-1].key
        group = last if path[0].key == "scales" else "norms" if last in ("norm", "norm_bias") else "weights"
        parts[group][_name(path)] = leaf
    return parts


def _plot(folder: Path, title: str) -> None:
    """Loss over steps, and what the evaluations found."""
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    records, found = read_records(folder / "metrics.jsonl"), read_records(folder / "evaluation.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss (nats an image)")
    curve = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    axes.plot(*np.asarray(curve).reshape(-1, 2).T, color="tab:gray", alpha=0.5, linewidth=1, label="loss")
    right = axes.twinx()
    right.set_ylabel("right, of the test images")
    for name in [n for n in (found[-1] if found else {}) if n != "step"]:
        right.plot([r["step"] for r in found], [r[name] for r in found], marker=".", label=name)
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=axes.transAxes)
    figure.savefig(folder / "curves.png", dpi=120)
