"""The engine in the box: samples and replays with transformers, on CPU or one device."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tasks.adapters.forward import prefill, response_logits
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
        # Read as a model is read, since files may name tensors otherwise than memory does; copied in place, so that
        # the device never holds the weights twice.
        weights, held = load_model(folder, self._dtype, "cpu").state_dict(), self._model.state_dict()
        shapes, expected = ({(name, value.shape) for name, value in state.items()} for state in (weights, held))
        if different := sorted({name for name, _ in shapes ^ expected}):
            raise InputError(
                f"weights in {folder} must be those of the model that the engine started with, but {len(different)} "
                f"tensors differ in name or shape: {', '.join(different[:3])}; start another engine"
            )
        self._digest = ""
        self._model.load_state_dict(weights)
        self._digest = digest

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SamplingRequest], *, temperature: float, max_new_tokens: int, advance: Advance
    ) -> list[list[Response]]:
        """Give, per request, one response per seed; temperature 0 takes the likeliest token.

        Each token is drawn by inverting the cumulative distribution at a number that depends on the response's seed
        and the position alone. Special tokens but end-of-turn have probability 0: a sampled image token would
        misalign the images of everything that reads the response. The log-probs are the model's own, as `score`
        gives them: at temperature 1 and with nothing banned.
        """
        responses: list[list[Response]] = [[] for _ in requests]
        encoded = [self.processor.encode(request.prompt) for request in requests]
        widths = [len(request.seeds) for request in requests]
        for batch in self._batches(encoded, widths, [max_new_tokens] * len(requests)):
            width = widths[batch[0]]
            prefix = prefill(self._model, [encoded[index] for index in batch], width)
            seeds = [seed for index in batch for seed in requests[index].seeds]
            uniform_BT = torch.from_numpy(_uniform(seeds, max_new_tokens)).to(self._model.device)
            eos = torch.tensor(self._eos_ids, device=self._model.device)
            logits, tokens, logprobs = prefix.logits, [], []
            finished = torch.zeros(len(seeds), dtype=torch.bool, device=self._model.device)
            for step in range(max_new_tokens):
                chosen = self._choose(logits, uniform_BT[:, step], temperature)
                logprobs.append(at_least_float32(logits).log_softmax(-1).gather(1, chosen[:, None])[:, 0])
                tokens.append(chosen)
                finished |= torch.isin(chosen, eos)
                if bool(finished.all()) or step + 1 == max_new_tokens:
                    break
                logits = self._model(
                    input_ids=chosen[:, None],
                    position_ids=prefix.positions(step, 1),
                    past_key_values=prefix.cache,
                    use_cache=True,
                ).logits[:, -1]
            rows = self._responses(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist())
            for position, index in enumerate(batch):
                responses[index] = rows[position * width : (position + 1) * width]
            advance(len(batch))
        return responses

    @torch.inference_mode()
    def score(self, requests: Sequence[ReplayRequest], *, top_k: int, advance: Advance) -> list[list[ResponseScores]]:
        """Give, per request, the scores of each of its responses; each prompt is computed once."""
        scores: list[list[ResponseScores]] = [[] for _ in requests]
        encoded = [self.processor.encode(request.prompt) for request in requests]
        widths = [len(request.responses) for request in requests]
        lengths = [max(len(response) for response in request.responses) for request in requests]
        for batch in self._batches(encoded, widths, lengths):
            rows = [response for index in batch for response in requests[index].responses]
            responses_BT = pad_right(rows, self._eos_ids[0])
            logits = response_logits(self._model, [encoded[index] for index in batch], responses_BT, shared=True)
            logprobs = at_least_float32(logits).log_softmax(-1)
            own = logprobs.gather(-1, responses_BT.to(logprobs.device)[..., None])[..., 0].cpu()
            top = logprobs.topk(top_k, dim=-1)
            values, ids = top.values.cpu(), top.indices.cpu()
            row = 0
            for index in batch:
                num_prompt = num_tokens(encoded[index])
                for number, response in enumerate(requests[index].responses):
                    scores[index].append(
                        ResponseScores(
                            logprobs=own[row, : len(response)],
                            topk_ids=ids[row, : len(response)],
                            topk_logprobs=values[row, : len(response)],
                            num_tokens=num_prompt + len(response),
                            # The prompt is computed once, for the first of them.
                            num_computed_tokens=len(response) + (num_prompt if number == 0 else 0),
                        )
                    )
                    row += 1
            advance(len(batch))
        return scores

    def _choose(self, logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
        allowed = logits.double().index_fill(1, self._banned, -torch.inf)
        if temperature == 0:
            return allowed.argmax(-1)
        cumulative = (allowed / temperature).softmax(-1).cumsum(-1)
        total = cumulative[:, -1]
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]

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

    def _batches(
        self, encoded: Sequence[ModelInputs], widths: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[list[int]]:
        """Group prompts that can be stacked, in the order given, within the token budget."""
        groups: dict[object, list[int]] = defaultdict(list)
        for index, inputs in enumerate(encoded):
            groups[signature(inputs), widths[index]].append(index)
        for indices in groups.values():
            batch: list[int] = []
            for index in indices:
                rows = (len(batch) + 1) * widths[index]
                longest = max(lengths[other] for other in (*batch, index))
                if batch and rows * (num_tokens(encoded[index]) + longest) > self._max_batch_tokens:
                    yield batch
                    batch = []
                batch.append(index)
            yield batch


def _uniform(seeds: Sequence[int], length: int) -> np.ndarray:
    return np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds])


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Stack token ids of different lengths; [B, T] int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
