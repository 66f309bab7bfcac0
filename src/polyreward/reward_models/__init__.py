"""Reward models: what a sample is worth, learned from people.

A reward model is an encoder, a head and a likelihood; `PreferenceModel` fits it, scores with it, saves and loads it,
and `RewardEnsemble` makes one of several.
"""

from polyreward.reward_models.active_queries import select_queries
from polyreward.reward_models.bias_fitting import BiasFittingTrainer, PosthocDebiaser, decorrelation_loss, fitting_loss
from polyreward.reward_models.bias_penalty import BiasPenalty, with_attribute
from polyreward.reward_models.classifier import SequenceClassifier
from polyreward.reward_models.context_routing import EmptyContextWarning, HedgeRouterTrainer, hedge_targets
from polyreward.reward_models.contract import ModelReward, RewardModel, as_reward
from polyreward.reward_models.contrastive import (
    Contrastive,
    ContrastiveRegularizer,
    DropoutViewsHead,
    info_nce,
    simcse_loss,
    sinkhorn,
    swav_loss,
)
from polyreward.reward_models.digit_ratings import DigitLogits, RatingLogits
from polyreward.reward_models.distributional_preferences import CategoricalPreference, MeanVariance
from polyreward.reward_models.encoders import Encoder, Features, FeatureTable, HashingEncoder
from polyreward.reward_models.ensembles import MemberFailureWarning, RewardEnsemble, aggregate_rewards
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.fine_tuning import FineTunedEncoder
from polyreward.reward_models.fit_options import FitOptions, FitProgress
from polyreward.reward_models.heads import Head, Items, LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.integer_ratings import IntegerRatings
from polyreward.reward_models.kl_annealing import CyclicalAnnealer
from polyreward.reward_models.latent_rewards import LatentReward, PairwiseLatentPreference
from polyreward.reward_models.latent_scaling import RewardScaler
from polyreward.reward_models.latent_training import fit_sets
from polyreward.reward_models.latent_user_head import LatentUserHead, infer_annotators
from polyreward.reward_models.latent_users import VariationalPreferences, VPLLoss
from polyreward.reward_models.length_bias import (
    BiasFitter,
    LengthEncoding,
    confound_split_accuracy,
    correlation_ratio,
    identity_fitter,
    pearson,
)
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
from polyreward.reward_models.margin_loss import BTLoss
from polyreward.reward_models.meta_learning import MetaRMStep, continue_with_shift, difference_score
from polyreward.reward_models.mixture_models import MixtureHead, MixtureLikelihood
from polyreward.reward_models.mixtures import (
    ContextRouter,
    MixtureBTLoss,
    MultiHeadReward,
    bt_mixture_floor,
    mixture_preference,
    mixture_score,
    router_report,
)
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning
from polyreward.reward_models.ordinal import (
    OrdinalDistribution,
    OrdinalRewardHead,
    digit_logits,
    ordinal_preference_loss,
)
from polyreward.reward_models.ordinal_likelihood import (
    OrdinalHead,
    OrdinalLikelihood,
    ordinal_distribution,
    without_contradictions,
)
from polyreward.reward_models.over_optimisation import (
    EnsembleSplit,
    hack_feature_shift,
    overoptimization_curve,
    underspecification_report,
)
from polyreward.reward_models.parts import compose, load_reward_model
from polyreward.reward_models.preference_sets import PreferenceSetEncoder
from polyreward.reward_models.quality_levels import QualityPartition, region_mask
from polyreward.reward_models.routed_models import route_to_context
from polyreward.reward_models.strength_voting import OverfittedVotersWarning, StrengthVoting
from polyreward.reward_models.text_encoders import FrozenEncoder, SentenceEncoder

__all__ = [
    "BTLoss",
    "BiasFitter",
    "BiasFittingTrainer",
    "BiasPenalty",
    "BradleyTerry",
    "CachedEncoder",
    "CategoricalPreference",
    "CenteredBTLoss",
    "ContextRouter",
    "Contrastive",
    "ContrastiveRegularizer",
    "CyclicalAnnealer",
    "DigitLogits",
    "DropoutViewsHead",
    "EmptyContextWarning",
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
    "HedgeRouterTrainer",
    "IntegerRatings",
    "Items",
    "LatentReward",
    "LatentUserHead",
    "LengthEncoding",
    "Likelihood",
    "LinearHead",
    "MeanVariance",
    "MemberFailureWarning",
    "MetaRMStep",
    "MixtureBTLoss",
    "MixtureHead",
    "MixtureLikelihood",
    "ModelReward",
    "MultiHeadReward",
    "OrdinalDistribution",
    "OrdinalHead",
    "OrdinalLikelihood",
    "OrdinalRewardHead",
    "OverfittedVotersWarning",
    "PairwiseLatentPreference",
    "PlackettLuce",
    "PosthocDebiaser",
    "PreferenceModel",
    "PreferenceSetEncoder",
    "QualityPartition",
    "RatingLogits",
    "Regression",
    "RewardEnsemble",
    "RewardModel",
    "RewardScaler",
    "Scores",
    "SentenceEncoder",
    "SequenceClassifier",
    "StrengthVoting",
    "TwoLayerHead",
    "UnknownAnnotatorWarning",
    "VPLLoss",
    "VariationalPreferences",
    "aggregate_rewards",
    "as_reward",
    "bradley_terry_loss",
    "bt_mixture_floor",
    "centering_penalty",
    "compose",
    "confound_split_accuracy",
    "continue_with_shift",
    "correlation_ratio",
    "decorrelation_loss",
    "difference_score",
    "digit_logits",
    "fit_sets",
    "fitting_loss",
    "hack_feature_shift",
    "hedge_targets",
    "identity_fitter",
    "infer_annotators",
    "info_nce",
    "load_reward_model",
    "mixture_preference",
    "mixture_score",
    "ordinal_distribution",
    "ordinal_preference_loss",
    "overoptimization_curve",
    "pearson",
    "plackett_luce_loss",
    "region_mask",
    "route_to_context",
    "router_report",
    "select_best_loss",
    "select_queries",
    "simcse_loss",
    "sinkhorn",
    "swav_loss",
    "tied_bradley_terry_loss",
    "underspecification_report",
    "with_attribute",
    "without_contradictions",
]
