"""What a card says is what the model is; what a person wrote into it stays."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_hub import metadata_errors
from families import text_config
from hf_moe.conversion import upcycle
from hf_moe.conversion.inspection import inspect_checkpoint
from hf_moe.model_cards import describe_parent, render_card, save_card
from hf_moe.model_cards.training_run import read_arguments
from hf_moe.training.load_file import LOAD_FILE, ExpertLoadFile
from huggingface_hub import ModelCard, constants, metadata_load
from test_inspection import NATIVE, OURS, native
from test_trainer_and_peft import trainer
from tiny import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_moe.parameter_counts import count_parameters

TABLE = re.compile(r"^\| ([^|]+?) \| ([^|]*?) \|$", re.MULTILINE)


def data_of(card: str) -> dict[str, Any]:
    """The metadata, which huggingface_hub reads and writes as they are, and the Hub's rules allow."""
    assert metadata_errors(card) == []
    parsed = ModelCard(card)
    assert str(parsed) == card
    return parsed.data.to_dict()


def rows_of(card: str, heading: str | None = None) -> dict[str, str]:
    """The rows of the tables of two columns below a heading, or of the whole card."""
    part = card if heading is None else card.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {name: value for name, value in TABLE.findall(part) if not set(name) <= set(" -")}


def number_in(text: str) -> int:
    return int(text.split(" ")[0].replace(",", ""))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text_config("llama", initializer_range=0.2)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts models into a cache of the Hub's, as if they had been fetched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(repo_id: str, model: PreTrainedModel | None = None, readme: str | None = None) -> Path:
        folder = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        if model is not None:
            model.save_pretrained(snapshot)
        if readme is not None:
            (snapshot / "README.md").write_text(readme)
        return snapshot

    return add


# ---------------------------------------------------------------------- sizes and routers


