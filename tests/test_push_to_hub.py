"""Pushing, with huggingface_hub's own code talking to a server on this machine that answers like the Hub."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub, fake_hub, metadata_errors
from families import text_config
from hf_moe.conversion import upcycle
from hf_moe.model_cards import create_model_card, push_to_hub, save_card
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from test_trainer_and_peft import adapted, trainer
from tiny import tiny, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_moe import MoEForCausalLM


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep another test's address
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks a protocol of its own
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(c): c for c in range(97, 123)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


@pytest.fixture
def upcycled(tmp_path: Path) -> Path:
    """A folder fresh from `upcycle`, with tokenizer and licence, in several shards, and scraps that concern nobody."""
    torch.manual_seed(0)
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_config(text_config("llama", initializer_range=0.2)).save_pretrained(dense)
    save_tokenizer(dense)
    (dense / "LICENSE").write_text("do what you like")
    upcycle(dense, tmp_path / "moe", num_experts=4, router_type="noisy_top_k", max_shard_size="100KB")
    folder = tmp_path / "moe"
    for name in ("optimizer.pt", "training_args.bin", ".env", "checkpoint-3/model.safetensors", "runs/events.out", "x.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret")
    (folder / "report").mkdir()
    for name in ("expert_load.png", "report/similarity.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    return folder


READER = """
import sys

for name in ("hf_moe", "peft", "datasets", "evaluate"):
    sys.modules[name] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out, *sources = sys.argv[1:]
found = {}
for source in sources:
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    ids = torch.load(out + ".ids")
    found[source] = {"logits": model(input_ids=ids).logits.detach(), "module": type(model).__module__,
                     "tokens": AutoTokenizer.from_pretrained(source)("abc").input_ids}
