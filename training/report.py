# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe report`: a page that shows what the experts of a model do, and whether they have specialised.

RUN_OR_MODEL is the output folder of a training, the folder of a model, or the id of a model on the Hub: a
Mixture-of-Experts of hf_moe or of Transformers. The model is run on a text. What a folder has is shown (losses, load,
entropy over steps), and what it lacks is said. Written are `report.html`, which needs no server and no network, PNG
pictures, and `report.json` with every number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .report_data import ReportData
    from .report_text import Document

PAGE, NUMBERS = "report.html", "report.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """Errors in one line, and no flag by its first letters."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = vars(_parser().parse_args(argv))
    try:
        page = write_report(arguments.pop("run_or_model"), arguments.pop("output"), **arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-moe report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    content = json.loads((page.parent / NUMBERS).read_text(encoding="utf-8"))
    for verdict in (content["specialisation"], content["load"]):
        if verdict is not None:
            print(" ".join([verdict.get("headline", f"load: {verdict['level']}."), *verdict["sentences"]]))
    print(f"wrote {page}")
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="hf-moe report", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_or_model", metavar="RUN_OR_MODEL", help="folder of a training or a model, or Hub id of a model")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text to route, .txt or .jsonl; several files are the parts (default: a sample)",
    )
    parser.add_argument("--text_field", "--text-field", default="text", help="field of a .jsonl file (default: text)")
    parser.add_argument("--part_field", "--part-field", help="field of a .jsonl file that names the part, e.g. a domain")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hub id of the tokenizer (default: the model's)")
    parser.add_argument("--output", metavar="DIR", help="where to write (default: RUN_OR_MODEL/report)")
    parser.add_argument("--max-tokens", "--max_tokens", type=int, default=8192, help="of the text (default: 8192)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as stored)")
    parser.add_argument("--no-pictures", action="store_false", dest="pictures", help="write no PNG files")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


def write_report(
    run_or_model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    text_field: str = "text",
    part_field: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_tokens: int = 8192,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    pictures: bool = True,
) -> Path:
    """Write the report of a training or a model.

    Args:
        run_or_model: output folder of a training, folder of a model, or Hub id of a model.
        output: folder to write to (default: `report` in that folder; of a Hub id, `<name>-report` here).
        text: file or files to route, .txt or .jsonl (default: a small sample in five domains).
        text_field: field of a .jsonl file with the text.
        part_field: field of a .jsonl file with the name of the part (default: a document is a part; of several files, a file).
        tokenizer: folder or Hub id of the tokenizer (default: the model's).
        max_tokens: of the text.
        device: to run the model on (default: cuda if there is one).
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: whether to run code that comes with the model.
        pictures: whether to write PNG files beside the page.

    Returns:
        The page.

    Raises:
        ValueError: there is nothing to report on, a file cannot be used, or the model has no experts.

    Example:
        >>> from hf_moe.training import write_report
        >>> write_report("my-run", text="heldout.txt")  # doctest: +SKIP
        PosixPath('my-run/report/report.html')
    """
    from .report_model import gather
    from .report_page import render_page
    from .report_source import find_source

    documents = _documents(text, text_field, part_field, max_tokens)
    source = find_source(run_or_model, None if tokenizer is None else os.fspath(tokenizer))
    folder = Path(output) if output is not None else _default_output(run_or_model)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output`={os.fspath(folder)!r} is a file. Name a folder.")
    data = gather(source, documents, max_tokens, device, dtype, trust_remote_code)
    folder.mkdir(parents=True, exist_ok=True)
    if pictures:
        _write_pictures(data, folder)
    _write_numbers(data, folder / NUMBERS)
    return _write(folder / PAGE, render_page(data))


def _documents(text: Any, text_field: str, part_field: str | None, max_tokens: int) -> list[Document]:
    from .report_text import read_documents

    if max_tokens < 1:
        raise ValueError(f"`--max-tokens`={max_tokens} leaves nothing to look at. Give a number above 0.")
    paths = [] if text is None else [text] if isinstance(text, str | os.PathLike) else list(text)
    return read_documents([Path(path) for path in paths], text_field, part_field, max_tokens)


def _default_output(run_or_model: str | os.PathLike[str]) -> Path:
    folder = Path(run_or_model)
    return folder / "report" if folder.is_dir() else Path(f"{folder.name}-report")


def _write(path: Path, text: str) -> Path:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return path


def _write_numbers(data: ReportData, path: Path) -> None:
    from .report_data import to_json

    _write(path, json.dumps(to_json(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def _write_pictures(data: ReportData, folder: Path) -> None:
    from .report_pictures import write_pictures

    try:
        write_pictures(data, folder)
    except ImportError as error:
        data.notes.append(f"There are no PNG files: {error}")
