"""
Step 1: supervised fine-tuning (SFT). The model learns to answer as the demonstrations do.

    loss(theta) = - sum_t m_t log p_theta(x_t | x_<t) / sum_t m_t
                                                              Ouyang et al. 2022, section 3.5

over the tokens of prompt and answer, m_t = 1 on the answer's tokens, its EOS included, and 0 on the
prompt and on padding. Of a dialogue that is a demonstration as a whole (`messages`) all answers
have m_t = 1. The sums run over the whole batch of all micro-batches and processes: a token counts
the same wherever it is.

    # `tiny`: a CPU minute
    python step1_sft.py --learning_rate 2e-3 --max_answer_seq_len 40 --max_steps 300 \\
        --length_window 1
    # one GPU
    deepspeed step1_sft.py --model_name_or_path facebook/opt-1.3b --data_path Dahoas/rm-static
    # eight
    deepspeed --num_gpus 8 step1_sft.py --deepspeed_config configs/1node.json \\
        --model_name_or_path facebook/opt-13b --data_path Dahoas/rm-static

Reads   --data_path: prompts with answers (`chosen` of a pair)
Writes  output/sft: a Hugging Face folder and metrics.jsonl; its numbers in output/summary.json

Unlike DeepSpeed-Chat's step 1: the prompt is not trained on unless --train_on_prompt says so;
perplexity is per trained token; batches are as long as their longest row; answers that were cut do
not teach the model to stop.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import load_stage_data, load_tokenizer, training_steps
from hybrid_engine import train_engine, train_step
from support.checkpoints import Checkpoints
from support.dry_run import dry_run
from support.flags import RunConfig, flag
from support.log import MetricsLog, monitors
from support.metrics import check_finite, sample_answers
from support.models import load_language_model, save_model
from support.processes import all_sum, print0, run_stage, setup, to_device
from support.terminal import watched


@dataclass
class Config(RunConfig):
    model_name_or_path: str = flag("tiny", "folder, hub name or tiny: what is fine-tuned")
    learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top", at_least=0)
    length_window: int = flag(32, "micro-batches sorted by length together; 1: random rows",
                              at_least=1)
    train_on_prompt: bool = flag(False, "train on the prompt's tokens too")


# -----------------------------------------------------------------------------
# the maths

def sft_loss(logprobs, mask):
    """Summed negative log-likelihood (nats) of trained tokens; (B, T - 1), of tokens 1 .. T - 1."""
    return -(logprobs * mask).sum()


def batch_loss(model, batch):
    """Batch of data.Collator(1) -> sft_loss of its rows."""
    mask = trained_mask(batch)
    # support.models.LanguageModel returns log-probabilities, which are zero where the mask is zero,
    # and entropies.
    logprobs, _ = model(batch["input_ids"], batch["attention_mask"], mask)
    return sft_loss(logprobs, mask)


def trained_mask(batch):
    """(B, T - 1), of tokens 1 .. T - 1: nothing precedes token 0, so it cannot be predicted."""
    return batch["loss_mask"][:, 1:]


def trained_tokens(batches):
    return sum(trained_mask(batch).sum() for batch in batches)


@torch.no_grad()
def perplexity(model, dataloader):
    """
    exp of the mean nats per trained token, over the held-out rows of all ranks. Token-weighted: not
    a mean of the batches' means.
    """
    nats = 0.0
    tokens = 0.0
    for batch in watched(dataloader, "held-out rows"):
        batch = to_device(batch)
        # A row that is repeated to fill up a rank's share has weight 0.
        batch["loss_mask"] = batch["loss_mask"] * batch["weight"][:, None]
        nats += batch_loss(model, batch)
        tokens += trained_tokens([batch])
    nats, tokens = all_sum(nats, tokens)
    mean = nats / max(tokens, 1)
    if not math.isfinite(mean):
        return mean
    return math.exp(min(mean, 700))  # exp(710) is more than a float holds


# -----------------------------------------------------------------------------
# the stage

def main(config):
    if config.dry_run:
        dry_run(config, "sft")
        return
    began = time.time()
    ds_config = setup(config)
    checkpoints = Checkpoints(config, "sft")
    if checkpoints.finished:
        return
    rank = dist.get_rank()
    world = dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = load_stage_data(config, 1, tokenizer, rank, world, log=print0)
    total_steps = data.total_steps

    # -------------------------------------------------------------------------
    # model, optimiser and learning-rate schedule
    # The sample at the end is a prompt and an answer, which may be longer than a training row.
    sample_len = config.max_prompt_seq_len + config.max_answer_seq_len
    longest = max(config.max_seq_len, sample_len)
    model = load_language_model(config.model_name_or_path, tokenizer, ds_config, longest,
                                lora_config=config)
    engine = train_engine(model, ds_config, config, config.learning_rate, total_steps)
    checkpoints.load({"model": engine}, total_steps)

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    columns = [("loss", "loss", "7.4f"), ("lr", "lr", ".2e"),
               ("tok/s", "tokens_per_second", "7.0f")]
    log = MetricsLog(folder, total_steps, config.logging_steps, columns, monitors(config, "sft"),
                     checkpoints.done, len(data.held_loader), config.eval_steps)

    def evaluate_and_log(step):
        """
        -> {"perplexity": per held-out token, "gold": mean mark of sampled answers, or None}. Saves
        the model after the last step.
        """
        started = time.time()
        numbers = {"perplexity": perplexity(engine, data.held_loader)}
        check_finite("held-out rows", numbers)
        if step == total_steps:
            # Before the answers, because to sample them may need more memory than there is.
            save_model(engine, tokenizer, folder)
        numbers["gold"], answers = sample_answers(model.model, tokenizer, data.held_records, config)
        log.evaluation(step, numbers, answers, time.time() - started)
        return numbers

    for step, batches in training_steps(data.train_loader, total_steps, checkpoints.done):
        started = time.time()
        batches = [to_device(batch) for batch in batches]
        # Loss and gradient are divided by the trained tokens of all micro-batches and ranks.
        [tokens] = all_sum(trained_tokens(batches))
        lr = engine.get_lr()[0]  # before the step, which moves the schedule on
        loss, grad_norm = train_step(
            engine, batches, lambda batch: batch_loss(engine, batch), max(tokens, 1))

        tokens_read = sum(batch["attention_mask"].sum() for batch in batches)
        loss, tokens_read = all_sum(loss, tokens_read)
        log(step, {"loss": loss, "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_second": tokens_read / (time.time() - started)})
        if log.evaluates_after(step):
            evaluate_and_log(step)
        checkpoints.step_done(step)

    # -------------------------------------------------------------------------
    # evaluation, and the model is saved
    held = evaluate_and_log(total_steps)
    seconds = checkpoints.seconds + time.time() - began
    checkpoints.finish({"seconds": seconds, **held}, config.model_name_or_path)
    gold_text = f", gold {held['gold']:.3f}" if held["gold"] is not None else ""
    print0(f"step 1 done in {seconds:.0f} s: held-out perplexity {held['perplexity']:.3f} per "
           f"token{gold_text}; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
