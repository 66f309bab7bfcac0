import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.latent_priors import Prior, RadialFlow
from polyreward.reward_models.latent_training import fit_sets
from polyreward.reward_models.latent_users import (
    CyclicalAnnealer,
    LatentReward,
    PairwiseLatentPreference,
    VariationalPreferences,
    VPLLoss,
    active_units,
    gaussian_kl,
    on_sphere,
    reparameterize,
)
from polyreward.reward_models.likelihoods import bradley_terry_loss
from polyreward.reward_models.preference_sets import PreferenceSetEncoder

MEAN, LOG_VARIANCE = torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(0.25)])


def two_types(sets=400, pairs=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    goals = torch.tensor([[0.0, 0.0], [1.0, 1.0]])[torch.randint(0, 2, (sets,), generator=generator)].unsqueeze(1)
    first, second = (torch.rand(sets, pairs, 2, generator=generator) for _ in range(2))
    return first, second, ((first - goals).norm(dim=-1) < (second - goals).norm(dim=-1)).float(), goals


def model(decoder=LatentReward, schedule=0.2, prior="learned", seed=0, kind="concat", **options):
    torch.manual_seed(seed)
    return VariationalPreferences(
        PreferenceSetEncoder(kind, 2, 4, 32), decoder(2, 4, 32), VPLLoss(schedule, prior, d_latent=4), **options
    )


# divergence and priors


def test_divergence_of_the_worked_example():
    assert float(gaussian_kl(MEAN, LOG_VARIANCE)) == pytest.approx(0.5 + 0.318147, abs=1e-6)
    assert float(gaussian_kl(MEAN, LOG_VARIANCE, half=False)) == pytest.approx(1.636294, abs=1e-6)
    logits, labels = torch.zeros(1, 1), torch.ones(1, 1)
    for half, expected in ((True, 0.818147), (False, 1.636294)):
        loss, metrics = VPLLoss(1.0, kl_half=half)(logits, labels, MEAN[None], LOG_VARIANCE[None])
        assert float(metrics["kl"]) == pytest.approx(expected, abs=1e-6)
        assert float(loss) == pytest.approx(math.log(2) + expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_divergence_equals_that_of_torch(seed):
    torch.manual_seed(seed)
    mean, log_variance, prior_mean, prior_log_variance = torch.randn(4, 3, 5).double()
    q = Normal(mean, (0.5 * log_variance).exp())
    p = Normal(prior_mean, (0.5 * prior_log_variance).exp())
    found = gaussian_kl(mean, log_variance, prior_mean, prior_log_variance)
    assert torch.allclose(found, kl_divergence(q, p).sum(-1))
    assert (found >= 0).all()
    assert torch.allclose(gaussian_kl(mean, log_variance, mean, log_variance), torch.zeros(3).double())


def test_a_learned_prior_starts_as_the_standard_one_and_learns():
    learned, standard = Prior("learned", 2), Prior("standard", 2)
    assert torch.equal(learned.kl(MEAN, LOG_VARIANCE), standard.kl(MEAN, LOG_VARIANCE))
    assert [p.requires_grad for p in standard.parameters()] == [False, False]
    learned.kl(MEAN, LOG_VARIANCE).backward()
    assert learned.mean.grad.abs().sum() > 0
    with torch.no_grad():
        learned.mean.fill_(3.0)
        learned.log_variance.fill_(math.log(4.0))
    draws = learned.sample(20_000, torch.Generator().manual_seed(0))
    assert draws.mean(0).tolist() == pytest.approx([3, 3], abs=0.05)
    assert draws.std(0).tolist() == pytest.approx([2, 2], abs=0.05)


def test_radial_flows_are_inverted_and_their_determinants_exact():
    torch.manual_seed(0)
    flow, z = RadialFlow(3).double(), torch.randn(5, 3).double()
    with torch.no_grad():
        flow.a.fill_(0.4)
        flow.b.fill_(-2.0)  # contracts, close to where it would fold
    assert torch.allclose(flow.inverse(flow(z)), z)
    for row, found in zip(z, flow.log_determinant(z), strict=True):
        jacobian = torch.autograd.functional.jacobian(flow, row)
        assert float(found) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-9)


def test_a_flow_prior_has_the_divergence_of_the_pushed_distributions():
    torch.manual_seed(0)
    prior = Prior("flow", 2).double()
    mean, log_variance = MEAN.double(), LOG_VARIANCE.double()
    z = reparameterize(mean.expand(200_000, 2), log_variance.expand(200_000, 2))
    q = Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(-1)
    base, determinant = prior.push(z), torch.zeros(len(z)).double()
    for step in reversed(prior.flow):  # the density of the prior at the pushed draw, through the inverse
        base = step.inverse(base)
        determinant = determinant + step.log_determinant(base)
    forward = torch.zeros(len(z)).double()
    at = z
    for step in prior.flow:
        forward = forward + step.log_determinant(at)
        at = step(at)
    p = Normal(0.0, 1.0).log_prob(base).sum(-1) - determinant
    assert float((q - forward - p).mean()) == pytest.approx(float(prior.kl(mean, log_variance)), abs=0.01)
    assert prior.centre().shape == (2,)


def test_draws_come_from_the_generator():
    mean, log_variance = MEAN.expand(50_000, 2), LOG_VARIANCE.expand(50_000, 2)
    draws = reparameterize(mean, log_variance, torch.Generator().manual_seed(1))
    assert torch.equal(draws, reparameterize(mean, log_variance, torch.Generator().manual_seed(1)))
    assert draws.mean(0).tolist() == pytest.approx([1, 0], abs=0.02)
    assert draws.std(0).tolist() == pytest.approx([1, 0.5], abs=0.02)
    assert on_sphere(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        pytest.approx([0.6 * math.sqrt(2), 0.8 * math.sqrt(2)]), [0, 0]
    ]  # fmt: skip


def test_active_units():
    means = torch.tensor([[0.0, 1.0, 0.1], [0.2, 1.0, 0.3], [0.4, 1.0, 0.2]])
    assert int(active_units(means)) == 1  # variances 0.0267, 0 and 0.0067
    assert int(active_units(means, 0.005)) == 2
    assert int(active_units(means[:1])) == 0
    with pytest.raises(InvalidInputError, match="active_units"):
        active_units(means[0])


# annealing


def test_annealer_of_the_worked_example():
    annealer = CyclicalAnnealer(total=100, cycles=1, shape="cosine", baseline=0.1)
    assert [annealer(t) for t in (0, 50, 100)] == pytest.approx([0.1, 0.55, 1.0])
    assert annealer(150) == pytest.approx(0.55)
    assert annealer(100.001) == pytest.approx(0.1, abs=1e-4)
    four = CyclicalAnnealer(total=100, cycles=4)
    assert [four(t) for t in (0, 12.5, 25, 37.5, 50, 75, 100)] == pytest.approx([0, 0.5, 1, 0.5, 1, 1, 1])
    assert CyclicalAnnealer(100, 4, baseline=0.5, scale=0.2)(0) == pytest.approx(0.1)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 500), st.integers(1, 5), st.sampled_from(["cosine", "linear", "logistic", "none"]), st.floats(0, 1))
