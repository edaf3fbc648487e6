"""How fast n samples of each question come from our sampler, beside transformers' `generate` with as many bytes of cache.

    python tools/bench/generate.py [--questions 8] [--slots 64] [--sweep]

Both have the same weights, draw at temperature 1 without filters, and keep the keys and values of as many tokens: ours in its
slots and the prompt's row, transformers' in a batch of whole questions (`num_return_sequences`), each row as long as the longest
prompt and response. The model is random, but for its end of text, whose probability is the same at every position: responses are
as long as those to GSM8K, 110 tokens on average, with a long tail that is cut at 256. Prompts have 60 to 200 tokens, and
transformers gets them sorted by length, which spares it padding. They take turns and the best turn of each counts. Other work on
the machine can still hit one of them harder, so the ratio of processor time stands beside that of wall time; and one thread is
the default, since on such a machine two wait for each other.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import command
from command import at_least, parser, positive, verdict

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.data.tokenizer import END_OF_TEXT, Tokenizer, train_byte_bpe

if TYPE_CHECKING:  # --help has no need of torch, which takes seconds to import
    from megatron_plasticity.models.transformer import Transformer

MAX_NEW_TOKENS = 256
PROMPT_TOKENS = (60, 200)
MEAN_TOKENS = 130
"""Of a response that nothing cuts; the cut at `MAX_NEW_TOKENS` makes it about 110."""
TURNS = 2
TARGET = 3.0


@dataclass(frozen=True)
class Rate:
    """Tokens per second."""

    wall: float
    processor: float
    """Per second of processor time, of all threads together."""


def main() -> int:
    """Print tokens per second of both and their ratio, with --sweep also of other numbers of slots; 1 below the target."""
    arguments = checked_arguments()
    import torch

    from megatron_plasticity.models.cache import KeyValueCache

    torch.set_num_threads(arguments.threads)
    model = random_model(arguments)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(1, arguments.vocab_size) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(arguments.questions)
    ]
    prompts.sort(key=len)
    width = len(prompts[-1]) + MAX_NEW_TOKENS
    ours = KeyValueCache(model.config, arguments.slots + 1, width).bytes
    batch = (arguments.slots + 1) // arguments.samples
    print(f"cache of {ours / 2**20:.0f} MiB: {arguments.slots} slots of ours, {batch} questions of transformers", flush=True)
    own = native(model, prompts, arguments.samples, arguments.slots)
    other = transformers_generate(model, prompts, arguments.samples, batch, arguments.static)
    turns = [(measured(f"ours, {arguments.slots} slots", own), measured("transformers", other)) for _ in range(TURNS)]
    best = [Rate(max(rate.wall for rate in side), max(rate.processor for rate in side)) for side in zip(*turns, strict=True)]
    ratio, processor_ratio = best[0].wall / best[1].wall, best[0].processor / best[1].processor
    good = min(ratio, processor_ratio) >= TARGET
    print(
        f"ratio {ratio:.2f}, of processor time {processor_ratio:.2f}: {verdict(good, f'at least {TARGET:g}, both')}", flush=True
    )
    if arguments.sweep:
        for slots in (1, 8, 16, 32, 128):
            few = prompts[: max(1, min(len(prompts), slots // 8))]
            measured(f"ours, {slots} slots, {len(few)} questions", native(model, few, arguments.samples, slots))
    return 0 if good else 1


def checked_arguments() -> argparse.Namespace:
    """What the command line says; ends the process if that cannot be measured."""
    reader = parser(__doc__)
    add = reader.add_argument
    add("--questions", type=positive, default=8, help="prompts [8]")
    add("--samples", type=positive, default=16, help="responses to each [16]")
    add("--slots", type=positive, default=64, help="sequences that our sampler decodes side by side [64]")
    add("--layers", type=positive, default=4, help="layers of the model [4]")
    add("--hidden-size", type=positive, default=384, help="width of the model, an even multiple of --query-heads [384]")
    add("--query-heads", type=positive, default=8, help="a multiple of --kv-heads [8]")
    add("--kv-heads", type=positive, default=8, help="[8]")
    add("--vocab-size", type=at_least(2), default=8192, help="rows of the vocabulary [8192]")
    add("--threads", type=positive, default=1, help="threads of torch [1]")
    add("--static", action="store_true", help="transformers with its static cache instead of its default")
    add("--sweep", action="store_true", help="ours with other numbers of slots, too")
    found = reader.parse_args()
    if found.query_heads % found.kv_heads:
        reader.error(f"--query-heads {found.query_heads}: expected a multiple of --kv-heads, {found.kv_heads}")
    if found.hidden_size % (2 * found.query_heads):
        reader.error(f"--hidden-size {found.hidden_size}: expected an even multiple of --query-heads, {found.query_heads}")
    if found.slots + 1 < found.samples:
        reader.error(f"--slots {found.slots}: transformers needs the memory of all {found.samples} samples of a question")
    return found


def random_model(arguments: argparse.Namespace) -> Transformer:
    """A Llama whose end of text, token 0, has probability 1 / `MEAN_TOKENS` nearly everywhere.

    The first column of the residual stream is the same for all tokens, and in the head it counts for the end of text alone.
    """
    config = ModelConfig.model_validate(
        {
            "family": "llama2",
            "layers": arguments.layers,
            "hidden_size": arguments.hidden_size,
            "mlp_hidden_size": arguments.hidden_size * 11 // 4,
            "query_heads": arguments.query_heads,
            "kv_heads": arguments.kv_heads,
            "head_dim": arguments.hidden_size // arguments.query_heads,
            "vocab_size": arguments.vocab_size,
            "context_length": PROMPT_TOKENS[1] + MAX_NEW_TOKENS,
        }
    )
    import torch

    from megatron_plasticity.models.initialisation import initialise
    from megatron_plasticity.models.transformer import Transformer

    model = Transformer(config)
    initialise(model, seed=0)
    with torch.no_grad():
        head = model.head.weight
        assert head is not None
        model.embed.weight[:, 0] = 5.0
        head[0] = 0.0
        head[:, 0] = 0.0
        tokens = torch.randint(1, config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
        others = model(tokens)[..., 1:].logsumexp(dim=-1).mean().item()
        head[0, 0] = 1.0
        head[0, 0] = (others - math.log(MEAN_TOKENS - 1)) / model(tokens)[..., 0].mean()
    return model.eval()


def native(model: Transformer, prompts: list[list[int]], samples: int, slots: int) -> Callable[[], list[int]]:
    """Our sampler; calling it gives the lengths of all responses."""
    from megatron_plasticity.evaluation.sampler import NativeGenerator
    from megatron_plasticity.evaluation.sampling import SamplingParameters

    generator = NativeGenerator(model, _tokenizer(), slots)
    parameters = SamplingParameters(MAX_NEW_TOKENS, temperature=1.0)

    def run() -> list[int]:
        found = generator.generate(prompts, range(len(prompts)), samples, parameters)
        return [len(continuation.tokens) for row in found for continuation in row]

    return run


def transformers_generate(
    model: Transformer, prompts: list[list[int]], samples: int, batch: int, static: bool
) -> Callable[[], list[int]]:
    """transformers with `batch` questions at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_plasticity.models.huggingface import huggingface_config, to_huggingface

    values = huggingface_config(model.config)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    theirs.load_state_dict(to_huggingface(model.state_dict(), model.config))
    theirs.eval()
    options = {"cache_implementation": "static"} if static else {}

    def run() -> list[int]:
        torch.manual_seed(0)
        lengths: list[int] = []
        for start in range(0, len(prompts), batch):
            rows = prompts[start : start + batch]
            longest = max(map(len, rows))
            tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            output = theirs.generate(
                tokens,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                num_return_sequences=samples,
                eos_token_id=0,
                pad_token_id=0,
                **options,
            )
            lengths += (output[:, longest:] != 0).sum(dim=1).tolist()
        return lengths

    return run


def measured(what: str, run: Callable[[], list[int]]) -> Rate:
    """Run once, and print and return tokens per second."""
    wall, processor = time.perf_counter(), time.process_time()
    lengths = run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    tokens, responses = sum(lengths), len(lengths)
    print(
        f"{what}: {tokens / wall:,.0f} tokens/s, {tokens / processor:,.0f} per second of processor time; "
        f"{wall:.1f} s for {responses} responses of {tokens / responses:.0f} tokens each",
        flush=True,
    )
    return Rate(tokens / wall, tokens / processor)


def _tokenizer() -> Tokenizer:
    """One whose end of text is token 0, as the model's is; nothing else of it is used."""
    tokenizer = train_byte_bpe([], vocab_size=257)
    assert tokenizer.end_of_text == 0, END_OF_TEXT
    return tokenizer


if __name__ == "__main__":
    command.run(main)
