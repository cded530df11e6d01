"""
One optimizer step of each stage is the same step, however it is computed: ZeRO 0 to 3, with optimizer and parameters
offloaded, with 1, 2 and 4 processes, in micro-batches of 1, 2, 4 and 8 rows, with gradient checkpointing.

Eight rows of ragged lengths, dealt to processes and micro-batches; loss, gradient norm and new weights against one
process with all rows at once and without ZeRO. For PPO the rollout is given, so that all see the same one.
"""

import json
from dataclasses import dataclass
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import step1_sft
import step2_reward
import step3_ppo
from data import Collator, load_tokenizer
from hybrid_engine import frozen_model, train_engine, train_step
from support.flags import RunConfig
from support.models import LanguageModel, RewardModel, load_model
from support.processes import all_sum, setup
from ranks import run_ranks
from test_ppo import small_models

ROWS, P, R, RATE = 8, 7, 6, 1e-3
CPU = {"device": "cpu"}
REFERENCE = dict(stage=0, micro=ROWS)


@dataclass
class Config(RunConfig):
    pass


def variants(ranks):
    """name -> how the step is computed; micro-batches of at most ROWS // ranks rows."""
    micro = min(4, ROWS // ranks)
    cases = {f"ZeRO {stage}": dict(stage=stage, micro=micro) for stage in range(4)}
    if ranks == 4:
        return cases
    cases |= {f"micro-batches of {m}": dict(stage=m % 3, micro=m) for m in (1, 2) if m < micro}
    cases["ZeRO 3, micro-batches of 1"] = dict(stage=3, micro=1)
    cases["gradient checkpointing"] = dict(stage=0, micro=micro, checkpointing=True)
    cases["ZeRO 3, gradient checkpointing"] = dict(stage=3, micro=micro, checkpointing=True)
    cases["ZeRO 2, optimizer offloaded"] = dict(stage=2, micro=micro, offload={"offload_optimizer": CPU})
    cases["ZeRO 3, all offloaded"] = dict(stage=3, micro=micro,
                                          offload={"offload_optimizer": CPU, "offload_param": CPU})
    return cases


def given(tokenizer):
    """The eight rows: a batch of SFT, one of pairs, and an Experience, the old policy a little off the new one."""
    torch.manual_seed(3)
    lengths, prompts = torch.randint(2, R + 1, (ROWS,)), torch.randint(1, P + 1, (ROWS,))
    columns = torch.arange(R)
    mask = (columns < lengths[:, None]).float()
    attention_mask = torch.cat([torch.arange(P) >= P - prompts[:, None], mask.bool()], 1).long()
    tokens = torch.randint(4, 300, (ROWS, P + R)).masked_fill(attention_mask == 0, tokenizer.pad_token_id)
    noise = lambda scale: scale * torch.randn(ROWS, R) * mask
    experience = dict(tokens=tokens, attention_mask=attention_mask, mask=mask, logprobs=noise(0.3) - 6.9 * mask,
                      ref_logprobs=noise(0.3) - 6.9 * mask, values=noise(0.5), scores=torch.randn(ROWS),
                      rewards=noise(1.0), advantages=noise(1.0), returns=noise(1.0))
    loss_mask = torch.cat([torch.zeros(ROWS, P), mask], 1)
    sft = dict(input_ids=tokens, attention_mask=attention_mask, loss_mask=loss_mask)
    pairs = []  # the rejected answer is the row before's
    for row in range(ROWS):
        prompt = tokens[row, P - prompts[row]:P]
        answers = [tokens[number, P:P + lengths[number]] for number in (row, row - 1)]
        chosen, rejected = [torch.cat([prompt, answer]).numpy() for answer in answers]
        pairs.append({"chosen": chosen, "rejected": rejected, "prompt_len": len(prompt)})
    return sft, pairs, experience


def one_step(folder, stage, micro, checkpointing=False, offload=None):
    """All three stages -> {name: loss and gradient norm, or a weight}, equal on every rank."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = load_tokenizer("tiny")
    sft, pairs, experience = given(tokenizer)
    mine = torch.arange(rank, ROWS, ranks)
    parts = mine.split(micro)
    common = dict(deepspeed_config=f"{folder}/ds.json", zero_stage=stage, per_device_train_batch_size=micro,
                  max_seq_len=64, gradient_accumulation_steps=len(parts), gradient_checkpointing=checkpointing,
                  lr_scheduler_type="constant", max_prompt_seq_len=P, max_answer_seq_len=R)
    out = {}

    def keep(name, engine, loss, norm):
        loss, = all_sum(loss)
        out[f"{name} loss"], out[f"{name} norm"] = torch.tensor(loss), torch.tensor(norm)
        parameters = dict(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
            out.update({f"{name} {n}": p.detach().float().cpu().clone() for n, p in parameters.items()})

    real = step3_ppo.setup

    def with_offload(config):
        settings = real(config)
        settings["zero_optimization"].update(offload or {})
        return settings

    config = Config(**common)
    settings = with_offload(config)
    engine = train_engine(LanguageModel(load_model(f"{folder}/actor", tokenizer, settings, 64)), settings, config,
                          RATE, 10)
    batches = [{key: value[part] for key, value in sft.items()} for part in parts]
    count, = all_sum(step1_sft.trained_tokens(batches))
    keep("SFT", engine, *train_step(engine, batches, lambda batch: step1_sft.batch_loss(engine, batch), count))

    model = load_model(f"{folder}/reward", tokenizer, settings, 64, head="score")
    engine = train_engine(RewardModel(model), settings, config, RATE, 10)
    collate = Collator(2, tokenizer.pad_token_id)
    batches = [collate([pairs[row] for row in part.tolist()]) for part in parts]
    loss_sum = lambda batch: step2_reward.reward_loss(*step2_reward.pair_scores(engine, batch))
    keep("reward", engine, *train_step(engine, batches, loss_sum, ROWS))

    args = step3_ppo.Config(**common, per_device_generation_batch_size=len(mine), actor_learning_rate=RATE,
                            critic_learning_rate=RATE)
    with mock.patch.object(step3_ppo, "setup", with_offload):
        engine = step3_ppo.DeepSpeedRLHFEngine(f"{folder}/actor", f"{folder}/reward", tokenizer, 10, args)
    trainer = step3_ppo.DeepSpeedPPOTrainer(engine, args)
    trainer.metrics = {"time/generate": 0, "time/score": 0}
    advantages = step3_ppo.whiten(experience["advantages"][mine], experience["mask"][mine])
    experience = step3_ppo.Experience(**{**{k: v[mine] for k, v in experience.items()}, "advantages": advantages})
    losses = trainer.train_rlhf(experience)
    for model, loss, norm in ((engine.actor, losses[0], "ppo/policy/grad_norm"),
                              (engine.critic, losses[1], "ppo/val/grad_norm")):
        keep("actor" if model is engine.actor else "critic", model, loss / ranks, trainer.metrics[norm])
    for name in ("policy/clipfrac", "policy/approxkl", "val/clipfrac"):
        out[f"ppo {name}"] = torch.tensor(trainer.metrics[f"ppo/{name}"])
    return out


def compare(rank, ranks, folder, expected):
    """Every variant in this group of processes against the reference."""
    for name, options in variants(ranks).items():
        found = one_step(folder, **options)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            exact = "loss" in key or "norm" in key
            message = lambda text: f"{ranks} rank(s), {name}, {key}: {text}"
            torch.testing.assert_close(found[key], value, rtol=1e-5 if exact else 0, atol=1e-5, msg=message)


@pytest.fixture(scope="module")
def reference(process_group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_step")
    small_models("opt", folder, load_tokenizer("tiny"))
    (folder / "ds.json").write_text('{"gradient_clipping": 1.0, '
                                    '"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    expected = one_step(folder, **REFERENCE)
    for name in ("SFT", "reward", "actor", "critic"):
        assert expected[f"{name} norm"] > 0.05, (name, expected[f"{name} norm"])
    return folder, expected


@pytest.mark.slow  # a minute more where DeepSpeed's Adam for offloading has not been compiled yet
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_the_same_step(ranks, reference):
    if ranks == 1:
        return compare(0, 1, *reference)
    run_ranks(ranks, compare, *reference)


def test_zeropp_settings_reach_deepspeed(tmp_path, process_group):
    """
    Quantised weights and gradients and a second partition within a node: a CPU cannot run them, but hands them over.
    """
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 8}
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    config = Config(deepspeed_config=str(tmp_path / "ds.json"))
    settings = setup(config)
    with mock.patch("deepspeed.initialize", return_value=(mock.MagicMock(),)) as initialize:
        train_engine(torch.nn.Linear(2, 2), settings, config, RATE, 10)
        frozen_model(torch.nn.Linear(2, 2), settings)
    for call in initialize.call_args_list:
        arrived = DeepSpeedConfig(call.kwargs["config"]).zero_config
        assert {name: getattr(arrived, name) for name in zero} == zero
    assert initialize.call_count == 2
