"""
A real chat model on a laptop's CPU: SmolLM2-135M-Instruct through all three stages, and what became better and worse.

    pip install pyphen
    python bench/chat_model.py polite MODEL PAIRS TEXT --seeds 1234 --work runs        # an hour a seed on 2 cores, by plan
    python bench/chat_model.py simple MODEL PAIRS TEXT --seeds 1234 --work runs
    python bench/chat_model.py simple-rloo MODEL PAIRS TEXT --seeds 1234 --work runs
    python bench/chat_model.py table                                                   # from the logs in bench/results

MODEL   a folder named smollm2-135m (HuggingFaceTB/SmolLM2-135M-Instruct), or smollm2-135m, which asks the hub
PAIRS   instruction-data-with-preference.json (rasbt/LLMs-from-scratch): 1,100 polite and impolite answers
TEXT    ordinary English, the first 16,000 letters of which are read: tinyshakespeare's input.txt, .gz too

polite       `bash run_all.sh MODEL cpu --data_path PAIRS`: SFT on polite answers, a reward model of the pairs, PPO
simple       PPO alone, from the chat model as it is, with the reward function bench/simple_english.py
simple-rloo  the same without a critic: --advantage rloo, 4 answers to each of 8 prompts

Politeness is marked by more than the reward model that was climbed: by a Bradley-Terry model on words and word pairs
(bench/real_text.py), fitted on those pairs that the reward model has not seen. Meaning is measured by content words: how
many of those in the data's own answer are in the model's (recall), and of the model's in the data's (precision), as F1.
What may have become worse: repetition (the share of an answer's three-word runs that it has had before), length, answers
without an end, and the perplexity of ordinary text.

Each run's numbers, and its answers to twelve questions of our own, go to bench/results/chat_model/TASK-SEED.json.
"""

import argparse
import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
LOGS = ROOT / "bench" / "results" / "chat_model"
TASKS = ("polite", "simple", "simple-rloo")
SIMPLE_FLAGS = (
    "--data_split 0,0,1 --max_prompt_seq_len 128 --max_answer_seq_len 64 --max_eval_samples 128 --lora_dim 16 "
    "--only_optimize_lora --actor_learning_rate 2e-4 --critic_learning_rate 2e-4 --num_warmup_steps 2 "
    "--per_device_train_batch_size 16 --max_steps 40").split()
ADVANTAGE = {
    "simple": ["--per_device_generation_batch_size", "32"],
    "simple-rloo": ["--advantage", "rloo", "--num_generations", "4", "--per_device_generation_batch_size", "8"]}

# Questions of our own, in no data set here; every answer is shown.
QUESTIONS = [
    "What is the capital of Norway?", "Why is the sky blue?", "How do I boil an egg?", "What does a bank do?",
    "Rewrite in the passive voice: The dog chased the ball.", "Name three fruits that are red.",
    "What is the opposite of 'generous'?", "How many minutes are there in two hours?", "Explain what a rainbow is.",
    "Correct this sentence: She don't like apples.", "Why do we sleep?", "What is a computer virus?"]

COMMON = set("""a about after all also an and are as at be because been but by can could did do does for from had has have
    he her his how i if in into is it its just like may me more most my no not of on one or other our out she so some such
    than that the their them then there these they this to up was we were what when which who will with would you your
    """.split())


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def repetition(text):
    """Share of the three-word runs of a text that it has had before; 0 for one of fewer than four words."""
    words = words_of(text)
    runs = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def content_f1(text, reference):
    """F1 of the sets of words that are not among the commonest; 1 where neither text has any."""
    ours = set(words_of(text)) - COMMON
    theirs = set(words_of(reference)) - COMMON
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


# -----------------------------------------------------------------------------
# one run

