"""Feedback in words first, labels second (Math-Minos, https://arxiv.org/abs/2406.14024).

Stage 1 fine-tunes a model on what is said about each step of a solution, up to the first error; stage 2 goes on with
that network on labels. From its abstract: feedback is step-wise, tells whether a step is right and why, and comes in a
first stage before binary labels. Ours is the text of an example:

    prompt      question  start  step 1  between  step 2  between  ...  step R  closing
    completion  feedback 1 \\n feedback 2 \\n ... \\n feedback of the first error

Stage 2 (`models.reward.render_steps`) reads question, start, steps and between in the same order, and behind each step
its separator. If that is a control token, which no text can spell, it reads the tokens of stage 1 with separators put
in. If it is the token of a newline, with nothing between steps, it reads those of stage 1, at the same positions; then
feedback begins where the last step's score is read. Tokenizers that merge across lines leave small differences.
"""

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def feedback_example(
    row: Mapping[str, Any], *, start: str = "", between: str = "\n", closing: str = "\n"
) -> dict[str, str]:
    """Prompt and completion of stage 1, from a row with steps and their feedback.

    Args:
      row: with `prompt`, `steps` and `feedback`, a text for each step; null behind the last step that has one.
      start: text before the first step, as in stage 2.
      between: text before every other step, as in stage 2; of a separator that is text, separator and text.
      closing: what stands between steps and feedback.

    Raises:
      ValueError: if the prompt is no text, or the feedback is missing, of other steps, blank, or has a gap.
    """
    steps, feedback = row["steps"], row.get("feedback")
    if not isinstance(row["prompt"], str):
        raise ValueError("`prompt` holds messages; expected text. Write the chat out as the model will read it.")
    if not isinstance(feedback, list) or len(feedback) != len(steps):
        found = "no `feedback`" if feedback is None else f"`feedback` {feedback!r:.60}"
        raise ValueError(f"{found}; expected a list of {len(steps)}, a text or null for each step.")
    told = next((i for i, said in enumerate(feedback) if said is None), len(feedback))
    wrong = [i for i, said in enumerate(feedback[:told]) if not isinstance(said, str) or not said.strip()]
    if wrong:
        raise ValueError(f"`feedback[{wrong[0]}]` is {feedback[wrong[0]]!r:.60}; expected a text that is not blank.")
    if not told or any(said is not None for said in feedback[told:]):
        found = (
            "null for every step" if all(said is None for said in feedback) else f"null at {told} and text behind it"
        )
        raise ValueError(f"`feedback` has {found}; expected a text for each step up to the first error, then null.")
    said = [" ".join(text.split()) for text in feedback[:told]]  # a line for each step, whatever was written
    return {"prompt": row["prompt"] + start + between.join(steps) + closing, "completion": "\n".join(said)}
