# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe train`: fine-tune a causal LM, Mixture-of-Experts or dense, with `MoETrainer`.

    hf-moe train [CONFIG.yaml] --model M --train_file train.jsonl --eval_file heldout.jsonl --output_dir run --max_steps 100
    hf-moe train --model some-dense-model --upcycle_num_experts 8 --dataset_name some/dataset --output_dir run
    accelerate launch -m hf_moe.training.finetune …       or the path of this file; torchrun likewise

Options can stand in a YAML or JSON file, by their names; those beside it count more. Every option of `TrainingArguments` can
be given. It measures loss and perplexity per token on held-out text before and after, and writes to `--output_dir` the
checkpoint with its tokenizer and model card, `metrics.json`, `expert_load.safetensors` and a picture of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import DataArguments, ModelArguments
    from .command_line import FinetuneArguments, Options
    from .trainer import MoETrainer

UPCYCLE = "upcycle_"  # prefix of the recipe's fields


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    from hf_moe.conversion.recipe_options import recipe_options

    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        from .train_help import train_help

        print(train_help(__doc__ or "", recipe_options(UPCYCLE)))
        sys.exit(0)
    from .command_line import parse

    try:
        options = parse(words, recipe_options(UPCYCLE))
        source = find_source(options.model, options.upcycle)
        trainer = prepare(options, source)
    except (ValueError, OSError) as error:  # what the user can put right, before any work is done
        if os.environ.get("RANK", "0") == "0":
            print(f"hf-moe train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finetune(options, source, trainer)
    return 0


# ---------------------------------------------------------------------- the model


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from.

    Attributes:
        config: of the model.
        tokenizer: folder or Hub id of the tokenizer.
        build: makes the model; takes arguments of `from_pretrained`.
        records: files that tell where it comes from, for the output folder.
        notes: what is worth saying about it, a sentence each.
    """

    config: Any
    tokenizer: str | Path
    build: Callable[..., Any]
    records: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_source(model: ModelArguments, upcycle: dict[str, Any]) -> ModelSource:
    """What `--model` is, and how it is loaded, upcycled or imported; no weight is read.

    Raises:
        ValueError: it cannot be used, or options do not fit it; the message says why and what to do.
    """
    from hf_moe.conversion.in_memory import checkpoint_kind, plan_imported, plan_upcycled
    from hf_moe.conversion.recipe_options import recipe_of

    wanted = sorted([*upcycle, *(["upcycle_config"] if model.upcycle_config else [])])
    if f"{UPCYCLE}gguf_file" in upcycle:
        config, kind = None, "dense"
    else:
        config = _load_config(model)
        kind = checkpoint_kind(config.to_dict())
    if kind != "dense" and wanted:
        raise ValueError(f"`--{wanted[0]}`: `--model`={model.model!r} already is a Mixture-of-Experts. Leave it out.")
    if model.keep_native and kind not in ("native", "moe"):
        what = "a MoE of hf_moe" if kind == "ours" else "a dense model"
        raise ValueError(f"`--keep_native`: `--model`={model.model!r} is {what}, no native MoE. Leave it out.")
    if kind == "moe" and not model.keep_native:
        raise ValueError(
            f"`--model`={model.model!r} is a Mixture-of-Experts that cannot be imported into hf_moe. Train it as the class "
            "that it is with `--keep_native`."
        )
    if wanted:
        fields = {"source": model.model, "dtype": model.dtype, "trust_remote_code": model.trust_remote_code}
        return _planned(plan_upcycled(recipe_of(upcycle, UPCYCLE, model.upcycle_config, **fields)), model)
    if kind == "native" and not model.keep_native:
        return _planned(plan_imported(model.model, model.dtype), model)
    return ModelSource(config, model.model, partial(_load, model, config))


def _planned(plan: Any, model: ModelArguments) -> ModelSource:
    """A model that is made in memory."""
    from hf_moe.auto import MoEConfig

    def build(**kwargs: Any) -> Any:
        made = plan.build(**kwargs)
        if model.attn_implementation is not None:
            made.set_attn_implementation(model.attn_implementation)
        return made

    return ModelSource(MoEConfig.from_dict(plan.config), plan.companions or model.model, build, plan.records, plan.notes)


def _load(model: ModelArguments, config: Any, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model.model,
        config=config,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **kwargs,
    )


def _load_config(model: ModelArguments) -> Any:
    """The config of `--model`."""
    from transformers import AutoConfig

    import hf_moe.auto  # noqa: F401  registers our class

    name = model.model
    remedy = "Give a folder that `save_pretrained` or `hf-moe upcycle` wrote, or the id of a model on the Hub."
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"`--model`={name!r} is a folder without config.json. {remedy}")
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"`--model`={name!r} is not a folder. {remedy}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except OSError as error:
        raise ValueError(f"`--model`={name!r} is no folder here, and not found on the Hub. {remedy}") from error


# ---------------------------------------------------------------------- the training


def prepare(options: Options, source: ModelSource) -> MoETrainer:
    """A `MoETrainer` with model, tokenizer and sequences; what is cheap to check is checked first.

    Raises:
        ValueError: the model or a file cannot be used, or options contradict each other.
    """
    from transformers import default_data_collator, set_seed

    from .data import PadCollator, check_documents_apart
    from .trainer import MoETrainer

    data, arguments = options.data, options.training
    _check_options(data, arguments, source.config)
    tokenizer = _load_tokenizer(options, source)
    with arguments.main_process_first(desc="tokenising"):
        sequences = _tokenise_all(data, tokenizer, arguments)
    set_seed(arguments.seed)  # before the model: a router that the checkpoint lacks is drawn
    layout = arguments.expert_parallel
    model = source.build(**({} if layout is None else layout.distributed(source.config)))
    collator: Any = default_data_collator
    if data.packing == "documents":
        check_documents_apart(model)
    elif data.packing == "false":
        padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        collator = PadCollator(padding)
    try:
        return MoETrainer(
            model,
            arguments,
            train_dataset=sequences["train"],
            eval_dataset=sequences.get("eval"),
            processing_class=tokenizer,
            data_collator=collator,
        )
    except Exception as error:
        if not arguments.push_to_hub or isinstance(error, ValueError):
            raise
        raise ValueError(f"`--push_to_hub`: the repository cannot be made ({error}). Log in with `hf auth login`.") from error


def _check_options(data: DataArguments, arguments: FinetuneArguments, config: Any) -> None:
    """Refuse what can be known before anything is read."""
    from .data_source import check_files, find_files

    for option in ("train_file", "eval_file"):
        patterns = getattr(data, option)
        if patterns is not None:
            files = find_files(f"--{option}", patterns)
            check_files(f"--{option}", files, data)
            setattr(data, option, files)
    if data.train_file is not None and data.eval_file is None and data.validation_split_percentage is None:
        _refuse_evaluation(arguments)
    if data.streaming and arguments.max_steps <= 0:
        raise ValueError("`--streaming` does not know how long the data is. Give `--max_steps`.")
    if data.chat_template is not None and not os.path.isfile(data.chat_template):
        raise ValueError(f"`--chat_template`={data.chat_template!r} is not a file. Give one with a Jinja template.")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and data.max_seq_length > longest:
        raise ValueError(
            f"`--max_seq_length`={data.max_seq_length} is more than the {longest} positions of the model. Lower it."
        )
    _find_checkpoint(arguments)


def _refuse_evaluation(arguments: FinetuneArguments) -> None:
    if arguments.eval_strategy != "no":
        raise ValueError(
            "`--eval_strategy` is given, but there is nothing to evaluate on. Give `--eval_file` or "
            "`--validation_split_percentage`."
        )


def _find_checkpoint(arguments: FinetuneArguments) -> None:
    """Resolve `--resume_from_checkpoint true` to the newest whole checkpoint in the output folder; check that it is there."""
    from .checkpoints import last_whole_checkpoint, what_is_missing

    wanted = None if arguments.resume_from_checkpoint is None else str(arguments.resume_from_checkpoint)
    arguments.resume_from_checkpoint = None
    if wanted is None or wanted.lower() == "false":
        return
    found = last_whole_checkpoint(arguments.output_dir) if wanted.lower() == "true" else Path(wanted)
    if found is None or not found.is_dir():
        raise ValueError(
            f"`--resume_from_checkpoint`={wanted!r}: no checkpoint there. Give a checkpoint-N folder, or `true` for the newest "
            "in `--output_dir`; or leave the option out to start afresh."
        )
    missing = what_is_missing(found)
    if missing is not None:
        raise ValueError(f"`--resume_from_checkpoint`={wanted!r}: {missing} is missing or cut short. Give another checkpoint.")
    arguments.resume_from_checkpoint = str(found)


def _load_tokenizer(options: Options, source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=options.model.trust_remote_code)
    if options.data.chat_template is not None:
        tokenizer.chat_template = Path(options.data.chat_template).read_text(encoding="utf-8")
    return tokenizer


def _tokenise_all(data: DataArguments, tokenizer: Any, arguments: FinetuneArguments) -> dict[str, Any]:
    """The sequences to train on, `"train"`, and to evaluate on, `"eval"`, if there are any."""
    from .data import Layout, check_chats, tokenise
    from .data_source import field_of, open_data

    rows = open_data(data, arguments.seed)
    if "eval" not in rows:
        _refuse_evaluation(arguments)
    sequences = {}
    for role, (what, documents) in rows.items():
        first = next(iter(documents), None)
        if first is None:
            raise ValueError(f"{what} has no rows. Give data with text.")
        text_field = field_of(what, first, data)
        if text_field is not None and data.assistant_only_loss == "true":
            raise ValueError(f"`--assistant_only_loss`='true': {what} has no chats, but text in {text_field!r}. Leave it out.")
        assistant_only = text_field is None and check_chats(what, tokenizer, data.assistant_only_loss)
        layout = Layout(data.packing, data.max_seq_length, text_field, data.messages_field, assistant_only)
        sequences[role] = tokenise(documents, tokenizer, layout, what=what, workers=data.preprocessing_num_workers)
    return sequences


def finetune(options: Options, source: ModelSource, trainer: MoETrainer) -> dict[str, Any]:
    """Evaluate, train, evaluate, and write the results to the output folder.

    Returns:
        What `metrics.json` holds: what the run was told about model and data, `eval_before` and `eval_after` (if there is
        held-out text), `train` and `log_history`.
    """
    from .results import told, write_results

    arguments = trainer.args
    results: dict[str, Any] = {**told(options.model, options.data, options.upcycle), "world_size": arguments.world_size}
    first = trainer.is_world_process_zero()
    for note in source.notes if first else []:
        print(note)
    # the first evaluation is a part of the training, so that its log, and that of a resumed one, has it once
    arguments.eval_on_start = trainer.eval_dataset is not None and arguments.resume_from_checkpoint is None
    results["train"] = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint).metrics
    before = [row for row in trainer.state.log_history if row["step"] == 0 and "eval_loss" in row]
    if before:
        results["eval_before"] = {name: value for name, value in before[0].items() if name.startswith("eval_")}
    if trainer.eval_dataset is not None:
        results["eval_after"] = trainer.evaluate()
    results["log_history"] = trainer.state.log_history
    trainer.save_model(_internal_call=True)  # it is pushed at the end, with all that belongs to it
    if first:
        write_results(trainer, results, source.records)
    trainer.accelerator.wait_for_everyone()
    return results


if __name__ == "__main__":
    if not __package__:  # run as a file, whose folder must not hide modules of other libraries
        sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(import_module("hf_moe.training.finetune").main())
