"""What does it take to save and to restore a run's state, in memory of the host, here and on another topology?

The state of full fine-tuning (float32 weights and two moments) is saved from eight pretended devices of one process,
and restored by one, two and eight devices of one process and by two processes of four. Every process is a new one; what
it holds beyond what it held before, at most, is read from the system (VmHWM) and divided by the bytes of its shard.
Devices are the host's CPU, so the arrays themselves are 1.0 of it; on an accelerator they are elsewhere. Three times
each, and three with glibc's memory in one piece (MALLOC_ARENA_MAX=1), which many reading threads otherwise scatter.

    python -m benchmarks.restore
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from jaxaroo.models.presets import preset
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh, start_processes
from jaxaroo.sharding.plan import bytes_of
from jaxaroo.train import checkpoint
from jaxaroo.train.plan import run_config
from jaxaroo.train.recipe import RECIPES, Origin
from jaxaroo.train.run import begin_state

SAVED = 8  # devices
RUNS = 3
LAYOUTS = ((1, 1), (1, 2), (1, 8), (2, 4))  # processes, devices of each


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", default="100m", help="preset")
    args.add_argument("--child", nargs=2, metavar=("ACTION", "FOLDER"), help=argparse.SUPPRESS)
    opts = args.parse_args()
    if opts.child:
        print(json.dumps(measured(opts.model, opts.child[0], Path(opts.child[1]))))
        return
    result: dict[str, Any] = {"benchmark": "restore", "model": opts.model, "environment": record.environment()}
    with tempfile.TemporaryDirectory() as folder:
        result["save"] = children(opts.model, "save", folder, 1, SAVED)[0]
        result["restore"] = [
            {"processes": n, "devices": n * devices, "arenas": arenas}
            | {"each": [children(opts.model, "restore", folder, n, devices, arenas) for _ in range(RUNS)]}
            for n, devices in LAYOUTS
            for arenas in ("", "1")
        ]
    for row in result["restore"]:
        found = sorted(max(one["times_the_shard"] for one in each) for each in row["each"])
        pieces = "one piece" if row["arenas"] else "default"
        print(f"{row['processes']} processes, {row['devices']} devices, {pieces}: {found} x the shard", file=sys.stderr)
    record.save(f"restore-{jax.default_backend()}", result)


def children(model: str, action: str, folder: str, count: int, devices: int, arenas: str = "") -> list[dict[str, Any]]:
    """What each process of a run of its own measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env |= {"MALLOC_ARENA_MAX": arenas} if arenas else {}
    joined = dict(JAX_COORDINATOR_BIND_ADDRESS=address, JAXAROO_COORDINATOR=address, JAXAROO_NUM_PROCESSES=str(count))
    own = [env | joined | {"JAXAROO_PROCESS_ID": str(i)} if count > 1 else env for i in range(count)]
    command = [sys.executable, "-m", "benchmarks.restore", "--model", model, "--child", action, folder]
    each = [subprocess.Popen(command, env=one, stdout=subprocess.PIPE, text=True) for one in own]
    said = [child.communicate()[0] for child in each]
    if any(child.returncode for child in each):
        sys.exit(f"{action} by {count} processes failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


def measured(model: str, action: str, folder: Path) -> dict[str, Any]:
    """Save or restore, in this process."""
    start_processes()
    cfg, mesh, recipe = run_config(8, 64, dtype="float32"), make_mesh(MeshConfig()), RECIPES["sft"]
    origin = Origin(preset(model), byte_tokenizer(), None)
    what = recipe.trainable(origin, recipe.options(), None)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        like, create = begin_state(
            cfg, origin, what, recipe.optimizer(origin, recipe.options(), cfg.optimizer, 1), mesh
        )
        shard = bytes_of(like._replace(frozen={})) * jax.local_device_count()
        with checkpoint.open_checkpoints(folder, checkpoint.CheckpointConfig()) as manager:
            state = jax.block_until_ready(create()) if action == "save" else None
            held, start = _kilobytes("VmRSS"), time.perf_counter()
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            if state is not None:
                checkpoint.save(manager, state, {})
                manager.wait_until_finished()
            else:
                jax.block_until_ready(checkpoint.restore(manager, like))
            more = 1024 * (_kilobytes("VmHWM") - held)
            seconds = time.perf_counter() - start
    return {"shard": shard, "more": more, "times_the_shard": more / shard, "seconds": seconds}


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


if __name__ == "__main__":
    main()
