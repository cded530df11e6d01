"""
The run doctor: what a PPO run's metrics say about its health, in plain sentences that name what to
change.

    python support/doctor.py output                         # a run's folder, or
    python support/doctor.py output/actor/metrics.jsonl     # the file itself

step3_ppo.py asks it after every step, and prints what it says. As a command it ends with exit code
1 if it found something, 0 if it did not, and 2 where there is no such run to read.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np


class RunDoctor:
    """
    One plain sentence per anomaly of a PPO run and what to change, from its metrics alone; again
    only if it persists for 200 steps.

    clip        gradient_clipping of the DeepSpeed config; 0: none
    sentences   all that were said, in order
    """

    def __init__(self, clip=0.0):
        self.clip = clip
        self.history = []
        self.said = {}  # kind of anomaly -> step at which it was last spoken of
        self.sentences = []

    def __call__(self, metrics):
        """metrics of one more step, a line of metrics.jsonl -> the new sentences."""
        self.history.append(metrics)
        step = len(self.history)
        new = []
        for kind, sentence in diagnose(self.history, self.clip).items():
            if step - self.said.get(kind, -200) >= 200:
                self.said[kind] = step
                new.append(f"step {metrics.get('step', step)}: {sentence}")
        self.sentences += new
        return new


def diagnose(history, clip=0.0):
    """
    history   list of dicts, the lines of metrics.jsonl up to now
    returns   {kind: sentence} of what is wrong at its end. Thresholds leave room around healthy
              runs: they are meant for runs that fail, and a run that passes them may still be a bad
              one
    """
    broken = [name for name, value in history[-1].items()
              if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        return {"not finite": (
            f"{', '.join(broken[:3])} is not a finite number: the weights are lost. Start again "
            "with a lower learning rate, or in bf16 or fp32 where this was fp16.")}
    steps = len(history)
    found = {}
    if steps >= 5:
        found.update(kl_to_the_reference(history))
        found.update(distance_to_the_old_policy(history))
    if steps >= 20:
        found.update(changes_since_the_start(history))
    if steps >= 50:
        found.update(critic_and_gradients(history, clip))
    if steps >= 20:
        found.update(reward_hacking(history))
        found.update(never_right(history))
    return found


def column(rows, name):
    """One metric of those rows that have it."""
    return np.array([row[name] for row in rows if name in row], float)


# -----------------------------------------------------------------------------
# the diagnoses; each -> {kind: sentence}, empty for a healthy run

def kl_to_the_reference(history):
    found = {}
    kl = column(history[-30:], "objective/kl")
    kl_coef = history[-1].get("objective/kl_coef", 1.0)
    now = kl[-5:].mean()
    # Nats a response from which on the KL is too much: 0.2 a token, but at least 20. Where no
    # penalty holds the actor, 5.
    much = 5
    if kl_coef:
        much = max(20, 0.2 * column(history[-10:], "response/length").mean())
    if now > much:
        text = f"the KL to the reference is {now:.0f} nats a response"
        if kl_coef == 0:
            sentence = f"{text} and --kl_coef is 0: nothing holds the actor; set --kl_coef 0.05."
        elif len(history) < 30 or kl[-15] < 5:
            sentence = (f"{text}, after few steps: --actor_learning_rate is too high; lower it "
                        "tenfold.")
        else:
            sentence = (f"{text}: raise --kl_coef (now {kl_coef:.3g}), or hold it with --kl_target "
                        "10.")
        found["kl runs away"] = sentence

    if len(history) >= 20:
        last = kl[-20:]
        standard_error = last.std(ddof=1) / 20**0.5
        if last.mean() < -max(0.1, 3 * standard_error):
            found["kl negative"] = (
                f"the KL to the reference is {last.mean():.2f} nats a response over 20 steps, and "
                "no true KL is negative: answers are not drawn from the policy whose "
                "log-probabilities are used. Set --top_p 1, and look at --temperature, the mask "
                "and the sampler.")
    return found


def distance_to_the_old_policy(history):
    """How far the sampler is from the trainer, and the trainer from where a rollout found it."""
    found = {}
    last = history[-5:]
    drift = column(last, "response/logprob_drift").sum() / len(last)  # 0 with --top_p
    first_drift = column(history[:1], "response/logprob_drift").sum()
    if drift > min(0.1, max(1e-3, 5 * first_drift)):  # 0.1 as in preflight's NOISE
        found["drift"] = (
            f"the sampler's log-probabilities are {drift:.2g} nats a token from the trainer's: the "
            "sampler does not read the trained weights, or old log-probabilities are of an older "
            "policy. In float32 that is a fault; healthy models in bf16 stay under 0.06.")
    approxkl = column(last, "ppo/policy/approxkl").mean()
    ratio = column(last, "ppo/policy/ratio").mean()
    if approxkl > 0.1 or abs(ratio - 1) > 0.2:
        # A nat a token is another policy: fewer epochs would not mend that.
        remedy = "lower --actor_learning_rate or --ppo_epochs."
        if approxkl > 1:
            remedy = "--actor_learning_rate is too high; lower it tenfold."
        found["ratio"] = (
            f"the actor moves too far within one rollout (approximate KL {approxkl:.2g} nats a "
            f"token, ratio {ratio:.2g}): {remedy}")
    return found


def changes_since_the_start(history):
    """The last 10 steps beside the first 10."""
    found = {}
    first = history[:10]
    last = history[-10:]

    # The actor says the same to everything.
    before = column(first, "objective/entropy").mean()
    now = column(last, "objective/entropy").mean()
    if now < 0.03 * before:
        found["entropy"] = (
            f"entropy collapsed from {before:.2g} to {now:.2g} nats a token: all answers are "
            "becoming one. Raise --kl_coef, lower --actor_learning_rate or stop earlier.")

    # The answers no longer end.
    before = column(first, "response/ended").mean()
    now = column(last, "response/ended").mean()
    if now < before - 0.2:
        found["ended"] = (
            f"{now:.0%} of the answers end with EOS, {before:.0%} did at first: set "
            "--missing_eos_penalty 1, or raise --max_answer_seq_len if they are cut.")

    # The actor gets worse at what is rewarded.
    scores_before = column(first, "objective/scores")
    before = scores_before.mean()
    now = column(last, "objective/scores").mean()
    if now < before - 5 * scores_before.std(ddof=1) - 0.1:
        found["score"] = (
            f"the score fell from {before:.2f} to {now:.2f}: the actor is getting worse by the "
            "reward's own measure. Lower --actor_learning_rate.")

    # The answers grow with the score. Constant scores are left out, because they have no
    # correlation with anything.
    lengths = column(history[-50:], "response/length")
    scores = column(history[-50:], "objective/scores")
    before = column(first, "response/length").mean()
    now = lengths[-10:].mean()
    if len(lengths) == 50 and now > 1.5 * before and scores.std() > 0:
        if np.corrcoef(lengths, scores)[0, 1] > 0.7:
            found["length"] = (
                f"answers grow with the score (from {before:.0f} to {now:.0f} tokens): the reward "
                "may be paying for length. Read some, and see how length and preference go "
                "together in the pairs.")
    return found


def critic_and_gradients(history, clip):
    """50 steps of a useless critic, or of clipped gradients."""
    found = {}
    last = history[-50:]
    explained = column(last, "ppo/val/var_explained")
    if "ppo/val/var_explained" in history[-1] and (explained < 0).all():
        found["critic"] = (
            "the critic has explained less than nothing of the returns for 50 steps "
            "(ppo/val/var_explained under 0): change --critic_learning_rate, and see that the "
            "critic starts from the reward model.")
    for name, model in (("policy", "actor"), ("val", "critic")):
        norms = column(last, f"ppo/{name}/grad_norm")
        if clip and len(norms) == 50 and norms.min() > 2 * clip:
            found[f"{name} clipped"] = (
                f"the {model}'s gradient has been clipped at every one of 50 steps (norm "
                f"{np.median(norms):.2g}, gradient_clipping {clip:g}), so its length is lost: "
                "raise gradient_clipping in the DeepSpeed config, or make batches larger; "
                f"--{model}_learning_rate then means what it says.")
    return found


def reward_hacking(history):
    """The learned score rises while gold, the exact mark, falls from its best."""
    gold = column(history, "objective/gold")
    scores = column(history, "objective/scores")
    if len(gold) < len(history):
        return {}  # the task has no exact marks
    means = np.convolve(gold, np.ones(10) / 10, "valid")  # of 10 steps each
    best = int(means.argmax())
    best_gold = means[best]
    gold_now = means[-1]
    score_then = scores[best:best + 10].mean()
    score_now = scores[-10:].mean()
    gold_error = gold[-10:].std(ddof=1) / 10**0.5
    score_error = scores[-10:].std(ddof=1) / 10**0.5
    gold_fell = best_gold - gold_now > max(0.1, 6 * gold_error)
    score_rose = score_now - score_then > 2 * score_error
    if not (gold_fell and score_rose):
        return {}
    return {"reward hacking": (
        f"since step {best + 10} the learned score rose from {score_then:.2f} to {score_now:.2f} "
        f"while gold fell from {best_gold:.2f} to {gold_now:.2f}: the actor exploits the reward "
        "model. Raise --kl_coef, stop earlier, or train the reward model on such answers.")}


def never_right(history):
    """The learned score rises while gold, the exact mark, has never left zero."""
    gold = column(history, "objective/gold")
    scores = column(history, "objective/scores")
    if len(gold) < len(history):
        return {}  # the task has no exact marks
    score_then = scores[:10].mean()
    score_now = scores[-10:].mean()
    spread = max(scores[:10].std(ddof=1), scores[-10:].std(ddof=1))
    score_rose = score_now - score_then > max(0.1, 2 * spread)
    some_were_right = gold.max() > 0.01
    if some_were_right or not score_rose:
        return {}
    return {"never right": (
        f"the score rose from {score_then:.2f} to {score_now:.2f} while gold stayed at "
        f"{gold[-10:].mean():.2f}: no answer is right, so the score is paid for something else. "
        "PPO makes right answers likelier only where the SFT model gives some; read what it says, "
        "and train step 1 longer or with a higher --learning_rate.")}


# -----------------------------------------------------------------------------
# the command

def fail(sentence):
    print(f"doctor.py: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", help="metrics.jsonl of a PPO run, or the run's --output_dir")
    parser.add_argument("--gradient_clipping", type=float, default=1.0,
                        help="of the run's DeepSpeed JSON; 0: none")
    args = parser.parse_args()
    path = Path(args.metrics)
    if path.is_dir():
        # The folder of a run, or that of its actor.
        run = path
        path = run / "actor" / "metrics.jsonl"
        if not path.exists():
            path = run / "metrics.jsonl"
        if not path.exists():
            fail(f"{run} holds no actor/metrics.jsonl, which step3_ppo.py writes; name the "
                 "--output_dir of a run, or the file.")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read as metrics.jsonl ({error}).")
    if not lines:
        fail(f"{path} is empty: the run has not done a step.")
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or "objective/kl" not in line:
            fail(f"{path} is not of a PPO run (objective/kl is missing); step3_ppo.py writes such "
                 "a file beside the actor.")
        for name, value in line.items():
            if not isinstance(value, (int, float)):
                fail(f"{path}, line {number}: {name} is {value!r}, and a number is needed.")

    # The doctor reads the run step by step, as it would have while the run went on.
    doctor = RunDoctor(args.gradient_clipping)
    for line in lines:
        for sentence in doctor(line):
            print(sentence)
    said = "nothing to report"
    if doctor.sentences:
        said = f"{len(doctor.sentences)} sentence(s)"
    print(f"{len(doctor.history)} steps, {said}")
    sys.exit(1 if doctor.sentences else 0)


if __name__ == "__main__":
    main()
