"""
Step 3: reinforcement learning from human feedback with PPO. The actor answers prompts; the reward model scores the
answers; the actor moves towards what scores well, and a KL penalty keeps it near the model it came from.

    maximise E [ r(x, y) - beta KL(pi || pi_ref) ]  (+ c E log pi(text))               Ouyang et al. 2022, eq. 2

    reward of token t   R_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t is the last] r(x, y)
    advantage           A_t = sum_k (gamma lam)^k delta_{t+k}                          Schulman et al. 2016, eq. 16
                        delta_t = R_t + gamma V_{t+1} - V_t
    actor loss          - min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t )          Schulman et al. 2017, eq. 7
                        rho_t = pi(y_t) / pi_old(y_t)
    critic loss         1/2 max( (V_t - G_t)^2, (clip(V_t, V_old,t +- eps_v) - G_t)^2 ),  G_t = A_t + V_old,t

--advantage rloo, grpo and reinforce put other estimates in A_t's place and go without a critic. --reward_fn takes
r(x, y) from Python functions or several models. --unsupervised_data_path adds the text term, "ptx".

Every sum runs over the response's tokens, its EOS included (so the model learns when to stop) and nothing after it.
Which tokens those are is known from the response's length, never found by comparing ids with PAD or EOS.

    python step3_ppo.py --actor_learning_rate 3e-4 --critic_learning_rate 3e-4 --max_answer_seq_len 40 --max_steps 30
    python step3_ppo.py --advantage rloo --num_generations 4 --reward_fn my_rewards.py:polite
    deepspeed step3_ppo.py --data_path Dahoas/rm-static              # one GPU; reads output/sft and output/reward
    deepspeed --num_gpus 8 step3_ppo.py --deepspeed_config configs/1node.json --data_path Dahoas/rm-static

Reads   prompts of --data_path; the SFT model (actor and reference); the reward model (also the critic's first weights)
Writes  output/actor and output/critic, Hugging Face folders; output/actor_ema with --enable_ema; metrics.jsonl;
        its numbers in output/summary.json

Unlike DeepSpeed-Chat's step 3: rollouts are sampled, not greedy; EOS is trained; dropout is off, so the first ratio is
exactly 1; advantages are whitened over all ranks; losses are normalised by the global token count; reward model and
critic speak in the reward model's own standard deviations from its own mean, in which --reward_clip and
--cliprange_value are too.
"""

import functools
import importlib.util
import inspect
import json
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from bench.doctor import RunDoctor
from bench.memory_plan import dry_run, empty_model
from bench.preflight import preflight
from data import (Collator, DataConfig, MicroBatches, UsageError, count_steps, decode_answers, encode_records,
                  encode_text, flag, gold_scorer, load_records, load_tokenizer, make_dataloader, training_steps)
from hybrid_engine import (Checkpoints, EngineConfig, ExponentialMovingAverage, InferenceEngine, LanguageModel,
                           MetricsLog, RewardModel, adapters_off, add_lora, all_sum, frozen_engine, last_token,
                           load_model, mean, memory_gb, on_any_rank, parameter_count, print0, print_answers, run_stage,
                           save_model, setup, tensor_parallel_group, to_device, train_engine, train_step, write_summary)
from kernels.gae import gae
from kernels.ppo_loss import ppo_actor_loss


@dataclass
class Config(EngineConfig, DataConfig):
    actor_model_name_or_path: str = flag("", "the SFT model: actor and reference start from it; default OUTPUT_DIR/sft")
    critic_model_name_or_path: str = flag("", "the reward model; the critic starts from it; default OUTPUT_DIR/reward")
    reward_fn: list[str] = flag([], "file.py:function or reward models, one or more; default: the critic's start")
    reward_weights: list[float] = flag([], "of --reward_fn's scores in their sum; default 1 each")
    actor_learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top")
    critic_learning_rate: float = flag(5e-6, "AdamW's, at the schedule's top")
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = flag("gae", "estimator; all but gae go without a critic")
    num_generations: int = flag(1, "answers to each prompt of a rollout; rloo and grpo compare them, so need 2 or more")
    per_device_generation_batch_size: int = flag(16, "prompts answered in one rollout on each device")
    ppo_epochs: int = flag(1, "passes over a rollout before the next")
    kl_coef: float = flag(0.05, "beta, reward units per nat")
    kl_target: float = flag(0.0, "nats a response to steer the KL to by adapting kl_coef; 0: kl_coef is fixed")
    gamma: float = flag(1.0, "discount")
    lam: float = flag(0.95, "GAE's lambda")
    cliprange: float = flag(0.2, "eps of the actor's clip")
    cliprange_value: float = flag(0.2, "eps_v of the critic's clip")
    reward_clip: float = flag(5.0, "normalised scores are clipped to +- this, before the KL is added")
    missing_eos_penalty: float = flag(0.0, "taken off the score of an answer that did not end")
    temperature: float = flag(1.0, "of sampling, and of all log-probabilities")
    top_p: float = flag(1.0, "nucleus sampling in rollouts; below 1 the ratio's policy is still the whole one")
    inference_tp_size: int = flag(1, "processes that share one copy of the actor's weights while generating")
    unsupervised_data_path: list[str] = flag([], "plain text (.txt, .gz, any source) to stay good at: the ptx term")
    unsup_coef: float = flag(27.8, "weight of the ptx term's loss, nats a token, in the actor's")
    eval_steps: int = flag(0, "steps between evaluations on held-out prompts, logged as eval/...; 0: at the end only")
    enable_ema: bool = flag(False, "also keep and save an average of the actor's weights (decay 0.992)")
    skip_preflight: bool = flag(False, "start without the checks of models, data and sampler before the first update")


