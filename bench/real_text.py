"""
Real text: small reward models beside a word-level baseline, and PPO that makes stories sadder.

    OMP_NUM_THREADS=1 python bench/real_text.py DATA MODELS                        # all parts, one CPU core
    OMP_NUM_THREADS=1 python bench/real_text.py DATA MODELS --only rasbt --seeds 31 32 --work runs

DATA    hh_rlhf/harmless-base/test.jsonl.gz (anthropics/hh-rlhf), truthfulqa/finetune_truth.jsonl.gz
        (sylinrl/TruthfulQA), rasbt/instruction-data-with-preference.json (rasbt/LLMs-from-scratch),
        vader/vader_lexicon.txt (cjhutto/vaderSentiment)
MODELS  stories260K (karpathy/tinyllamas, as a Hugging Face folder)

Reward models: for each data set a vocabulary is taken from its training text and small random Llamas are made, which
step2_reward.py trains through its command line. They are tested one by one, and as the sum of their normalised scores,
which is what step3_ppo.py --reward_fn model1 model2 ... makes of several. The baseline is fitted on the very same
training pairs and tested on the very same held-out ones (data.load_records; each of --seeds holds out a tenth).
It reads answers alone, and so do the reward models: with so few pairs models of this size do no better with the
question. Only TruthfulQA's are told of it what attention cannot learn from 12,000 pairs: the chat template writes an
answer's words in capitals where the question has them too. All templates begin with 40 tokens that are always the same:
what two answers share cancels between them only in sums; attention takes means, and beside 40 constants they are nearly
sums.

Stories: step3_ppo.py trains stories260K with bench/sad_reward.py as its reward. Before and after, samples on held-out
openings are scored, and read by the untouched model: its perplexity of them says whether they are still stories.

Each part's table goes to standard output and into bench/results/real_text.md. What is in --work already is not trained
again.
"""

import argparse
import collections
import gzip
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
import deepspeed
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification

from bench.sad_reward import sadder
from data import Collator, decode_answers, encode_records, load_records, load_tokenizer, render
from support.flags import DataConfig
from hybrid_engine import InferenceEngine
from support.models import LanguageModel, RewardModel
from step2_reward import pair_scores


# -----------------------------------------------------------------------------
# data sets -> files that --data_path reads

def truthfulqa_pairs(source, target):
    """
    Rows {"prompt": "Q: question\\nA: answer\\nTrue:", "completion": " yes" or " no"} -> prompt, chosen, rejected: each
    true answer with a false one of the same question, the fewer repeated until all of both are used.
    """
    answers = collections.defaultdict(lambda: {"yes": [], "no": []})
    for line in gzip.open(source, "rt"):
        row = json.loads(line)
        question, answer = row["prompt"].removeprefix("Q: ").removesuffix("\nTrue:").split("\nA:", 1)
        answers[question.strip()][row["completion"].strip()].append(answer.strip())
    rng = random.Random(0)
    with open(target, "w") as file:
        for question, said in answers.items():
            yes, no = (rng.sample(said[label], len(said[label])) for label in ("yes", "no"))
            for i in range(max(len(yes), len(no))):
                chosen, rejected = yes[i % len(yes)], no[i % len(no)]
                file.write(json.dumps({"prompt": question, "chosen": chosen, "rejected": rejected}) + "\n")
    return str(target)


# -----------------------------------------------------------------------------
# the baseline: Bradley-Terry on hashed words and word pairs

BUCKETS = 2**18


