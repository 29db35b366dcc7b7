"""Mixtures of experts: recorded experts that are taken again, against a dense computation and a pass of its own."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from test_rollouts import PROMPTS, STARTED, VOCABULARY, completion, sample

import configs
import gspo
from bookkeeping.metrics import Clock, routing_metrics
from engine import packing, routing
from inputs.load import Reference, add_routing, prepare_to_train
from inputs.lora import add_lora

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
KINDS = {
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 6},
    "Olmoe": {"num_experts": 6, "eos_token_id": 1, "pad_token_id": 0},
}


def mixture(kind, routed=True):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    model.set_attn_implementation(packing.NAME)
    if routed:
        model.routing = routing.Routing(model)
    return model


def forgotten(rollouts):
    return rollouts.of(vars(rollouts) | {"experts": None})


def logps_of(model, rollouts, replay):
    gspo.ROUTING_REPLAY = replay
    return gspo.completion_logps(model, rollouts)[0]


def gradients_of(model, rollouts, replay):
    """Returns the bytes of each weight's gradient."""
    model.zero_grad()
    logps_of(model, rollouts, replay).sum().backward()
    return [weight.grad.numpy().tobytes() for weight in model.parameters()]


@pytest.mark.parametrize("rows", [PROMPTS, STARTED], ids=["prompts", "a common start"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_pass_is_bit_identical_to_the_recorded_one(kind, rows):
    model, plain = mixture(kind), mixture(kind, routed=False)
    rollouts = sample(model, rows, tokens=12)
    assert rollouts.texts == sample(plain, rows, tokens=12).texts
    assert rollouts.experts.dtype == torch.uint8 and rollouts.experts.shape == (*rollouts.input_ids.shape, 2, 2)
    own, of_pass = logps_of(plain, rollouts, ""), forgotten(rollouts)
    for replay, given in (("", rollouts), ("r3", rollouts), ("r2", of_pass), ("r2", of_pass)):
        assert torch.equal(logps_of(model, given, replay), own)
        assert gradients_of(model, given, replay) == gradients_of(plain, rollouts, "")
    assert torch.equal(of_pass.experts.sort(-1).values, rollouts.experts.sort(-1).values)  # sampler and trainer agree
    shifted = rollouts.of(vars(rollouts) | {"experts": rollouts.experts.roll(1, 1)})
    assert (logps_of(model, shifted, "r3") - own).abs().max() > 0.1  # a record that is out of place shows


def dense(block, normalised, current, layer):
    """Returns a block's forward in a loop over tokens, each through its experts in current["experts"]."""
    router, experts = block.gate, block.experts

    def forward(hidden):
        flat, outputs = hidden.view(-1, hidden.shape[-1]), []
        for token, chosen in zip(flat, current["experts"][:, layer].tolist(), strict=True):
            weights = (router.weight @ token).softmax(0)[chosen]
            if normalised:
                weights = weights / weights.sum()
            output = 0
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                output = output + weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
            if hasattr(block, "shared_expert"):
                output = output + block.shared_expert_gate(token).sigmoid() * block.shared_expert(token)
            outputs.append(output)
        return torch.stack(outputs).view_as(hidden)

    return forward


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_experts_equal_a_dense_computation_of_them(kind, monkeypatch):
    """The experts are drawn at random. Each sequence goes through alone, each token through its experts in a loop."""
    model, plain = mixture(kind), mixture(kind, routed=False)
    rollouts = sample(model, tokens=8)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(*rollouts.input_ids.shape, 2, 6, generator=generator).argsort(-1)[..., :2]
    for row in range(4, 16, 4):
        drawn[row : row + 4, : rollouts.prompt_lengths[row]] = drawn[row, : rollouts.prompt_lengths[row]]
    rollouts.experts = drawn.to(torch.uint8)
    logps = logps_of(model, rollouts, "r3")
    logps.sum().backward()

    current = {}
    plain.set_attn_implementation("eager")
    for layer, one in enumerate(plain.base_model.layers):
        normalised = kind == "Mixtral" or model.config.norm_topk_prob
        monkeypatch.setattr(one.mlp, "forward", dense(one.mlp, normalised, current, layer))
    for row in range(len(rollouts.texts)):
        ids, end = rollouts.input_ids[row], int(rollouts.lengths[row]) - 1
        current["experts"] = drawn[row, :end]
        logits = plain(ids[None, :end]).logits[0, rollouts.prompt_lengths[row] - 1 :]
        expected = logits.log_softmax(-1)[range(len(logits)), completion(rollouts, row)]
        torch.testing.assert_close(logps[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        expected.sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)
    assert model.base_model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_experts_recorded_under_one_split_are_right_under_another():
    model = mixture("Qwen3Moe")
    rollouts = sample(model, STARTED, tokens=12)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed, found = forgotten(rollouts).select(order), []
    gspo.ROUTING_REPLAY = "r2"
    whole = gspo.completion_logps(model, rollouts)[0][order]
    for budget in (1, 60, 120, 10_000):
        again = forgotten(mixed)
        logps = packing.in_micro_batches(again, lambda part: gspo.completion_logps(model, part)[0].detach(), budget)
        assert torch.equal(again.experts.sort(-1).values, rollouts.experts[order].sort(-1).values)
        torch.testing.assert_close(logps, whole.detach(), rtol=1e-6, atol=1e-6)
        found.append(again)
    for recorded in found:
        for budget in (1, 60, 120, 10_000):
            replayed = packing.in_micro_batches(
                recorded, lambda part: gspo.completion_logps(model, part)[0].detach(), budget
            )
            torch.testing.assert_close(replayed, whole.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_replay_holds_through_the_backward_pass(adapters, checkpointing):
    """The weights change between record and replay, so that the routers would choose other experts."""

    def gradient(checkpointing):
        model = mixture("Qwen3Moe")
        if adapters:
            torch.manual_seed(0)
            add_lora(model, 4, 8.0, "all-linear")
        rollouts = sample(model, tokens=12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        prepare_to_train(SimpleNamespace(GRADIENT_CHECKPOINTING=checkpointing), model)
        model.train(checkpointing)
        changed = routing_metrics(model, rollouts, 4, 1000, "auto")["routing_changed"]
        logps = logps_of(model, rollouts, "r3")
        loss = logps.sum() + routing.load_balancing_loss(model.routing, rollouts)
        loss.backward()
        return changed, logps.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    changed, logps, found = gradient(checkpointing)
    _, expected_logps, expected = gradient(False)
    assert changed > 0.2
    torch.testing.assert_close(logps, expected_logps)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_policy_without_its_adapter_chooses_its_own_experts():
    model = mixture("Qwen3Moe")
    rollouts = sample(model, tokens=12)
    expected = logps_of(model, rollouts, "").detach()
    torch.manual_seed(0)
    adapter = add_lora(model, 4, 8.0, "all-linear")
    rollouts.experts = rollouts.experts.roll(1, 1)
    gspo.ROUTING_REPLAY = "r3"
    with Reference(model, adapter) as reference, torch.no_grad():
        torch.testing.assert_close(gspo.completion_logps(reference, rollouts)[0], expected)
    assert not torch.allclose(gspo.completion_logps(model, rollouts)[0], expected, atol=0.1)


@pytest.mark.parametrize("constant, value", [("ROUTING_REPLAY", "r2"), ("ROUTER_AUX_COEF", 0.01)])
@pytest.mark.parametrize("kind", ["Qwen3", "DeepseekV3", "Glm4Moe"])
def test_a_model_whose_experts_cannot_be_replayed_is_one_line(kind, constant, value):
    sizes = {name: value for name, value in SIZES.items() if name != "num_experts_per_tok"} | {"num_key_value_heads": 4}
    own = {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    own |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, **({"head_dim": 8} if kind == "Qwen3" else own))
    model = transformers.AutoModelForCausalLM.from_config(config)
    gspo.ROUTING_REPLAY, gspo.ROUTER_AUX_COEF = "", 0.0
    add_routing(configs.snapshot(vars(gspo)), model)
    assert routing.routing_of(model) is None
    setattr(gspo, constant, value)
    says = "no mixture" if kind == "Qwen3" else "a mixture with a router of its own kind"
    with pytest.raises(configs.InputError, match=f"{constant} = {value!r}.*{kind}ForCausalLM, is {says}"):
        add_routing(configs.snapshot(vars(gspo)), model)


def test_the_load_balancing_loss_is_that_of_the_paper_however_a_batch_is_split():
    model = mixture("Qwen3Moe")
    rollouts = sample(model, tokens=12)
    expected = 0.0
    for layer in range(2):
        shares, chances, count = torch.zeros(6), 0.0, 0
        for row in range(len(rollouts.texts)):
            ids, end = rollouts.input_ids[row : row + 1], int(rollouts.lengths[row]) - 1
            output = model(ids[:, :end], output_router_logits=True)
            logits = output.router_logits[layer][rollouts.prompt_lengths[row] - 1 :]
            for chosen in logits.topk(2).indices.flatten().tolist():
                shares[chosen] += 1
            chances, count = chances + logits.softmax(-1).sum(0), count + len(logits)
        expected = expected + 6 * (shares / (2 * count) * chances / count).sum() / 2
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_gradient = torch.autograd.grad(expected, parameters, allow_unused=True)
    for budget in (1, 60, 10_000):
        model.zero_grad()
        total = 0.0
        for rows in packing.micro_batches(rollouts, budget):
            gspo.completion_logps(model, rollouts.select(rows))
            part = routing.load_balancing_loss(model.routing, rollouts)
            part.backward()
            total += part.item()
        assert total == pytest.approx(expected.item(), rel=1e-5)
        for parameter, gradient in zip(parameters, expected_gradient, strict=True):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_the_shipped_mixtures_sampler_and_trainer_choose_the_same_experts(small):
    small.POLICY_MODEL, small.ROUTING_REPLAY, small.REWARDS = "data/models/arithmetic-moe", "r3", "exact_match"
    trainer = small.GSPOTrainer()
    with trainer.reference as model:
        assert routing.routing_of(model) is None and model is not trainer.policy  # it is never replayed
    rollouts = trainer.generate_responses_with_group_sampling(1)
    replayed = trainer.compute_log_probs(trainer.policy, rollouts)
    own = rollouts.of(vars(rollouts) | {"experts": None})
    logps = trainer.compute_log_probs(trainer.policy, own)
    assert torch.equal(own.experts.sort(-1).values, rollouts.experts.sort(-1).values)
    assert torch.equal(logps, replayed) and (logps - rollouts.sampled_logps).abs().max() < 1e-4
    shifted = rollouts.of(vars(rollouts) | {"experts": rollouts.experts.roll(1, 1)})
    wrong = trainer.compute_log_probs(trainer.policy, shifted)
    assert (wrong - logps).abs().max() > 1  # nats


def test_r2_records_the_experts_of_the_pass_for_old_logps(small):
    small.POLICY_MODEL, small.ROUTING_REPLAY = "data/models/arithmetic-moe", "r2"
    trainer = small.GSPOTrainer()
    trainer.sampler.exact = False  # as in bfloat16
    rollouts = trainer.generate_responses_with_group_sampling(1)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():  # so that the trainer chooses others than the sampler did
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampled = rollouts.experts.clone()
    trainer.add_scores(rollouts, 1, Clock(trainer.policy_device))
    assert (rollouts.experts.sort(-1).values != sampled.sort(-1).values).any()
    replayed = trainer.compute_log_probs(trainer.policy, rollouts)
    torch.testing.assert_close(replayed, rollouts.old_logps, rtol=1e-5, atol=1e-5)
    rollouts.experts = sampled
    assert (trainer.compute_log_probs(trainer.policy, rollouts) - rollouts.old_logps).abs().max() > 1e-3


def test_after_a_step_the_policy_chooses_its_own_experts(small):
    small.POLICY_MODEL, small.ROUTING_REPLAY = "data/models/arithmetic-moe", "r3"
    trainer = small.GSPOTrainer()
    trainer.train_step(1)
    assert trainer.policy.routing.given is None
    trainer.policy(torch.zeros(1, 500, dtype=torch.long))  # more tokens than the step had given experts for


def test_the_metrics_of_routers_equal_a_count():
    model = mixture("Qwen3Moe")
    rollouts = sample(model, tokens=12)
    metrics = routing_metrics(model, rollouts, 4, 1000, "auto")
    assert metrics["routing_changed"] == 0
    busiest, entropies = [], []
    for layer in range(2):
        count, total = [0] * 6, 0
        for row in range(len(rollouts.texts)):
            first = int(rollouts.prompt_lengths[row]) - 1
            for token in range(first, first + int(rollouts.completion_lengths[row])):
                for expert in rollouts.experts[row, token, layer].tolist():
                    count[expert] += 1
                    total += 1
        busiest.append(6 * max(count) / total)
    for row in range(12, 16):
        end = int(rollouts.lengths[row]) - 1
        output = model(rollouts.input_ids[row : row + 1, :end], output_router_logits=True)
        for logits in output.router_logits:
            chances = torch.distributions.Categorical(logits=logits[rollouts.prompt_lengths[row] - 1 :])
            entropies += chances.entropy().tolist()
    assert metrics["expert_load_max"] == pytest.approx(sum(busiest) / 2)
    assert metrics["router_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    rollouts.experts = (rollouts.experts + 1) % 6
    assert routing_metrics(model, rollouts, 4, 1000, "auto")["routing_changed"] > 0.5
    assert routing_metrics(torch.nn.Linear(1, 1), rollouts, 4, 1000, "auto") == {}


def test_experts_go_with_their_completions(tmp_path):
    model = mixture("Qwen3Moe")
    short, long = sample(model, PROMPTS[:1], tokens=4), sample(model, PROMPTS[2:3], tokens=12)
    joined = gspo.Rollouts.join([short, long])
    assert joined.experts.shape[:2] == joined.input_ids.shape
    gspo.ROUTING_REPLAY = "r3"
    torch.testing.assert_close(
        gspo.completion_logps(model, joined.select(torch.tensor([6, 1])))[0][0],
        gspo.completion_logps(model, long)[0][2],
        rtol=0,
        atol=1e-5,
    )