# -----------------------------------------------------------------------------
# the maths (with `gae` and the actor's clipped loss, which are kernels/gae.py and kernels/ppo_loss.py)

def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """
    One reward a token: the KL penalty everywhere, the score on the last response token.

    scores                   (B,) float32, one a response
    logprobs, ref_logprobs   (B, R) float32, nats, under the sampling policy and the reference
    mask                     (B, R) 1.0 on response tokens up to and including EOS, 0.0 after
    returns                  (B, R), zero where mask is zero
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def reinforce(rewards, mask, gamma):
    """
    Advantages of REINFORCE++ before whitening: the discounted sum of a token's reward and all that follow, (B, R) like
    gae's arguments (Hu 2025, arXiv 2501.03262). It is gae with a critic that says 0 and lambda 1.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def rloo(rewards, n):
    """
    REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, section 2.2): what a response earned, its KL
    penalty included, minus the mean of what the n - 1 others to the same prompt earned.

    rewards  (B, R), rows of one prompt together, n each -> advantages (B, 1), the same for all tokens
    """
    earned = rewards.sum(1).view(-1, n)
    others = (earned.sum(1, keepdim=True) - earned) / (n - 1)
    return (earned - others).view(-1, 1)


def grpo(scores, n):
    """
    Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): a score's distance from the mean of
    the n responses to its prompt, in their standard deviations. The KL is no part of it: see kl_penalty.

    scores  (B,), rows of one prompt together, n each -> advantages (B, 1); 0 where all n score the same
    """
    group = scores.view(-1, n)
    return ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def kl_penalty(logprobs, ref_logprobs, mask):
    """
    Summed KL(pi || pi_ref) in nats by Schulman's k3, exp(d) - d - 1 with d = log pi_ref - log pi: never negative, and
    GRPO's term in the loss (Shao et al. 2024, eq. 4). d is bounded like PPO's log-ratio.
    """
    d = ((ref_logprobs - logprobs) * mask).clamp(-20, 20)
    return (d.exp() - d - 1).sum()


def whiten(values, mask):
    """
    values (B, R) float32 -> mean 0 and variance 1 over the mask's tokens of all ranks, zero elsewhere; sums in float64.
    """
    total, squares, count = all_sum((values.double() * mask).sum(), (values.double().square() * mask).sum(), mask.sum())
    center = total / count
    return (values - center) * mask / (max(squares / count - center**2, 0) + 1e-8) ** 0.5


def critic_loss(values, old_values, returns, mask, cliprange_value):
    """Half the larger squared error, with or without the clip around the old values, summed -> loss, clipped tokens."""
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # exactly values inside
    plain, clipped = (values - returns).square(), (clipped_values - returns).square()
    return 0.5 * (torch.max(plain, clipped) * mask).sum(), ((clipped > plain) * mask).sum()


def adapt_kl_coef(kl_coef, kl, target, responses, horizon=10_000):
    """
    Proportional controller (Ziegler et al. 2019, section 2.2): error clipped to +-0.2, time in responses; kl and target
    in nats a response.
    """
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * responses / horizon)


# -----------------------------------------------------------------------------
# rewards of one's own: Python functions with TRL's signature

@functools.cache
def load_reward_function(name):
    """'file.py:function' -> the function; None for anything else, which is a reward model then."""
    path, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise UsageError(f"--reward_fn {name}: the function is missing; {name}:function is the form.")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        raise UsageError(f"--reward_fn {name}: the file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))  # its own imports, as if it were run
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise UsageError(f"--reward_fn {name}: importing {path} fails: {type(error).__name__}: {error}.") from error
    if not callable(getattr(module, function, None)):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"--reward_fn {name}: {path} has no function {function}; it has {', '.join(there) or 'none'}.")
    return getattr(module, function)


