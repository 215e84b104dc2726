"""The engine in the box: samples and replays with transformers, on CPU or one device."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from tasks.adapters.forward import Prefix, compute_stem, logits_of, prefill, response_hidden, stem_length
from tasks.adapters.models import load_model
from tasks.adapters.prompts import (
    ModelInputs,
    PromptProcessor,
    banned_ids,
    end_of_turn_ids,
    num_tokens,
    signature,
)
from tasks.ports import Advance, ReplayRequest, Response, ResponseScores, SamplingRequest
from vzero_core.errors import InputError
from vzero_core.masking import at_least_float32

T = TypeVar("T")

_OUTPUT_TOKENS = 512
"""Tokens whose log-probs over the vocabulary are in memory at a time."""


class TransformersEngine:
    """One model in this process; a PolicyEngine and a TeacherScorer."""

    def __init__(self, folder: Path, digest: str, *, dtype: str, device: str, max_batch_tokens: int) -> None:
        """Load a model.

        Args:
            folder: model folder.
            digest: identity of its weights.
            dtype: arithmetic, such as "float32".
            device: torch device.
            max_batch_tokens: tokens of one forward batch, counting the prompt once per response.
        """
        self._model = load_model(folder, dtype, device)
        self._digest = digest
        self._dtype = dtype
        self._max_batch_tokens = max_batch_tokens
        self._verbatim: bool | None = None
        self.processor = PromptProcessor(folder)
        self._eos_ids = end_of_turn_ids(self._model.generation_config, self.processor)
        self._banned = torch.tensor(banned_ids(self._model.config, self.processor, self._eos_ids), device=device)

    def load_weights(self, folder: Path, digest: str) -> None:
        """Hold the weights of a model folder; nothing happens where it already holds that digest.

        Raises:
            InputError: the weights are incomplete, or those of another model; the old ones are then still held.
        """
        if digest == self._digest:
            return
        # Copied in place, so that the device never holds the weights twice.
        held = self._model.state_dict()
        weights = self._read_weights(folder, held)
        shapes, expected = ({(name, value.shape) for name, value in state.items()} for state in (weights, held))
        if different := sorted({name for name, _ in shapes ^ expected}):
            raise InputError(
                f"weights in {folder} must be those of the model that the engine started with, but {len(different)} "
                f"tensors differ in name or shape: {', '.join(different[:3])}; start another engine"
            )
        self._digest = ""
        self._model.load_state_dict(weights)
        self._digest = digest

    def _read_weights(self, folder: Path, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the weights of a model folder by the names that they have in memory.

        They are read as a model is read, since files may name or cut tensors otherwise. Where the first exchange shows
        that they do not, files with all names are from then on read as they are: to build a small model takes far
        longer than to read its weights.
        """
        if self._verbatim:
            found = _read_files(folder, held)
            if found.keys() == held.keys():
                return found
        weights: dict[str, torch.Tensor] = load_model(folder, self._dtype, "cpu").state_dict()
        if self._verbatim is None:
            found = _read_files(folder, held)
            self._verbatim = found.keys() == weights.keys() and all(
                torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in weights.items()
            )
        return weights

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        temperature: float,
        max_new_tokens: int,
        advance: Advance,
        top_p: float = 1.0,
        top_k: int = 0,
        presence_penalty: float = 0.0,
    ) -> list[list[Response]]:
        """Give, per request, one response per seed, with the settings that `PolicyEngine.sample` explains.

        Each token is drawn by inverting the cumulative distribution at a number that depends on the response's seed
        and the position alone. Special tokens but end-of-turn have probability 0: a sampled image token would
        misalign the images of everything that reads the response. The log-probs are the model's own, as `score`
        gives them: at temperature 1, with nothing penalised, left out or banned.
        """
        warpers = LogitsProcessorList()
        if top_k > 0:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        responses: list[list[Response]] = [[] for _ in requests]
        encoded = [self.processor.encode(request.prompt) for request in requests]
        widths = [len(request.seeds) for request in requests]
        for batch in self._batches(encoded, widths, [max_new_tokens] * len(requests)):
            width = widths[batch[0]]
            prefix = prefill(self._model, [encoded[index] for index in batch], width)
            seeds = [seed for index in batch for seed in requests[index].seeds]
            uniform_BT = torch.from_numpy(_uniform(seeds, max_new_tokens)).to(self._model.device)
            eos = torch.tensor(self._eos_ids, device=self._model.device)
            logits, logprobs = logits_of(self._model, prefix.hidden), []
            tokens_BT = torch.empty(uniform_BT.shape, dtype=torch.int64, device=self._model.device)
            finished = torch.zeros(len(seeds), dtype=torch.bool, device=self._model.device)
            for step in range(max_new_tokens):
                allowed = logits.double().index_fill(1, self._banned, -torch.inf)
                if presence_penalty:
                    held = tokens_BT[:, :step]
                    allowed.scatter_(1, held, allowed.gather(1, held) - presence_penalty)
                chosen = _choose(allowed, uniform_BT[:, step], temperature, warpers)
                logprobs.append(at_least_float32(logits).log_softmax(-1).gather(1, chosen[:, None])[:, 0])
                tokens_BT[:, step] = chosen
                finished |= torch.isin(chosen, eos)
                if bool(finished.all()) or step + 1 == max_new_tokens:
                    break
                logits = self._model(
                    input_ids=chosen[:, None],
                    position_ids=prefix.positions(step, 1),
                    past_key_values=prefix.cache,
                    use_cache=True,
                ).logits[:, -1]
            rows = self._responses(tokens_BT[:, : len(logprobs)].tolist(), torch.stack(logprobs, 1).tolist())
            for position, index in enumerate(batch):
                responses[index] = rows[position * width : (position + 1) * width]
            advance(len(batch))
        return responses

    @torch.inference_mode()
    def score(self, requests: Sequence[ReplayRequest], *, advance: Advance) -> list[list[ResponseScores]]:
        """Give, per request, the scores of each of its responses.

        Each prompt is computed once for all of its responses, and what prompts with the very same first image begin
        with is computed once for all of them.
        """
        scores: list[list[ResponseScores]] = [[] for _ in requests]
        encoded = [self.processor.encode(request.prompt) for request in requests]
        for batch, length in self._replay_batches(requests, encoded):
            stem = compute_stem(self._model, [encoded[unit[0]] for unit in batch], length) if length else None
            for number, members in enumerate(zip(*batch, strict=True)):
                prompts = [encoded[index] for index in members]
                prefix = prefill(self._model, prompts, len(requests[members[0]].responses), stem)
                rows = [response for index in members for response in requests[index].responses]
                found = self._read_scores(prefix, rows, max(requests[index].top_k for index in members))
                # The prompt is computed for its first response; of what it shares, the first prompt bears the cost.
                computed = num_tokens(prompts[0]) - (length if number else 0)
                for index in members:
                    for position, response in enumerate(requests[index].responses):
                        own, values, ids = next(found)
                        top_k = requests[index].top_k
                        scores[index].append(
                            ResponseScores(
                                logprobs=own,
                                topk_ids=ids[:, :top_k],
                                topk_logprobs=values[:, :top_k],
                                num_tokens=num_tokens(prompts[0]) + len(response),
                                num_computed_tokens=len(response) + (computed if position == 0 else 0),
                            )
                        )
                advance(len(members))
        return scores

    def _read_scores(
        self, prefix: Prefix, responses: Sequence[tuple[int, ...]], top_k: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Give each response's log-probs, [T], its likeliest tokens' and their ids, [T, K], a few rows at a time."""
        responses_BT = pad_right(responses, self._eos_ids[0])
        hidden = response_hidden(self._model, prefix, responses_BT)
        at_a_time = max(1, _OUTPUT_TOKENS // hidden.shape[1])
        for start in range(0, len(responses), at_a_time):
            part = slice(start, start + at_a_time)
            logprobs = at_least_float32(logits_of(self._model, hidden[part])).log_softmax(-1)
            own = logprobs.gather(-1, responses_BT[part].to(logprobs.device)[..., None])[..., 0].cpu()
            values, ids = (tensor.cpu() for tensor in logprobs.topk(top_k, dim=-1))
            for row, response in enumerate(responses[part]):
                size = len(response)
                yield own[row, :size], values[row, :size], ids[row, :size]

    def _responses(self, tokens: list[list[int]], logprobs: list[list[float]]) -> list[Response]:
        responses = []
        for ids, values in zip(tokens, logprobs, strict=True):
            end = next((position + 1 for position, token in enumerate(ids) if token in self._eos_ids), None)
            own = ids[:end]
            text = self.processor.tokenizer.decode(own, skip_special_tokens=True)
            assert isinstance(text, str)
            responses.append(
                Response(
                    token_ids=tuple(own),
                    logprobs=tuple(values[:end]),
                    text=text.strip(),
                    truncated=end is None,
                    weights=self._digest,
                )
            )
        return responses

    def _replay_batches(
        self, requests: Sequence[ReplayRequest], encoded: Sequence[ModelInputs]
    ) -> Iterator[tuple[list[tuple[int, ...]], int]]:
        """Group requests into units that share a stem, and units into batches; give these, and the stem's length."""
        same_image: dict[object, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            same_image[id(request.prompt.images[0]) if request.prompt.images else ("no image", index)].append(index)
        units: list[tuple[tuple[int, ...], int]] = []
        for indices in same_image.values():
            if length := stem_length([encoded[index] for index in indices]):
                units.append((tuple(indices), length))
            else:
                units += [((index,), 0) for index in indices]
        groups: dict[object, list[tuple[int, ...]]] = defaultdict(list)
        lengths: dict[object, int] = {}
        for unit, length in units:
            key: object = (length, *((signature(encoded[index]), len(requests[index].responses)) for index in unit))
            groups[key].append(unit)
            lengths[key] = length
        for key, members in groups.items():

            def cost(batch: Sequence[tuple[int, ...]]) -> int:
                return max(
                    sum(len(requests[unit[place]].responses) for unit in batch)
                    * (
                        num_tokens(encoded[batch[0][place]])
                        + max(len(response) for unit in batch for response in requests[unit[place]].responses)
                    )
                    for place in range(len(batch[0]))
                )

            for batch in within_budget(members, cost, self._max_batch_tokens):
                yield batch, lengths[key]

    def _batches(
        self, encoded: Sequence[ModelInputs], widths: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[list[int]]:
        """Group prompts that can be stacked, in the order given, within the token budget."""
        groups: dict[object, list[int]] = defaultdict(list)
        for index, inputs in enumerate(encoded):
            groups[signature(inputs), widths[index]].append(index)
        for indices in groups.values():

            def cost(batch: Sequence[int]) -> int:
                return (
                    len(batch)
                    * widths[batch[0]]
                    * (num_tokens(encoded[batch[0]]) + max(lengths[index] for index in batch))
                )

            yield from within_budget(indices, cost, self._max_batch_tokens)


def within_budget(items: Sequence[T], cost: Callable[[Sequence[T]], int], budget: int) -> Iterator[list[T]]:
    """Cut items into batches, in order, each within a budget; an item that exceeds it is a batch of its own."""
    batch: list[T] = []
    for item in items:
        if batch and cost([*batch, item]) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _read_files(folder: Path, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors in a folder's files, and those that share their place in memory with one of them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"model folder {folder} must have whole weights, but {error}; copy them again") from error
    places = {name: tensor.data_ptr() for name, tensor in held.items()}
    by_place = {places[name]: tensor for name, tensor in found.items() if name in places}
    return found | {name: by_place[place] for name, place in places.items() if place in by_place}


def _choose(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, warpers: LogitsProcessorList
) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    # Neither warper looks at the tokens so far.
    kept = warpers(torch.LongTensor(), logits_BV / temperature)
    cumulative = kept.softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform_B * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _uniform(seeds: Sequence[int], length: int) -> np.ndarray:
    return np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds])


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Stack token ids of different lengths; [B, T] int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
