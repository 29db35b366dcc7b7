"""VAPO: Value-model-based Augmented PPO (ByteDance Seed 2025, arXiv 2504.05118).

For a prompt x, sample a group of completions y_1 .. y_G from the policy as it is (π_old), score each one by a rule,
right or wrong, and improve the policy π on

    J = E[ 1/(Σ_i |y_i|) Σ_i Σ_t min( r_it A_it, clip(r_it, 1 − CLIP_LOW, 1 + CLIP_HIGH) A_it ) ]
        + POSITIVE_COEF · the mean of log π(y_it) over the tokens of all right completions

Against ppo.py, by the paper's sections, each part with a constant that turns it off:
  4.1  value pre-training   in the first VALUE_PRETRAIN_STEPS steps the policy rests, and the critic learns Monte-Carlo
                            returns, Σ_k GAMMA^k R_i,t+k
       decoupled GAE        the critic learns returns of λ = LAMBDA_CRITIC = 1, in which no wrong value counts
  4.2  length-adaptive GAE  advantages have λ_i = 1 − 1/(ALPHA |y_i|): a long completion looks further ahead
       token mean           one mean over all tokens of an optimizer step (LOSS_AGGREGATION)
  4.3  clip-higher          CLIP_HIGH is above CLIP_LOW, as in dapo.py
       positive examples    the second term of J: what was right is imitated, too
       group sampling       few prompts, GROUP_SIZE completions of each; the baseline is still the critic's

One training step:
  1. take BATCH_SIZE prompts and sample GROUP_SIZE completions of each from the policy
  2. score the completions, and compute values and log-probs, π_old
  3. turn scores into rewards per token, and these into advantages and returns
  4. VAPO_EPOCHS times: split the completions at random into MINI_BATCHES, and take a step of policy and critic on each
  5. log, and now and then evaluate on held-out prompts

Run:   python vapo.py                     the embedded task, on any machine
       python vapo.py --help              every constant below is a flag
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
from bookkeeping.metrics import Clock, ratio_metrics, sampler_gap, step_metrics, trainer_metrics, value_metrics
from bookkeeping.run import Run
from bookkeeping.samples import samples_of_step
from bookkeeping.selftest import selftest
from engine.correction import corrected_advantages, trusted
from engine.memory import FitToMemory, set_up_process
from engine.packing import in_micro_batches, micro_batches, states_before_tokens
from engine.precision import autocast
from engine.processes import in_shares, sum_over_processes
from engine.rollouts import Rollouts, in_places, last_tokens
from engine.routing import load_balancing_loss
from engine.sampling import load_sampler
from engine.steps import learning_rate_at, split_at_random, take_step
from engine.vocabulary import token_logps
from engine.workers import LazyWorker, worker_beside
from inputs.critic import load_critic
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
CRITIC_MODEL = ""  # folder or Hub id: a language model's body, or body and head of a classifier; "" is the policy's
CRITIC_REVISION = "main"  # branch, tag or commit of a Hub id
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
REWARDS = "exact_match"  # what is maximised: names from rewards.py with weights, "reward_model 1.0, exact_match 0.5"
EVAL_REWARD = "exact_match"  # rule of rewards.py that says whether a completion is right (1) or not (0)
PRESET = ""  # name of a set of constants in configs.py, such as "smoke"

# Devices: with one GPU all four fall back to it, with none to the CPU
POLICY_DEVICE = "cuda:0"  # policy and optimizer
REF_DEVICE = "cuda:1"  # reference model
REWARD_DEVICE = "cuda:1"  # reward model
SHARD = False  # under torchrun: each process keeps a share of weights, gradients and optimizer state; docs/scaling.md
CRITIC_DEVICE = "cuda:1"  # critic and its optimizer

# Sampling
SAMPLER = "own"  # who samples: "own" is engine/sampling.py, and "vllm" needs requirements-vllm.txt (docs/vllm.md)
SAMPLER_DEVICE = "cuda:0"  # vLLM's; if it is the policy's, vLLM gives its memory back while the policy trains
SAMPLER_MEMORY = 0.4  # share of its device's memory that vLLM takes
SAMPLER_CORRECTION = "auto"  # "token": A min(π_old/π_sampled, 2); "sequence" leaves out means over 1 % off; "": none
GROUP_SIZE = 16  # completions per prompt; no baseline is made of them
BATCH_SIZE = 8  # prompts per training step
MAX_PROMPT_TOKENS = 0  # tokens; longer prompts are left out; 0 is what the model's context leaves
MAX_COMPLETION_TOKENS = 64  # tokens; a completion without an end by then is truncated
SAMPLED_AT_ONCE = 0  # completions; fewer need less memory for keys and values; 0 is as many as it has room for
TEMPERATURE = 1.0  # divides the logits, in sampling and in all log-probs alike
TOP_P = 1.0  # nucleus sampling; below 1 the ratio is biased, because log-probs are of the full distribution

# Rewards and advantages
KL_COEF = 0.0  # weight of the KL in the rewards; 0 loads no reference model; the paper has none
TARGET_KL = 0.6  # nats per token that ADAPTIVE_KL aims at
ADAPTIVE_KL = False  # raise the KL weight above twice the target, lower it below half of it
GAMMA = 1.0  # discount per token
LAMBDA = 0.95  # of the advantages' GAE if ALPHA = 0: 0 trusts the critic after one token, 1 not at all
LAMBDA_CRITIC = 1.0  # of the GAE of the critic's returns; ppo.py has LAMBDA here, too
ALPHA = 3.0  # λ = 1 - 1/(ALPHA x length), at least 0; 0 is off; paper: 0.05, for which 20 tokens and fewer have λ = 0
BOOTSTRAP_TRUNCATED = False  # a truncated completion goes on with the critic's value; False: it ends, as the score says
ADVANTAGE_TYPE = "normalized"  # "normalized" (whitened over the step's tokens) or "relative" (to the critic, as GAE is)

# Loss
VAPO_EPOCHS = 1  # passes over the rollouts of a step
MINI_BATCHES = 4  # optimizer steps per pass, of policy and of critic
WHOLE_GROUPS = False  # a group falls into one mini-batch, which reads its prompt once; False splits all completions
ROUTING_REPLAY = ""  # a mixture trains with the experts of π_old's pass ("r2") or of sampling ("r3"); "" chooses anew
ROUTER_AUX_COEF = 0.0  # weight of a mixture's load-balancing loss, E Σ_e f_e P_e (arXiv 2101.03961, eq. 4); 0 is off
CLIP_LOW = 0.2  # the token's ratio is clipped at 1 - this
CLIP_HIGH = 0.28  # the token's ratio is clipped at 1 + this
DUAL_CLIP = 0.0  # for negative advantages the loss of a token is at most this times -A; 0 is off, verl's default is 3
VALUE_CLIP = 0.2  # a value is clipped at this distance from the one before the step; 0 is off
LOSS_AGGREGATION = "token_mean"  # "token_mean", or "sequence_mean", a mean over tokens and then over completions
POSITIVE_COEF = 0.1  # weight of the loss of right completions; 0 is off
ENTROPY_COEF = 0.0  # weight of the entropy bonus; 0 computes none
VALUE_PRETRAIN_STEPS = 10  # first steps, in which only the critic learns; 0 is off; paper: 50

# Optimizer
LEARNING_RATE = 1e-3  # peak; AdamW; fits the embedded models, large ones want about 1e-6
LR_SCHEDULE = "linear"  # after the warm-up: "constant", or "linear" or "cosine" towards zero
CRITIC_LEARNING_RATE = 1e-3  # of the critic's AdamW
CRITIC_LR_SCHEDULE = "linear"  # as LR_SCHEDULE; at a constant rate, values wander about the returns
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
OUTPUT_DIR = "outputs"  # a run is OUTPUT_DIR/vapo-<time>/
PANELS = "policy_loss value_loss reward explained_variance positive_loss clip_fraction entropy avg_response_length"  # 8

# What configs.py cannot know: limits of this algorithm's own constants, in the form of RULES, and its rows of presets.
limits = {
    "GROUP_SIZE": (int, lambda v: v >= 1, "at least 1 completion per prompt"),
    "ALPHA": (float, lambda v: 0 <= v < math.inf, "0 for off, or a positive number such as the paper's 0.05"),
    "LOSS_AGGREGATION": (str, ("token_mean", "sequence_mean"), None),
}
all_zero = "ALPHA = {ALPHA} makes λ zero at MAX_COMPLETION_TOKENS = {MAX_COMPLETION_TOKENS} and below; raise --alpha"
conflicts = [(lambda v: 0 < v["ALPHA"] * v["MAX_COMPLETION_TOKENS"] <= 1, all_zero)]
policy_rests = "VALUE_PRETRAIN_STEPS"
gsm8k = {"GROUP_SIZE": 16, "BATCH_SIZE": 8, "ALPHA": 0.05, "VALUE_PRETRAIN_STEPS": 50, "CRITIC_LEARNING_RATE": 2e-6}
smollm2 = {"SAMPLED_AT_ONCE": 32, "MICRO_BATCH_TOKENS": 768, "CRITIC_LEARNING_RATE": 1e-4}  # ppo.py says why
smollm2 |= {"VALUE_PRETRAIN_STEPS": 5, "MAX_STEPS": 25}  # the critic learns first, so the policy has ppo.py's 20 steps
presets = {"smoke": {"VALUE_PRETRAIN_STEPS": 1}, "gsm8k": gsm8k, "gsm8k-reward-model": gsm8k, "smollm2": smollm2}
presets["smollm2-lora"] = smollm2 | {"CRITIC_LEARNING_RATE": 3e-4}  # the critic trains adapters, too

# ---- Algorithm -------------------------------------------------------------------------------------------------------
# Pure functions of tensors, in whatever floating dtype they are given. B completions (= prompts x G, the groups
# contiguous), T completion tokens. logps (B, T): log-probs of the sampled tokens, nats, at the sampling temperature.


def compute_token_rewards(rewards, old_logps, ref_logps, completion_mask, kl_coef=None):
    """Rewards of tokens: the score at the last one, minus kl_coef · (log π_old − log π_ref) at each. (B, T)

    No gradient. rewards (B,), or (B, T) if each token has a score. ref_logps None: no KL. kl_coef: None for KL_COEF.
    """
    if rewards.dim() == 1:
        rewards = last_tokens(completion_mask) * rewards[:, None]
    if ref_logps is not None:
        rewards = rewards - (KL_COEF if kl_coef is None else kl_coef) * (old_logps - ref_logps)
    return rewards.detach().masked_fill(~completion_mask, 0.0)


def length_adaptive_lambda(completion_lengths):
    """λ_i = 1 − 1/(ALPHA |y_i|), at least 0, which the paper does not say: tokens (B,) -> (B,), float64."""
    return (1 - 1 / (ALPHA * completion_lengths.double())).clamp(min=0.0)


def compute_gae(token_rewards, values, completion_mask):
    """GAE: advantages at the λ of each completion's length, and returns at LAMBDA_CRITIC, both (B, T). No gradient."""
    lam = length_adaptive_lambda(completion_mask.sum(1)) if ALPHA > 0 else LAMBDA
    advantages, for_critic = (gae(token_rewards, values, completion_mask, one) for one in (lam, LAMBDA_CRITIC))
    return advantages, for_critic + values.detach().masked_fill(~completion_mask, 0.0)


