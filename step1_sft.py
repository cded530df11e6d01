"""
Step 1: supervised fine-tuning (SFT). The model learns to answer as the demonstrations do.

    loss(theta) = - sum_t m_t log p_theta(x_t | x_<t) / sum_t m_t                Ouyang et al. 2022, section 3.5

over the tokens of prompt and answer, m_t = 1 on the answer's tokens, its EOS included, and 0 on the prompt and on
padding. The sums run over the whole batch of all micro-batches and processes: a token counts the same wherever it is.

    python step1_sft.py --learning_rate 2e-3 --max_answer_seq_len 40 --max_steps 300     # `tiny`: a CPU minute
    deepspeed step1_sft.py --model_name_or_path facebook/opt-1.3b --data_path Dahoas/rm-static         # one GPU
    deepspeed --num_gpus 8 step1_sft.py --deepspeed_config configs/1node.json --model_name_or_path facebook/opt-13b

Reads   --data_path: prompts with answers (`chosen` of a pair)
Writes  output/sft: a Hugging Face folder and metrics.jsonl; its numbers in output/summary.json

Unlike DeepSpeed-Chat's step 1: the prompt is not trained on unless --train_on_prompt says so; perplexity is per trained
token; batches are as long as their longest row; answers that were cut do not teach the model to stop.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.memory_plan import dry_run, empty_model
from data import (Collator, DataConfig, MicroBatches, count_steps, encode_records, flag, load_records, load_tokenizer,
                  make_dataloader, training_steps)
from hybrid_engine import (Checkpoints, EngineConfig, LanguageModel, MetricsLog, add_lora, all_sum, load_model,
                           parameter_count, print0, run_stage, sample_answers, save_model, setup, to_device,
                           train_engine, train_step, write_summary)


@dataclass
class Config(EngineConfig, DataConfig):
    model_name_or_path: str = flag("tiny", "folder, hub name or tiny: what is fine-tuned")
    learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top")
    train_on_prompt: bool = flag(False, "train on the prompt's tokens too")


def sft_loss(logprobs, mask):
    """Summed negative log-likelihood (nats) of trained tokens; logprobs and mask (B, T - 1), of tokens 1 .. T - 1."""
    return -(logprobs * mask).sum()


def token_nats(model, batch):
    mask = batch["loss_mask"][:, 1:]  # nothing precedes the first token, so it cannot be predicted
    return sft_loss(model(batch["input_ids"], batch["attention_mask"], mask)[0], mask)


def trained_tokens(batches):
    return sum(batch["loss_mask"][:, 1:].sum() for batch in batches)


@torch.no_grad()
def perplexity(model, dataloader):
    """exp of the mean nats per trained token over all held-out rows and ranks: token-weighted, not a mean of means."""
    nats, tokens = 0.0, 0.0
    for batch in map(to_device, dataloader):
        nats += token_nats(model, batch)
        tokens += trained_tokens([batch])
    nats, tokens = all_sum(nats, tokens)
    return math.exp(min(nats / max(tokens, 1), 700))


def main(config):
    if config.dry_run:
        return dry_run(config, {"model": empty_model(config.model_name_or_path, config)}, config.max_seq_len,
                       config.max_seq_len)
    began = time.time()
    settings = setup(config)
    checkpoints = Checkpoints(config, "sft")
    if checkpoints.finished:
        return
    rank, world = dist.get_rank(), dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    train_records, held_records = load_records(config, stage=1, log=print0)
    train_set = encode_records(train_records, tokenizer, 1, config.max_seq_len, log=print0)
    held_set = encode_records(held_records, tokenizer, 1, config.max_seq_len, log=print0)
    collate = Collator(1, tokenizer.pad_token_id, config.train_on_prompt)
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    train_loader = make_dataloader(train_set, MicroBatches(collate, parts), rows * parts, config.seed, rank, world)
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)

    # -------------------------------------------------------------------------
    # model and optimiser
    longest = max(config.max_seq_len, config.max_prompt_seq_len + config.max_answer_seq_len)
    model = LanguageModel(add_lora(load_model(config.model_name_or_path, tokenizer, settings, longest), config))
    engine = train_engine(model, settings, config, config.learning_rate, total_steps)
    checkpoints.load({"model": engine}, total_steps)
    print0(f"{config.model_name_or_path}: {parameter_count(model) / 1e6:.1f}M parameters, {total_steps} steps")

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    log = MetricsLog(folder, total_steps, config.logging_steps,
                     [("loss", "loss", "7.4f"), ("lr", "lr", ".2e"), ("tok/s", "tokens_per_second", "7.0f")],
                     engine.monitor, checkpoints.done)
    for step, batches in training_steps(train_loader, total_steps, checkpoints.done):
        started = time.time()
        batches = [to_device(batch) for batch in batches]
        tokens, = all_sum(trained_tokens(batches))
        lr = engine.get_lr()[0]
        loss, grad_norm = train_step(engine, batches, lambda batch: token_nats(engine, batch), max(tokens, 1))
        loss, read = all_sum(loss, sum(batch["attention_mask"].sum() for batch in batches))
        log(step, {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": read / (time.time() - started)})
        checkpoints.save(step)

    # -------------------------------------------------------------------------
    # evaluation, the model, a sample
    ppl = perplexity(engine, held_loader)
    save_model(engine, tokenizer, folder)
    gold = sample_answers(model.model, tokenizer, held_records, config)
    seconds = checkpoints.seconds + time.time() - began
    write_summary(checkpoints, {"seconds": seconds, "perplexity": ppl, "gold": gold}, config.model_name_or_path)
    print0(f"\nstep 1 done in {seconds:.0f} s: held-out perplexity {ppl:.3f} a token"
           + (f", gold {gold:.3f}" if gold is not None else "") + f"; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
