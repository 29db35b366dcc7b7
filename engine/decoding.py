"""The inner loop of sampling: one token of each row goes through a model.

In transformers, such a step spends most of its time between operations. A small model on a CPU, and any model on a GPU,
waits for Python and for kernel launches. For models of the Llama and Qwen family the same sums are written here with a
third of the operations. Projections that read the same input are one matrix, a norm is one call, and a rotation is
three. A GPU gets all operations of a step in one launch. Any other model takes its own step.
"""

import functools
import warnings

import torch
from torch.nn import functional as F

from engine.cache import with_cache
from engine.products import linear_of
from engine.sharding import body_of, plain_class

FAMILY = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def decoder_of(model):
    """Returns a function that takes a sampling step: (tokens, positions, cache, seen) -> hidden states (rows, H).

    Its arguments are tokens (rows,), positions (rows,), the cache, and seen (rows, tokens so far), False at padding.
    The function holds the weights as they are now, so it must be made anew after an update.
    """
    layers, config = model.base_model, model.config
    linear = all(type(m) is torch.nn.Linear for m in layers.modules() if hasattr(m, "in_features"))  # no adapters
    ropes = ("default", "linear", "llama3", "yarn")
    known = plain_class(model).__name__ in FAMILY and config.hidden_act == "silu" and linear
    if known and config.rope_parameters["rope_type"] in ropes and not getattr(config, "use_sliding_window", False):
        return Replayed(Decoder(model)) if model.device.type == "cuda" else Decoder(model)

    def step(tokens, positions, cache, seen):
        inputs = {"input_ids": tokens[:, None], "position_ids": positions[:, None]} | with_cache(layers, cache)
        return body_of(model)(**inputs, attention_mask=seen[:, None, None]).last_hidden_state[:, -1]

    return step