def gae(token_rewards, values, completion_mask, lam):
    """Advantages (1506.02438, eq. 16) at GAMMA and lam, a number or (B,): (B, T). V after the end is 0. In float64."""
    rewards, values = (x.detach().double().masked_fill(~completion_mask, 0.0) for x in (token_rewards, values))
    delta = rewards + GAMMA * torch.nn.functional.pad(values, (0, 1))[:, 1:] - values
    advantages, ahead = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):  # of all completions at once; what is masked has 0
        advantages[:, t] = ahead = delta[:, t] + GAMMA * lam * ahead
    return advantages.to(token_rewards)


def whiten(values, completion_mask):
    """Values minus their mean, over sqrt(variance + 1e-8), over all tokens; the variance is the sample's (n − 1)."""
    some = values[completion_mask].double()
    variance = some.var() if len(some) > 1 else 0.0
    return ((values.double() - some.mean()) / (variance + 1e-8) ** 0.5).masked_fill(~completion_mask, 0.0).to(values)


def compute_value_loss(values, old_values, returns, completion_mask):
    """½ mean of max((V − R)², (clip(V, V_old ± VALUE_CLIP) − R)²) over tokens: (scalar, stats). Gradient of values."""
    values, old_values, returns = (x.masked_fill(~completion_mask, 0.0) for x in (values, old_values, returns))
    errors = (values - returns).square()
    clipped = (values.clamp(old_values - VALUE_CLIP, old_values + VALUE_CLIP) - returns).square()
    worse = (clipped > errors) & (VALUE_CLIP > 0)
    losses, tokens = torch.where(worse, clipped, errors), completion_mask.sum()
    return 0.5 * losses.sum() / tokens, {"value_clip_fraction": worse.to(losses.dtype).sum() / tokens}


