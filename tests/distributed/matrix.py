"""The layouts under test, as a table. Every two values of its columns that can go together do so in some row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import DecayScope, TrainingRecipe
from tests.training.programs import recipe

GLOBAL_BATCH = 16
LAYERS = 4
QUERY_HEADS = 4

# Layouts differ in rounding, which training must not amplify beyond the oracle's tolerance. Adam divides by √v + ε: with a small
# ε the rounding of a gradient near zero decides its update, and later steps amplify that, the more so the larger they are. This ε
# lies below the gradients (root mean square 2e-3 once clipped) and far above their rounding. Steps of this size still move a
# weight by a hundred times the tolerance and more, and decay alone takes some fifteen times as much off it.
EPS = 1e-4
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Layout:
    """One row of the table."""

    family: Family
    pipeline: int
    data: int
    tensor: int
    sequence: bool
    kv_heads: int
    zero_stage: int
    dtype: Literal["fp32", "bf16"]
    accumulation: int
    checkpointing: bool
    tied: bool
    stages: str
    """Layers of each stage, such as 1+3; `balanced` leaves them to us."""
    rows: Literal["equal", "varied"]
    """`varied`: micro-batches have different lengths and some rows no target, as in fine-tuning."""
    scope: DecayScope
    clip: float
    quick: bool

    @property
    def id(self) -> str:
        parts = [
            self.family,
            f"pp{self.pipeline}",
            f"dp{self.data}",
            f"tp{self.tensor}" + ("-sp" if self.sequence else ""),
            f"kv{self.kv_heads}",
            f"z{self.zero_stage}",
            self.dtype,
            f"acc{self.accumulation}",
            *(["ckpt"] if self.checkpointing else []),
            *(["tied"] if self.tied else []),
            *([self.stages] if self.stages != "balanced" else []),
            *([self.rows] if self.rows != "equal" else []),
            self.scope,
            *(["noclip"] if self.clip == 0 else []),
        ]
        return "-".join(parts)

    @property
    def processes(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def layers_per_stage(self) -> tuple[int, ...] | None:
        return None if self.stages == "balanced" else tuple(int(count) for count in self.stages.split("+"))

    @property
    def model(self) -> ModelConfig:
        """Small, but with enough layers for four stages and enough heads for four tensor-parallel ranks."""
        z_loss = {"z_loss_weight": 1e-2} if self.family == "olmo2" else {}
        return ModelConfig.model_validate(
            {
                "family": self.family,
                "layers": sum(self.layers_per_stage or [LAYERS]),
                "hidden_size": 8 * QUERY_HEADS,
                "mlp_hidden_size": 48,
                "query_heads": QUERY_HEADS,
                "kv_heads": self.kv_heads,
                "head_dim": 8,
                "vocab_size": 64,
                "context_length": 16,
                "tied_embeddings": self.tied,
                **z_loss,
            }
        )

    @property
    def recipe(self) -> TrainingRecipe:
        return recipe(
            self.zero_stage,
            self.dtype,
            scope=self.scope,
            clip=self.clip,
            learning_rate=LEARNING_RATE,
            eps=EPS,
            global_batch=GLOBAL_BATCH,
            micro_batch=GLOBAL_BATCH // (self.data * self.accumulation),
            checkpointing=self.checkpointing,
            parallel=ParallelConfig(
                pipeline=self.pipeline, tensor=self.tensor, sequence=self.sequence, layers_per_stage=self.layers_per_stage
            ),
        )


# `quick` rows run in `make test`, all of them in `make test-full`.
TABLE = """
       family  pp  dp  tp  sp   kv  zero  dtype  acc  ckpt  tied  stages   rows    scope               clip