def test_annealer_rises_within_a_cycle_and_repeats(step, cycles, shape, baseline):
    annealer = CyclicalAnnealer(100, cycles, shape, baseline)
    assert baseline - 1e-9 <= annealer(step) <= 1 + 1e-9
    inside = step % annealer.period
    if 1e-3 < inside < annealer.period - 1e-3:
        assert annealer(step + annealer.period) == pytest.approx(annealer(step), abs=1e-6)
        assert annealer(step) <= annealer(step - inside + 0.5 * (inside + annealer.period)) + 1e-9


def test_annealer_has_a_state():
    annealer = CyclicalAnnealer(10, 1, "linear")
    for _ in range(3):
        annealer.step()
    other = CyclicalAnnealer(10, 1, "linear")
    other.load_state_dict(annealer.state_dict())
    assert annealer.value == other.value == other() == pytest.approx(0.3)
    assert CyclicalAnnealer(1e6, 1, "logistic")(0) == pytest.approx(0.0)
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        CyclicalAnnealer(10, 1, "cosin")
    with pytest.raises(InvalidInputError, match="total above 0"):
        CyclicalAnnealer(0)
    with pytest.raises(InvalidInputError, match="at least 0"):
        annealer(-1)


# decoders


def test_the_split_first_layer_is_that_of_the_concatenation():
    torch.manual_seed(0)
    decoder, items, z = LatentReward(3, 2, 16), torch.randn(4, 5, 3), torch.randn(4, 2)
    joined = torch.cat([items, z.unsqueeze(1).expand(4, 5, 2)], dim=-1)
    assert torch.allclose(decoder.reward(items, z), decoder.network(joined).squeeze(-1), atol=1e-6)
    assert torch.allclose(decoder(items[0], z[0]), decoder.reward(items, z)[0], atol=1e-6)
    assert decoder.reward(items[0], z.unsqueeze(1)).shape == (4, 5)
    pairwise = PairwiseLatentPreference(3, 2, 16)
    joined = torch.cat([items, items.flip(1), z.unsqueeze(1).expand(4, 5, 2)], dim=-1)
    found = pairwise.logits(items, items.flip(1), z)
    assert torch.allclose(found, pairwise.network(joined).squeeze(-1), atol=1e-6)


