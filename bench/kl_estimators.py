"""
Schulman's estimators of a KL divergence, k1, k2 and k3, on policies of the built-in task, against
sums over the whole vocabulary: as numbers to log, and by the gradients that they give in the loss
and in the reward. bench/results/kl_estimators.md has the formulas and says what is seen.

    bash run_all.sh tiny cpu --output_dir RUN
    OMP_NUM_THREADS=1 python bench/ladder.py RUN --work WORK --only ppo drift
    OMP_NUM_THREADS=1 python bench/kl_estimators.py RUN/sft RUN/actor WORK/drift-1/actor \\
        --runs WORK/ppo-1 WORK/drift-1 --plot bench/results/kl_estimators.png

The answers are sampled from each policy, at temperature 1, to held-out questions. All is float64.
Tables are printed. The picture needs matplotlib. Sources: http://joschu.net/blog/kl-approx.html;
Tang & Munos 2025, arXiv 2506.09477.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/: its kernels.py would stand before kernels/

import torch

ESTIMATORS = ("k1", "k2", "k3", "k3 turned round")


def estimates(log_ratio):
    """
    log_ratio = log pi - log ref of tokens, any shape -> {name: the estimate of each}, nats. The
    last is k3 with pi and ref exchanged in it, which is no estimate of KL(pi || ref).
    """
    d = -log_ratio
    return {"k1": log_ratio, "k2": 0.5 * d.square(), "k3": d.exp() - d - 1,
            "k3 turned round": log_ratio.exp() - log_ratio - 1}


# -----------------------------------------------------------------------------
# answers

@dataclass
class Answers:
    tokens: torch.Tensor          # (B, P + R) int64: prompts left-padded, answers right-padded
    attention_mask: torch.Tensor  # (B, P + R) int64
    mask: torch.Tensor            # (B, R) bool, on the answers' tokens, EOS included

    def split(self, rows):
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            yield Answers(self.tokens[part], self.attention_mask[part], self.mask[part])


def sample_answers(model, tokenizer, folder, prompts, per_prompt):
    """Answers of a policy to held-out questions of the task."""
    from data import Collator, encode_records, load_records
    from hybrid_engine import InferenceEngine
    from step3_ppo import Config
    config = Config(actor_model_name_or_path=folder, max_answer_seq_len=40)
    records = load_records(config, 3, log=lambda line: None)[1][:prompts]
    items = encode_records(records, tokenizer, 3, config.max_prompt_seq_len, log=lambda line: None)
    batch = Collator(3, tokenizer.pad_token_id)(list(items))
    rollout = InferenceEngine(model, vocabulary=len(tokenizer)).generate(
        batch["input_ids"], batch["attention_mask"], max_new_tokens=config.max_answer_seq_len,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, seed=1,
        num_return_sequences=per_prompt)
    prompt_mask = batch["attention_mask"].repeat_interleave(per_prompt, 0)
    attention_mask = torch.cat([prompt_mask, rollout.mask.long()], 1)
    return Answers(rollout.tokens, attention_mask, rollout.mask.bool())


def log_distributions(model, answers, vocabulary):
    """(N, V) log-probabilities of every token at each of the N states before an answer's token."""
    R = answers.mask.size(1)
    logits = model(input_ids=answers.tokens, attention_mask=answers.attention_mask).logits
    return logits[:, -R - 1:-1, :vocabulary][answers.mask].log_softmax(-1)


def per_answer(values, mask):
    """(N,) of all tokens -> (B,) sums over each answer's."""
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values).sum(1)


def move(actor, ref, share):
    """Sets the actor's weights to that share of the way from the reference's to its own."""
    with torch.no_grad():
        for parameter, start in zip(actor.parameters(), ref.parameters()):
            parameter.copy_(start + share * (parameter - start))


# -----------------------------------------------------------------------------
# 1. as numbers

