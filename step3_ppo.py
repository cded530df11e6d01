"""
Step 3: reinforcement learning from human feedback with PPO. The actor answers prompts; the reward
model scores the answers; the actor moves towards what scores well, and a KL penalty keeps it near
the model it came from.

    maximise E [ r(x, y) - beta KL(pi || pi_ref) ]  (+ c E log pi(text))
                                                                   Ouyang et al. 2022, eq. 2

    reward of token t   R_t = -beta (log pi_old(y_t) - log pi_ref(y_t))
                              + [t is the last] (r(x, y) - [y has no EOS] missing_eos_penalty)
    advantage           A_t = sum_k (gamma lam)^k delta_{t+k}      Schulman et al. 2016, eq. 16
                        delta_t = R_t + gamma V_{t+1} - V_t
    actor loss          - min( rho_t W_t, clip(rho_t, 1 - eps, 1 + eps) W_t )
                        rho_t = pi(y_t) / pi_old(y_t)              Schulman et al. 2017, eq. 7
                        W_t = A_t whitened over the rollout's tokens
    critic loss         1/2 max( (V_t - G_t)^2, (clip(V_t, V_old,t +- eps_v) - G_t)^2 )
                        G_t = A_t + V_old,t

--advantage rloo, grpo and reinforce put other estimates in A_t's place and go without a critic.
--reward_fn takes r(x, y) from Python functions or several models. --unsupervised_data_path adds the
text term, "ptx".

Every sum runs over the response's tokens, its EOS included (so the model learns when to stop) and
nothing after it. Which tokens those are is settled once, by Rollout.mask: up to the first EOS, or
the length limit. PAD's id is never looked at.

    # on `tiny`'s output/sft and output/reward: half a CPU minute
    python step3_ppo.py --actor_learning_rate 3e-4 --critic_learning_rate 3e-4 \\
        --max_answer_seq_len 40 --max_steps 30
    python step3_ppo.py --advantage rloo --num_generations 4 --reward_fn my_rewards.py:polite
    # one GPU, eight
    deepspeed step3_ppo.py --data_path Dahoas/rm-static
    deepspeed --num_gpus 8 step3_ppo.py --deepspeed_config configs/1node.json \\
        --data_path Dahoas/rm-static

Reads   prompts of --data_path; the SFT model (actor and reference); the reward model (also the
        critic's first weights)
Writes  output/actor and output/critic, Hugging Face folders; output/actor_ema with --enable_ema;
        metrics.jsonl; its numbers in output/summary.json

Unlike DeepSpeed-Chat's step 3: rollouts are sampled, not greedy; EOS is trained; dropout is off, so
the first ratio is 1 but for rounding; advantages are whitened over all ranks; losses are normalised
by the global token count; reward model and critic speak in the reward model's own standard
deviations from its own mean, in which --reward_clip and --cliprange_value are too.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from data import decode_answers, load_stage_data, load_tokenizer, training_steps
from hybrid_engine import (ExponentialMovingAverage, InferenceEngine, frozen_model, train_engine,
                           train_step)
from support.checkpoints import Checkpoints
from support.doctor import RunDoctor
from support.dry_run import dry_run
from support.flags import RunConfig, UsageError, flag
from support.lora import WithoutAdapters
from support.log import MetricsLog, monitors
from support.metrics import Answer, Sums, has_ended
from support.models import last_token, load_language_model, load_reward_model, save_model
from support.preflight import preflight
from support.processes import all_sum, raise_on_all_ranks, print0, run_stage, setup, to_device
from support.reward_functions import load_reward_function
from support.terminal import watched

EMA_DECAY = 0.992  # Ouyang et al. 2022, appendix C


@dataclass
class Config(RunConfig):
    # models and rewards
    actor_model_name_or_path: str = flag("", "the SFT model: start of actor and reference; default "
                                             "OUTPUT_DIR/sft")
    critic_model_name_or_path: str = flag("", "the reward model, start of the critic; default "
                                              "OUTPUT_DIR/reward")
    reward_fn: list[str] = flag([], "functions (file.py:name) and folders of reward models, "
                                      "summed; default: the reward model")
    reward_weights: list[float] = flag([], "of --reward_fn's scores in their sum; default 1 each")
    reward_clip: float = flag(5.0, "bound of normalised scores, before the KL is added", at_least=0,
                              at_most=math.inf)
    missing_eos_penalty: float = flag(0.0, "taken off the score of an unended answer", at_least=0)
    kl_coef: float = flag(0.05, "beta, reward units per nat", at_least=0)
    kl_target: float = flag(0.0, "nats per response to steer to by kl_coef; 0: fixed", at_least=0)
    # rollouts
    per_device_generation_batch_size: int = flag(16, "prompts of a rollout per device", at_least=1)
    num_generations: int = flag(1, "answers to a prompt; rloo and grpo need 2 or more", at_least=1)
    temperature: float = flag(1.0, "of sampling, and of all log-probabilities")
    top_p: float = flag(1.0, "nucleus sampling; below 1 answers come from the truncated "
                             "distribution, while PPO's ratio uses the full one", over=0, at_most=1)
    inference_tp_size: int = flag(1, "processes that share one copy of the weights to generate",
                                  at_least=1)
    # updates
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = flag(
        "gae", "estimator; all but gae go without a critic")
    gamma: float = flag(1.0, "discount", at_least=0, at_most=1)
    lam: float = flag(0.95, "GAE's lambda", at_least=0, at_most=1)
    cliprange: float = flag(0.2, "eps of the actor's clip", at_least=0, at_most=math.inf)
    cliprange_value: float = flag(0.2, "eps_v of the critic's clip", at_least=0, at_most=math.inf)
    ppo_epochs: int = flag(1, "passes over a rollout before the next", at_least=1)
    actor_learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top", at_least=0)
    critic_learning_rate: float = flag(5e-6, "AdamW's, at the schedule's top", at_least=0)
    unsupervised_data_path: list[str] = flag([], "plain text to stay good at: the ptx term")
    unsup_coef: float = flag(27.8, "weight of the ptx term's loss, nats per token", at_least=0)
    enable_ema: bool = flag(False, f"also save an average of the actor's weights ({EMA_DECAY})")
    # the run
    skip_preflight: bool = flag(False, "no checks of models, data, sampler before the first update")

    @property
    def rollout_rows(self):
        """Answers in one rollout on each device."""
        return self.per_device_generation_batch_size * self.num_generations

    @property
    def minibatch_rows(self):
        """Answers in one optimizer step on each device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self):
        """Optimizer steps that one rollout is used for."""
        return self.ppo_epochs * (self.rollout_rows // self.minibatch_rows)

    def check(self):
        super().check()
        for name in self.reward_fn:
            load_reward_function(name)  # raises where there is none
            if self.reward_fn.count(name) > 1:
                raise UsageError(f"--reward_fn {name} is given twice; give it once, with its part "
                                 "in --reward_weights.")
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: rollouts are sampled, so it must "
                             "be over 0 (PPO learns nothing from greedy answers).")
        # Answers are compared within their group, and every one is used in a whole optimizer step.
        if self.advantage in ("rloo", "grpo") and self.num_generations < 2:
            raise UsageError(
                f"--advantage {self.advantage} compares the answers to one prompt with each other, "
                f"and --num_generations is {self.num_generations}: 2 or more are needed, 4 are "
                "usual.")
        if self.rollout_rows % self.minibatch_rows:
            raise UsageError(
                f"--per_device_generation_batch_size {self.per_device_generation_batch_size} x "
                f"--num_generations {self.num_generations} must be a multiple of "
                f"--per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: a rollout is "
                "used up by whole optimizer steps.")
        # Numbers that only make sense together.
        if self.kl_target > 0 and self.kl_coef == 0:
            raise UsageError("--kl_target steers by multiplying --kl_coef, and 0 stays 0: give it "
                             "a start over 0.")
        scorers = max(len(self.reward_fn), 1)
        weights = len(self.reward_weights)
        if weights and weights != scorers:
            raise UsageError(f"--reward_weights has {weights} entries for {scorers} rewards; one "
                             "number a reward is needed.")
        if weights and not any(self.reward_weights):
            raise UsageError("--reward_weights are all 0, so that no answer is better than another;"
                             " one at least must be another number.")


