"""GSPO: Group Sequence Policy Optimization for language models (Zheng et al. 2025, arXiv 2507.18071).

For a prompt x, sample a group of G completions y_1 .. y_G from the policy as it is (π_old), score each one as a whole,
and improve the policy π by several updates on the objective

    J = E[ 1/G Σ_i min( s_i A_i, clip(s_i, 1 − CLIP_LOW, 1 + CLIP_HIGH) A_i ) ]                              (eq. 5)

    s_i = ( π(y_i|x) / π_old(y_i|x) )^(1/|y_i|) = exp( 1/|y_i| Σ_t log π(y_it)/π_old(y_it) )                 (eq. 7)

    A_i = r_i − mean(r_1 .. r_G), divided by the group's standard deviation if ADVANTAGE_TYPE is "normalized"  (eq. 6)

The reward is given to a sequence, so the importance ratio and the clip act on the sequence too: all its tokens have one
weight. GRPO (arXiv 2402.03300) has a weight per token, whose noise grows with length. The paper has no KL term and no
entropy bonus. Here both can be switched on, the KL with an adaptive coefficient:

    loss = −J + kl_coef · KL(π, π_ref) − ENTROPY_COEF · H(π)

One training step:
  1. take BATCH_SIZE prompts and sample GROUP_SIZE completions of each from the policy
  2. score the completions, and compute their log-probs under the reference model and the policy, π_ref and π_old
  3. turn rewards into advantages within each group
  4. GSPO_EPOCHS times: split the completions at random into MINI_BATCHES, and take one optimizer step on each
  5. adapt the KL coefficient, log, and now and then evaluate on held-out prompts

Run:   python gspo.py                     the embedded task, on any machine
       python gspo.py --help              every constant below is a flag
       python plotting.py outputs/<run>   redraw the figure
"""

import functools
import hashlib
import math
import os

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: its threads wait without holding cores for long

import torch

import configs
from bookkeeping.evaluation import evaluation_metrics
from bookkeeping.metrics import Clock, ratio_metrics, sampler_gap, step_metrics, trainer_metrics
from bookkeeping.run import Run
from bookkeeping.samples import samples_of_step
from bookkeeping.selftest import selftest
from engine.correction import corrected_advantages, trusted
from engine.memory import FitToMemory, set_up_process
from engine.packing import in_micro_batches, micro_batches, states_before_tokens
from engine.precision import autocast
from engine.processes import in_shares, sum_over_processes
from engine.rollouts import Rollouts, in_places
from engine.routing import load_balancing_loss
from engine.sampling import load_sampler
from engine.steps import learning_rate_at, split_at_random, take_step
from engine.vocabulary import token_logps
from engine.workers import LazyWorker, worker_beside
from inputs.load import load_inputs
from inputs.prompts import prompts_of_step
from scoring.load import check_reward_names, load_rewards

# ---- Constants -------------------------------------------------------------------------------------------------------

# Models and data
POLICY_MODEL = "data/models/arithmetic-policy"  # folder or Hub id of the model to train
POLICY_REVISION = "main"  # branch, tag or commit of a Hub id
POLICY_DTYPE = "float32"  # of the weights that train; "bfloat16" halves them, and swallows most updates below 1e-5
COMPUTE_DTYPE = "auto"  # of matrix products; "auto" is bfloat16 on a GPU and float32 elsewhere; docs/numerics.md
EXPERTS = "eager"  # how a mixture computes its experts, to the bit each time; "grouped_mm" is for GPUs; docs/gspo.md
REWARD_MODEL = "data/models/arithmetic-reward"  # folder or Hub id of a sequence classifier with one logit
REWARD_REVISION = "main"  # branch, tag or commit of a Hub id
USE_SEQUENCE_LEVEL_REWARD = True  # one reward per completion; False: REWARD_MODEL is a token classifier, one per token
STEP_SEPARATOR = ""  # with token rewards: count only tokens at which this text ends; "" counts all
FROZEN_DTYPE = "auto"  # of reference and reward model; "auto" is bfloat16 on a GPU and float32 elsewhere
TRUST_REMOTE_CODE = False  # run Python code that comes with a model
PROMPTS = "data/arithmetic/train.jsonl"  # training prompts: a JSONL, JSON or Parquet file, or a Hub id of a dataset
PROMPTS_CONFIG = ""  # configuration of a Hub dataset, such as "main"
PROMPTS_SPLIT = "train"  # split of a Hub dataset
EVAL_PROMPTS = "data/arithmetic/test.jsonl"  # held-out prompts, of the same kinds; "" holds out some of PROMPTS
EVAL_SPLIT = "test"  # split of a Hub dataset
EVAL_SHARE = 0.05  # share of PROMPTS that is held out if EVAL_PROMPTS is ""
PROMPT_COLUMN = "prompt"  # field that holds the prompt, a text or a list of chat messages
ANSWER_COLUMN = "answer"  # field that holds the answer, for rule rewards and evaluation
SYSTEM_PROMPT = ""  # first message of each chat, if any
THINKING = False  # ask a chat template that knows the word to open with a thinking section
CHAT_TEMPLATE_KWARGS = ""  # a JSON object of what else a chat template is given, such as '{"reasoning_effort": "low"}'
REWARDS = "reward_model"  # what is maximised: names from rewards.py with weights, "reward_model 1.0, exact_match 0.5"
EVAL_REWARD = "exact_match"  # rule of rewards.py that says whether a held-out completion is right (1) or not (0)
PRESET = ""  # name of a set of constants in configs.py, such as "smoke"