@torch.no_grad()
def values_of(actor, ref, answers, vocabulary):
    """
    -> {name: {mean, error, expectation, std, token_std}}, nats. Per answer: the mean over the
    sampled answers with its standard error, its expectation when each token is drawn anew at the
    states of these answers, and the standard deviation of one answer's estimate. Per token: the
    deviation of a token's estimate at its state, in the mean over states (root mean square). The
    name "exact" is the sum over the vocabulary at each state, summed over an answer.
    """
    found = {}

    def add(name, key, value):
        found.setdefault(name, {}).setdefault(key, []).append(value)

    for part in answers.split(64):
        log_pi = log_distributions(actor, part, vocabulary)
        log_ratio = log_pi - log_distributions(ref, part, vocabulary)
        pi = log_pi.exp()
        R = part.mask.size(1)
        chosen = part.tokens[:, -R:][part.mask][:, None]
        exact = (pi * log_ratio).sum(1)
        add("exact", "answer", per_answer(exact, part.mask))
        for name, k in estimates(log_ratio).items():
            mean = (pi * k).sum(1)
            add(name, "answer", per_answer(k.gather(1, chosen)[:, 0], part.mask))
            add(name, "expected", per_answer(mean, part.mask))
            add(name, "variance", (pi * k.square()).sum(1) - mean.square())
    table = {}
    for name, parts in found.items():
        parts = {key: torch.cat(values) for key, values in parts.items()}
        answer = parts["answer"]
        table[name] = {
            "mean": answer.mean().item(), "std": answer.std().item(),
            "error": answer.std().item() / len(answer) ** 0.5,
            "expectation": parts.get("expected", answer).mean().item(),
            "token_std": parts["variance"].mean().item() ** 0.5 if "variance" in parts else 0.0}
    return table


# -----------------------------------------------------------------------------
# 2. gradients of one token, in the logits

@torch.no_grad()
def token_gradients(actor, ref, answers, vocabulary):
    """
    {(name, place): (cosine, length, noise)}: the expected gradient of one token's estimate, all
    states' logits as one vector, against the gradient of the exact KL: the cosine between them, and
    its length and the deviation of a single sample's gradient in units of the exact one's length.

    A sampled token v gives c(v) grad log pi(v), whose expectation over v is in the logits
    pi (c - E c). In the loss c = dk / dlog pi; in the reward c = k, since a policy gradient
    weighs grad log pi by what a token earns, here -k, and the loss is its negative.
    """
    sums = {}
    exact_square = 0.0
    for part in answers.split(64):
        log_pi = log_distributions(actor, part, vocabulary)
        log_ratio = log_pi - log_distributions(ref, part, vocabulary)
        pi = log_pi.exp()
        k = estimates(log_ratio)
        kl = (pi * log_ratio).sum(1, keepdim=True)
        exact = pi * (log_ratio - kl)
        exact_square += exact.square().sum().item()
        coefficients = {("k1", "loss"): torch.ones_like(pi), ("k2", "loss"): log_ratio,
                        ("k3", "loss"): 1 - (-log_ratio).exp(),
                        ("k1", "reward"): k["k1"], ("k2", "reward"): k["k2"],
                        ("k3", "reward"): k["k3"]}
        # the squared length of grad log pi(v) in the logits, e_v - pi
        score_square = 1 - 2 * pi + pi.square().sum(1, keepdim=True)
        for name, c in coefficients.items():
            mean = pi * (c - (pi * c).sum(1, keepdim=True))
            second_moment = (pi * c.square() * score_square).sum()
            found = torch.stack([(mean * exact).sum(), mean.square().sum(), second_moment])
            sums[name] = sums.get(name, 0) + found
    table = {}
    for name, (dot, square, second_moment) in sums.items():
        length = square.sqrt().item()
        exact_length = exact_square ** 0.5
        cosine = dot.item() / (length * exact_length) if length > 1e-9 * exact_length else None
        noise = (second_moment - square).clamp(min=0).sqrt().item()
        table[name] = (cosine, length / exact_length, noise / exact_length)
    return table


# -----------------------------------------------------------------------------
# 3. gradients of whole answers, in the weights

