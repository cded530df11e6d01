"""Runs that survive: whatever ends a run, --resume goes on to the weights and metrics that it would have had."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import hybrid_engine
import step1_sft
import step2_reward
import step3_ppo
from data import UsageError, load_tokenizer, toy_rows
from ranks import run_ranks
from test_ppo import small_models

SECTIONS = {step1_sft: "sft", step2_reward: "reward", step3_ppo: "actor"}


def inputs(folder):
    small_models("opt", folder, load_tokenizer("tiny"))
    rows = [json.dumps(row) for row in toy_rows()[:400] if row["rejected"]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage3_param_persistence_threshold": 0}}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    inputs(folder)
    return folder


def train(stage, folder, out, ranks=1, **flags):
    """The stage's main() on small models, 7 steps of 4 rows whatever the number of ranks, checkpoints every 3."""
    common = dict(output_dir=str(folder / out), data_path=[str(folder / "rows.jsonl")], deepspeed_config=str(folder / "ds.json"),
                  data_split="1,1,1", max_steps=7, save_steps=3, lr_scheduler_type="cosine", max_eval_samples=4, max_seq_len=96,
                  max_prompt_seq_len=80, max_answer_seq_len=8, per_device_train_batch_size=4 // ranks, weight_decay=0.1)
    if stage is step3_ppo:
        common |= dict(actor_model_name_or_path=str(folder / "actor"), critic_model_name_or_path=str(folder / "reward"), enable_ema=True,
                       actor_learning_rate=1e-3, critic_learning_rate=1e-3, per_device_generation_batch_size=8 // ranks, ppo_epochs=2,
                       kl_target=1.0)
    else:
        common |= dict(model_name_or_path=str(folder / {"sft": "actor", "reward": "reward"}[SECTIONS[stage]]), learning_rate=1e-3,
                       gradient_accumulation_steps=1)
    config = stage.Config(**common | flags)
    hybrid_engine.seed_everything(config.seed)  # as the start of a process does
    stage.main(config)


def result(folder):
    """All that a run leaves but its times: weights, metrics, summary."""
    weights = {str(file.relative_to(folder)): load_file(file) for file in folder.glob("*/model.safetensors")}
    lines = [json.loads(line) for file in folder.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    timeless = [{name: value for name, value in line.items() if not name.startswith(("time/", "tokens_per_second", "memory"))} for line in lines]
    numbers = {section: {name: value for name, value in values.items() if name != "seconds"}
               for section, values in json.loads((folder / "summary.json").read_text()).items() if section in ("sft", "reward", "ppo")}
    return weights, timeless, numbers


def assert_same(one, other):
    assert one[1:] == other[1:] and one[0].keys() == other[0].keys() and one[0]
    for name in one[0]:
        for key, tensor in one[0][name].items():
            assert torch.equal(tensor, other[0][name][key]), (name, key)


def stop_at(monkeypatch, step, how):
    """`how()` runs in the middle of this step, once its metrics are logged."""
    log = hybrid_engine.MetricsLog.__call__

    def logged(self, now, metrics):
        log(self, now, metrics)
        if now == step:
            how()

    monkeypatch.setattr(hybrid_engine.MetricsLog, "__call__", logged)


@pytest.mark.parametrize("stage", SECTIONS, ids=SECTIONS.values())
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_sigterm_then_resume_is_the_uninterrupted_run(stage, zero_stage, folder, process_group, monkeypatch, capsys):
    name = f"{SECTIONS[stage]}-{zero_stage}"
    train(stage, folder, name + "-whole", zero_stage=zero_stage)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="143"):
            train(stage, folder, name, zero_stage=zero_stage)
    assert "checkpoint-5 is saved" in capsys.readouterr().out
    train(stage, folder, name, zero_stage=zero_stage, resume=True)
    assert "5 of 7 steps are done" in capsys.readouterr().out
    assert_same(result(folder / (name + "-whole")), result(folder / name))
