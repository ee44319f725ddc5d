"""Launch scripts, with programs in the place of a cluster's own that write down how they were called."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "sharding" / "launch"
TRAIN = ["sft", "--model", "a model", "--out", "/shared/run"]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")


@pytest.fixture
def call(tmp_path):
    """Run a script; its tools leave with the statuses that are given, in turn, and `gcloud describe` says READY."""

    def run(script, *args, statuses=(), state="READY", **env):
        said = tmp_path / "said"
        (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
        tool = f"""#!/bin/bash
printf '%s' "$(basename "$0")" >> {said}; printf '\x1f%s' "$@" >> {said}; echo >> {said}
case "$*" in *describe*) echo {state}; exit 0;; *requeue*|*pkill*) exit 0;; esac
next=$(head -n1 {tmp_path}/statuses); sed -i 1d {tmp_path}/statuses; exit "${{next:-0}}"
"""
        for name in ("srun", "scontrol", "gcloud", "xpk"):
            (tmp_path / name).write_text(tool)
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        command = ["bash", str(LAUNCH / script), *args]
        done = subprocess.run(
            command, env={"PATH": path, "SLURM_JOB_ID": "7"} | env, capture_output=True, text=True, check=False
        )
        lines = said.read_text().splitlines() if said.exists() else []
        said.unlink(missing_ok=True)
        return done, [line.split("\x1f") for line in lines]

    return run


def test_scripts_are_there_to_be_run_and_bash_can_read_them():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert [s.name for s in scripts] == ["gke.sh", "slurm.sh", "tpu_vm.sh"]
    for script in scripts:
        assert script.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(script)], check=True)


SRUN = ["srun", "--kill-on-bad-exit=1", "jaxaroo", "train", *TRAIN, "--or-resume"]


@pytest.mark.parametrize(
    ("statuses", "status", "calls"),
    [
        ((0,), 0, [SRUN]),
        ((1, 134, 0), 0, [SRUN] * 3),
        ((2,), 2, [SRUN]),
        ((1, 143), 0, [SRUN, SRUN, ["scontrol", "requeue", "7"]]),
        ((1, 1, 1, 1), 1, [SRUN] * 3),
    ],
)
def test_slurm_starts_again_requeues_and_gives_up(call, statuses, status, calls):
    done, found = call("slurm.sh", *TRAIN, statuses=statuses, RESTARTS="2")
    assert (done.returncode, found) == (status, calls)


def test_a_slice_starts_all_workers_again_until_it_is_gone(call):
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--worker=all"]
    wanted = (
        "--command=JAXAROO_COORDINATOR=auto exec jaxaroo train sft --model a\\ model --out /shared/run --or-resume "
    )
    done, found = call("tpu_vm.sh", "pod", *TRAIN, statuses=(1, 0), ZONE="z")
    assert done.returncode == 0
    assert [found[0], found[-1]] == [[*ssh, wanted]] * 2
    assert [line[4] for line in found] == ["ssh", "describe", "ssh", "ssh"]
    assert "pkill" in found[2][-1]
    done, found = call("tpu_vm.sh", "pod", *TRAIN, statuses=(1,), state="PREEMPTED", ZONE="z")
    assert done.returncode == 1
    assert "pod is PREEMPTED; make it anew" in done.stderr


def test_gke_is_told_everything(call):
    done, [found] = call("gke.sh", "job", *TRAIN, CLUSTER="c", IMAGE="i", TPU="v5litepod-64")
    assert done.returncode == 0
    assert found[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--workload=job", "--docker-image=i", "--tpu-type=v5litepod-64"} < set(found)
    assert found[-1] == "--command=jaxaroo train sft --model a\\ model --out /shared/run --or-resume "


@pytest.mark.errors
def test_what_is_missing_is_said_and_nothing_is_started(call):
    for script, args, env, message in (
        ("slurm.sh", [], {}, "usage: sbatch"),
        ("tpu_vm.sh", ["pod"], {}, "usage: ZONE="),
        ("tpu_vm.sh", ["pod", *TRAIN], {}, "expected the slice's zone in ZONE"),
        ("gke.sh", ["job", *TRAIN], {"CLUSTER": "c"}, "expected a container image"),
    ):
        done, found = call(script, *args, **env)
        assert done.returncode
        assert message in done.stderr
        assert found == []