def test_segments_are_summed_and_scaled():
    torch.manual_seed(0)
    decoder, first, second, z = LatentReward(3, 2, 16, scale=4.0), *torch.randn(2, 2, 5, 6, 3), torch.randn(2, 2)
    expected = (decoder.reward(first, z).sum(-1) - decoder.reward(second, z).sum(-1)) / 4
    assert torch.allclose(decoder.logits(first, second, z), expected)
    assert torch.allclose(
        decoder.logits(first[:, :, 0], second[:, :, 0], z), decoder.logits(first[:, :, :1], second[:, :, :1], z),
        atol=1e-6,
    )  # fmt: skip


def test_pairwise_rewards_are_bounded_means():
    torch.manual_seed(0)
    decoder, items, z, others = (
        PairwiseLatentPreference(3, 2, 8),
        9 * torch.randn(4, 3),
        torch.randn(2),
        torch.randn(7, 3),
    )
    found = decoder.reward(items, z, others)
    assert ((found > 0) & (found < 1)).all()
    for i in range(4):
        slow = sum(float(torch.sigmoid(decoder.logits(items[i], other, z))) for other in others) / 7
        assert float(found[i]) == pytest.approx(slow, abs=1e-6)
    assert torch.allclose(decoder.reward(items, z, others, temperature=0.5), torch.exp(found / 0.5))
    assert decoder.reward(items, torch.randn(5, 1, 2), others).shape == (5, 4)
    decoder.symmetric = True
    assert torch.allclose(decoder.logits(items, others[:4], z), -decoder.logits(others[:4], items, z), atol=1e-6)


def test_a_pairwise_model_of_a_score_ranks_as_the_score(monkeypatch):
    decoder, items, others = PairwiseLatentPreference(1, 1, 4), torch.randn(30, 1), torch.randn(9, 1)
    score = lambda s: (s**3 + s).squeeze(-1)  # noqa: E731
    monkeypatch.setattr(decoder, "logits", lambda first, second, z: score(first) - score(second))
    for some in (others, others[:1] + 3):
        found = decoder.reward(items, torch.zeros(1), some)
        assert torch.equal(found.argsort(), score(items).argsort())


def test_chunks_change_nothing(monkeypatch):
    from polyreward.reward_models import latent_rewards

    torch.manual_seed(0)
    decoder, items, z, others = PairwiseLatentPreference(3, 2, 8), torch.randn(4, 3), torch.randn(2), torch.randn(7, 3)
    whole = decoder.reward(items, z, others)
    monkeypatch.setattr(latent_rewards, "CHUNK", 70)
    assert torch.allclose(decoder.reward(items, z, others), whole, atol=1e-6)


