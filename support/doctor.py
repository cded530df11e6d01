"""
The run doctor: what a PPO run's metrics say about its health, in plain sentences that name what to change.

    python support/doctor.py output/actor/metrics.jsonl

step3_ppo.py asks it after every step, and prints what it says.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np


class RunDoctor:
    """
    One plain sentence per anomaly of a PPO run and what to change, from its metrics alone; again only if it persists
    for 200 steps.

    clip        gradient_clipping of the DeepSpeed config; 0: none
    sentences   all that were said, in order
    """

    def __init__(self, clip=0.0):
        self.clip, self.history, self.said, self.sentences = clip, [], {}, []

    def __call__(self, metrics):
        """metrics of one more step, a line of metrics.jsonl -> the new sentences."""
        self.history.append(metrics)
        step, new = len(self.history), []
        for kind, sentence in diagnose(self.history, self.clip).items():
            if step - self.said.get(kind, -200) >= 200:
                self.said[kind] = step
                new.append(f"step {metrics.get('step', step)}: {sentence}")
        self.sentences += new
        return new


def diagnose(history, clip=0.0):
    """
    history   list of dicts, the lines of metrics.jsonl up to now
    returns   {kind: sentence} of what is wrong at its end. Thresholds leave room around healthy runs: they are meant
              for runs that fail, and a run that passes them may still be a bad one
    """
    found, n = {}, len(history)
    column = lambda name, part=slice(None): np.array([row[name] for row in history[part] if name in row], float)
    last = lambda name, steps=10: column(name, slice(-steps, None))
    first = lambda name, steps=10: column(name, slice(steps))
    broken = [name for name, value in history[-1].items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        return {"not finite": f"{', '.join(broken[:3])} is not a finite number: the weights are lost. Start again with "
                              "a lower learning rate, or in bf16 or fp32 where this was fp16."}
    kl, kl_coef = column("objective/kl", slice(-30, None)), history[-1].get("objective/kl_coef", 1.0)
    much = max(20, 0.2 * last("response/length").mean()) if kl_coef else 5
    if n >= 5 and kl[-5:].mean() > much:
        text = f"the KL to the reference is {kl[-5:].mean():.0f} nats a response"
        if kl_coef == 0:
            found["kl runs away"] = f"{text} and --kl_coef is 0: nothing holds the actor; set --kl_coef 0.05."
        elif n < 30 or kl[-15] < 5:
            found["kl runs away"] = (f"{text}, after few steps: --actor_learning_rate is too high; lower it tenfold.")
        else:
            found["kl runs away"] = f"{text}: raise --kl_coef (now {kl_coef:.3g}), or hold it with --kl_target 10."
    if n >= 20 and kl[-20:].mean() < -max(0.1, 3 * kl[-20:].std(ddof=1) / 20**0.5):
        found["kl negative"] = (
            f"the KL to the reference is {kl[-20:].mean():.2f} nats a response over 20 steps, and no true KL is "
            "negative: answers are not drawn from the policy whose log-probabilities are used. Set --top_p 1, and look "
            "at --temperature, the mask and the sampler.")
    drift = last("response/logprob_drift", 5)
    if n >= 5 and drift.mean() > min(0.05, max(1e-3, 5 * first("response/logprob_drift", 1).sum())):
        found["drift"] = (
            f"the sampler's log-probabilities are {drift.mean():.2g} nats a token from the trainer's: the sampler does "
            "not read the trained weights, or old log-probabilities are of an older policy. In float32 it is a fault; "
            "in bf16 try fp32 for the head.")
    approxkl, ratio = last("ppo/policy/approxkl", 5), last("ppo/policy/ratio", 5)
    if n >= 5 and (approxkl.mean() > 0.1 or abs(ratio.mean() - 1) > 0.2):
        found["ratio"] = (
            f"the actor moves too far within one rollout (approximate KL {approxkl.mean():.2g} nats a token, ratio "
            f"{ratio.mean():.2g}): lower --actor_learning_rate or --ppo_epochs.")
    if n >= 20:
        found |= compare(first, last)
    if n >= 50 and (last("ppo/val/var_explained", 50) < 0).all() and "ppo/val/var_explained" in history[-1]:
        found["critic"] = (
            "the critic has explained less than nothing of the returns for 50 steps (ppo/val/var_explained under 0): "
            "change --critic_learning_rate, and see that the critic starts from the reward model.")
    for name, flag_name in (("policy", "actor"), ("val", "critic")):
        norms = last(f"ppo/{name}/grad_norm", 50)
        if clip and len(norms) == 50 and norms.min() > 2 * clip:
            found[f"{name} clipped"] = (
                f"the {flag_name}'s gradient has been clipped at every one of 50 steps (norm {np.median(norms):.2g}, "
                f"gradient_clipping {clip:g}), so its length is lost: raise gradient_clipping in the DeepSpeed config, "
                f"or make batches larger; --{flag_name}_learning_rate then means what it says.")
    gold, scores = column("objective/gold"), column("objective/scores")
    if n >= 20 and len(gold) == n:
        means = np.convolve(gold, np.ones(10) / 10, "valid")  # of 10 steps each
        best = int(means.argmax())
        fall, rise = means[best] - means[-1], scores[-10:].mean() - scores[best:best + 10].mean()
        gold_error, score_error = gold[-10:].std(ddof=1) / 10**0.5, scores[-10:].std(ddof=1) / 10**0.5
        if fall > max(0.1, 6 * gold_error) and rise > 2 * score_error:
            found["reward hacking"] = (
                f"since step {best + 10} the learned score rose from {scores[best:best + 10].mean():.2f} to "
                f"{scores[-10:].mean():.2f} while gold fell from {means[best]:.2f} to {means[-1]:.2f}: the actor "
                "exploits the reward model. Raise --kl_coef, stop earlier, or train the reward model on such answers.")
    return found


def compare(first, last):
    """What changed from the first 10 steps to the last 10, as `diagnose` tells it."""
    found = {}
    was, now = first("objective/entropy").mean(), last("objective/entropy").mean()
    if now < 0.03 * was:
        found["entropy"] = (f"entropy collapsed from {was:.2g} to {now:.2g} nats a token: all answers are becoming "
                            "one. Raise --kl_coef, lower --actor_learning_rate or stop earlier.")
    was, now = first("response/ended").mean(), last("response/ended").mean()
    if now < was - 0.2:
        found["ended"] = (f"{now:.0%} of the answers end with EOS, {was:.0%} did at first: set --missing_eos_penalty "
                          "1, or raise --max_answer_seq_len if they are cut.")
    was, now = first("objective/scores"), last("objective/scores")
    if now.mean() < was.mean() - 5 * was.std(ddof=1) - 0.1:
        found["score"] = (f"the score fell from {was.mean():.2f} to {now.mean():.2f}: the actor is getting worse by "
                          "the reward's own measure. Lower --actor_learning_rate.")
    lengths, scores = last("response/length", 50), last("objective/scores", 50)
    was, now = first("response/length").mean(), lengths[-10:].mean()
    if len(lengths) == 50 and now > 1.5 * was and scores.std() > 0 and np.corrcoef(lengths, scores)[0, 1] > 0.7:
        found["length"] = (f"answers grow with the score (from {was:.0f} to {now:.0f} tokens): the reward may be "
                           "paying for length. Read some, and see how length and preference go together in the pairs.")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", help="metrics.jsonl of a PPO run")
    parser.add_argument("--gradient_clipping", type=float, default=1.0, help="of the run's DeepSpeed JSON; 0: none")
    args = parser.parse_args()
    path = args.metrics
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"doctor.py: error: {path} cannot be read as metrics.jsonl ({error}).")
    if not all("objective/kl" in line for line in lines):
        sys.exit(f"doctor.py: error: {path} is not of a PPO run (objective/kl is missing); step3_ppo.py writes such a "
                 "file beside the actor.")
    doctor = RunDoctor(args.gradient_clipping)
    for line in lines:
        for sentence in doctor(line):
            print(sentence)
    print(f"{len(doctor.history)} steps, " + (f"{len(doctor.sentences)} sentence(s)" if doctor.sentences else
                                              "nothing to report"))


if __name__ == "__main__":
    main()