torch.save(found, out)
"""


def read_elsewhere(hub: FakeHub, tmp_path: Path, *sources: str) -> dict:
    """What a process without hf_moe loads, from a folder or from the Hub."""
    out = tmp_path / "found.pt"
    torch.save(token_ids(), f"{out}.ids")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": "",
                   "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    command = [sys.executable, "-c", READER, str(out), *sources]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, (done.stderr[-3000:], hub.unknown)
    return torch.load(out)


def test_folder_arrives_and_loads(hub: FakeHub, upcycled: Path, tmp_path: Path) -> None:
    """Byte for byte, in one commit; what arrived loads with hf_moe, and without it from folder and Hub alike."""
    save_card(upcycled, license="apache-2.0")
    before = {path: path.read_bytes() for path in upcycled.rglob("*") if path.is_file()}
    planned = push_to_hub(upcycled, "me/moe", dry_run=True)
    assert (planned.commit_url, hub.requests) == (None, [])
    pushed = push_to_hub(upcycled, "me/moe", token=TOKEN, private=True, commit_message="first")
    repository = hub.repositories["me/moe"]
    assert repository.private
    assert len(repository.commits) == 2
    assert pushed.commit_url == f"{hub.endpoint}/me/moe/commit/{repository.sha}"
    assert pushed.files == planned.files == {n: len(c) for n, c in repository.head.items() if n != ".gitattributes"}
    assert {path: path.read_bytes() for path in before} == before  # nothing here was touched

    arrived = hub.write("me/moe", tmp_path / "arrived")
    names = {path.relative_to(arrived).as_posix() for path in arrived.rglob("*") if path.is_file()}
    assert names == {
        *(p.relative_to(upcycled).as_posix() for p in before),
        ".gitattributes",
    } - {"optimizer.pt", "training_args.bin", ".env", "checkpoint-3/model.safetensors", "runs/events.out", "x.part"}
    for name in names - {".gitattributes", "README.md"}:
        assert (arrived / name).read_bytes() == (upcycled / name).read_bytes(), name
    assert (arrived / "README.md").read_text() == pushed.card
    assert metadata_load(arrived / "README.md")["license"] == "apache-2.0"
    assert 'from_pretrained("me/moe", trust_remote_code=True)' in pushed.card
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", pushed.card):
        assert picture in names

    expected = MoEForCausalLM.from_pretrained(upcycled)(input_ids=token_ids()).logits
    assert torch.equal(MoEForCausalLM.from_pretrained(arrived)(input_ids=token_ids()).logits, expected)
    for found in read_elsewhere(hub, tmp_path, str(arrived), "me/moe").values():
        assert torch.equal(found["logits"], expected)
        assert found["module"].startswith("transformers_modules.")
        assert found["tokens"] == AutoTokenizer.from_pretrained(upcycled)("abc").input_ids


def test_stale_weights_go(hub: FakeHub, upcycled: Path, tmp_path: Path) -> None:
    """A model.safetensors left from an earlier push would be loaded instead of new shards, without a word."""
    model = MoEForCausalLM.from_pretrained(upcycled)
    push_to_hub(model, "moe", token=TOKEN)
    assert "model.safetensors" in hub.repositories["me/moe"].head
    model.moe_layers[0].experts.down_proj.data.mul_(2)
    pushed = push_to_hub(model, "moe", token=TOKEN, max_shard_size="100KB")
    assert pushed.repo_id == "me/moe"
    assert pushed.deleted == ["model.safetensors"]
    assert 'from_pretrained("me/moe")' in pushed.card
    again = MoEForCausalLM.from_pretrained(hub.write("me/moe", tmp_path / "arrived"))
    assert torch.equal(again(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    assert (tmp_path / "arrived" / "tokenizer.json").read_bytes() == (upcycled / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("refused", ["PUT /lfs", "lfs/objects/batch", "/commit/main", "validate-yaml"])
def test_a_failed_push_leaves_the_repository_as_it_was(refused: str, hub: FakeHub, upcycled: Path) -> None:
    push_to_hub(upcycled, "me/moe", token=TOKEN)
    state = [dict(commit) for commit in hub.repositories["me/moe"].commits]
    model = MoEForCausalLM.from_pretrained(upcycled)
    model.moe_layers[0].experts.down_proj.data.mul_(2)
    hub.refuse[refused] = 403
    before = len(hub.requests)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        push_to_hub(model, "me/moe", token=TOKEN)
    assert hub.repositories["me/moe"].commits == state
    assert any(refused in request for request in hub.requests[before:])
    hub.refuse.clear()
    push_to_hub(model, "me/moe", token=TOKEN)  # the same call goes through when the trouble is over
    assert len(hub.repositories["me/moe"].commits) == len(state) + 1


def test_somebody_elses_commit_is_not_mixed_in(hub: FakeHub, upcycled: Path) -> None:
    push_to_hub(upcycled, "me/moe", token=TOKEN)
    repository = hub.repositories["me/moe"]

    def meanwhile() -> None:
        repository.commits.append({**repository.head, "new.txt": b"of somebody else"})
        hub.before_commit = None

    hub.before_commit = meanwhile
    with pytest.raises(HfHubHTTPError, match="412"):
        push_to_hub(upcycled, "me/moe", token=TOKEN, title="Another")
    assert repository.head["new.txt"] == b"of somebody else"
    assert b"Another" not in repository.head["README.md"]


def _cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def _drop_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith("mlp.gate.weight"))
    path = folder / index["weight_map"].pop(name)
    save_file({n: t for n, t in load_file(path).items() if n != name}, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


DAMAGE = {
    "config.json": (lambda folder: (folder / "config.json").unlink(), r"config.json: no such file"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config.json: not readable as JSON"),
    "missing shard": (lambda folder: sorted(folder.glob("model-*"))[0].unlink(), r"shard is missing"),
    "cut shard": (_cut_shard, r"not a whole safetensors file \(\d+ bytes long where"),
    "no weights": (lambda folder: [p.unlink() for p in folder.glob("model*")], r"no model.safetensors or"),
    "missing tensor": (_drop_tensor, r"gate.weight` is missing"),
    "other experts": (partial(_change_config, num_experts=8), r"is of another shape|is missing|cannot be loaded"),
    "other width": (partial(_change_config, moe_intermediate_size=24), r"is of another shape"),
    "unusable config": (partial(_change_config, router_type="magic"), r"`router_type`='magic'"),
    "no code": (lambda folder: (folder / "routers.py").unlink(), r"routers.py: no such file, but"),
    "front matter": (lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"), r"front matter is not YAML"),
    "licence": (lambda folder: (folder / "README.md").write_text("---\nlicense: Apache 2.0\n---\n"), r"`license`='Apache 2.0'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_is_sent_of_what_is_damaged(damage: str, hub: FakeHub, upcycled: Path) -> None:
    break_it, message = DAMAGE[damage]
    break_it(upcycled)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message) as error:
            push_to_hub(upcycled, "me/moe", token=TOKEN, dry_run=dry_run)
        assert "\n" not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("a/b/c", {}, "`repo_id`='a/b/c' is not an id"),
        ("me/moe", {"license": "Apache 2.0"}, "`license`='Apache 2.0' is not an identifier"),
        ("me/moe", {"language": "English"}, "`language`='English' is not the code"),
        ("me/moe", {"datasets": ["/data/mine"]}, "`datasets`='/data/mine' is not the id"),
        ("me/moe", {"base_model": "../dense"}, "`base_model`='../dense' is not the id"),
    ],
)
def test_wrong_arguments(repo_id: str, options: dict, message: str, hub: FakeHub, upcycled: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        push_to_hub(upcycled, repo_id, token=TOKEN, **options)
    assert "\n" not in str(error.value)
    assert hub.requests == []


def test_what_only_the_hub_refuses(hub: FakeHub, upcycled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_hub.metadata_errors", lambda content: ['"license" must be one of [mit, …]'])
    with pytest.raises(ValueError, match=r"README.md: the Hub refuses its metadata .*must be one of") as error:
        push_to_hub(upcycled, "me/moe", token=TOKEN)
    assert "\n" not in str(error.value)
    assert hub.repositories == {}


def test_dry_run_needs_no_network(upcycled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    planned = push_to_hub(upcycled, "me/moe", dry_run=True)
    assert {"README.md", "config.json", "recipe.yaml", "upcycling_report.json", "LICENSE", "modeling_moe.py"} <= set(
        planned.files
    )
    assert metadata_errors(planned.card) == []
    assert "not pushed" in str(planned)


def test_text_on_the_hub_is_kept(hub: FakeHub, upcycled: Path) -> None:
    """What somebody wrote on the Hub's page survives the next push; and what was written here, that of this folder."""
    push_to_hub(upcycled, "me/moe", token=TOKEN)
    repository = hub.repositories["me/moe"]
    page = ModelCard(repository.head["README.md"].decode())
    page.data["license"] = "mit"
    page.text = page.text.replace("<!-- hf_moe:begin sizes", "Do not use it for *medicine*.\n\n<!-- hf_moe:begin sizes")
    repository.commits.append({**repository.head, "README.md": str(page).encode()})
    pushed = push_to_hub(upcycled, "me/moe", token=TOKEN, language="fr")
    assert pushed.notes == []
    card = ModelCard(repository.head["README.md"].decode())
    assert (card.data["license"], card.data["language"]) == ("mit", "fr")
    assert card.text.count("Do not use it for *medicine*.") == 1
    assert card.text.index("## Recipe") < card.text.index("medicine") < card.text.index("## Sizes")

    (upcycled / "README.md").write_text("# Written here\n\nOnly this.\n")
    pushed = push_to_hub(upcycled, "me/moe", token=TOKEN)
    assert "medicine" not in repository.head["README.md"].decode()
    assert "Only this." in repository.head["README.md"].decode()
    assert "had text that the local one has not" in pushed.notes[0]
    assert "medicine" in repository.commits[-2]["README.md"].decode()