def train(task, model, pairs, seed, out):
    """The stages through their command lines, unless `out` has the run already -> the command, as a user types it."""
    common = ["--data_path", pairs, "--seed", str(seed), "--output_dir", str(out)]
    if task == "polite":
        command = ["bash", "run_all.sh", model, "cpu", *common]
    else:
        command = [sys.executable, "step3_ppo.py", "--actor_model_name_or_path", model, "--critic_model_name_or_path",
                   model, "--reward_fn", "bench/simple_english.py:simple", *SIMPLE_FLAGS, *ADVANTAGE[task], *common]
    summary = out / "summary.json"
    if not summary.exists() or "ppo" not in json.loads(summary.read_text()):
        subprocess.run(command, cwd=ROOT, check=True)
    return " ".join(["python" if word == sys.executable else word for word in command])


def samples_of(folder, step):
    """The answers to the held-out prompts at one evaluation of PPO: 0 the model it started from, -1 the last."""
    lines = [json.loads(line) for line in (folder / "actor" / "samples.jsonl").read_text().splitlines()]
    wanted = lines[-1]["step"] if step < 0 else step
    return [line for line in lines if line["step"] == wanted]


def politeness(pairs, seed):
    """
    f(text) -> log-odds of being the polite one, by words: fitted on the pairs that are neither held out nor the reward
    model's; and its accuracy on the held-out pairs.
    """
    import torch
    from bench.real_text import accuracy, differences, features, fit_words
    from data import load_records
    from support.flags import DataConfig

    def records(split, stage):
        return load_records(DataConfig(data_path=[pairs], data_split=split, seed=seed, max_eval_samples=10**6),
                            stage=stage, log=lambda line: None)

    everything, held = records("0,1,0", 2)
    seen = {str(record.prompt) for record in records("2,4,4", 2)[0]}
    weights = fit_words([record for record in everything if str(record.prompt) not in seen], penalty=1)

    def log_odds(text):
        return weights[sorted(features(text)), 0].sum().item()

    return log_odds, accuracy(torch.sparse.mm(differences(held), weights))


def perplexity(model, tokenizer, text, length=256):
    """Of a text, in pieces of `length` tokens, each from its second token on."""
    import torch
    from support.models import LanguageModel

    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    pieces = ids[:len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        mask = torch.ones_like(pieces)
        logprobs, _ = LanguageModel(model)(pieces, mask, mask[:, 1:].float())
    return math.exp(-logprobs.mean().item())


def measure(task, model, pairs, text, seed, out):
    """A finished run -> what its log holds."""
    import deepspeed
    import torch
    import transformers
    from bench.simple_english import reading_ease
    from data import load_records
    from support.flags import DataConfig

    base = model if Path(model).is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    folders = {"chat model": base}
    if task == "polite":
        folders["SFT"] = out / "sft"
    folders["PPO"] = out / "actor"
    split = "2,4,4" if task == "polite" else "0,0,1"
    _, held = load_records(DataConfig(data_path=[pairs], data_split=split, seed=seed, max_eval_samples=128), stage=3,
                           log=lambda line: None)
    references = {record.prompt[-1]["content"]: record.chosen for record in held}
    marks = {"reading ease": reading_ease}
    if task == "polite":
        log_odds, word_accuracy = politeness(pairs, seed)
        marks = {"politeness by words": log_odds}

    # The held-out prompts, as PPO's own evaluations had them answered: at its start and at its end.
    found = {}
    answers = {}
    for name, step in (("before PPO", 0), ("after PPO", -1)):
        samples = samples_of(out, step)
        texts = [sample["answer"] for sample in samples]
        answers[name] = texts
        numbers = {"score": [sample["score"] for sample in samples], "KL": [sample["kl"] for sample in samples],
                   "ended": [float(sample["ended"]) for sample in samples],
                   "words": [len(words_of(answer)) for answer in texts],
                   "repetition": [repetition(answer) for answer in texts],
                   "content F1": [content_f1(sample["answer"], references[sample["prompt"][-1]["content"]])
                                  for sample in samples]}
        for label, mark in marks.items():
            numbers[label] = [mark(answer) for answer in texts]
        found[name] = {label: statistics.mean(values) for label, values in numbers.items()}
        found[name]["answers"] = len(samples)
    [(label, mark)] = marks.items()
    wins = [(mark(new) > mark(old)) + 0.5 * (mark(new) == mark(old))
            for old, new in zip(answers["before PPO"], answers["after PPO"])]
    found["after PPO"][f"win rate in {label}"] = statistics.mean(wins)

    # Ordinary text, and our own questions, greedily.
    lines = []
    for name, folder in folders.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found.setdefault(name, {})["perplexity of ordinary text"] = perplexity(network, tokenizer, text)
        for number, question in enumerate(QUESTIONS):
            chat = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            said = network.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1]:]
            if name == "chat model":
                lines.append({"question": question})
            lines[number][name] = tokenizer.decode(said, skip_special_tokens=True).strip()

    summary = json.loads((out / "summary.json").read_text())
    stages = {name: summary[name] for name in ("sft", "reward", "ppo") if name in summary}
    if task == "polite":
        stages["reward"]["accuracy of words on the same pairs"] = word_accuracy
    versions = {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)}
    processor = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[:1]
    return {"task": task, "seed": seed, "stages": stages, "numbers": found, "questions": lines, "versions": versions,
            "processor": processor, "cores": os.cpu_count()}