def call_reward_function(name, function, records, answers):
    """
    Scores of answers (texts) to the prompts of records, by function(prompts, completions, **columns) -> (B,) float32.

    prompts, completions  lists of texts where the data's `prompt` column holds text, else lists of message lists
    columns               a list for each column the data has beside them; `chosen` and `rejected` always
    """
    text = all(isinstance(record.columns.get("prompt"), str) for record in records)
    prompts = [record.columns["prompt"] if text else record.prompt for record in records]
    completions = answers if text else [[{"role": "assistant", "content": answer}] for answer in answers]
    columns = {"chosen": [record.chosen for record in records], "rejected": [record.rejected for record in records]}
    for column in sorted({column for record in records for column in record.columns} - {"prompt"}):
        columns[column] = [record.columns.get(column) for record in records]
    try:
        inspect.signature(function).bind(prompts=prompts, completions=completions, **columns)
    except TypeError as error:
        raise UsageError(f"--reward_fn {name} must take (prompts, completions, **columns), and the data's columns are "
                         f"{', '.join(columns)}: {error}.") from error
    try:
        returned = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:  # whatever a user's function raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(f"--reward_fn {name} failed in {place.filename}, line {place.lineno}: {type(error).__name__}: "
                         f"{error}. The columns it was given: {', '.join(columns)}.") from error
    try:
        scores = torch.tensor([float(score) for score in returned])
    except (TypeError, ValueError):
        scores = []
    if len(scores) != len(answers):
        raise UsageError(f"--reward_fn {name} must return a list of {len(answers)} numbers, one an answer; "
                         f"{type(returned).__name__} {str(returned)[:100]} came.")
    return scores


# -----------------------------------------------------------------------------
# the RLHF API: four models, and the two halves of a PPO step