def compute_policy_loss(logps, old_logps, advantages, completion_mask):
    """PPO, eq. 7: −min(r_it A_it, clip(r_it) A_it), mean over all tokens: (scalar, stats). No KL or entropy term.

    advantages (B,) or (B, T). The gradient flows through logps alone. With DUAL_CLIP = c > 0, tokens of negative
    advantage have max(min(r A, clip(r) A), c A), which bounds the loss if the ratio explodes (arXiv 1912.09729).
    """
    ratio = compute_ratio(logps, old_logps, completion_mask)  # (B, T)
    a = advantages.view(len(ratio), -1)  # (B, 1 or T)
    losses = -torch.min(ratio * a, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * a)
    if DUAL_CLIP > 0:
        losses = torch.where(a < 0, torch.min(losses, -DUAL_CLIP * a), losses)
    return aggregate(losses, completion_mask), ratio_stats(logps, old_logps, advantages, completion_mask)


def compute_positive_loss(logps, correct, completion_mask):
    """−log π, mean over the tokens of right completions: scalar, 0 if none is right. correct: (B,), True or False."""
    counted = completion_mask & correct[:, None]
    return -logps.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def compute_ratio(logps, old_logps, completion_mask):
    """The importance ratio r_it of each token, (B, T), 1 where masked. Carries the gradient of logps."""
    log_ratio = (logps - old_logps).masked_fill(~completion_mask, 0.0)
    return log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) / 2).exp()  # infinity times zero is NaN