# Devices: with one GPU all three fall back to it, with none to the CPU
POLICY_DEVICE = "cuda:0"  # policy and optimizer
REF_DEVICE = "cuda:1"  # reference model
REWARD_DEVICE = "cuda:1"  # reward model
SHARD = False  # under torchrun: each process keeps a share of weights, gradients and optimizer state; docs/scaling.md

# Sampling
SAMPLER = "own"  # who samples: "own" is engine/sampling.py, and "vllm" needs requirements-vllm.txt (docs/vllm.md)
SAMPLER_DEVICE = "cuda:0"  # vLLM's; if it is the policy's, vLLM gives its memory back while the policy trains
SAMPLER_MEMORY = 0.4  # share of its device's memory that vLLM takes
SAMPLER_CORRECTION = "auto"  # "token": A min(π_old/π_sampled, 2); "sequence" leaves out means over 1 % off; "": none
GROUP_SIZE = 8  # completions per prompt, G
BATCH_SIZE = 16  # prompts per training step
MAX_PROMPT_TOKENS = 0  # tokens; longer prompts are left out; 0 is what the model's context leaves
MAX_COMPLETION_TOKENS = 64  # tokens; a completion without an end by then is truncated
SAMPLED_AT_ONCE = 0  # completions; fewer need less memory for keys and values; 0 is as many as it has room for
TEMPERATURE = 1.0  # divides the logits, in sampling and in all log-probs alike
TOP_P = 1.0  # nucleus sampling; below 1 the ratio is biased, because log-probs are of the full distribution

# Loss
GSPO_EPOCHS = 1  # passes over the rollouts of a step
MINI_BATCHES = 4  # optimizer steps per pass; paper: 4
WHOLE_GROUPS = False  # a group falls into one mini-batch, which reads its prompt once; False splits all completions
ROUTING_REPLAY = ""  # a mixture trains with the experts of π_old's pass ("r2") or of sampling ("r3"); "" chooses anew
ROUTER_AUX_COEF = 0.0  # weight of a mixture's load-balancing loss, E Σ_e f_e P_e (arXiv 2101.03961, eq. 4); 0 is off
RATIO_LEVEL = "sequence"  # "sequence" (eq. 5), "sequence_token" (GSPO-token, eq. 13) or "token" (as in GRPO)
LENGTH_NORMALIZED_RATIO = True  # eq. 7; False is the plain ratio of likelihoods, which wants a clip like 0.2
CLIP_LOW = 0.03  # s_i is clipped at 1 - this; paper: 3e-4, for long texts: the spread of log s falls as 1/sqrt(length)
CLIP_HIGH = 0.04  # s_i is clipped at 1 + this; paper: 4e-4
ADVANTAGE_TYPE = "relative"  # "relative" (minus the group mean) or "normalized" (and over the group's std; paper)
ENTROPY_COEF = 0.001  # weight of the entropy bonus; 0 computes none
KL_COEF = 0.04  # first weight of the KL to the reference model; 0 loads none; paper: 0
TARGET_KL = 0.6  # nats per token that ADAPTIVE_KL aims at
ADAPTIVE_KL = True  # raise the KL weight above twice the target, lower it below half of it