# -----------------------------------------------------------------------------
# the table

def mean_and_spread(values, form=".2f"):
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def table():
    """The committed logs as Markdown: a table of each task, then every answer of its first seed."""
    for task in TASKS:
        logs = [json.loads(path.read_text()) for path in sorted(LOGS.glob(f"{task}-[0-9]*.json"))]
        if not logs:
            continue
        seeds = ", ".join(str(log["seed"]) for log in logs)
        print(f"\n## {task}\n\nSeed{'s' if len(logs) > 1 else ''} {seeds}; `{logs[0]['command']}`\n")
        rows = list(dict.fromkeys(row for log in logs for numbers in log["numbers"].values() for row in numbers))
        models = list(dict.fromkeys(name for log in logs for name in log["numbers"]))
        print("| | " + " | ".join(models) + " |\n|---|" + "---:|" * len(models))
        for row in rows:
            cells = []
            for name in models:
                values = [log["numbers"][name][row] for log in logs if row in log["numbers"].get(name, {})]
                cells.append(mean_and_spread(values) if values else "")
            print(f"| {row} | " + " | ".join(cells) + " |")
        for stage in logs[0]["stages"]:
            numbers = [log["stages"][stage] for log in logs]
            words = [f"{name} {mean_and_spread([found[name] for found in numbers], '.3g')}" for name in numbers[0]
                     if isinstance(numbers[0][name], (int, float))]
            print(f"\n{stage}: {', '.join(words)}")
        print(f"\nAll answers of seed {logs[0]['seed']}, greedy:\n")
        for line in logs[0]["questions"]:
            print(f"- **{line.pop('question')}**")
            for name, answer in line.items():
                print(f"  - {name}: {' '.join(answer.split())}")
        print(f"\n{logs[0]['processor']} x {logs[0]['cores']}, {logs[0]['versions']}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "table"])
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("pairs", nargs="?", metavar="PAIRS")
    parser.add_argument("text", nargs="?", metavar="TEXT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="keep the models here")
    args = parser.parse_args()
    if args.task == "table":
        table()
        return
    if not args.text:
        parser.error(f"{args.task} needs MODEL, PAIRS and TEXT")
    opened = gzip.open if args.text.endswith(".gz") else open
    with opened(args.text, "rt", encoding="utf-8") as file:
        text = file.read(16_000)
    LOGS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        out = args.work.resolve() / f"{args.task}-{seed}"
        command = train(args.task, args.model, str(Path(args.pairs).resolve()), seed, out)
        log = measure(args.task, args.model, args.pairs, text, seed, out)
        for path, name in ((str(args.work.resolve()), "WORK"), (str(Path(args.pairs).resolve()), "PAIRS")):
            command = command.replace(path, name)
        log["command"] = command.replace(args.model, "MODEL")
        (LOGS / f"{args.task}-{seed}.json").write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
