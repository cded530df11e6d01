"""
Before a PPO run: eight checks on its own models and prompts, in seconds. step3_ppo.py makes them (--skip_preflight goes
without); what goes wrong later is support/doctor.py's.

A user who changes a loss, a mask or a template hears of it here, before hours are spent.
"""

import math
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Collator, encode_records, load_tokenizer, pad, rank_share, render
from support.flags import UsageError
from support.models import last_token
from support.processes import all_sum, device, print0, to_device

NOISE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}  # mean nats between two ways to one number
TRIAL = 50  # steps; in a shorter run untrained models are normal: they are spoken of, and stop nothing


@contextmanager
def undisturbed(trainer):
    """Inside, rollouts and forwards in training mode; afterwards counters, modes and random state are as before."""
    state, cuda = dict(vars(trainer)), [torch.cuda.current_device()] if torch.cuda.is_available() else []
    modes = [(module, module.training) for module in trainer.models.actor.modules()]
    with torch.random.fork_rng(devices=cuda):
        try:
            trainer.iterations = -1  # rollout 0: a sampling seed that no step has
            yield
        finally:
            vars(trainer).clear()
            vars(trainer).update(state)
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def preflight(trainer, dataloader, records, total_steps):
    """
    What makes PPO fail without a word, looked for on the run's own models and first prompts before the first update:

    text        prompts end where the answer begins; actor and reward model see the same dialogue
    dropout     two forwards in training mode agree, be dropout a module or a function
    sampler     the log-probabilities recorded while sampling are the training forward's: the first ratio is 1
    reference   actor and reference are one model: KL 0
    padding     more padding on the left changes no log-probability, value or score
    rewards     the mask ends with each answer's EOS; the score stands there, and nothing on padding
    ending      EOS is likely after the held-out answers and not inside them, and rollouts end
    preference  the reward model prefers the held-out chosen answers

    dataloader  of data.Collator(3); its first batch is read
    records     held-out Preferences, the same on all ranks
    raises      UsageError with one sentence for each check that failed. The last two judge how well models were
                trained: in a run of fewer than TRIAL steps they only warn, and so does a preference that is close to
                a coin's
    Leaves trainer, models and random state as they were. Collective.
    """
    began, engine, args = time.time(), trainer.models, trainer.args
    with undisturbed(trainer):
        batch = next(iter(dataloader))
        x = trainer.generate_experience(batch)
        noise = NOISE[next(engine.actor.parameters()).dtype]
        found = {"text": check_text(engine, batch, args), **check_logprobs(trainer, x, noise),
                 "padding": check_padding(engine, x, noise), "rewards": check_rewards(engine, x, args),
                 "ending": check_ending(trainer, records)}
        found["preference"], certain = check_preference(engine, records, args)
    mild = {"ending", "preference"} if total_steps < TRIAL else set() if certain else {"preference"}
    failed = [f"{name}: {sentence}" for name, sentence in found.items() if sentence and name not in mild]
    if failed:
        raise UsageError("preflight stops the run before any training (--skip_preflight starts it as it is).\n  "
                         + "\n  ".join(failed))
    for name, sentence in found.items():
        if sentence and name in mild:
            print0(f"preflight: warning: {name}: {sentence}")
    passed = sum(not sentence for sentence in found.values())
    print0(f"preflight: {passed} checks passed ({time.time() - began:.1f} s)")


def distance(a, b, mask):
    """Mean of |a - b| where the mask is 1, over all ranks."""
    total, count = all_sum(((a - b).abs() * mask).sum(), mask.sum())
    return total / max(count, 1)


def own_batches(items, args):
    """This rank's share of the items, as many at a time as a rollout has prompts."""
    mine, size = rank_share(items, dist.get_rank(), dist.get_world_size()), args.per_device_generation_batch_size
    return (mine[i:i + size] for i in range(0, len(mine), size))


def check_text(engine, batch, args):
    tokenizer, folder = engine.tokenizer, engine.reward_model and engine.reward_model.model.config.name_or_path
    reader = load_tokenizer(folder) if folder else tokenizer
    unopened = unlike = 0
    for record, ids, real in zip(batch["records"], batch["input_ids"], batch["attention_mask"].bool()):
        dialogue = record.prompt + [{"role": "assistant", "content": "~~~"}]
        closed, whole = render(tokenizer, [record.prompt, dialogue])
        text, = render(tokenizer, [record.prompt], open_answer=True)
        opening = whole[:whole.rindex("~~~")]  # all that the model has seen before an answer's first word
        # some templates' user turns end in what opens the answer, others add more to open it than the dialogue shows
        bare = text == closed and opening.startswith(text) and opening[len(text):].strip()
        unopened += bool(bare) or ids[real].tolist() != tokenizer(text, add_special_tokens=False).input_ids
        unlike += render(reader, [dialogue]) != [whole]
    unopened, unlike, rows = all_sum(unopened, unlike, len(batch["records"]))
    if unopened:
        return (f"{unopened:.0f} of {rows:.0f} prompts do not end with the words that open the assistant's turn, so "
                "the model would go on with the user's. Give a chat template that follows add_generation_prompt by "
                "--chat_template (to step 1 too, the model must have learned it).")
    if unlike:
        return (f"{folder} has another chat template than {args.actor_model_name_or_path}: it "
                "would score dialogues in a form it was not trained on. Train it on this actor's (step2_reward.py "
                "--chat_template), or give the actor the reward model's by --chat_template.")


