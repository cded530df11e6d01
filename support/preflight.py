"""
Before a PPO run: eight checks on its own models and prompts, in seconds. step3_ppo.py makes them
(--skip_preflight goes without). What goes wrong later is support/doctor.py's.

A user who changes a loss, a mask or a template hears of it here, before hours are spent. A check
returns a sentence that says what is wrong and where to look, or None.
"""

import math
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Collator, encode_records, load_tokenizer, pad, rank_share, render
from support.flags import UsageError
from support.metrics import Sums
from support.models import last_token
from support.processes import all_sum, device, print0, to_device

# Mean nats by which two ways of computing one log-probability may differ. In bf16 a healthy
# SmolLM2-135M is 0.033 from its float32 self, sampler and trainer alike, and 0.04 to 0.05 apart.
# Sampling at temperature 0.9 instead of 1 makes 0.17 there, attending to padding 0.28, dropout of
# 0.05 in attention 0.4, a shift by one token 2.0.
NOISE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
TRIAL = 50  # steps; runs shorter than this only warn about untrained models


@torch.no_grad()
def preflight(trainer, dataloader, records, total_steps):
    """
    What makes PPO fail without a word, looked for on the run's own models and first prompts before
    the first update:

    text        prompts end where the answer begins; actor and reward model see the same dialogue
    dropout     two forwards in training mode agree, be dropout a module or a function
    sampler     the log-probabilities recorded while sampling are the training forward's: the first
                ratio is 1
    reference   actor and reference are one model: KL 0
    padding     more padding on the left changes no log-probability, value or score
    rewards     the mask ends with each answer's EOS; one more score is one more reward there and
                nowhere else; padding has no reward
    ending      EOS is likely after the held-out answers and not inside them, and rollouts end
    preference  the reward model prefers the held-out chosen answers

    trainer     a DeepSpeedPPOTrainer
    dataloader  of data.Collator(3); its first batch is read
    records     held-out Preferences, the same on all ranks
    raises      UsageError with one sentence for each check that failed. The last two judge how well
                models were trained: in a run of fewer than TRIAL steps they only warn, and so does
                a preference that is close to a coin's
    Leaves trainer, models and random state as they were. Collective.
    """
    began = time.time()
    models = trainer.models
    args = trainer.args
    noise = NOISE[next(models.actor.parameters()).dtype]
    with undisturbed(trainer):
        batch = next(iter(dataloader))
        x = trainer.generate_experience(batch)
        sentences = {"text": check_text(models, batch, args)}
        few = some_rows(x)
        sentences.update(check_logprobs(trainer, few, noise))
        sentences["padding"] = check_padding(models, few, noise)
        sentences["rewards"] = check_rewards(trainer, x)
        sentences["ending"] = check_ending(trainer, records)
        sentences["preference"], certain = check_preference(models, records, args)
    failed = {name: sentence for name, sentence in sentences.items() if sentence}

    # Failures stop the run, but those that a lack of training explains only warn.
    only_warn = set()
    if total_steps < TRIAL:
        only_warn = {"ending", "preference"}
    elif not certain:
        only_warn = {"preference"}
    fatal = [f"{name}: {sentence}" for name, sentence in failed.items() if name not in only_warn]
    if fatal:
        raise UsageError("preflight stops the run before any training (--skip_preflight starts it "
                         "as it is).\n  " + "\n  ".join(fatal))
    for name, sentence in failed.items():
        print0(f"preflight: warning: {name}: {sentence}")
    print0(f"preflight: {len(sentences) - len(failed)} checks passed ({time.time() - began:.1f} s)")


@contextmanager
def undisturbed(trainer):
    """
    Inside, rollouts and forwards in training mode. Afterwards the trainer's attributes, the modes
    of the actor's modules and the random state are as before.
    """
    attributes = dict(vars(trainer))
    modes = [(module, module.training) for module in trainer.models.actor.modules()]
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        try:
            trainer.iterations = -1  # the rollout is number 0, whose sampling seed no step has
            yield
        finally:
            vars(trainer).clear()
            vars(trainer).update(attributes)
            for module, mode in modes:
                module.training = mode


