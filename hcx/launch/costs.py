"""What one layout costs on each rank: memory, communication and time of a step, counted from shapes.

Weights and optimizer are exact, and gradients where the engine keeps a buffer for them (`hcx.engine.footprint`).
Activations count what the decoder's modules save for their backward. Communication counts the bytes that a rank sends
in ring algorithms. Time is an estimate for ranking layouts: matrix products at a stated share of the peak, collectives
at the stated link speeds with a fixed time per hop, nothing overlapped but the weights that ZeRO-3 fetches ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig
from hcx.engine.footprint import DTYPE_BYTES, FP32, AnyEngineConfig, Held, held_bytes, layout_sizes, rank_chunks
from hcx.launch.profiles import ClusterProfile
from hcx.model.config import ModelConfig
from hcx.model.shapes import stage_parameters
from hcx.optim import OptimConfig

KEPT_LOGITS = 256 << 20
"""Up to this size, logits of a micro-batch are kept for the backward (`hcx.model.parts.logprobs`)."""
LOGITS_CHUNK = 64 << 20
"""Size of the fp32 chunk in which they are computed."""
ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduction bucket, its default."""
ZERO_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most, its default."""
HOST_GB_S = 20.0
"""What a rank gets of the host's memory and of its link to it, where the optimizer is offloaded: an assumption."""
HOP_S = 5e-6
"""Time of one hop of a ring whatever its size: an assumption, of the order that NVLink and InfiniBand show."""


@dataclass(frozen=True)
class Workload:
    """What a step processes.

    Attributes:
        seq_len: tokens of a row.
        micro_batch_tokens: tokens of one forward of one replica.
        step_tokens: tokens of an optimizer step, over all replicas.
    """

    seq_len: int
    micro_batch_tokens: int
    step_tokens: int

    def micro_batches(self, replicas: int) -> int:
        """Micro-batches of a step on each replica."""
        return max(1, round(self.step_tokens / (self.micro_batch_tokens * replicas)))


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the worst moment of a step.

    Attributes:
        pp_rank: its stage.
        parameters: elements of the weights that it computes with (ZeRO-3: gathers).
        held: weights, gradients, optimizer: exact.
        activations: saved for the backward passes in flight.
        workspace: of the widest sublayer, of the logits, and the library's buffers.
    """

    pp_rank: int
    parameters: int
    held: Held
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Everything on the accelerator."""
        return self.held.total + self.activations + self.workspace


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends in one optimizer step.

    Attributes:
        data_parallel: gradients and weights between replicas.
        tensor_parallel: activations and their gradients within a layer.
        pipeline_parallel: activations and their gradients between stages, and tied embeddings' gradients.
    """

    data_parallel: float
    tensor_parallel: float
    pipeline_parallel: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in parts that add up.

    Attributes:
        compute: matrix products, recomputation included.
        bubble: ranks that wait for the pipeline to fill and to drain.
        tensor_parallel, pipeline_parallel, data_parallel: communication that is waited for.
        optimizer: reading and writing masters and state.
    """

    compute: float
    bubble: float
    tensor_parallel: float
    pipeline_parallel: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        parts = (self.tensor_parallel, self.pipeline_parallel, self.data_parallel, self.optimizer)
        return self.compute + self.bubble + sum(parts)


