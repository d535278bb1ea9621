"""Settings that must come before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