# Optimizer
LEARNING_RATE = 1e-3  # peak; AdamW; fits the embedded models, large ones want about 1e-6
LR_SCHEDULE = "linear"  # after the warm-up: "constant", or "linear" or "cosine" towards zero
WARMUP_STEPS = 5  # steps of linear warm-up
WEIGHT_DECAY = 0.0  # AdamW's
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
MICRO_BATCH_TOKENS = 2048  # tokens per forward pass; more is faster on a GPU, less saves memory
LOGITS_AT_ONCE = 2**26  # logits kept for the backward pass, a quarter of a GB; it computes the others again
GRADIENT_CHECKPOINTING = False  # compute activations again in the backward pass instead of keeping them

# LoRA
LORA_RANK = 0  # rank of the adapters that train in place of the weights; 0 trains all weights
LORA_ALPHA = 32.0  # an adapter counts by LORA_ALPHA / LORA_RANK
LORA_TARGETS = "all-linear"  # all linear layers but the head, or names such as "q_proj v_proj"
MERGE_LORA = True  # final/ holds the whole model with the adapters added in; else the adapters alone

# Run
MAX_STEPS = 80  # training steps
EVAL_EVERY = 20  # steps between evaluations; 0 evaluates only before the first step and at the end
EVAL_SIZE = 256  # held-out prompts per evaluation
EVAL_SAMPLES = 4  # completions per held-out prompt for eval_accuracy and eval_pass_at_k
PASS_AT = 2  # k of eval_pass_at_k, at most EVAL_SAMPLES
SAVE_EVERY = 20  # steps between checkpoints, which --resume goes on from; 0 saves only final/
KEEP_CHECKPOINTS = 2  # how many of the latest stay, beside the best by eval_accuracy
SAMPLE_GROUPS = 2  # groups per step written to samples.jsonl and shown in samples.html
TENSORBOARD = True  # write event files into the run's folder, if the tensorboard package is there
WANDB_PROJECT = ""  # project of Weights & Biases to log to; "" is none
RESUME = ""  # folder of a run to continue from its newest checkpoint, or "latest"
PROFILE = False  # write a trace of three steps, profile.json.gz, for a browser's trace viewer
SELFTEST = False  # check models, data and rewards in a minute, print a table, and train nothing
SEED = 0  # of everything random
OUTPUT_DIR = "outputs"  # a run is OUTPUT_DIR/gspo-<time>/
PANELS = "policy_loss entropy_loss kl_loss reward relative_advantage kl_divergence kl_coef avg_response_length"  # drawn

# What configs.py cannot know: limits of this algorithm's own constants, in the form of RULES, and its rows of presets.
limits = {
    "RATIO_LEVEL": (str, ("sequence", "sequence_token", "token"), None),
    "LENGTH_NORMALIZED_RATIO": (bool, (True, False), None),
}
per_token = "RATIO_LEVEL = {RATIO_LEVEL!r} needs a reward per completion; give --ratio-level sequence_token"
conflicts = [(lambda v: v["RATIO_LEVEL"] == "sequence" and not v["USE_SEQUENCE_LEVEL_REWARD"], per_token)]
tutorial = {"GROUP_SIZE": 4, "GSPO_EPOCHS": 4, "MINI_BATCHES": 1, "ADVANTAGE_TYPE": "normalized", "LEARNING_RATE": 1e-5}
tutorial |= {"LENGTH_NORMALIZED_RATIO": False, "CLIP_LOW": 0.2, "CLIP_HIGH": 0.2, "ENTROPY_COEF": 0.01}
tutorial |= {"KL_COEF": 0.2, "TARGET_KL": 0.01, "ADAPTIVE_KL": True}
gsm8k = {"CLIP_LOW": 3e-3, "CLIP_HIGH": 4e-3, "KL_COEF": 0.0, "ADAPTIVE_KL": False}  # docs/numerics.md on the clip
presets = {"gsm8k": gsm8k, "tutorial": tutorial}  # docs/gspo.md says where the values of "tutorial" come from

# ---- Algorithm -------------------------------------------------------------------------------------------------------
# Pure functions of tensors, in whatever floating dtype they are given. B completions (= prompts x G, the groups
# contiguous), T completion tokens. logps (B, T): log-probs of the sampled tokens, nats, at the sampling temperature.


def compute_relative_advantages(rewards, group_size):
    """Advantages within groups: A_i = r_i − mean(r), over std(r) + 1e-6 if ADVANTAGE_TYPE is "normalized".

    rewards (B,), groups contiguous -> (B,), no gradient. The std is the sample's (n − 1). A dead group, whose rewards
    are all equal, has no signal: its advantages are exactly 0, even if floats cannot represent the mean.
    """
    grouped = rewards.detach().double().view(-1, group_size)  # (prompts, G)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if ADVANTAGE_TYPE == "normalized":
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-6)
    dead = grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return advantages.masked_fill(dead, 0.0).view(-1).to(dtype)


