"""Objectives: from advantages and log-probabilities to a loss.

`PolicyObjective` is the contract and the loss; trust region, ratio, aggregation, KL and entropy are its parts.
``OBJECTIVES`` maps the names that recipes use to presets.
"""

from polyreward.objectives.aggregation import aggregate
from polyreward.objectives.cloning import BehaviourCloning, NoEvidenceWarning
from polyreward.objectives.divergence import KLPenalty, kl_estimate
from polyreward.objectives.entropy import EntropyBonus, EntropyHinge, task_entropy
from polyreward.objectives.likelihood import JEPOObjective, LikelihoodPolicyLoss, likelihood_objective
from polyreward.objectives.pessimistic_improvement import PessimisticImprove
from polyreward.objectives.posterior import (
    PosteriorTarget,
    SelfNormalizedKL,
    brain_grad,
    brain_loss,
    brain_weights,
    dpg_grad,
    gdcpp_grad,
)
from polyreward.objectives.presets import (
    OBJECTIVES,
    dapo_objective,
    dr_grpo_objective,
    ema_grpo_objective,
    etr_objective,
    gaussian_grpo_objective,
    grpo_objective,
    gspo_objective,
    make_objective,
    objective_config,
    token_mean_objective,
)
from polyreward.objectives.surrogate import ObjectiveResult, PolicyObjective, clipped_surrogate, importance_ratio
from polyreward.objectives.trust_region import ElasticTrustRegion, FixedClip, TrustRegion

__all__ = [
    "OBJECTIVES",
    "BehaviourCloning",
    "ElasticTrustRegion",
    "EntropyBonus",
    "EntropyHinge",
    "FixedClip",
    "JEPOObjective",
    "KLPenalty",
    "LikelihoodPolicyLoss",
    "NoEvidenceWarning",
    "ObjectiveResult",
    "PessimisticImprove",
    "PolicyObjective",
    "PosteriorTarget",
    "SelfNormalizedKL",
    "TrustRegion",
    "aggregate",
    "brain_grad",
    "brain_loss",
    "brain_weights",
    "clipped_surrogate",
    "dapo_objective",
    "dpg_grad",
    "dr_grpo_objective",
    "ema_grpo_objective",
    "etr_objective",
    "gaussian_grpo_objective",
    "gdcpp_grad",
    "grpo_objective",
    "gspo_objective",
    "importance_ratio",
    "kl_estimate",
    "likelihood_objective",
    "make_objective",
    "objective_config",
    "task_entropy",
    "token_mean_objective",
]
