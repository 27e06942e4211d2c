"""Compiles every Triton kernel for GPUs that need not be here, and prints what each takes of them as JSON lines.

Run without TRITON_INTERPRET: `python triton_compile_worker.py 90`, with `all` behind it for every candidate of the tuning
(some minutes). The interpreter knows no limits of `tl.dot`, no dtype errors and no shared memory; the compiler does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_moe import triton_kernels as kernels
from hf_moe import triton_router as router
from hf_moe.triton_experts import ACTIVATIONS
from hf_moe.triton_tuning import BACKWARD, GATED, PLAIN, WEIGHT, Search

FLOAT = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
# arguments that are not of the dtype under test
KINDS = {
    "slots_ptr": "*i32", "starts_ptr": "*i32", "tile_expert_ptr": "*i32", "tile_row_ptr": "*i32", "experts_ptr": "*i16",
    "weights_ptr": "*fp32", "partial_ptr": "*fp32", "logits_ptr": "*fp32", "d_weights_ptr": "*fp32", "d_logits_ptr": "*fp32",
    "selection_bias_ptr": "*fp32", "ids_ptr": "*i64", "counts_ptr": "*i64", "mask_ptr": "*i1", "scale": "fp32",
}  # fmt: skip
GEMM = {"TOP_K": 2, "PRECISION": "ieee", "EXPERTS_CLASS": 64}
EVEN = {**GEMM, "BLOCK_M": 128, "EVEN_N": True, "EVEN_K": True}
LOOSE = {**GEMM, "BLOCK_M": 16, "EVEN_N": False, "EVEN_K": False}
# kernel, what it is tuned over, constants
GEMMS: list[tuple[Any, Search | None, dict[str, Any]]] = [
    (kernels.gather_up_kernel, GATED, {**EVEN, "GATED": True, "HAS_BIAS": True, "SAVE_PRE": True, "ACT": "silu"}),
    (kernels.gather_up_kernel, GATED, {**LOOSE, "GATED": False, "HAS_BIAS": False, "SAVE_PRE": False, "ACT": "gelu"}),
    (kernels.scatter_down_kernel, PLAIN, {**EVEN, "HAS_BIAS": True, "HAS_WEIGHTS": True}),
    (kernels.scatter_down_kernel, PLAIN, {**LOOSE, "HAS_BIAS": False, "HAS_WEIGHTS": False}),
    (kernels.down_backward_kernel, BACKWARD, {**EVEN, "GATED": True, "ACT": "silu"}),
    (kernels.down_backward_kernel, BACKWARD, {**LOOSE, "GATED": False, "ACT": "gelu"}),
    (kernels.weight_gradient_kernel, WEIGHT, {**GEMM, "GATHER_A": True, "ROWS_PER_EXPERT": 128}),
    (kernels.weight_gradient_kernel, WEIGHT, {**GEMM, "GATHER_A": False, "ROWS_PER_EXPERT": 128}),
]
_ROUTER = {"TOP_K": 6, "BLOCK_T": 16, "BLOCK_E": 256, "BLOCK_K": 8}
OTHERS: list[tuple[Any, Search | None, dict[str, Any]]] = [
    (kernels.plan_tiles_kernel, None, {"BLOCK_M": 64, "BLOCK_E": 256}),
    (kernels.combine_kernel, None, {"TOP_K": 8, "BLOCK_T": 8, "BLOCK_D": 256}),
    (kernels.bias_gradient_kernel, None, {"TOP_K": 2, "GATHER": True, "HAS_WEIGHTS": True, "BLOCK_R": 32, "BLOCK_N": 64}),
    (kernels.bias_gradient_kernel, None, {"TOP_K": 2, "GATHER": False, "HAS_WEIGHTS": False, "BLOCK_R": 32, "BLOCK_N": 64}),
    *(
        (kernel, None, {**_ROUTER, "SIGMOID": flag, "RENORMALISE": flag, "HAS_BIAS": flag, "HAS_MASK": flag})
        for kernel in (router.route_kernel, router.route_backward_kernel)
        for flag in (True, False)
    ),
]


def compiled(kernel: Any, constants: dict[str, Any], dtype: str, capability: int) -> Any:
    """A kernel for a GPU, with sizes that 16 divides and columns next to each other in memory."""
    options: dict[str, int] = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    while not isinstance(kernel, triton.JITFunction):  # autotune and heuristics around it
        kernel = kernel.fn
    names = kernel.arg_names
    constants = {"stride_wk": 1, **constants}
    constants = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    types = {name: KINDS.get(name, FLOAT[dtype] if name.endswith("_ptr") else "i32") for name in names}
    signature = {name: "constexpr" if (i,) in constants else types[name] for i, name in enumerate(names)}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def jobs(everything: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Dtypes, and kernels with their constants and blocks: all in bf16, some GEMMs in the other dtypes.

    Blocks are those in the middle of the candidates; or every candidate, dtype and activation.
    """
    acts = [(*GEMMS[5][:2], {**GEMMS[5][2], "ACT": act}) for act in sorted(set(ACTIVATIONS.values()))]
    of = {"bf16": GEMMS + OTHERS + (acts if everything else [])}
    for dtype in FLOAT:
        for kernel, search, constants in of.get(dtype, GEMMS if everything else GEMMS[1:4:2]):
            configs = [triton.Config({})] if search is None else search.configs
            for config in configs if everything else [configs[len(configs) // 2]]:
                yield dtype, kernel, {**constants, **{k: v for k, v in config.all_kwargs().items() if v is not None}}


def main() -> None:
    capability = int(sys.argv[1])
    for dtype, kernel, constants in jobs(everything="all" in sys.argv):
        made = compiled(kernel, constants, dtype, capability)
        ptx = made.asm["ptx"]
        row = {
            "kernel": made.metadata.name,
            "dtype": dtype,
            "constants": constants,
            "shared": made.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "mma": ptx.count("mma.sync"),
            "async_copies": ptx.count("cp.async.c"),
            "cubin": len(made.asm["cubin"]),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
