"""The plan of the house: who imports whom, and what the Hub closure needs."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# module: what of ours it may import
CORE = {
    "presets": set(),
    "version": set(),
    "moe_fields": set(),
    "configuration_moe": {"moe_fields", "presets"},
    "losses": set(),
    "routing": set(),
    "router_math": set(),
    "record": {"losses", "router_math", "routing"},
    "best_tokens": set(),
    "routers": {"best_tokens", "configuration_moe", "losses", "router_math", "routing"},
    "balance": {"record"},
    "callers_loss": set(),
    "expert_load": set(),
    "parameter_counts": set(),
    "dispatch_scope": set(),
    "cpu_tuning": set(),
    "large_buffers": set(),
    "expert_groups": {"cpu_tuning"},
    "expert_activation": set(),
    "expert_products": {"cpu_tuning", "expert_activation", "expert_groups", "large_buffers"},
    "expert_backward": {"cpu_tuning", "expert_groups", "expert_products", "large_buffers"},
    "fast_experts": {
        "expert_activation",
        "expert_backward",
        "expert_groups",
        "expert_products",
        "large_buffers",
        "router_math",
    },
    "experts": {"configuration_moe", "fast_experts"},
    "triton_tuning": set(),
    "triton_functions": {"triton_tuning"},
    "triton_kernels": {"triton_functions", "triton_tuning"},
    "triton_grouped": {"", "triton_kernels", "triton_tuning"},  # "": `from . import …`, for modules that are not of the closure
    "triton_experts": {"", "triton_grouped", "triton_tuning"},
    "triton_router": {"triton_tuning"},
    "ffn_kinds": set(),
    "dense_ffn": {"ffn_kinds"},
    "native_blocks": set(),
    "checkpoint_names": set(),
    "moe_layer": {"configuration_moe", "dispatch_scope", "experts", "fast_experts", "record", "routers", "routing"},
    "pretrained_moe": {
        "checkpoint_names", "configuration_moe", "dense_ffn", "fast_experts", "moe_layer", "native_blocks", "parameter_counts",
        "record",
    },
    "expert_cache": set(),
    "expert_files": set(),
    "free_memory": set(),
    "offload_options": set(),
    "expert_reader": {"expert_cache", "expert_files"},
    "expert_store": {"expert_cache", "expert_files", "expert_reader", "free_memory", "offload_options"},
    "expert_offload": {
        "checkpoint_files", "expert_cache", "expert_files", "expert_reader", "expert_store", "offload_options",
        "parameter_counts", "record",
    },
    "exchange": set(),
    "dispatch_base": {"dispatch_scope"},
    "dispatch_all_to_all": {"dispatch_base", "exchange"},
    "dispatch_deduplicated": {"dispatch_base", "exchange"},
    "dispatch_capacity": {"dispatch_base", "dispatch_scope", "exchange"},
    "dispatch_hierarchical": {"dispatch_base", "dispatch_deduplicated"},
    "dispatch_chunked": {"dispatch_base", "exchange"},
    "dispatchers": {
        "dispatch_all_to_all", "dispatch_base", "dispatch_capacity", "dispatch_chunked", "dispatch_deduplicated",
        "dispatch_hierarchical",
    },
    "expert_sharding": {"pretrained_moe"},
    "expert_mesh": {"expert_sharding"},
    "tensor_pieces": set(),
    "checkpoint_files": set(),
    "optimizer_groups": {"tensor_pieces"},
    "streamed_checkpoint": {"auto", "checkpoint_files", "tensor_pieces"},
    "expert_checkpoint": {"expert_placement", "optimizer_groups", "streamed_checkpoint", "tensor_pieces"},
    "placement_plan": set(),
    "expert_placement": {"placement_plan"},
    "expert_lora_layers": set(),
    "expert_lora": {"expert_lora_layers"},
    "expert_parallel": {
        "auto", "dispatchers", "expert_checkpoint", "expert_lora", "expert_mesh", "native_blocks", "pretrained_moe",
    },
    "modeling_moe": {"balance", "callers_loss", "checkpoint_names", "configuration_moe", "pretrained_moe", "record"},
}  # fmt: skip


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def test_core_imports_downwards() -> None:
    for module, allowed in CORE.items():
        ours = {name for level, name in imports(ROOT / "hf_moe" / f"{module}.py") if level}
        assert ours <= allowed, module
    files = {path.stem for path in (ROOT / "hf_moe").glob("*.py")}
    assert files - {"__init__", "__main__", "auto"} == set(CORE)


def test_hub_closure_is_flat_and_needs_torch_and_transformers_only() -> None:
    """`save_pretrained` copies siblings imported as `from .name import …` and nothing else; NumPy comes with Transformers."""
    seen, todo = set(), {"modeling_moe"}
    while todo:
        module = todo.pop()
        seen.add(module)
        path = ROOT / "hf_moe" / f"{module}.py"
        copied = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        for level, name in imports(path):
            assert level <= 1, (module, name)
            if level:
                assert name in copied, (module, name)
            else:
                package = name.split(".")[0]
                installed = {"torch", "transformers", "numpy"} | __import__("sys").stdlib_module_names
                assert package in installed, (module, name)
        todo |= copied - seen


def test_folders_do_not_import_each_other() -> None:
    forbidden = {
        "training": {"conversion"},
        "conversion": {"training"},
        "model_cards": {"training", "conversion"},
        "hf_moe": set(),
    }
    forbidden["hf_moe"] = {"training", "conversion", "model_cards"}
    # `hf-moe train` upcycles and imports in memory, `load_expert_parallel` upcycles into shards
    applications = {"finetune.py", "demo.py", "expert_parallel.py"}
    for folder, others in forbidden.items():
        for path in (ROOT / folder).glob("*.py"):
            if path.name in applications:
                continue
            for level, name in imports(path):
                parts = name.split(".")
                assert not (parts[0] == "hf_moe" and set(parts[1:2]) & others), (path.name, name)
                if folder != "hf_moe":
                    assert not (level == 0 and parts[0] in others), (path.name, name)


def test_nothing_is_left_open() -> None:
    marks = re.compile("NotImplemented" + "Error|TO" + "DO|FIX" + "ME")
    for folder in ("hf_moe", "training", "conversion", "model_cards", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            assert not marks.search(path.read_text(encoding="utf-8")), path