full   olmo2   1   1   2   yes  4   1     fp32   4    -     yes   -        varied  matrices            0
full   olmo2   1   1   2   yes  1   1     fp32   1    yes   -     -        -       no_token_embedding  0
full   llama2  1   1   2   yes  1   2     fp32   2    yes   yes   -        varied  all                 0
full   olmo2   1   1   2   yes  1   2     fp32   4    -     -     -        varied  no_token_embedding  0.5
full   llama2  1   1   2   -    1   2     fp32   2    -     yes   -        -       no_token_embedding  0
full   olmo2   1   1   2   yes  1   2     fp32   2    yes   -     -        varied  matrices            0.5
full   olmo2   1   1   2   -    1   3     fp32   1    yes   -     -        -       all                 0.5
full   llama2  1   1   2   yes  4   3     fp32   1    -     -     -        varied  no_token_embedding  0
full   llama2  1   1   2   yes  1   3     fp32   4    yes   -     -        -       all                 0
full   llama2  1   2   1   -    4   0     fp32   2    -     yes   -        varied  no_token_embedding  0.5
full   olmo2   1   2   1   -    2   0     fp32   4    yes   -     -        -       all                 0
full   llama2  1   2   1   -    4   2     fp32   2    yes   yes   -        varied  all                 0
full   olmo2   1   2   1   -    4   2     fp32   1    yes   -     -        varied  matrices            0.5
full   llama2  1   2   1   -    2   3     fp32   4    -     yes   -        varied  no_token_embedding  0.5
full   olmo2   1   2   1   -    4   3     fp32   2    yes   yes   -        varied  matrices            0.5
full   llama2  1   2   1   -    2   3     fp32   2    -     -     -        varied  matrices            0.5
quick  olmo2   1   1   4   yes  2   0     fp32   1    -     -     -        varied  matrices            0.5
full   llama2  1   1   4   -    4   0     fp32   2    yes   yes   -        varied  no_token_embedding  0.5
quick  llama2  1   1   4   -    2   1     fp32   2    -     yes   -        -       all                 0.5
full   llama2  1   1   4   yes  4   2     fp32   4    yes   yes   -        -       matrices            0
full   olmo2   1   1   4   -    4   3     fp32   1    yes   yes   -        varied  no_token_embedding  0
full   olmo2   1   1   4   -    1   3     fp32   4    -     -     -        varied  all                 0.5
quick  olmo2   1   2   2   yes  2   2     fp32   2    -     -     -        varied  no_token_embedding  0.5
quick  llama2  1   2   2   yes  4   3     fp32   1    yes   yes   -        -       matrices            0.5
full   llama2  1   4   1   -    2   2     fp32   1    yes   yes   -        -       matrices            0
full   llama2  1   4   1   -    1   2     fp32   4    -     -     -        varied  all                 0
quick  llama2  1   4   1   -    2   3     fp32   2    -     -     -        varied  no_token_embedding  0.5
full   llama2  1   2   4   -    1   1     fp32   1    -     yes   -        varied  matrices            0
full   olmo2   1   4   2   yes  1   0     fp32   1    yes   -     -        varied  no_token_embedding  0
quick  olmo2   1   4   2   -    4   2     fp32   1    -     yes   -        -       matrices            0.5
full   olmo2   1   4   2   yes  1   3     fp32   4    -     yes   -        -       all                 0
full   olmo2   2   1   1   -    2   0     fp32   1    yes   yes   3+1      varied  all                 0.5
full   llama2  2   1   1   -    2   0     fp32   4    yes   yes   1+3      -       matrices            0
full   llama2  2   1   1   -    4   1     fp32   4    yes   -     3+1      varied  no_token_embedding  0.5
full   llama2  2   1   1   -    2   1     fp32   1    -     -     -        varied  matrices            0
quick  olmo2   2   1   2   -    2   0     fp32   1    -     -     3+1      -       no_token_embedding  0.5
full   olmo2   4   1   1   -    2   0     fp32   1    -     yes   -        varied  all                 0
quick  llama2  4   1   1   -    2   1     fp32   4    -     -     -        -       no_token_embedding  0.5
full   llama2  4   1   1   -    4   1     fp32   2    yes   yes   1+2+1+1  -       no_token_embedding  0
quick  olmo2   2   1   4   yes  2   1     fp32   2    -     yes   3+1      varied  all                 0
quick  olmo2   2   2   2   yes  2   1     fp32   2    yes   yes   -        -       all                 0.5
full   olmo2   2   2   2   -    1   1     fp32   4    -     -     3+1      -       matrices            0.5
quick  llama2  2   4   1   -    2   1     fp32   2    -     yes   -        varied  no_token_embedding  0.5
quick  olmo2   4   1   2   yes  1   0     fp32   4    yes   yes   2+1+1+1  varied  matrices            0.5
full   llama2  4   1   2   -    1   0     fp32   2    -     -     1+2+1+1  -       no_token_embedding  0.5
full   llama2  4   1   2   yes  1   1     fp32   1    yes   -     -        varied  matrices            0
full   olmo2   4   2   1   -    4   0     fp32   1    yes   -     1+2+1+1  -       all                 0.5
quick  olmo2   1   1   4   -    2   2     bf16   1    -     -     -        -       all                 0.5
quick  llama2  1   2   2   yes  2   3     bf16   2    yes   -     -        -       matrices            0
full   llama2  1   2   4   -    1   2     bf16   4    yes   -     -        -       no_token_embedding  0
quick  llama2  4   1   1   -    2   0     bf16   4    yes   yes   -        varied  matrices            0.5
full   llama2  2   1   4   yes  1   0     bf16   2    yes   yes   3+1      -       matrices            0
quick  olmo2   2   2   2   yes  4   1     bf16   2    -     yes   -        varied  no_token_embedding  0.5
full   olmo2   2   4   1   -    4   0     bf16   4    yes   -     3+1      -       matrices            0
full   llama2  2   4   1   -    4   1     bf16   1    yes   -     1+3      varied  all                 0
full   olmo2   4   2   1   -    4   0     bf16   4    -     -     2+1+1+1  varied  all                 0
"""


def parse(row: str) -> Layout:
    """A row of the table."""
    quick, family, pp, dp, tp, sp, kv, zero, dtype, accumulation, checkpointing, tied, stages, rows, scope, clip = row.split()
    return Layout(
        family,  # type: ignore[arg-type]
        int(pp),
        int(dp),
        int(tp),
        sp == "yes",
        int(kv),
        int(zero),
        dtype,  # type: ignore[arg-type]
        int(accumulation),
        checkpointing == "yes",
        tied == "yes",
        "balanced" if stages == "-" else stages,
        "varied" if rows == "varied" else "equal",
        scope,  # type: ignore[arg-type]
        float(clip),
        quick == "quick",
    )


LAYOUTS = [parse(row) for row in TABLE.strip().splitlines()[1:]]
