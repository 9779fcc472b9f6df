"""Options that several commands have."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