def answer_gradients(actor, ref, answers, vocabulary):
    """
    The gradient of an answer's expected KL is E[sum_t grad KL_t + sum_t grad log pi(y_t) sum_{s>t}
    KL_s], with KL_t over the vocabulary at the state before token t. -> {name: the gradient over
    the answers, in all weights as one vector}: "own" for the first sum, all that a loss per token
    has, "future" for the second, "k3" for the expected gradient of k3 in the loss. One answer's
    KL to come less the mean of that of the other answers' tokens, which changes no expectation.
    """
    parameters = [p for p in actor.parameters() if p.requires_grad]
    totals = {}
    with torch.no_grad():  # the mean KL that is still to come, as a baseline
        to_come = []
        for part in answers.split(64):
            to_come.append(kl_to_come(*both(actor, ref, part, vocabulary)[:2], part.mask))
        baseline = torch.cat(to_come).mean()
    for part in answers.split(32):
        log_pi, log_ratio, chosen = both(actor, ref, part, vocabulary)
        fixed_pi = log_pi.detach().exp()
        future = kl_to_come(log_pi.detach(), log_ratio.detach(), part.mask)
        losses = {"own": (log_pi.exp() * log_ratio).sum(),
                  "future": (log_pi.gather(1, chosen)[:, 0] * (future - baseline)).sum(),
                  "k3": (fixed_pi * estimates(log_ratio)["k3"]).sum()}
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            flat = torch.cat([g.flatten() for g in found])
            totals[name] = totals.get(name, 0) + flat / len(answers.tokens)
    return totals


def both(actor, ref, answers, vocabulary):
    """-> log_pi (N, V), log_ratio (N, V) and the tokens that were sampled (N, 1)."""
    log_pi = log_distributions(actor, answers, vocabulary)
    with torch.no_grad():
        log_ref = log_distributions(ref, answers, vocabulary)
    R = answers.mask.size(1)
    return log_pi, log_pi - log_ref, answers.tokens[:, -R:][answers.mask][:, None]


def kl_to_come(log_pi, log_ratio, mask):
    """(N,): at each token, the exact KL of the states that follow it in its answer."""
    kl = (log_pi.exp() * log_ratio).sum(1)
    grid = torch.zeros(mask.shape, dtype=kl.dtype).masked_scatter(mask, kl)
    from_here = grid.flip(1).cumsum(1).flip(1)
    return (from_here - grid)[mask]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# -----------------------------------------------------------------------------
# what is shown

def print_values(name, table, count):
    exact = table["exact"]["mean"]
    print(f"\n### Values: {name}, {count} answers, exact KL {exact:.4f} nats an answer\n")
    print("| estimate | mean, sampled | expectation | bias | std, one answer | std, one token |")
    print("|---|---:|---:|---:|---:|---:|")
    for key, row in table.items():
        print(f"| {key} | {row['mean']:.4f} ± {row['error']:.4f} | {row['expectation']:.4f} | "
              f"{row['expectation'] - exact:+.4f} | {row['std']:.3f} | {row['token_std']:.3f} |")


def print_token_gradients(name, table):
    print(f"\n### Gradient of a token's estimate: {name}\n")
    print("| estimate | place | cosine with the exact gradient | length | noise of one sample |")
    print("|---|---|---:|---:|---:|")
    for (key, place), (cos, length, noise) in table.items():
        shown = "none" if cos is None else f"{cos:.3f}"
        print(f"| {key} | {place} | {shown} | {length:.3f} | {noise:.2f} |")


def print_answer_gradients(name, halves):
    first, second = halves
    whole = {key: first[key] + second[key] for key in first}
    total = whole["own"] + whole["future"]
    print(f"\n### Gradient of an answer's KL, in the weights: {name}\n")
    print("| part | cosine with the whole gradient | length | cosine between two halves of the "
          "answers |")
    print("|---|---:|---:|---:|")
    rows = {"whole: own + future": (total, first["own"] + first["future"],
                                    second["own"] + second["future"])}
    for key, label in (("own", "own: a loss per token"), ("future", "future"),
                       ("k3", "k3 in the loss")):
        rows[label] = whole[key], first[key], second[key]
    for label, (vector, half, other) in rows.items():
        print(f"| {label} | {cosine(vector, total):.3f} | {(vector.norm() / total.norm()).item():.3f}"
              f" | {cosine(half, other):.3f} |")