def compute_token_advantages(rewards, completion_mask, group_size):
    """Advantages of tokens: each token's return, R_it = Σ_{u ≥ t} r_iu, minus the mean over all tokens of the group.

    Over their std + 1e-6 if ADVANTAGE_TYPE is "normalized". rewards (B, T), groups contiguous -> (B, T), no gradient; 0
    for masked tokens and in a dead group. This is process supervision as in DeepSeekMath (arXiv 2402.03300, section
    4.1.3), which normalizes rewards before it sums them.
    """
    returns = rewards.detach().double().masked_fill(~completion_mask, 0.0).flip(1).cumsum(1).flip(1)  # (B, T)
    advantages = torch.zeros_like(returns)
    for first in range(0, len(rewards), group_size):
        group = slice(first, first + group_size)
        mask, values = completion_mask[group], returns[group][completion_mask[group]]  # (G, T), (tokens,)
        centred = values - values.mean()
        if ADVANTAGE_TYPE == "normalized":
            centred = centred / (values.std() + 1e-6)
        if values.min() < values.max():
            advantages[group][mask] = centred
    return advantages.to(rewards.dtype)


def compute_sequence_ratio(logps, old_logps, completion_mask):
    """s_i = exp(mean over the tokens of log π/π_old), eq. 7; exp of the sum if not LENGTH_NORMALIZED_RATIO. (B,)

    Carries the gradient of logps. Masked positions cannot matter, whatever they hold.
    """
    log_ratio = (logps - old_logps).masked_fill(~completion_mask, 0.0).sum(1)  # (B,)
    if LENGTH_NORMALIZED_RATIO:
        log_ratio = log_ratio / completion_mask.sum(1).clamp(min=1)
    return bounded_exp(log_ratio)


def bounded_exp(log_ratio):
    """exp, held at the square root of the dtype's largest number, 2e19 in float32: infinity times zero would be NaN."""
    return log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) / 2).exp()


def compute_policy_loss(logps, old_logps, advantages, completion_mask):
    """The loss −J at RATIO_LEVEL: (scalar, stats). Without KL and entropy terms.

    advantages (B,), or (B, T) if RATIO_LEVEL is not "sequence". The gradient flows through logps alone.
    """
    level = compute_policy_loss_sequence_level if RATIO_LEVEL == "sequence" else compute_policy_loss_token_level
    return level(logps, old_logps, advantages, completion_mask)


def compute_policy_loss_sequence_level(logps, old_logps, advantages, completion_mask):
    """GSPO, eq. 5: −mean_i min(s_i A_i, clip(s_i) A_i), one ratio, one clip and one weight per sequence."""
    ratio = compute_sequence_ratio(logps, old_logps, completion_mask)  # (B,)
    losses = clipped_loss(ratio[:, None], advantages.view(len(ratio), -1)).expand(completion_mask.shape)
    return aggregate(losses, completion_mask), ratio_stats(logps, old_logps, advantages, completion_mask)


def compute_policy_loss_token_level(logps, old_logps, advantages, completion_mask):
    """One loss per token. With GSPO-token's ratio and advantages (B,), it has the gradient of the sequence level."""
    level = "token" if RATIO_LEVEL == "token" else "sequence_token"
    ratio = compute_ratio(logps, old_logps, completion_mask, level)  # (B, T)
    losses = clipped_loss(ratio, advantages.view(len(ratio), -1))
    return aggregate(losses, completion_mask), ratio_stats(logps, old_logps, advantages, completion_mask)


def compute_ratio(logps, old_logps, completion_mask, level=None):
    """The importance ratio at a level, None for RATIO_LEVEL: of sequences (B,), or of tokens (B, T), 1 where masked.

    GSPO-token's (eq. 14) is s_it = sg[s_i] · π(y_it) / sg[π(y_it)]: s_i in value, with the gradient of one token.
    """
    level = level or RATIO_LEVEL
    if level == "token":
        return bounded_exp((logps - old_logps).masked_fill(~completion_mask, 0.0))
    ratio = compute_sequence_ratio(logps, old_logps, completion_mask)  # (B,)
    if level == "sequence":
        return ratio
    return ratio.detach()[:, None] * (logps - logps.detach()).masked_fill(~completion_mask, 0.0).exp()


