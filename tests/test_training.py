"""The script `hf-moe train`, the table of commands, the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import text_config
from hf_moe.training import demo, read_expert_load
from hf_moe.training.data import load_blocks
from hf_moe.training.finetune import main as finetune_main
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.__main__ import COMMANDS
from hf_moe.__main__ import main as hf_moe_main

EXPERTS, TOP_K = 4, 2


def build(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    # larger weights than the default, so that routing is far from uniform
    text = text_config("llama", initializer_range=0.2)
    return MoEForCausalLM(MoEConfig(text_config=text, num_experts=EXPERTS, num_experts_per_tok=TOP_K, **fields))


def load_rows(folder: Path) -> list[dict]:
    found = read_expert_load(folder / "expert_load.safetensors")
    return [{"step": step, "executed": row} for step, row in zip(found.steps, found.executed.tolist(), strict=True)]


# ---------------------------------------------------------------------- the script

SENTENCES = ["the cat sat on the mat", "a dog sat on a log", "the log is on the mat", "a cat and a dog sat and sat"]


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE checkpoint with a word-level tokenizer, and text to train on."""
    folder = tmp_path_factory.mktemp("moe")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<end>"]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    build(router_type="sigmoid").save_pretrained(folder)
    rows = "".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES)
    (folder / "train.jsonl").write_text(rows * 10)
    (folder / "heldout.txt").write_text("the dog sat on the log\n\na cat is on a mat and the dog is on the mat\n" * 2)
    return folder


def command(folder: Path, out: Path, **options: str) -> list[str]:
    defaults = {
        "model": str(folder), "train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "heldout.txt"),
        "output_dir": str(out), "max_seq_length": "8", "max_steps": "12", "learning_rate": "1e-2",
        "logging_steps": "4", "save_strategy": "no", "use_cpu": "True", "disable_tqdm": "True",
    }  # fmt: skip
    return [word for name, value in {**defaults, **options}.items() for word in (f"--{name}", value)]


