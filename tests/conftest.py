"""What every test may rely on: nothing of the machine's environment, no network, no deadline on a slow core."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")

os.environ["HF_HUB_OFFLINE"] = "1"
for name in list(os.environ):
    if name.startswith("OTEL_") or name in {"COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"}:
        del os.environ[name]