def some_rows(x):
    """An Experience -> 8 to 15 of its rows, of all lengths. A wrong forward is wrong in each."""
    by_length = x.attention_mask.sum(1).argsort(stable=True)
    return x.take(by_length[::max(1, len(by_length) // 8)])


def distance(a, b, mask):
    """Mean of |a - b| where the mask is 1, over all ranks. All (B, T)."""
    total, count = all_sum(((a - b).abs() * mask).sum(), mask.sum())
    return total / max(count, 1)


def own_batches(items, args):
    """This rank's rank_share of the items, as many at a time as a rollout has prompts."""
    own = rank_share(items, dist.get_rank(), dist.get_world_size())
    size = args.per_device_generation_batch_size
    for start in range(0, len(own), size):
        yield own[start:start + size]


# -----------------------------------------------------------------------------
# the checks of the first rollout

def check_text(models, batch, args):
    """batch of data.Collator(3) -> sentence or None."""
    tokenizer = models.tokenizer
    reward_tokenizer = tokenizer
    reward_folder = None
    if models.reward_model is not None:
        reward_folder = models.reward_model.model.config.name_or_path
        reward_tokenizer = load_tokenizer(reward_folder)

    unopened = 0
    unlike = 0
    attention_mask = batch["attention_mask"].bool()
    for record, ids, real in zip(batch["records"], batch["input_ids"], attention_mask):
        # The prompt as it stands, opened for an answer, and with an answer.
        dialogue = record.prompt + [{"role": "assistant", "content": "~~~"}]
        closed, whole = render(tokenizer, [record.prompt, dialogue])
        opened, = render(tokenizer, [record.prompt], open_answer=True)

        # In training the model saw all of `expected` before an answer's first word. A prompt that
        # lacks its last words fails only where opening the answer added nothing, because some
        # templates end the user's turn with what opens the answer, and others open an answer with
        # more than a dialogue shows.
        expected = whole[:whole.rindex("~~~")]
        lacking = ""
        if opened == closed and expected.startswith(opened):
            lacking = expected[len(opened):].strip()
        encoded = tokenizer(opened, add_special_tokens=False).input_ids
        if lacking or ids[real].tolist() != encoded:
            unopened += 1
        if render(reward_tokenizer, [dialogue]) != [whole]:
            unlike += 1

    unopened, unlike, rows = all_sum(unopened, unlike, len(batch["records"]))
    if unopened:
        return (f"{unopened:.0f} of {rows:.0f} prompts do not end with the words that open the "
                "assistant's turn, so the model would go on with the user's. Give a chat template "
                "that follows add_generation_prompt by --chat_template (to step 1 too, the model "
                "must have learned it).")
    if unlike:
        return (f"{reward_folder} has another chat template than {args.actor_model_name_or_path}: "
                "it would score dialogues in a form it was not trained on. Train it on this "
                "actor's (step2_reward.py --chat_template), or give the actor the reward model's "
                "by --chat_template.")
    return None


def check_logprobs(trainer, x, noise):
    """The checks of dropout, sampler and reference of an Experience -> {name: sentence or None}."""
    args = trainer.args
    actor = trainer.models.actor
    actor.train()
    inputs = (x.tokens, x.attention_mask, x.mask, args.temperature)
    first, _ = actor(*inputs)
    second, _ = actor(*inputs)
    between_forwards = distance(first, second, x.mask)
    from_old = distance(first, x.logprobs, x.mask)
    from_ref = distance(first, x.ref_logprobs, x.mask)
    # There is no drift with --top_p, because its samples come from another distribution.
    from_sampler = max(from_old, trainer.metrics.get("response/logprob_drift", 0.0))

    sentences = {"dropout": None, "sampler": None, "reference": None}
    if between_forwards > noise:
        sentences["dropout"] = (
            f"two forwards of the actor in training mode differ by {between_forwards:.2g} nats a "
            "token, so something in it is random: set every dropout in its config.json to 0, "
            "functional ones too (disable_dropout in support/models.py).")
    elif from_sampler > noise:
        sentences["sampler"] = (
            f"the log-probabilities of the rollout are {from_sampler:.2g} nats a token from the "
            "training forward's, so the first ratio is not 1: the sampler's weights, temperature, "
            "mask or shift by one token are not the trainer's (--temperature "
            f"{args.temperature}, generate_experience).")
    if from_ref > noise:
        sentences["reference"] = (
            f"actor and reference are {from_ref:.2g} nats a token apart before the first update: "
            "both must be loaded from --actor_model_name_or_path "
            f"{args.actor_model_name_or_path}, dropout off.")
    return sentences


def check_padding(models, x, noise):
    """The Experience's log-probabilities, values and scores, with 8 more columns of padding."""
    # Fewer columns where the model has no positions for 8.
    T = x.tokens.size(1)
    positions = getattr(models.actor.module.config, "max_position_embeddings", None) or T + 8
    more = max(0, min(8, positions - T))
    tokens = F.pad(x.tokens, (more, 0), value=models.tokenizer.pad_token_id)
    attention_mask = F.pad(x.attention_mask, (more, 0))

    logprobs, _ = models.actor(tokens, attention_mask, x.mask, models.args.temperature)
    apart = {"the actor's log-probabilities": distance(logprobs, x.logprobs, x.mask)}
    for name, model in (("the critic's values", models.critic),
                        ("the reward model's scores", models.reward_model)):
        if model is None:
            continue
        plain = model(x.tokens, x.attention_mask)
        padded = model(tokens, attention_mask)[:, more:]
        # Relative to their size, because values have no natural unit.
        size = distance(plain, torch.zeros_like(plain), x.attention_mask)
        apart[name] = distance(plain, padded, x.attention_mask) / (1 + size)

    # "not <=" and not ">", because NaN must fail too
    wrong = [f"{name} by {gap:.2g}" for name, gap in apart.items() if not gap <= noise]
    if wrong:
        return (f"{more} more columns of left padding change {', '.join(wrong)}: positions must be "
                "counted from attention_mask (position_ids in support/models.py) and padding must "
                "not be attended to.")
    return None


def check_rewards(trainer, x):
    """
    Mask and rewards of an Experience against its tokens. The rewards are checked by difference: one
    more score must add one to the reward of the last token and nothing elsewhere. So whatever else
    shape_rewards pays for or charges is left free, but on padding.
    """
    # The mask, from the tokens: it must end with the first EOS, or with the last token that was
    # asked for.
    R = x.mask.size(1)
    asked = trainer.args.max_answer_seq_len
    eos = torch.tensor(trainer.models.eos_token_ids, device=x.tokens.device)
    ends = torch.isin(x.tokens[:, -R:], eos)
    length = torch.where(ends.any(1), ends.int().argmax(1) + 1, asked)
    columns = torch.arange(R, device=x.tokens.device)
    mask = (columns < length[:, None]).float()
    cut_short = (length > R) & (R < asked)
    wrong_mask = (x.mask != mask).any(1) | cut_short

    # The rewards, by the trainer's own function.
    per_token = (x.logprobs, x.ref_logprobs, x.mask)
    rewards = trainer.rewards(x.scores, *per_token)
    one_more = trainer.rewards(x.scores + 1, *per_token) - rewards
    on_last = F.one_hot(length.clamp(max=R) - 1, R)
    misplaced = ((one_more - on_last).abs() > 1e-3).any(1)
    on_padding = (x.rewards * (1 - mask) != 0).any(1)

    wrong_mask, misplaced, on_padding, rows = all_sum(
        wrong_mask.sum(), misplaced.sum(), on_padding.sum(), len(x.tokens))
    if wrong_mask:
        return (f"the response mask of {wrong_mask:.0f} of {rows:.0f} answers does not end with "
                "their EOS: it must mark the response up to and including EOS, and nothing after "
                "it (Rollout.mask, and the trimming in InferenceEngine.generate).")
    if misplaced:
        return (f"the scores of {misplaced:.0f} of {rows:.0f} answers are not on their last token "
                "alone: shape_rewards must add each score once, to the reward of EOS, neither on "
                "padding nor elsewhere.")
    if on_padding:
        return (f"{on_padding:.0f} of {rows:.0f} answers have rewards after their end: what "
                "shape_rewards adds to every token must be multiplied by the mask, because there "
                "is only padding after EOS.")
    return None


# -----------------------------------------------------------------------------
# the checks of the held-out answers

def check_ending(trainer, records):
    """Whether the actor has learned to answer and to stop, and its rollout did stop."""
    models = trainer.models
    args = trainer.args
    numbers = read_answers(models, records, args)
    if numbers is None:
        return None
    nats = numbers["nats"]
    after = numbers["eos_after"]
    inside = numbers["eos_inside"]
    actor = f"--actor_model_name_or_path {args.actor_model_name_or_path}"
    vocabulary = len(models.tokenizer)
    guessing = math.log(vocabulary)
    # The actor must know the answers better than by guessing.
    if nats > 0.9 * guessing:
        return (f"the actor gives the held-out answers {nats:.1f} nats a token, where guessing "
                f"among its {vocabulary} tokens gives {guessing:.1f}: {actor} has the wrong "
                "tokenizer beside it, or is untrained (step1_sft.py).")
    # EOS must be likely after an answer, and less likely inside it.
    if after < max(0.01, 3 * inside):
        return (f"the actor's probability of EOS is {after:.2g} after the held-out answers and "
                f"{inside:.2g} in the middle of them: it has not learned to stop. Train {actor} on "
                "answers that do (step1_sft.py).")
    # Where the actor passes both, some rollouts end too, unless sampling stops at another token
    # or too early.
    nothing_ended = trainer.metrics["response/ended"] == 0
    if nothing_ended and numbers["fits"] > 0.5:
        return (f"no rollout ended within --max_answer_seq_len {args.max_answer_seq_len}, though "
                f"the actor expects EOS after the held-out answers (probability {after:.2g}) and "
                f"most are shorter: eos_token_id {models.eos_token_ids} of {actor}'s "
                "generation_config.json is not what ends its answers, or --max_answer_seq_len is "
                "too small.")
    return None


def read_answers(models, records, args):
    """
    The actor reads up to 32 held-out answers, and the first halves of them -> None where there are
    none, or over all ranks

    nats        mean of -log p of an answer's tokens, its EOS included
    eos_after   mean probability of an end after the answer: of any token that ends a rollout
    eos_inside  mean probability of an end after half of the answer
    fits        share of the answers that are no longer than --max_answer_seq_len
    """
    answered = [record for record in records if record.chosen][:32]
    if not answered:
        return None
    eos = models.tokenizer.eos_token_id
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    items = encode_records(answered, models.tokenizer, 1, longest, log=lambda line: None)
    # Answers that were cut, or of which there is no half, say nothing about their end.
    items = [item for item in items if item["input_ids"][-1] == eos
             and len(item["input_ids"]) > item["prompt_len"] + 2]
    if not items:
        return None

    # The answer's own EOS is among its tokens; other ends take a forward each.
    ends = set(models.eos_token_ids)
    sums = Sums()
    for batch in own_batches(items, args):
        whole = [item["input_ids"] for item in batch]
        halves = []
        counts = []
        for item in batch:
            ids = item["input_ids"]
            middle = (item["prompt_len"] + len(ids)) // 2
            halves.append([*ids[:middle], eos])
            counts.append(len(ids) - item["prompt_len"])
        counts = torch.tensor(counts)
        weight = torch.tensor([item["weight"] for item in batch])  # 0 for a repeated row

        # Whole answers; the mask is 1 on the answer, which stands at the end of its row.
        ids, attention_mask = pad(whole, eos, "left")
        from_end = torch.arange(int(counts.max())).flip(0)
        mask = (from_end < counts[:, None]).float()
        logprobs, _ = models.actor(ids.to(device()), attention_mask.to(device()), mask.to(device()))
        eos_after = probability_of_end(models, whole, ends - {eos})
        if eos in ends:
            eos_after = eos_after + logprobs[:, -1].exp()
        on_device = weight.to(device())
        fits = counts <= args.max_answer_seq_len
        sums.add(nats=-(logprobs.sum(1) * on_device).sum(), tokens=(counts * weight).sum(),
                 eos_after=(eos_after * on_device).sum(),
                 eos_inside=(probability_of_end(models, halves, ends) * on_device).sum(),
                 fits=(fits * weight).sum(), answers=weight.sum())

    total = sums.over_ranks()
    answers = total["answers"]
    return {"nats": total["nats"] / total["tokens"],
            "eos_after": total["eos_after"] / answers,
            "eos_inside": total["eos_inside"] / answers,
            "fits": total["fits"] / answers}


def probability_of_end(models, rows, ends):
    """
    Lists of ids, each ending with an EOS -> (N,): the actor's probability, where that EOS stands,
    of any of `ends`, a set of ids; 0 of none.
    """
    total = torch.zeros(len(rows), device=device())
    for end in ends:
        ids, attention_mask = pad([[*row[:-1], end] for row in rows], end, "left")
        only_last = torch.ones(len(rows), 1, device=device())
        logprobs, _ = models.actor(ids.to(device()), attention_mask.to(device()), only_last)
        total = total + logprobs[:, -1].exp()
    return total


def check_preference(models, records, args):
    """
    Up to 128 held-out pairs, on which a coin gives 0.5 +- 0.04. From 32 on, three standard
    deviations above a coin are enough.

    returns  a sentence where the reward model might be a coin, or None; and whether that is
             certain, because it is not above 0.5
    """
    pairs = [record for record in records if record.chosen and record.rejected][:128]
    reward_model = models.reward_model
    if not pairs or reward_model is None:
        return None, True

    # How often the chosen answer has the higher score; a tie counts half.
    tokenizer = models.tokenizer
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    items = encode_records(pairs, tokenizer, 2, longest, log=lambda line: None)
    collate = Collator(2, tokenizer.pad_token_id)
    sums = Sums()
    for part in own_batches(items, args):
        batch = to_device(collate(part))
        values = reward_model(batch["input_ids"], batch["attention_mask"])
        chosen, rejected = last_token(values, batch["attention_mask"]).chunk(2)
        wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        sums.add(wins=(wins * batch["weight"]).sum(), pairs=batch["weight"].sum())
        total = sums.over_ranks()
        count = total["pairs"]
        accuracy = total["wins"] / count
        if count >= 32 and accuracy >= 0.5 + 1.5 / count**0.5:
            break

    # With fewer than 32 pairs hardly anything can be told, so only what is worse than a coin is
    # spoken of.
    enough = count >= 32
    needed = 0.5
    if enough:
        needed = 0.5 + 1 / count**0.5
    certain = enough and accuracy <= 0.5
    if accuracy >= needed:
        return None, certain
    return (f"the reward model prefers the chosen answer in {accuracy:.2f} of {count:.0f} held-out "
            f"pairs, a coin in 0.5: {reward_model.model.config.name_or_path} is not trained for "
            "these data (step2_reward.py prints its held-out accuracy), or reads them by another "
            "chat template."), certain
