"""`jaxaroo train ...`: begin runs, and go on with them."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from .output import UsageError, cut_half_line, dumps

SUMMARIES = {
    "sft": "Fine-tune a model on prompts and completions.",
    "drafter": "Train an EAGLE or Jakiro drafter for a target, which stays as it is.",
    "early-exit": "Train a Kangaroo adapter, which lets a target's first layers draft for all of them.",
    "acceptance": "Train SpecDec++'s head, which ends a draft where a refusal is likely.",
    "judge": "Train a judge, which lets more drafts pass than the target's own distribution would.",
    "prm": "Train a process reward model, which says how good each step of a solution is.",
    "orm": "Train an outcome reward model, which says whether a solution is right.",
    "value": "Train a value model, which says from any token how an answer will end.",
    "qat": "Train one int8 master that serves at 8, 6, 4 and 2 bits.",
    "preference": "Learn from preferences (DPO and its family, KTO, ORPO, SimPO ...), or fine-tune with an anchor.",
    "curry": "Learn preferences in stages from easy to hard, each against what the one before has learned.",
    "unlearn": "Make a model forget some answers, and keep the rest of it.",
}


def train_command(kind: str, args: list[str]) -> Callable[..., int]:
    """The command with all its settings, those of `--config` as defaults; made when needed, since it imports JAX.

    Args:
      kind: of training, a key of `train.recipe.RECIPES`.
      args: the command line behind its name.
    """
    from ..train.recipe import RECIPES
    from ..train.run import RunConfig, begun, start

    if kind == "preference":
        return preference_command(value_of("--objective", args) or "dpo", args)
    if kind == "unlearn":
        return preference_command("unlearn", args)
    if kind == "curry":
        return curry_command(args)
    recipe = RECIPES[kind]
    default = _settings(recipe.defaults, args)

    def command(
        *,
        settings: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[recipe.options, tyro.conf.arg(name="")] = recipe.options(),  # type: ignore[name-defined]
        config: Path | None = None,
        regenerate: Path | None = None,
        or_resume: bool = False,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> int:
        """Train.

        Args:
          settings: of the run.
          options: of this kind of training.
          config: YAML file of settings; what is given here as well wins.
          regenerate: JSONL file to write, or to go on writing: the data's prompts, answered by the model itself, which
            is what a drafter had better learn from. Training then reads it.
          or_resume: go on with the run in --out, if there is one: then the same command starts a run and starts it
            again. Its settings are those that it was begun with.
          coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
          num_processes: how many take part.
          process_id: which of them this is.
        """
        _join(coordinator, num_processes, process_id)
        if or_resume and begun(settings.out):
            return train_resume(settings.out)
        if regenerate is not None:
            if recipe.layout(options) != "sft":
                raise UsageError(
                    f"train {kind}: --regenerate; expected it with kinds that learn from prompts and completions "
                    "alone, for a label belongs to the answer it was given to."
                )
            _regenerate(settings, regenerate)
            settings = dataclasses.replace(settings, data=str(regenerate), split=None)
        evaluate = _evaluator(kind, settings, options)
        return _leave(start(kind, settings, options, evaluate=evaluate, progress=True), settings.out)

    command.__doc__ = (command.__doc__ or "").replace("Train.", SUMMARIES[kind], 1)
    return command


def train_sft() -> int:
    """Fine-tune a model on prompts and completions."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_drafter() -> int:
    """Train an EAGLE or Jakiro drafter for a target, which stays as it is."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_early_exit() -> int:
    """Train a Kangaroo adapter, which lets a target's first layers draft for all of them."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_acceptance() -> int:
    """Train SpecDec++'s head, which ends a draft where a refusal is likely."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_judge() -> int:
    """Train a judge, which lets more drafts pass than the target's own distribution would."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_prm() -> int:
    """Train a process reward model, which says how good each step of a solution is."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_orm() -> int:
    """Train an outcome reward model, which says whether a solution is right."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_value() -> int:
    """Train a value model, which says from any token how an answer will end."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_qat() -> int:
    """Train one int8 master that serves at 8, 6, 4 and 2 bits."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_preference() -> int:
    """Learn from preferences (DPO and its family, KTO, ORPO, SimPO ...), or fine-tune with an anchor."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def train_unlearn() -> int:
    """Make a model forget some answers, and keep the rest of it."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def preference_command(name: str, args: list[str]) -> Callable[..., int]:
    """The command with the settings of an objective; for `list` one that lists them.

    Args:
      name: of the objective.
      args: the command line behind the command's name.
    """
    from ..train.objectives.by_name import OBJECTIVES
    from ..train.preference import PreferenceOptions, with_settings
    from ..train.recipe import RECIPES
    from ..train.run import RunConfig, begun, start

    if name == "list":
        return list_objectives
    known = OBJECTIVES.get(name)
    if known is None:
        PreferenceOptions(objective=name)  # refuses, and says which is near
        raise AssertionError(name)
    published = {"optimizer": {"learning_rate": known.learning_rate}} if known.learning_rate else {}
    default = _settings(published or RECIPES["preference"].defaults, args)
    kind: Any = type(known.config)

    def command(
        *,
        settings: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[PreferenceOptions, tyro.conf.arg(name="")] = PreferenceOptions(objective=name),
        loss: Annotated[kind, tyro.conf.arg(name="")] = known.config,  # type: ignore[valid-type]
        config: Path | None = None,
        or_resume: bool = False,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> int:
        """Train.

        Args:
          settings: of the run.
          options: of preference training.
          loss: of the objective.
          config: YAML file of settings; what is given here as well wins.
          or_resume: go on with the run in --out, if there is one.
          coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
          num_processes: how many take part.
          process_id: which of them this is.
        """
        _join(coordinator, num_processes, process_id)
        if or_resume and begun(settings.out):
            return train_resume(settings.out)
        return _leave(start("preference", settings, with_settings(options, loss), progress=True), settings.out)

    summary = SUMMARIES["unlearn" if name == "unlearn" else "preference"]
    command.__doc__ = (command.__doc__ or "").replace("Train.", summary, 1)
    return command


def train_curry() -> int:
    """Learn preferences in stages from easy to hard, each against what the one before has learned."""
    raise AssertionError("`main` puts what `train_command` makes in this place")


def curry_command(args: list[str]) -> Callable[..., int]:
    """The command with all its settings; made when needed, since it imports JAX.

    Args:
      args: the command line behind its name.
    """
    from ..train.curry import CurryOptions, run_curry
    from ..train.run import RunConfig

    default = _settings({"optimizer": {"learning_rate": 1e-6}}, args)

    def command(
        *,
        settings: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[CurryOptions, tyro.conf.arg(name="")] = CurryOptions(),
        config: Path | None = None,
    ) -> int:
        """Train.

        Args:
          settings: of the run of each stage.
          options: of the stages.
          config: YAML file of settings; what is given here as well wins.
        """
        done, outcome = run_curry(settings, options, progress=True)
        if outcome.finished:
            print(f"{done} stages: wrote {settings.out / 'model'}", file=sys.stderr)
            return 0
        again = f"jaxaroo train curry ... --out {settings.out}"
        print(
            f"stopped in stage {done + 1}, step {outcome.step}; go on with the same command, {again}", file=sys.stderr
        )
        return 128 + (outcome.signal or 15)

    command.__doc__ = (command.__doc__ or "").replace("Train.", SUMMARIES["curry"], 1)
    return command


def list_objectives(*, objective: str = "list", json: bool = False) -> int:
    """Print every objective: its paper, the rows it learns from, what it reads of a reference, its settings.

    Args:
      objective: `list`.
      json: print JSON instead of a table.
    """
    from ..train.objectives.by_name import OBJECTIVES
    from ..train.preference import PreferenceOptions

    rows, usual = [], PreferenceOptions()
    for name, known in OBJECTIVES.items():
        settings = dataclasses.asdict(known.config)
        more = {"learning_rate": known.learning_rate, "batch": known.batch}
        row = {"objective": name, "paper": f"arXiv:{known.paper}", "layout": known.layout}
        row |= {"reads": known.reads(known.config), "settings": settings}
        row |= {} if row["reads"] == "nothing" else {"reference": known.reference}
        rows.append(row | {key: value for key, value in more.items() if value is not None})
    if json:
        print(dumps(rows))
        return 0
    for row in rows:
        heads = [f"{row['objective']:11}", f"{row['paper']:17}", f"{row['layout']:13}", f"reads {row['reads']}"]
        if row.get("reference") == "mixed":
            heads.append(f"reference mixed: {usual.mix:g} of the policy every {usual.mix_every} steps")
        print("  ".join(heads))
        print("    " + "  ".join(f"{key}={value}" for key, value in row["settings"].items()))
        if more := [f"{key} {row[key]:g}" for key in ("learning_rate", "batch") if key in row]:
            print(f"    published: {', '.join(more)}")
    return 0


def train_resume(
    folder: tyro.conf.Positional[Path],
    /,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Go on with a run that was left, by whatever it was stopped.

    Args:
      folder: the run's --out.
      coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
      num_processes: how many take part.
      process_id: which of them this is.
    """
    from ..train.run import read_run, resume

    _join(coordinator, num_processes, process_id)
    evaluate = _evaluator(*read_run(folder)) if (folder / "config.yaml").is_file() else None
    return _leave(resume(folder, evaluate=evaluate, progress=True), folder)


def acceptance(emitted: list[int]) -> dict[str, float]:
    """Tokens a step, and of the steps the share whose draft was right down to each depth.

    Args:
      emitted: steps that emitted 0, 1, 2, ... tokens.
    """
    steps = max(sum(emitted), 1)
    shares = {f"accepted_{d}": sum(emitted[d + 1 :]) / steps for d in range(1, len(emitted) - 1)}
    return {"tau": sum(n * count for n, count in enumerate(emitted)) / steps, **shares}


def value_of(option: str, args: list[str]) -> str | None:
    """What stands behind an option; the parser comes too late for it, as it wants the defaults first."""
    found = [b for a, b in itertools.pairwise(args) if a == option]
    found += [arg.removeprefix(f"{option}=") for arg in args if arg.startswith(f"{option}=")]
    return found[-1] if found else None


# ----------------------------------------------------------------------------------------------------------- private
def _settings(usual: Mapping[str, Any], args: list[str]) -> Any:
    """Of a run: those that are usual for its kind, and over them those of the file that `--config` names."""
    from ..train.config import build, read_settings
    from ..train.run import RunConfig

    config, needed = value_of("--config", args), dict.fromkeys(("model", "data", "out"), tyro.MISSING)
    given = read_settings(RunConfig, Path(config)) if config else {}
    return build(RunConfig, given, build(RunConfig, needed | dict(usual)))


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    from ..sharding.mesh import start_processes

    start_processes(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def _leave(outcome: Any, out: Path) -> int:
    """Say where the run stands; the exit status of one that was stopped is that of its signal."""
    from ..train.goodput import told

    if outcome.finished:
        print(f"step {outcome.step}: wrote {out / 'model'}, curve in {out / 'loss.png'}", file=sys.stderr)
        if spent := told(out / "goodput.jsonl"):
            print(spent, file=sys.stderr)
        return 0
    print(f"stopped at step {outcome.step}; go on with: jaxaroo train resume {out}", file=sys.stderr)
    return 128 + (outcome.signal or 15)


def _prompts(settings: Any, limit: int | None = None) -> Iterator[Any]:
    """What the rows of the data ask: text, or messages up to the last answer."""
    from ..train.data.arithmetic import ArithmeticExamples
    from ..train.data.formats import open_examples

    if settings.data == "builtin:arithmetic":
        rows: Any = ArithmeticExamples(settings.arithmetic)
        number = limit or 10_000
    else:
        rows = open_examples(Path(settings.data), "sft", on_bad_row=settings.on_bad_row, split=settings.split)
        number = min(len(rows), limit or len(rows))
    for row in (rows[i] for i in range(number)):
        yield row["prompt"] if "prompt" in row else row["messages"][:-1]


def _regenerate(settings: Any, path: Path, batch: int = 64) -> None:
    """Let the model answer the prompts of its data, as many as the file does not hold yet."""
    from tqdm import tqdm

    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer

    rows = list(_prompts(settings))
    done = cut_half_line(path)
    sampling = Sampling(temperature=1.0, max_tokens=min(512, settings.batch.max_length // 2))
    tokenizer = load_tokenizer(Path(settings.tokenizer or settings.model))
    with (
        Engine(load(settings.model, dtype=settings.dtype), tokenizer, max_seqs=batch) as engine,
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=done, desc="regenerate", unit="row", disable=None) as bar,
    ):
        for first in range(done, len(rows), batch):
            part = rows[first : first + batch]
            each = [dataclasses.replace(sampling, seed=settings.seed + first + i) for i in range(len(part))]
            for prompt, result in zip(part, engine.generate(part, each), strict=True):
                text: Any = result.outputs[0].text if result.outputs else ""
                if not isinstance(prompt, str):
                    text = [{"role": "assistant", "content": text}]
                file.write(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))


def _evaluator(kind: str, settings: Any, options: Any) -> Any:
    """Acceptance through the serving loop, on the first prompts of the data; None for kinds that have none.

    Of an acceptance head also how many tokens a step drafts, which is what it is there to save.
    """
    if kind not in ("drafter", "early-exit", "acceptance") or not settings.evaluate_every:
        return None  # a judge is measured by the quality of what it passes, a reward model by `eval prm`
    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..infer.speculative import verify
    from ..infer.speculative.load import drafter_params, with_drafter
    from ..infer.speculative.loop import Speculation
    from ..infer.speculative.settings import SpeculationConfig
    from ..models.decoder import Model
    from ..models.tokenizer import load_tokenizer
    from ..train.recipe import network_config, read_drafter

    prompts = list(_prompts(settings, limit=8))
    tokenizer = load_tokenizer(Path(settings.tokenizer or settings.model))

    def measure(config: Any, target: Any, network: Any, params: Any, stop_head: Any) -> dict[str, float]:
        serving = SpeculationConfig(draw="mode", stop_rule="none" if stop_head is None else "head")
        drafter = with_drafter(serving, network)
        spec = Speculation(drafter, verify.coupled(), drafter_params(serving, network, params, stop_head))
        with Engine(Model(config, target), tokenizer, speculation=spec, speculate="on") as engine:
            engine.generate(prompts, Sampling(temperature=0.0, max_tokens=64))
            found, stats = acceptance(engine.emitted_per_step()), engine.stats()
        return found if stop_head is None else found | {"drafted": stats["drafted_tokens"] / max(stats["steps"], 1)}

    def of_drafter(config: Any, target: Any, trained: Any) -> dict[str, float]:
        return measure(config, target, network_config(kind, config, options), trained, None)

    def of_head(config: Any, frozen: Any, trained: Any) -> dict[str, float]:
        return measure(config, frozen["target"], read_drafter(config, options), frozen["drafter"], trained)

    return of_head if kind == "acceptance" else of_drafter
