"""
Step 2: the reward model. It learns to give the answer that people prefer the higher score.

    loss(theta) = - log sigmoid( r_theta(x, y_chosen) - r_theta(x, y_rejected) )
                                          Ouyang et al. 2022, eq. 1; Bradley & Terry 1952

r is read at one place, the last token of the answer (its EOS), which is the place PPO reads it; the
mean runs over the pairs of the whole batch. Scores have no natural zero or unit, so those of the
held-out answers are measured at the end, and their mean and standard deviation go into config.json
(`score_mean`, `score_std`), by which PPO normalises.

With --dpo there is no reward model and no step 3: the policy itself is trained on the pairs, by the
same loss, with

    r_theta(x, y) = beta log( pi_theta(y | x) / pi_ref(y | x) )    Rafailov et al. 2023, eq. 7 (DPO)

where pi_ref is the model it starts from. The sum over the answer's tokens includes its EOS.

    # on `tiny`'s output/sft: a CPU minute
    python step2_reward.py --learning_rate 3e-4 --max_steps 300 --length_window 1
    # the same minute, instead of steps 2 and 3
    python step2_reward.py --dpo --learning_rate 1e-4 --max_steps 300
    # one GPU, eight
    deepspeed step2_reward.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static
    deepspeed --num_gpus 8 step2_reward.py --deepspeed_config configs/1node.json \\
        --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static

Reads   --data_path: prompts with a chosen and a rejected answer; a language model (it gets a new
        head) or a reward model
Writes  output/reward: AutoModelForSequenceClassification with one label (--dpo: output/actor,
        AutoModelForCausalLM); metrics.jsonl; numbers in output/summary.json

Unlike DeepSpeed-Chat's step 2: no loss on the positions between the first difference and the end of
the padding (there a longer answer changes the loss by its length alone), a pair's prompt is
computed once, answers end with the tokenizer's EOS id, and the score is saved where Hugging Face
looks for it.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import load_stage_data, load_tokenizer, training_steps
from hybrid_engine import frozen_model, train_engine, train_step
from support.checkpoints import Checkpoints
from support.dry_run import dry_run
from support.flags import RunConfig, UsageError, flag
from support.lora import WithoutAdapters
from support.log import MetricsLog, monitors
from support.metrics import Sums, check_finite, sample_answers
from support.models import last_token, load_language_model, load_reward_model, save_model
from support.processes import print0, run_stage, setup, to_device
from support.terminal import watched


@dataclass
class Config(RunConfig):
    model_name_or_path: str = flag("", "becomes the reward model: folder or hub name; default "
                                       "OUTPUT_DIR/sft")
    learning_rate: float = flag(1e-5, "AdamW's, at the schedule's top", at_least=0)
    length_window: int = flag(32, "micro-batches sorted by length together; 1: random rows",
                              at_least=1)
    dpo: bool = flag(False, "train the policy itself on the pairs (DPO), into output/actor")
    dpo_beta: float = flag(0.1, "beta of DPO, reward units per nat")

    def check(self):
        super().check()
        if self.dpo and not self.dpo_beta > 0:
            raise UsageError(f"--dpo_beta {self.dpo_beta}: over 0 is needed; at 0 the loss is log 2"
                             " whatever the policy does.")


# -----------------------------------------------------------------------------
# the maths

def reward_loss(chosen, rejected):
    """Summed Bradley-Terry loss (nats) of pairs of scores, each (B,) float32. Ties cost log 2."""
    return -F.logsigmoid(chosen - rejected).sum()


def one_row_a_pair(batch):
    """
    Batch of data.Collator(2) -> the same pairs with each prompt once, a third less to compute on
    dialogues. A row is the prompt, the chosen answer, padding, then the prompt's last token again,
    which predicts the first of the rejected answer, that answer, padding.

    input_ids       (B, W) int64
    attention_mask  (B, 1, W, W) bool, [query, key]: what stands before a token and belongs to its
                    own dialogue, so that its values are those of a row by itself
    answer          (B, W) 1.0 on the chosen answer's tokens, 2.0 on the rejected one's, else 0.0
    """
    chosen, rejected = batch["input_ids"].chunk(2)
    chosen_mask, rejected_mask = batch["loss_mask"].chunk(2)
    chosen_real, rejected_real = batch["attention_mask"].chunk(2)
    # (B, 1) column of the prompt's last token, or of the last one before the two rows differ. Where
    # they have no token in common it is the first.
    alike = (chosen == rejected).long().cumprod(1).sum(1, keepdim=True)
    last = (torch.minimum(chosen_mask.argmax(1, keepdim=True), alike) - 1).clamp(min=0)
    C = int(chosen_real.sum(1).max())
    R = int((rejected_real.sum(1, keepdim=True) - last).max())
    columns = last + torch.arange(R, device=last.device)

    def beside(chosen, rejected):
        return torch.cat([chosen[:, :C], F.pad(rejected, (0, R)).gather(1, columns)], 1)

    # The second part of a row does not see the first one's columns from the prompt's last token on.
    query = torch.arange(C + R, device=last.device)[:, None]
    key = query.T
    others = (query >= C) & (key < C) & (key >= last[:, :, None])
    real = beside(chosen_real, rejected_real).bool()
    attention_mask = (key <= query) & ~others & real[:, None]
    answer = beside(chosen_mask, 2 * rejected_mask)
    answer[:, C] = 0  # like token 0: what stands before it in the row does not predict it
    return beside(chosen, rejected), attention_mask[:, None], answer


def pair_scores(model, batch):
    """
    A reward model's scores: batch of data.Collator(2), whose first half are the chosen answers ->
    scores of the chosen and of the rejected answers, each (B,).
    """
    if getattr(model, "takes_any_mask", False):
        input_ids, attention_mask, answer = one_row_a_pair(batch)
        values = model(input_ids, attention_mask)
        return last_token(values, answer == 1), last_token(values, answer == 2)
    values = model(batch["input_ids"], batch["attention_mask"])
    return last_token(values, batch["attention_mask"]).chunk(2)


def implicit_rewards(model, ref, batch, beta):
    """
    DPO's scores: batch of data.Collator(2) -> beta log(pi / pi_ref) of the chosen and of the
    rejected answers, each (B,), in reward units.
    """
    shared = getattr(model, "takes_any_mask", False)
    if shared:
        input_ids, attention_mask, answer = one_row_a_pair(batch)
    else:
        input_ids, attention_mask, answer = (
            batch["input_ids"], batch["attention_mask"], batch["loss_mask"])
    answer = answer[:, 1:]  # nothing precedes token 0, so it cannot be predicted
    inputs = (input_ids, attention_mask, answer)
    with torch.no_grad():
        ref_logprobs, _ = ref(*inputs)
    logprobs, _ = model(*inputs)
    # Both are zero outside of the answers.
    log_ratios = beta * (logprobs - ref_logprobs)
    if shared:
        return (log_ratios * (answer == 1)).sum(1), (log_ratios * (answer == 2)).sum(1)
    return log_ratios.sum(1).chunk(2)


def calibration_error(margins, bins=10):
    """
    Expected calibration error (Guo et al. 2017, eq. 3) of sigmoid(|margin|), the model's certainty
    about which answer is the better one: over bins of certainty between 1/2 and 1, how far the
    share that it gets right is from its certainty.

    margins  (N,) chosen minus rejected scores; ties count half -> float in [0, 1]
    """
    certainty = torch.sigmoid(margins.abs())
    right = 0.5 + 0.5 * margins.sign()
    bin_of = ((2 * certainty - 1) * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=margins.dtype, device=margins.device)
    gaps = gaps.index_add(0, bin_of, right - certainty)
    return gaps.abs().sum().item() / len(margins)


@torch.no_grad()
def evaluate(score_pairs, dataloader):
    """
    Over the held-out pairs of all ranks: accuracy (ties count half), loss in nats per pair,
    calibration_error, length_correlation (Pearson's, of a score with its answer's tokens), mean and
    standard deviation of the scores.

    score_pairs  batch of data.Collator(2) -> scores of the chosen and of the rejected answers
    raises       UsageError, on all ranks, for scores that are no finite numbers
    """
    # Scores, lengths and weights of this rank's pairs: five rows, one column a pair.
    parts = []
    for batch in watched(dataloader, "held-out pairs"):
        batch = to_device(batch)
        chosen, rejected = score_pairs(batch)
        chosen_length, rejected_length = batch["loss_mask"].sum(1).chunk(2)
        weight = batch.get("weight", torch.ones_like(chosen))
        rows = torch.stack([chosen, rejected, chosen_length, rejected_length, weight])
        parts.append(rows.double())
    own = torch.cat(parts, 1)

    # Those of all ranks, whose shares are equally large, without the pairs that only fill them.
    shares = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, own)
    pairs = torch.cat(shares, 1)
    chosen, rejected, chosen_length, rejected_length, _ = pairs[:, pairs[-1] > 0]

    scores = torch.cat([chosen, rejected])
    check_finite("held-out pairs", {"sum of the scores": scores.sum().item()})
    margins = chosen - rejected
    lengths = torch.cat([chosen_length, rejected_length])
    correlation = torch.corrcoef(torch.stack([scores, lengths]))[0, 1]
    return {"accuracy": (0.5 + 0.5 * margins.sign()).mean().item(),
            "loss": reward_loss(chosen, rejected).item() / len(margins),
            "calibration_error": calibration_error(margins),
            "length_correlation": correlation.nan_to_num().item(),
            "score_mean": scores.mean().item(),
            "score_std": scores.std(correction=0).item()}


# -----------------------------------------------------------------------------
# what is trained: a reward model, or with --dpo the policy itself

def load_for_reward(config, tokenizer, ds_config):
    """-> the reward model to train, and f(engine, batch) that gives its scores of pairs."""
    model = load_reward_model(config.model_name_or_path, tokenizer, ds_config, config.max_seq_len,
                              allow_new_head=True, lora_config=config)
    return model, pair_scores


def load_for_dpo(config, tokenizer, ds_config):
    """
    -> the policy to train, and f(engine, batch) that gives its implicit rewards of pairs. With
    --only_optimize_lora the reference is the policy without its adapters.
    """
    ref = None
    if not config.only_optimize_lora:
        ref = load_language_model(config.model_name_or_path, tokenizer, ds_config,
                                  config.max_seq_len)
        ref = frozen_model(ref, ds_config)
    model = load_language_model(config.model_name_or_path, tokenizer, ds_config, config.max_seq_len,
                                lora_config=config)

    def score_pairs(engine, batch):
        return implicit_rewards(engine, ref or WithoutAdapters(engine), batch, config.dpo_beta)

    return model, score_pairs


# -----------------------------------------------------------------------------
# the stage

def main(config):
    section = "dpo" if config.dpo else "reward"
    if config.dry_run:
        dry_run(config, section)
        return
    began = time.time()
    ds_config = setup(config)
    checkpoints = Checkpoints(config, section)
    if checkpoints.finished:
        return
    rank = dist.get_rank()
    world = dist.get_world_size()

    # -------------------------------------------------------------------------
    # data
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = load_stage_data(config, 2, tokenizer, rank, world, log=print0)
    total_steps = data.total_steps

    # -------------------------------------------------------------------------
    # model, optimiser and learning-rate schedule
    load_models = load_for_dpo if config.dpo else load_for_reward
    model, score_pairs = load_models(config, tokenizer, ds_config)
    engine = train_engine(model, ds_config, config, config.learning_rate, total_steps)
    checkpoints.load({"model": engine}, total_steps)

    # -------------------------------------------------------------------------
    # training
    folder = checkpoints.folder
    columns = [("loss", "loss", "7.4f"), ("accuracy", "rewards/accuracies", "6.3f"),
               ("margin", "rewards/margins", "7.3f"), ("lr", "lr", ".2e"),
               ("tok/s", "tokens_per_second", "7.0f")]
    log = MetricsLog(folder, total_steps, config.logging_steps, columns, monitors(config, section),
                     checkpoints.done, len(data.held_loader), config.eval_steps)

    def evaluate_and_log(step):
        """
        -> evaluate's numbers; of a policy also gold, the mean mark of its answers, or None. Saves
        the model after the last step.
        """
        started = time.time()
        numbers = evaluate(lambda batch: score_pairs(engine, batch), data.held_loader)
        if step == total_steps:
            if not config.dpo:
                model.config.score_mean = numbers["score_mean"]
                model.config.score_std = numbers["score_std"]
            # Before the answers, because to sample them may need more memory than there is.
            save_model(engine, tokenizer, folder)
        answers = []
        if config.dpo:
            numbers["gold"], answers = sample_answers(model.model, tokenizer, data.held_records,
                                                      config)
        log.evaluation(step, numbers, answers, time.time() - started)
        return numbers

    pairs = world * config.per_device_train_batch_size * config.gradient_accumulation_steps
    for step, batches in training_steps(data.train_loader, total_steps, checkpoints.done):
        started = time.time()
        sums = Sums()

        def batch_loss(batch):
            chosen, rejected = score_pairs(engine, batch)
            ties_count_half = 0.5 + 0.5 * (chosen - rejected).detach().sign()
            sums.add(right=ties_count_half.sum(), chosen=chosen.detach().sum(),
                     rejected=rejected.detach().sum(), tokens=batch["attention_mask"].sum())
            return reward_loss(chosen, rejected)

        # Loss and gradient are divided by the pairs of all micro-batches and ranks.
        lr = engine.get_lr()[0]  # before the step, which moves the schedule on
        batches = [to_device(batch) for batch in batches]
        loss, grad_norm = train_step(engine, batches, batch_loss, pairs)

        sums.add(loss=loss)
        total = sums.over_ranks()
        log(step, {"loss": total["loss"], "rewards/accuracies": total["right"] / pairs,
                   "rewards/chosen": total["chosen"] / pairs,
                   "rewards/rejected": total["rejected"] / pairs,
                   "rewards/margins": (total["chosen"] - total["rejected"]) / pairs,
                   "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_second": total["tokens"] / (time.time() - started)})
        if log.evaluates_after(step):
            evaluate_and_log(step)
        checkpoints.step_done(step)

    # -------------------------------------------------------------------------
    # evaluation, and the model is saved
    held = evaluate_and_log(total_steps)
    seconds = checkpoints.seconds + time.time() - began
    checkpoints.finish({"seconds": seconds, **held}, config.model_name_or_path)
    gold_text = f", gold {held['gold']:.3f}" if held.get("gold") is not None else ""
    print0(f"step 2 done in {seconds:.0f} s: held-out accuracy {held['accuracy']:.3f} on "
           f"{data.held_count} pairs, calibration error {held['calibration_error']:.3f},\n"
           f"correlation with length {held['length_correlation']:.2f}, scores "
           f"{held['score_mean']:.2f} +- {held['score_std']:.2f}{gold_text}; saved {folder}")


if __name__ == "__main__":
    run_stage(main, Config, __doc__)
