"""`import jaxaroo` is instant, and its public names load their modules without starting a backend."""

import os
import subprocess
import sys
import time

import pytest

import jaxaroo


def python(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_a_bare_import_takes_no_time_because_it_leaves_jax_alone():
    code = "import sys, jaxaroo; sys.exit(', '.join({'jax', 'flax', 'numpy', 'tyro'} & {*sys.modules}) or None)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        child = python(code)
        seconds.append(time.perf_counter() - start)
        assert child.returncode == 0, f"imported by `import jaxaroo`: {child.stderr}"
    assert min(seconds) < 2, seconds


@pytest.mark.parametrize("name", jaxaroo.__all__)
@pytest.mark.slow
def test_a_public_name_resolves_without_starting_a_backend(name):
    child = python(f"import jaxaroo; jaxaroo.{name}", JAX_PLATFORMS="none")  # whatever starts a backend now raises
    assert child.returncode == 0, child.stderr


def test_the_platform_none_really_refuses():
    assert python("import jax; jax.devices()", JAX_PLATFORMS="none").returncode != 0


def test_dir_lists_what_can_be_had():
    assert {*jaxaroo.__all__, "__version__"} <= {*dir(jaxaroo)}
    assert {*jaxaroo.__all__} == {*jaxaroo._HOME}


@pytest.mark.errors
def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jaxaroo' has no attribute 'lode'"):
        _ = jaxaroo.lode