def features(text):
    """Text -> the set of buckets of its lower-case words, punctuation marks, and pairs of neighbours."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {zlib.crc32(gram.encode()) % BUCKETS for gram in words + list(map(" ".join, zip(words, words[1:])))}


def differences(records):
    """Pairs -> sparse (pairs, BUCKETS) float32: 1 where only the chosen answer has the bucket, -1 the rejected."""
    places, values = [], []
    for row, record in enumerate(records):
        chosen, rejected = features(record.chosen), features(record.rejected)
        places += [(row, bucket) for bucket in chosen - rejected] + [(row, bucket) for bucket in rejected - chosen]
        values += len(chosen - rejected) * [1.0] + len(rejected - chosen) * [-1.0]
    return torch.sparse_coo_tensor(torch.tensor(places).T, values, (len(records), BUCKETS),
                                   check_invariants=False).coalesce()


def fit_words(train, penalty):
    """
    Logistic regression on the differences with an L2 penalty on the weights -> (BUCKETS, 1) weights; no intercept, since
    swapped answers must swap the verdict. Presence serves better than counts or their logarithms.
    """
    x, weights = differences(train), torch.zeros(BUCKETS, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        nats = -F.logsigmoid(torch.sparse.mm(x, weights)).sum() + penalty / 2 * weights.square().sum()
        nats.backward()
        return nats

    optimizer.step(loss)
    return weights.detach()


def baseline_accuracy(train, held, penalty):
    """Held-out accuracy of fit_words."""
    return accuracy(torch.sparse.mm(differences(held), fit_words(train, penalty)))


# -----------------------------------------------------------------------------
# a small model of our own

def make_model(folder, records, template, seed, vocabulary=10000, width=64, positions=1024):
    """
    A random reward model, a Llama of one layer with the commonest words of the records as `template` renders them as
    its tokens, as a Hugging Face folder. One layer, since two overfit a few thousand pairs; words, since pieces of them
    do no better.
    """
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words, and punctuation marks one by one
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    dialogues = [[*record.prompt, {"role": "assistant", "content": answer}] for record in records
                 for answer in (record.chosen, record.rejected)]
    texts = render(transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special),
                   dialogues)
    words.train_from_iterator(texts, trainers.WordLevelTrainer(
        vocab_size=vocabulary, special_tokens=list(special.values()), show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special)
    torch.manual_seed(seed)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=width // 32, max_position_embeddings=positions, num_labels=1, bos_token_id=1,
        eos_token_id=2, pad_token_id=3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -----------------------------------------------------------------------------
# sadder stories

NAMES = "Lily Tom Sara Max Anna Ben Mia Tim Lucy Sam".split()
OPENINGS = [  # {n} is the hero
    "Once upon a time, there was a little child named {n}.",
    "One day, {n} went to the park to play.",
    "{n} was in the kitchen with Mom.",
    "Once upon a time, {n} found an old box under the bed.",
    "{n} saw a red bird in the garden.",
    "One morning, {n} woke up and looked out of the window.",
    "{n} and a friend were walking in the forest.",
    "Once upon a time, there was a big dog who lived with {n}.",
    "It was a rainy day, and {n} stayed at home.",
    "One day, {n} lost a toy at the beach.",
    "{n} had a small blue boat.",
    "At night, {n} heard a noise in the room.",
    "{n} went to the shop with Dad.",
    "Once upon a time, {n} wanted to climb a tall tree.",
    "{n} made a cake for Grandma.",
    "One day, a new child came to the school of {n}.",
    "{n} had a cat that liked to sleep.",
    "It was the birthday of {n}.",
    "One day, {n} saw a big truck on the road.",
    "{n} was drawing a picture of the sun.",
]
STORY_TEMPLATE = "{{ bos_token }}{{ messages[-1].content }}"  # the stories models are no chat models: bare text


def stories(model, tokenizer, records, n, seed):
    """-> n sampled continuations of each record's opening, of 64 tokens: a Rollout and their attention_mask."""
    items = encode_records(records, tokenizer, 3, 64, log=lambda line: None)
    batch = Collator(3, tokenizer.pad_token_id)(items)
    rollout = InferenceEngine(model).generate(
        batch["input_ids"], batch["attention_mask"], max_new_tokens=64, seed=seed, num_return_sequences=n,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return rollout, torch.cat([batch["attention_mask"].repeat_interleave(n, 0), rollout.mask.long()], 1)


@torch.no_grad()
def sadder_part(args, work):
    """PPO on stories, then the untouched model and the actor side by side on the held-out openings -> table lines."""
    base, prompts = f"{args.models}/stories260K", work / "openings.jsonl"
    openings = [opening.format(n=name) for opening in OPENINGS for name in NAMES]
    prompts.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings))
    os.environ["VADER_LEXICON"] = f"{args.data}/vader/vader_lexicon.txt"
    data = ["--data_path", prompts, "--data_split", "0,0,1", "--chat_template", STORY_TEMPLATE]
    command, summary = train("step3_ppo.py", work / "sadder", "ppo", "--actor_model_name_or_path", base,
                             "--critic_model_name_or_path", base, "--reward_fn", f"{ROOT}/bench/sad_reward.py:sadder",
                             *data, *PPO_FLAGS)
    _, held = load_records(DataConfig(data_path=[str(prompts)], data_split="0,0,1"), stage=3, log=lambda line: None)
    tokenizer = load_tokenizer(base, STORY_TEMPLATE)
    load = transformers.AutoModelForCausalLM.from_pretrained
    untouched = load(base, dtype=torch.float32)
    lines = ["| model | reward, mean | its deviation | KL, nats a response | perplexity under the untouched model | "
             "different words in 100 |", "|---|---:|---:|---:|---:|---:|"]
    samples = []
    for name, model in (("untouched", untouched), ("PPO", load(work / "sadder" / "actor", dtype=torch.float32))):
        rollout, attention_mask = stories(model, tokenizer, held, args.samples, seed=1)
        logprobs, ref = (LanguageModel(m)(rollout.tokens, attention_mask, rollout.mask)[0] for m in (model, untouched))
        texts = decode_answers(tokenizer, rollout)
        scores = torch.tensor(sadder([], texts))
        words = re.findall(r"[a-z']+", " ".join(texts).lower())
        different = statistics.mean(len(set(words[i:i + 100])) for i in range(0, len(words) - 99, 100))
        lines.append(f"| {name} | {scores.mean():.3f} | {scores.std():.3f} | "
                     f"{(logprobs - ref).sum() / len(scores):.2f} | "
                     f"{math.exp(-ref.sum() / rollout.mask.sum()):.2f} | {different:.0f} |")
        samples += [f"- {name}: **{held[i].prompt[-1]['content']}** {texts[i * args.samples]}".replace("\n", " ")
                    for i in range(min(len(held), 6))]
    return lines + ["", f"{len(texts)} samples of each on {len(held)} held-out openings; PPO took "
                    f"{summary['seconds'] / 60:.1f} minutes.", "", f"`{command}`", "",
                    "The first sample of each opening, none left out:", "", *samples]