class DeepSpeedRLHFEngine:
    """
    The models of RLHF on DeepSpeed. `actor` and `critic` train; `critic` is None unless the advantages are gae's.
    `ref` (the actor's start) and `rewards` (by name: reward models or Python functions; one model unless --reward_fn
    says otherwise) are only read. `generator` samples from the actor's own weights. With --only_optimize_lora the
    reference is the actor with its adapters off: no memory.

    num_total_iters   rollouts of the whole run, for the learning-rate schedules
    args              a Config
    """

    def __init__(self, actor_model_name_or_path, critic_model_name_or_path, tokenizer, num_total_iters, args):
        check_rollout(args)
        minibatch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        rollout_rows = args.per_device_generation_batch_size * args.num_generations
        names = args.reward_fn or [critic_model_name_or_path]
        functions = {name: load_reward_function(name) for name in names}  # before anything slow
        settings = setup(args)
        updates = num_total_iters * args.ppo_epochs * (rollout_rows // minibatch_rows)
        self.tokenizer, self.args = tokenizer, args

        longest = args.max_prompt_seq_len + args.max_answer_seq_len

        def load_actor():
            return load_model(actor_model_name_or_path, tokenizer, settings, longest)

        def load_score(name, **options):
            if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
                raise UsageError(f"{name}: its tokenizer has another vocabulary than the actor's, so it cannot read "
                                 "the actor's answers. Train it from the same SFT model, or from one of the same "
                                 "family.")
            model = load_model(name, tokenizer, settings, longest, head="score", **options)
            if not hasattr(model.config, "score_std") and not options:
                print0(f"warning: {name} has no score_mean and score_std in its config.json, which step2_reward.py "
                       f"writes: its scores are taken as they are, and clipped to +-{args.reward_clip:g}.")
            return RewardModel(model, normalise=True)

        actor = LanguageModel(add_lora(load_actor(), args))
        adapters_only = args.lora_dim and args.only_optimize_lora  # then the actor without them is the reference
        self.ref = None if adapters_only else frozen_engine(LanguageModel(load_actor()), settings)
        self.rewards = {}  # by name
        for name in names:
            short = name.rpartition(":")[2] if functions[name] else Path(name).name  # what its scores are logged as
            self.rewards[name if short in self.rewards else short] = (
                functions[name] or frozen_engine(load_score(name), settings))
        models = [reward for reward in self.rewards.values() if isinstance(reward, torch.nn.Module)]
        self.reward = models[0] if models else None  # the first reward model
        self.actor = train_engine(actor, settings, args, args.actor_learning_rate, updates)
        self.critic = None
        if args.advantage == "gae":
            start = critic_start(actor_model_name_or_path, critic_model_name_or_path)
            critic = load_score(start, score_from_lm=bool(args.reward_fn))
            critic.model = add_lora(critic.model, args)
            self.critic = train_engine(critic, settings, args, args.critic_learning_rate, updates)
        self.ema = ExponentialMovingAverage(self.actor, decay=0.992) if args.enable_ema else None
        self.generator = InferenceEngine(self.actor.module.model, tensor_parallel_group(args.inference_tp_size))
        ends = self.actor.module.model.generation_config.eos_token_id
        self.eos_token_ids = ends if isinstance(ends, list) else [ends]


def check_rollout(args):
    """Raises UsageError for flags of rollouts and rewards that do not go together, or reward functions not there."""
    for name in args.reward_fn:
        load_reward_function(name)
    if args.advantage in ("rloo", "grpo") and args.num_generations < 2:
        raise UsageError(f"--advantage {args.advantage} compares the answers to one prompt with each other, and "
                         f"--num_generations is {args.num_generations}: 2 or more are needed, 4 are usual.")
    minibatch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.per_device_generation_batch_size * args.num_generations % minibatch_rows:
        raise UsageError(f"--per_device_generation_batch_size {args.per_device_generation_batch_size} x "
                         f"--num_generations {args.num_generations} must be a multiple of "
                         f"--per_device_train_batch_size {args.per_device_train_batch_size} x "
                         f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: a rollout is used up "
                         "by whole optimizer steps.")
    if args.kl_target > 0 and args.kl_coef == 0:
        raise UsageError("--kl_target steers by multiplying --kl_coef, and 0 stays 0: give it a start over 0.")
    if args.reward_weights and len(args.reward_weights) != max(len(args.reward_fn), 1):
        raise UsageError(f"--reward_weights has {len(args.reward_weights)} entries for {max(len(args.reward_fn), 1)} "
                         "rewards; one number a reward is needed.")


def critic_start(actor_name, critic_name):
    """What the critic starts from: with --reward_fn, and no reward model at the default place, the actor's model."""
    if not critic_name:
        print0(f"no reward model here: the critic starts from {actor_name}, with a new head")
    return critic_name or actor_name


@dataclass
class Experience:
    """
    What one rollout taught, float32 unless noted; B responses (prompts x num_generations, those of a prompt together),
    P prompt columns, R response columns. Nothing here carries a gradient.
    """
    tokens: torch.Tensor          # (B, P + R) int64: prompts left-padded, responses right-padded
    attention_mask: torch.Tensor  # (B, P + R) int64: 1 on what is real
    mask: torch.Tensor            # (B, R) 1 on response tokens up to and including EOS
    logprobs: torch.Tensor        # (B, R) nats, of the policy that sampled, by the training forward
    ref_logprobs: torch.Tensor    # (B, R) nats
    values: torch.Tensor | None   # (B, R) the critic's V of the state before each token
    scores: torch.Tensor          # (B,)   the rewards' weighted sum
    rewards: torch.Tensor         # (B, R) of each token: shape_rewards
    advantages: torch.Tensor      # (B, R) gae's and reinforce's are whitened over all ranks
    returns: torch.Tensor | None  # (B, R) value targets, from the advantages before whitening


class DeepSpeedPPOTrainer:
    """
    `generate_experience` samples and scores, `train_rlhf` updates; `metrics` holds the last iteration's numbers, over
    all ranks but for the times.
    """

    def __init__(self, engine, args):
        self.engine, self.args = engine, args
        self.kl_coef, self.iterations, self.metrics = args.kl_coef, 0, {}

    def respond(self, generator, prompt_batch, n, draw):
        """
        n sampled answers to each prompt -> Rollout, its attention_mask (B, P + R). The same `draw` (an int) gives the
        same noise; training's count from 1.
        """
        args, engine, batch = self.args, self.engine, to_device(prompt_batch)
        rollout = generator.generate(
            batch["input_ids"], batch["attention_mask"], max_new_tokens=args.max_answer_seq_len,
            temperature=args.temperature, top_p=args.top_p, eos_token_id=engine.eos_token_ids,
            pad_token_id=engine.tokenizer.pad_token_id, num_return_sequences=n,
            seed=args.seed + 1_000_003 * draw + dist.get_rank())  # ranks must not draw the same noise
        return rollout, torch.cat([batch["attention_mask"].repeat_interleave(n, 0), rollout.mask.long()], dim=1)

    def logprobs(self, tokens, attention_mask, mask):
        """-> logprobs, ref_logprobs and entropy, each (B, R) float32, nats, by the training forward."""
        engine, inputs = self.engine, (tokens, attention_mask, mask, self.args.temperature)
        logprobs, entropy = engine.actor(*inputs)
        if engine.ref is None:
            with adapters_off(engine.actor):
                return logprobs, engine.actor(*inputs)[0], entropy
        return logprobs, engine.ref(*inputs)[0], entropy

    def score(self, rollout, attention_mask, records):
        """
        -> {name: (B,) float32} of each reward, and their weighted sum (B,). A reward model's scores, which are in its
        own standard deviations, are clipped; a function's are taken as they are.
        """
        args, engine, scores = self.args, self.engine, {}
        for name, reward in engine.rewards.items():
            if not isinstance(reward, torch.nn.Module):
                if not records:
                    raise UsageError(f"--reward_fn {name} scores text, and the batch has no `records` to take the "
                                     "prompts from; data.Collator(3, ...) makes batches that have them.")
                answers = decode_answers(engine.tokenizer, rollout)
                with on_any_rank():
                    scores[name] = call_reward_function(name, reward, records, answers).to(rollout.mask.device)
            else:
                score = last_token(reward(rollout.tokens, attention_mask), attention_mask)
                scores[name] = score.clamp(-args.reward_clip, args.reward_clip)
        bad = all_sum(*((~score.isfinite()).sum() for score in scores.values()))
        for name, count in zip(scores, bad):
            if count:  # on whatever rank: all of them end here
                raise UsageError(f"the reward {name} gave {count:.0f} scores that are no finite numbers (NaN or "
                                 "infinite); PPO cannot learn from them.")
        weights = args.reward_weights or [1.0] * len(scores)
        return scores, sum(weight * score for weight, score in zip(weights, scores.values()))

    def state_dict(self):
        """What a checkpoint holds beside DeepSpeed's files of actor and critic."""
        return {"kl_coef": self.kl_coef, "iterations": self.iterations,
                "ema": self.engine.ema.average if self.engine.ema else {}}  # rank 0's

    def load_state_dict(self, state):
        self.kl_coef, self.iterations = state["kl_coef"], state["iterations"]
        if self.engine.ema:
            self.engine.ema.average = state["ema"] if dist.get_rank() == 0 else {}

    @torch.no_grad()
    def generate_experience(self, prompt_batch):
        """
        prompt_batch: input_ids and attention_mask (B, P) int64, left-padded; records, a list of B Preference, where a
        reward is a Python function -> Experience.
        """
        args, engine, n = self.args, self.engine, self.args.num_generations
        started, self.iterations = time.time(), self.iterations + 1
        rollout, attention_mask = self.respond(engine.generator, prompt_batch, n, self.iterations)
        generated = time.time()
        memory = {name: size / 2**30 for name, size in engine.generator.memory.items()}  # this rank's
        if self.iterations == 1 and memory:
            sizes = ", ".join(f"{name} {size:.3f}" for name, size in memory.items())
            print0(f"first rollout, GB a process: {sizes}; peak so far {memory_gb():.2f}")

        tokens, mask, R = rollout.tokens, rollout.mask, rollout.mask.size(1)
        logprobs, ref_logprobs, entropy = self.logprobs(tokens, attention_mask, mask)
        records = [record for record in prompt_batch.get("records", []) for _ in range(n)]
        each, scores = self.score(rollout, attention_mask, records)
        eos = torch.tensor(engine.eos_token_ids, device=tokens.device)
        ended = torch.isin(last_token(tokens, attention_mask), eos).float()
        penalised = scores - args.missing_eos_penalty * (1 - ended)
        rewards, values, returns = shape_rewards(penalised, logprobs, ref_logprobs, mask, self.kl_coef), None, None
        if args.advantage == "gae":
            # the state before a token ends one column earlier
            values = engine.critic(tokens, attention_mask)[:, -R - 1:-1] * mask
            advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
            advantages = whiten(advantages, mask)
        elif args.advantage == "reinforce":
            advantages = whiten(reinforce(rewards, mask, args.gamma), mask)
        elif args.advantage == "rloo":
            advantages = rloo(rewards, n) * mask
        else:
            advantages = grpo(penalised, n) * mask

        kl = (logprobs - ref_logprobs).sum()
        drift = ((logprobs - rollout.logprobs).abs() * mask).sum() if args.top_p == 1 else torch.zeros(())
        kl, score, ended, entropy, drift, tokens_made, rows, read, *each_sum = all_sum(
            kl, scores.sum(), ended.sum(), entropy.sum(), drift, mask.sum(), len(tokens), attention_mask.sum(),
            *(score.sum() for score in each.values()))
        self.rows, self.read = rows, read
        self.metrics = {
            "objective/kl": kl / rows, "objective/kl_coef": self.kl_coef, "objective/scores": score / rows,
            **{f"objective/scores/{name}": total / rows for name, total in zip(each, each_sum)},
            "objective/rlhf_reward": (score - self.kl_coef * kl) / rows, "objective/entropy": entropy / tokens_made,
            "response/length": tokens_made / rows, "response/ended": ended / rows,
            "response/logprob_drift": drift / tokens_made,
            "time/generate": generated - started, "time/score": time.time() - generated,
            **{f"memory/{name.replace(' ', '_')}_gb": size for name, size in memory.items()}}
        return Experience(tokens, attention_mask, mask, logprobs, ref_logprobs, values, scores, rewards, advantages,
                          returns)

    def train_rlhf(self, experience, unsupervised=None):
        """
        `ppo_epochs` passes in shuffled minibatches, each one optimizer step of actor and critic -> mean actor and
        critic loss (nats, reward^2; 0 without a critic).

        unsupervised  iterator that yields, for each optimizer step, gradient_accumulation_steps batches of
                      data.Collator(1): the actor minimises PPO's loss + unsup_coef x their mean nats a token in the
                      same step (Ouyang et al. 2022, eq. 2)
        """
        args, engine, x = self.args, self.engine, experience
        started, R = time.time(), x.mask.size(1)
        minibatch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if len(x.tokens) % minibatch_rows:  # the rest would wait in the gradients for the next rollout's
            raise UsageError(f"a rollout of {len(x.tokens)} answers is not used up by optimizer steps of "
                             f"--per_device_train_batch_size x --gradient_accumulation_steps = {minibatch_rows} rows; "
                             "give batches of --per_device_generation_batch_size prompts (drop_last=True).")
        sums, losses, critic_part = Counter(), [], 0.0

        def actor_sum(micro_batch):
            rows, text = micro_batch
            logprobs, _ = engine.actor(x.tokens[rows], x.attention_mask[rows], x.mask[rows], args.temperature)
            loss, clipped, approxkl = ppo_actor_loss(logprobs, x.logprobs[rows], x.advantages[rows], x.mask[rows],
                                                     args.cliprange)
            ratio = ((logprobs.detach() - x.logprobs[rows]).exp() * x.mask[rows]).sum()
            sums.update(clipped=clipped, approxkl=approxkl, ratio=ratio, tokens=x.mask[rows].sum())
            if args.advantage == "grpo":
                loss = loss + self.kl_coef * kl_penalty(logprobs, x.ref_logprobs[rows], x.mask[rows])
            if text:
                trained = text["loss_mask"][:, 1:]
                nats = -engine.actor(text["input_ids"], text["attention_mask"], trained)[0].sum()
                sums.update(nats=nats.detach(), text_tokens=trained.sum())
                loss = loss + args.unsup_coef * nats * count / text_tokens  # train_step divides all by count
            return loss

        def critic_sum(rows):
            values = engine.critic(x.tokens[rows], x.attention_mask[rows])[:, -R - 1:-1]
            loss, clipped = critic_loss(values, x.values[rows], x.returns[rows], x.mask[rows], args.cliprange_value)
            squared_error = ((values.detach() - x.returns[rows]).square() * x.mask[rows]).sum()
            sums.update(clipped_values=clipped, squared_error=squared_error)
            return loss

        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(x.tokens)).to(x.tokens.device)
            for minibatch in order.split(minibatch_rows):
                count, = all_sum(x.mask[minibatch].sum())
                micro_batches = minibatch.split(args.per_device_train_batch_size)
                texts = list(map(to_device, next(unsupervised) if unsupervised else [{}] * len(micro_batches)))
                text_tokens, = all_sum(sum(text["loss_mask"][:, 1:].sum() for text in texts if text))
                actor_part, actor_norm = train_step(engine.actor, list(zip(micro_batches, texts)), actor_sum, count)
                if engine.critic:
                    critic_part, critic_norm = train_step(engine.critic, micro_batches, critic_sum, count)
                losses.append(all_sum(actor_part, critic_part))
                if engine.ema:
                    engine.ema.update()

        total = Counter(dict(zip(sums, all_sum(*sums.values()))))
        each = {name: total[name] / total["tokens"] for name in total}
        actor_mean, critic_mean = torch.tensor(losses).mean(0).tolist()
        ptx = total["nats"] / max(total["text_tokens"], 1)
        if args.kl_target > 0:
            self.kl_coef = adapt_kl_coef(self.kl_coef, self.metrics["objective/kl"], args.kl_target, self.rows)
        seconds = time.time() - started
        self.metrics.update({
            "ppo/loss/policy": actor_mean - args.unsup_coef * ptx,
            **({"ppo/loss/ptx": ptx} if unsupervised else {}), "ppo/policy/clipfrac": each["clipped"],
            "ppo/policy/approxkl": each["approxkl"], "ppo/policy/ratio": each["ratio"],
            "ppo/policy/grad_norm": actor_norm, "lr": engine.actor.get_lr()[0], "time/train": seconds})
        if engine.critic:
            returns, squares, count = all_sum(x.returns.sum(), x.returns.square().sum(), x.mask.sum())
            variance = squares / count - (returns / count) ** 2
            self.metrics.update({
                "ppo/loss/value": critic_mean, "ppo/val/clipfrac": each["clipped_values"],
                "ppo/val/var_explained": 1 - each["squared_error"] / max(variance, 1e-8),
                "ppo/returns/mean": returns / count, "ppo/val/grad_norm": critic_norm})
        seconds += self.metrics["time/generate"] + self.metrics["time/score"]
        self.metrics["tokens_per_second"] = self.read / seconds
        return actor_mean, critic_mean


