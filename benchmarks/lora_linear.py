"""What do adapters add to the q, k and v projections of one layer: memory for backward, and time?

Three frozen Linear layers on one input that needs a gradient, alone, with peft's adapters at
peft's defaults, and with ours; fp32 adapters whatever the layers' dtype. Half of a vision layer's
tokens on a CPU, one image's on a GPU:

    python benchmarks/lora_linear.py --tokens 1296
    python benchmarks/lora_linear.py --tokens 1296 --dropout 0.1
    python benchmarks/lora_linear.py --tokens 5184 --device cuda

Prints a line each: bytes that only backward needs (parameters and the input apart), the median
time of forward and backward, and its ratio to the bare layers. The kinds take turns in each repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
from torch import nn

# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_layers import LoRALinear  # noqa: E402
from sam3_lora.config import user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.prompts import parse_count, parse_share  # noqa: E402
from sam3_lora.runlog import environment  # noqa: E402

NAMES = ("q_proj", "k_proj", "v_proj")
KINDS = ("linear", "peft", "ours")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WARM_UP = 3  # repeats that are not counted


def build(kind: str, dim: int, rank: int, dropout: float, dtype: torch.dtype) -> list[nn.Module]:
    """Three layers (dim, dim) of a kind, on the CPU in training mode; equal weights in each call.

    Args:
        kind: one of `KINDS`.
        dim: features in and out.
        rank: of the adapters, whose alpha is twice that.
        dropout: on the adapters' input.
        dtype: of the frozen weights.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(dim, dim) for name in NAMES}).to(dtype)
    model.requires_grad_(False)
    alpha = 2 * rank
    if kind == "ours":
        return [LoRALinear(model[name], rank, alpha, dropout) for name in NAMES]
    if kind == "peft":
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(NAMES)
        )
        peft.get_peft_model(model, config)  # changes the model in place; adapters in fp32
    return [model[name] for name in NAMES]


def saved_bytes(layers: list[nn.Module], x: torch.Tensor) -> int:
    """Bytes kept for backward by layers on one input: each storage once, parameters and x apart."""
    kept: list[torch.Tensor] = []  # alive, so that no two of them share an address
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = [layer(x) for layer in layers]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for tensor in (x, *(p for layer in layers for p in layer.parameters())):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del outputs
    return sum(sizes.values())


def seconds(layers: list[nn.Module], x: torch.Tensor) -> float:
    """Time of one forward and backward."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    outputs = [layer(x) for layer in layers]
    torch.autograd.backward(outputs, [x.detach()] * len(outputs))
    wait()
    elapsed = time.perf_counter() - started
    x.grad = None
    return elapsed


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--tokens", type=parse_count, default=1296, help="rows of the input")
    add("--dim", type=parse_count, default=1024, help="features, as the ViT's")
    add("--rank", type=parse_count, default=16, help="of the adapter")
    add("--dropout", type=parse_share, default=0.0, help="of the adapter")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    add("--device", default="cpu", help="cpu or cuda")
    add("--repeats", type=parse_count, default=20, help="timed calls of each")
    return parser


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    dtype = DTYPES[args.dtype]
    layers = {
        kind: [m.to(args.device) for m in build(kind, args.dim, args.rank, args.dropout, dtype)]
        for kind in KINDS
    }
    x = torch.randn(args.tokens, args.dim, dtype=dtype, device=args.device, requires_grad=True)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(WARM_UP + args.repeats):
        for kind in KINDS:
            times[kind].append(seconds(layers[kind], x))
    medians = {kind: statistics.median(taken[WARM_UP:]) for kind, taken in times.items()}
    saved = {kind: saved_bytes(layers[kind], x) for kind in KINDS}
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else "CPU"
    lines = [f"{environment(Path(__file__))}, {name}, {torch.get_num_threads()} threads"]
    for kind in KINDS:
        lines.append(
            f"{kind:<7} saved {saved[kind] / 1e6:8.2f} MB ({saved[kind] / saved['peft']:.3f} of "
            f"peft)   {1000 * medians[kind]:8.2f} ms ({medians[kind] / medians['linear']:.2f} x)"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
