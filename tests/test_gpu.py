"""
The GPU gives what the CPU gives: a PPO update in float32, and greedy tokens that are Hugging
Face's, in float32 and bf16. TF32 is off, because its products have ten bits.

    python -m pytest -m gpu tests/test_gpu.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, clean_environment
from models import ragged_prompts, small_model
from test_ppo import small_models
from test_same_step import P, R, ROWS, given

import step3_ppo
from data import load_tokenizer
from hybrid_engine import InferenceEngine, Rollout
from support.processes import to_device

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def ppo_update(folder):
    """
    One PPO step on this process's device, all of it but the sampling, whose noise differs from
    device to device: a given rollout is scored, and learned from in two micro-batches -> {name:
    tensor on the CPU}.
    """
    args = step3_ppo.Config(
        deepspeed_config=f"{folder}/ds.json", per_device_generation_batch_size=ROWS,
        per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=2,
        max_prompt_seq_len=P, max_answer_seq_len=R, actor_learning_rate=1e-3,
        critic_learning_rate=1e-3, lr_scheduler_type="constant")
    tokenizer = load_tokenizer("tiny")
    engine = step3_ppo.DeepSpeedRLHFEngine(f"{folder}/actor", f"{folder}/reward", tokenizer, 1,
                                           args)
    trainer = step3_ppo.DeepSpeedPPOTrainer(engine, args)
    rollout = to_device({name: given(tokenizer)[2][name]
                         for name in ("tokens", "mask", "attention_mask")})
    answers = Rollout(rollout["tokens"], torch.zeros_like(rollout["mask"]), rollout["mask"])
    trainer.respond = lambda batch, n, call: (answers, rollout["attention_mask"])
    experience = trainer.generate_experience({})
    losses = trainer.train_rlhf(experience)

    found = {"losses": torch.tensor(losses)}
    for name in ("policy/grad_norm", "val/grad_norm", "policy/approxkl"):
        found[name] = torch.tensor(trainer.metrics[f"ppo/{name}"])
    found.update({name: value.cpu() for name, value in vars(experience).items()})
    for name, model in (("actor", engine.actor), ("critic", engine.critic)):
        for weight, value in model.module.named_parameters():
            found[f"{name} {weight}"] = value.detach().cpu()
    return found


def test_a_ppo_update_equals_the_cpus(process_group, tmp_path):
    small_models("opt", tmp_path, load_tokenizer("tiny"))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    here = ppo_update(tmp_path)
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    on_cpu = torch.load(tmp_path / "on_cpu.pt")

    assert here.keys() == on_cpu.keys() and on_cpu["policy/grad_norm"] > 0.05
    before = small_weights(tmp_path)
    for name, value in on_cpu.items():
        # A weight moves by up to the learning rate, 1e-3; by AdamW's eps of 1e-5 an error of 1e-7
        # in its gradient is 1e-5 there at most.
        atol = 1e-4 if name in ("losses", "policy/grad_norm", "val/grad_norm") else 2e-5
        torch.testing.assert_close(here[name], value, atol=atol, rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")
    moved = [(on_cpu[f"actor model.{name}"] - value).abs().max() for name, value in before.items()]
    assert max(moved) > 5e-4


def small_weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "actor" / "model.safetensors")


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_tokens_are_hugging_faces(name, dtype):
    """
    At a width at which products are of several tiles. In bf16, where both sides round and two
    tokens may be as likely, each token that differs must be as good as Hugging Face's own choice at
    that place, to two units in the last place of its logit.
    """
    wide = dict(hidden_size=256, num_attention_heads=8, vocab_size=2000)
    if name == "opt":
        wide.update(ffn_dim=1024, word_embed_proj_dim=256)
    else:
        wide.update(intermediate_size=700)
    model = small_model(name, dtype, std=0.05, **wide).to(DEVICE)
    ids, mask = (t.to(DEVICE) for t in ragged_prompts(rows=16, length=40, vocabulary=2000))
    new = 20
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=new, temperature=0,
                                              eos_token_id=None)
    attention_mask = torch.cat([mask, torch.ones_like(rollout.tokens[:, 40:])], 1)
    tokens = rollout.tokens.masked_fill(attention_mask == 0, 0)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=attention_mask, position_ids=positions).logits
    logits = logits[:, 39:-1].float()
    chosen = logits.gather(-1, rollout.tokens[:, 40:, None]).squeeze(-1)
    best = logits.amax(-1)
    if dtype == torch.float32:
        expected = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask,
                                  max_new_tokens=new, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)
        assert torch.equal(rollout.tokens[:, 40:], expected[:, 40:])
        assert torch.equal(chosen, best)
    else:
        assert (chosen == best).float().mean() > 0.9
        assert ((best - chosen) <= 2 * 2**-7 * best.abs()).all()


if __name__ == "__main__":  # the CPU's part of the first test
    folder = Path(sys.argv[1])
    torch.save(ppo_update(folder), folder / "on_cpu.pt")
