# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The commands that convert checkpoints: upcycle, export, import, densify, prune, inspect."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConversionError
from .methods import METHODS
from .recipe import METHOD_OPTIONS, MOE_FIELDS, Recipe, parse_size, parse_yaml, read_text, read_yaml

# Fields of a recipe that are no `--field VALUE`.
_POSITIONAL = ("source", "destination", "options", "moe")
RECIPE_HELP = {
    "method": f"how experts are made: {', '.join(METHODS)} (default: copy)",
    "models": "merge: folders or Hub ids of the dense models, one for each expert",
    "preset": "a published system's setting, e.g. mixtral, switch, deepseek_v3",
    "layers": "indices of the decoder layers to convert (default: all)",
    "router_init": "normal, zeros or prompts (default: normal)",
    "router_init_std": "standard deviation of normal (default: probabilities start nearly uniform)",
    "router_prompts": "a list of prompts for each expert, as YAML: [[a, b], [c]]; or a YAML file with `router_prompts`",
    "seed": "of everything that is drawn (default: 0)",
    "dtype": "auto, float32, bfloat16 or float16 (default: auto, as stored)",
    "max_shard_size": "bytes per weight file, e.g. 500MB (default: 5GB)",
    "text": "text file for the comparison and for coactivation",
    "gguf_file": "name of the GGUF file in SOURCE",
    "revision": "branch, tag or commit of a Hub id",
}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, and no flag by its first letters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def upcycle(argv: list[str]) -> int:
    """`hf-moe upcycle`: a dense checkpoint in, a Mixture-of-Experts checkpoint out."""
    return _run(_upcycle_parser(), argv, _upcycle)