def check_logprobs(trainer, x, noise):
    """The checks of dropout, sampler and reference -> {name: sentence or None}."""
    engine, args = trainer.models, trainer.args
    engine.actor.train()
    first, second = (engine.actor(x.tokens, x.attention_mask, x.mask, args.temperature)[0] for _ in range(2))
    random, old, kl = (distance(a, b, x.mask) for a, b in ((first, second), (first, x.logprobs),
                                                           (x.logprobs, x.ref_logprobs)))
    drift = trainer.metrics["response/logprob_drift"]  # 0 with --top_p: the sampler's are then of another distribution
    return {
        "dropout": random > noise and
        f"two forwards of the actor in training mode differ by {random:.2g} nats a token, so something in it is "
        "random: set every dropout in its config.json to 0, functional ones too (disable_dropout in hybrid_engine.py).",
        "sampler": random <= noise < max(old, drift) and
        f"the log-probabilities of the rollout are {max(old, drift):.2g} nats a token from the training forward's, so "
        "the first ratio is not 1: the sampler's weights, temperature, mask or shift by one token are not the "
        f"trainer's (--temperature {args.temperature}, generate_experience).",
        "reference": kl > noise and
        f"actor and reference are {kl:.2g} nats a token apart before the first update: both must be loaded from "
        f"--actor_model_name_or_path {args.actor_model_name_or_path}, dropout off."}


def check_padding(engine, x, noise):
    """Rows with 8 more columns of padding, as far as the model has positions: log-probabilities, values, scores."""
    positions = getattr(engine.actor.module.config, "max_position_embeddings", None) or x.tokens.size(1) + 8
    more = max(0, min(8, positions - x.tokens.size(1)))
    tokens = F.pad(x.tokens, (more, 0), value=engine.tokenizer.pad_token_id)
    attention_mask = F.pad(x.attention_mask, (more, 0))
    logprobs, _ = engine.actor(tokens, attention_mask, x.mask, engine.args.temperature)
    apart = {"the actor's log-probabilities": distance(logprobs, x.logprobs, x.mask)}
    for name, model in (("the critic's values", engine.critic), ("the reward model's scores", engine.reward_model)):
        if model is None:
            continue
        plain, padded = model(x.tokens, x.attention_mask), model(tokens, attention_mask)[:, more:]
        unit = 1 + distance(plain, torch.zeros_like(plain), x.attention_mask)  # values have no natural one
        apart[name] = distance(plain, padded, x.attention_mask) / unit
    wrong = [f"{name} by {gap:.2g}" for name, gap in apart.items() if not gap <= noise]
    return wrong and (f"{more} more columns of left padding change {', '.join(wrong)}: positions must be counted from "
                      "attention_mask (position_ids in hybrid_engine.py) and padding must not be attended to.")


def check_rewards(engine, x, args):
    P, R = x.tokens.size(1) - x.mask.size(1), x.mask.size(1)
    ends = torch.isin(x.tokens[:, P:], torch.tensor(engine.eos_token_ids, device=x.tokens.device))
    # what the mask must be, from the tokens: up to the first EOS, or all that was to be generated
    length = torch.where(ends.any(1), ends.int().argmax(1) + 1, args.max_answer_seq_len)
    expected = (torch.arange(R, device=ends.device) < length[:, None]).float()
    penalised = x.scores - args.missing_eos_penalty * (~ends.any(1))
    on_last = F.one_hot(length.clamp(max=R) - 1, R) * penalised[:, None]
    without_kl = x.rewards + args.kl_coef * (x.logprobs - x.ref_logprobs) * x.mask
    masks, misplaced, rows = all_sum(((x.mask != expected).any(1) | (length > R) & (R < args.max_answer_seq_len)).sum(),
                                     ((without_kl - on_last).abs() > 1e-3).any(1).sum(), len(x.tokens))
    if masks:
        return (f"the response mask of {masks:.0f} of {rows:.0f} answers does not end with their EOS: it must mark the "
                "response up to and including EOS, and nothing after it (Rollout.mask, pack in InferenceEngine).")
    return misplaced and (f"the scores of {misplaced:.0f} of {rows:.0f} answers are not on their last token alone: "
                          "shape_rewards must put them on EOS, neither on padding nor elsewhere.")


