"""Effects: the stages of the pipeline as Prefect tasks, over adapters that each hold one vendor."""