@torch.no_grad()
def evaluate(trainer, dataloader, scorer, rivals=None):
    """
    Answers to the held-out prompts, sampled as in training and with the same noise at every call -> numbers over all
    ranks, [(record, answer)] and marks of this rank's.

    scorer  f(record, answer) -> exact mark of an answer, or None
    rivals  marks of an earlier call, of the SFT model's answers: win_rate is the share of prompts whose answer is
            marked better now, a tie counting half. Marks are the scorer's, without one the trained reward's scores
    numbers score, kl (nats a response), gold and win_rate, the last two None where nothing can be said
    """
    engine, answered, marks, sums = trainer.engine, [], [], [0.0, 0.0]
    for number, batch in enumerate(dataloader, 1):
        rollout, attention_mask = trainer.respond(engine.generator, batch, 1, -number)
        logprobs, ref_logprobs, _ = trainer.logprobs(rollout.tokens, attention_mask, rollout.mask)
        _, scores = trainer.score(rollout, attention_mask, batch["records"])
        answers = list(zip(batch["records"], decode_answers(engine.tokenizer, rollout)))
        sums = [a + float(b) for a, b in zip(sums, (scores.sum(), (logprobs - ref_logprobs).sum()))]
        marks += [scorer(record, answer) for record, answer in answers] if scorer else scores.tolist()
        answered += answers
    wins = sum((mark > rival) + 0.5 * (mark == rival) for mark, rival in zip(marks, rivals or []))
    score, kl, marked, wins, count = all_sum(*sums, sum(marks), wins, len(marks))
    return {"score": score / count, "kl": kl / count, "gold": marked / count if scorer else None,
            "win_rate": wins / count if rivals else None}, answered, marks


