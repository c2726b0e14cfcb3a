"""Whether the container has the memory, processes and cores that a training needs."""

from stage import limits
from stage.output import say
from training.settings import Settings

# The memory that train needs, in bytes: for torch and the images, per worker for torch's buffers, and per image of a
# batch for what a step keeps of it (float32; measured with 1 to 64 workers and batches of 96 to 10,000).
PARENT_MEMORY, WORKER_MEMORY, IMAGE_MEMORY = 225_000_000, 32_000_000, 150_000
# Copies of the parameters in memory while a checkpoint is written or read: in all, and for each worker.
PARENT_COPIES, WORKER_COPIES = 7, 5


def check_limits(wanted: Settings) -> None:
    """Raise Failure if the container lacks memory or processes for the settings; warn if it has too few cores."""
    workers = wanted.num_processes
    check_training_memory(wanted)
    limits.check_threads(2 * workers + 2)  # the workers, as many threads for validation, and a margin
    cores = limits.count_cores()
    if workers > cores:
        say(f"train: warning: {workers} workers share {cores} core{'s' * (cores > 1)}, which slows training down")


def check_training_memory(wanted: Settings, parameters: int = 0) -> None:
    """Raise Failure if the container lacks memory for the settings and a network of so many parameters (float32)."""
    workers, batch_size = wanted.num_processes, wanted.batch_size
    needed = PARENT_MEMORY + workers * (WORKER_MEMORY + batch_size * IMAGE_MEMORY)
    needed += 4 * parameters * (PARENT_COPIES + workers * WORKER_COPIES)
    limits.check_memory(needed, f"training with {workers} workers and batches of {batch_size:,} images")