def test_script_end_to_end(moe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert finetune_main(command(moe_folder, out)) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["eval_before"]["eval_loss"], metrics["eval_after"]["eval_loss"]
    assert after < before - 0.3
    assert f"{before:.4f} before, {after:.4f} after" in capsys.readouterr().out
    logs = [row for row in metrics["log_history"] if "loss" in row]
    assert [row["step"] for row in logs] == [4, 8, 12]
    assert all("moe/load_cv" in row for row in logs)
    assert [row["step"] for row in load_rows(out)] == [4, 8, 12]
    assert (out / "expert_load.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert any(layer.gate.e_score_correction_bias.any() for layer in model.moe_layers)  # loss-free balancing ran
    end = tokenizer.eos_token_id
    paragraphs = [p.strip() for p in (moe_folder / "heldout.txt").read_text().split("\n\n")]
    tokens = [token for p in paragraphs for token in (*tokenizer(p)["input_ids"], end)]
    ids = torch.tensor(tokens[: len(tokens) // 8 * 8]).view(-1, 8)
    with torch.no_grad():
        assert after == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_script_resumes(moe_folder: Path, tmp_path: Path) -> None:
    """Training in two parts ends where training in one does."""
    options = {"max_steps": "8", "save_strategy": "steps", "save_steps": "4"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune_main(command(moe_folder, whole, **options)) == 0
    parts.mkdir()
    (whole / "checkpoint-4").rename(parts / "checkpoint-4")
    assert finetune_main(command(moe_folder, parts, **options, resume_from_checkpoint="true")) == 0
    ends = [json.loads((out / "metrics.json").read_text())["eval_after"]["eval_loss"] for out in (whole, parts)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
    assert load_rows(parts) == load_rows(whole)[1:]


def test_script_trains_a_dense_model(moe_folder: Path, tmp_path: Path) -> None:
    """The baseline beside a MoE: the same script, without expert load."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((moe_folder / name).read_bytes())
    AutoModelForCausalLM.from_config(text_config("llama")).save_pretrained(tmp_path)
    out = tmp_path / "out"
    assert finetune_main(command(moe_folder, out, model=str(tmp_path), max_steps="1")) == 0
    assert {"eval_before", "eval_after"} <= set(json.loads((out / "metrics.json").read_text()))
    assert not list(out.glob("expert_load*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "no/such.jsonl"}, "`--train_file`='no/such.jsonl' is not a file"),
        ({"eval_file": "{folder}/config.json"}, "`--eval_file`='{folder}/config.json'"),
        ({"text_field": "body"}, "no string field 'body' in its first line, but ['text']. Name the field with `--text_field`"),
        ({"model": "/no/such/folder"}, "`--model`='/no/such/folder' is not a folder. Give a folder"),
        ({"model": "{folder}/empty"}, "`--model`='{folder}/empty' is a folder without config.json"),
        ({"resume_from_checkpoint": "true"}, "`--resume_from_checkpoint`='true': no checkpoint there"),
        ({"max_seq_length": "500"}, "`--max_seq_length`=500 is more than the 128 positions"),
        ({"max_seq_length": "128"}, "`--eval_file`='{folder}/heldout.txt' has fewer than 128 tokens"),
    ],
)  # fmt: skip
def test_script_refuses_before_work(
    moe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str], message: str
) -> None:
    (moe_folder / "empty").mkdir(exist_ok=True)
    filled = {name: value.replace("{folder}", str(moe_folder)) for name, value in options.items()}
    assert finetune_main(command(moe_folder, tmp_path / "out", **filled)) == 2
    assert message.replace("{folder}", str(moe_folder)) in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_blocks_hold_the_text_in_order(moe_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(moe_folder)
    blocks = load_blocks("--train_file", str(moe_folder / "train.jsonl"), tokenizer, 16)
    expected = " <end> ".join(SENTENCES * 10) + " <end>"
    flat = [token for row in blocks["input_ids"] for token in row]
    words = expected.split()
    assert len(words) - len(flat) < 16
    assert tokenizer.convert_ids_to_tokens(flat) == words[: len(flat)]
    assert blocks["labels"] == blocks["input_ids"]


# ---------------------------------------------------------------------- hf-moe and the demo


def test_command_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_moe_main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert hf_moe_main(["fly"]) == 2
    assert (
        "no command 'fly'. Choose one of upcycle, export, import, densify, prune, inspect, train, plan, consolidate, "
        "report, demo" in capsys.readouterr().err
    )
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            hf_moe_main([name, "--help"])
        assert ended.value.code == 0
        assert f"hf-moe {name}" in capsys.readouterr().out


def test_consolidate_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_moe_main(["consolidate", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "hf-moe consolidate: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_texts_are_disjoint(tmp_path: Path) -> None:
    for language in demo.LANGUAGES:
        path = tmp_path / demo.SUMMARIES.format(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {str(i): {"extract": f"{language} {i % 40} " + "x" * 200} for i in range(60)}  # with duplicates
        path.write_text(json.dumps({**entries, "short": {"extract": "x"}}))
    train, held_out = (path.read_text().splitlines() for path in demo.write_texts(tmp_path, tmp_path, per_language=20))
    assert len(held_out) == len(set(held_out)) == demo.HELD_OUT * 3
    assert len(train) == len(set(train)) == 20 * 3
    assert not set(train) & set(held_out)


def test_demo_refuses_a_damaged_model(tmp_path: Path) -> None:
    for name in (demo.GGUF, *(demo.SUMMARIES.format(language) for language in demo.LANGUAGES)):
        (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / name).write_text("damaged")
    with pytest.raises(demo.DemoError, match=r"is damaged.*Delete"):
        demo.fetch(tmp_path)


def test_demo_from_a_dense_model_to_text(moe_folder: Path, tmp_path: Path) -> None:
    """All steps but the download, in a process of its own: where the command runs, `import hf_moe` registers nothing."""
    dense = tmp_path / "dense"
    text = text_config("llama", num_hidden_layers=3, vocab_size=64)
    AutoModelForCausalLM.from_config(text).save_pretrained(dense)
    AutoTokenizer.from_pretrained(moe_folder).save_pretrained(dense)
    (tmp_path / "hf-moe").write_text(
        "import sys, pathlib\n"
        "from hf_moe.training import demo\n"
        "texts = tuple(map(pathlib.Path, sys.argv[2:]))\n"
        "demo.fetch, demo.write_texts = lambda folder: folder, lambda *args, **kwargs: texts\n"
        "sys.exit(demo.main(['--workdir', sys.argv[1], '--steps', '2', '--seq-length', '16']))\n"
    )
    texts = [str(moe_folder / name) for name in ("train.jsonl", "train.jsonl")]
    command = [sys.executable, str(tmp_path / "hf-moe"), str(tmp_path), *texts]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stdout + run.stderr
    for found in ("dense model", "MoE before", "MoE after", "reloaded, it writes:", "expert_load.png", "total time"):
        assert found in run.stdout
    losses = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith(("  dense model", "  MoE before"))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # upcycling changes nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_demo_refuses_a_missing_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--device", "cuda", "--workdir", str(tmp_path / "new")]) == 2
    assert "torch finds no CUDA device. Use `--device cpu`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
