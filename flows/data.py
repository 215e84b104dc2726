"""Wiring of the data's part of the pipeline: from files to validated samples and their crops."""

from flows.config import RunConfig
from flows.run import fingerprint
from tasks.adapters.importers import source_digest
from tasks.adapters.row_facts import Compared
from tasks.artifacts import ArtifactRef
from tasks.build_views import ViewShardJob, ViewsJob, build_view_shard, build_views, num_view_shards
from tasks.config import GivenRegions
from tasks.data_docs import BAD_ROWS, DataDocsJob, data_docs
from tasks.evaluation_config import BenchmarkConfig
from tasks.fingerprints import FingerprintsJob, fingerprints
from tasks.import_data import ImportDataJob, import_data
from tasks.propose_regions import (
    RegionShardJob,
    RegionsJob,
    num_region_shards,
    propose_region_shard,
    propose_regions,
)
from tasks.stage import RunContext
from tasks.training_set import TrainingSetJob, training_set
from tasks.validate import ValidateJob, require_usable, validate


def imported_rows(config: RunConfig, run: RunContext, known: ArtifactRef | None) -> ArtifactRef:
    """Read the rows of the data and their images, but for those that a training set has seen."""
    return import_data(
        ImportDataJob(
            source=source_digest(run.data, run.dataset.images, run.dataset.seen(known) if known is not None else set()),
            images=config.data.images,
            max_image_pixels=config.data.max_image_pixels,
            known=known,
        ),
        run,
    )


def validated_samples(
    config: RunConfig, run: RunContext, rows: ArtifactRef, models: ArtifactRef
) -> tuple[ArtifactRef, ArtifactRef]:
    """Validate training rows: give the samples, and the pages that show what was found."""
    settings = config.data
    # Headers have no hashes that could be compared.
    compared = [
        Compared(
            name=source.name if isinstance(source, BenchmarkConfig) else source.path.rsplit("/", 1)[-1],
            fingerprints=fingerprints(FingerprintsJob(source=digest, max_image_pixels=settings.max_image_pixels), run),
        )
        for digest, source in (run.compared if settings.images == "decode" else {}).items()
    ]
    samples = validate(
        ValidateJob(
            rows=rows,
            models=models,
            compared=tuple(compared),
            prompt=config.prompt,
            views=config.views,
            region_required=isinstance(config.regions.proposer, GivenRegions),
            max_region_share=settings.max_region_share,
            max_hash_distance=settings.max_hash_distance,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_new_tokens=config.sampling.max_new_tokens,
        ),
        run,
    )
    docs = data_docs(DataDocsJob(samples=samples), run)
    require_usable(run.store.manifest(samples).summary, settings.max_bad_share, run.store.path_of(docs, BAD_ROWS))
    return samples, docs


def with_regions(config: RunConfig, run: RunContext, samples: ArtifactRef, teacher: ArtifactRef) -> ArtifactRef | None:
    """Propose regions for the samples that have none; None where they come with the data."""
    proposer = config.regions.proposer
    if isinstance(proposer, GivenRegions):
        return None
    num_shards = num_region_shards(run.store.manifest(samples).summary["num_samples"])
    shards = [
        propose_region_shard(
            RegionShardJob(
                samples=samples,
                teacher=teacher,
                prompt=config.prompt,
                crop=config.views.positive,
                resample=config.views.resample,
                proposer=proposer,
                max_new_tokens=config.regions.max_new_tokens,
                engine=fingerprint(config.teacher),
                shard=shard,
                num_shards=num_shards,
            ),
            run,
        )
        for shard in range(num_shards)
    ]
    job = RegionsJob(
        samples=samples,
        shards=tuple(shards),
        min_contrast=config.regions.min_contrast,
        min_kept_share=config.regions.min_kept_share,
    )
    return propose_regions(job, run)


def both_views(config: RunConfig, run: RunContext, samples: ArtifactRef) -> ArtifactRef:
    """Cut both crops of every sample, shard by shard."""
    num_shards = num_view_shards(run.store.manifest(samples).summary["num_samples"])
    shards = [
        build_view_shard(
            ViewShardJob(samples=samples, views=config.views, seed=config.seed, shard=shard, num_shards=num_shards), run
        )
        for shard in range(num_shards)
    ]
    return build_views(ViewsJob(shards=tuple(shards), max_bad_share=config.data.max_bad_share), run)


def training_samples(
    config: RunConfig, run: RunContext, rows: ArtifactRef, views: ArtifactRef, previous: ArtifactRef | None
) -> ArtifactRef:
    """Put together what is trained on: all new samples and, in a retraining, some of those learned before."""
    return training_set(
        TrainingSetJob(
            rows=rows,
            views=views,
            previous=previous,
            replay_share=config.retrain.replay_share if previous is not None else 0.0,
            num_held_out=config.selection.num_prompts,
            seed=config.seed,
        ),
        run,
    )