def check_ending(trainer, records):
    """From prompt + answer + EOS, and prompt + half of the answer + EOS, of up to 64 held-out answers."""
    engine, args, V = trainer.models, trainer.args, len(trainer.models.tokenizer)
    eos, longest = engine.tokenizer.eos_token_id, args.max_prompt_seq_len + args.max_answer_seq_len
    answered = [record for record in records if record.chosen][:64]
    ended = trainer.metrics["response/ended"]
    items = encode_records(answered, engine.tokenizer, 1, longest, log=lambda line: None) if answered else []
    items = [item for item in items if item["input_ids"][-1] == eos and len(item["input_ids"]) > item["prompt_len"] + 2]
    if not items:
        return
    sums = [0.0] * 6
    for part in own_batches(items, args):
        texts, starts = [item["input_ids"] for item in part], [item["prompt_len"] for item in part]
        halves = [[*ids[:(start + len(ids)) // 2], eos] for ids, start in zip(texts, starts)]
        counts = torch.tensor([len(ids) - start for ids, start in zip(texts, starts)])
        answers = torch.arange(int(counts.max())).flip(0) < counts[:, None]
        ids, attention_mask = (t.to(device()) for t in pad(texts, eos, "left"))
        logprobs, _ = engine.actor(ids, attention_mask, answers.float().to(device()))
        ids, attention_mask = (t.to(device()) for t in pad(halves, eos, "left"))
        inside, _ = engine.actor(ids, attention_mask, torch.ones_like(ids[:, -1:]).float())
        fits = (counts <= args.max_answer_seq_len).sum()
        batch_sums = logprobs[:, -1].exp().sum(), inside.exp().sum(), fits, logprobs.sum(), counts.sum(), len(part)
        sums = [a + b for a, b in zip(sums, batch_sums)]
    after, inside, fits, nats, tokens, rows = all_sum(*sums)
    after, inside, fits, nats = after / rows, inside / rows, fits / rows, -nats / tokens
    actor = f"--actor_model_name_or_path {args.actor_model_name_or_path}"
    if nats > 0.9 * math.log(V):
        return (f"the actor gives the held-out answers {nats:.1f} nats a token, where guessing among its {V} tokens "
                f"gives {math.log(V):.1f}: {actor} has the wrong tokenizer beside it, or is untrained (step1_sft.py).")
    if after < max(0.01, 3 * inside):
        return (f"the actor's probability of EOS is {after:.2g} after the held-out answers and {inside:.2g} in the "
                f"middle of them: it has not learned to stop. Train {actor} on answers that do (step1_sft.py).")
    return ended == 0 and fits > 0.5 and (
        f"no rollout ended within --max_answer_seq_len {args.max_answer_seq_len}, though the actor expects EOS after "
        f"the held-out answers (probability {after:.2g}) and most are shorter: eos_token_id {engine.eos_token_ids} of "
        f"{actor}'s generation_config.json is not what ends its answers, or --max_answer_seq_len is too small.")


def check_preference(engine, records, args):
    """
    Up to 128 held-out pairs, on which a coin gives 0.5 +- 0.04 -> (sentence where it might be one, whether that is
    certain: not above 0.5).
    """
    pairs = [record for record in records if record.chosen and record.rejected][:128]
    if not pairs or engine.reward_model is None:
        return None, True
    items = encode_records(pairs, engine.tokenizer, 2, args.max_prompt_seq_len + args.max_answer_seq_len,
                           log=lambda line: None)
    right, count = 0.0, 0
    for part in own_batches(items, args):
        batch = to_device(Collator(2, engine.tokenizer.pad_token_id)(part))
        chosen, rejected = last_token(engine.reward_model(batch["input_ids"], batch["attention_mask"]),
                                      batch["attention_mask"]).chunk(2)
        right += ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum()
        count += len(part)
    right, count = all_sum(right, count)
    accuracy = right / count
    return accuracy < (0.5 + 1 / count**0.5 if count >= 32 else 0.5) and (  # fewer can hardly tell
        f"the reward model prefers the chosen answer in {accuracy:.2f} of {count:.0f} held-out pairs, a coin in 0.5: "
        f"{engine.reward_model.model.config.name_or_path} is not trained for these data (step2_reward.py prints its held-out "
        "accuracy), or reads them by another chat template."), accuracy <= 0.5 and count >= 32