def read_evaluations(folder):
    lines = Path(folder, "actor/evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def print_runs(folders):
    print("\n### Runs: KL in nats an answer and gold, at the evaluations\n")
    print("| run | " + " | ".join(f"step {line['step']}" for line in read_evaluations(folders[0]))
          + " |")
    print("|---|" + "---:|" * len(read_evaluations(folders[0])))
    for folder in folders:
        cells = [f"{line['eval/kl']:.2f}, {line['eval/gold']:.3f}"
                 for line in read_evaluations(folder)]
        print(f"| {Path(folder).name} | " + " | ".join(cells) + " |")


def plot(values, gradients, folders, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("kl_estimators.py: error: --plot needs matplotlib; pip install matplotlib")
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    names = ("k1", "k2", "k3")
    width = 0.8 / len(values)
    for number, (name, table) in enumerate(values.items()):
        at = [i + number * width for i in range(len(names))]
        exact = table["exact"]["mean"]
        left.bar(at, [table[k]["token_std"] for k in names], width * 0.9,
                 label=f"{name}, KL {exact:.2g} nats an answer")
    left.set_yscale("log")
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
    left.set_ylabel("std of one token's estimate, nats")
    left.set_title("As numbers: noise", loc="left", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3,
                  loc="outside lower left")

    rows = list(next(iter(gradients.values())))
    for number, table in enumerate(gradients.values()):
        along = [(table[row][0] or 0) * table[row][1] for row in rows]
        middle.barh([i + number * width for i in range(len(rows))], along, width * 0.9)
    middle.axvline(1, color="black", linewidth=0.8)
    middle.set_yticks([i + 0.4 - width / 2 for i in range(len(rows))],
                      [f"{k}, in the {place}" for k, place in rows])
    middle.invert_yaxis()
    middle.set_xlabel("expected gradient along the exact one (1: right)")
    middle.set_title("As gradients", loc="left", fontsize=11)

    gold_axis = right.twinx()
    for folder, style in zip(folders or [], ("-", "--", ":")):
        lines = read_evaluations(folder)
        steps = [line["step"] for line in lines]
        right.plot(steps, [line["eval/kl"] for line in lines], style, color="#2f6fd0",
                   label=f"KL, {Path(folder).name}")
        gold_axis.plot(steps, [line["eval/gold"] for line in lines], style, color="#d9731a",
                       label=f"gold, {Path(folder).name}")
    right.set_xlabel("PPO step")
    right.set_ylabel("KL to the SFT model, nats an answer (blue)")
    gold_axis.set_ylabel("gold, 0 to 1 (orange)")
    gold_axis.set_ylim(0, 1)
    right.set_title("With the KL reward's sign turned round", loc="left", fontsize=11)
    handles = right.get_lines() + gold_axis.get_lines()
    right.legend(handles, [line.get_label() for line in handles], frameon=False, fontsize=8.5,
                 loc="center left", bbox_to_anchor=(0, 0.35))
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", help="folder of the reference")
    parser.add_argument("actors", nargs="+", help="folders of policies")
    parser.add_argument("--between", type=float, metavar="SHARE",
                        help="also a policy whose weights are that share of the way from the "
                             "reference's to the first actor's: one that is near")
    parser.add_argument("--prompts", type=int, default=128, help="held-out questions")
    parser.add_argument("--answers", type=int, default=8, help="to each question")
    parser.add_argument("--runs", nargs="*", help="output folders of step 3 with --eval_steps")
    parser.add_argument("--plot", metavar="FILE", help="also draw them")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM
    from data import load_tokenizer
    from support.models import vocabulary_size
    tokenizer = load_tokenizer(options.sft)
    vocabulary = vocabulary_size(tokenizer)
    ref = AutoModelForCausalLM.from_pretrained(options.sft).double().eval()
    values = {}
    gradients = {}
    policies = [(folder, 1.0) for folder in options.actors]
    if options.between:
        policies.insert(0, (options.actors[0], options.between))
    for folder, share in policies:
        name = "/".join(Path(folder).parts[-2:])
        actor = AutoModelForCausalLM.from_pretrained(folder).eval()
        if share != 1:
            name = f"{share:g} of the way to {name}"
            move(actor, ref, share)
        answers = sample_answers(actor, tokenizer, folder, options.prompts, options.answers)
        actor = actor.double()
        values[name] = values_of(actor, ref, answers, vocabulary)
        print_values(name, values[name], len(answers.tokens))
        gradients[name] = token_gradients(actor, ref, answers, vocabulary)
        print_token_gradients(name, gradients[name])
        # The answers to a prompt stand together, so that every second answer is in either half.
        halves = [Answers(answers.tokens[i::2], answers.attention_mask[i::2], answers.mask[i::2])
                  for i in range(2)]
        print_answer_gradients(name, [answer_gradients(actor, ref, half, vocabulary)
                                      for half in halves])
    if options.runs:
        print_runs(options.runs)
    if options.plot:
        plot(values, gradients, options.runs, options.plot)


if __name__ == "__main__":
    main()
