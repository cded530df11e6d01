"""
Real text: reward models of a million parameters beside a word-level baseline, and PPO that makes stories sadder.

    OMP_NUM_THREADS=1 python bench/real_text.py --data DATA --models MODELS              # about an hour on one CPU core
    OMP_NUM_THREADS=1 python bench/real_text.py --data DATA --only rasbt --seeds 1 2 3

DATA    hh_rlhf/harmless-base/test.jsonl.gz (anthropics/hh-rlhf), truthfulqa/finetune_truth.jsonl.gz
        (sylinrl/TruthfulQA), rasbt/instruction-data-with-preference.json (rasbt/LLMs-from-scratch),
        vader/vader_lexicon.txt (cjhutto/vaderSentiment)
MODELS  stories260K (karpathy/tinyllamas as a Hugging Face folder)

Reward models: on each data set a tokenizer is trained, a small random Llama is made, and step1_sft.py and step2_reward.py
train it with the flags below, through their command lines. The baseline is fitted on the very same training pairs and
tested on the very same held-out ones (data.load_records; another seed holds out other questions).
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
import resource
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import DataConfig, load_records


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
    """Text -> {bucket: count} of its lower-case words, punctuation marks, and pairs of neighbours."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = words + [" ".join(pair) for pair in zip(words, words[1:])]
    return collections.Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)


def differences(records):
    """Pairs -> sparse (pairs, BUCKETS) float32: log(1 + count) in the chosen answer minus that in the rejected."""
    rows, columns, values = [], [], []
    for row, record in enumerate(records):
        chosen, rejected = features(record.chosen), features(record.rejected)
        for bucket in chosen.keys() | rejected.keys():
            rows.append(row)
            columns.append(bucket)
            values.append(math.log1p(chosen[bucket]) - math.log1p(rejected[bucket]))
    return torch.sparse_coo_tensor([rows, columns], values, (len(records), BUCKETS)).float().to_sparse_csr()


def baseline_accuracy(train, held, penalties=(1, 10, 100, 300)):
    """
    Held-out accuracy of logistic regression on the differences (no intercept: swapped pairs must swap their answer),
    with the L2 penalty that is best on the held-out pairs themselves: the baseline is given the benefit of the choice.
    """
    x, test = differences(train), differences(held)
    best = 0.0
    for penalty in penalties:
        weights = torch.zeros(BUCKETS, 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            nats = -F.logsigmoid(x @ weights).sum() + penalty / 2 * weights.square().sum()
            nats.backward()
            return nats

        optimizer.step(loss)
        margin = test @ weights.detach()
        best = max(best, ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item())
    return best


# -----------------------------------------------------------------------------
# a small model of our own

def make_model(folder, texts, vocabulary, width, layers, positions):
    """A random Llama with a lower-case BPE tokenizer trained on `texts`, as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special,
                                                             show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                                     eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=positions, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(script, *flags):
    """A stage through its command line -> minutes of CPU time. Its output ends the program if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


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
