"""EleutherAI's lm-evaluation-harness on our own model: no export, any head size, and the tokens of our own tokenizer."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_plasticity.config.evaluation import HarnessConfig
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.sampler import NativeGenerator
from megatron_plasticity.evaluation.sampling import SamplingParameters
from megatron_plasticity.models.transformer import Transformer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}); install it with `pip install 'megatron-plasticity[eval]'`"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from megatron_plasticity.tracking.progress import Progress

# As the harness's own Hugging Face model does where a task does not say.
_NEW_TOKENS = 256
# What the harness calls the number of new tokens; the first that is there counts.
_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_HONOURED = {"until", "do_sample", "temperature", *_NEW_TOKENS_NAMES}
# Other settings of generation that may be there, since they change nothing at these values, or when decoding is greedy.
_WITHOUT_EFFECT: dict[str, Any] = {"top_p": 1, "top_k": 0, "repetition_penalty": 1, "num_beams": 1, "use_cache": True}
_OF_SAMPLING_ONLY = {"top_p", "top_k", "min_p", "typical_p"}


class NativeModel(TemplateLM):
    """The interface that the harness asks of a model, on ours. Its answers are those of the Hugging Face export."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        special: frozenset[int] = frozenset(),
        progress: Progress | None = None,
    ) -> None:
        """`special` are the ids that do not count as text in an answer, see `special_ids`."""
        super().__init__()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._special = special
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """Longest input in tokens; what is longer loses its beginning."""
        return self._model.config.context_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. None is ever added: our models see no beginning-of-text token in training."""
        return self._tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context, continuation): log-probability in nats, and whether it is what greedy decoding says."""
        if any(not 0 < len(continuation) <= self.max_length for _, _, continuation in requests):
            raise UserError(f"a continuation must have from 1 to {self.max_length} tokens, the context length of the model")
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        device = self._model.embed.weight.device
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
            # Padded on the right, which causal attention cannot see.
            inputs = torch.zeros(len(rows), len(rows[0]) - 1, dtype=torch.int64)
            for number, row in enumerate(rows):
                inputs[number, : len(row) - 1] = torch.tensor(row[:-1])
            logits = self._model(inputs.to(device))
            for number, (i, row) in enumerate(zip(batch, rows, strict=True)):
                length = len(requests[i][2])
                wanted = torch.tensor(row[-length:], device=device)
                scores = logits[number, len(row) - 1 - length : len(row) - 1].float().log_softmax(-1)
                likelihood = scores.gather(-1, wanted[:, None]).sum().item()
                results[i] = (likelihood, bool((scores.argmax(-1) == wanted).all()))
            self._tell(start + len(batch), len(order), "continuations")
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in windows of the context length that do not overlap."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to the first of its stop strings, greedy unless the task asks for samples."""
        results = [""] * len(requests)
        for settings, members in _by_settings(requests).items():
            new_tokens, temperature, stops = settings
            room = self.max_length - new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={new_tokens} leaves no room for a question in a context of {self.max_length} tokens"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.eot_token_id] for i in members]
            generator = NativeGenerator(self._model, self._tokenizer, self._batch_size)
            parameters = SamplingParameters(new_tokens, temperature)
            answers = generator.generate(prompts, range(len(prompts)), 1, parameters, self._progress)
            for i, (answer,) in zip(members, answers, strict=True):
                text = self._tokenizer.decode([token for token in answer.tokens if token not in self._special])
                results[i] = _cut(text, stops)  # the harness cuts within a token, which our own stop texts do not
        return results

    def _tell(self, done: int, total: int, unit: str) -> None:
        if self._progress is not None:
            self._progress.update(done, total, unit)


def special_ids(tokenizer_file: Path) -> frozenset[int]:
    """Ids of the special tokens of a `tokenizer.json`."""
    added = json.loads(tokenizer_file.read_text(encoding="utf-8")).get("added_tokens") or ()
    return frozenset(token["id"] for token in added if token.get("special"))


def harness_inputs(config: HarnessConfig) -> dict[str, str]:
    """What a score depends on beside model and config: the harness's version, and the content of the folder with own tasks."""
    inputs = {"lm_eval": version("lm_eval")}
    if config.task_folder is None:
        return inputs
    if not config.task_folder.is_dir():
        raise UserError(f"task_folder: {config.task_folder} is no folder")
    digest = hashlib.sha256()
    for file in sorted(config.task_folder.rglob("*")):
        # Python leaves its caches beside the functions of a task.
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(config.task_folder).as_posix()}:{sha256_file(file)}\n".encode())
    return inputs | {"task_folder": digest.hexdigest()}


def evaluate_tasks(model: NativeModel, config: HarnessConfig) -> dict[str, Any]:
    """`results.json` of a run: `{"tasks": {task: {metric: {"value", "stderr"}}}, "questions": {task: number}, "version"}`.

    A metric of a filter other than the harness's default is called `metric,filter`. Raises UserError for a task that the harness
    does not know or whose data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(config.task_folder) if config.task_folder else None)
    for task in config.tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise UserError(f"tasks: the harness has no task {task!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    try:
        found: Any = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            num_fewshot=config.shots,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # datasets and the hub raise kinds of it
        raise UserError(f"the data of {', '.join(config.tasks)} cannot be had: {str(error).strip().splitlines()[0]}") from None
    return {
        "tasks": {task: _metrics(scores) for task, scores in found["results"].items()},
        "questions": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "version": version("lm_eval"),
    }


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's `acc,none` and `acc_stderr,none` as one entry `acc`."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        metric, _, selected = key.partition(",")
        if isinstance(value, (int, float)) and selected and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{selected}")
            known = {"stderr": float(error)} if isinstance(error, (int, float)) else {}
            metrics[metric if selected == "none" else key] = {"value": float(value), **known}
    return metrics


_Settings = tuple[int, float, tuple[str, ...]]
"""New tokens, temperature, stop strings."""


def _by_settings(requests: Iterable[Instance]) -> dict[_Settings, list[int]]:
    """Positions of the requests that can be generated together."""
    groups: dict[_Settings, list[int]] = {}
    for number, request in enumerate(requests):
        asked: dict[str, Any] = request.arguments[1]
        stops = asked.get("until") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        temperature = _temperature(asked)
        _refuse_what_is_not_honoured(asked, temperature)
        tokens = int(next((asked[name] for name in _NEW_TOKENS_NAMES if asked.get(name)), _NEW_TOKENS))
        groups.setdefault((tokens, temperature, stops), []).append(number)
    return groups


def _temperature(asked: Mapping[str, Any]) -> float:
    """0 for greedy decoding. As in the harness, a temperature alone asks for samples."""
    stated = float(asked.get("temperature") or 0.0)
    sampled = stated > 0 if asked.get("do_sample") is None else asked["do_sample"]
    return (stated or 1.0) if sampled else 0.0


def _refuse_what_is_not_honoured(asked: Mapping[str, Any], temperature: float) -> None:
    passed_over = _HONOURED | (set() if temperature else _OF_SAMPLING_ONLY)
    for key, value in asked.items():
        if key not in passed_over and value is not None and (key not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[key]):
            raise UserError(
                f"generation_kwargs: {key}={value!r} is not supported; a task may set {', '.join(sorted(_HONOURED))}. Export the "
                "model and ask it with `lm_eval --model hf`"
            )


def _cut(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
