import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.rationale_dropout import RationaleDropout


@given(st.integers(0, 50), st.integers(0, 100))
def test_never_and_always(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    assert RationaleDropout(0.0)(pairs, generator).all()
    assert not RationaleDropout(1.0)(pairs, generator).any()


def test_share_and_shape():
    keep = RationaleDropout(0.3)(20_000, torch.Generator().manual_seed(0))
    assert keep.dtype == torch.bool
    assert keep.shape == (20_000,)
    assert float(keep.float().mean()) == pytest.approx(0.7, abs=0.01)
    apart = RationaleDropout(0.5, paired=False)(1000, torch.Generator().manual_seed(0))
    assert apart.shape == (1000, 2)
    assert bool((apart[:, 0] != apart[:, 1]).any())


def test_the_generator_decides():
    draw = [RationaleDropout()(100, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    torch.manual_seed(3)
    first = RationaleDropout()(100)
    torch.manual_seed(3)
    assert torch.equal(first, RationaleDropout()(100))


def test_wrong_options():
    with pytest.raises(InvalidInputError, match="probability"):
        RationaleDropout(1.5)
    with pytest.raises(InvalidInputError, match="probability"):
        RationaleDropout(float("nan"))
    with pytest.raises(InvalidInputError, match="at least 0"):
        RationaleDropout()(-1)
