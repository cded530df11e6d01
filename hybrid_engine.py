"""
The hybrid engine: how can the weights being trained also generate fast?

DeepSpeed trains (ZeRO, offload, its launcher, its checkpoints). One decoder of our own
(kernels/decoder.py) generates, for all model families, from the very same weights. First the
training half: `train_engine`, `frozen_model`, `train_step`, `ExponentialMovingAverage`. Then the
generating half: `Rollout`, `InferenceEngine`.

Memory, bytes per parameter of a trained model, before activations (N ranks):

    training     fp32: 4 weights + 4 gradients + 8 Adam    bf16: 2 + 2 + 4 master + 8 Adam
                 ZeRO 1 divides Adam (and master) by N, ZeRO 2 gradients too, ZeRO 3 weights too
    generation   + what the decoder must fuse (query, key and value matrices, about a quarter of a
                 block), the rest is read where it is trained
                 on a CPU: + one copy of every matrix, packed for oneDNN (`pack`)
                 LoRA: + the merged matrices
                 ZeRO 3: + this rank's share of one copy in the compute dtype
    KV cache     2 x layers x B x T x kv_heads x head_dim x bytes, allocated when a rollout starts
                 and freed when it ends

Everything here speaks token ids; text is data.py's.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers

from kernels.decoder import FAMILIES, Decoder, KVCache, why_unsupported
from kernels.logprob import token_logprobs
from kernels.sampling import sample
from support.flags import UsageError
from support.processes import device, free_compile_lock, print0

# AdamW's eps is 1e-5, as in InstructGPT's lineage. With 1e-8 Adam's first steps are about +- the
# learning rate whatever the gradient.
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-5


# -----------------------------------------------------------------------------
# training

def train_engine(model, ds_config, config, learning_rate, total_steps):
    """
    A model to train (LanguageModel or RewardModel) -> DeepSpeed engine with AdamW and a
    learning-rate schedule over total_steps optimizer steps.

    ds_config  the DeepSpeed settings that support.processes.setup returned
    """
    if config.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.enable_input_require_grads()

    # Matrices decay, biases and norms do not.
    matrices = []
    vectors = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ds_shape, because ZeRO 3 shows every parameter as one-dimensional
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]

    # The optimizer, on the host where it is offloaded; the schedule; DeepSpeed around them.
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        free_compile_lock("cpu_adam")
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS)
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    warmup_steps = min(config.num_warmup_steps, total_steps)
    schedule = transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)

    if dist.get_world_size() == 1 and ds_config["zero_optimization"]["stage"] == 0:
        # There is nobody to sum gradients with, and DeepSpeed copies all of them to do so.
        engine.enable_backward_allreduce = False
    if hasattr(engine.optimizer, "fp32_groups"):  # bf16 without ZeRO
        # DeepSpeed allocates Adam's state by stepping once on zero gradients; that step must not
        # count.
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()
    # Training mode, because Hugging Face loads in eval mode, in which gradient checkpointing does
    # nothing. Dropout is off in both modes (support.models.disable_dropout).
    engine.train()
    return engine


def frozen_model(model, ds_config):
    """A model that is only read (reference, reward), in eval mode; sharded under ZeRO 3."""
    model.requires_grad_(False)
    zero = ds_config["zero_optimization"]
    if zero["stage"] < 3:
        return model.to(device()).eval()
    zero = {name: value for name, value in zero.items() if name != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config={**ds_config, "zero_optimization": zero})
    engine.eval()  # in a line of its own, because it returns None, unlike a module's
    return engine


def train_step(engine, micro_batches, loss_sum, count):
    """
    One optimizer step, which minimises sum(loss_sum(micro_batch)) / count.

    loss_sum  function of a micro-batch -> summed loss, not its mean
    count     what the sum runs over (tokens, pairs), counted over all micro-batches and ranks. So
              the gradient does not depend on how rows are dealt to micro-batches, padded or sharded
    returns   this rank's part of the loss, and the gradient's norm before clipping, which is None
              where fp16 overflowed and DeepSpeed skipped the step to lower its loss scale
    """
    world = dist.get_world_size()
    total = 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(micro_batch) / count
        # Times the world size, because DeepSpeed averages gradients over ranks. Not divided by
        # gradient_accumulation_steps, because `count` covers them.
        engine.backward(loss * world, scale_wrt_gas=False)
        total += loss.detach()
        # Before step(), which clears the gradients; the last micro-batch's norm is the whole one.
        norm = plain_grad_norm(engine)
        engine.step()  # updates at the last micro-batch of gradient_accumulation_steps
    if engine.fp16_enabled() and not engine.was_step_applied():
        print0(f"fp16 overflow: this step is skipped ({engine.skipped_steps} so far), and the loss "
               "scale is lowered")
        return float(total), None
    if norm is None:
        norm = engine.get_global_grad_norm() or 0
    return float(total), float(norm)


def plain_grad_norm(engine):
    """
    The gradient's norm where DeepSpeed keeps none (float32 without ZeRO), at the micro-batch at
    which a step is due; None elsewhere.
    """
    zero = engine.zero_optimization_stage() > 0
    if zero or hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    if not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


class ExponentialMovingAverage:
    """
    average <- decay average + (1 - decay) weights, after every optimizer step, from a copy of the
    first weights (InstructGPT, appendix C: 0.992). It averages the float32 weights that AdamW steps
    on, because in bf16 a step of 0.8% of a small change rounds away. Under ZeRO every rank averages
    its own share of them, without it rank 0 all: 4 bytes a trained parameter, in the host's memory.
    """

    def __init__(self, engine, decay):
        self.engine = engine
        self.decay = decay
        self.sharded = engine.zero_optimization_stage() > 0
        self.averages = [weight.detach().to("cpu", torch.float32, copy=True)
                         for weight in self._own_weights()]

    @torch.no_grad()
    def update(self):
        for average, weight in zip(self.averages, self._own_weights()):
            average.lerp_(weight.to(average), 1 - self.decay)

    @torch.no_grad()
    def by_name(self):
        """{name: average of that weight, float32} on rank 0, and {} elsewhere. Collective."""
        averages = {}
        with self._in_place_of_weights():
            for name, parameter in self._trained():
                # Under ZeRO that is a collective, of one weight at a time.
                weight = self._full_weight(parameter)
                if dist.get_rank() == 0:
                    averages[name] = weight.detach().to("cpu", torch.float32, copy=True)
        return averages

    @torch.no_grad()
    def load(self, averages):
        """Takes over what by_name gave, on all ranks."""
        with self._in_place_of_weights():
            for name, parameter in self._trained():
                average = averages[name]
                if not self.sharded:
                    if self.averages:
                        self._full_weight(parameter).copy_(average)
                elif hasattr(parameter, "ds_id"):
                    # ZeRO 3 pads a weight until all ranks have as many of its numbers.
                    count = parameter.ds_tensor.numel()
                    padding = count * dist.get_world_size() - average.numel()
                    share = F.pad(average.flatten(), (0, padding)).split(count)[dist.get_rank()]
                    deepspeed.utils.safe_set_local_fp32_param(parameter, share)
                else:
                    deepspeed.utils.safe_set_full_fp32_param(parameter, average)

    def _trained(self):
        for name, parameter in self.engine.module.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _own_weights(self):
        """The tensors that this rank averages: views of what its AdamW steps on."""
        optimizer = self.engine.optimizer
        if not self.sharded and dist.get_rank() > 0:
            return []
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return optimizer.fp32_partitioned_groups_flat  # ZeRO 3
        inner = getattr(optimizer, "optimizer", optimizer)
        return [weight for group in inner.param_groups for weight in group["params"]]

    def _full_weight(self, parameter):
        """A parameter -> what AdamW steps on for it, whole; rank 0's without ZeRO."""
        if self.sharded:
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        # In bf16 without ZeRO DeepSpeed's optimizer has float32 masters, and calls the bf16 weights
        # fp16_groups. safe_get_full_fp32_param does not know that optimizer.
        low_groups = getattr(self.engine.optimizer, "fp16_groups", [])
        full_groups = getattr(self.engine.optimizer, "fp32_groups", [])
        for low_group, full_group in zip(low_groups, full_groups):
            for low, full in zip(low_group, full_group):
                if low is parameter:
                    return full
        return parameter

    @contextmanager
    def _in_place_of_weights(self):
        """Inside, averages and weights have changed places: DeepSpeed gathers whole weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self):
        for average, weight in zip(self.averages, self._own_weights()):
            kept = weight.detach().to("cpu", torch.float32, copy=True)
            weight.data.copy_(average)
            average.copy_(kept)


# -----------------------------------------------------------------------------
# generating

class NotFiniteError(UsageError, FloatingPointError):
    """Logits that are no numbers."""


@dataclass
class Rollout:
    """
    What `generate` returns: B rows (prompts x num_return_sequences, those of a prompt together),
    prompts of P columns, R columns of responses.
    """
    tokens: torch.Tensor    # (B, P + R) int64: prompts left-padded, responses right-padded
    logprobs: torch.Tensor  # (B, R) float32, nats, of the distribution sampled from
    mask: torch.Tensor      # (B, R) float32: 1 on response tokens up to and including EOS, 0 after


class InferenceEngine:
    """
    Generates with the weights of `model`, a Hugging Face causal LM, as they are at each call.

    tp_size     neighbouring ranks that split heads and MLP columns, and generate for the union of
                their prompts; with more than 1 all ranks make their engine together
    compact     drop finished rows once they are a quarter of the batch; off: they keep decoding and
                are ignored
    pack        on a CPU, copy the weights into oneDNN's layout for the rollout; off: aliases, which
                are slower
    keep_cache  the KV cache stays allocated between rollouts of one shape
    sync_every  steps between two looks at who is done, each of which waits for the device; None: 1
                on a CPU, 8 on a GPU
    vocabulary  ids from it on are never sampled (support.models.vocabulary_size); None: all may be

    memory      after a rollout: bytes of its {"weights aliased", "weights copied", "kv cache"}
    row_steps   after a rollout: tokens that its decode steps computed
    """

    def __init__(self, model, tp_size=1, compact=True, pack=True, keep_cache=False,
                 sync_every=None, vocabulary=None):
        self.model = model
        self.vocabulary = vocabulary
        self.tp_group = tensor_parallel_group(tp_size)
        self.compact = compact
        self.pack = pack
        self.keep_cache = keep_cache
        self.sync_every = sync_every
        self.cache = None
        self.memory = {}
        self.row_steps = 0
        self.unsupported = why_unsupported(model)
        if self.unsupported:
            warnings.warn(f"{type(model).__name__} generates through Hugging Face generate(), "
                          "several times slower and without tensor parallelism: "
                          f"{self.unsupported}")

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens=64, temperature=1.0, top_k=0,
                 top_p=1.0, eos_token_id="model", pad_token_id=0, seed=0, num_return_sequences=1):
        """
        input_ids, attention_mask  (B, P) int64, left-padded; the ids on padding never matter
        temperature                0 is greedy; log-probabilities are then those at temperature 1
        eos_token_id               int or list; "model": what the model's generation_config says;
                                   None: every response has max_new_tokens. An EOS in a prompt does
                                   not count
        returns                    Rollout of B * num_return_sequences rows
        raises                     ValueError for other padding, or more tokens than the model has
                                   positions; NotFiniteError for logits that are no numbers

        The ranks that share a model (tp_size) call this together, each with its own prompts (any B
        and P), the other arguments equal (rank 0's seed holds), and each gets its own rows back.
        """
        if eos_token_id == "model":
            eos_token_id = self.model.generation_config.eos_token_id
        eos = [] if eos_token_id is None else eos_token_id
        eos = torch.tensor(eos, device=input_ids.device).long().view(-1)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        respond = self._hf_respond if self.unsupported else self._respond
        responses, logprobs = respond(input_ids, attention_mask.long(), max_new_tokens, sampling,
                                      eos, pad_token_id, seed, num_return_sequences)

        # A response is all up to its row's first EOS, whatever the ids (pad may be EOS). What was
        # decoded after it is trimmed.
        is_eos = torch.isin(responses, eos).long()
        eos_before = is_eos.cumsum(1) - is_eos
        mask = eos_before == 0
        R = int(mask.sum(1).max())
        if (logprobs.isnan() & mask).any():
            raise NotFiniteError("the logits are no numbers (NaN): the model's weights or "
                                 "activations have overflowed. Lower the learning rate; where this "
                                 "was fp16, take bf16.")
        mask = mask[:, :R]
        prompts = input_ids.repeat_interleave(num_return_sequences, 0)
        responses = responses[:, :R].masked_fill(~mask, pad_token_id)
        return Rollout(torch.cat([prompts, responses], 1), logprobs[:, :R] * mask, mask.float())

    def _respond(self, ids, mask, max_new_tokens, sampling, eos, pad_token_id, seed, copies):
        """
        -> tokens and log-probabilities, both (B * copies, max_new_tokens). What follows a row's
        first EOS is undefined.
        """
        # Under tensor parallelism the ranks of the group answer the prompts of all of them.
        own_first = 0
        own_count = len(ids)
        if self.tp_group:
            ids, mask, own_first = self._union(ids, mask)
        start = self._starts(mask, max_new_tokens)
        P = ids.size(1)
        rows = len(ids) * copies
        responses = torch.full((rows, max_new_tokens), pad_token_id, device=ids.device)
        logprobs = torch.zeros(rows, max_new_tokens, device=ids.device)
        # One random number for every row and step is drawn beforehand, whether or not the row is
        # still in the batch then, so that compaction cannot change a sample.
        generator = torch.Generator(ids.device).manual_seed(seed)
        uniforms = torch.rand(max_new_tokens, rows, generator=generator, device=ids.device)

        # The rows in the batch, by their number; whether they have ended; and where the next token
        # goes: `positions` in each row's text, `column` in the cache, the same for all.
        live = torch.arange(rows, device=ids.device)
        done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        positions = (P - start).repeat_interleave(copies)
        column = torch.tensor(P, device=ids.device)
        sync_every = self.sync_every or (8 if ids.is_cuda else 1)
        self.row_steps = 0

        with self._rollout_memory(rows, P + max_new_tokens) as (decoder, cache), \
                torch.inference_mode():
            # 1. prefill: every prompt once, whatever the number of its copies
            logits = decoder.prefill(ids.masked_fill(mask == 0, 0), start, cache, copies)
            for step in range(max_new_tokens):
                # 2. sample; rank 0 of a tp_group does it for all, so that neither seeds nor
                # rounding can part its ranks
                logits = logits[:, :self.vocabulary]
                tokens, logps = sample(logits, uniforms[step, live], **sampling)
                if self.tp_group:
                    dist.broadcast(tokens, group=self.tp_group, group_src=0)
                    dist.broadcast(logps, group=self.tp_group, group_src=0)
                responses[live, step] = tokens
                logprobs[live, step] = logps
                if step + 1 == max_new_tokens:
                    break

                # 3. stop, or let finished rows leave the batch
                done |= torch.isin(tokens, eos)
                if len(eos) and (step + 1) % sync_every == 0:
                    unfinished = (~done).nonzero().squeeze(1)
                    if len(unfinished) == 0:
                        break
                    if self.compact and len(unfinished) <= 0.75 * len(live):
                        cache.keep(unfinished, P + step)
                        decoder.keep(unfinished)
                        live = live[unfinished]
                        done = done[unfinished]
                        tokens = tokens[unfinished]
                        positions = positions[unfinished]

                # 4. decode: the sampled token goes in, the logits of the next come out
                logits = decoder.step(tokens, positions, column, cache)
                positions += 1
                column += 1
                self.row_steps += len(live)

        own = slice(own_first * copies, (own_first + own_count) * copies)
        return responses[own], logprobs[own]

    def _union(self, ids, mask):
        """
        -> ids and mask of all ranks of the tp_group, in rank order, left-padded to the longest, and
        the number of this rank's first row.
        """
        shape = torch.tensor(ids.shape, device=ids.device)
        shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(self.tp_group))]
        dist.all_gather(shapes, shape, group=self.tp_group)
        counts, widths = torch.stack(shapes).T.tolist()

        # ids and mask go through one gather, so that they cannot part.
        both = torch.stack([ids, mask])  # (2, B, P)
        both = F.pad(both, (max(widths) - ids.size(1), 0, 0, max(counts) - len(ids)))
        gathered = [torch.empty_like(both) for _ in counts]
        dist.all_gather(gathered, both, group=self.tp_group)
        ids, mask = torch.cat([part[:, :count] for part, count in zip(gathered, counts)], 1)
        first = sum(counts[:dist.get_rank(self.tp_group)])
        return ids, mask, first

    def _starts(self, mask, max_new_tokens):
        """(B,) the column of each prompt's first token."""
        lengths = mask.sum(1)
        if lengths.min() < 1 or (mask.diff(dim=1) < 0).any():
            raise ValueError("expected left-padded prompts of at least one token, attention_mask "
                             "rows 0 .. 0 1 .. 1: set tokenizer.padding_side = 'left'")
        hf_config = self.model.config
        learned_positions = FAMILIES[hf_config.model_type].wpe
        longest = int(lengths.max())
        if learned_positions and longest + max_new_tokens > hf_config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} pass the "
                f"model's {hf_config.max_position_embeddings} positions: shorten one of them "
                "(--max_prompt_seq_len, --max_answer_seq_len)")
        return mask.size(1) - lengths

    @contextmanager
    def _rollout_memory(self, rows, length):
        """Weights and KV cache of one rollout: there inside the `with`, gone after it."""
        try:
            decoder = Decoder(self.model, self.pack, self.tp_group)
            layers = len(decoder.layers)
            shape = (layers, 2, rows, decoder.kv_heads, length, decoder.head_dim)
            if self.cache is None or self.cache.data.shape != shape:
                self.cache = None  # the old one goes before the new one comes
                self.cache = KVCache(layers, rows, decoder.kv_heads, length, decoder.head_dim,
                                     decoder.embed.dtype, decoder.embed.device)
            self.cache.use(rows)
            self._measure(decoder)
            yield decoder, self.cache
        finally:
            if not self.keep_cache:
                self.cache = None

    def _measure(self, decoder):
        trained = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        cache_bytes = self.cache.data.nbytes
        self.memory = {"weights aliased": 0, "weights copied": 0, "kv cache": cache_bytes}
        for tensor in decoder.held:
            aliased = not tensor.is_mkldnn and tensor.untyped_storage().data_ptr() in trained
            part = "weights aliased" if aliased else "weights copied"
            self.memory[part] += tensor.numel() * tensor.element_size()

    def _hf_respond(self, ids, mask, max_new_tokens, sampling, eos, pad_token_id, seed, copies):
        """The same through Hugging Face `generate`, for a model that the decoder cannot run."""
        greedy = sampling["temperature"] == 0
        if greedy:
            options = dict(do_sample=False)
        else:
            options = dict(do_sample=True, num_return_sequences=copies, **sampling)
        # Under ZeRO 3 all ranks gather a weight, or none, so all must make as many steps.
        sharded = any(hasattr(p, "ds_id") for p in self.model.parameters())

        # Ids that no tokenizer knows are banned.
        banned = []
        if self.vocabulary is not None:
            banned = list(range(self.vocabulary, self.model.config.vocab_size))

        # The model's own defaults must not change the distribution, so they go for the while.
        training = self.model.training
        defaults = self.model.generation_config
        self.model.generation_config = transformers.GenerationConfig()
        try:
            self.model.eval()
            with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
                torch.manual_seed(seed)
                out = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_new_tokens,
                    eos_token_id=eos.tolist() or None, pad_token_id=pad_token_id, **options,
                    return_dict_in_generate=True, output_logits=greedy, output_scores=not greedy,
                    suppress_tokens=banned or None, synced_gpus=sharded)
        finally:
            self.model.generation_config = defaults
            self.model.train(training)

        # `scores` are the logits after temperature, top-k and top-p.
        responses = out.sequences[:, ids.size(1):]
        logits_of_steps = out.logits if greedy else out.scores
        logprobs = torch.stack([token_logprobs(logits[:, :self.vocabulary], tokens)
                                for logits, tokens in zip(logits_of_steps, responses.T)], 1)
        if greedy:
            responses = responses.repeat_interleave(copies, 0)
            logprobs = logprobs.repeat_interleave(copies, 0)
        # After its end a row holds padding, of any probability, 0 too.
        return responses, logprobs.masked_fill(logprobs == -float("inf"), 0.0)


