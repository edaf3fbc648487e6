"""How long the spectra of all attention matrices of a model take, beside dense singular value decompositions of the matrices.

    python tools/bench/attention.py [--model configs/models/llama2-4b.yaml] [--threads 2] [--dense-heads 1]

Weights are random; every layer reads the same ones, those of one layer in a safetensors file as checkpoints have them, since
values change no time and the whole model would take 16 GB of disk. A dense decomposition forms the d×d product of one head and
takes its singular values, with all threads; its time for the whole model is the shortest of a few heads' W_QK and W_VP times the
number of matrices. Both sides run in the same process, one after the other.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from command import parser, positive, run, verdict

from megatron_plasticity.config.analysis import AttentionProduct, AttentionRecipe
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.sizes import parameter_shapes

if TYPE_CHECKING:  # --help has no need of torch, which takes seconds to import
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

SECONDS_ALLOWED = 180.0
LEAST_RATIO = 100.0
LARGEST_DIFFERENCE = 1e-5
DEVIATION = 0.02
"""Of the random weights, as at initialisation."""


class StoredLayer(Mapping[str, "Tensor"]):
    """Weights of a model by name, fp32, each read from disk when it is looked up; all layers are the same one."""

    def __init__(self, config: ModelConfig, file: Path) -> None:
        import torch
        from safetensors.torch import save_file

        self._file = file
        self._names = [name for name in parameter_shapes(config) if ".attn." in name]
        shapes = parameter_shapes(config)
        generator = torch.Generator().manual_seed(0)
        first = [name for name in self._names if name.startswith("layers.0.")]
        save_file({name: torch.randn(shapes[name], generator=generator) * DEVIATION for name in first}, file)

    def __getitem__(self, name: str) -> Tensor:
        from megatron_plasticity.models.checkpoint import open_safetensors

        with open_safetensors(self._file) as stored:
            return stored.get_tensor(re.sub(r"layers\.\d+", "layers.0", name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def main() -> int:
    """Measure both sides and print times, ratio and difference; 1 if a target was missed."""
    reader = parser(__doc__)
    reader.add_argument("--model", type=Path, default=ROOT / "configs/models/llama2-4b.yaml", help="model file [the 4B Llama's]")
    reader.add_argument("--threads", type=positive, default=2, help="threads of torch [2]")
    reader.add_argument("--dense-heads", type=positive, default=1, help="heads of which dense products are decomposed [1]")
    arguments = reader.parse_args()
    config = load_config(ModelConfig, arguments.model)
    if arguments.dense_heads > config.query_heads:
        raise UserError(f"--dense-heads {arguments.dense_heads}: {arguments.model} has {config.query_heads} query heads")
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model.stem}, torch {torch.__version__}, {arguments.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        good = measure(StoredLayer(config, Path(folder) / "layer.safetensors"), config, arguments.dense_heads)
    return 0 if good else 1


def measure(weights: Mapping[str, Tensor], config: ModelConfig, heads: int) -> bool:
    """Time both sides and print what was found; whether all of it is as wanted."""
    import torch

    from megatron_plasticity.analysis.attention import layer_singular_values, one_thread, spectra

    fold = "both" if FAMILIES[config.family].qk_norm else False
    begun = time.perf_counter()
    results = spectra(weights, config, AttentionRecipe(fold_qk_norm=fold))
    ours = time.perf_counter() - begun
    matrices = sum(map(len, results["layers"])) * config.query_heads
    good = [ours <= SECONDS_ALLOWED]
    print(f"ours: {matrices:,} matrices in {ours:.1f} s; {verdict(good[-1], f'at most {SECONDS_ALLOWED:g} s')}")

    with one_thread():
        exact = layer_singular_values(weights, config, 0)
    for dtype in (torch.float32, torch.float64):
        seconds, difference = dense(weights, config, exact, dtype, heads)
        whole = seconds * matrices
        accurate = dtype == torch.float64
        print(f"dense, {str(dtype).removeprefix('torch.')}: {seconds:.1f} s a matrix, so {whole / 3600:,.1f} h for all of them")
        good.append(whole / ours >= LEAST_RATIO)
        print(f"  ratio {whole / ours:,.0f}; {verdict(good[-1], f'at least {LEAST_RATIO:g}')}")
        wanted = ""
        if accurate:
            good.append(difference <= LARGEST_DIFFERENCE)
            wanted = f"; {verdict(good[-1], f'at most {LARGEST_DIFFERENCE:g}')}"
        print(f"  largest difference of a singular value, relative to the largest: {difference:.1e}{wanted}", flush=True)
    return all(good)


def dense(
    weights: Mapping[str, Tensor], config: ModelConfig, ours: Mapping[str, Tensor], dtype: torch.dtype, heads: int
) -> tuple[float, float]:
    """Seconds of a dense decomposition of one d×d product, the shortest of W_QK and W_VP of the first `heads` heads of layer 0,
    and the largest difference from `ours`, relative to the largest singular value."""
    import torch

    from megatron_plasticity.analysis.attention import thin_factors

    products: tuple[AttentionProduct, ...] = ("qk", "vp")
    group = config.query_heads // config.kv_heads
    seconds, differences = [], []
    for product in products:
        own, shared = (factor.to(dtype) for factor in thin_factors(weights, config, 0, product))
        for head in range(heads):
            begun = time.perf_counter()
            values = torch.linalg.svdvals(own[head] @ shared[head // group].T)
            seconds.append(time.perf_counter() - begun)
            expected = torch.zeros(config.hidden_size, dtype=torch.float64)
            expected[: config.head_dim] = ours[product][head]
            differences.append(float((values.double() - expected).abs().max() / expected[0]))
    return min(seconds), max(differences)


if __name__ == "__main__":
    run(main)
