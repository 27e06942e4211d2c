# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`push_to_hub`: a checkpoint and its card to the Hub, in one commit or not at all."""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_moe.parameter_counts import count_parameters

from .checkpoint import Checkpoint, open_checkpoint
from .front_matter import split_readme, split_record
from .lineage import LINEAGE, local_folder_of
from .metadata import CardOptions
from .package import OF_RUN, TOKENIZER, WEIGHTS, check_loadable, files_to_push, matching
from .readme import own_text, split_body, strip_draft
from .rendering import README, fill, read_text, save_card, write_records
from .subject import Subject, bytes_by_dtype, describe, is_trainer, record_bytes


@dataclass(frozen=True)
class Push:
    """What `push_to_hub` has uploaded, or would upload.

    Attributes:
        repo_id: the repository.
        files: bytes of each file by its path in the repository.
        card: the text of README.md.
        deleted: weight files of the repository that the same commit removes, since they would be loaded instead.
        commit_url: of the commit; `None` for a dry run, and on ranks that do not push.
        notes: what is worth knowing, a sentence each.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    deleted: list[str] = field(default_factory=list)
    commit_url: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            *((f"{size:,}", name) for name, size in sorted(self.files.items())),
            *(("removed", name) for name in self.deleted),
        ]
        state = f"pushed: {self.commit_url}" if self.commit_url else "not pushed"
        total = f"{self.repo_id}: {len(self.files)} files, {sum(self.files.values()):,} bytes; {state}"
        return "\n".join([total, *(f"{size:>16}  {name}" for size, name in rows), *self.notes])


def push_to_hub(
    source: Any,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model with hf_moe",
    dry_run: bool = False,
    trainer: Any = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> Push:
    """Upload a checkpoint with its card: weights, config, code for `trust_remote_code`, tokenizer, pictures, expert load.

    All is checked before anything is sent: the checkpoint is whole and has the tensors that its class expects, the code is
    there, the card's metadata is valid. Then the repository is created where there is none, and everything goes up in one
    commit: nobody ever downloads half of it. Text that a person wrote into the card, here or on the Hub, is kept.

    Args:
        source: a folder; a model in memory; or a `Trainer`, which saves to its `output_dir` first (all ranks have to call
            this, the first one uploads).
        repo_id: `name/repository`; of a repository alone, the namespace is the token's.
        token: of the Hub (default: the one that `hf auth login` has saved).
        private: whether a new repository is (default: the account's setting).
        commit_message: title of the commit.
        dry_run: check everything and return what would be uploaded, without any network.
        trainer: the `Trainer` of a model in memory.
        tokenizer: to go along with a model in memory (default: the trainer's, or that of the folder it was loaded from).
        max_shard_size: bytes per weight file of a model in memory.
        options: fields of `CardOptions` (`license`, `language`, `datasets`, …).

    Raises:
        ValueError: something is missing or damaged, or the Hub refuses the card; nothing was sent. One line says what.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; it has no new commit.
    """
    _check_repo_id(repo_id)
    told = CardOptions(**{"repo_id": repo_id, **options})
    with _folder_of(source, trainer, tokenizer, max_shard_size) as (folder, subject, readme):
        if folder is None:
            return Push(repo_id, {}, "")
        checkpoint = open_checkpoint(folder)
        files = {**_files_beside(source, trainer, subject), **files_to_push(checkpoint)}
        subject = _as_saved(subject, checkpoint)
        subject = replace(subject, has_tokenizer=any(fnmatch.fnmatch(name, "tokenizer*") for name in files))
        notes = check_loadable(checkpoint)
        upload = _Upload(subject, told, readme, files)
        card = upload.card()
        if dry_run:
            return Push(repo_id, upload.sizes(card), card, notes=notes)
        if is_trainer(source):
            write_records(subject, card, folder)
        return upload.run(card, token, private, commit_message, notes)


def create_model_card(
    trainer: Any,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    dataset_name: str | None = None,
) -> None:
    """In the place of `Trainer.create_model_card`, which writes a draft over whatever README.md is there.

    Args:
        trainer: the `Trainer`; the card goes into its `output_dir`.
        language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: as for
            `Trainer.create_model_card`; `tasks`, `dataset` and `dataset_args` are not used.
        dataset_name: as for TRL's; an id on the Hub.

    Example:
        >>> from functools import partial
        >>> trainer.create_model_card = partial(create_model_card, trainer)  # doctest: +SKIP
    """
    if not trainer.is_world_process_zero():
        return
    said: dict[str, Any] = {
        "language": language, "license": license, "tags": tags, "title": model_name, "base_model": finetuned_from,
        "datasets": dataset_tags or dataset_name, "repo_id": getattr(trainer, "hub_model_id", None),
    }  # fmt: skip
    save_card(trainer, **{name: value for name, value in said.items() if value is not None})


# ---------------------------------------------------------------------- what is pushed


@contextmanager
def _folder_of(
    source: Any, trainer: Any, tokenizer: Any, max_shard_size: int | str
) -> Iterator[tuple[Path | None, Subject, str]]:
    """The folder with the checkpoint (`None` on ranks that do not push), what it is, and the README that is there.

    A model in memory is saved for the time being.
    """
    if isinstance(source, (str, os.PathLike)):
        yield Path(source), describe(source, trainer), read_text(Path(source) / README)
    elif is_trainer(source):
        folder = Path(source.args.output_dir or ".")
        readme = read_text(folder / README)  # before PEFT writes into it
        source.save_model(str(folder), _internal_call=True)  # gathers what is sharded: all ranks take part
        source.save_state()
        yield (folder if source.is_world_process_zero() else None), describe(source), readme
    else:
        subject = describe(source, trainer)
        readme = "" if subject.folder is None else read_text(subject.folder / README)
        with tempfile.TemporaryDirectory(prefix="hf_moe_push_") as made:
            sharding = {} if hasattr(source, "peft_config") else {"max_shard_size": max_shard_size}
            source.save_pretrained(made, **sharding)
            chosen = tokenizer if tokenizer is not None else getattr(trainer, "processing_class", None)
            if chosen is not None:
                chosen.save_pretrained(made)
            yield Path(made), subject, readme


def _files_beside(source: Any, trainer: Any, subject: Subject) -> dict[str, Path]:
    """What belongs to a model in memory and lies elsewhere: the files of its run, the tokenizer it was loaded with."""
    if isinstance(source, (str, os.PathLike)):
        return {}
    model = source.model if is_trainer(source) else source
    name = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "name_or_path", "")
    loaded_from = local_folder_of(name) if name else None
    files = {} if loaded_from is None else {name: loaded_from / name for name in matching(loaded_from, TOKENIZER)}
    if subject.folder is not None and (trainer is not None or is_trainer(source)):
        files |= {name: subject.folder / name for name in matching(subject.folder, OF_RUN)}
    return files


def _as_saved(subject: Subject, checkpoint: Checkpoint) -> Subject:
    """With the sizes of what was saved: a rank of a sharded model has parts of it in memory."""
    if checkpoint.is_adapter:
        return subject
    counts = count_parameters(checkpoint.tensors, checkpoint.config)
    has_code = bool(checkpoint.config.get("auto_map"))
    return replace(subject, counts=counts, dtypes=bytes_by_dtype(checkpoint.tensors), has_code=has_code)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"`repo_id`={repo_id!r} is not an id of the Hub ({reason}). Give one such as name/my-moe.") from error


# ---------------------------------------------------------------------- the Hub


def _ask_hub(card: str) -> None:
    """Have the Hub check a card's metadata.

    Raises:
        ValueError: it refuses them.
    """
    from huggingface_hub import ModelCard

    try:
        ModelCard(card).validate()
    except ValueError as error:
        said = " ".join(re.findall(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error)) or str(error).split())
        raise ValueError(f"README.md: the Hub refuses its metadata ({said[:300]}). Correct them; nothing was sent.") from error


@dataclass(frozen=True)
class _Upload:
    """What goes up.

    Attributes:
        subject, told: for the card.
        readme: the README that lies here.
        files: all others, by their path in the repository.
    """

    subject: Subject
    told: CardOptions
    readme: str
    files: dict[str, Path]

    def card(self) -> str:
        return fill(self.subject, self.told, self.readme)

    def content(self, card: str) -> dict[str, Path | bytes]:
        return {**self.files, LINEAGE: record_bytes(self.subject), README: card.encode()}

    def sizes(self, card: str) -> dict[str, int]:
        return {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in self.content(card).items()}

    def run(self, card: str, token: str | bool | None, private: bool | None, commit_message: str, notes: list[str]) -> Push:
        """Create the repository where there is none, and commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=token)
        _ask_hub(card)  # before there is a repository
        repo_id = api.create_repo(str(self.told.repo_id), private=private, exist_ok=True).repo_id
        info = api.model_info(repo_id)
        present = [sibling.rfilename for sibling in info.siblings or []]
        there = replace(self, told=replace(self.told, repo_id=repo_id))
        card = there.card()
        if README in present:
            card, more = there._laid_into_remote(api, repo_id, info.sha)
            notes = [*notes, *more]
        content = there.content(card)
        deleted = [name for name in present if name not in content and any(fnmatch.fnmatch(name, p) for p in WEIGHTS)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, value) for name, value in content.items()),
                *(CommitOperationDelete(name) for name in deleted),
            ],
            commit_message=commit_message,
            parent_commit=info.sha,  # what was looked at: a push of somebody else in between is not mixed with this one
        )
        return Push(repo_id, there.sizes(card), card, deleted, str(commit.commit_url), notes)

    def _laid_into_remote(self, api: Any, repo_id: str, revision: str | None) -> tuple[str, list[str]]:
        """The card in the README of this folder where a person has written into that, else in the Hub's; and notes."""
        with tempfile.TemporaryDirectory() as folder:
            remote = read_text(Path(api.hf_hub_download(repo_id, README, revision=revision, local_dir=folder)))
        ours, theirs = self._lines_of_person(self.readme), self._lines_of_person(remote)
        if not ours:
            return fill(self.subject, self.told, remote, f"README.md of {repo_id}"), []
        lost = f"README.md of {repo_id} had text that the local one has not; it is in the history, at commit {revision}."
        return self.card(), [lost] if theirs - ours else []

    def _lines_of_person(self, readme: str) -> set[str]:
        """Lines of a README's body that hf_moe did not write."""
        _, body = split_readme(readme.replace("\r\n", "\n"))
        _, body = split_record(body)
        text = own_text(split_body(strip_draft(body, (self.told.title or "", self.subject.name))))
        return {line.strip() for line in text.splitlines()} - {""}
