"""`jaxaroo bench ...`: what a faster method is worth, measured beside plain decoding in one process."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..infer.speculative.settings import SpeculationConfig
from .output import Bits, FloatType, UsageError, check_limit, dumps, expect_folder, load_model


def bench_speculative(
    *,
    model: Path,
    prompts: Path,
    speculation: Annotated[SpeculationConfig, tyro.conf.arg(name="")] = SpeculationConfig(),
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch: int = 1,
    repeats: int = 3,
    parts: bool = True,
    seed: int = 0,
    dtype: FloatType | None = None,
    bits: Bits | None = None,
    out: Path = Path("bench-speculative"),
) -> int:
    """Decode questions plainly and with a drafter, in turns, and report what that changed.

    Writes report.json, report.md and acceptance.png; prints the table.

    Args:
      model: folder of a Hugging Face checkpoint.
      prompts: JSON lines in Spec-Bench's format, or each with a `prompt`.
      speculation: drafter and rule.
      limit: questions to ask at most.
      max_new_tokens: tokens of an answer at most.
      temperature: 0 is greedy.
      batch: questions answered at the same time.
      repeats: passes of each side that count; one more goes before them.
      parts: time drafts, judgement and commits one by one too, which predicts the ratio.
      seed: of sampling.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      bits: of a master (`train qat`) the width to serve at, or one a layer; its highest when not given.
      out: folder for the report; an earlier one is replaced.
    """
    import jax
    from tqdm import tqdm

    from ..infer.sampling import Sampling
    from ..infer.speculative.load import load_speculation
    from ..infer.speculative.measure import markdown, measure, plot_acceptance, read_questions
    from ..models.tokenizer import load_tokenizer

    if speculation.drafter is None:
        raise UsageError("bench speculative: expected --drafter, a folder or lookup.")
    if batch < 1 or repeats < 1:
        raise UsageError(f"bench speculative: --batch {batch}, --repeats {repeats}; expected at least 1 of each.")
    expect_folder("bench speculative", out)
    check_limit(limit)
    questions = read_questions(prompts)[:limit]
    loaded, at_width = load_model(model, dtype=dtype, bits=bits)
    tokenizer = load_tokenizer(model)
    drafting = load_speculation(speculation, loaded.config, tokenizer, at_width)
    assert drafting is not None
    sampling = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed)
    with tqdm(total=repeats + 1, desc="passes", disable=None) as bar:
        report = measure(
            loaded,
            tokenizer,
            drafting,
            questions,
            sampling=sampling,
            batch=batch,
            repeats=repeats,
            parts=parts,
            progress=lambda done, total: _show(bar, done),
        )
    report |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "model": model.name}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(jsonlib.dumps(jsonlib.loads(dumps(report)), indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    plot_acceptance(out / "acceptance.png", report)
    print(markdown(report), end="")
    print(f"wrote {out}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _show(bar: Any, done: int) -> None:
    bar.update(done - bar.n)
