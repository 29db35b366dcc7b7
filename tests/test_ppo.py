"""Tests of PPO alone: GAE against double loops and closed forms, the critic's place in a step, and its checkpoints."""

import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import shrink
from test_run import read_jsonl, timeless
from variants import loss_and_grad

import configs
import ppo
from bookkeeping.progress import say_what_does_not_act
from bookkeeping.run import Run
from bookkeeping.signals import Stopped, StopSignals


def ragged(seed=0, batch=5, tokens=7):
    """Returns token rewards, values and a mask. What is masked is NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 1, tokens
    mask = torch.arange(tokens) < lengths[:, None]
    rewards, values = (torch.randn(batch, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_advantages_are_the_double_sum_of_the_paper(gamma, lam):
    ppo.GAMMA, ppo.LAMBDA = gamma, lam
    rewards, values, mask = ragged()
    advantages, returns = ppo.compute_gae(rewards, values, mask)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for i, n in enumerate(mask.sum(1).tolist()):
        r, v = rewards[i, :n].tolist(), [*values[i, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum((gamma * lam) ** (u - t) * (r[u] + gamma * v[u + 1] - v[u]) for u in range(t, n))
            assert advantages[i, t].item() == pytest.approx(expected)
            assert returns[i, t].item() == pytest.approx(expected + v[t])
            if lam == 1.0:  # the closed form: Monte-Carlo returns
                assert returns[i, t].item() == pytest.approx(sum(gamma ** (u - t) * r[u] for u in range(t, n)))


def test_a_critic_that_knows_the_true_values_makes_advantages_of_mean_zero():
    """Two tokens, each 0 or 1 with probability p; the score is their sum. V is exact, all outcomes by their weight."""
    ppo.GAMMA, ppo.LAMBDA, p = 1.0, 0.95, 0.3
    outcomes = [(a, b) for a in (0, 1) for b in (0, 1)]
    weights = torch.tensor([(p if a else 1 - p) * (p if b else 1 - p) for a, b in outcomes], dtype=torch.float64)
    values = torch.tensor([[2 * p, a + p] for a, _ in outcomes], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    scores = torch.tensor([float(a + b) for a, b in outcomes], dtype=torch.float64)
    rewards = ppo.compute_token_rewards(scores, values, None, mask)
    advantages, returns = ppo.compute_gae(rewards, values, mask)
    torch.testing.assert_close(weights @ advantages, torch.zeros(2, dtype=torch.float64))
    shared = torch.full_like(values, 2 * p, requires_grad=True)  # the first value is a fixed point of the value loss
    ppo.VALUE_CLIP = 0.0
    losses = [ppo.compute_value_loss(shared[i : i + 1, :1], values[i : i + 1, :1], returns[i : i + 1, :1], mask[:1, :1])
              for i in range(4)]  # fmt: skip
    loss = sum(weight * one for weight, (one, _) in zip(weights, losses, strict=True))
    assert torch.autograd.grad(loss, shared)[0].sum().abs() < 1e-12


def test_with_a_constant_critic_and_lambda_one_the_gradient_is_reinforce_with_a_baseline():
    ppo.GAMMA, ppo.LAMBDA = 1.0, 1.0
    _, _, mask = ragged(1)
    logps = -torch.rand(mask.shape, dtype=torch.float64)
    scores, baseline = torch.arange(len(mask), dtype=torch.float64), 1.7
    rewards = ppo.compute_token_rewards(scores, logps, None, mask)
    advantages, _ = ppo.compute_gae(rewards, torch.full(mask.shape, baseline, dtype=torch.float64), mask)
    _, grad, _ = loss_and_grad(ppo.compute_policy_loss, logps, logps, advantages, mask)
    torch.testing.assert_close(grad, -(scores - baseline)[:, None] * mask / mask.sum())


def test_whitened_values_have_mean_zero_and_deviation_one_and_one_token_gives_no_nan():
    values, _, mask = ragged(2)
    white = ppo.whiten(values, mask)
    assert white[mask].mean().abs() < 1e-12 and white[mask].std().item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
    assert ppo.whiten(torch.tensor([[3.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


def test_token_scores_keep_their_places():
    scores, logps, mask = ragged(3)
    rewards = ppo.compute_token_rewards(scores, logps, logps - 0.5, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards[mask], scores[mask] - 0.05)


def test_the_critic_reads_each_value_at_the_token_before_and_its_head_begins_at_zero(tmp_path):
    trainer = shrink(ppo, tmp_path) and ppo.PPOTrainer()
    rollouts = trainer.generate_responses_with_group_sampling(1)
    assert (trainer.compute_values(rollouts) == 0).all()
    model = trainer.critic.model
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    values, after = trainer.compute_values(rollouts), trainer.compute_values(rollouts, after=1)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for i, (start, end) in enumerate(zip(rollouts.prompt_lengths.tolist(), rollouts.lengths.tolist(), strict=True)):
            alone = model(rollouts.input_ids[i : i + 1, :end]).logits[0, :, 0]
            torch.testing.assert_close(values[i, : end - start], alone[start - 1 : end - 1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(after[i, : end - start], alone[start:end], rtol=1e-4, atol=1e-5)


def test_the_policy_never_sees_the_critics_gradient_and_rests_in_the_warm_up(tmp_path):
    shrink(ppo, tmp_path)
    ppo.CRITIC_WARMUP_STEPS = 1
    trainer = ppo.PPOTrainer()
    before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
    critic = {name: value.detach().clone() for name, value in trainer.critic.trained().items()}
    metrics = trainer.train_step(1)
    assert metrics["updates"] == 0 and metrics["clip_fraction"] is None and metrics["value_loss"] > 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.named_parameters())
    assert any(not torch.equal(value, critic[name]) for name, value in trainer.critic.trained().items())
    metrics = trainer.train_step(2)
    assert metrics["updates"] == ppo.MINI_BATCHES
    assert any(not torch.equal(value, before[name]) for name, value in trainer.policy.named_parameters())


@pytest.mark.parametrize("in_reward", [True, False])
def test_the_kl_is_in_the_rewards_or_in_the_loss(tmp_path, in_reward):
    shrink(ppo, tmp_path)
    ppo.KL_IN_REWARD = in_reward
    trainer = ppo.PPOTrainer()
    trainer.train_step(1)
    metrics = trainer.train_step(2)
    assert (metrics["kl_loss"] > 0) == (not in_reward) and metrics["kl_divergence"] > 0
    assert metrics["kl_in_reward"] != 0


def test_a_truncated_completion_goes_on_with_the_critics_value_if_asked(tmp_path):
    shrink(ppo, tmp_path)
    ppo.MAX_COMPLETION_TOKENS, ppo.LAMBDA, ppo.ADVANTAGE_TYPE, ppo.KL_COEF = 3, 1.0, "relative", 0.0
    trainer = ppo.PPOTrainer()
    trainer.critic.model.score.bias.data.fill_(0.25)  # so V is 0.25 everywhere
    rollouts = trainer.sample(trainer.train_rows[:4], 2, ("test",))
    rollouts.rewards, rollouts.values = torch.zeros(8), trainer.compute_values(rollouts)
    rollouts.old_logps, rollouts.ref_logps = rollouts.sampled_logps, None
    assert rollouts.truncated.any()
    for ppo.BOOTSTRAP_TRUNCATED in (False, True):
        trainer.compute_advantages(rollouts)
        expected = 0.25 * (rollouts.truncated & torch.tensor(ppo.BOOTSTRAP_TRUNCATED))
        torch.testing.assert_close(rollouts.returns[:, 0], expected.float())


@pytest.mark.parametrize("lora", [0, 4])
def test_a_resumed_run_has_the_critic_and_its_optimizer_and_ends_as_the_whole_one(tmp_path, lora):
    def run(folder, steps, resume=""):
        shrink(ppo, tmp_path / folder)
        ppo.MAX_STEPS, ppo.SAVE_EVERY, ppo.LR_SCHEDULE, ppo.CRITIC_LR_SCHEDULE = steps, 1, "constant", "constant"
        ppo.LORA_RANK, ppo.RESUME = lora, resume
        trainer = ppo.PPOTrainer()
        trainer.train()
        return trainer

    whole, part = run("whole", 3), run("part", 2)
    resumed = run("part", 3, str(part.run.folder))
    rows = [timeless(read_jsonl(trainer.run.folder / "metrics.jsonl")) for trainer in (whole, resumed)]
    assert [row for row in rows[0] if row["step"] != 2] == [row for row in rows[1] if row["step"] != 2]
    for model in ("policy", "critic"):
        first, second = (getattr(t, model) if model == "policy" else t.critic.model for t in (whole, resumed))
        for (name, value), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert torch.equal(value, other), f"{model}: {name}"
    shrink(ppo, tmp_path / "again")  # final-critic/ is a whole model, which another run can begin from
    ppo.RESUME, ppo.LORA_RANK, ppo.CRITIC_MODEL = "", 0, str(whole.run.folder / "final-critic")
    rollouts = whole.sample(whole.train_rows[:2], 2, ("test",))
    torch.testing.assert_close(ppo.PPOTrainer().compute_values(rollouts), whole.compute_values(rollouts))


def test_a_reward_models_body_and_head_are_a_critic_at_once(tmp_path):
    shrink(ppo, tmp_path)
    ppo.CRITIC_MODEL = ppo.REWARD_MODEL
    trainer = ppo.PPOTrainer()
    head = trainer.rewards.reward_model.model.score.weight
    assert torch.equal(trainer.critic.model.score.weight, head) and trainer.critic.model.score.bias.item() == 0
    assert trainer.compute_values(trainer.generate_responses_with_group_sampling(1)).abs().max() > 0


def test_a_checkpoint_of_another_critic_is_one_line(tmp_path):
    shrink(ppo, tmp_path)
    trainer = ppo.PPOTrainer()
    state = trainer.critic.state()
    for weights in ({name: value[:1] for name, value in state["weights"].items()}, {}):
        with pytest.raises(configs.InputError, match="the checkpoint's critic does not fit"):
            trainer.critic.load_state(state | {"weights": weights})
    with pytest.raises(configs.InputError, match="the checkpoint has no critic"):
        trainer.critic.load_state({})


def value_gradient(tmp_path, **constants):
    """Returns a value loss's gradient for each weight of a critic, the critic's model, and how often its body ran."""
    shrink(ppo, tmp_path)
    ppo.CRITIC_MODEL = ppo.REWARD_MODEL  # its head is not zero, so that the body has a gradient
    vars(ppo).update(constants)
    trainer = ppo.PPOTrainer()
    rollouts = trainer.sample(trainer.train_rows[:4], 2, ("test",), greedy=True)
    rollouts.values = trainer.compute_values(rollouts)
    rollouts.returns = torch.ones_like(rollouts.values)
    passes = []  # through the first MLP
    trainer.critic.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.compute_value_gradient(rollouts, 10**6)
    gradients = {name: p.grad.float().flatten() for name, p in trainer.critic.trained().items()}
    return gradients, trainer.critic.model, len(passes)


def test_the_critic_computes_activations_again_if_asked(tmp_path):
    plain, _, once = value_gradient(tmp_path)
    checkpointed, _, twice = value_gradient(tmp_path, GRADIENT_CHECKPOINTING=True)
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_the_critic_has_the_policys_dtype(tmp_path):
    plain, _, _ = value_gradient(tmp_path)
    coarse, model, _ = value_gradient(tmp_path, POLICY_DTYPE="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole = [torch.cat(list(gradients.values())) for gradients in (plain, coarse)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99


def test_the_selftest_shows_a_critic_that_does_not_learn_or_mixes_completions(tmp_path, capsys, monkeypatch):
    def failed():
        with pytest.raises(SystemExit):
            ppo.selftest(ppo.PPOTrainer())
        return [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]

    shrink(ppo, tmp_path)
    ppo.CRITIC_LEARNING_RATE = 1e-30
    assert failed() == ["critic: weights that a step moved"]
    ppo.CRITIC_LEARNING_RATE, compute_value_loss = 1e-3, ppo.compute_value_loss
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "compute_value_loss", lambda *a: (-compute_value_loss(*a)[0], compute_value_loss(*a)[1]))
        assert failed() == ["critic: mean value, two steps upwards"]
    completion_values = ppo.completion_values
    monkeypatch.setattr(
        ppo, "completion_values", lambda model, part, **k: completion_values(model, part, **k) + 0.1 * len(part.texts)
    )
    assert failed() == ["values, batched against alone"]


def test_a_critic_that_steps_in_a_thread_does_not_step_after_a_signal_has_left_the_run():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    policy, critic = (torch.optim.SGD([weight], lr=1.0) for weight in weights)
    for weight in weights:
        weight.grad = torch.ones(1)
    with StopSignals([policy, critic]) as signals, ThreadPoolExecutor(1) as worker:
        signals.interruptible = True
        with pytest.raises(Stopped):
            signals._on_signal(signal.SIGTERM, None)
        with pytest.raises(Stopped):
            worker.submit(critic.step).result()
        assert weights[1].item() == 1.0
    with StopSignals([policy, critic]) as signals, ThreadPoolExecutor(1) as worker:
        signals.interruptible = True
        worker.submit(critic.step).result()  # from here on, a signal waits for the end of the step
        signals._on_signal(signal.SIGTERM, None)
        assert weights[1].item() == 0.0 and signals.received == signal.SIGTERM


def test_a_critic_that_explains_nothing_is_said_once(tmp_path, capsys):
    run = shrink(ppo, tmp_path) and ppo.PPOTrainer()
    run.train()
    rows = [{"step": i, "updates": 4, "explained_variance": -0.5, "clip_fraction": 0.1} for i in range(12)]
    capsys.readouterr()
    for step in (10, 11):
        say_what_does_not_act(step, rows[: step + 1], run.constants, run.run.files)
    (line,) = capsys.readouterr().out.splitlines()
    assert "the critic's explained variance was below 0" in line and "--critic-learning-rate" in line
    assert "--critic-warmup-steps" in line


def test_a_run_logs_the_critic_and_config_names_its_device(tmp_path):
    shrink(ppo, tmp_path)
    trainer = ppo.PPOTrainer()
    trainer.train()
    config = json.loads((trainer.run.folder / "config.json").read_text())
    assert config["constants"]["CRITIC_DEVICE"] == "cpu" and "CRITIC_MODEL" in config["fingerprints"]
    first, second = read_jsonl(trainer.run.folder / "metrics.jsonl")[1:]
    assert first["explained_variance"] == pytest.approx(0, abs=0.2) and first["values_mean"] == 0
    assert second["values_mean"] != 0 and second["critic_grad_norm"] > 0
    assert isinstance(trainer.run, Run) and (trainer.run.folder / "final-critic" / "model.safetensors").is_file()