def test_wrong_decoder_calls():
    decoder = LatentReward(3, 2, 8)
    with pytest.raises(InvalidInputError, match="scale must be above 0"):
        LatentReward(3, 2, scale=0)
    with pytest.raises(InvalidInputError, match=r"expected \(\.\.\., 3\)"):
        decoder.reward(torch.randn(5, 2), torch.randn(2))
    with pytest.raises(InvalidInputError, match=r"latents \(U, 1, 2\)"):
        decoder.reward(torch.randn(5, 3), torch.randn(4, 2))
    pairwise = PairwiseLatentPreference(3, 2, 8)
    with pytest.raises(InvalidInputError, match="comparison_items"):
        pairwise.reward(torch.randn(5, 3), torch.randn(2), torch.zeros(0, 3))
    with pytest.raises(InvalidInputError, match="temperature"):
        pairwise.reward(torch.randn(5, 3), torch.randn(2), torch.randn(2, 3), temperature=0)


# loss


def test_without_beta_and_with_a_blind_encoder_the_loss_is_that_of_bradley_terry():
    first, second, labels, _ = two_types(sets=6)
    mine = model(schedule=0.0).eval()

    class Blind(torch.nn.Module):
        d_latent = 4

        def forward(self, first, second, labels, mask=None):
            return torch.zeros(len(first), 4), torch.zeros(len(first), 4)

    mine.encoder = Blind()
    loss, metrics = mine(first, second, labels)
    scores = [mine.decoder.reward(items, torch.zeros(4)) for items in (first, second)]
    each = bradley_terry_loss(scores[0] - scores[1], labels, reduction="none")
    assert float(loss) == pytest.approx(float(each.sum()), rel=1e-5)
    assert int(metrics["active_units"]) == 0


