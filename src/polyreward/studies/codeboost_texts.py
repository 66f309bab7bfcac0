"""The parts of the CodeBoost study on real code: curating library functions, and executing CRUXEval's programs."""

from __future__ import annotations

import ast
import contextlib
import gzip
import itertools
import json
import re
import sysconfig
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import numpy as np

from polyreward.data.clique_curation import maximum_clique_curation
from polyreward.data.code_mutation import CodeMutator, mutate_operators
from polyreward.errors import MissingFileError
from polyreward.rewards.execution_prediction import ExecutionPredictionReward, execute_programs
from polyreward.tasks.code_prediction import ForwardTask, LineInfillTask, Snippet, ground_truths, reference_answer

MODULES = (
    "argparse", "ast", "calendar", "cmd", "csv", "datetime", "difflib", "dis", "doctest", "fnmatch", "fractions",
    "functools", "getopt", "gettext", "glob", "gzip", "heapq", "inspect", "ipaddress", "random", "shlex", "statistics",
    "textwrap",
)  # fmt: skip
ORIGINALS, COPIED, COPIES, THRESHOLD = 60, 40, 5, 0.5
ROWS = 160


@cache
def library_functions() -> tuple[str, ...]:
    """Functions of the standard library with 10 to 30 lines and no two alike."""
    folder, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for module in MODULES:
        path = folder / f"{module}.py"
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and 10 <= (node.end_lineno or 0) - node.lineno + 1 <= 30:
                source = ast.get_source_segment(text, node) or ""
                found[re.sub(r"\s+", " ", source)] = _dedented(source)
    return tuple(found.values())


def _dedented(source: str) -> str:
    """A method as a function of its own: its body is indented by four."""
    lines = source.split("\n")
    body = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    spare = max(min(body, default=4) - 4, 0)
    return "\n".join([lines[0], *(line[spare:] for line in lines[1:])])


def edited(text: str, rng: np.random.Generator) -> str:
    """A copy with one name changed, a comment, and perhaps another operator of each class."""
    with contextlib.suppress(SyntaxError):  # a method with a continuation that does not stand alone
        text = mutate_operators(text, 0.1, rng)
    names = sorted(set(re.findall(r"\b[a-z]{3,}(?= =)", text)))
    if names:
        old = names[rng.integers(len(names))]
        text = re.sub(rf"\b{old}\b", f"{old}_{rng.integers(10)}", text)
    lines = text.split("\n")
    at = int(rng.integers(1, len(lines) + 1))
    return "\n".join([*lines[:at], f"    # note {rng.integers(100)}", *lines[at:]])


def curate_functions(seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Clique and random selection of equal size from functions of which many have edited copies."""
    rng = np.random.default_rng([seed, 10])
    count, copied = (12, 6) if quick else (ORIGINALS, COPIED)
    functions = library_functions()
    chosen = [functions[i] for i in rng.choice(len(functions), size=count, replace=False)]
    texts, origin = list(chosen), list(range(count))
    for original in range(copied):
        texts += [edited(chosen[original], rng) for _ in range(COPIES)]
        origin += [original] * COPIES
    order = rng.permutation(len(texts))
    texts, owner = [texts[i] for i in order], np.array(origin)[order]
    kept = maximum_clique_curation(texts, THRESHOLD, seed=rng)
    by_line = maximum_clique_curation(texts, THRESHOLD, similarity="lines", seed=rng)
    drawn = np.sort(rng.choice(len(texts), size=len(kept), replace=False)).tolist()
    return {
        "library, all texts": {"texts": float(len(texts)), "originals": float(count)},
        "library, clique": _covered(texts, owner, kept) | {"exact": float(kept.exact)},
        "library, clique over lines": _covered(texts, owner, by_line) | {"exact": float(by_line.exact)},
        "library, random": _covered(texts, owner, drawn),
    }


def _covered(texts: list[str], owner: np.ndarray, kept: list[int]) -> dict[str, float]:
    """How many originals a selection covers, and its most similar pair, in the order of the texts."""
    largest = 0.0
    for i, j in itertools.combinations(kept, 2):
        matcher = SequenceMatcher(None, texts[i], texts[j])
        if matcher.real_quick_ratio() > largest and matcher.quick_ratio() > largest:
            largest = max(largest, matcher.ratio())
    return {"kept": float(len(kept)), "originals": float(len(set(owner[kept]))), "largest similarity": largest}


def cruxeval(data: Path, seed: int, quick: bool) -> dict[str, float]:
    """Execute a fifth of CRUXEval's programs, unchanged and changed, and score reference answers of both tasks."""
    path = data / "code" / "cruxeval.jsonl.gz"
    if not path.is_file():
        raise MissingFileError(f"the study reads {path}, which does not exist")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][seed % 5 :: 5][: 20 if quick else ROWS]
    rng, mutator = np.random.default_rng([seed, 11]), CodeMutator(0.1, np.random.default_rng([seed, 12]))
    snippets = [Snippet(f"{row['code']}\n\nprint(repr(f({row['input']})))\n") for row in rows]
    checked = ground_truths(snippets, execute_programs)
    agree = [
        c.truth is not None and c.truth["stdout"].strip() == row["output"] for c, row in zip(checked, rows, strict=True)
    ]
    items = []
    for snippet, found in zip(snippets, checked, strict=True):
        if found.truth is not None:
            items += [ForwardTask().build(snippet, found.truth), LineInfillTask().build(snippet, found.truth, rng)]
    whole = [item for item in items if item is not None]
    rewards = ExecutionPredictionReward()(
        None,
        [reference_answer(item) for item in whole],
        truth=[item.truth for item in whole],
        meta=[item.meta for item in whole],
    )
    changed = [mutator.mutate(snippet.code) for snippet in snippets]
    pairs = [(old, Snippet(new)) for old, new in zip(checked, changed, strict=True) if new is not None]
    after = ground_truths([new for _, new in pairs], execute_programs)
    usable = [(old.truth, new.truth) for (old, _), new in zip(pairs, after, strict=True) if old.truth and new.truth]
    return {
        "programs": float(len(rows)),
        "agree with the given output": float(np.mean(agree)),
        "lowest reward of a reference answer": float(min(value or 0.0 for value in rewards)),
        "changed programs": float(np.mean([new != s.code for new, s in zip(changed, snippets, strict=True)])),
        "changed outputs": float(np.mean([old != new for old, new in usable])),
        "crash after the change": float(np.mean([bool(new["stderr"]) for _, new in usable])),
        "drawn again after the change": float(np.mean([new.truth is None for new in after])),
    }
