"""
What batches by length save: steps of random rows beside steps in data.StepSampler's windows, for
SFT and the reward model with the stages' default flags.

    OMP_NUM_THREADS=1 python bench/padding.py TOKENIZER FILE...

TOKENIZER is a model's folder or hub name, FILE what --data_path takes. Printed are the share of
padding among all tokens, over five epochs of the training rows, and the examples a second of an OPT
shape (4 layers, 256 wide, float32) on the CPU. The two orders take turns, 32 steps each: whole
epochs of the same 256 rows, so that both train on the same examples. About ten minutes on one core.
"""

import platform
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/

import deepspeed
import numpy as np
import torch
import transformers

import step1_sft
import step2_reward
from data import load_stage_data, load_tokenizer, longest_sequence, make_dataloader
from hybrid_engine import train_engine, train_step
from support.models import LanguageModel, RewardModel
from support.processes import setup

WINDOWS = (1, 8, 32, 256)
EPOCHS = 5    # of the padding
ROUNDS = 2    # of the clock
ROWS = 256    # of a round: 32 steps of 8


def loader_of(rows, loader, config, window):
    """A DataLoader of other rows, in windows of so many steps; 1: of random rows."""
    lengths = np.array([longest_sequence(row) for row in rows])
    return make_dataloader(rows, loader.collate_fn, config.per_device_train_batch_size, config.seed,
                           lengths=lengths, window=window)


def padding(loader):
    """Padding's share of all tokens."""
    tokens = 0
    real = 0
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for batches in loader:
            for batch in batches:
                tokens += batch["attention_mask"].numel()
                real += batch["attention_mask"].sum().item()
    return 1 - real / tokens


def sft_engine(shape, ds_config, config):
    """-> the engine, its loss of a batch, and what a step's loss is divided by."""
    model = LanguageModel(transformers.OPTForCausalLM(shape))
    engine = train_engine(model, ds_config, config, 1e-5, 1000)
    return engine, lambda batch: step1_sft.batch_loss(engine, batch), step1_sft.trained_tokens


def reward_engine(shape, ds_config, config):
    """As sft_engine."""
    model = RewardModel(transformers.OPTForSequenceClassification(shape))
    engine = train_engine(model, ds_config, config, 1e-5, 1000)

    def loss(batch):
        return step2_reward.reward_loss(*step2_reward.pair_scores(engine, batch))

    return engine, loss, lambda batches: config.per_device_train_batch_size


def seconds_of(loader, epoch, engine, loss, count):
    loader.sampler.set_epoch(epoch)
    started = time.perf_counter()
    for batches in loader:
        train_step(engine, batches, loss, count(batches))
    return time.perf_counter() - started


def processor():
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def main(tokenizer_name, files):
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, deepspeed "
          f"{deepspeed.__version__}; {torch.get_num_threads()} thread(s) of {processor()}")
    tokenizer = load_tokenizer(tokenizer_name)
    for number, stage, make_engine in ((1, step1_sft, sft_engine),
                                       (2, step2_reward, reward_engine)):
        config = stage.Config(model_name_or_path=tokenizer_name, data_path=files,
                              deepspeed_config=str(ROOT / "configs" / "cpu.json"))
        ds_config = setup(config)
        data = load_stage_data(config, number, tokenizer, 0, 1)
        rows = data.train_loader.dataset
        for window in WINDOWS:
            share = padding(loader_of(rows, data.train_loader, config, window))
            print(f"{stage.__name__}, --length_window {window}: {share:.1%} padding, {len(rows)} "
                  "rows")

        torch.manual_seed(0)
        shape = transformers.OPTConfig(
            vocab_size=len(tokenizer), hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024,
            num_hidden_layers=4, num_attention_heads=4, num_labels=1, dropout=0.0,
            max_position_embeddings=config.max_seq_len, pad_token_id=tokenizer.pad_token_id)
        engine, loss, count = make_engine(shape, ds_config, config)
        some_rows = [rows[row] for row in range(ROWS)]
        clocked = {"random": loader_of(some_rows, data.train_loader, config, 1),
                   "by length": loader_of(some_rows, data.train_loader, config,
                                          config.length_window)}
        seconds = {order: [] for order in clocked}
        for round_number in range(ROUNDS):
            for order, loader in clocked.items():
                seconds[order].append(seconds_of(loader, round_number, engine, loss, count))
        for order, found in seconds.items():
            speeds = ", ".join(f"{ROWS / one:.2f}" for one in found)
            print(f"{stage.__name__}, {order}: {ROWS / statistics.median(found):.2f} examples a "
                  f"second ({speeds})")
        ratio = statistics.median(seconds["random"]) / statistics.median(seconds["by length"])
        print(f"{stage.__name__}: by length {ratio:.2f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