def _upcycle_parser() -> _Parser:
    parser = _Parser(
        prog="hf-moe upcycle",
        description=upcycle.__doc__,
        epilog="Values are YAML: 8, 0.5, true, [2, 4, 8]. The flags' names, with _ for -, are the fields of a recipe file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="folder or Hub id of a dense causal LM")
    parser.add_argument("destination", nargs="?", metavar="DESTINATION", help="folder for the MoE checkpoint")
    parser.add_argument("--config", metavar="RECIPE.yaml", help="a recipe file; what is given beside it counts more")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe and stop")
    main = parser.add_argument_group("what to do")
    for field in dataclasses.fields(Recipe):
        if field.name not in (*_POSITIONAL, "verify", "trust_remote_code"):
            many = {"nargs": "+"} if field.name in ("models", "layers") else {}
            main.add_argument(_flag(field.name), help=RECIPE_HELP[field.name], metavar="VALUE", **many)  # type: ignore[arg-type]
    main.add_argument(
        "--no-verify", action="store_const", const=False, dest="verify", help="skip the comparison with the source"
    )
    main.add_argument("--trust-remote-code", action="store_const", const=True, help="run code that comes with the source")
    options = parser.add_argument_group("options of the method")
    for name, option in METHOD_OPTIONS.items():
        owner = next(n for n, method in METHODS.items() if option in dataclasses.fields(method))
        text = f"{owner}: {option.metadata['help']} ({option.metadata['allowed']}; default: {option.default})"
        options.add_argument(_flag(name), help=text.replace("%", "%%"), metavar="VALUE")
    fields = parser.add_argument_group("fields of MoEConfig (see its documentation)")
    for name, field in MOE_FIELDS.items():
        fields.add_argument(_flag(name), metavar="VALUE", help=f"default: {field.default}")
    return parser


def _upcycle(arguments: argparse.Namespace) -> None:
    given = {n: v for n, v in vars(arguments).items() if v is not None and n not in ("config", "print_config")}
    texts = ("source", "destination", "models", "text", "gguf_file", "revision", "method", "max_shard_size", "dtype")
    for name, value in given.items():
        if isinstance(value, str) and name not in texts:
            given[name] = _value(name, value)
        elif name == "layers":
            given[name] = [_value(name, v) for v in value]
    if isinstance(given.get("router_prompts"), str):
        given["router_prompts"] = read_yaml(Path(given["router_prompts"])).get("router_prompts")
    recipe = Recipe.read(arguments.config, **given) if arguments.config else Recipe.from_dict(given)
    if arguments.print_config:
        print(recipe.to_yaml(whole=True), end="")
        return
    if recipe.destination is None:
        raise ValueError("DESTINATION is not given. Name a folder that does not exist yet.")
    from .upcycling import run_recipe

    result = run_recipe(recipe)
    _print(result, f"promised: {result.promise}")


def export(argv: list[str]) -> int:
    """`hf-moe export`: a MoE checkpoint of hf_moe as one of a native class, which needs no hf_moe to load."""
    from .native_formats import NATIVE_FORMATS

    parser = _converter("export", export.__doc__)
    parser.add_argument("--format", default="auto", help=f"auto, or one of {', '.join(NATIVE_FORMATS)} (default: auto)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")

    def work(arguments: argparse.Namespace) -> None:
        from .exporting import export as run

        _print(run(**_arguments(arguments)))

    return _run(parser, argv, work)


def import_moe(argv: list[str]) -> int:
    """`hf-moe import`: a native MoE checkpoint (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, …) as one of hf_moe."""
    parser = _converter("import", import_moe.__doc__)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")

    def work(arguments: argparse.Namespace) -> None:
        from .importing import import_moe as run

        _print(run(**_arguments(arguments)))

    return _run(parser, argv, work)


def densify(argv: list[str]) -> int:
    """`hf-moe densify`: one expert of every layer, or their average, back to a dense checkpoint."""
    parser = _converter("densify", densify.__doc__, text=True)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--expert", type=int, nargs="+", help="the expert that every layer keeps, or one for each MoE layer")
    choice.add_argument("--average", action="store_true", help="the average of the experts, weighted by --load")
    parser.add_argument("--load", help="expert_load.safetensors of a training run (default: all experts count the same)")
    parser.add_argument("--weights-sum", type=float, help="what a token's combine weights sum to (default: as at the start)")

    def work(arguments: argparse.Namespace) -> None:
        from .checkpoint_reader import open_checkpoint
        from .dense_source import local_folder
        from .pruning import moe_fields

        given = _arguments(arguments)
        moe_fields(open_checkpoint(local_folder(arguments.source)))  # what needs no torch to be refused
        from .densifying import densify as run

        if given.get("expert") and len(given["expert"]) == 1:
            given["expert"] = given["expert"][0]
        _print(run(**given))

    return _run(parser, argv, work)


def prune(argv: list[str]) -> int:
    """`hf-moe prune`: leave out the experts that were used least."""
    parser = _converter("prune", prune.__doc__, text=True)
    parser.add_argument("--load", required=True, help="expert_load.safetensors of a training run")
    parser.add_argument("--keep", required=True, type=int, help="how many experts each layer keeps")

    def work(arguments: argparse.Namespace) -> None:
        from .pruning import prune as run

        _print(run(**_arguments(arguments)))

    return _run(parser, argv, work)


def inspect(argv: list[str]) -> int:
    """`hf-moe inspect`: parameters, experts, bytes and FLOPs of a checkpoint, from its headers."""
    parser = _Parser(prog="hf-moe inspect", description=inspect.__doc__)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a checkpoint")
    parser.add_argument("--context-length", type=int, help="for the cost of attention (default: 4096 or the model's)")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def work(arguments: argparse.Namespace) -> None:
        from .inspection import inspect_checkpoint

        found = inspect_checkpoint(arguments.path, arguments.context_length)
        print(found.to_json() if arguments.json else found)

    return _run(parser, argv, work)


def _converter(name: str, description: str | None, text: bool = False) -> _Parser:
    """A parser with what all converters have."""
    parser = _Parser(prog=f"hf-moe {name}", description=description)
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a checkpoint")
    parser.add_argument("destination", metavar="DESTINATION", help="folder for the new checkpoint")
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per weight file (default: 5GB)")
    parser.add_argument("--no-verify", action="store_false", dest="verify", help="skip the comparison with the source")
    if text:
        parser.add_argument("--text", help="text file for the comparison")
    return parser


def _arguments(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given, as the converters' functions take it."""
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    given["max_shard_size"] = parse_size(given["max_shard_size"])
    if "text" in given:
        given["text"] = read_text(given["text"])
    return given


def _print(result: Any, *notes: str) -> None:
    """Say what was made.

    Raises:
        ConversionError: it does not compute what was promised.
    """
    from .inspection import inspect_checkpoint

    print(f"wrote {result.destination}: {inspect_checkpoint(result.destination).summary}")
    report = result.report
    for note in (*getattr(result, "notes", ()), *([] if report is None else [report]), *notes):
        print(note)
    if report is not None and (not math.isfinite(report.max_abs_diff) or (report.expected_exact and not report.exact)):
        raise ConversionError(f"{result.destination}: {report.verdict}")


def _value(name: str, text: str) -> Any:
    import yaml

    try:
        return parse_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise ValueError(f"`{_flag(name)} {text}` is not a value ({' '.join(str(error).split())[:120]}).") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(parser: _Parser, argv: list[str], work: Callable[[argparse.Namespace], None]) -> int:
    """Parse and work; errors become one line and an exit status other than 0."""
    arguments = parser.parse_args(argv)
    try:
        work(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0