def mean_gold(scorer, records, answers):
    """Mean over all ranks of the task's exact marks in [0, 1]; records may have several answers each, in a row."""
    copies = len(answers) // len(records)
    return mean([scorer(records[i // copies], answer) for i, answer in enumerate(answers)])


def planned_models(config):
    """The models of DeepSpeedRLHFEngine without weights, for --dry_run; the one that generates comes first."""
    actor, critic = config.actor_model_name_or_path, config.critic_model_name_or_path
    models = {"actor": empty_model(actor, config)}
    if not (config.lora_dim and config.only_optimize_lora):
        models["ref"] = empty_model(actor, config, trained=False)
    scorers = [name for name in config.reward_fn or [critic] if not name.rpartition(":")[0].endswith(".py")]
    for i, name in enumerate(scorers):
        models[f"reward {i + 1}" if i else "reward"] = empty_model(name, config, "score", trained=False)
    if config.advantage == "gae":
        models["critic"] = empty_model(critic_start(actor, critic), config, "score")
    return models


def main(config):
    check_rollout(config)
    if config.dry_run:
        longest = config.max_prompt_seq_len + config.max_answer_seq_len
        return dry_run(config, planned_models(config), longest, config.max_answer_seq_len,
                       config.per_device_generation_batch_size * config.num_generations)
    began = time.time()
    setup(config)
    checkpoints = Checkpoints(config, "ppo")
    if checkpoints.finished:
        return
    rank, world = dist.get_rank(), dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.actor_model_name_or_path, config.chat_template)
    train_records, held_records = load_records(config, stage=3, log=print0)
    train_set = encode_records(train_records, tokenizer, 3, config.max_prompt_seq_len, log=print0)
    held_set = encode_records(held_records, tokenizer, 3, config.max_prompt_seq_len, log=print0)
    collate = Collator(3, tokenizer.pad_token_id)
    rows = config.per_device_generation_batch_size
    train_loader = make_dataloader(train_set, collate, rows, config.seed, rank, world,
                                   size_flags="--per_device_generation_batch_size")
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)
    parts = config.gradient_accumulation_steps
    minibatch_rows = config.per_device_train_batch_size * parts
    updates = rows * config.num_generations // minibatch_rows
    unsupervised = None
    if config.unsupervised_data_path:  # as much text in an optimizer step as there are answers
        chunks = encode_text(config.unsupervised_data_path, tokenizer, config.max_seq_len, log=print0)
        if len(chunks) < minibatch_rows * world:
            raise UsageError(f"--unsupervised_data_path: {len(chunks)} chunks of --max_seq_len {config.max_seq_len} "
                             f"tokens do not fill one optimizer step of {minibatch_rows * world}; lower --max_seq_len, "
                             "or give more text.")
        text_loader = make_dataloader(chunks, MicroBatches(Collator(1, tokenizer.pad_token_id), parts), minibatch_rows,
                                      config.seed, rank, world)
        each = config.ppo_epochs * updates
        text_steps = training_steps(text_loader, total_steps * each, checkpoints.done * each)
        unsupervised = (batches for _, batches in text_steps)

    # -------------------------------------------------------------------------
    # models and optimisers
    engine = DeepSpeedRLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path, tokenizer,
                                 total_steps, config)
    trainer = DeepSpeedPPOTrainer(engine, config)
    critic_size = f"critic {parameter_count(engine.critic) / 1e6:.1f}M" if engine.critic else "no critic"
    print0(f"actor {parameter_count(engine.actor) / 1e6:.1f}M parameters, {critic_size}; {total_steps} steps of "
           f"{rows * world} prompts x {config.num_generations} answer(s), {config.ppo_epochs} epoch(s) of "
           f"{updates} update(s)")
    if not config.skip_preflight:
        preflight(trainer, train_loader, held_records, total_steps)
    scorer = gold_scorer(config)
    print0(f"the SFT model answers the {len(held_set)} held-out prompts, to compare with")
    first, _, sft_marks = evaluate(trainer, held_loader, scorer)  # here, while the actor is the SFT model
    checkpoints.load({"actor": engine.actor, "critic": engine.critic}, total_steps, trainer)

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    log = MetricsLog(folder, total_steps, config.logging_steps,
                     [("score", "objective/scores", "7.3f"), ("kl", "objective/kl", "7.3f"),
                      ("entropy", "objective/entropy", "6.3f"), ("length", "response/length", "5.1f"),
                      ("ended", "response/ended", "5.3f"), ("clipped", "ppo/policy/clipfrac", "6.4f"),
                      ("explained", "ppo/val/var_explained", "6.3f")], engine.actor.monitor, checkpoints.done)
    doctor = RunDoctor(engine.actor.gradient_clipping())
    if checkpoints.done and rank == 0:  # it has seen the steps before the resume
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            doctor(json.loads(line))
    for step, prompt_batch in training_steps(train_loader, total_steps, checkpoints.done):
        out = trainer.generate_experience(prompt_batch)
        if scorer:
            trainer.metrics["objective/gold"] = mean_gold(scorer, prompt_batch["records"],
                                                          decode_answers(tokenizer, out))
        trainer.train_rlhf(out, unsupervised)
        if config.eval_steps and step % config.eval_steps == 0:
            held, _, _ = evaluate(trainer, held_loader, scorer, sft_marks)
            trainer.metrics.update({f"eval/{name}": value for name, value in held.items() if value is not None})
        log(step, trainer.metrics)
        for sentence in doctor({"step": step, **trainer.metrics}):
            print0(f"doctor: {sentence}")
        checkpoints.save(step)

    # -------------------------------------------------------------------------
    # evaluation, a sample, the models
    held, answered, _ = evaluate(trainer, held_loader, scorer, sft_marks)
    print_answers(answered)
    save_model(engine.actor, tokenizer, folder)
    if engine.critic:
        save_model(engine.critic, tokenizer, f"{config.output_dir}/critic")
    if engine.ema:
        save_model(engine.actor, tokenizer, f"{config.output_dir}/actor_ema", engine.ema.average)
    seconds = checkpoints.seconds + time.time() - began
    write_summary(checkpoints, {"seconds": seconds, **held}, config.actor_model_name_or_path, doctor=doctor.sentences)
    judge = "gold" if scorer else "score"
    print0(f"\nstep 3 done in {seconds:.0f} s: held-out score {first['score']:.3f} -> {held['score']:.3f}, "
           f"KL {held['kl']:.2f} nats a response"
           + (f", gold {first['gold']:.3f} -> {held['gold']:.3f}" if scorer else "")
           + f"; better than the SFT model's answer in {held['win_rate']:.0%} by {judge}; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
