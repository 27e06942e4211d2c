# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What `hf-moe train` is told about the model and the data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Dtype = Literal["float32", "bfloat16", "auto"]
PACKINGS = ("blocks", "documents", "false")
_YES = ("auto", "true", "false")


@dataclass
class ModelArguments:
    """Which model."""

    model: str = field(
        metadata={
            "help": "Folder or Hub id of the checkpoint to start from: a MoE of hf_moe; a dense model, trained as it is, or "
            "upcycled in memory where an --upcycle_… option is given; or a native MoE (Mixtral, Qwen3-MoE, …), which is "
            "imported in memory."
        }
    )
    dtype: Dtype = field(default="float32", metadata={"help": "What to load the weights as. With --bf16, keep float32."})
    keep_native: bool = field(default=False, metadata={"help": "Train a native MoE as the class that it is."})
    upcycle_config: str | None = field(
        default=None, metadata={"help": "Recipe file (YAML) of the upcycling; --upcycle_… options count more."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of Transformers: eager, sdpa, flash_attention_2, …"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):  # a config file can say anything
            raise ValueError(f"`--dtype`={self.dtype!r} is not known. Choose {', '.join(get_args(Dtype))}.")


@dataclass
class DataArguments:
    """Which text."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text to train on: files or patterns (data/*.jsonl) of .jsonl, .json, .parquet, .csv or .txt."},
    )
    eval_file: list[str] | None = field(default=None, metadata={"help": "Held-out text, likewise."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of files: a dataset's Hub id, or a folder that `datasets` has saved or reads."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    train_split: str = field(default="train", metadata={"help": "The dataset's split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "The dataset's held-out split, if it has it."})
    validation_split_percentage: float | None = field(
        default=None, metadata={"help": "Hold out so many percent of the training documents, chosen by --seed."}
    )
    text_field: str | None = field(
        default=None, metadata={"help": "The field that holds the text (default: chats in --messages_field, else text)."}
    )
    messages_field: str = field(default="messages", metadata={"help": "The field that holds chats: lists of {role, content}."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template (Jinja), saved with the tokenizer."}
    )
    assistant_only_loss: str = field(
        default="auto",
        metadata={
            "help": "Chats: whether only what the assistant says has a loss. It needs a template that marks it with "
            "{%% generation %%}; auto: where the template does.",
            "choices": list(_YES),
        },
    )
    max_seq_length: int = field(default=512, metadata={"help": "Most tokens per training sequence."})
    packing: str = field(
        default="blocks",
        metadata={
            "help": "blocks: documents follow each other, cut into sequences of --max_seq_length. documents: the same, but "
            "none sees the one before it. false: one document per sequence (long ones go on in the next), padded.",
            "choices": list(PACKINGS),
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenise while training, in the order of the data; needs --max_steps."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        # a config file can have one name, and YAML's true and false
        self.train_file, self.eval_file = _as_list(self.train_file), _as_list(self.eval_file)
        self.packing, self.assistant_only_loss = str(self.packing).lower(), str(self.assistant_only_loss).lower()
        self.packing = "blocks" if self.packing == "true" else self.packing
        for name, value, allowed in (
            ("packing", self.packing, PACKINGS),
            ("assistant_only_loss", self.assistant_only_loss, _YES),
        ):
            if value not in allowed:
                raise ValueError(f"`--{name}`={value!r} is not known. Choose {', '.join(allowed[:-1])} or {allowed[-1]}.")
        self._check_sources()
        if self.max_seq_length < 2:
            raise ValueError(f"`--max_seq_length`={self.max_seq_length} must be at least 2: one token predicts the next.")

    def _check_sources(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            given = "neither is" if self.train_file is None else "both are"
            raise ValueError(f"Give `--train_file` or `--dataset_name`: {given} given.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(f"`--dataset_config_name`={self.dataset_config_name!r} is of `--dataset_name`. Leave it out.")
        percentage = self.validation_split_percentage
        if percentage is None:
            return
        if not 0 < percentage < 100:
            raise ValueError(f"`--validation_split_percentage`={percentage} must lie between 0 and 100.")
        for name in ("eval_file", "streaming"):
            if getattr(self, name):
                raise ValueError(
                    f"`--validation_split_percentage`={percentage} and `--{name}` do not go together. Leave one of them out."
                )


def _as_list(value: Any) -> list[str] | None:
    if value is None or isinstance(value, list):
        return value or None
    return [str(value)]