class Decoder:
    """The sampling step of a model of the FAMILY."""

    def __init__(self, model):
        self.model, base = model, model.base_model
        kind = torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else None
        self.dtype, self.layers = kind or model.dtype, []
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                {
                    "input_norm": layer.input_layernorm,
                    "qkv": self.fuse(attention.q_proj, attention.k_proj, attention.v_proj),
                    "head_norm": self.head_norm(attention),
                    "out": self.fuse(attention.o_proj),
                    "mlp_norm": layer.post_attention_layernorm,
                    "gate_up": self.fuse(mlp.gate_proj, mlp.up_proj),
                    "down": self.fuse(mlp.down_proj),
                    "scale": attention.scaling,
                }
            )
        self.size = base.layers[0].self_attn.head_dim
        self.heads, self.pairs = model.config.num_attention_heads, model.config.num_key_value_heads
        self.angles = None

    def fuse(self, *projections):
        """Returns several projections as a single one: states (rows, in) -> (rows, all their outputs)."""
        weight = torch.cat([p.weight for p in projections]) if len(projections) > 1 else projections[0].weight
        bias = None if projections[0].bias is None else torch.cat([p.bias for p in projections]).to(self.dtype)
        return linear_of(weight.to(self.dtype), bias)

    def head_norm(self, attention):
        """Returns the weights of Qwen3's norms over each head's query and key, (heads + pairs, D), and their epsilon.

        Returns None if the model has no such norms.
        """
        if not hasattr(attention, "q_norm"):
            return None
        config, norms = self.model.config, (attention.q_norm, attention.k_norm)
        counts = config.num_attention_heads, config.num_key_value_heads
        weights = [n.weight.float().expand(count, -1) for n, count in zip(norms, counts, strict=True)]
        return torch.cat(weights), norms[0].variance_epsilon

    def rotation(self, positions, most):
        """Returns cos and signed sin of each row's angles, (rows, 1, D) each."""
        if self.angles is None:
            every = torch.arange(most, device=positions.device)[None]
            cos, sin = self.model.base_model.rotary_emb(torch.zeros(1, device=positions.device), every)
            sin = torch.cat([-sin[..., : self.size // 2], sin[..., self.size // 2 :]], -1)
            self.angles = torch.stack([cos[0], sin[0]]).float()  # (2, most, D)
        cos, sin = self.angles[:, positions]
        return cos[:, None], sin[:, None]

    def __call__(self, tokens, positions, cache, seen):
        rows, heads, pairs, size = len(tokens), self.heads, self.pairs, self.size
        hidden = self.model.base_model.embed_tokens(tokens)  # (rows, H)
        cos, sin = self.rotation(positions, cache.most)
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, -torch.inf)
        bias = bias[:, None, None]  # (rows, 1, 1, tokens so far); made once for all layers
        for number, layer in enumerate(self.layers):
            states = layer["qkv"](norm(hidden, layer["input_norm"]).to(self.dtype)).view(rows, -1, size)
            turned = states[:, : heads + pairs].float()  # queries and keys get the same rotation
            value = states[:, heads + pairs :]
            if layer["head_norm"]:
                weight, eps = layer["head_norm"]
                turned = F.rms_norm(turned, (size,), eps=eps) * weight
            halves = torch.cat((turned[..., size // 2 :], turned[..., : size // 2]), -1)
            turned = torch.addcmul(turned * cos, halves, sin).to(self.dtype)
            query, key = turned.split((heads, pairs), 1)
            keys, values = cache.update(key[:, :, None], value[:, :, None], number)
            # Heads that share their keys become the queries of one head.
            grouped = query.reshape(rows, pairs, heads // pairs, size)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=layer["scale"])
            hidden = hidden + layer["out"](mixed.reshape(rows, -1))
            gate, up = layer["gate_up"](norm(hidden, layer["mlp_norm"]).to(self.dtype)).chunk(2, 1)
            hidden = hidden + layer["down"](F.silu(gate) * up)
        return norm(hidden, self.model.base_model.norm).to(self.model.dtype)


class Replayed:
    """A Decoder whose step is recorded as a CUDA graph, and then replayed for each token.

    A new step is recorded when rows have left or the room has grown. While a step is recorded, it is also computed
    without the graph. If a replay gives another result, or if the step cannot be recorded, a warning says so, and no
    later step of this process uses a graph.
    """

    works = True  # whether this process can use graphs

    def __init__(self, decoder):
        self.decoder, self.keys = decoder, None
        # All graphs of a rollout are kept, because they share memory, which the end of one would free.
        self.graphs = []

    def __call__(self, tokens, positions, cache, seen):
        end = seen.shape[1]
        for layer in range(len(cache.layers)):
            cache.make_room(layer, end)
        if self.works and cache.layers[0][0] is self.keys:
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)
            self.seen[:, :end] = seen
            self.slot.fill_(end - 1)
            cache.lengths = [end] * len(cache.layers)
            return self.replay()
        hidden = self.decoder(tokens, positions, cache, seen)
        if self.works:
            self.tokens, self.positions, self.slot = tokens.clone(), positions.clone(), positions.new_tensor([end - 1])
            self.keys = cache.layers[0][0]
            self.seen = seen.new_zeros(len(tokens), self.keys.shape[2])
            self.seen[:, :end] = seen
            self.try_to_record(cache, hidden)
        return hidden

    def try_to_record(self, cache, expected):
        cache.slot = self.slot
        try:
            self.replay = self.record(lambda: self.decoder(self.tokens, self.positions, cache, self.seen))
            difference, largest = (self.replay() - expected).abs().max().item(), expected.abs().max().item()
            if not difference <= 0.05 * largest:  # bfloat16 may sum in another order; a mistake is far larger
                raise RuntimeError(f"a replay differs by {difference:g} where numbers are up to {largest:g}")
        except torch.OutOfMemoryError:
            raise  # the caller then samples fewer at once
        except RuntimeError as error:
            Replayed.works = False
            cause = error.__context__ or error  # the context has the cause; the error says only that recording failed
            warnings.warn(f"no CUDA graph of a sampling step, which is slower without: {cause}", stacklevel=2)
        finally:
            cache.slot = None

    def record(self, work):
        """Runs work() and records it. Returns a function that runs it again.

        That function reads its inputs from the same memory as the recorded run.
        """
        graph, device = torch.cuda.CUDAGraph(), self.tokens.device
        stream, pool = recording_stream(device), self.graphs[0].pool() if self.graphs else None
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                work()  # a library's first call sets it up, and cannot be recorded
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    hidden = work()
                finally:
                    graph.capture_end()
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
        self.graphs.append(graph)

        def replay():
            graph.replay()
            return hidden

        return replay


@functools.cache
def recording_stream(device):
    """Returns the one stream for all recordings. PyTorch keeps freed memory per stream."""
    return torch.cuda.Stream(device)


def norm(states, module):
    """Returns the output of an RMSNorm of transformers, which computes in float32."""
    return F.rms_norm(states.float(), states.shape[-1:], module.weight.float(), module.variance_epsilon)