@pytest.mark.parametrize("reduction", ["sum", "mean", "language"])
def test_swapping_the_two_and_the_label_leaves_the_loss(reduction):
    first, second, labels, _ = two_types(sets=6)
    decoder, z = LatentReward(2, 4, 16), torch.randn(6, 4)
    loss = VPLLoss(1.0, reduction=reduction)
    posterior = torch.randn(6, 4), torch.randn(6, 4)
    one, _ = loss(decoder.logits(first, second, z), labels, *posterior)
    two, _ = loss(decoder.logits(second, first, z), 1 - labels, *posterior)
    assert float(one) == pytest.approx(float(two), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_reductions_and_accuracy_against_a_loop(seed):
    torch.manual_seed(seed)
    logits, labels = 3 * torch.randn(3, 4).double(), torch.randint(0, 3, (3, 4)).double() / 2
    mean, log_variance = torch.randn(2, 3, 2).double()
    mask = torch.rand(3, 4) < 0.8
    nll = kl = right = decided = 0.0
    for b in range(3):
        kl += float(kl_divergence(Normal(mean[b], (0.5 * log_variance[b]).exp()), Normal(0.0, 1.0)).sum())
        for i in range(4):
            if mask[b, i]:
                p = 1 / (1 + math.exp(-float(logits[b, i])))
                y = float(labels[b, i])
                nll -= y * math.log(p) + (1 - y) * math.log(1 - p)
                decided += y != 0.5
                right += y != 0.5 and (p > 0.5) == (y > 0.5)
    expected = {
        "sum": nll + 0.3 * kl,
        "mean": (nll + 0.3 * kl) / 3,
        "language": nll / max(int(mask.sum()), 1) + 0.3 * kl,
    }
    for reduction, value in expected.items():
        loss, metrics = VPLLoss(0.3, reduction=reduction)(logits, labels, mean, log_variance, mask)
        assert float(loss) == pytest.approx(value)
        assert float(metrics["accuracy"]) == pytest.approx(right / max(decided, 1))


def test_schedules_advance():
    for schedule in (CyclicalAnnealer(4, 1, "linear"), lambda step: step / 4):
        loss = VPLLoss(schedule)
        seen = []
        for _ in range(3):
            seen.append(loss.beta)
            loss.step()
        assert seen == pytest.approx([0, 0.25, 0.5])
        other = VPLLoss(CyclicalAnnealer(4, 1, "linear") if isinstance(schedule, CyclicalAnnealer) else schedule)
        other.load_state_dict(loss.state_dict())
        assert other.beta == pytest.approx(0.75)


def test_wrong_losses():
    with pytest.raises(InvalidInputError, match="pass d_latent"):
        VPLLoss(1.0, "learned")
    with pytest.raises(UnknownNameError, match="did you mean 'learned'"):
        VPLLoss(1.0, "learnt", d_latent=2)
    with pytest.raises(InvalidInputError, match="reduction"):
        VPLLoss(reduction="all")
    with pytest.raises(ValueError, match=r"labels\[0, 1\] is 2"):
        VPLLoss()(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(InvalidInputError, match="logits have shape"):
        VPLLoss()(torch.zeros(1, 2), torch.ones(2, 1), torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(InvalidInputError, match="normalize"):
        model(normalize="sometimes")
    with pytest.raises(InvalidInputError, match="width 4, the decoder's 3"):
        VariationalPreferences(PreferenceSetEncoder("concat", 2, 4, 8), LatentReward(2, 3, 8), VPLLoss())


# together


@pytest.mark.parametrize("decoder", [LatentReward, PairwiseLatentPreference])
def test_people_of_two_kinds_are_told_apart(decoder):
    first, second, labels, _ = two_types(sets=1000)
    mine = model(decoder, 0.05, kind="attention")
    history = fit_sets(
        mine, first, second, labels, epochs=14, batch_size=50, learning_rate=3e-3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert history[-1]["active_units"] >= 1
    late = two_types(sets=100, seed=1)
    z = mine.infer(*late[:3])
    a, b = torch.rand(2, 100, 20, 2, generator=torch.Generator().manual_seed(2))
    right = (mine.logits(a, b, z) > 0) == ((a - late[3]).norm(dim=-1) < (b - late[3]).norm(dim=-1))
    assert float(right.float().mean()) > 0.85
    # of whom nothing is known
    assert mine.sample_prior(5, torch.Generator().manual_seed(0)).shape == (5, 4)


def test_targets_may_be_other_pairs_and_normalising_is_alike_in_training_and_use():
    first, second, labels, _ = two_types(sets=10)
    mine = model(kind="attention", normalize="always").eval()
    targets = first[:, :3], second[:, :3], labels[:, :3]
    loss, _ = mine(first, second, labels, targets=targets)
    assert torch.isfinite(loss)
    length = [
        float(mine.latent(*posterior).norm()) for posterior in ((MEAN.repeat(2),), (MEAN.repeat(2), MEAN.repeat(2)))
    ]
    assert length == pytest.approx([2, 2], abs=1e-5)
    released = model(kind="attention", normalize="training")
    assert torch.equal(released.latent(MEAN.repeat(2)), MEAN.repeat(2))
    assert float(released.latent(MEAN.repeat(2), MEAN.repeat(2)).norm()) == pytest.approx(2, abs=1e-5)
    mine.eval()
    assert torch.equal(mine(first, second, labels)[0], mine(first, second, labels)[0])  # no noise in use


def test_the_best_weights_by_validation_are_kept_and_seeds_repeat():
    first, second, labels, _ = two_types(sets=60)
    found = []
    for _ in range(2):
        mine = model()
        history = fit_sets(
            mine, first, second, labels, epochs=6, batch_size=20, learning_rate=0.05, validation=0.2,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        found.append(mine.infer(first, second, labels))
    assert torch.equal(*found)
    assert {"loss", "nll", "kl", "accuracy", "active_units", "validation_loss"} <= history[0].keys()
    held = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:12]
    _, metrics = mine(first[held], second[held], labels[held])
    kept = float((metrics["nll"] + metrics["kl"]) / 12)
    assert kept == pytest.approx(min(h["validation_loss"] for h in history), rel=1e-5)


def test_wrong_fits():
    first, second, labels, _ = two_types(sets=2)
    with pytest.raises(InvalidInputError, match="fit_sets needs epochs"):
        fit_sets(model(), first, second, labels, epochs=0)
    with pytest.raises(InvalidInputError, match="leave none"):
        fit_sets(model(), first[:1], second[:1], labels[:1], validation=0.5)
    with pytest.raises(InvalidInputError, match="not finite"):
        fit_sets(model(), first * torch.nan, second, labels, epochs=1)
