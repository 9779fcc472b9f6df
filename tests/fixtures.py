"""Where recorded reference data lies; PRD_FIXTURES overrides it. Absent, the tests that need it skip and say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FIXTURES = Path(os.environ.get("PRD_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))
OFFICIAL = FIXTURES / "official"

needs_fixtures = pytest.mark.skipif(
    not OFFICIAL.is_dir(),
    reason=f"no reference data at {OFFICIAL}; set PRD_FIXTURES to the folder that holds official/",
)
