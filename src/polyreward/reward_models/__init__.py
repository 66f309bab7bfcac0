"""Reward models: what a sample is worth, learned from people.

A reward model is an encoder, a head and a likelihood; `PreferenceModel` fits it, scores with it, saves and loads it,
and `RewardEnsemble` makes one of several.
"""

from polyreward.reward_models.contract import ModelReward, RewardModel, as_reward
from polyreward.reward_models.encoders import Encoder, Features, FeatureTable, HashingEncoder
from polyreward.reward_models.ensembles import MemberFailureWarning, RewardEnsemble, aggregate_rewards
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.fine_tuning import FineTunedEncoder
from polyreward.reward_models.fit_options import FitOptions, FitProgress
from polyreward.reward_models.heads import Head, Items, LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.integer_ratings import IntegerRatings
from polyreward.reward_models.likelihoods import (
    BradleyTerry,
    CenteredBTLoss,
    Likelihood,
    PlackettLuce,
    Regression,
    bradley_terry_loss,
    centering_penalty,
    plackett_luce_loss,
    select_best_loss,
    tied_bradley_terry_loss,
)
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning
from polyreward.reward_models.over_optimisation import (
    EnsembleSplit,
    hack_feature_shift,
    overoptimization_curve,
    underspecification_report,
)
from polyreward.reward_models.text_encoders import FrozenEncoder, SentenceEncoder

__all__ = [
    "BradleyTerry",
    "CachedEncoder",
    "CenteredBTLoss",
    "Encoder",
    "EnsembleSplit",
    "FeatureTable",
    "Features",
    "FineTunedEncoder",
    "FitOptions",
    "FitProgress",
    "FrozenEncoder",
    "HashingEncoder",
    "Head",
    "IntegerRatings",
    "Items",
    "Likelihood",
    "LinearHead",
    "MemberFailureWarning",
    "ModelReward",
    "PlackettLuce",
    "PreferenceModel",
    "Regression",
    "RewardEnsemble",
    "RewardModel",
    "Scores",
    "SentenceEncoder",
    "TwoLayerHead",
    "UnknownAnnotatorWarning",
    "aggregate_rewards",
    "as_reward",
    "bradley_terry_loss",
    "centering_penalty",
    "hack_feature_shift",
    "overoptimization_curve",
    "plackett_luce_loss",
    "select_best_loss",
    "tied_bradley_terry_loss",
    "underspecification_report",
]
