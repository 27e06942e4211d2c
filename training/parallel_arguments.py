# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The options of expert parallelism among `MoETrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from hf_moe.expert_parallel import ExpertParallelConfig


@dataclass
class ExpertParallelArguments:
    """Fields of `ExpertParallelConfig`, by the names that they have as options."""

    expert_parallel_size: int | None = field(
        default=None, metadata={"help": "Ranks that hold the experts between them. 1: experts are sharded like the rest."}
    )
    expert_parallel_dispatcher: str = field(
        default="auto",
        metadata={
            "help": "How tokens reach their experts: auto, all_to_all, deduplicated, capacity, hierarchical or chunked.",
        },
    )
    expert_parallel_dense: str = field(
        default="fsdp",
        metadata={"help": "The rest of the model: fsdp (sharded), replicate (as with DDP) or hybrid (sharded inside nodes)."},
    )
    expert_parallel_nodes: int | None = field(
        default=None, metadata={"help": "hybrid: groups of ranks that hold a copy each (default: the nodes)."}
    )
    expert_parallel_tp_size: int = field(
        default=1, metadata={"help": "Ranks that share a batch and split the dense layers (tensor parallelism)."}
    )
    expert_parallel_chunk_rows: int = field(
        default=16384, metadata={"help": "chunked: the most (token, expert) pairs that a rank gets in one round."}
    )

    expert_parallel_mixed_precision: bool = field(
        default=False, metadata={"help": "FSDP2 gathers and computes in bfloat16; routers stay in fp32."}
    )

    def check_expert_parallel(self) -> None:
        """Refuse options without an effect, or with values that are not allowed.

        Raises:
            ValueError: naming the option, its value and the remedy.
        """
        if self.expert_parallel is not None:
            return
        for item in fields(ExpertParallelArguments):
            if getattr(self, item.name) != item.default:
                raise ValueError(
                    f"`{item.name}`={getattr(self, item.name)!r} is of expert parallelism. Give `expert_parallel_size`, too."
                )

    @property
    def expert_parallel(self) -> ExpertParallelConfig | None:
        """How the model is to be spread over ranks; `None` where `expert_parallel_size` is not given.

        Raises:
            ValueError: a value is not allowed.
        """
        if self.expert_parallel_size is None:
            return None
        return ExpertParallelConfig(
            ep_size=self.expert_parallel_size,
            dispatcher=self.expert_parallel_dispatcher,  # type: ignore[arg-type]  # it is checked there
            dense=self.expert_parallel_dense,  # type: ignore[arg-type]
            dp_replicate_size=self.expert_parallel_nodes,
            tp_size=self.expert_parallel_tp_size,
            chunk_rows=self.expert_parallel_chunk_rows,
            mixed_precision=self.expert_parallel_mixed_precision,
        )