def ratio_stats(logps, old_logps, advantages, completion_mask):
    """What is logged of the ratio of all tokens. clip_fraction: the share whose gradient the clip removes."""
    ratio = compute_ratio(logps, old_logps, completion_mask)  # (B, T)
    a = advantages.view(len(ratio), -1)  # (B, 1 or T)
    clipped = (a > 0) & (ratio > 1 + CLIP_HIGH) | (a < 0) & (ratio < 1 - CLIP_LOW)
    return ratio_metrics(ratio, clipped, completion_mask)


def token_weights(completion_mask):
    """How tokens are averaged, by LOSS_AGGREGATION: weights (B, T), and what their sum is divided by.

    The loss, the share of a micro-batch in the gradient, and the logged means all derive from it.
    """
    if LOSS_AGGREGATION == "token_mean":
        return completion_mask.double(), completion_mask.sum()
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
    log_ratio = (ref_logps - logps).clamp(max=math.log(torch.finfo(logps.dtype).max) / 2)  # as in compute_ratio
    return log_ratio.exp() - log_ratio - 1


def next_kl_coef(kl_coef, mean_kl):
    """The KL weight for the next step: x 1.5 above 2 TARGET_KL, x 0.5 below TARGET_KL / 2, held in [0.01, 1]."""
    factor = 1.5 if mean_kl > 2 * TARGET_KL else 0.5 if mean_kl < TARGET_KL / 2 else 1.0
    return min(max(kl_coef * factor, 0.01), 1.0)


# ---- Data and log-probs ----------------------------------------------------------------------------------------------