class RollingBatch:
    """
    A batch that rows join and leave between two steps (a server's, "continuous batching": Orca, Yu
    et al. 2022), with the weights of a model that is not being trained.

    All rows write the same column of the KV cache (kernels.decoder.KVCache), which decides where a
    newcomer stands: its prompt ends in the column at which the others are. Where it is longer than
    that, the others move right first; where a long row has left, the others move left, over columns
    that no row needs any more. Neither changes a row's result, because keys hold the rotation of
    their position in the row, and biases are relative.

    engine  an InferenceEngine whose model the decoder can run, with tp_size 1
    rows    that fit
    length  tokens of a prompt and its answer, at most
    logits  (B, V) of the next token, by row: newcomers behind those that were there
    """

    SPARE = 64  # columns that a move to the left gains, at least; the cache has as many more

    def __init__(self, engine, rows, length):
        self.engine = engine
        self.rows = rows
        self.length = length
        self.decoder = Decoder(engine.model, engine.pack)
        self.device = self.decoder.embed.device
        self.cache = KVCache(len(self.decoder.layers), rows, self.decoder.kv_heads,
                             length + self.SPARE, self.decoder.head_dim, self.decoder.embed.dtype,
                             self.device)
        self.clear()

    def clear(self):
        """All rows leave."""
        self.column = 0
        self.positions = torch.zeros(0, dtype=torch.long, device=self.device)  # of the next token
        self.logits = None

    def __len__(self):
        return len(self.positions)

    @torch.inference_mode()
    def join(self, prompt):
        """A prompt, a list of ids, becomes the last row; the caller ends its answer at `length`."""
        P = len(prompt)
        assert len(self) < self.rows and 0 < P < self.length, (len(self), P)
        if P > self.column:
            self._move(P - self.column)
        ids = torch.tensor([prompt], device=self.device)

        first = len(self) == 0
        self.cache.use(len(self) + 1)
        if first:
            logits = self.decoder.prefill(ids, torch.zeros_like(ids[:, 0]), self.cache, copies=1)
        else:
            logits = self.decoder.join(ids, self.column, self.cache)
        logits = logits[:, :self.engine.vocabulary]
        self.logits = logits if first else torch.cat([self.logits, logits])
        self.positions = F.pad(self.positions, (0, 1), value=P)

    @torch.inference_mode()
    def keep(self, rows):
        """Only the rows of the list `rows` (ascending) stay."""
        if len(rows) == len(self):
            return
        if not rows:
            self.clear()
            return
        rows = torch.tensor(rows, device=self.device)
        self.cache.keep(rows, self.column)
        self.decoder.keep(rows)
        self.positions = self.positions[rows]
        self.logits = self.logits[rows]
        # Where a long row has left, the others' steps need not look over its columns any more. So
        # the cache is never full: fewer than SPARE columns stand before the longest row.
        by = int(self.positions.max()) - self.column
        if by <= -self.SPARE:
            self._move(by)

    def _move(self, by):
        """The rows in flight move right by so many columns; left where `by` is negative."""
        if len(self):
            self.cache.move(by, self.column)
            self.decoder.move(by)
        self.column += by

    @torch.inference_mode()
    def step(self, tokens):
        """tokens (B,): each row's next one; `logits` is then what follows it."""
        column = torch.tensor(self.column, device=self.device)
        logits = self.decoder.step(tokens, self.positions, column, self.cache)
        self.logits = logits[:, :self.engine.vocabulary]
        self.positions = self.positions + 1
        self.column += 1


def tensor_parallel_group(size):
    """
    The process group of this rank and the neighbours that it generates with, `size` ranks in all;
    None for 1. Collective.

    raises UsageError where size does not divide the number of processes
    """
    if size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        raise UsageError(f"--inference_tp_size {size} does not divide the {world} process(es) of "
                         "this run.")
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    return groups[dist.get_rank() // size]
