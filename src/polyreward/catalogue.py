"""The list of methods: name, paper, kind, what it needs, where the part is and which study tests it.

The catalogue is the one place that maps names to import paths. Nothing here imports a component until
`Method.load_part` or `Method.load_study` is called.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyreward.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from polyreward.studies.base import Study


@dataclass(frozen=True)
class Method:
    """A method and where it is.

    Attributes
    ----------
    name : str
        Kebab-case name on the command line.
    title, arxiv : str
        The paper.
    kind : str
        "reward", "advantage", "objective", "curriculum", "reward model", ...
    summary : str
        One line.
    part : str
        ``module:name`` of the component.
    slug : str
        The result of the study is ``results/<slug>.json``.
    study : str or None
        Module in `polyreward.studies`, or None.
    needs : tuple of str
        Extras to install.
    """

    name: str
    title: str
    arxiv: str
    kind: str
    summary: str
    part: str
    slug: str
    study: str | None
    needs: tuple[str, ...] = ()

    def load_part(self) -> Any:
        """Import the component."""
        module, _, name = self.part.partition(":")
        return getattr(importlib.import_module(module), name)

    def load_study(self) -> Study:
        """Import the study."""
        if self.study is None:
            raise UnknownNameError(f"method {self.name!r} has no study")
        return importlib.import_module(f"polyreward.studies.{self.study}").STUDY


METHODS: tuple[Method, ...] = (
    Method(
        "grouprank",
        "GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning",
        "2511.11653",
        "reward",
        "Scores documents in small groups, paid by ranking utility, score distribution and format.",
        "polyreward.rewards.ranking:GroupRankReward",
        "01-grouprank",
        "grouprank",
    ),
    Method(
        "stratified-grpo",
        "Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents",
        "2510.06214",
        "advantage",
        "Compares a trajectory with those of the same structure, blended with the whole group.",
        "polyreward.advantages.presets:stratified_grpo",
        "02-stratified-grpo",
        "stratified_grpo",
    ),
    Method(
        "verifier-based",
        "Scaling Test-Time Compute Without Verification or RL is Suboptimal",
        "2502.12118",
        "objective",
        "Tilts a base policy towards what a learned verifier likes, inside a ball and only where there is evidence.",
        "polyreward.objectives.pessimistic_improvement:PessimisticImprove",
        "03-verifier-based",
        "verifier_based",
    ),
    Method(
        "tarot",
        "Test-driven and Capability-adaptive Curriculum Reinforcement Fine-tuning for Code Generation with LLMs",
        "2602.15449",
        "reward",
        "Unit tests in four tiers, whose weights and order follow what the model can do.",
        "polyreward.rewards.tiered_tests:TieredTestsReward",
        "05-tarot",
        "tarot",
    ),
    Method(
        "codeboost",
        "CodeBoost: Boosting Code LLMs by Squeezing Knowledge from Code Snippets with RL",
        "2508.05242",
        "reward",
        "Verifiable tasks from bare snippets: predict what code prints or raises, fill in what was masked.",
        "polyreward.rewards.execution_prediction:ExecutionReward",
        "07-codeboost",
        "codeboost",
    ),
    Method(
        "reward-ensembles",
        "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
        "2312.09244",
        "reward model",
        "Scores by several reward models as one: mean, median, min, or mean less deviation.",
        "polyreward.reward_models.ensembles:RewardEnsemble",
        "09-reward-ensembles",
        "reward_ensembles",
        ("tasks", "text"),
    ),
    Method(
        "micro",
        "MiCRo: Mixture Modeling and Context-aware Routing for Personalized Preference Learning",
        "2505.24846",
        "reward model",
        "Several reward heads and a router that says which of them a prompt calls for; few pairs tune it to a context.",
        "polyreward.reward_models.mixture_models:MixtureHead",
        "13-micro",
        "mixture_routing",
        ("tasks",),
    ),
    Method(
        "oprm",
        "Learning Ordinal Probabilistic Reward from Preferences",
        "2602.12660",
        "reward model",
        "A distribution over ratings for each response, learned from preferences and anchored by coarse levels.",
        "polyreward.reward_models.ordinal_likelihood:OrdinalLikelihood",
        "31-oprm",
        "ordinal_rewards",
        ("tasks",),
    ),
    Method(
        "fimi-rm",
        "Bias Fitting to Mitigate Length Bias of Reward Model in RLHF",
        "2505.12843",
        "reward model",
        "Fits the curve by which a reward follows length, and removes the correlation with it.",
        "polyreward.reward_models.bias_penalty:BiasPenalty",
        "62-fimi-rm",
        "bias_fitting",
        (),
    ),
    Method(
        "rewardmath",
        "Evaluating Robustness of Reward Models for Mathematical Reasoning",
        "2410.01729",
        "audit",
        "One correct solution against many wrong ones: strict accuracy, pessimistic MRR, best of n, validity.",
        "polyreward.audit.benchmarks:OneToManyBenchmark",
        "21-rewardmath",
        "one_against_many",
        (),
    ),
    Method(
        "personalized-rewardbench",
        "Personalized RewardBench: Evaluating Reward Models with Human Aligned Personalization",
        "2604.07343",
        "audit",
        "Pairs of equal quality that differ in what one user wants, and whether the ranking holds downstream.",
        "polyreward.audit.benchmarks:PointwiseEvaluator",
        "23-personalized-rewardbench",
        "personalized_benchmark",
        (),
    ),
    Method(
        "vpl",
        "Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning",
        "2408.10075",
        "reward model",
        "A reward for each person, inferred as a latent user from few comparisons; new people without training.",
        "polyreward.reward_models.latent_user_head:LatentUserHead",
        "33-vpl",
        "latent_users",
        ("tasks", "text"),
    ),
    Method(
        "pal",
        "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences",
        "2406.08469",
        "reward model",
        "People as mixtures of a few shared ideal points; a new person is told from a few comparisons.",
        "polyreward.reward_models.ideal_point_heads:IdealPointHead",
        "35-pal",
        "ideal_points",
        ("tasks",),
    ),
    Method(
        "yojo",
        "You Only Judge Once: Multi-response Reward Modeling in a Single Forward Pass",
        "2604.10966",
        "reward model",
        "Scores all responses to a prompt in one forward pass, each beside those before it.",
        "polyreward.reward_models.multi_response:MultiResponseRewardModel",
        "43-yojo",
        "one_pass_scoring",
        ("text",),
    ),
    Method(
        "basereward",
        "BaseReward: A Strong Baseline for Multimodal Reward Model",
        "2509.16127",
        "reward model",
        "A two-layer SiLU head and the pairwise loss on images and text; routing by modality, a rule beside the model.",
        "polyreward.reward_models.base_reward:base_reward",
        "50-basereward",
        "base_reward",
        ("text", "tasks"),
    ),
    Method(
        "descore",
        "Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling",
        "2605.05922",
        "reward model",
        "Writes a chain of thought, then reads the score from a query token; both learn together.",
        "polyreward.reward_models.think_then_score:ThinkThenScore",
        "37-descore",
        "think_then_score",
        ("tasks", "text"),
    ),
    Method(
        "p-genrm",
        "P-GenRM: Personalized Generative Reward Model with Test-time User-based Scaling",
        "2602.12116",
        "reward model",
        "A judge writes a rubric for each user; chains with the user's and similar users' choices are averaged.",
        "polyreward.reward_models.personal_judge:PersonalJudge",
        "19-p-genrm",
        "personal_judge",
        ("tasks", "endpoints"),
    ),
    Method(
        "secrets-rm",
        "Secrets of RLHF in Large Language Models Part II: Reward Modeling",
        "2401.06080",
        "reward model",
        "Preference labels corrected by a vote of reward models; margins, contrastive and meta-learning parts.",
        "polyreward.data.preference_strength:PreferenceCleaner",
        "14-secrets-rm",
        "preference_strength",
        ("tasks", "text"),
    ),
    Method(
        "topological-rlhf",
        "Reward Generalization in RLHF: A Topological Perspective",
        "2402.10184",
        "data",
        "Preference pairs from trees of responses, and how far comparisons carry by the induced Bayesian network.",
        "polyreward.data.bayesian_network:InducedBayesianNetwork",
        "10-topological-rlhf",
        "preference_topology",
        (),
    ),
    Method(
        "integer-distributions",
        "Predicting integers from continuous parameters",
        "2602.10751",
        "statistics",
        "Distributions over the integers that a network can predict: discrete Laplace and normal, bitwise, mixtures.",
        "polyreward.statistics:IntegerHead",
        "30-integer-distributions",
        "integer_distributions",
        ("tasks",),
    ),
    Method(
        "gui-g2",
        "GUI-G²: Gaussian Reward Modeling for GUI Grounding",
        "2507.15846",
        "reward",
        "Gaussian rewards of a box's offset and overlap, with a spread that follows the element.",
        "polyreward.rewards.gaussian_boxes:BoxReward",
        "12-gui-g2",
        "gui_grounding",
    ),
    Method(
        "dump",
        "DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training",
        "2504.09710",
        "curriculum",
        "Draws the next tasks where advantages are large, with an upper-confidence bonus.",
        "polyreward.curricula.bandit:AdvantageBandit",
        "25-dump",
        "dump",
    ),
    Method(
        "brain",
        "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
        "2402.02479",
        "objective",
        "Matches the policy to the reward's posterior by self-normalised weights, less a self-normalised baseline.",
        "polyreward.objectives.posterior:brain_loss",
        "27-brain",
        "brain",
    ),
    Method(
        "sweet-spot",
        "SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization",
        "2601.22491",
        "reward",
        "Tiered rewards that grow towards the best zone of a solution.",
        "polyreward.rewards.sweet_spot:SweetSpotReward",
        "36-sweet-spot",
        "sweet_spot",
    ),
    Method(
        "elastic-trust-region",
        "ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization",
        "2601.03723",
        "objective",
        "Clip bounds that widen or narrow with the advantage and with the group's signal.",
        "polyreward.objectives.presets:etr_objective",
        "38-etr",
        "elastic_trust_region",
    ),
    Method(
        "multirole-r1",
        "Diversity-Enhanced Reasoning for Subjective Questions",
        "2507.20187",
        "reward",
        "Accuracy judged by role, blended with eight metrics of text diversity.",
        "polyreward.rewards.roles:multirole_r1",
        "40-multirole-r1",
        "multirole",
    ),
    Method(
        "verpo",
        "VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation",
        "2601.03525",
        "reward",
        "Dense rewards from unit tests, weighted by difficulty over the density of tests as hard, with the outcome.",
        "polyreward.rewards.density_calibrated:VeRPOReward",
        "45-verpo",
        "verpo",
    ),
    Method(
        "likelihood-rewards",
        "Likelihood-Based Reward Designs for General LLM Reasoning",
        "2602.03979",
        "reward",
        "How likely the model makes the reference answer after its own reasoning; no verifier.",
        "polyreward.rewards.reference_likelihood:ReferenceLikelihood",
        "48-likelihood-rewards",
        "likelihood_rewards",
    ),
    Method(
        "ema-grpo",
        "OneThinker: All-in-one Reasoning Model for Image and Video",
        "2512.03043",
        "advantage",
        "Scales advantages by a moving deviation of each task.",
        "polyreward.advantages.presets:ema_grpo",
        "51-ema-grpo",
        "ema_grpo",
    ),
    Method(
        "hybrid-multi-aspect",
        "Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment",
        "2510.05283",
        "reward",
        "A rule where answers can be checked, a model elsewhere, plus format and a length penalty of the group.",
        "polyreward.rewards.harmo:harmo",
        "52-hybrid",
        "hybrid",
        ("tasks",),
    ),
    Method(
        "toolrl",
        "ToolRL: Reward is All Tool Learning Needs",
        "2504.13958",
        "reward",
        "Graded correctness of tool calls: names, parameter names and values, and format.",
        "polyreward.rewards.tool_calls:ToolCallReward",
        "53-toolrl",
        "tool_rewards",
    ),
    Method(
        "gaussian-grpo",
        "OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks",
        "2604.08539",
        "advantage",
        "Maps the ranks of each task's rewards onto a standard normal distribution.",
        "polyreward.advantages.presets:gaussian_grpo",
        "55-gaussian-grpo",
        "gaussian_grpo",
    ),
)


def find(name: str) -> Method:
    """Return the method called `name`.

    Raises
    ------
    UnknownNameError
        No method has that name; the message offers the nearest one.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UnknownNameError(f"unknown method {name!r}{nearest(name, (method.name for method in METHODS))}")


def search(query: str = "") -> list[Method]:
    """Methods in whose name, title, kind, summary or arXiv id every word of `query` occurs."""
    words = query.lower().split()
    return [
        method
        for method in METHODS
        if all(
            word in f"{method.name} {method.title} {method.kind} {method.summary} {method.arxiv}".lower()
            for word in words
        )
    ]