def generator_of(*purpose):
    """A random generator on the CPU that depends on SEED and purpose alone, so that nothing random needs saving."""
    digest = hashlib.sha256(repr((SEED, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def completion_values(critic, rollouts, after=0):
    """The critic's V of the text before each completion token, (B, T) in float32 on its device, 0 where masked.

    It is read at the token before, so the first one at the prompt's last token. after = 1: V of the text after each.
    """
    with autocast(critic.device, COMPUTE_DTYPE):
        hidden = states_before_tokens(critic, rollouts, after)  # (tokens, H)
    values = torch.nn.functional.linear(hidden.float(), critic.score.weight.float(), critic.score.bias.float())
    return in_places(values[:, 0], rollouts.completion_mask)


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


class VAPOTrainer:
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
        self.all_move = True  # a critic gives each token an advantage
        early = self.sampler.correction or ROUTING_REPLAY == "r2" or self.reference is not None  # KL takes log π_old
        self.on_policy = not (self.sampler.exact or early)  # see 4. Update
        self.worker = worker_beside(self.policy_device, self.devices)
        self.trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.critic = load_critic(self.constants, self.devices["CRITIC_DEVICE"], self.tokenizer)
        self.critic.optimizer = torch.optim.AdamW(self.critic.trained().values(), weight_decay=WEIGHT_DECAY, fused=True)
        self.beside = {"critic": self.critic}  # further models that train, by name
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
        """The rewards that advantages are made of, (B,) or (B, T). Adds which completions are right, by EVAL_REWARD."""
        if POSITIVE_COEF > 0:
            rollouts.correct = torch.tensor(self.eval_reward(rollouts.prompts, rollouts.texts)) == 1
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

    @torch.no_grad()
    def compute_values(self, rollouts, after=0):
        """The critic's values, (B, T) on the policy's device. after: as in completion_values."""
        compute = functools.partial(completion_values, self.critic.model, after=after)
        values_of = functools.partial(in_micro_batches, rollouts, compute, model=self.critic.model)
        return self.fit_to_memory("values", MICRO_BATCH_TOKENS, values_of).to(self.policy_device)

    def add_scores(self, rollouts, step, clock):
        """Adds rewards, values, old_logps and ref_logps. Models on devices of their own work while the policy does."""
        rewards, values = (self.worker.submit(work, rollouts) for work in (self.score, self.compute_values))
        beside = self.worker if self.reference is not None and not self.reference.is_policy else LazyWorker()
        ref_logps = beside.submit(self.compute_ref_logps, rollouts)
        rollouts.old_logps = rollouts.sampled_logps.to(self.policy_device, copy=True)
        with clock("logps"):
            self.add_old_logps(rollouts, step)
        with clock("reward"):
            rollouts.rewards = rewards.result().to(self.policy_device)
        with clock("logps"):
            rollouts.values, rollouts.ref_logps = values.result(), ref_logps.result()

    # -- 3. Advantages

    def compute_advantages(self, rollouts):
        """Advantages of tokens, (B, T), by GAE. Adds the returns that the critic learns."""
        mask = rollouts.completion_mask.to(self.policy_device)
        rewards = compute_token_rewards(rollouts.rewards, rollouts.old_logps, rollouts.ref_logps, mask, self.kl_coef)
        rollouts.outcomes = gae(rewards, torch.zeros_like(rewards), mask, lam=1.0)  # Monte Carlo, for pre-training
        if BOOTSTRAP_TRUNCATED and rollouts.truncated.any():  # the value after the end is a part of the last reward
            ends = last_tokens(mask) & rollouts.truncated.to(mask.device)[:, None]
            rewards = rewards + GAMMA * ends * self.compute_values(rollouts, after=1)
        advantages, rollouts.returns = compute_gae(rewards, rollouts.values, mask)
        return whiten(advantages, mask) if ADVANTAGE_TYPE == "normalized" else advantages

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
        """VAPO_EPOCHS passes of MINI_BATCHES steps. Returns the policy's stats; value_updates has the critic's."""
        if step <= VALUE_PRETRAIN_STEPS:
            rollouts.returns = rollouts.outcomes
        updates, self.value_updates, kept = [], [], trusted(rollouts, self.sampler.correction)
        for optimizer, prefix in ((self.optimizer, ""), (self.critic.optimizer, "CRITIC_")):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, self.constants, prefix)
        for epoch in range(VAPO_EPOCHS):
            for rows in self.mini_batches(rollouts, step, epoch):
                of_critic = self.worker.submit(self.update_critic, rollouts.select(rows))  # beside the policy's
                batch = rollouts.select(rows := rows[kept[rows]])
                if step > VALUE_PRETRAIN_STEPS and len(rows):
                    updates.append(self.update(batch, self.on_policy and not updates))
                    rollouts.old_logps[rows.to(self.policy_device)] = batch.old_logps
                self.value_updates.append(of_critic.result())
        return updates

    def update_critic(self, batch):
        """One optimizer step of the critic on some completions. Returns its statistics."""
        stats = self.fit_to_memory("values", MICRO_BATCH_TOKENS, lambda n: self.compute_value_gradient(batch, n))
        return stats | {"critic_grad_norm": take_step(self.critic.optimizer, MAX_GRAD_NORM, stats)}

    def compute_value_gradient(self, batch, budget):
        """The gradient of the value loss over a batch, in micro-batches. Returns its statistics."""
        model, stats = self.critic.model, {}
        self.critic.optimizer.zero_grad()
        model.train(GRADIENT_CHECKPOINTING)
        for rows in micro_batches(batch, budget, model):
            part = batch.select(rows)
            values, share = completion_values(model, part), part.completion_mask.sum() / batch.completion_mask.sum()
            part = part.to(model.device)
            loss, others = compute_value_loss(values, part.values, part.returns, part.completion_mask)
            (share * loss).backward()
            for name, value in ({"value_loss": loss.detach()} | others).items():
                stats[name] = stats.get(name, 0.0) + share * value
        model.eval()
        return stats

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
        losses = {name: share * loss for name, loss in losses.items()}
        if batch.correct is not None:  # its mean is over the tokens of right completions alone
            of_part, of_batch = ((some.completion_mask & some.correct[:, None]).sum() for some in (part, batch))
            share = POSITIVE_COEF * of_part / of_batch.clamp(min=1)
            losses["positive_loss"] = share * compute_positive_loss(logps, part.correct.to(mask.device), mask)
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
        metrics = trainer_metrics(self, step, rollouts) | step_metrics(rollouts, updates, GROUP_SIZE)
        return metrics | value_metrics(rollouts, self.value_updates)

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
        trainer = VAPOTrainer()
        selftest(trainer) if SELFTEST else trainer.train()


if __name__ == "__main__":
    main()