# ---------------------------------------------------------------------- adapters and trainers


def test_adapter(hub: FakeHub, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny().save_pretrained(tmp_path / "base")
    model = adapted("both", MoEForCausalLM.from_pretrained(tmp_path / "base"))
    for parameter in model.parameters():
        parameter.data.add_(0.01 if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "adapter")  # with PEFT's draft of a card, which names the folder
    push_to_hub(tmp_path / "adapter", "me/from-folder", token=TOKEN)
    pushed = push_to_hub(model, "me/from-memory", token=TOKEN, license="mit")
    assert "names a folder of this machine" in pushed.notes[0]
    expected = model.eval()(input_ids=token_ids()).logits
    for name in ("from-folder", "from-memory"):
        arrived = hub.write(f"me/{name}", tmp_path / name)
        data = ModelCard.load(arrived / "README.md").data.to_dict()
        assert data["library_name"] == "peft"
        assert "base_model" not in data
        assert {"lora", "moe", "hf_moe"} <= set(data["tags"])
        assert not any(str(tmp_path) in tag for tag in data["tags"])
        assert "More Information Needed" not in (arrived / "README.md").read_text()
        loaded = PeftModel.from_pretrained(MoEForCausalLM.from_pretrained(tmp_path / "base"), str(arrived)).eval()
        assert torch.equal(loaded(input_ids=token_ids()).logits, expected)


def test_trainer_pushes_a_good_card(hub: FakeHub, tmp_path: Path) -> None:
    """`Trainer.push_to_hub` writes a draft over the card; with our `create_model_card` it does not."""
    run = trainer(tiny(), tmp_path / "run", max_steps=2, push_to_hub=True, hub_model_id="me/run", hub_token=TOKEN)
    run.train()
    (tmp_path / "run" / "README.md").write_text("Text of mine.\n")
    run.push_to_hub(token=TOKEN)
    draft = hub.repositories["me/run"].head["README.md"].decode()
    assert "More information needed" in draft
    assert "Text of mine." not in draft

    (tmp_path / "run" / "README.md").write_text("Text of mine.\n")
    run.create_model_card = partial(create_model_card, run)
    run.push_to_hub(token=TOKEN, language="en")
    card = hub.repositories["me/run"].head["README.md"].decode()
    assert "Text of mine." in card
    assert "More information needed" not in card
    assert "2 optimizer steps" in card
    assert ModelCard(card).data["language"] == "en"


def test_trainer_as_source(hub: FakeHub, tmp_path: Path) -> None:
    run = trainer(tiny(), tmp_path / "run", max_steps=2, learning_rate=0.0125)
    run.train()
    run.create_model_card()  # a draft lies there already
    pushed = push_to_hub(run, "me/run", token=TOKEN)
    arrived = hub.write("me/run", tmp_path / "arrived")
    assert "| learning rate | 0.0125 |" in pushed.card
    assert "More information needed" not in pushed.card
    assert pushed.card.count("# run\n") == 1
    loaded = MoEForCausalLM.from_pretrained(arrived)
    assert torch.equal(loaded(input_ids=token_ids()).logits, run.model.eval()(input_ids=token_ids()).logits)
    assert (tmp_path / "run" / "README.md").read_text() == pushed.card
    shutil.rmtree(tmp_path / "run")
    later = push_to_hub(arrived, "me/run", dry_run=True)  # downloaded, without the folder of the run
    assert later.card.splitlines() == pushed.card.splitlines()
