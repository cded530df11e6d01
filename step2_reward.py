"""
Step 2: the reward model. It learns to give the answer that people prefer the higher score.

    loss(theta) = - log sigmoid( r_theta(x, y_chosen) - r_theta(x, y_rejected) )
                                                               Ouyang et al. 2022, eq. 1; Bradley & Terry 1952

r is read at one place, the last token of the answer (its EOS), which is the place PPO reads it; the mean runs over the
pairs of the whole batch. Scores have no natural zero or unit, so those of the held-out answers are measured at the end,
and their mean and standard deviation go into config.json (`score_mean`, `score_std`), by which PPO normalises.

With --dpo there is no reward model and no step 3: the policy itself is trained on the pairs, by the same loss, with

    r_theta(x, y) = beta log( pi_theta(y | x) / pi_ref(y | x) )              Rafailov et al. 2023, eq. 7 (DPO)

where pi_ref is the model it starts from. The sum over the answer's tokens includes its EOS.

    python step2_reward.py --learning_rate 3e-4 --max_steps 300            # on `tiny`'s output/sft: a CPU minute
    python step2_reward.py --dpo --learning_rate 1e-4 --max_steps 300      # the same minute, without steps 2 and 3
    deepspeed step2_reward.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static      # one GPU
    deepspeed --num_gpus 8 step2_reward.py --deepspeed_config configs/1node.json --model_name_or_path facebook/opt-350m

Reads   --data_path: prompts with a chosen and a rejected answer; a language model (it gets a new head) or reward model
Writes  output/reward: AutoModelForSequenceClassification with one label (--dpo: output/actor, AutoModelForCausalLM);
        metrics.jsonl; numbers in output/summary.json

Unlike DeepSpeed-Chat's step 2: no loss on the positions between the first difference and the end of the padding (there
a longer answer changes the loss by its length alone), answers end with the tokenizer's EOS id, and the score is saved
where Hugging Face looks for it.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench.memory_plan import dry_run, empty_model
from data import (Collator, DataConfig, MicroBatches, UsageError, count_steps, encode_records, flag, load_records,
                  load_tokenizer, make_dataloader, training_steps)
from hybrid_engine import (Checkpoints, EngineConfig, LanguageModel, MetricsLog, RewardModel, adapters_off, add_lora,
                           all_sum, device, frozen_engine, last_token, load_model, parameter_count, print0, run_stage,
                           sample_answers, save_model, setup, to_device, train_engine, train_step, write_summary)


@dataclass
class Config(EngineConfig, DataConfig):
    model_name_or_path: str = flag("", "what becomes the reward model: folder, hub name, tiny; default OUTPUT_DIR/sft")
    learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top")
    dpo: bool = flag(False, "train the policy itself on the pairs (DPO), into output/actor")
    dpo_beta: float = flag(0.1, "beta of DPO, reward units per nat")


def reward_loss(chosen, rejected):
    """Summed Bradley-Terry loss (nats) of pairs of scores, each (B,) float32. Equal scores cost log 2."""
    return -F.logsigmoid(chosen - rejected).sum()


def pair_scores(model, batch):
    """Batch of data.Collator(2) -> scores of the chosen and of the rejected answers, each (B,)."""
    values = model(batch["input_ids"], batch["attention_mask"])
    return last_token(values, batch["attention_mask"]).chunk(2)


def implicit_rewards(model, ref, batch, beta):
    """
    DPO's scores: batch of data.Collator(2) -> beta log(pi / pi_ref) of the chosen and of the rejected answers, each
    (B,), in reward units. Where `ref` is None it is the model with its LoRA adapters off.
    """
    mask = batch["loss_mask"][:, 1:]  # nothing precedes the first token, so it cannot be predicted
    inputs = (batch["input_ids"], batch["attention_mask"], mask)
    with torch.no_grad(), adapters_off(model) if ref is None else nullcontext():
        ref_logprobs = (ref or model)(*inputs)[0]
    return (beta * (model(*inputs)[0] - ref_logprobs).sum(1)).chunk(2)


def calibration_error(margins, bins=10):
    """
    Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(|margin|), the model's certainty about which answer
    is the better one: over bins of certainty between 1/2 and 1, how far the share that it gets right is from it.

    margins  (N,) chosen minus rejected scores; ties count half -> float in [0, 1]
    """
    certainty, right = torch.sigmoid(margins.abs()), 0.5 + 0.5 * margins.sign()
    bin_of = ((2 * certainty - 1) * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=margins.dtype, device=margins.device).index_add(0, bin_of, right - certainty)
    return gaps.abs().sum().item() / len(margins)


@torch.no_grad()
def evaluate(score_pairs, dataloader):
    """
    Over the held-out pairs of all ranks: accuracy (ties count half), loss in nats a pair, calibration_error,
    length_correlation (Pearson's, of a score with its answer's tokens), mean and standard deviation of the scores.

    score_pairs  batch of data.Collator(2) -> scores of the chosen and of the rejected answers, each (B,)
    """
    scored = []
    for batch in map(to_device, dataloader):
        scored.append(torch.stack([*score_pairs(batch), *batch["loss_mask"].sum(1).chunk(2)]).double())
    mine = torch.cat(scored, 1)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]  # a share is as large on every rank
    dist.all_gather(every, mine)
    chosen, rejected, *lengths = torch.cat(every, 1)
    margins, scores = chosen - rejected, torch.cat([chosen, rejected])
    correlation = torch.corrcoef(torch.stack([scores, torch.cat(lengths)]))[0, 1]
    return {"accuracy": (0.5 + 0.5 * margins.sign()).mean().item(),
            "loss": reward_loss(chosen, rejected).item() / len(margins),
            "calibration_error": calibration_error(margins), "length_correlation": correlation.nan_to_num().item(),
            "score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()}


def main(config):
    if config.dpo and not config.dpo_beta > 0:
        raise UsageError(f"--dpo_beta {config.dpo_beta}: over 0 is needed; at 0 the loss is log 2 whatever the "
                         "policy does.")
    if config.dry_run:
        models = {"model": empty_model(config.model_name_or_path, config, "lm" if config.dpo else "score")}
        if config.dpo and not config.only_optimize_lora:
            models["ref"] = empty_model(config.model_name_or_path, config, trained=False)
        pair = 2 * config.max_seq_len  # tokens
        return dry_run(config, models, pair, pair if config.dpo else 0)
    began = time.time()
    settings = setup(config)
    section = "dpo" if config.dpo else "reward"
    checkpoints = Checkpoints(config, section)
    if checkpoints.finished:
        return
    rank, world = dist.get_rank(), dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    train_records, held_records = load_records(config, stage=2, log=print0)
    train_set = encode_records(train_records, tokenizer, 2, config.max_seq_len, log=print0)
    held_set = encode_records(held_records, tokenizer, 2, config.max_seq_len, log=print0)
    collate = Collator(2, tokenizer.pad_token_id)
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    train_loader = make_dataloader(train_set, MicroBatches(collate, parts), rows * parts, config.seed, rank, world)
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)

    # -------------------------------------------------------------------------
    # model and optimiser
    def load(**head):
        return load_model(config.model_name_or_path, tokenizer, settings, config.max_seq_len, **head)

    if config.dpo:  # the reference: a copy, or what the adapters leave as it is
        ref = None if config.only_optimize_lora else frozen_engine(LanguageModel(load()), settings)
        model = LanguageModel(add_lora(load(), config))
    else:
        model = RewardModel(add_lora(load(head="score", score_from_lm=True), config))
    engine = train_engine(model, settings, config, config.learning_rate, total_steps)
    checkpoints.load({"model": engine}, total_steps)

    def score_pairs(batch):
        return implicit_rewards(engine, ref, batch, config.dpo_beta) if config.dpo else pair_scores(engine, batch)

    print0(f"{config.model_name_or_path}: {parameter_count(model) / 1e6:.1f}M parameters, {total_steps} steps")

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    log = MetricsLog(folder, total_steps, config.logging_steps,
                     [("loss", "loss", "7.4f"), ("accuracy", "rewards/accuracies", "6.3f"),
                      ("margin", "rewards/margins", "7.3f"), ("lr", "lr", ".2e"),
                      ("tok/s", "tokens_per_second", "7.0f")], engine.monitor, checkpoints.done)
    for step, batches in training_steps(train_loader, total_steps, checkpoints.done):
        started, sums = time.time(), torch.zeros(3, device=device())
        batches = [to_device(batch) for batch in batches]
        pairs = world * sum(len(batch["input_ids"]) // 2 for batch in batches)

        def loss_sum(batch):
            chosen, rejected = score_pairs(batch)
            sums.add_(torch.stack([(chosen > rejected).sum(), chosen.detach().sum(), rejected.detach().sum()]))
            return reward_loss(chosen, rejected)

        lr = engine.get_lr()[0]
        loss, grad_norm = train_step(engine, batches, loss_sum, pairs)
        loss, read, right, chosen, rejected = all_sum(
            loss, sum(batch["attention_mask"].sum() for batch in batches), *sums)
        log(step, {"loss": loss, "rewards/accuracies": right / pairs, "rewards/chosen": chosen / pairs,
                   "rewards/rejected": rejected / pairs, "rewards/margins": (chosen - rejected) / pairs, "lr": lr,
                   "grad_norm": grad_norm, "tokens_per_second": read / (time.time() - started)})
        checkpoints.save(step)

    # -------------------------------------------------------------------------
    # evaluation, the model
    held = evaluate(score_pairs, held_loader)
    if not config.dpo:
        model.config.score_mean, model.config.score_std = held["score_mean"], held["score_std"]
    save_model(engine, tokenizer, folder)
    if config.dpo:
        held["gold"] = sample_answers(model.model, tokenizer, held_records, config)
    seconds = checkpoints.seconds + time.time() - began
    write_summary(checkpoints, {"seconds": seconds, **held}, config.model_name_or_path)
    print0(f"\nstep 2 done in {seconds:.0f} s: held-out accuracy {held['accuracy']:.3f} on {len(held_set)} pairs, "
           f"calibration error {held['calibration_error']:.3f}, correlation with length "
           f"{held['length_correlation']:.2f}, scores {held['score_mean']:.2f} +- {held['score_std']:.2f}"
           + (f", gold {held['gold']:.3f}" if held.get("gold") is not None else "") + f"; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
