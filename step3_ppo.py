"""
Step 3: reinforcement learning from human feedback with PPO. The actor answers prompts; the reward model scores the
answers; the actor moves towards what scores well, and a KL penalty keeps it near the model it came from.

    maximise E [ r(x, y) - beta KL(pi || pi_ref) ]                   Ouyang et al. 2022, eq. 2, without the ptx term

    reward of token t   R_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t is the last] r(x, y)
    advantage           A_t = sum_k (gamma lam)^k delta_{t+k}                          Schulman et al. 2016, eq. 16
                        delta_t = R_t + gamma V_{t+1} - V_t
    actor loss          - min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t )          Schulman et al. 2017, eq. 7
                        rho_t = pi(y_t) / pi_old(y_t)
    critic loss         1/2 max( (V_t - G_t)^2, (clip(V_t, V_old,t +- eps_v) - G_t)^2 ),  G_t = A_t + V_old,t

Every sum runs over the response's tokens, its EOS included (so the model learns when to stop) and nothing after it.
Which tokens those are is known from the response's length, never found by comparing ids with PAD or EOS.

    python step3_ppo.py --actor_learning_rate 3e-4 --critic_learning_rate 3e-4 --max_answer_seq_len 40 --max_steps 30
    deepspeed step3_ppo.py --data_path Dahoas/rm-static              # one GPU; reads output/sft and output/reward
    deepspeed --num_gpus 8 step3_ppo.py --deepspeed_config configs/1node.json --data_path Dahoas/rm-static

Reads   prompts of --data_path; the SFT model (actor and reference); the reward model (also the critic's first weights)
Writes  output/actor and output/critic, Hugging Face folders; output/actor_ema with --enable_ema; metrics.jsonl;
        its numbers in output/summary.json

Unlike DeepSpeed-Chat's step 3: rollouts are sampled, not greedy; EOS is trained; dropout is off, so the first ratio is
exactly 1; advantages are whitened over all ranks; losses are normalised by the global token count; scores are
normalised by the reward model's own mean and standard deviation before they are clipped to +-5.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import (Collator, DataConfig, EncodedDataset, UsageError, count_steps, decode_answers, flag, gold_scorer,
                  load_records, load_tokenizer, make_dataloader, training_steps)
from hybrid_engine import (Checkpoints, EngineConfig, ExponentialMovingAverage, InferenceEngine, LanguageModel,
                           MetricsLog, RewardModel, adapters_off, add_lora, all_sum, frozen_engine, last_token,
                           load_model, memory_gb, parameter_count, print0, run_stage, save_model, setup,
                           tensor_parallel_group, to_device, train_engine, train_step, write_summary)
from kernels.gae import gae
from kernels.ppo_loss import ppo_actor_loss


@dataclass
class Config(EngineConfig, DataConfig):
    actor_model_name_or_path: str = flag("output/sft", "the SFT model: actor and reference start from it")
    critic_model_name_or_path: str = flag("output/reward", "the reward model; the critic starts from it")
    actor_learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top")
    critic_learning_rate: float = flag(5e-6, "AdamW's, at the schedule's top")
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
    enable_ema: bool = flag(False, "also keep and save an average of the actor's weights (decay 0.992)")


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


def whiten(values, mask):
    """
    values (B, R) float32 -> mean 0 and variance 1 over the mask's tokens of all ranks, zero elsewhere; sums in float64.
    """
    total, squares, count = all_sum((values.double() * mask).sum(), (values.double().square() * mask).sum(), mask.sum())
    mean = total / count
    return (values - mean) * mask / (max(squares / count - mean**2, 0) + 1e-8) ** 0.5


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
# the RLHF API: four models, and the two halves of a PPO step

class DeepSpeedRLHFEngine:
    """
    The four models of RLHF on DeepSpeed: `actor` and `critic` train, `ref` (the actor's start) and `reward` are only
    read. `generator` samples from the actor's own weights. With --only_optimize_lora the reference is the actor with
    its adapters off: no memory.

    num_total_iters   rollouts of the whole run, for the learning-rate schedules
    args              a Config
    """

    def __init__(self, actor_model_name_or_path, critic_model_name_or_path, tokenizer, num_total_iters, args):
        minibatch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if args.per_device_generation_batch_size % minibatch_rows:
            raise UsageError(f"--per_device_generation_batch_size {args.per_device_generation_batch_size} must be a "
                             f"multiple of --per_device_train_batch_size {args.per_device_train_batch_size} x "
                             f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: a rollout is used up "
                             "by whole optimizer steps.")
        settings = setup(args)
        if load_tokenizer(critic_model_name_or_path).get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"{critic_model_name_or_path}: its tokenizer has another vocabulary than the actor's, so "
                             "it cannot read the actor's answers. Train it from the same SFT model, or from one of the "
                             "same family.")
        updates = num_total_iters * args.ppo_epochs * (args.per_device_generation_batch_size // minibatch_rows)
        self.tokenizer, self.args = tokenizer, args

        longest = args.max_prompt_seq_len + args.max_answer_seq_len

        def load_actor():
            return load_model(actor_model_name_or_path, tokenizer, settings, longest)

        def load_score():
            return RewardModel(load_model(critic_model_name_or_path, tokenizer, settings, longest, head="score"))

        actor = LanguageModel(add_lora(load_actor(), args))
        adapters_only = args.lora_dim and args.only_optimize_lora  # then the actor without them is the reference
        self.ref = None if adapters_only else frozen_engine(LanguageModel(load_actor()), settings)
        self.reward = frozen_engine(load_score(), settings)
        critic = load_score()
        critic.model = add_lora(critic.model, args)
        self.actor = train_engine(actor, settings, args, args.actor_learning_rate, updates)
        self.critic = train_engine(critic, settings, args, args.critic_learning_rate, updates)
        self.ema = ExponentialMovingAverage(self.actor, decay=0.992) if args.enable_ema else None
        self.generator = InferenceEngine(self.actor.module.model, tensor_parallel_group(args.inference_tp_size))
        ends = self.actor.module.model.generation_config.eos_token_id
        self.eos_token_ids = ends if isinstance(ends, list) else [ends]


@dataclass
class Experience:
    """
    What one rollout taught, float32 unless noted; B responses, P prompt columns, R response columns. Nothing here
    carries a gradient.
    """
    tokens: torch.Tensor          # (B, P + R) int64: prompts left-padded, responses right-padded
    attention_mask: torch.Tensor  # (B, P + R) int64: 1 on what is real
    mask: torch.Tensor            # (B, R) 1 on response tokens up to and including EOS
    logprobs: torch.Tensor        # (B, R) nats, of the policy that sampled, by the training forward
    ref_logprobs: torch.Tensor    # (B, R) nats
    values: torch.Tensor          # (B, R) the critic's V of the state before each token
    scores: torch.Tensor          # (B,)   normalised by the reward model's mean and deviation, clipped
    advantages: torch.Tensor      # (B, R) whitened over all ranks
    returns: torch.Tensor         # (B, R) value targets, from the advantages before whitening


class DeepSpeedPPOTrainer:
    """
    `generate_experience` samples and scores, `train_rlhf` updates; `metrics` holds the last iteration's numbers, over
    all ranks but for the times.
    """

    def __init__(self, engine, args):
        self.engine, self.args = engine, args
        self.kl_coef, self.iterations, self.metrics = args.kl_coef, 0, {}
        config = engine.reward.model.config  # a DeepSpeed engine's own `config` is another thing
        self.score_mean = getattr(config, "score_mean", 0.0)
        self.score_std = max(getattr(config, "score_std", 1.0), 1e-6)

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
        """prompt_batch: input_ids and attention_mask (B, P) int64, left-padded -> Experience."""
        args, engine = self.args, self.engine
        started, self.iterations = time.time(), self.iterations + 1
        batch = to_device(prompt_batch)
        rollout = engine.generator.generate(
            batch["input_ids"], batch["attention_mask"], max_new_tokens=args.max_answer_seq_len,
            temperature=args.temperature, top_p=args.top_p, eos_token_id=engine.eos_token_ids,
            pad_token_id=engine.tokenizer.pad_token_id,
            seed=args.seed + 1_000_003 * self.iterations + dist.get_rank())  # ranks must not draw the same noise
        generated = time.time()
        memory = {name: size / 2**30 for name, size in engine.generator.memory.items()}  # this rank's
        if self.iterations == 1 and memory:
            sizes = ", ".join(f"{name} {size:.3f}" for name, size in memory.items())
            print0(f"first rollout, GB a process: {sizes}; peak so far {memory_gb():.2f}")

        tokens, mask, R = rollout.tokens, rollout.mask, rollout.mask.size(1)
        attention_mask = torch.cat([batch["attention_mask"], mask.long()], dim=1)
        logprobs, entropy = engine.actor(tokens, attention_mask, mask, args.temperature)
        if engine.ref is None:
            with adapters_off(engine.actor):
                ref_logprobs, _ = engine.actor(tokens, attention_mask, mask, args.temperature)
        else:
            ref_logprobs, _ = engine.ref(tokens, attention_mask, mask, args.temperature)
        # the state before a token ends one column earlier
        values = engine.critic(tokens, attention_mask)[:, -R - 1:-1] * mask
        scores = (last_token(engine.reward(tokens, attention_mask), attention_mask) - self.score_mean) / self.score_std
        scores = scores.clamp(-args.reward_clip, args.reward_clip)
        eos = torch.tensor(engine.eos_token_ids, device=tokens.device)
        ended = torch.isin(last_token(tokens, attention_mask), eos).float()
        penalised = scores - args.missing_eos_penalty * (1 - ended)
        rewards = shape_rewards(penalised, logprobs, ref_logprobs, mask, self.kl_coef)
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)

        kl = (logprobs - ref_logprobs).sum()
        drift = ((logprobs - rollout.logprobs).abs() * mask).sum() if args.top_p == 1 else torch.zeros(())
        kl, score, ended, entropy, drift, tokens_made, rows, read = all_sum(
            kl, scores.sum(), ended.sum(), entropy.sum(), drift, mask.sum(), len(tokens), attention_mask.sum())
        self.rows, self.read = rows, read
        self.metrics = {
            "objective/kl": kl / rows, "objective/kl_coef": self.kl_coef, "objective/scores": score / rows,
            "objective/rlhf_reward": (score - self.kl_coef * kl) / rows, "objective/entropy": entropy / tokens_made,
            "response/length": tokens_made / rows, "response/ended": ended / rows,
            "response/logprob_drift": drift / tokens_made,
            "time/generate": generated - started, "time/score": time.time() - generated,
            **{f"memory/{name.replace(' ', '_')}_gb": size for name, size in memory.items()}}
        return Experience(tokens, attention_mask, mask, logprobs, ref_logprobs, values, scores,
                          whiten(advantages, mask), returns)

    def train_rlhf(self, experience):
        """
        `ppo_epochs` passes in shuffled minibatches, each one optimizer step of actor and critic -> mean actor and
        critic loss (nats, reward^2).
        """
        args, engine, x = self.args, self.engine, experience
        started, R = time.time(), x.mask.size(1)
        minibatch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        # clipped, approximate KL, ratio, clipped values, squared error, tokens
        sums = torch.zeros(6, device=x.mask.device)
        losses = []

        def actor_sum(rows):
            logprobs, _ = engine.actor(x.tokens[rows], x.attention_mask[rows], x.mask[rows], args.temperature)
            loss, clipped, approxkl = ppo_actor_loss(logprobs, x.logprobs[rows], x.advantages[rows], x.mask[rows],
                                                     args.cliprange)
            ratio = ((logprobs.detach() - x.logprobs[rows]).exp() * x.mask[rows]).sum()
            sums[:3] += torch.stack([clipped, approxkl, ratio])
            return loss

        def critic_sum(rows):
            values = engine.critic(x.tokens[rows], x.attention_mask[rows])[:, -R - 1:-1]
            loss, clipped = critic_loss(values, x.values[rows], x.returns[rows], x.mask[rows], args.cliprange_value)
            squared_error = ((values.detach() - x.returns[rows]).square() * x.mask[rows]).sum()
            sums[3:] += torch.stack([clipped, squared_error, x.mask[rows].sum()])
            return loss

        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(x.tokens)).to(x.tokens.device)
            for minibatch in order.split(minibatch_rows):
                count, = all_sum(x.mask[minibatch].sum())
                micro_batches = minibatch.split(args.per_device_train_batch_size)
                actor_part, actor_norm = train_step(engine.actor, micro_batches, actor_sum, count)
                critic_part, critic_norm = train_step(engine.critic, micro_batches, critic_sum, count)
                losses.append(all_sum(actor_part, critic_part))
                if engine.ema:
                    engine.ema.update()

        clipped, approxkl, ratio, clipped_values, squared_error, tokens = all_sum(*sums)
        total, squares, count = all_sum((x.returns * x.mask).sum(), (x.returns.square() * x.mask).sum(), x.mask.sum())
        variance = squares / count - (total / count) ** 2
        actor_mean, critic_mean = torch.tensor(losses).mean(0).tolist()
        if args.kl_target > 0:
            self.kl_coef = adapt_kl_coef(self.kl_coef, self.metrics["objective/kl"], args.kl_target, self.rows)
        seconds = time.time() - started
        self.metrics.update({
            "ppo/loss/policy": actor_mean, "ppo/loss/value": critic_mean, "ppo/policy/clipfrac": clipped / tokens,
            "ppo/policy/approxkl": approxkl / tokens, "ppo/policy/ratio": ratio / tokens,
            "ppo/val/clipfrac": clipped_values / tokens,
            "ppo/val/var_explained": 1 - squared_error / tokens / max(variance, 1e-8),
            "ppo/returns/mean": total / count, "ppo/policy/grad_norm": actor_norm, "ppo/val/grad_norm": critic_norm,
            "lr": engine.actor.get_lr()[0], "time/train": seconds})
        seconds += self.metrics["time/generate"] + self.metrics["time/score"]
        self.metrics["tokens_per_second"] = self.read / seconds
        return actor_mean, critic_mean


def evaluate(trainer, dataloader, scorer):
    """
    Answers to the held-out prompts, sampled as in training -> ({score, kl (nats a response), gold or None} over all
    ranks, [(record, answer)] of this one).
    """
    sums, answered = [0.0, 0.0, 0.0, 0.0], []
    for batch in dataloader:
        x = trainer.generate_experience(batch)
        answers = list(zip(batch["records"], decode_answers(trainer.engine.tokenizer, x)))
        gold = sum(scorer(record, answer) for record, answer in answers) if scorer else 0.0
        kl = ((x.logprobs - x.ref_logprobs) * x.mask).sum()
        sums = [a + float(b) for a, b in zip(sums, (x.scores.sum(), kl, gold, len(answers)))]
        answered += answers
    score, kl, gold, count = all_sum(*sums)
    return {"score": score / count, "kl": kl / count, "gold": gold / count if scorer else None}, answered


def main(config):
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
    train_set = EncodedDataset(train_records, tokenizer, 3, config.max_prompt_seq_len, log=print0)
    held_set = EncodedDataset(held_records, tokenizer, 3, config.max_prompt_seq_len, log=print0)
    collate = Collator(3, tokenizer.pad_token_id)
    rows = config.per_device_generation_batch_size
    train_loader = make_dataloader(train_set, collate, rows, config.seed, rank, world)
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)

    # -------------------------------------------------------------------------
    # models and optimisers
    engine = DeepSpeedRLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path, tokenizer,
                                 total_steps, config)
    trainer = DeepSpeedPPOTrainer(engine, config)
    done = checkpoints.load({"actor": engine.actor, "critic": engine.critic}, total_steps, trainer)
    updates = rows // (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    print0(f"actor {parameter_count(engine.actor) / 1e6:.1f}M, critic {parameter_count(engine.critic) / 1e6:.1f}M "
           f"parameters; {total_steps} steps of {rows * world} prompts, {config.ppo_epochs} epoch(s) of "
           f"{updates} update(s)")

    # -------------------------------------------------------------------------
    # training
    folder = f"{config.output_dir}/actor"
    log = MetricsLog(folder, total_steps, config.logging_steps,
                     [("score", "objective/scores", "7.3f"), ("kl", "objective/kl", "7.3f"),
                      ("entropy", "objective/entropy", "6.3f"), ("length", "response/length", "5.1f"),
                      ("ended", "response/ended", "5.3f"), ("clipped", "ppo/policy/clipfrac", "6.4f"),
                      ("explained", "ppo/val/var_explained", "6.3f")], engine.actor.monitor, done)
    for step, prompt_batch in training_steps(train_loader, total_steps, done):
        out = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(out)
        log(step, trainer.metrics)
        checkpoints.save(step)

    # -------------------------------------------------------------------------
    # evaluation, a sample, the models
    held, answered = evaluate(trainer, held_loader, gold_scorer(config))
    print0(*(f"\n  {record.prompt[-1]['content'][-300:]}\n  -> {answer}" for record, answer in answered[:3]), sep="\n")
    save_model(engine.actor, tokenizer, folder)
    save_model(engine.critic, tokenizer, f"{config.output_dir}/critic")
    if engine.ema:
        save_model(engine.actor, tokenizer, f"{config.output_dir}/actor_ema", engine.ema.average)
    seconds = checkpoints.seconds + time.time() - began
    write_summary(config, "ppo", {"seconds": seconds, **held}, config.actor_model_name_or_path)
    print0(f"\nstep 3 done in {seconds:.0f} s: held-out score {held['score']:.3f}, KL {held['kl']:.2f} nats a response"
           + (f", gold {held['gold']:.3f}" if held["gold"] is not None else "") + f"; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