class LayoutCosts:
    """The costs of one engine layout.

    Args:
        engine: a legal layout.
        model: the decoder.
        optim: the optimizer.
        world_size: processes.
        work: what a step processes.
    """

    def __init__(
        self, engine: AnyEngineConfig, model: ModelConfig, optim: OptimConfig, world_size: int, work: Workload
    ) -> None:
        self.engine, self.model, self.optim, self.world_size, self.work = engine, model, optim, world_size, work
        self.tp, self.pp, self.dp = layout_sizes(engine, world_size)
        self.size = DTYPE_BYTES[engine.precision]
        sequence_parallel = isinstance(engine, MegatronEngineConfig) and engine.sequence_parallel
        self.chunks = engine.virtual_pipeline_parallel if isinstance(engine, MegatronEngineConfig) else 1
        self._split = self.tp if sequence_parallel else 1
        self.micro_batches = work.micro_batches(self.dp)

    def memory(self, pp_rank: int) -> RankMemory:
        """Of the first replica at a stage; the others differ by the padding that they own."""
        held = held_bytes(self.engine, self.model, self.optim, self.world_size, pp_rank)
        return RankMemory(
            pp_rank=pp_rank,
            parameters=self._parameters(pp_rank),
            held=held,
            activations=round(self._activations(pp_rank)),
            workspace=round(self._workspace(pp_rank)),
        )

    def memories(self) -> list[RankMemory]:
        """One per stage."""
        return [self.memory(pp_rank) for pp_rank in range(self.pp)]

    def _parameters(self, pp_rank: int) -> int:
        chunks = rank_chunks(self.engine, self.model, self.world_size, pp_rank)
        return sum(parameter.numel for chunk in chunks for parameter in stage_parameters(self.model, chunk, self.tp))

    def _sublayer_elements(self) -> tuple[float, float]:
        """Elements per token that attention and MLP save beside their input in the residual stream."""
        model, tp, hidden = self.model, self.tp, self.model.hidden_size
        query, key = model.num_heads * model.head_size / tp, model.kv_heads * model.head_size / tp
        inner = model.intermediate_size / tp
        rows = max(1, self.work.micro_batch_tokens // self.work.seq_len)
        # Norm's output, whole where a linear reads it; a second norm's input (Peri-LN).
        around = hidden + (hidden / self._split if model.use_post_norm else 0)
        # q, k, v as multiplied, q and k as rotated, the output as attention keeps it and as the projection reads it.
        attention = (query + 2 * key) + (query + key) + query * (2 if rows > 1 else 1)
        # gate and up, silu of the gate, the product.
        return around + attention, around + 4 * inner

    def _activations(self, pp_rank: int) -> float:
        tokens, layers = self.work.micro_batch_tokens, self.model.num_layers // (self.pp * self.chunks)
        stream = self.model.hidden_size / self._split
        per_layer = 2 * stream if self.engine.activation_checkpointing else 2 * stream + sum(self._sublayer_elements())
        kept = self._in_flight(pp_rank) * tokens * layers * per_layer * self.size
        if pp_rank == self.pp - 1:
            # The final norm's input and output, of the one micro-batch whose backward comes next.
            kept += tokens * (stream + self.model.hidden_size) * self.size
            kept += self._logits_bytes() if self._logits_bytes() <= KEPT_LOGITS else 0
        return kept

    def _in_flight(self, pp_rank: int) -> int:
        """Forwards of a chunk whose activations a rank keeps at most: those before its first backward, and one."""
        first = self.pp - 1 - pp_rank
        if self.chunks > 1:
            # Narayanan et al. 2021, figure 4: whole groups of all chunks but the last, and twice the distance.
            first = 2 * first + (self.chunks - 1) * self.pp
        return min(first + 1, self.micro_batches * self.chunks)

    def _logits_bytes(self) -> float:
        return self.work.micro_batch_tokens * self.model.vocab_size / self.tp * self.size

    def _workspace(self, pp_rank: int) -> float:
        # Gradients of the widest sublayer's activations; with checkpointing its recomputed activations too.
        widest = max(self._sublayer_elements()) * self.work.micro_batch_tokens * self.size
        space = widest * (2 if self.engine.activation_checkpointing else 1)
        if pp_rank == self.pp - 1:
            # The chunk in fp32 and in the working precision, and the output matrix's gradient.
            space += LOGITS_CHUNK * (1 + self.size / FP32)
            space += self.model.vocab_size / self.tp * self.model.hidden_size * self.size
        if isinstance(self.engine, DeepSpeedEngineConfig) and self.engine.zero_stage:
            whole = self._parameters(0)
            if self.engine.zero_stage == 3:
                space += ZERO_BUCKET * FP32 + min(whole, ZERO_LIVE) * self.size
            else:
                space += ZERO_BUCKET * self.size
        return space

    def communication(self, pp_rank: int) -> Communication:
        """Of a rank at a stage."""
        return Communication(
            self._between_replicas(pp_rank), self._within_layers(pp_rank), self._between_stages(pp_rank)
        )

    def _between_replicas(self, pp_rank: int) -> float:
        engine, share = self.engine, (self.dp - 1) / self.dp
        whole = self._parameters(pp_rank)
        gradients, weights = whole * FP32, whole * self.size
        if isinstance(engine, DeepSpeedEngineConfig):
            if engine.zero_stage == 3:
                # Weights before the forward and before the backward, gradients after it, of every micro-batch.
                return share * self.micro_batches * (2 * weights + gradients)
            # Stages 1 and 2 reduce whole buckets; stage 2 those of every micro-batch, and both gather new weights.
            times = self.micro_batches if engine.zero_stage == 2 else 1
            return share * (2 * gradients * times + (weights if engine.zero_stage else 0))
        if isinstance(engine, MegatronEngineConfig) and engine.distributed_optimizer:
            return share * (gradients + weights)
        return 2 * share * gradients

    def _within_layers(self, pp_rank: int) -> float:
        one = 2 * (self.tp - 1) / self.tp * self.work.micro_batch_tokens * self.model.hidden_size * self.size
        return self.micro_batches * self._sums(pp_rank) * one

    def _sums(self, pp_rank: int) -> int:
        """Sums over tensor-parallel ranks for one micro-batch."""
        if self.tp == 1:
            return 0
        # Two per block forward and two backward (under sequence parallelism each is a gather and a scatter of the same
        # volume), two more where the forward is recomputed; one at the embedding and one at the output.
        sums = self.model.num_layers // self.pp * (6 if self.engine.activation_checkpointing else 4)
        return sums + (pp_rank == 0) + (pp_rank == self.pp - 1)

    def _replica_collectives(self) -> int:
        """Passes around the ring of replicas in a step: one per gather or scatter, and ZeRO-3's per sublayer."""
        if isinstance(self.engine, DeepSpeedEngineConfig) and self.engine.zero_stage >= 2:
            per_micro_batch = 3 * self.model.num_sublayers if self.engine.zero_stage == 3 else 2
            return self.micro_batches * per_micro_batch
        return 2

    def _between_stages(self, pp_rank: int) -> float:
        if self.pp == 1:
            return 0.0
        # Each chunk sends its output and its input's gradient, but for both ends of the model.
        sent = 2 * self.chunks - (pp_rank == 0) - (pp_rank == self.pp - 1)
        one = self.work.micro_batch_tokens * self.model.hidden_size * self.size / self._split
        tied = self.model.tie_embeddings and pp_rank in (0, self.pp - 1)
        embedding = self.model.vocab_size / self.tp * self.model.hidden_size * FP32 if tied else 0.0
        return self.micro_batches * sent * one + embedding

    def flops(self, pp_rank: int) -> float:
        """Operations of a rank for one micro-batch, forward and backward, without recomputation."""
        model, chunks = self.model, rank_chunks(self.engine, self.model, self.world_size, pp_rank)
        multiplied = sum(
            parameter.numel
            for chunk in chunks
            for parameter in stage_parameters(model, chunk, self.tp)
            if parameter.part in ("attention", "mlp", "output")
        )
        if self.pp == 1 and model.tie_embeddings:
            multiplied += model.vocab_size // self.tp * model.hidden_size
        layers = sum(len(chunk.layers) for chunk in chunks)
        attention = 2 * self.work.seq_len * model.num_heads * model.head_size * layers / self.tp
        return 3.0 * (2 * multiplied + attention) * self.work.micro_batch_tokens

    def time(self, profile: ClusterProfile) -> StepTime:
        """Of the slowest stage."""
        return max((self._time(profile, pp_rank) for pp_rank in range(self.pp)), key=lambda time: time.total)

    def _time(self, profile: ClusterProfile, pp_rank: int) -> StepTime:
        gpu, sent = profile.gpu, self.communication(pp_rank)
        rate = gpu.flops(self.engine.precision) * gpu.achieved_fraction
        again = 4 / 3 if self.engine.activation_checkpointing else 1.0
        compute = self.micro_batches * self.flops(pp_rank) * again / rate
        tensor = sent.tensor_parallel / self._bandwidth(profile, self.tp, 1)
        tensor += self.micro_batches * self._sums(pp_rank) * 2 * (self.tp - 1) * HOP_S
        pipeline = sent.pipeline_parallel / self._bandwidth(profile, self.pp, self.tp * self.dp)
        data = sent.data_parallel / self._bandwidth(profile, self.dp, self.tp)
        data += self._replica_collectives() * (self.dp - 1) * HOP_S
        if isinstance(self.engine, DeepSpeedEngineConfig) and self.engine.zero_stage == 3:
            data = max(0.0, data - compute)
        held = held_bytes(self.engine, self.model, self.optim, self.world_size, pp_rank)
        # Masters (or the weights that are masters) and state are read and written, gradients read, weights written.
        masters = held.masters or held.state / 2
        moved = 2 * (masters + held.state) + held.gradients + held.weights
        # Narayanan et al. 2021, sections 2.2.1 and 2.2.2.
        waiting = (self.pp - 1) / (self.micro_batches * self.chunks)
        return StepTime(
            compute=compute,
            bubble=waiting * (compute + tensor + pipeline),
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            data_parallel=data,
            optimizer=moved / ((HOST_GB_S if held.host else gpu.hbm_gb_s) * 1e9),
        )

    def _bandwidth(self, profile: ClusterProfile, ranks: int, stride: int) -> float:
        """Bytes per second that one rank sends in a ring of `ranks` whose numbers lie `stride` apart.

        Members on one node share that node's links: k of them send k times as fast to the next node as one does.
        """
        if ranks * stride <= profile.gpus_per_node:
            return profile.intra_node_gb_s * 1e9
        together = max(1, profile.gpus_per_node // stride)
        return min(profile.intra_node_gb_s, profile.inter_node_gb_s * together) * 1e9
