"""Settings of guides: what help shows must not wait for JAX."""

import subprocess
import sys

from jaxaroo.infer.guided.settings import GuideConfig


def test_nothing_guides_unless_it_is_asked_for():
    assert GuideConfig() == GuideConfig(guide=None, guided_by="ivo", guide_beta=4.0, guide_threshold=0.6, guide_width=4)


def test_settings_leave_jax_alone():
    code = "import sys, jaxaroo.infer.guided.settings; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
