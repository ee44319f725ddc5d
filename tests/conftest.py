"""One CPU that pretends to be eight devices, strict shapes, warnings as errors, and the same examples on every run."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Before jax is imported, and for the child processes of tests too. Eight devices everywhere, because a process has to
# choose once and it is almost free: on two cores a small jitted step took 66 us instead of 61, compiling the same.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXAROO_TEST_PLATFORM", "cpu")
# LLVM's passes cost more than they bring to programs that run a few times: five files took 155 s instead of 245.
# What XLA itself does to a program stays. JAXAROO_TEST_OPTIMISED=1 compiles as users do.
FLAGS = "--xla_force_host_platform_device_count=8"
if not os.environ.get("JAXAROO_TEST_OPTIMISED"):
    FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small ones, too: they are let go of below

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a jitted function compiles, so time says nothing about an example.
hypothesis.settings.register_profile("jaxaroo", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("jaxaroo")


def pytest_addoption(parser):
    parser.addoption("--first-of-each", action="store_true", help="first parameters alone, and nothing slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-of-each"):
        seen, kept, others = set(), [], []
        for item in items:
            name = item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)
            (others if name in seen or item.get_closest_marker("slow") else kept).append(item)
            seen.add(name)
        config.hook.pytest_deselected(items=others)
        items[:] = kept
    if jax.default_backend() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU; run with JAXAROO_TEST_PLATFORM=cuda"))


@pytest.fixture
def libtpu():
    """The TPU compiler, which comes with the extra `aot`."""
    return pytest.importorskip("libtpu", reason='needs the TPU compiler: pip install "jaxaroo[aot]"')


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Mixing bf16 and f32 by accident is an error, but optax does it on purpose (b1 ** count)."""
    mode = "standard" if request.node.get_closest_marker("optimizer") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """Each compiled program maps pieces of memory, and Linux gives a process 65,530 of them: the whole suite in one
    process needs more, and ends in a segmentation fault."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared():
    """Larger data and goldens that are kept beside the checkout, where they are."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return folder
