"""The sequences on which activations are recorded: held-out ones of a corpus, texts of one's own, or a task's questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np

from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.config.analysis import ActivationsRecipe
from megatron_plasticity.config.data import SourceConfig
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import FinetuneRecipe
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.sft import render_prompt
from megatron_plasticity.data.sources import documents, source_files
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.evaluation.tasks.task import questions_of

DEFAULT_TEMPLATE: str = FinetuneRecipe.model_fields["template"].default

Item = TypeVar("Item")


def sequence_inputs(recipe: ActivationsRecipe) -> dict[str, str]:
    """Hashes of the files that the recipe names, which enter the hash of a run on a finished model. Raises UserError."""
    if recipe.texts is not None:
        if not recipe.texts.is_file():
            raise UserError(f"texts: {recipe.texts}: there is no such file")
        return {"texts": sha256_file(recipe.texts)}
    identity = get_task(recipe.task).identity if recipe.task is not None else None
    return {} if identity is None else {"task": identity}


def choose_sequences(
    recipe: ActivationsRecipe,
    tokenizer: Tokenizer,
    context_length: int,
    held_out: BlockReader | None = None,
    task: TaskConfig | None = None,
    template: str = DEFAULT_TEMPLATE,
) -> CapturedSequences:
    """The sequences that the recipe states, or else those that go with the model: questions of `task`, or `held_out`.

    Raises UserError if there are none of either, or if what is stated cannot be read or has no such positions.
    """
    if recipe.texts is not None:
        return _of_texts(recipe, recipe.texts, tokenizer, context_length)
    task = recipe.task or task
    if task is not None:
        return _of_task(recipe, task, tokenizer, context_length, template)
    if held_out is None:
        raise UserError("the model was pretrained elsewhere, so no held-out sequences are known; state `texts` or `task`")
    return _of_corpus(recipe, held_out)


def _of_corpus(recipe: ActivationsRecipe, held_out: BlockReader) -> CapturedSequences:
    """Held-out sequences of a corpus; all of them if it has fewer than `recipe.sequences`."""
    if recipe.positions == "answer":
        raise UserError('positions "answer" are those of a task\'s response, and a corpus has none; state `task`')
    tokens, _ = held_out.batch(np.array(_chosen(range(len(held_out)), recipe)))
    return _cut(recipe, tokens.tolist(), [0] * len(tokens), held_out.sequence_length)


def _of_texts(recipe: ActivationsRecipe, path: Path, tokenizer: Tokenizer, context_length: int) -> CapturedSequences:
    """The texts of a file; empty ones are passed over."""
    source = SourceConfig(name="texts", files=(str(path),), text_documents="line")
    (file,) = source_files(source, seed=0)
    texts = [text for text in documents(file.path, source) if text.strip()]
    if not texts:
        raise UserError(f"texts: {path} holds no text")
    ids = tokenizer.encode_batch(_chosen(texts, recipe))
    return _cut(recipe, ids, [0] * len(ids), context_length)


def _of_task(
    recipe: ActivationsRecipe, task: TaskConfig, tokenizer: Tokenizer, context_length: int, template: str
) -> CapturedSequences:
    """Questions of a task: the prompt in the template, and the response where there is one.

    With positions "answer" those of the response's tokens are kept, and questions whose prompt leaves no room for one are passed
    over.
    """
    by_set = questions_of(get_task(task), task)
    examples = _chosen([example for examples in by_set.values() for example in examples], recipe)
    if recipe.positions == "answer" and not all(example.response for example in examples):
        raise UserError(
            f'task {task.name!r}: positions "answer" need responses, which its {task.questions} questions do not all have; state '
            "`task.questions: train`"
        )
    prompts = tokenizer.encode_batch([render_prompt(template, example.prompt) for example in examples])
    responses = tokenizer.encode_batch([example.response for example in examples])
    ids = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    return _cut(recipe, ids, [len(prompt) for prompt in prompts], context_length)


def _chosen(items: Sequence[Item], recipe: ActivationsRecipe) -> list[Item]:
    count = min(recipe.sequences, len(items))
    if recipe.sample_seed is None:
        return list(items[:count])
    return [items[index] for index in sorted(Random(recipe.sample_seed).sample(range(len(items)), count))]


def _cut(recipe: ActivationsRecipe, ids: list[list[int]], answers: list[int], context_length: int) -> CapturedSequences:
    """The sequences, cut to the longest length, with the positions that the recipe keeps; `answers` are the first of those that
    count as answer."""
    longest = min(recipe.max_tokens or context_length, context_length)
    sequences, kept = [], []
    for sequence, answer in zip(ids, answers, strict=True):
        length = min(len(sequence), longest)
        first = {"all": 0, "last": length - 1, "answer": answer}[recipe.positions]
        if 0 <= first < length:
            sequences.append(sequence[:length])
            kept.append(range(first, length))
    if not sequences:
        raise UserError(f"no sequence keeps a position: none has an answer within its first {longest} tokens; raise max_tokens")
    return CapturedSequences.of(sequences, kept)