# -----------------------------------------------------------------------------
# reward models

def write_pairs(path, records):
    """A file that --data_path reads the same records from."""
    path.write_text("".join(json.dumps({"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected})
                            + "\n" for record in records))


@torch.no_grad()
def normalised_margins(folder, records):
    """Chosen minus rejected scores of a reward model, in its standard deviations, (N,); its number of parameters."""
    tokenizer, model = load_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    items = encode_records(records, tokenizer, 2, 1024, log=lambda line: None)
    collate, scorer, margins = Collator(2, tokenizer.pad_token_id), RewardModel(model.eval(), normalise=True), []
    for i in range(0, len(items), 64):
        chosen, rejected = pair_scores(scorer, collate(items[i:i + 64]))
        margins.append(chosen - rejected)
    return torch.cat(margins), model.num_parameters()


def accuracy(margins):
    """Share of positive ones; ties count half."""
    return (0.5 + 0.5 * margins.sign()).mean().item()


def reward_part(args, work, name):
    """Reward models and baselines of one data set, one split after the other -> table lines."""
    source, penalty, template, flags = {
        "hh": (f"{args.data}/hh_rlhf/harmless-base/test.jsonl.gz", 20, ANSWER, HH_FLAGS),
        "rasbt": (f"{args.data}/rasbt/instruction-data-with-preference.json", 1, ANSWER, RASBT_FLAGS),
        "truthfulqa": (f"{args.data}/truthfulqa/finetune_truth.jsonl.gz", 3, MARKED_ANSWER, TRUTHFULQA_FLAGS)}[name]
    if name == "truthfulqa":
        source = truthfulqa_pairs(source, work / "truthfulqa.jsonl")
    lines = ["| split | training pairs | held-out pairs | baseline | one reward model | their sum | parameters | "
             "minutes |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    rows = []
    for seed in args.seeds:
        folder = work / f"{name}-{seed}"
        folder.mkdir(exist_ok=True)
        train_records, held = load_records(DataConfig(data_path=[source], data_split="0,1,0", seed=seed,
                                                      max_eval_samples=10**6), stage=2, log=lambda line: None)
        write_pairs(folder / "train.jsonl", train_records)  # so that --seed is free to differ from model to model
        write_pairs(folder / "test.jsonl", held)
        alone, total, parameters, seconds = [], 0, 0, 0
        for member in range(args.models_summed):
            base, out = folder / f"base{member}", folder / f"run{member}"
            if not base.exists():
                make_model(base, train_records, template, member)
            command, summary = train("step2_reward.py", out, "reward", "--model_name_or_path", base, "--data_path",
                                     folder, "--data_split", "0,1,0", "--max_eval_samples", 10**6, "--max_seq_len",
                                     1024, "--seed", member, *flags)
            margins, size = normalised_margins(out / "reward", held)
            total, parameters, seconds = total + margins, parameters + size, seconds + summary["seconds"]
            alone.append(summary["accuracy"])
        rows.append((baseline_accuracy(train_records, held, penalty), statistics.mean(alone), accuracy(total)))
        lines.append(f"| {seed} | {len(train_records)} | {len(held)} | " + " | ".join(f"{x:.3f}" for x in rows[-1])
                     + f" | {args.models_summed} x {parameters / args.models_summed / 1e6:.2f}M | {seconds / 60:.1f} |")
        print(lines[-1], flush=True)
    lines.append("| mean | | | " + " | ".join(f"{statistics.mean(column):.3f}" for column in zip(*rows)) + " | | |")
    if len(rows) > 1:
        ours = [total - baseline for baseline, _, total in rows]
        lines += ["", f"The sum minus the baseline: {statistics.mean(ours):+.3f}, standard error over splits "
                  f"{statistics.stdev(ours) / len(ours) ** 0.5:.3f}; above it on {sum(x > 0 for x in ours)} of "
                  f"{len(ours)} splits."]
    return lines + ["", f"`{command}`"]


# -----------------------------------------------------------------------------
# all parts

EVEN = "{{ bos_token }}{{ '. ' * 40 }}"
ANSWER = EVEN + "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content | lower }}{% endif %}"
MARKED_ANSWER = EVEN + """{% if messages[-1].role == 'assistant' %}
{% set question = ' ' ~ messages[0].content | lower | replace('?', ' ') | replace(',', ' ') ~ ' ' %}
{% for word in messages[-1].content.lower().split() %}
{{ (word | upper if ' ' ~ word.strip('.,') ~ ' ' in question else word) ~ ' ' }}
{% endfor %}{% endif %}""".replace("\n", "")
RECIPE = "--learning_rate 1e-3 --num_warmup_steps 20 --num_train_epochs {} --per_device_train_batch_size {}"
RASBT_FLAGS = RECIPE.format(3, 8).split()
HH_FLAGS = RECIPE.format(2, 8).split()
TRUTHFULQA_FLAGS = RECIPE.format(1, 32).split()
PPO_FLAGS = ("--max_prompt_seq_len 64 --max_answer_seq_len 64 --per_device_generation_batch_size 32 "
             "--per_device_train_batch_size 16 --ppo_epochs 2 --max_steps 100 --actor_learning_rate 1.5e-4 "
             "--critic_learning_rate 1e-3 --num_warmup_steps 5 --kl_coef 0.05").split()


def train(script, folder, stage, *flags):
    """
    A stage through its command line, unless `folder` holds its result already -> command, the stage's numbers in
    summary.json. If it fails, its output ends this program.
    """
    flags = [*map(str, flags), "--output_dir", str(folder)]
    summary = folder / "summary.json"
    if not summary.exists():
        done = subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
    return shlex.join(["python", script, *flags]), json.loads(summary.read_text())[stage]


def write_results(part, text):
    """Puts a part's section into bench/results/real_text.md, in the place of an older one."""
    path = ROOT / "bench" / "results" / "real_text.md"
    path.parent.mkdir(exist_ok=True)
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    sections = {section.split("\n", 1)[0]: section.rstrip() for section in old}
    sections[part] = f"{part}\n\n{text}"
    path.write_text("\n\n## ".join(["# Real text, by bench/real_text.py", *sections.values()]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("models")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23],
                        help="of the splits into training and held-out questions")
    parser.add_argument("--models_summed", type=int, default=8, help="reward models of one split")
    parser.add_argument("--samples", type=int, default=16, help="stories to each held-out opening")
    parser.add_argument("--work", type=Path, help="keep the models here; default: a temporary folder")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = " ".join(f"{module.__name__} {module.__version__}" for module in (torch, deepspeed, transformers))
    where = (f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s), "
             f"load {os.getloadavg()[0]:.0f}; python {platform.python_version()} {versions}.")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part in args.only:
            lines = sadder_part(args, work) if part == "sadder" else reward_part(args, work, part)
            text = "\n".join([*lines, "", where])
            for path, name in ((work, "WORK"), (args.data, "DATA"), (args.models, "MODELS"), (f"{ROOT}/", "")):
                text = text.replace(str(path), name)
            print(f"\n{part}\n\n{text}", flush=True)
            write_results(part, text)


PARTS = ["rasbt", "truthfulqa", "hh", "sadder"]

if __name__ == "__main__":
    main()
