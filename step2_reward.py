"""
Step 2: the reward model. It learns to give the answer that people prefer the higher score.

    loss(theta) = - log sigmoid( r_theta(x, y_chosen) - r_theta(x, y_rejected) )
                                                               Ouyang et al. 2022, eq. 1; Bradley & Terry 1952

r is read at one place, the last token of the answer (its EOS), which is the place PPO reads it; the mean runs over the
pairs of the whole batch. Scores have no natural zero or unit, so those of the held-out answers are measured at the end,
and their mean and standard deviation go into config.json (`score_mean`, `score_std`), by which PPO normalises.

    python step2_reward.py --learning_rate 3e-4 --max_steps 300            # on `tiny`'s output/sft: a CPU minute
    deepspeed step2_reward.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static      # one GPU
    deepspeed --num_gpus 8 step2_reward.py --deepspeed_config configs/1node.json --model_name_or_path facebook/opt-350m

Reads   --data_path: prompts with a chosen and a rejected answer; a language model (it gets a new head) or reward model
Writes  output/reward: AutoModelForSequenceClassification with one label; metrics.jsonl; numbers in output/summary.json

Unlike DeepSpeed-Chat's step 2: no loss on the positions between the first difference and the end of the padding (there
a longer answer changes the loss by its length alone), answers end with the tokenizer's EOS id, and the score is saved
where Hugging Face looks for it.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Collator, DataConfig, EncodedDataset, MicroBatches, count_steps, flag, load_records, load_tokenizer,
                  make_dataloader, training_steps)
from hybrid_engine import (Checkpoints, EngineConfig, MetricsLog, RewardModel, add_lora, all_sum, last_token,
                           load_model, parameter_count, print0, run_stage, save_model, setup, to_device, train_engine,
                           train_step, write_summary)


@dataclass
class Config(EngineConfig, DataConfig):
    model_name_or_path: str = flag("output/sft", "folder, hub name or tiny: what becomes the reward model")
    learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top")


def reward_loss(chosen, rejected):
    """Summed Bradley-Terry loss (nats) of pairs of scores, each (B,) float32. Equal scores cost log 2."""
    return -F.logsigmoid(chosen - rejected).sum()


def pair_scores(model, batch):
    """Batch of data.Collator(2) -> scores of the chosen and of the rejected answers, each (B,)."""
    values = model(batch["input_ids"], batch["attention_mask"])
    return last_token(values, batch["attention_mask"]).chunk(2)


@torch.no_grad()
def evaluate(model, dataloader):
    """
    Over the held-out pairs of all ranks: accuracy (ties count half), loss in nats a pair, mean and standard deviation
    of the scores.
    """
    right, nats, pairs, total, squares = 0.0, 0.0, 0, 0.0, 0.0
    for batch in map(to_device, dataloader):
        chosen, rejected = pair_scores(model, batch)
        right += ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum()
        nats += reward_loss(chosen, rejected)
        pairs += len(chosen)
        scores = torch.cat([chosen, rejected]).double()
        total, squares = total + scores.sum(), squares + scores.square().sum()
    right, nats, pairs, total, squares = all_sum(right, nats, pairs, total, squares)
    mean = total / (2 * pairs)
    std = max(squares / (2 * pairs) - mean**2, 0) ** 0.5
    return {"accuracy": right / pairs, "loss": nats / pairs, "score_mean": mean, "score_std": std}


def main(config):
    began = time.time()
    settings = setup(config)
    checkpoints = Checkpoints(config, "reward")
    if checkpoints.finished:
        return
    rank, world = dist.get_rank(), dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    train_records, held_records = load_records(config, stage=2, log=print0)
    train_set = EncodedDataset(train_records, tokenizer, 2, config.max_seq_len, log=print0)
    held_set = EncodedDataset(held_records, tokenizer, 2, config.max_seq_len, log=print0)
    collate = Collator(2, tokenizer.pad_token_id)
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    train_loader = make_dataloader(train_set, MicroBatches(collate, parts), rows * parts, config.seed, rank, world)
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)

    # -------------------------------------------------------------------------
    # model and optimiser
    model = load_model(config.model_name_or_path, tokenizer, settings, config.max_seq_len, head="score",
                       score_from_lm=True)
    model = RewardModel(add_lora(model, config))
    engine = train_engine(model, settings, config, config.learning_rate, total_steps)
    done = checkpoints.load({"model": engine}, total_steps)
    print0(f"{config.model_name_or_path}: {parameter_count(model) / 1e6:.1f}M parameters, {total_steps} steps")

    # -------------------------------------------------------------------------
    # training
    folder = f"{config.output_dir}/reward"
    log = MetricsLog(folder, total_steps, config.logging_steps,
                     [("loss", "loss", "7.4f"), ("accuracy", "accuracy", "6.3f"), ("lr", "lr", ".2e"),
                      ("tok/s", "tokens_per_second", "7.0f")], engine.monitor, done)
    for step, batches in training_steps(train_loader, total_steps, done):
        started, right = time.time(), 0
        batches = [to_device(batch) for batch in batches]
        pairs = world * sum(len(batch["input_ids"]) // 2 for batch in batches)

        def loss_sum(batch):
            nonlocal right
            chosen, rejected = pair_scores(engine, batch)
            right += (chosen > rejected).sum()
            return reward_loss(chosen, rejected)

        lr = engine.get_lr()[0]
        loss, grad_norm = train_step(engine, batches, loss_sum, pairs)
        loss, right, read = all_sum(loss, right, sum(batch["attention_mask"].sum() for batch in batches))
        log(step, {"loss": loss, "accuracy": right / pairs, "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_second": read / (time.time() - started)})
        checkpoints.save(step)

    # -------------------------------------------------------------------------
    # evaluation, the model
    held = evaluate(engine, held_loader)
    model.config.score_mean, model.config.score_std = held["score_mean"], held["score_std"]
    save_model(engine, tokenizer, folder)
    seconds = checkpoints.seconds + time.time() - began
    write_summary(config, "reward", {"seconds": seconds, **held}, config.model_name_or_path)
    print0(f"\nstep 2 done in {seconds:.0f} s: held-out accuracy {held['accuracy']:.3f} on {len(held_set)} pairs, "
           f"scores {held['score_mean']:.2f} +- {held['score_std']:.2f}; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
