from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that trains for seconds, with a reward of one's own beside it."""
    reward = tmp_path / "brevity.py"
    reward.write_text(
        "def brevity(prompts, completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [-0.01 * len(text) for text in texts]\n"
    )
    recipe = tmp_path / "tiny.toml"
    recipe.write_text((Path(__file__).parent / "tiny.toml").read_text().replace("BREVITY", str(reward)))
    return recipe