def count_by_modules(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of experts and of routers by walking the modules: the oracle."""
    experts = {id(p) for n, m in model.named_modules() if n.rpartition(".")[2] == "experts" for p in m.parameters()}
    routers = {
        id(p)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("gate", "router")
        for p in module.parameters()
        if id(p) not in experts
    }
    sizes = {id(p): p.numel() for p in model.parameters()}
    return sum(sizes[i] for i in experts), sum(sizes[i] for i in routers)


@pytest.mark.parametrize("name", [*OURS, *NATIVE])
def test_sizes(name: str, tmp_path: Path) -> None:
    """On disk and in memory, what the modules themselves hold."""
    model = tiny(**OURS[name]) if name in OURS else native(name)
    model.save_pretrained(tmp_path / "model")
    on_disk, in_memory = render_card(tmp_path / "model"), render_card(model)
    rows = rows_of(on_disk, "Sizes")
    assert rows == rows_of(in_memory, "Sizes")
    inspected = inspect_checkpoint(tmp_path / "model")
    assert number_in(rows["parameters"]) == inspected.parameters
    assert number_in(rows["active per token"]) == inspected.active_parameters
    if name in OURS:
        assert number_in(rows["parameters"]) == model.num_parameters()
        assert number_in(rows["active per token"]) == model.num_active_parameters()
    if name not in ("granitemoe", "hunyuan_v1_moe"):  # those name their experts otherwise
        experts, routers = count_by_modules(model)
        assert (number_in(rows["in experts"]), number_in(rows["in routers"])) == (experts, routers)
    routing = rows_of(on_disk, "Router and losses")
    assert routing == rows_of(in_memory, "Router and losses")
    assert routing["experts"].endswith(f"{inspected.num_experts_per_tok} per token")
    data = data_of(on_disk)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert ("hf_moe" in data["tags"], "moe" in data["tags"]) == (name in OURS, True)
    assert ("trust_remote_code=True" in on_disk, "hf-moe export" in on_disk) == (name in OURS, name in OURS)
    assert ("hf-moe import" in on_disk) == (name not in OURS)


class Compiled(torch.nn.Module):
    """As `torch.compile` wraps a model, whose import alone takes seconds."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_wrapped_models() -> None:
    model = tiny()
    expected = render_card(model, title="x")
    for wrapped in (Compiled(model), torch.nn.DataParallel(model), Compiled(torch.nn.DataParallel(model))):
        assert render_card(wrapped, title="x") == expected


def test_code_is_promised_only_where_it_is(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert "trust_remote_code=True" in render_card(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" not in render_card(tmp_path)


def test_dense_model(tmp_path: Path, dense: Path) -> None:
    card = render_card(dense, title="A dense one")
    assert "## Router" not in card
    assert "moe" not in data_of(card)["tags"]
    assert number_in(rows_of(card, "Sizes")["parameters"]) == inspect_checkpoint(dense).parameters


def test_counts_of_stacked_matrices() -> None:
    """DBRX stacks its experts in matrices of E·F rows, and has its config's numbers one level down."""

    class Shape:
        def __init__(self, name: str, *shape: int) -> None:
            self.name, self.shape = name, shape

    layer = "transformer.blocks.1.ffn."
    tensors = [Shape("transformer.wte.weight", 10, 8), Shape(f"{layer}router.layer.weight", 4, 8)]
    tensors += [Shape(f"{layer}experts.mlp.{name}", 4 * 6, 8) for name in ("w1", "v1", "w2")]
    counts = count_parameters(tensors, {"n_layers": 2, "ffn_config": {"moe_num_experts": 4, "moe_top_k": 1}})
    assert (counts.total, counts.experts, counts.router) == (80 + 32 + 3 * 192, 3 * 192, 32)
    assert (counts.active, counts.num_experts) == (80 + 32 + 3 * 48, {1: 4})


def test_router_and_losses(tmp_path: Path) -> None:
    fields = {"router_type": "noisy_top_k", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.2,
              "router_aux_loss_coef": 0.0, "capacity_factor": 1.25, "balance_scope": "micro_batch", "num_shared_experts": 2,
              "use_shared_expert_gate": True, "router_jitter_noise": 0.01, "decoder_sparse_step": 2}  # fmt: skip
    rows = rows_of(render_card(tiny(**fields)), "Router and losses")
    assert rows == {
        "router": "`noisy_top_k`",
        "experts": "4 per MoE layer, 2 per token",
        "MoE layers": "1 of 3",
        "shared experts": "2 per MoE layer, scaled by a learned gate",
        "capacity": "factor 1.25 in training, dropless in evaluation (who is dropped: `position`)",
        "jitter of the router's input": "0.01",
        "CV² of the importance (Shazeer 2017)": "coefficient 0.1",
        "CV² of the load (Shazeer 2017)": "coefficient 0.2",
        "balanced over": "micro batch",
    }
    rows = rows_of(render_card(tiny(router_type="hash", router_aux_loss_coef=0.0)), "Router and losses")
    assert (rows["router"], rows["losses"], rows["capacity"]) == ("`hash`", "none", "dropless")


# ---------------------------------------------------------------------- lineage


def test_upcycled(dense: Path, tmp_path: Path) -> None:
    """The converter's card is what `render_card` makes of its folder; it says what the report says."""
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n# Dense\n")
    result = upcycle(dense, tmp_path / "moe", num_experts=4, method="noise", std=0.1)
    written = (tmp_path / "moe" / "README.md").read_text()
    data = data_of(written)
    assert (data["license"], data["license_link"]) == ("apache-2.0", "LICENSE")
    assert "base_model" not in data  # a folder is no model of the Hub
    assert "1. Upcycled (method `noise`) from `dense` (licence `apache-2.0`)." in written
    rows = rows_of(written, "How exactly it computes what it was made of")
    assert float(rows["largest difference of logits, float32"]) == pytest.approx(result.report.max_abs_diff, rel=1e-4)
    assert float(rows["LM loss, MoE"]) == pytest.approx(result.report.moe_loss, rel=1e-4)
    assert rows["verdict"] == f"**{result.report.verdict}**"
    recipe = re.search(r"```yaml\n(.*?)```", written, re.DOTALL)
    assert yaml.safe_load(recipe[1]) == yaml.safe_load((tmp_path / "moe" / "recipe.yaml").read_text())
    rendered = render_card(tmp_path / "moe")
    assert rendered == written
    unmeasured = upcycle(dense, tmp_path / "other", num_experts=4, verify=False)
    assert unmeasured.report is None
    card = (tmp_path / "other" / "README.md").read_text()
    assert "Promised by the method: exact" in card
    assert "Not measured." in card


def test_recipe_with_fences_and_markers(dense: Path, tmp_path: Path) -> None:
    """What a recipe holds cannot break out of its block."""
    text = ["```python\ndef f():\n<!-- hf_moe:end recipe -->\n", "<!-- hf_moe:end recipe -->", "````", "{{ x }}", "---"]
    upcycle(dense, tmp_path / "moe", num_experts=4, verify=False, text=text)
    card = (tmp_path / "moe" / "README.md").read_text()
    fenced = re.search(r"^(`{5,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(fenced[2])["text"] == text
    assert render_card(tmp_path / "moe") == card


def test_import_is_a_stage(tmp_path: Path, hub_cache: Any) -> None:
    """What an import writes beside the weights, measured or not."""
    hub_cache("org/mixtral", native("mixtral"), "---\nlicense: mit\n---\n")
    report = {"kind": "import", "format": "mixtral", "parents": [describe_parent("org/mixtral")]}
    tiny().save_pretrained(tmp_path)
    (tmp_path / "conversion_report.json").write_text(json.dumps(report))
    card = render_card(tmp_path)
    assert "1. Imported (format `mixtral`) from [org/mixtral](https://huggingface.co/org/mixtral) (licence `mit`)." in card
    data = data_of(card)
    assert (data["base_model"], data["license"], "upcycled" in data["tags"]) == ("org/mixtral", "mit", False)
    assert "## How exactly" not in card
    measured = {"max_abs_diff": 0.0, "mean_abs_diff": 0.0, "dense_loss": 4.5, "moe_loss": 4.5, "tokens": 128,
                "dtype": "float32", "names": ["source", "result"], "verdict": "function preserved"}  # fmt: skip
    (tmp_path / "conversion_report.json").write_text(json.dumps({**report, **measured}))
    rows = rows_of(render_card(tmp_path), "How exactly it computes what it was made of")
    assert (rows["LM loss, source"], rows["verdict"]) == ("4.5", "**function preserved**")


def test_parents_licence_that_is_none(dense: Path, tmp_path: Path) -> None:
    """A conversion does not fail over the card of its source."""
    for readme in ("---\nlicense: Apache 2.0\n---\n", "---\nlicense: [\n---\n", "---\nlicense: [mit, gpl]\n---\n"):
        (dense / "README.md").write_text(readme)
        upcycle(dense, tmp_path / str(len(readme)), num_experts=4, verify=False)
        assert "license" not in data_of((tmp_path / str(len(readme)) / "README.md").read_text())


def test_parents_on_the_hub(dense: Path, tmp_path: Path, hub_cache: Any) -> None:
    """Ids become metadata where it is certain that they are ids; several are a merge; licences are taken if all agree."""
    models = [AutoModelForCausalLM.from_pretrained(dense) for _ in range(3)]
    hub_cache("org/dense", models[0], "---\nlicense: mit\n---\n")
    hub_cache("org/french", models[1], "---\nlicense: mit\n---\n")
    hub_cache("org/code", models[2], "---\nlicense: apache-2.0\n---\n")
    upcycle("org/dense", tmp_path / "one", num_experts=4, verify=False)
    data = data_of((tmp_path / "one" / "README.md").read_text())
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/dense", "finetune", "mit")
    upcycle(destination=tmp_path / "two", method="merge", models=["org/dense", "org/french"], verify=False)
    data = data_of((tmp_path / "two" / "README.md").read_text())
    assert (data["base_model"], data["base_model_relation"]) == (["org/dense", "org/french"], "merge")
    assert data["license"] == "mit"
    assert {"merge", "upcycled"} <= set(data["tags"])
    upcycle(destination=tmp_path / "three", method="merge", models=["org/dense", "org/code", str(dense)], verify=False)
    card = (tmp_path / "three" / "README.md").read_text()
    data = data_of(card)
    assert data["base_model"] == ["org/dense", "org/code"]
    assert "license" not in data
    assert "different licences (apache-2.0, mit, none that is stated)" in card
    assert "[org/code](https://huggingface.co/org/code) (licence `apache-2.0`) and `dense`." in card
    model = AutoModelForCausalLM.from_pretrained("org/dense")
    upcycle(model, tmp_path / "four", num_experts=4, verify=False)
    assert data_of((tmp_path / "four" / "README.md").read_text())["base_model"] == "org/dense"


def test_a_name_that_is_no_folder_is_not_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: Path) -> None:
    """`runs/dense` was a folder when it was converted, wherever the card is rendered later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    dense.rename(tmp_path / "runs" / "dense")
    upcycle("runs/dense", tmp_path / "moe", num_experts=4, verify=False)
    monkeypatch.chdir("/")
    card = render_card(tmp_path / "moe")
    assert "base_model" not in data_of(card)
    assert "from `dense`." in card
    assert describe_parent("nobody/knows")["hub_id"] is None
    assert data_of(render_card(tmp_path / "moe", base_model="org/dense"))["base_model"] == "org/dense"


def write_run(folder: Path, started_from: Path, steps: int = 20) -> ExpertLoadFile:
    """What `hf-moe train` leaves beside a checkpoint."""
    history = [
        {"step": step, "epoch": step / 10, "loss": 3.0 - step / 20, "moe/load_max_over_mean": 1.5, "moe/drop_rate": 0.25,
         "moe/layer_0/load_cv": 0.3}
        for step in range(10, steps + 1, 10)
    ]  # fmt: skip
    metrics = {"model": str(started_from), "train_file": "/home/somebody/french.jsonl", "max_seq_length": 64,
               "eval_before": {"eval_loss": 3.5, "eval_perplexity": 33.115}, "train": {},
               "eval_after": {"eval_loss": 3.25, "eval_perplexity": 25.79, "eval_runtime": 1.0},
               "log_history": history}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report").mkdir(exist_ok=True)
    for name in ("expert_load.png", "report/similarity.png"):
        (folder / name).write_bytes(b"\x89PNG")
    (folder / LOAD_FILE).unlink(missing_ok=True)
    load = ExpertLoadFile(folder / LOAD_FILE, layers=[0, 2], num_experts=[2, 4])
    load.append(10, [[30, 10], [10, 10, 10, 10]])
    load.append(20, [[10, 30], [40, 0, 0, 0]])
    load.finish()
    return load


def test_run_of_an_upcycled_model(dense: Path, tmp_path: Path) -> None:
    """Dense model, upcycling and training, from files that lie in three folders."""
    upcycle(dense, tmp_path / "moe", num_experts=[2, 4], mlp_only_layers=[1], verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model.save_pretrained(tmp_path / "run")
    write_run(tmp_path / "run", tmp_path / "moe")
    card = render_card(tmp_path / "run", datasets=["org/wiki"], language=["fr", "en"], tags="mine")
    assert "1. Upcycled (method `copy`) from `dense`." in card
    assert "2. Trained from `moe`: 20 optimizer steps." in card
    assert "method: copy" in card
    assert "](expert_load.png)" in card.split("## Load of the experts")[1].split("## ")[0]
    assert "](report/similarity.png)" in card.split("## What the experts do")[1].split("## ")[0]
    assert "(report/report.html)" not in card
    assert "/home/somebody" not in card
    data = data_of(card)
    assert (data["datasets"], data["language"]) == (["org/wiki"], ["fr", "en"])
    assert {"upcycled", "mine"} <= set(data["tags"])
    results = {r["metrics"][0]["type"]: r for r in data["model-index"][0]["results"]}
    metrics = {m["type"]: m["value"] for m in next(iter(results.values()))["metrics"]}
    assert metrics == {"loss": 3.25, "perplexity": 25.79}
    load = card.split("## Load of the experts")[1].split("## ")[0]
    grid = [[cell.strip() for cell in line.strip("|").split("|")] for line in load.splitlines() if line.count("|") > 3]
    assert grid[0] == ["layer", "experts", "max/mean", "CV", "dead experts", "max/mean, whole run"]
    assert grid[2:] == [["0", "2", "1.50", "0.500", "0", "1.00"], ["2", "4", "4.00", "1.732", "3", "2.50"]]
    assert rows_of(load)["share of assignments dropped"] == "0.25"
    training = rows_of(card, "Training")
    assert (training["training text"], training["tokens per sequence"]) == ("`french.jsonl`", "64")
    assert training["training loss"] == "2.5 at the first log, 2 at the last"
    assert "| loss | 3.5 | 3.25 |" in card


def test_card_outlives_the_folders(dense: Path, tmp_path: Path) -> None:
    """`save_card` writes down the lineage, so that the card stays the same when the other folders are gone."""
    upcycle(dense, tmp_path / "moe", num_experts=4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "run")
    write_run(tmp_path / "run", tmp_path / "moe")
    first = save_card(tmp_path / "run").read_text()
    (tmp_path / "moe").rename(tmp_path / "gone")
    dense.rename(tmp_path / "gone too")
    assert render_card(tmp_path / "run") == first
    AutoModelForCausalLM.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "second")
    write_run(tmp_path / "second", tmp_path / "run", steps=10)
    again = render_card(tmp_path / "second")
    assert "2. Trained from `moe`: 20 optimizer steps." in again
    assert "3. Trained from `run`: 10 optimizer steps." in again
    (tmp_path / "run" / "metrics.json").unlink()
    write_run(tmp_path / "run", tmp_path / "gone", steps=30)  # used again for another run
    assert "2. Trained from `gone`: 30 optimizer steps." in render_card(tmp_path / "run")


# ---------------------------------------------------------------------- trainers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = trainer(tiny(), tmp_path_factory.mktemp("out") / "run", max_steps=3, eval_strategy="steps", eval_steps=1, seed=11,
                  eval_on_start=True, gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=2)  # fmt: skip
    run.train()
    return run


def test_trainer(finished: Trainer) -> None:
    """The same from the `Trainer`, from its model, and from the folder that it leaves."""
    args, history = finished.args, finished.state.log_history
    card = save_card(finished, license="mit").read_text()
    assert render_card(finished.model, trainer=finished, license="mit") == card
    training = rows_of(card, "Training")
    assert training["learning rate"] == f"{args.learning_rate:g}"
    assert training["batch"] == "8 (4 per device × 2 accumulation steps) sequences"
    assert training["schedule"] == "`cosine`, warm-up over 2 steps"
    assert (training["seed"], training["optimizer steps"]) == ("11", "3")
    evaluated = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert f"| loss | {evaluated[0]:.5g} | {evaluated[-1]:.5g} |" in card
    data = data_of(card)
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(evaluated[-1], abs=1e-6)
    finished.save_model()
    folder = Path(args.output_dir)
    assert render_card(folder) == card
    (folder / "training_args.bin").unlink()
    assert render_card(folder) == card


def test_arguments_are_read_without_running_code(finished: Trainer, tmp_path: Path) -> None:
    finished.save_model(str(tmp_path / "saved"))
    read = read_arguments(tmp_path / "saved" / "training_args.bin")
    expected = finished.args.to_dict()
    for name in ("learning_rate", "lr_scheduler_type", "optim", "seed", "per_device_train_batch_size", "bf16", "warmup_steps"):
        assert read[name] == expected[name], name

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    with zipfile.ZipFile(tmp_path / "evil.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
    with zipfile.ZipFile(tmp_path / "cut.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1})[:-3])
    assert read_arguments(tmp_path / "evil.bin") == read_arguments(tmp_path / "cut.bin") == {}
    assert not (tmp_path / "harm").exists()
    with zipfile.ZipFile(tmp_path / "evil.bin") as archive:  # it would have done harm
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / "harm").exists()


# ---------------------------------------------------------------------- files


def test_metadata_on_disk(tmp_path: Path) -> None:
    path = save_card(tiny(), tmp_path / "elsewhere", license="other", license_name="ours", license_link="LICENSE")
    assert path == tmp_path / "elsewhere" / "README.md"
    data = metadata_load(path)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "ours", "LICENSE")
    assert sorted(p.name for p in path.parent.iterdir()) == ["README.md", "lineage.json"]


def test_enums_of_older_pythons_are_read(tmp_path: Path) -> None:
    """Before 3.11.4, a member is pickled as `getattr(enum, name)`."""

    class Member:
        def __reduce__(self) -> Any:
            return getattr, (SchedulerType, "COSINE_WITH_RESTARTS")

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    arguments.lr_scheduler_type = Member()  # type: ignore[assignment]
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(arguments, protocol=2))
    assert read_arguments(tmp_path / "training_args.bin")["lr_scheduler_type"] == "cosine_with_restarts"


def test_import_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['hf-moe']; import hf_moe.model_cards; "
    code += "assert not {'torch', 'transformers', 'jinja2', 'huggingface_hub'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