# -----------------------------------------------------------------------------
# the maths: rewards

def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """
    One reward a token: the KL penalty everywhere, the score on the last response token.

    scores                   (B,) float32, one a response
    logprobs, ref_logprobs   (B, R) float32, nats, under the sampling policy and the reference
    mask                     (B, R) 1.0 on response tokens up to and including EOS, 0.0 after
    returns                  (B, R), zero where mask is zero
    """
    # Schulman's k1: its mean is the KL, while a single token's value may be negative.
    kl_per_token = logprobs - ref_logprobs
    rewards = -kl_coef * kl_per_token * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def adapt_kl_coef(kl_coef, kl, target, responses, horizon=10_000):
    """
    Proportional controller of the KL penalty (Ziegler et al. 2019, section 2.2). The error is
    clipped to +-0.2, time is counted in responses; kl and target in nats per response.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * responses / horizon)


# -----------------------------------------------------------------------------
# the maths: advantages

@torch.no_grad()
def gae(rewards, values, mask, gamma, lam):
    """
    Generalised advantage estimation (Schulman et al. 2016, eq. 16) over response tokens.

    rewards, values  (B, R) float32, right-padded; values are the critic's before this update
    mask             (B, R) 1.0 on response tokens up to and including EOS, 0.0 after
    returns          advantages, value targets: both (B, R), zero where mask is zero; detached
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])  # nothing follows the last token
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = mask[:, t] * (delta + gamma * lam * next_advantage)
        advantages[:, t] = next_advantage
        next_value = mask[:, t] * values[:, t]
    return advantages, mask * (advantages + values)


def reinforce(rewards, mask, gamma):
    """
    Advantages of REINFORCE++ before whitening: the discounted sum of a token's reward and all that
    follow, (B, R) like gae's arguments (Hu 2025, arXiv 2501.03262). It is gae with a critic that
    says 0 and lambda 1.
    """
    no_values = torch.zeros_like(rewards)
    advantages, _ = gae(rewards, no_values, mask, gamma, 1.0)
    return advantages


def rloo(rewards, n):
    """
    REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, section 2.2): what a response
    earned, its KL penalty included, minus the mean of what the n - 1 others to the same prompt
    earned.

    rewards  (B, R), rows of one prompt together, n each -> advantages (B, 1), one for all tokens
    """
    earned = rewards.sum(1).view(-1, n)
    others = (earned.sum(1, keepdim=True) - earned) / (n - 1)
    return (earned - others).view(-1, 1)


