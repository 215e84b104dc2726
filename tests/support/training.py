"""A small store with everything that rounds of training read: samples, responses, replays and weights, all random."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from support.plain import PROMPT, words
from support.tiny_models import picture
from torch import Tensor

from tasks.adapters.dataset import SAMPLES, Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows, write_rows
from tasks.adapters.trainer import Trainer
from tasks.adapters.trainer_process import TrainerSettings
from tasks.adapters.training_data import REPLAYS, ROLLOUTS, WEIGHTS, TrainJob
from tasks.artifacts import ArtifactRef, Job, Record, Replay, Rollout, Sample, Weight, digest_json
from tasks.config import EngineFingerprint, OptimizerConfig, TrainerConfig
from vzero_core.config import ForwardKLTopKLoss, Loss, SampledLoss

# Two prompts that can be stacked and two that cannot.
PICTURES = {"a": (16, 16), "b": (24, 16), "c": (16, 16), "d": (32, 24)}
GROUP_SIZES = {"a": 3, "b": 2, "c": 3, "d": 3}
LENGTHS = (4, 1, 6, 2, 5)
SHARDS = (("a", "b"), ("c", "d"))
TOP_K = 4
TOP_K_LOSS = ForwardKLTopKLoss(k=TOP_K)
K2 = SampledLoss(estimator="k2")
MAX_PIXELS = 10_000
ALONE = TrainerConfig()
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_updates=4, mini_batches=2)


class _Given(Job):
    """An artefact made by hand."""

    name: str


class _Views(_Given):
    stage: ClassVar[str] = "views"


class _Model(_Given):
    stage: ClassVar[str] = "model"


class _Rollouts(_Given):
    stage: ClassVar[str] = "rollouts"


class _Replay(_Given):
    stage: ClassVar[str] = "replay"


class _Gate(_Given):
    stage: ClassVar[str] = "gate"


class TrainingWorld:
    """A student, a dataset of four samples, and as many rounds as are asked for."""

    def __init__(self, student: Path, root: Path) -> None:
        self.student = student
        self.root = root
        self.store = Store(str(root / "store"), root / "attempts")
        self.processor = PromptProcessor(student)
        images = root / "images"
        images.mkdir(parents=True, exist_ok=True)
        for number, (name, size) in enumerate(PICTURES.items()):
            picture(*size, seed=number).save(images / f"{name}.png")
        self.dataset = Dataset(self.store, ImageReader(str(images), MAX_PIXELS))
        samples = [
            Sample(
                id=name,
                image=self.dataset.images.inspect(f"{name}.png", decode=True).ref,
                question=f"w{number} w5",
                region=(0.0, 0.0, 4.0, 4.0),
            )
            for number, name in enumerate(PICTURES)
        ]
        self.samples = self._given(_Views(name="samples"), SAMPLES, samples, Sample)
        self.initial = self.store.produce(_Model(name="student"), self._no_policy)

    def trainer(
        self, name: str = "trainer", *, max_batch_tokens: int = 100_000, placement: TrainerConfig = ALONE
    ) -> Trainer:
        """Give a trainer with a work folder of its own, as after a restart on another machine."""
        return Trainer(
            self.store,
            self.dataset,
            Accelerator(cpu=True),
            student=str(self.student),
            work_dir=self.root / name,
            device="cpu",
            max_batch_tokens=max_batch_tokens,
            placement=placement,
        )

    def settings(
        self, work_dir: Path, *, placement: TrainerConfig = ALONE, max_batch_tokens: int = 100_000
    ) -> TrainerSettings:
        """Give what a trainer needs, in whatever process."""
        return TrainerSettings(
            store=self.store.url,
            cache_bytes=0,
            images=str(self.root / "images"),
            max_image_pixels=MAX_PIXELS,
            student=str(self.student),
            work_dir=work_dir,
            max_batch_tokens=max_batch_tokens,
            threads=1,
            placement=placement,
            trackers=(),
            run_name="test",
        )

    def job(
        self,
        *,
        loss: Loss = K2,
        weights: Literal["response", "token"] = "response",
        optimizer: OptimizerConfig = OPTIMIZER,
        dtype: str = "float64",
        round: int = 1,
        policy: ArtifactRef | None = None,
    ) -> TrainJob:
        """Give a round's job; its responses and replays depend on the round alone."""
        rollouts, replays, gate = self._round(round, weights)
        return TrainJob(
            policy=policy or self.initial,
            samples=self.samples,
            rollouts=rollouts,
            replays=replays,
            gate=gate,
            prompt=PROMPT,
            target="positive",
            loss=loss,
            optimizer=optimizer,
            engine=EngineFingerprint(engine="transformers", version="any", torch="any", dtype=dtype),
            seed=3,
            round=round,
        )

    def with_sampler_logprobs(self, job: TrainJob, logprobs: Sequence[Tensor]) -> TrainJob:
        """Give the same round with other recorded log-probs of the sampler: one tensor per response, in their order."""
        values = iter(logprobs)
        rollouts = []
        for ref in job.rollouts:
            rows = [
                row.model_copy(update={"logprobs": tuple(next(values).tolist())})
                for row in read_rows(self.store.read(ref, ROLLOUTS), Rollout)
            ]
            name = digest_json([ref.key, [str(row.logprobs) for row in rows]])
            rollouts.append(self._given(_Rollouts(name=name), ROLLOUTS, rows, Rollout))
        return job.model_copy(update={"rollouts": tuple(rollouts)})

    def _round(
        self, number: int, kind: Literal["response", "token"]
    ) -> tuple[tuple[ArtifactRef, ...], tuple[ArtifactRef, ...], ArtifactRef]:
        random = torch.Generator().manual_seed(number)
        rollouts, replays, weights = [], [], []
        lengths = cycle(LENGTHS)
        for shard, names in enumerate(SHARDS):
            rows = [
                self._rollout(name, index, next(lengths), number, random)
                for name in names
                for index in range(GROUP_SIZES[name])
            ]
            name = f"round {number}, shard {shard}"
            rollouts.append(self._given(_Rollouts(name=name), ROLLOUTS, rows, Rollout))
            replays.append(
                self._given(_Replay(name=name), REPLAYS, [self._replay(row, random) for row in rows], Replay)
            )
            for row in rows:
                drawn = torch.rand(len(row.token_ids), generator=random).mul(2).tolist()
                values = drawn if kind == "token" else drawn[:1]
                weights.append(Weight(sample_id=row.sample_id, index=row.index, weights=tuple(values)))
        gate = self._given(_Gate(name=f"round {number}, {kind}"), WEIGHTS, weights, Weight)
        return tuple(rollouts), tuple(replays), gate

    def _rollout(self, name: str, index: int, length: int, number: int, random: torch.Generator) -> Rollout:
        tokens = words(self.processor, length, seed=1000 * number + 10 * ord(name) + index)
        if index == 0:
            tokens = (*tokens[:-1], int(self.processor.tokenizer.eos_token_id))
        return Rollout(
            sample_id=name,
            index=index,
            policy="student",
            token_ids=tokens,
            logprobs=tuple(torch.rand(length, generator=random).neg().tolist()),
            text="",
            truncated=index != 0,
        )

    def _replay(self, row: Rollout, random: torch.Generator) -> Replay:
        vocabulary = len(self.processor.tokenizer)
        logprobs = torch.randn(len(row.token_ids), vocabulary, generator=random).mul(2).log_softmax(-1)
        top = logprobs.topk(TOP_K, dim=-1)
        return Replay(
            sample_id=row.sample_id,
            index=row.index,
            logprobs_positive=tuple(logprobs.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0].tolist()),
            # What the target is not must not be read.
            logprobs_negative=(float("nan"),) * len(row.token_ids),
            max_logprobs=tuple(top.values[:, 0].tolist()),
            topk_ids=tuple(tuple(ids) for ids in top.indices.tolist()),
            topk_logprobs=tuple(tuple(values) for values in top.values.tolist()),
        )

    def _given(self, job: _Given, name: str, rows: list[Any], record: type[Record]) -> ArtifactRef:
        def make(folder: Path) -> Outcome:
            write_rows(folder / name, rows, record)
            return Outcome()

        return self.store.produce(job, make)

    def _no_policy(self, folder: Path) -> Outcome:
        (folder / "policy.json").write_text("{}")
        return Outcome()
