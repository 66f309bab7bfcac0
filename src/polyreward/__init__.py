"""Heterogeneous rewards: score, combine, normalise, optimise, steer by and audit rewards of different kind."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Names load on first use, so that `import polyreward` costs milliseconds.
_HOME = {
    "RewardBatch": "polyreward.batch",
    "Transform": "polyreward.advantages.transform",
    "chain": "polyreward.advantages.transform",
    "blend": "polyreward.advantages.transform",
    "compute_advantages": "polyreward.advantages.transform",
    "PolyrewardError": "polyreward.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'polyreward' has no attribute {name!r}")