def grpo(scores, n):
    """
    Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): a score's
    distance from the mean of the n responses to its prompt, in their standard deviations. The KL is
    no part of it: see kl_loss_k3.

    scores  (B,), rows of one prompt together, n each -> advantages (B, 1); 0 where all n are equal
    """
    group = scores.view(-1, n)
    distance = group - group.mean(1, keepdim=True)
    return (distance / (group.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def whiten(values, mask):
    """
    values (B, R) float32 -> mean 0 and variance 1 over the mask's tokens of all ranks, zero
    elsewhere. Sums are float64. Collective.
    """
    exact = values.double()
    total, squares, count = all_sum((exact * mask).sum(), (exact.square() * mask).sum(), mask.sum())
    mean = total / count
    variance = max(squares / count - mean**2, 0)
    return (values - mean) * mask / (variance + 1e-8) ** 0.5


# -----------------------------------------------------------------------------
# the maths: losses, as sums over tokens. Callers divide by the tokens of the whole batch over all
# micro-batches and ranks, so that neither changes the loss.

def ppo_actor_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """
    PPO's clipped loss (Schulman et al. 2017, eq. 7) and its statistics. All arguments (B, R) but
    cliprange; what they hold where mask is zero does not matter.

    returns  loss; number of tokens whose gradient is zero because of the clip; sum of
             (log ratio)^2 / 2, which is Schulman's k2 of the KL to the old policy
             (http://joschu.net/blog/kl-approx.html)
    """
    inside = mask > 0
    log_ratio = torch.where(inside, logprobs.float() - old_logprobs, 0.0)
    log_ratio = log_ratio.clamp(-20, 20)  # one broken token must not make the step infinite
    advantages = torch.where(inside, advantages, 0.0)  # padding may hold anything, NaN too
    ratio = log_ratio.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(free, clipped).sum()
    with torch.no_grad():
        clipped_tokens = (clipped > free).float().sum()
        approx_kl = 0.5 * log_ratio.square().sum()
    return loss, clipped_tokens, approx_kl


def critic_loss(values, old_values, returns, mask, cliprange_value):
    """
    Half the larger squared error, with or without the clip around the old values. All (B, R) but
    cliprange_value -> loss, clipped tokens.
    """
    # clamp, because it leaves values inside the range exactly as they are
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    error = (values - returns).square()
    clipped_error = (clipped_values - returns).square()
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum()
    return loss, ((clipped_error > error) * mask).sum()


def kl_loss_k3(logprobs, ref_logprobs, mask):
    """
    GRPO's loss term (Shao et al. 2024, eq. 4), not PPO's penalty: summed KL(pi || pi_ref) in nats
    by Schulman's k3, exp(d) - d - 1 with d = log pi_ref - log pi, which is never negative. d is
    bounded like PPO's log-ratio.
    """
    d = ((ref_logprobs - logprobs) * mask).clamp(-20, 20)
    return (d.exp() - d - 1).sum()


# -----------------------------------------------------------------------------
# the RLHF API: the models, and the two halves of a PPO step

class DeepSpeedRLHFEngine:
    """
    The models of RLHF on DeepSpeed.

    actor, critic  are trained; critic is None unless the advantages are gae's
    ref            the actor's start, only read. With --only_optimize_lora it is the actor with its
                   adapters off, for no memory
    scorers        by name: reward models, only read, and Python functions; one model unless
                   --reward_fn says otherwise
    reward_model   the first reward model among them, or None
    generator      samples from the actor's own weights

    num_total_iters   rollouts of the whole run, for the learning-rate schedules
    args              a Config
    """

    def __init__(self, actor_model_name_or_path, critic_model_name_or_path, tokenizer,
                 num_total_iters, args):
        ds_config = setup(args)
        longest = args.max_prompt_seq_len + args.max_answer_seq_len
        if args.unsupervised_data_path:
            longest = max(longest, args.max_seq_len)  # tokens of a chunk of text
        total_updates = num_total_iters * args.updates_per_rollout
        self.tokenizer = tokenizer
        self.args = args

        def load_policy(lora_config=None):
            return load_language_model(actor_model_name_or_path, tokenizer, ds_config, longest,
                                       lora_config)

        def load_scorer(name, **options):
            check_vocabulary(name, tokenizer)
            return load_reward_model(name, tokenizer, ds_config, longest, normalise=True, **options)

        # The actor, and the reference where it needs weights of its own.
        actor = load_policy(lora_config=args)
        adapters_only = args.lora_dim and args.only_optimize_lora
        if not adapters_only:
            self.ref = frozen_model(load_policy(), ds_config)

        # What scores the answers. A scorer is logged under its short name where that is free.
        self.scorers = {}
        self.reward_model = None
        for name in args.reward_fn or [critic_model_name_or_path]:
            scorer = load_reward_function(name)
            short_name = name.rpartition(":")[2] if scorer else Path(name).name
            if scorer is None:
                reward_model = load_scorer(name)
                warn_unless_normalised(name, reward_model, args.reward_clip)
                scorer = frozen_model(reward_model, ds_config)
                self.reward_model = self.reward_model or scorer
            self.scorers[name if short_name in self.scorers else short_name] = scorer

        # DeepSpeed takes the actor over, with its optimizer, when the others are on the device.
        self.actor = train_engine(actor, ds_config, args, args.actor_learning_rate, total_updates)
        if adapters_only:
            self.ref = WithoutAdapters(self.actor)

        # The critic starts from the reward model. With --reward_fn there may be none, and then the
        # critic starts from the actor's model, with a new head.
        self.critic = None
        if args.advantage == "gae":
            start = critic_model_name_or_path
            if not start:
                start = actor_model_name_or_path
                print0(f"there is no {args.output_dir}/reward: the critic starts from {start}, "
                       "with a new head")
            critic = load_scorer(start, allow_new_head=bool(args.reward_fn), lora_config=args)
            self.critic = train_engine(
                critic, ds_config, args, args.critic_learning_rate, total_updates)

        self.ema = ExponentialMovingAverage(self.actor, EMA_DECAY) if args.enable_ema else None

        # What generates, from the actor's weights where they are trained.
        hf_actor = self.actor.module.model
        self.generator = InferenceEngine(hf_actor, args.inference_tp_size,
                                         vocabulary=self.actor.module.vocabulary)
        ends = hf_actor.generation_config.eos_token_id
        self.eos_token_ids = ends if isinstance(ends, list) else [ends]


def check_vocabulary(name, tokenizer):
    """Raises UsageError for a reward model that cannot read the actor's token ids."""
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"{name}: its tokenizer has another vocabulary than the actor's, so it cannot read the "
            "actor's answers. Train it from the same SFT model, or from one of the same family.")


def warn_unless_normalised(name, model, reward_clip):
    if not hasattr(model.config, "score_std"):
        print0(f"warning: {name} has no score_mean and score_std in its config.json, which "
               "step2_reward.py writes: its scores are taken as they are, and clipped to "
               f"+-{reward_clip:g}.")


@dataclass
class Experience:
    """
    What one rollout taught, float32 unless noted; B responses (prompts x num_generations, those of
    a prompt together), P prompt columns, R response columns. Nothing here carries a gradient.
    """
    tokens: torch.Tensor          # (B, P + R) int64: prompts left-padded, responses right-padded
    attention_mask: torch.Tensor  # (B, P + R) int64: 1 on what is real
    mask: torch.Tensor            # (B, R) 1 on response tokens up to and including EOS
    logprobs: torch.Tensor        # (B, R) nats, of the policy that sampled
    ref_logprobs: torch.Tensor    # (B, R) nats
    values: torch.Tensor | None   # (B, R) the critic's V of the state before each token
    scores: torch.Tensor          # (B,)   the rewards' weighted sum
    rewards: torch.Tensor         # (B, R) of each token: shape_rewards
    advantages: torch.Tensor      # (B, R) gae's and reinforce's are whitened over all ranks
    returns: torch.Tensor | None  # (B, R) value targets, from the advantages before whitening

    def take(self, rows):
        """
        -> Experience of the rows (a tensor of numbers), for a forward: flush right, so that it is
        as wide as its longest row and not as its longest prompt and its longest answer together.
        """
        lengths = self.mask[rows].sum(1).long()
        T = int(self.attention_mask[rows].sum(1).max())
        R = int(lengths.max())
        taken = {}
        for name, value in vars(self).items():
            if value is not None:
                value = value[rows]
                if value.ndim == 2:
                    width = T if name in ("tokens", "attention_mask") else R
                    value = moved_right(value, self.mask.size(1) - lengths)[:, -width:]
            taken[name] = value
        return Experience(**taken)


def by_length(attention_mask, size):
    """(B, T) -> row numbers in micro-batches of `size` rows of similar length, the longest last."""
    return attention_mask.sum(1).argsort(stable=True).split(size)


def moved_right(rows, columns):
    """(B, T), each row moved by so many columns (B,); what falls out comes in on the other side."""
    T = rows.size(1)
    sources = torch.arange(T, device=rows.device) - columns[:, None]
    return rows.gather(1, sources % T)


class DeepSpeedPPOTrainer:
    """
    One PPO step is `generate_experience`, which samples and scores, then `train_rlhf`, which
    updates. They are called in turn.

    models   the DeepSpeedRLHFEngine
    metrics  numbers of the last step, over all ranks but for the times: generate_experience begins
             them anew, train_rlhf reads the KL in them and adds its own
    """

    def __init__(self, engine, args):
        self.models = engine
        self.args = args
        self.kl_coef = args.kl_coef
        self.iterations = 0
        self.metrics = {}
        # In float32 the sampler's log-probabilities are the training forward's but for rounding
        # (response/logprob_drift), which saves a forward of the actor. In bf16 the two differ so
        # much that the first ratio would not be 1, and with top_p they are of two distributions.
        dtype = next(engine.actor.parameters()).dtype
        self.sampler_is_exact = dtype == torch.float32 and args.top_p == 1

    # -------------------------------------------------------------------------
    # first half: answers, and what they earned

    @torch.no_grad()
    def generate_experience(self, prompt_batch):
        """
        One rollout -> Experience.

        prompt_batch  input_ids and attention_mask (B, P) int64, left-padded; records, a list of B
                      Preference, where a scorer is a Python function
        """
        args = self.args
        n = args.num_generations
        began = time.time()
        self.iterations += 1

        # 1. The actor answers every prompt n times.
        rollout, attention_mask = self.respond(prompt_batch, n, call=self.iterations)
        tokens = rollout.tokens
        mask = rollout.mask
        generated = time.time()

        # 2. The scorers mark every answer.
        records = [record for record in prompt_batch.get("records", []) for _ in range(n)]
        scores_by_name, scores = self.score(rollout, attention_mask, records)
        ended = has_ended(rollout, self.models.eos_token_ids).float()
        penalised = scores - args.missing_eos_penalty * (1 - ended)

        # 3. Actor and reference say how likely each token was, the critic what it expects.
        logprobs, ref_logprobs = self.actor_and_ref_logprobs(rollout, attention_mask)
        values = self.critic_values(tokens, attention_mask, mask) if self.models.critic else None

        # 4. Every token gets a reward, and from the rewards an advantage.
        rewards = self.rewards(penalised, logprobs, ref_logprobs, mask)
        advantages, returns = self.advantages_and_targets(rewards, values, penalised, mask)

        # 5. Numbers for the log.
        sums = Sums()
        sums.add(rows=len(tokens), tokens=mask.sum(), kl=(logprobs - ref_logprobs).sum(),
                 scores=scores.sum(), penalised=penalised.sum(), ended=ended.sum())
        sums.add(**{f"scores/{name}": score.sum() for name, score in scores_by_name.items()})
        if args.top_p == 1 and not self.sampler_is_exact:
            sums.add(drift=((logprobs - rollout.logprobs).abs() * mask).sum())
        self.metrics = self.rollout_metrics(sums.over_ranks(), scores_by_name)
        self.metrics["time/generate"] = generated - began
        self.metrics["time/score"] = time.time() - generated
        return Experience(tokens, attention_mask, mask, logprobs, ref_logprobs, values, scores,
                          rewards, advantages, returns)

    def respond(self, prompt_batch, n, call):
        """
        n sampled answers to each prompt -> Rollout, its attention_mask (B, P + R).

        call  number of this call, from which the seed of its noise is made: 1, 2, ... in training,
              -1, -2, ... in evaluation
        """
        args = self.args
        batch = to_device(prompt_batch)
        with raise_on_all_ranks():
            rollout = self.models.generator.generate(
                batch["input_ids"], batch["attention_mask"],
                max_new_tokens=args.max_answer_seq_len, temperature=args.temperature,
                top_p=args.top_p, eos_token_id=self.models.eos_token_ids,
                pad_token_id=self.models.tokenizer.pad_token_id, num_return_sequences=n,
                # every rank and every call has noise of its own
                seed=args.seed + 1_000_003 * call + dist.get_rank())
        prompt_mask = batch["attention_mask"].repeat_interleave(n, 0)
        return rollout, torch.cat([prompt_mask, rollout.mask.long()], dim=1)

    def score(self, rollout, attention_mask, records):
        """
        -> {name: (B,) float32} of each scorer, and their weighted sum (B,). A reward model's
        scores, which support.models.RewardModel gives in its own standard deviations, are clipped;
        a function's are taken as they are.

        raises UsageError on all ranks for a score that is no finite number
        """
        args = self.args
        scores_by_name = {}
        for name, scorer in self.models.scorers.items():
            if isinstance(scorer, torch.nn.Module):
                score = self.reward_model_scores(scorer, rollout, attention_mask)
                scores_by_name[name] = score.clamp(-args.reward_clip, args.reward_clip)
            elif records:
                answers = decode_answers(self.models.tokenizer, rollout)
                scores_by_name[name] = scorer(records, answers).to(rollout.mask.device)
            else:
                raise UsageError(f"--reward_fn {name} scores text, and the batch has no `records` "
                                 "to take the prompts from; data.Collator(3, ...) makes batches "
                                 "that have them.")

        not_finite = all_sum(*((~score.isfinite()).sum() for score in scores_by_name.values()))
        for name, count in zip(scores_by_name, not_finite):
            if count:
                raise UsageError(f"the reward {name} gave {count:.0f} scores that are no finite "
                                 "numbers (NaN or infinite); PPO cannot learn from them.")
        weights = args.reward_weights or [1.0] * len(scores_by_name)
        weighted = [weight * score for weight, score in zip(weights, scores_by_name.values())]
        return scores_by_name, sum(weighted)

    def reward_model_scores(self, model, rollout, attention_mask):
        """(B,): what a reward model says at the last token of each answer."""
        def forward(tokens, attention_mask, _):
            return [last_token(model(tokens, attention_mask), attention_mask)]

        [scores] = self.in_micro_batches(forward, rollout.tokens, attention_mask, rollout.mask)
        return scores

    def actor_and_ref_logprobs(self, rollout, attention_mask):
        """
        -> logprobs, ref_logprobs: (B, R) float32, nats, by the training forward; the actor's by the
        sampler where it is exact.
        """
        models = [self.models.ref]
        if not self.sampler_is_exact:
            models.append(self.models.actor)

        def forward(*inputs):
            return [model(*inputs, self.args.temperature)[0] for model in models]

        ref_logprobs, *logprobs = self.in_micro_batches(
            forward, rollout.tokens, attention_mask, rollout.mask)
        return logprobs[0] if logprobs else rollout.logprobs * rollout.mask, ref_logprobs

    def rewards(self, scores, logprobs, ref_logprobs, mask):
        """(B, R): shape_rewards with the KL coefficient of now; preflight asks for them too."""
        return shape_rewards(scores, logprobs, ref_logprobs, mask, self.kl_coef)

    def critic_values(self, tokens, attention_mask, mask):
        """(B, R): the critic's value of the state before each response token (a column earlier)."""
        def forward(tokens, attention_mask, mask):
            R = mask.size(1)
            return [self.models.critic(tokens, attention_mask)[:, -R - 1:-1] * mask]

        [values] = self.in_micro_batches(forward, tokens, attention_mask, mask)
        return values

    @torch.no_grad()
    def in_micro_batches(self, forward, tokens, attention_mask, mask):
        """
        forward(tokens, attention_mask, mask) -> tensors (B,) or (B, R), computed for
        --per_device_train_batch_size rows of similar length at a time, since a rollout may have
        many more rows than memory has room for. Nothing carries a gradient.
        """
        B, R = mask.shape
        whole = []
        for rows in by_length(attention_mask, self.args.per_device_train_batch_size):
            # Rows are flush right for the forward, as in Experience.take, and then moved back.
            lengths = mask[rows].sum(1).long()
            T = int(attention_mask[rows].sum(1).max())
            longest = int(lengths.max())
            flush = [moved_right(tensor[rows], R - lengths) for tensor in (
                tokens, attention_mask, mask)]
            parts = forward(flush[0][:, -T:], flush[1][:, -T:], flush[2][:, -longest:])
            if not whole:
                whole = [part.new_zeros((B, R) if part.ndim == 2 else B) for part in parts]
            for tensor, part in zip(whole, parts):
                if part.ndim == 2:
                    tensor[rows, :longest] = moved_right(part, lengths - longest)
                else:
                    tensor[rows] = part
        return whole

    def advantages_and_targets(self, rewards, values, scores, mask):
        """-> advantages, and the critic's targets (None without a critic), both (B, R)."""
        args = self.args
        if args.advantage == "gae":
            advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
            return whiten(advantages, mask), returns
        if args.advantage == "reinforce":
            return whiten(reinforce(rewards, mask, args.gamma), mask), None
        if args.advantage == "rloo":
            return rloo(rewards, args.num_generations) * mask, None
        return grpo(scores, args.num_generations) * mask, None

    def rollout_metrics(self, total, names):
        """
        The metrics of a rollout, per answer or per token.

        total  sums over all ranks, see generate_experience
        names  of the scorers
        """
        rows = total["rows"]
        tokens = total["tokens"]
        metrics = {
            "objective/kl": total["kl"] / rows,
            "objective/kl_coef": self.kl_coef,
            "objective/scores": total["scores"] / rows,
            # score - missing_eos_penalty (where there is no EOS) - beta KL, which is maximised
            "objective/rlhf_reward": (total["penalised"] - self.kl_coef * total["kl"]) / rows,
            "response/length": tokens / rows,
            "response/ended": total["ended"] / rows,
        }
        if "drift" in total:
            metrics["response/logprob_drift"] = total["drift"] / tokens
        for name in names:
            metrics[f"objective/scores/{name}"] = total[f"scores/{name}"] / rows
        for name, size in self.models.generator.memory.items():
            metrics[f"memory/{name.replace(' ', '_')}_gb"] = size / 2**30  # this rank's
        return metrics

    # -------------------------------------------------------------------------
    # second half: what is learned from them

    def train_rlhf(self, experience, unsupervised=None):
        """
        `ppo_epochs` passes in shuffled minibatches, each one optimizer step of actor and critic ->
        mean actor and critic loss per token (in units of the advantages, and of the squared
        returns; 0 without a critic).

        unsupervised  iterator that yields, for each optimizer step, gradient_accumulation_steps
                      batches of data.Collator(1). The actor then minimises PPO's loss +
                      unsup_coef x their mean nats per token in one step (Ouyang et al. 2022, eq. 2)
        """
        args = self.args
        models = self.models
        x = experience
        began = time.time()
        if len(x.tokens) % args.minibatch_rows:
            # The gradients of a partial step would be added to the next rollout's.
            raise UsageError(
                f"a rollout of {len(x.tokens)} answers is not used up by optimizer steps of "
                "--per_device_train_batch_size x --gradient_accumulation_steps = "
                f"{args.minibatch_rows} rows; give batches of --per_device_generation_batch_size "
                "prompts (drop_last=True).")

        # A rollout is cut into minibatches, one optimizer step each, and a minibatch into
        # micro-batches, one forward and backward each.
        sums = Sums()
        lr = models.actor.get_lr()[0]  # before the steps, which move the schedule on
        for _ in range(args.ppo_epochs):
            # 1. The rows are dealt anew to minibatches.
            order = torch.randperm(len(x.tokens)).to(x.tokens.device)
            for minibatch in order.split(args.minibatch_rows):
                micro_batches = [x.take(minibatch[rows]) for rows in by_length(
                    x.attention_mask[minibatch], args.per_device_train_batch_size)]
                # Losses are divided by the response tokens of the minibatch on all ranks.
                [tokens] = all_sum(x.mask[minibatch].sum())

                # 2. The actor's step, on its answers and on the text that is mixed in.
                texts = next(unsupervised) if unsupervised else None
                actor_norm = self.update_actor(micro_batches, tokens, texts, sums)

                # 3. The critic's step.
                critic_norm = None
                if models.critic:
                    critic_norm = self.update_critic(micro_batches, tokens, sums)
                if models.ema:
                    models.ema.update()

        # 4. Numbers for the log, and the KL coefficient of the next rollout.
        sums.add(rows=len(x.tokens), tokens_read=x.attention_mask.sum())
        if models.critic:
            sums.add(returns=x.returns.sum(), squared_returns=x.returns.square().sum(),
                     response_tokens=x.mask.sum())
        total = sums.over_ranks()
        if args.kl_target > 0:
            self.kl_coef = adapt_kl_coef(self.kl_coef, self.metrics["objective/kl"], args.kl_target,
                                         total["rows"])
        mean_actor_loss = total["actor_loss"] / total["updates"]
        mean_critic_loss = total.get("critic_loss", 0.0) / total["updates"]
        self.metrics.update(self.update_metrics(total, mean_actor_loss, mean_critic_loss))
        self.metrics.update({"lr": lr, "ppo/policy/grad_norm": actor_norm})
        if models.critic:
            self.metrics["ppo/val/grad_norm"] = critic_norm
        self.metrics["time/train"] = time.time() - began
        seconds = sum(self.metrics[f"time/{part}"] for part in ("generate", "score", "train"))
        self.metrics["tokens_per_second"] = total["tokens_read"] / seconds
        return mean_actor_loss, mean_critic_loss

    def update_actor(self, micro_batches, tokens, texts, sums):
        """
        One optimizer step -> the gradient's norm before clipping.

        micro_batches  Experiences
        tokens         response tokens of the minibatch on all ranks
        texts          as many batches of data.Collator(1), or None
        """
        if texts is None:
            def loss_sum(x):
                return self.policy_loss(x, sums)
        else:
            texts = [to_device(text) for text in texts]
            [text_tokens] = all_sum(sum(text["loss_mask"][:, 1:].sum() for text in texts))
            # train_step divides by the response tokens, while the text's mean is over its own.
            text_weight = self.args.unsup_coef * tokens / text_tokens
            micro_batches = list(zip(micro_batches, texts))

            def loss_sum(answers_and_text):
                x, text = answers_and_text
                loss = self.policy_loss(x, sums)
                return loss + text_weight * self.text_loss(text, sums)

        loss, norm = train_step(self.models.actor, micro_batches, loss_sum, tokens)
        # Summed over the ranks, that is one update.
        sums.add(actor_loss=loss, updates=1 / dist.get_world_size())
        return norm

    def update_critic(self, micro_batches, tokens, sums):
        """One optimizer step -> the gradient's norm before clipping. Arguments: update_actor's."""
        loss, norm = train_step(self.models.critic, micro_batches,
                                lambda x: self.value_loss(x, sums), tokens)
        sums.add(critic_loss=loss)
        return norm

    def policy_loss(self, x, sums):
        """PPO's loss of an Experience, summed over its tokens; statistics into sums."""
        logprobs, entropy = self.models.actor(
            x.tokens, x.attention_mask, x.mask, self.args.temperature)
        loss, clipped, approxkl = ppo_actor_loss(logprobs, x.logprobs, x.advantages, x.mask,
                                                 self.args.cliprange)
        log_ratio = (logprobs.detach() - x.logprobs).clamp(-20, 20)  # as in the loss
        ratio = (log_ratio.exp() * x.mask).sum()
        sums.add(clipped=clipped, approxkl=approxkl, ratio=ratio, entropy=entropy.sum(),
                 tokens=x.mask.sum())
        if self.sampler_is_exact and "updates" not in sums:
            # Until the first step the trainer's policy is the one that sampled.
            sums.add(drift=(log_ratio.abs() * x.mask).sum(), drift_tokens=x.mask.sum())
        if self.args.advantage == "grpo":
            loss = loss + self.kl_coef * kl_loss_k3(logprobs, x.ref_logprobs, x.mask)
        return loss

    def text_loss(self, text, sums):
        """Batch of data.Collator(1) -> summed nats of its trained tokens; statistics into sums."""
        trained = text["loss_mask"][:, 1:]
        logprobs, _ = self.models.actor(text["input_ids"], text["attention_mask"], trained)
        nats = -logprobs.sum()
        sums.add(text_nats=nats.detach(), text_tokens=trained.sum())
        return nats

    def value_loss(self, x, sums):
        """The critic's loss of an Experience, summed over its tokens; statistics into sums."""
        R = x.mask.size(1)
        values = self.models.critic(x.tokens, x.attention_mask)[:, -R - 1:-1]
        loss, clipped = critic_loss(values, x.values, x.returns, x.mask, self.args.cliprange_value)
        squared_error = ((values.detach() - x.returns).square() * x.mask).sum()
        sums.add(clipped_values=clipped, squared_error=squared_error)
        return loss

    def update_metrics(self, total, mean_actor_loss, mean_critic_loss):
        """
        The metrics of the updates, per token.

        total  sums over all ranks, minibatches and epochs, see policy_loss and its neighbours
        """
        tokens = total["tokens"]
        ptx = total.get("text_nats", 0.0) / max(total.get("text_tokens", 0.0), 1)
        metrics = {
            "objective/entropy": total["entropy"] / tokens,
            "ppo/loss/policy": mean_actor_loss - self.args.unsup_coef * ptx,
            "ppo/policy/clipfrac": total["clipped"] / tokens,
            "ppo/policy/approxkl": total["approxkl"] / tokens,
            "ppo/policy/ratio": total["ratio"] / tokens,
        }
        if "drift" in total:
            metrics["response/logprob_drift"] = total["drift"] / total["drift_tokens"]
        if "text_nats" in total:
            metrics["ppo/loss/ptx"] = ptx
        if self.models.critic:
            mean = total["returns"] / total["response_tokens"]
            variance = total["squared_returns"] / total["response_tokens"] - mean**2
            mean_squared_error = total["squared_error"] / tokens
            metrics.update({
                "ppo/loss/value": mean_critic_loss,
                "ppo/val/clipfrac": total["clipped_values"] / tokens,
                "ppo/val/var_explained": 1 - mean_squared_error / max(variance, 1e-8),
                "ppo/returns/mean": mean,
            })
        return metrics

    # -------------------------------------------------------------------------
    # checkpoints

    def state_dict(self):
        """What a checkpoint holds beside DeepSpeed's files of actor and critic. Collective."""
        average = self.models.ema.by_name() if self.models.ema else {}  # rank 0's
        return {"kl_coef": self.kl_coef, "iterations": self.iterations, "ema": average}

    def load_state_dict(self, state):
        self.kl_coef = state["kl_coef"]
        self.iterations = state["iterations"]
        if self.models.ema:
            self.models.ema.load(state["ema"])


# -----------------------------------------------------------------------------
# evaluation

@dataclass
class Evaluation:
    """
    numbers   over all ranks: score, kl (nats per response), gold and win_rate; the last two are
              None where nothing can be said
    answers   support.metrics.Answer of each prompt of this rank
    seconds   that it took
    """
    numbers: dict
    answers: list
    seconds: float

    @property
    def grades(self):
        """One an answer: exact marks where the task has them, else scores."""
        return [answer.score if answer.gold is None else answer.gold for answer in self.answers]


@torch.no_grad()
def evaluate(trainer, dataloader, gold_mark, before=None):
    """
    Answers to the held-out prompts, sampled as in training, with the same noise at every call ->
    Evaluation.

    gold_mark  f(record, answer) -> exact mark of an answer, or None
    before     an earlier Evaluation, of the SFT model: win_rate is then the share of prompts whose
               answer has a higher grade now, a tie counting half
    """
    began = time.time()
    models = trainer.models
    found = []
    for number, batch in enumerate(watched(dataloader, "answers to held-out prompts"), 1):
        rollout, attention_mask = trainer.respond(batch, 1, call=-number)
        logprobs, ref_logprobs = trainer.actor_and_ref_logprobs(rollout, attention_mask)
        _, scores = trainer.score(rollout, attention_mask, batch["records"])
        texts = decode_answers(models.tokenizer, rollout)
        ended = has_ended(rollout, models.eos_token_ids).tolist()
        kl = (logprobs - ref_logprobs).sum(1).tolist()
        scores = scores.tolist()
        # The rows that are repeated to fill up this rank's share have weight 0 and are left out.
        weight = batch.get("weight", torch.ones(len(texts)))
        for row in weight.nonzero().flatten().tolist():
            record = batch["records"][row]
            gold = gold_mark(record, texts[row]) if gold_mark else None
            found.append(Answer(record, texts[row], ended[row], scores[row], kl[row], gold))

    # The mean grade is the gold score where grades are exact marks.
    evaluation = Evaluation({}, found, time.time() - began)
    sums = Sums()
    sums.add(score=sum(answer.score for answer in found), kl=sum(answer.kl for answer in found),
             answers=len(found), grades=sum(evaluation.grades))
    if before:
        wins = 0.0
        for grade, grade_before in zip(evaluation.grades, before.grades):
            wins += (grade > grade_before) + 0.5 * (grade == grade_before)
        sums.add(wins=wins)
    total = sums.over_ranks()
    count = total["answers"]
    evaluation.numbers = {"score": total["score"] / count, "kl": total["kl"] / count,
                          "gold": total["grades"] / count if gold_mark else None,
                          "win_rate": total["wins"] / count if before else None}
    return evaluation


def mean_gold(gold_mark, records, answers):
    """
    Mean over all ranks of the task's exact marks in [0, 1]; each record has as many answers, in a
    row.
    """
    n = len(answers) // len(records)
    marks = [gold_mark(records[i // n], answer) for i, answer in enumerate(answers)]
    total, count = all_sum(sum(marks), len(marks))
    return total / count


# -----------------------------------------------------------------------------
# the stage

def main(config):
    if config.dry_run:
        dry_run(config, "ppo")
        return
    began = time.time()
    setup(config)
    checkpoints = Checkpoints(config, "ppo")
    if checkpoints.finished:
        return
    rank = dist.get_rank()
    world = dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.actor_model_name_or_path, config.chat_template)
    data = load_stage_data(config, 3, tokenizer, rank, world, checkpoints.done, log=print0)
    total_steps = data.total_steps

    # -------------------------------------------------------------------------
    # models, optimisers and learning-rate schedules (made in hybrid_engine.train_engine)
    engine = DeepSpeedRLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path,
                                 tokenizer, total_steps, config)
    trainer = DeepSpeedPPOTrainer(engine, config)
    prompts = config.per_device_generation_batch_size * world
    print0(f"{total_steps} steps of {prompts} prompts x {config.num_generations} answer(s), "
           f"{config.ppo_epochs} epoch(s) of {config.rollout_rows // config.minibatch_rows} "
           "update(s)")
    if not config.skip_preflight:
        # A short run is only warned of models that are hardly trained.
        preflight(trainer, data.train_loader, data.held_records, total_steps)
    # The SFT model answers the held-out prompts here, to compare with, before a checkpoint is
    # loaded, while the actor is the SFT model.
    sft_eval = evaluate(trainer, data.held_loader, data.gold_mark)
    checkpoints.load({"actor": engine.actor, "critic": engine.critic}, total_steps, trainer)

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    columns = [("score", "objective/scores", "7.3f"), ("kl", "objective/kl", "7.3f"),
               ("entropy", "objective/entropy", "6.3f"), ("length", "response/length", "5.1f"),
               ("ended", "response/ended", "5.3f")]
    log = MetricsLog(folder, total_steps, config.logging_steps, columns, monitors(config, "ppo"),
                     checkpoints.done, eval_steps=config.eval_steps)
    log.evaluation(0, sft_eval.numbers, sft_eval.answers, sft_eval.seconds)
    doctor = RunDoctor(engine.actor.gradient_clipping())
    if checkpoints.done and rank == 0:
        # The doctor reads the steps before the resume, to speak of trends as if it had seen them.
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            doctor(json.loads(line))
    for step, prompt_batch in training_steps(data.train_loader, total_steps, checkpoints.done):
        # one PPO step
        experience = trainer.generate_experience(prompt_batch)
        if data.gold_mark:
            answers = decode_answers(tokenizer, experience)
            gold = mean_gold(data.gold_mark, prompt_batch["records"], answers)
            trainer.metrics["objective/gold"] = gold
        trainer.train_rlhf(experience, data.text_batches)

        # what is said about it
        log(step, trainer.metrics)
        for sentence in doctor({"step": step, **trainer.metrics}):
            print0(f"doctor: {sentence}")
        if log.evaluates_after(step):
            held = evaluate(trainer, data.held_loader, data.gold_mark, sft_eval)
            log.evaluation(step, held.numbers, held.answers, held.seconds)
        checkpoints.step_done(step)

    # -------------------------------------------------------------------------
    # evaluation, a sample, the models
    held = evaluate(trainer, data.held_loader, data.gold_mark, sft_eval)
    log.evaluation(total_steps, held.numbers, held.answers, held.seconds)
    save_model(engine.actor, tokenizer, folder)
    if engine.critic:
        save_model(engine.critic, tokenizer, f"{config.output_dir}/critic")
    if engine.ema:
        save_model(engine.actor, tokenizer, f"{config.output_dir}/actor_ema",
                   engine.ema.by_name())
    seconds = checkpoints.seconds + time.time() - began
    checkpoints.finish({"seconds": seconds, **held.numbers}, config.actor_model_name_or_path,
                       doctor=doctor.sentences)

    now = held.numbers
    before = sft_eval.numbers
    gold_text = f", gold {before['gold']:.3f} -> {now['gold']:.3f}" if data.gold_mark else ""
    judge = "gold" if data.gold_mark else "score"
    print0(f"step 3 done in {seconds:.0f} s: held-out score {before['score']:.3f} -> "
           f"{now['score']:.3f}, KL {now['kl']:.2f} nats per response{gold_text};\nbetter than the "
           f"SFT model's answer in {now['win_rate']:.0%} by {judge}; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