def clipped_loss(ratio, advantages):
    """−min(ratio · A, clip(ratio) · A), in the shape of ratio."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)


def ratio_stats(logps, old_logps, advantages, completion_mask):
    """What is logged of the ratio. clip_fraction: the share whose gradient the clip removes, of sequences or tokens."""
    ratio = compute_ratio(logps, old_logps, completion_mask).view(len(logps), -1)  # (B, 1 or T)
    advantages = advantages.view(len(ratio), -1)  # (B, 1 or T)
    if RATIO_LEVEL != "token" and advantages.shape[1] == 1:  # one ratio per sequence, so each counts once
        ratio, completion_mask = ratio[:, :1], completion_mask.any(1, keepdim=True)
    above = (advantages > 0) & (ratio > 1 + CLIP_HIGH)
    below = (advantages < 0) & (ratio < 1 - CLIP_LOW)
    return ratio_metrics(ratio, above | below, completion_mask)


def token_weights(completion_mask):
    """How tokens are averaged: weights (B, T), here 1/n_i, and what their sum is divided by, the number of sequences.

    The loss, the share of a micro-batch in the gradient, and the logged means all derive from it.
    """
    lengths = completion_mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return completion_mask.double() / lengths, completion_mask.any(1).sum()


def aggregate(values, completion_mask):
    """(B, T) -> scalar: the sum of values by their token_weights, over the divisor. Masked values cannot matter."""
    weights, divisor = token_weights(completion_mask)
    return (values.masked_fill(~completion_mask, 0.0) * weights.to(values.dtype)).sum() / divisor


def compute_kl(logps, ref_logps):
    """k3 = π_ref/π − log(π_ref/π) − 1 per token, (B, T): never negative, unbiased as a value for KL(π ‖ π_ref).

    As a loss, its gradient is that of the forward KL(π_ref ‖ π). Source: Schulman 2020, "Approximating KL Divergence".
    """
    log_ratio = (ref_logps - logps).clamp(max=math.log(torch.finfo(logps.dtype).max) / 2)  # as in bounded_exp
    return log_ratio.exp() - log_ratio - 1


def compute_kl_loss(logps, old_logps, ref_logps, completion_mask):
    """The KL term of the loss before its coefficient: k3, aggregated. Scalar; the gradient flows through logps."""
    logps, ref_logps = (x.masked_fill(~completion_mask, 0.0) for x in (logps, ref_logps))
    return aggregate(compute_kl(logps, ref_logps), completion_mask)


def next_kl_coef(kl_coef, mean_kl):
    """The KL weight for the next step: x 1.5 above 2 TARGET_KL, x 0.5 below TARGET_KL / 2, held in [0.01, 1]."""
    factor = 1.5 if mean_kl > 2 * TARGET_KL else 0.5 if mean_kl < TARGET_KL / 2 else 1.0
    return min(max(kl_coef * factor, 0.01), 1.0)


# ---- Data and log-probs ----------------------------------------------------------------------------------------------


def generator_of(*purpose):
    """A random generator on the CPU that depends on SEED and purpose alone, so that nothing random needs saving."""
    digest = hashlib.sha256(repr((SEED, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def completion_logps(model, rollouts, with_entropy=False):
    """log π of the sampled tokens: logps (B, T) in nats on the model's device, 0 where masked.

    Second: the entropy of the full distribution at each of them, (B, T), or None. The sequences go through the model
    packed, without padding. The head is applied to completion positions alone, LOGITS_AT_ONCE at a time.
    """
    head, targets = model.get_output_embeddings(), rollouts.completion_ids.to(model.device)  # (tokens,)
    with autocast(model.device, COMPUTE_DTYPE):
        hidden = states_before_tokens(model, rollouts, replay=ROUTING_REPLAY != "") / TEMPERATURE  # (tokens, H)
        values = token_logps(hidden, targets, head, with_entropy, LOGITS_AT_ONCE)
    logps, entropy = (in_places(value, rollouts.completion_mask) for value in values)
    return logps, entropy if with_entropy else None


# ---- Trainer ---------------------------------------------------------------------------------------------------------


class GSPOTrainer:
    """Loads models and data by the constants; train() does the rest. Raises InputError on what cannot be used."""

    kept = ("kl_coef",)  # what a checkpoint holds beside models and optimizers; nothing random: see generator_of

    def __init__(self):
        self.constants = configs.snapshot(globals())
        self.devices = configs.choose_devices(self.constants)
        self.policy_device = self.devices["POLICY_DEVICE"]
        check_reward_names(self.constants)
        inputs = load_inputs(self.constants, self.devices, generator_of("held out"))
        self.rewards, self.eval_reward = load_rewards(self.constants, self.devices["REWARD_DEVICE"], inputs)
        vars(self).update(vars(inputs))  # train_rows, eval_rows, tokenizer, eos_ids, policy, adapter, reference

        self.fit_to_memory = FitToMemory()
        self.sampler = load_sampler(self.constants, inputs, self.devices, self.fit_to_memory)
        self.all_move = self.reference is not None or ENTROPY_COEF + ROUTER_AUX_COEF > 0  # even without an advantage
        self.on_policy = not (self.sampler.exact or self.sampler.correction or ROUTING_REPLAY == "r2")  # see 4. Update
        self.worker = worker_beside(self.policy_device, self.devices)
        self.trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.beside = {}  # further models that train, by name
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.kl_coef = min(max(KL_COEF, 0.01), 1.0) if ADAPTIVE_KL and KL_COEF > 0 else KL_COEF
        self.metrics_history, self.samples, self.skipped = [], [], []
        self.run = None  # made by train(), so that a run that never started leaves nothing behind

    def train_step(self, step):
        """One step (from 1), in the order of the docstring at the top. Returns its metrics."""
        clock = Clock(self.policy_device)
        with clock("rollout"):
            rollouts = self.generate_responses_with_group_sampling(step)
        self.add_scores(rollouts, step, clock)
        with clock("logps"):
            gap = sampler_gap(rollouts, self.compute_log_probs(self.policy, rollouts[-GROUP_SIZE:]))
            rollouts.advantages = self.compute_advantages(rollouts)
            if not self.all_move:
                self.add_old_logps(rollouts, step)
        with clock("update"):
            updates = self.update_policy(rollouts, step)
        with clock("log"):
            metrics = {"step": step} | gap | self.metrics_of_step(step, rollouts, updates)
            logps = self.compute_log_probs(self.policy, rollouts[: SAMPLE_GROUPS * GROUP_SIZE])
            self.samples, self.skipped = samples_of_step(step, self.tokenizer, rollouts, logps, metrics)
            self.update_kl_coef(metrics["kl_divergence"])
        return metrics | clock.metrics(metrics["completion_tokens"])

    # -- 1. Sample

    def generate_responses_with_group_sampling(self, step) -> Rollouts:
        """GROUP_SIZE completions of each of the step's prompts from the policy as it is."""
        rows = prompts_of_step(self.train_rows, step, BATCH_SIZE, generator_of)
        return self.sample(rows, GROUP_SIZE, ("rollout", step))

    def sample(self, rows, group_size, purpose, greedy=False) -> Rollouts:
        """group_size completions of each row's prompt: Rollouts.

        Randomness depends on SEED, purpose and the place of each completion, not on how many are sampled at once.
        """
        shape = (len(rows) * group_size, MAX_COMPLETION_TOKENS)
        uniform = None if greedy else torch.rand(shape, dtype=torch.float64, generator=generator_of(*purpose))
        settings = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": MAX_COMPLETION_TOKENS}
        return in_shares(self.sampler, rows, group_size, uniform, **settings)

    # -- 2. Score

    def compute_rewards(self, rollouts):
        """The weighted sum of REWARDS, (B,). If the reward model scores tokens, (B, T), with the others on the last."""
        return self.rewards.of(rollouts)

    def score(self, rollouts):
        """The rewards that advantages are made of, (B,) or (B, T)."""
        return self.compute_rewards(rollouts)

    @torch.no_grad()
    def compute_log_probs(self, model, rollouts, purpose="log-probs"):
        """Log-probs of all completions under a model: (B, T) on its device."""
        work = functools.partial(in_micro_batches, rollouts, lambda part: completion_logps(model, part)[0], model=model)
        return self.fit_to_memory(purpose, MICRO_BATCH_TOKENS, work).to(model.device)  # even if there are none

    def compute_ref_logps(self, rollouts):
        """log π_ref, (B, T): of the reference model, or of the policy without its adapter; None without a KL term."""
        if self.reference is None:
            return None
        with self.reference as model:
            return self.compute_log_probs(model, rollouts).to(self.policy_device)

    def add_scores(self, rollouts, step, clock):
        """Adds rewards, old_logps and ref_logps. Models on devices of their own work while the policy does."""
        rewards = self.worker.submit(self.score, rollouts)
        beside = self.worker if self.reference is not None and not self.reference.is_policy else LazyWorker()
        ref_logps = beside.submit(self.compute_ref_logps, rollouts)
        rollouts.old_logps = rollouts.sampled_logps.to(self.policy_device, copy=True)
        with clock("logps"):
            if self.all_move:
                self.add_old_logps(rollouts, step)
        with clock("reward"):
            rollouts.rewards = rewards.result().to(self.policy_device)
        with clock("logps"):
            rollouts.ref_logps = ref_logps.result()

    # -- 3. Advantages

    def compute_advantages(self, rollouts):
        """(B,), or (B, T) if each token has a reward of its own."""
        if USE_SEQUENCE_LEVEL_REWARD:
            return compute_relative_advantages(rollouts.rewards, GROUP_SIZE)
        mask = rollouts.completion_mask.to(self.policy_device)
        return compute_token_advantages(rollouts.rewards, mask, GROUP_SIZE)

    # -- 4. Update

    def mini_batches(self, rollouts, step, epoch):
        """The completions of each optimizer step of an epoch, at random: a list of their numbers."""
        generator, together = generator_of("mini-batches", step, epoch), GROUP_SIZE if WHOLE_GROUPS else 1
        return split_at_random(torch.arange(len(rollouts.texts)), MINI_BATCHES, together, generator)

    def add_old_logps(self, rollouts, step):
        """Computes log π_old in the very micro-batches in which the updates compute π, so that the first ratios are 1.

        In bfloat16 a log-prob depends on what else is in its batch. The sampler's log-probs stay where a completion
        moves nothing, and where they are the trainer's: the own sampler's in float32 on a CPU. If on_policy, the first
        update needs no pass before it: π is still π_old there, so the log-probs that it computes are the old ones.
        """
        if self.sampler.exact or step <= self.constants.resting_steps:
            return
        moves = self.moving(rollouts)
        for rows in self.mini_batches(rollouts, step, epoch=0)[self.on_policy :]:
            moving = rollouts.select(rows := rows[moves[rows]])
            if ROUTING_REPLAY == "r2":
                moving.experts = None  # so the pass chooses them, and puts them there
            rollouts.old_logps[rows.to(self.policy_device)] = self.compute_log_probs(self.policy, moving, "updates")
            if moving.experts is not None:
                rollouts.experts[rows] = moving.experts

    def update_policy(self, rollouts, step):
        """GSPO_EPOCHS passes over the completions, of MINI_BATCHES optimizer steps each. Returns their stats."""
        updates, kept = [], trusted(rollouts, self.sampler.correction)
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(step, self.constants)
        for epoch in range(GSPO_EPOCHS):
            for rows in self.mini_batches(rollouts, step, epoch):
                if len(rows := rows[kept[rows]]):
                    batch = rollouts.select(rows)
                    updates.append(self.update(batch, self.on_policy and not updates))
                    rollouts.old_logps[rows.to(self.policy_device)] = batch.old_logps
        return updates

    def update(self, batch, on_policy=False):
        """One optimizer step on some completions. Returns the losses and the statistics of the ratio.

        The statistics are of all completions of the batch, whatever else the loss has. One without an advantage counts
        with a ratio of 1, because its ratio moves nothing. on_policy: its log-probs become old_logps of the batch.
        """
        compute = functools.partial(self.compute_gradient, batch, on_policy=on_policy)
        logps, stats = self.fit_to_memory("updates", MICRO_BATCH_TOKENS, compute)
        stats["grad_norm"] = take_step(self.optimizer, MAX_GRAD_NORM, stats)
        mask = batch.completion_mask.to(self.policy_device)
        counted = torch.where(batch.advantages.view(len(mask), -1).any(1, keepdim=True), logps, batch.old_logps)
        stats |= ratio_stats(counted, batch.old_logps, batch.advantages, mask)
        if batch.ref_logps is not None:
            kl = compute_kl(logps, batch.ref_logps)  # logged as a mean per token, whatever the loss divides by
            stats["kl_divergence"] = aggregate(kl, mask) / aggregate(torch.ones_like(kl), mask)
        return stats

    def compute_gradient(self, batch, budget, on_policy=False):
        """The gradient of the loss over a batch, in micro-batches of at most budget tokens.

        Returns logps (B, T), without gradient, and the losses. Rows that move nothing stay out, and have old_logps.
        """
        chosen = self.moving(batch).nonzero().squeeze(1)
        moving, logps = batch.select(chosen), torch.zeros_like(batch.old_logps)
        stats = {"policy_loss": torch.zeros((), device=self.policy_device)}
        self.optimizer.zero_grad()
        self.policy.train(GRADIENT_CHECKPOINTING)  # it works in training mode alone; there is no dropout
        for rows in micro_batches(moving, budget, self.policy):
            part = moving.select(rows)
            part_logps, entropy = completion_logps(self.policy, part, with_entropy=ENTROPY_COEF > 0)
            part.old_logps = part_logps.detach() if on_policy else part.old_logps
            losses = self.losses(part, batch, part_logps, entropy)
            sum(losses.values()).backward()
            logps[chosen[rows].to(self.policy_device)] = part_logps.detach()
            for name, loss in losses.items():
                stats[name] = stats.get(name, 0.0) + loss.detach()
        self.policy.eval()
        moves = self.moving(batch)[:, None].to(self.policy_device)
        logps = sum_over_processes(logps, "an update").where(moves, batch.old_logps)
        batch.old_logps = logps if on_policy else batch.old_logps
        return logps, stats

    def moving(self, batch):
        """Which completions move the policy, (B,) on the CPU: with an advantage, or all by another term."""
        if self.all_move:
            return torch.ones(len(batch.texts), dtype=torch.bool)
        return batch.advantages.view(len(batch.texts), -1).any(1).cpu()

    def losses(self, part, batch, logps, entropy):
        """What a part of the batch adds to its loss, {name: scalar}.

        A part counts by its share of the batch's divisor, so that how a batch is split cannot change the gradient.
        """
        mask = part.completion_mask.to(self.policy_device)
        share = token_weights(part.completion_mask)[1] / token_weights(batch.completion_mask)[1]
        advantages = corrected_advantages(part, self.sampler.correction)
        losses = {"policy_loss": compute_policy_loss(logps, part.old_logps, advantages, mask)[0]}
        if ENTROPY_COEF > 0:
            losses["entropy_loss"] = -ENTROPY_COEF * aggregate(entropy, mask)
        if part.ref_logps is not None:
            losses["kl_loss"] = self.kl_coef * compute_kl_loss(logps, part.old_logps, part.ref_logps, mask)
        losses = {name: share * loss for name, loss in losses.items()}
        if ROUTER_AUX_COEF > 0:  # a mean over tokens, whatever the loss divides by
            losses["router_loss"] = ROUTER_AUX_COEF * load_balancing_loss(self.policy.routing, batch)
        return losses

    # -- 5. Adapt and log

    def update_kl_coef(self, mean_kl):
        """Adapts the weight of the KL term for the next step. mean_kl: None without a KL term, or without an update."""
        if ADAPTIVE_KL and mean_kl is not None:
            self.kl_coef = next_kl_coef(self.kl_coef, mean_kl)

    def metrics_of_step(self, step, rollouts, updates):
        """What metrics.jsonl holds of a step's sampling, rewards and updates."""
        return trainer_metrics(self, step, rollouts) | step_metrics(rollouts, updates, GROUP_SIZE)

    # -- Around the steps

    def train(self):
        """Trains for MAX_STEPS steps. Returns metrics_history, which is also what metrics.jsonl holds."""
        set_up_process(self.policy_device)
        with Run(self) as self.run:
            for step in self.run.steps():  # from 0, the evaluation before training
                metrics = self.run.unfinished or self.train_step(step)
                self.run.keep(step, metrics)
                if self.run.evaluation_is_due(step):
                    metrics |= self.evaluate()
                self.run.finish_step(step, metrics)
        return self.metrics_history

    def evaluate(self):
        """Held-out accuracy, sampled and greedy: eval_*. The random numbers are the same each time."""
        sampled = self.sample(self.eval_rows, EVAL_SAMPLES, ("evaluation",))
        greedy = self.sample(self.eval_rows, 1, ("evaluation",), greedy=True)
        self.eval_texts = greedy.texts
        return evaluation_metrics(sampled, greedy, self.eval_reward, PASS_AT)


# ---- Run -------------------------------------------------------------------------------------------------------------


def main(argv=None):
    with configs.one_line_errors():
        configs.apply_overrides(globals(), argv, resume=Run.constants_to_resume)
        trainer = GSPOTrainer()
        selftest(trainer) if SELFTEST else trainer.train()


if __name__ == "__main__":
    main()
