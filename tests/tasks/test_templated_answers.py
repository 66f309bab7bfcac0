import re

import numpy as np
import pytest

from polyreward.rewards.verifiers import NumericAnswer
from polyreward.tasks.templated_answers import ATTRIBUTES, draw_answers


def test_worth_is_what_the_text_says():
    rows = draw_answers(np.random.default_rng(0), 20)
    assert len(rows.prompts) == len(rows.completions) == 320
    assert rows.groups.tolist() == [i // 8 for i in range(320)]
    checked = NumericAnswer()(rows.prompts, rows.completions, answer=rows.answers)
    for row, (prompt, text, worth) in enumerate(zip(rows.prompts, rows.completions, rows.worth, strict=True)):
        if rows.types[row] == "verifiable":
            a, b, c = map(int, re.findall(r"\d+", prompt))
            assert rows.answers[row] == str(a + b * c)
            if not text.endswith("so many that"):
                assert checked[row] == worth
            else:
                assert worth == 0
            continue
        true = dict(part.split() for part in prompt.partition("(")[2].rstrip(").").split(", "))
        assert true.keys() == ATTRIBUTES.keys()
        words = set(re.findall(r"\w+", text)) - {"This", "size"}
        right = sum(value in words for value in true.values())
        wrong = sum(any(v in words for v in ATTRIBUTES[name] if v != value) for name, value in true.items())
        assert worth == pytest.approx(max(right - wrong, 0) / 5)
    assert (rows.worth[:160] == 1).any()
    assert rows.worth[160:].max() > 0.5
