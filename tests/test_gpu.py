"""What only a GPU shows: `make test-gpu`. Elsewhere these tests are skipped."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import SCRIPTS, trainer_of

import configs
from engine import decoding

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and make test-gpu"),
    pytest.mark.filterwarnings("error"),  # the sampler warns if it cannot record a graph
]


def test_a_run_is_on_the_gpu(small_script):
    trainer = trainer_of(small_script)
    trainer.train()
    assert {parameter.device.type for parameter in trainer.policy.parameters()} == {"cuda"}
    assert [row["step"] for row in trainer.metrics_history] == [0, 1, 2]
    for row in trainer.metrics_history[1:]:
        assert 0 < row["sampler_gap"] < 0.05  # bfloat16
        assert row["peak_memory_gb"] > 0


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("at_once", (0, 12))  # all at once, or those that wait take the rooms of those that have ended
def test_a_recorded_step_samples_as_one_that_is_not(small, monkeypatch, dtype, at_once):
    vars(small).update(COMPUTE_DTYPE=dtype, BATCH_SIZE=8, SAMPLED_AT_ONCE=at_once)
    trainer, replays, record = trainer_of(small), [], decoding.Replayed.record

    def counted(self, work):
        replay = record(self, work)
        return lambda: replays.append(1) or replay()

    monkeypatch.setattr(decoding.Replayed, "record", counted)
    recorded = trainer.generate_responses_with_group_sampling(1)
    assert len(replays) > 20 and decoding.Replayed.works
    monkeypatch.setattr(decoding.Replayed, "works", False)
    plain = trainer.generate_responses_with_group_sampling(1)
    same = torch.tensor([one == other for one, other in zip(recorded.texts, plain.texts, strict=True)])
    assert same.double().mean() > 0.9 if dtype == "bfloat16" else same.all()
    assert torch.allclose(recorded.sampled_logps[same], plain.sampled_logps[same], atol=1e-4 if same.all() else 0.05)


def test_in_float32_the_gpu_computes_what_the_cpu_does(small):
    small.COMPUTE_DTYPE = small.FROZEN_DTYPE = "float32"
    texts, gradients = [], []
    for device in ("cpu", "cuda:0"):
        vars(small).update(dict.fromkeys(("POLICY_DEVICE", "REF_DEVICE", "REWARD_DEVICE"), device))
        trainer = trainer_of(small)
        rollouts = trainer.generate_responses_with_group_sampling(1)
        rollouts.advantages = torch.linspace(-1, 1, len(rollouts.texts), device=device)
        rollouts.old_logps = trainer.compute_log_probs(trainer.policy, rollouts)
        rollouts.ref_logps = trainer.compute_ref_logps(rollouts)
        trainer.compute_gradient(rollouts, 2048)
        texts.append(rollouts.texts)
        gradients.append({name: weight.grad.cpu() for name, weight in trainer.policy.named_parameters()})
    assert texts[0] == texts[1]
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max()), name


def test_if_the_gpu_is_full_an_update_goes_through_in_smaller_parts(small):
    vars(small).update(BATCH_SIZE=32, GROUP_SIZE=16, MICRO_BATCH_TOKENS=2**20)
    trainer = trainer_of(small)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rollouts.advantages = torch.linspace(-1, 1, len(rollouts.texts), device="cuda")
    rollouts.old_logps = rollouts.ref_logps = rollouts.sampled_logps.cuda()

    def gradient():
        trainer.fit_to_memory("updates", small.MICRO_BATCH_TOKENS, lambda n: trainer.compute_gradient(rollouts, n))
        return torch.cat([weight.grad.flatten() for weight in trainer.policy.parameters()])

    expected = gradient()
    torch.cuda.empty_cache()
    at_rest, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    gradient()
    room, halvings = torch.cuda.max_memory_reserved() - at_rest, trainer.fit_to_memory.halvings["updates"]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((at_rest + room / 2) / total)
    try:
        found = gradient()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halvings == 0 < trainer.fit_to_memory.halvings["updates"]
    assert torch.allclose(found, expected, rtol=0, atol=0.02 * expected.abs().max())  # bfloat16


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=configs.HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    output = ("--output-dir", str(tmp_path))
    run("gspo.py", "--preset", "smoke", "--save-every", "1", *output)
    run("gspo.py", "--resume", "latest", "--max-steps", "3", *output)
    (file,) = tmp_path.glob("*/metrics.jsonl")
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_selftest_passes(script):
    assert "cuda:0" in run(f"{script.__name__}.py", "--selftest")
