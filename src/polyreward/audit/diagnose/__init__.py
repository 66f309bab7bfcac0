"""Diagnose a rollout log: what is heterogeneous in its rewards, what that does to the update, which part fixes it."""

from polyreward.audit.diagnose.findings import Diagnosis, Finding, Table
from polyreward.audit.diagnose.run import diagnose
from polyreward.audit.diagnose.what_if import WhatIf

__all__ = ["Diagnosis", "Finding", "Table", "WhatIf", "diagnose"]
