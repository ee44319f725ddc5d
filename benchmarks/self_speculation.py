"""How far does a master at few bits guess what it says at 8, and does drafting with it pay?

Continues solutions of GSM8K greedily, plainly and with drafts of the same master at each narrower width, by turns. It
takes a master that knows such text: `python -m benchmarks.multi_precision` leaves one in FOLDER/joint-0/model.

    python -m benchmarks.self_speculation --model FOLDER/joint-0/model --data GSM8K
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.policy import command


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", type=Path, required=True, help="folder of a master")
    args.add_argument("--data", type=Path, required=True, help="folder of GSM8K's files")
    args.add_argument("--bits", type=int, nargs="+", default=[6, 4, 2])
    args.add_argument("--drafts", type=int, default=4)
    args.add_argument("--prompts", type=int, default=40)
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "self_speculation", "environment": record.environment(), "draft_bits": {}}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        texts = [json.loads(line)["answer"] for line in (opts.data / "test.jsonl").read_text().splitlines()]
        rows = [json.dumps({"prompt": f"\n{text[:60]}"}) + "\n" for text in texts[: opts.prompts]]
        prompts.write_text("".join(rows), encoding="utf-8")
        ask: list[Any] = ["--model", opts.model, "--bits", 8, "--drafter", "self", "--drafts", opts.drafts]
        ask += ["--prompts", prompts, "--max-new-tokens", 96]
        result["settings"] = [str(x) for x in ask if x not in (opts.model, prompts)]
        for bits in opts.bits:
            out = Path(folder) / str(bits)
            command("bench", "speculative", *ask, "--draft-bits", bits, "--out", out)
            found = json.loads((out / "report.json").read_text())
            result["draft_bits"][str(bits)] = {name: value for name, value in found.items() if name != "model"}
            print(bits, {name: found[name] for name in ("tau", "identical", "speedup", "extra_bytes")}, flush=True)
    record.save("self-speculation-gsm8k-cpu", result)


if __name__ == "__main__":
    main()
