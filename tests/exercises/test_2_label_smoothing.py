"""Exercise 2: a reward model that knows that some labels are wrong."""

import json
import math

import pytest
import torch

import step2_reward
from exercise import needs_flag, with_argument


def loss_of(margin, label_smoothing):
    reward_loss = with_argument(step2_reward, "reward_loss", "label_smoothing")
    return reward_loss(margin, torch.zeros_like(margin), label_smoothing)


def test_by_hand():
    """A share e of the labels is wrong: (1 - e) of the loss of the label, e of that of the other one."""
    for margin in (-2.0, 0.0, 3.0):
        right, wrong = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
        found = loss_of(torch.tensor([margin], dtype=torch.float64), 0.1)
        assert found.item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-9)


def test_certainty_has_an_end():
    """The loss is lowest at the margin log((1 - e) / e), where sigmoid says 1 - e; without smoothing it has no end."""
    margin = torch.tensor([math.log(0.97 / 0.03)], dtype=torch.float64, requires_grad=True)
    loss_of(margin, 0.03).sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-9)
    margin.grad = None
    loss_of(margin, 0.0).sum().backward()
    assert margin.grad.item() < -0.01


def test_without_the_flag_nothing_changes():
    margins = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(loss_of(margins, 0.0), step2_reward.reward_loss(margins, torch.zeros(7)))


def test_the_flag_reaches_training(model_folders, tmp_path, process_group):
    """One step on one pair: the logged loss is that of the logged margin."""
    needs_flag(step2_reward.Config, "label_smoothing")
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "Go."} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    step2_reward.main(step2_reward.Config(
        model_name_or_path=model_folders["lm"], data_path=[str(tmp_path / "rows.jsonl")], data_split="0,1,0",
        output_dir=str(tmp_path / "output"), max_steps=1, per_device_train_batch_size=1, max_seq_len=64,
        label_smoothing=0.2))
    line = json.loads((tmp_path / "output/reward/metrics.jsonl").read_text().splitlines()[0])
    margin = line["rewards/margins"]
    expected = 0.8 * math.log1p(math.exp(-margin)) + 0.2 * math.log1p(math.exp(margin))
    assert line["loss"] == pytest.approx(expected, rel=1e-4)
