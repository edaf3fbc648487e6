"""Train two pretraining configs side by side for a few steps and say where they part first.

    python tools/compare_numerics.py A.yaml B.yaml --steps 5 --b parallel.tensor=2

Both start from step 0. Compared are, in the order in which a step computes them: activations of the first sequences at every
hook point, losses, the gradient of every parameter, gradient norms, every weight. Each side runs in its own layout, on
pipeline × tensor × --data-a (--data-b) processes of the deepspeed launcher. Gradients are those that AdamW sees, after clipping.
Exit code: 0 if nothing differs by more than the tolerance, 1 if something does, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_plasticity.config.deepspeed import check_engine
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.data.prepare import read_manifest
from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.plain_types import section_to_yaml

if TYPE_CHECKING:
    from torch import Tensor

# What rounding may do to a relative difference. fp32: sums in another order. bf16 has eight bits, and every layout rounds at
# other places: averages over many tokens agree much better than single tensors.
TOLERANCES = {
    "fp32": {"activation": 1e-5, "loss": 1e-5, "gradient norm": 1e-5, "gradient": 1e-5, "weight": 1e-5},
    "bf16": {"activation": 3e-2, "loss": 2e-3, "gradient norm": 2e-2, "gradient": 1e-1, "weight": 1e-2},
}
SEQUENCES = 2
_IS_RANK = "COMPARE_NUMERICS_RANK"  # tells the script that the launcher started it


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        return _compare(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="pretraining config")
    parser.add_argument("b", type=Path, metavar="B", help="pretraining config to compare it with")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps [5]")
    parser.add_argument("--a", dest="set_a", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="settings of A only")
    parser.add_argument("--b", dest="set_b", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="settings of B only")
    parser.add_argument("--data-a", type=int, default=1, metavar="N", help="data-parallel ranks of A [1]")
    parser.add_argument("--data-b", type=int, default=1, metavar="N", help="data-parallel ranks of B [1]")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="relative difference to call a difference [1e-5 in fp32; in bf16 2e-3 of a loss, 1e-1 of a gradient]",
    )
    return parser


# Comparing


@dataclass(frozen=True)
class Difference:
    """A quantity of one step on both sides."""

    name: str
    relative: float
    """‖a − b‖ / ‖a‖, or infinite where one side has it and the other not, or not in the same shape."""


def _compare(parsed: argparse.Namespace) -> int:
    if parsed.steps < 1:
        raise UserError(f"--steps {parsed.steps}: at least one step is needed")
    if min(parsed.data_a, parsed.data_b) < 1:
        raise UserError("--data-a and --data-b: at least one data-parallel rank is needed")
    configs = [
        load_config(PretrainConfig, path, overrides) for path, overrides in ((parsed.a, parsed.set_a), (parsed.b, parsed.set_b))
    ]
    for config, ranks in zip(configs, (parsed.data_a, parsed.data_b), strict=True):
        if parsed.steps > config.total_steps:
            raise UserError(f"--steps {parsed.steps}: the run of {config.name} has {config.total_steps}")
        check_engine(config, config.parallel.model_parallel_size * ranks)
        read_manifest(config.data.folder)
    a, b = (config.model_dump(mode="json") for config in configs)
    for line in _config_differences(a, b):
        print(line)
    precision = "bf16" if any(config.engine.precision == "bf16" for config in configs) else "fp32"
    tolerances = TOLERANCES[precision]
    if parsed.tolerance is not None:
        tolerances = dict.fromkeys(tolerances, float(parsed.tolerance))
    with tempfile.TemporaryDirectory(prefix="compare-numerics-") as folder:
        sides = [Path(folder) / name for name in "ab"]
        for side, config, ranks in zip(sides, configs, (parsed.data_a, parsed.data_b), strict=True):
            _run(config, side, parsed.steps, config.parallel.model_parallel_size * ranks)
        return _report(sides[0], sides[1], parsed.steps, tolerances)


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in a:
        if isinstance(a[key], dict) and isinstance(b.get(key), dict):
            yield from _config_differences(a[key], b[key], f"{path}{key}.")
        elif a[key] != b.get(key) and f"{path}{key}" not in ("name", "output"):
            yield f"{path}{key}: A {a[key]!r}, B {b.get(key)!r}"


def _report(a: Path, b: Path, steps: int, tolerances: Mapping[str, float]) -> int:
    first = _first_beyond(_tensor_differences(a / "activations", b / "activations"), "activation", tolerances)
    where = "in the first forward pass"
    print(f"\n{'step':>4} {'loss A':>10} {'loss B':>10} {'relative':>9} {'norm A':>10} {'norm B':>10} {'relative':>9}  "
          "largest difference of a gradient, of a weight")  # fmt: skip
    for step in range(1, steps + 1):
        ours, theirs = (json.loads((side / f"row-{step}.json").read_text()) for side in (a, b))
        scalars = [Difference(name, _relative(ours[name], theirs[name])) for name in ("loss", "gradient norm")]
        gradients, weights = (
            list(_tensor_differences(a / f"{what}-{step}", b / f"{what}-{step}")) for what in ("gradient", "weight")
        )
        worst_gradient, worst_weight = (max(found, key=lambda d: d.relative) for found in (gradients, weights))
        print(
            f"{step:>4} {ours['loss']:>10.6f} {theirs['loss']:>10.6f} {scalars[0].relative:>9.1e} "
            f"{ours['gradient norm']:>10.6f} {theirs['gradient norm']:>10.6f} {scalars[1].relative:>9.1e}  "
            f"{worst_gradient.relative:.1e} {worst_gradient.name}, {worst_weight.relative:.1e} {worst_weight.name}"
        )
        for what, found in (
            ("loss", scalars[:1]),
            ("gradient", reversed(gradients)),  # backwards, as they are computed
            ("gradient norm", scalars[1:]),
            ("weight", weights),
        ):
            if first is None:
                first, where = _first_beyond(found, what, tolerances), f"in step {step}"
    if first is None:
        alike = len(set(tolerances.values())) == 1
        allowed = f"{tolerances['loss']:g}" if alike else ", ".join(f"{size:g} ({what})" for what, size in tolerances.items())
        print(f"\nNothing differs by more than {allowed} in {steps} steps.")
        return 0
    print(f"\nThey part first {where}, at {first}.")
    return 1


def _tensor_differences(a: Path, b: Path) -> Iterator[Difference]:
    from safetensors import safe_open

    with safe_open(a.with_suffix(".safetensors"), "pt") as ours, safe_open(b.with_suffix(".safetensors"), "pt") as theirs:
        order = json.loads(ours.metadata()["order"])
        both = {*order} & {*theirs.keys()}
        for name in [*order, *sorted({*theirs.keys()} - {*order})]:
            if name not in both or ours.get_slice(name).get_shape() != theirs.get_slice(name).get_shape():
                yield Difference(name, float("inf"))
            else:
                x, y = ours.get_tensor(name).double(), theirs.get_tensor(name).double()
                yield Difference(name, float((x - y).norm() / x.norm()) if x.any() else float(y.norm() > 0))


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else float(b != 0)


def _first_beyond(differences: Iterable[Difference], what: str, tolerances: Mapping[str, float]) -> str | None:
    """The first of some differences of the same kind that is larger than rounding may make it, in words."""
    tolerance = tolerances[what]
    # Written so that a NaN, which no comparison is true of, is beyond any tolerance.
    found = next((d for d in differences if not d.relative <= tolerance), None)
    if found is None:
        return None
    name = (
        what
        if what == found.name
        else f"{what} of {found.name}"
        if what in ("gradient", "activation")
        else f"{what} {found.name}"
    )
    return f"{name} (relative {found.relative:.1e}; the tolerance is {tolerance:g})"


# Running one side


def _run(config: PretrainConfig, out: Path, steps: int, processes: int) -> None:
    from megatron_plasticity.launch.command import launcher_command

    out.mkdir()
    print(f"running {out.name.upper()} on {processes} process{'es' if processes > 1 else ''} …", file=sys.stderr, flush=True)
    if processes == 1:
        record(config, out, steps)
        return
    path = out / "config.yaml"
    path.write_text(section_to_yaml(config), encoding="utf-8")
    environment = {**os.environ, _IS_RANK: "1"}
    if config.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = launcher_command([__file__, str(path), str(out), str(steps)], processes)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        lines = (ended.stdout + ended.stderr).splitlines()
        errors = dict.fromkeys(line.removeprefix("error: ") for line in lines if line.startswith("error: "))
        raise UserError(f"side {out.name.upper()} failed: " + ("\n".join(errors) or ended.stderr[-3000:]))


def record(config: PretrainConfig, out: Path, steps: int) -> None:
    """Train for `steps` steps and write what is compared into `out`. Every process of the launch calls it."""
    import numpy as np

    from megatron_plasticity.capture.recorder import Recorder
    from megatron_plasticity.data.blocks import BlockReader
    from megatron_plasticity.data.order import SampleOrder
    from megatron_plasticity.data.token_store import TokenStore
    from megatron_plasticity.models.initialisation import initialise
    from megatron_plasticity.models.transformer import local_model
    from megatron_plasticity.optim.schedule import learning_rate_at
    from megatron_plasticity.parallel.grid import process_grid, resolve_device
    from megatron_plasticity.training.activations import record_activations
    from megatron_plasticity.training.batches import PretrainBatches
    from megatron_plasticity.training.engine import TrainingEngine

    with process_grid(resolve_device(config.device), config.parallel) as grid:
        model = local_model(config.model, grid)
        initialise(model, config.seed)
        engine = TrainingEngine(model, config, config.weight_decay, grid)
        reader = BlockReader(TokenStore(config.data.folder / "train"), config.model.context_length)
        batches = PretrainBatches(reader, SampleOrder(len(reader), config.data.seed), config.batch, grid, config.total_steps)
        inputs, _ = reader.batch(np.arange(min(SEQUENCES, config.batch.micro_batch_size)))
        activations = record_activations(engine, Recorder(model, ["*"]), inputs)
        if grid.is_main:
            _write(out / "activations", activations)
        before: dict[str, Tensor] = {}
        for step in range(steps):
            engine.set_learning_rate(learning_rate_at(step, config.total_steps, config.optimizer.learning_rate, config.schedule))
            batch = batches.step(step)
            loss = float(grid.sum(engine.train_batch(batch))) / batch.target_tokens
            norm = engine.gradient_norm
            weights = {name: t.cpu().clone() for name, t in engine.full_weights() if t is not None}
            moments = {name: t.cpu().clone() for name, t in engine.full_moments("exp_avg") if t is not None}
            if grid.is_main:
                (out / f"row-{step + 1}.json").write_text(json.dumps({"loss": loss, "gradient norm": norm}))
                _write(out / f"weight-{step + 1}", weights)
                _write(out / f"gradient-{step + 1}", _gradients(moments, before, config.optimizer.betas[0]))
            before = moments
        engine.close()


def _gradients(moments: Mapping[str, Tensor], before: Mapping[str, Tensor], beta: float) -> dict[str, Tensor]:
    """What AdamW saw: its first moment is m ← β·m + (1 − β)·g."""
    return {name: (m - beta * before[name] if before else m) / (1 - beta) for name, m in moments.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(ready, path.with_suffix(".safetensors"), metadata={"order": json.dumps(list(ready))})


if __name__ == "__main__":
    if _IS_RANK in os.environ:
        arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
        try:
            record(load_config(PretrainConfig, Path(arguments[0])), Path(arguments[1]), int(arguments[2]))
        except UserError as error:
            sys.exit(f"error: {error}")
    else:
        sys.exit(main())
