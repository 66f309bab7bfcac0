"""Reward models: what a sample is worth, learned from people.

A reward model is an encoder, a head and a likelihood; `PreferenceModel` fits it, scores with it, saves and loads it,
and `RewardEnsemble` makes one of several.
"""

from polyreward.reward_models.active_queries import select_queries
from polyreward.reward_models.base_reward import (
    HybridReward,
    ScalarRewardModel,
    ZeroPenalty,
    base_reward,
    combine_rewards,
    grouped_accuracy,
    length_normalize,
    mixture_ablation,
    pair_accuracy,
    pairwise_loss,
)
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
from polyreward.reward_models.dual_objective import DecidedPairs, dual_objective_loss
from polyreward.reward_models.encoders import Encoder, Features, FeatureTable, HashingEncoder
from polyreward.reward_models.ensembles import MemberFailureWarning, RewardEnsemble, aggregate_rewards
from polyreward.reward_models.evaluation_chains import (
    ChatJudge,
    Criterion,
    EvaluationChain,
    FormatError,
    GenerativeJudge,
    parse_chain,
)
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.fine_tuning import FineTunedEncoder
from polyreward.reward_models.fit_options import FitOptions, FitProgress
from polyreward.reward_models.heads import Head, Items, LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.ideal_point_heads import IdealPointHead, fit_new_users
from polyreward.reward_models.ideal_points import IdealPointReward
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
from polyreward.reward_models.modality import ModalityRouter
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning
from polyreward.reward_models.multi_response import MultiResponseRewardModel, flops_ratio, order_consistency
from polyreward.reward_models.multi_response_batch import MultiResponseCollator
from polyreward.reward_models.multimodal_encoders import FineTunedMultimodalEncoder, MultimodalEncoder
from polyreward.reward_models.one_pass import BestOfList, one_pass_model, score_group
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
from polyreward.reward_models.pair_losses import PairLoss, pair_loss, token_weighted_loss, user_balanced_weights
from polyreward.reward_models.parts import compose, load_reward_model
from polyreward.reward_models.personal_judge import PersonalJudge
from polyreward.reward_models.preference_sets import PreferenceSetEncoder
from polyreward.reward_models.quality_levels import QualityPartition, region_mask
from polyreward.reward_models.query_token import QueryTokenRewardModel
from polyreward.reward_models.rationale_dropout import RationaleDropout
from polyreward.reward_models.reward_head import RewardHead
from polyreward.reward_models.routed_models import route_to_context
from polyreward.reward_models.rubric_chains import RubricChainReward
from polyreward.reward_models.strength_voting import OverfittedVotersWarning, StrengthVoting
from polyreward.reward_models.text_encoders import FrozenEncoder, SentenceEncoder
from polyreward.reward_models.think_then_score import ThinkThenScore
from polyreward.reward_models.thoughts import TextCodec, with_thoughts
from polyreward.reward_models.user_mixtures import UserMixture
from polyreward.reward_models.user_prototypes import UserPrototypes
from polyreward.reward_models.user_scaling import UserScaler

__all__ = [
    "BTLoss",
    "BestOfList",
    "BiasFitter",
    "BiasFittingTrainer",
    "BiasPenalty",
    "BradleyTerry",
    "CachedEncoder",
    "CategoricalPreference",
    "CenteredBTLoss",
    "ChatJudge",
    "ContextRouter",
    "Contrastive",
    "ContrastiveRegularizer",
    "Criterion",
    "CyclicalAnnealer",
    "DecidedPairs",
    "DigitLogits",
    "DropoutViewsHead",
    "EmptyContextWarning",
    "Encoder",
    "EnsembleSplit",
    "EvaluationChain",
    "FeatureTable",
    "Features",
    "FineTunedEncoder",
    "FineTunedMultimodalEncoder",
    "FitOptions",
    "FitProgress",
    "FormatError",
    "FrozenEncoder",
    "GenerativeJudge",
    "HashingEncoder",
    "Head",
    "HedgeRouterTrainer",
    "HybridReward",
    "IdealPointHead",
    "IdealPointReward",
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
    "ModalityRouter",
    "ModelReward",
    "MultiHeadReward",
    "MultiResponseCollator",
    "MultiResponseRewardModel",
    "MultimodalEncoder",
    "OrdinalDistribution",
    "OrdinalHead",
    "OrdinalLikelihood",
    "OrdinalRewardHead",
    "OverfittedVotersWarning",
    "PairLoss",
    "PairwiseLatentPreference",
    "PersonalJudge",
    "PlackettLuce",
    "PosthocDebiaser",
    "PreferenceModel",
    "PreferenceSetEncoder",
    "QualityPartition",
    "QueryTokenRewardModel",
    "RatingLogits",
    "RationaleDropout",
    "Regression",
    "RewardEnsemble",
    "RewardHead",
    "RewardModel",
    "RewardScaler",
    "RubricChainReward",
    "ScalarRewardModel",
    "Scores",
    "SentenceEncoder",
    "SequenceClassifier",
    "StrengthVoting",
    "TextCodec",
    "ThinkThenScore",
    "TwoLayerHead",
    "UnknownAnnotatorWarning",
    "UserMixture",
    "UserPrototypes",
    "UserScaler",
    "VPLLoss",
    "VariationalPreferences",
    "ZeroPenalty",
    "aggregate_rewards",
    "as_reward",
    "base_reward",
    "bradley_terry_loss",
    "bt_mixture_floor",
    "centering_penalty",
    "combine_rewards",
    "compose",
    "confound_split_accuracy",
    "continue_with_shift",
    "correlation_ratio",
    "decorrelation_loss",
    "difference_score",
    "digit_logits",
    "dual_objective_loss",
    "fit_new_users",
    "fit_sets",
    "fitting_loss",
    "flops_ratio",
    "grouped_accuracy",
    "hack_feature_shift",
    "hedge_targets",
    "identity_fitter",
    "infer_annotators",
    "info_nce",
    "length_normalize",
    "load_reward_model",
    "mixture_ablation",
    "mixture_preference",
    "mixture_score",
    "one_pass_model",
    "order_consistency",
    "ordinal_distribution",
    "ordinal_preference_loss",
    "overoptimization_curve",
    "pair_accuracy",
    "pair_loss",
    "pairwise_loss",
    "parse_chain",
    "pearson",
    "plackett_luce_loss",
    "region_mask",
    "route_to_context",
    "router_report",
    "score_group",
    "select_best_loss",
    "select_queries",
    "simcse_loss",
    "sinkhorn",
    "swav_loss",
    "tied_bradley_terry_loss",
    "token_weighted_loss",
    "underspecification_report",
    "user_balanced_weights",
    "with_attribute",
    "with_thoughts",
    "without_contradictions",
]
